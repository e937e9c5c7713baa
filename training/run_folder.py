"""A run folder belongs to one run: what may start and go on in it, and what a run leaves there to be known by.

`run.yaml` holds the configuration, `started.json` how many samples a step takes on how many processes, where, and to
how many readers a stream was dealt.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from perceptiondlm.checkpoints.folder import newest_checkpoint
from perceptiondlm.common.json_files import read_json, write_json
from perceptiondlm.training.config import RunConfig, load_run_config


RUN_FILE, START_FILE = "run.yaml", "started.json"
STEP = "samples per step"
# Settings that change nothing about the weights a run ends with: these may differ when it goes on.
FREE = (
    "export_dir", "export_dtype", "resume", "resume_with", "evaluation.", "plan.", "batch_size", "data.prepared",
    "data.max_bad_share",
)  # fmt: skip
FREE_TRAINER = (
    "output_dir", "logging_", "log_", "save_", "report_to", "run_name", "project", "trackio_", "disable_tqdm",
    "dataloader_num_workers", "dataloader_prefetch_factor", "dataloader_pin_memory", "gradient_accumulation_steps",
    "gradient_checkpointing", "activation_checkpointing", "ddp_", "use_cpu", "push_to_hub", "hub_", "torch_empty_cache",
)  # fmt: skip


def claim_folder(run: RunConfig, samples_per_step: int) -> Path | None:
    """The checkpoint to go on from, or None for a start from the beginning.

    Raises:
        ValueError: the folder holds another run: it has checkpoints and `resume` is off; or data, loss, model, rates or
            samples per step differ from the stored ones, naming each that does and is not in `resume_with`; or its
            newest checkpoint holds weights alone.
    """
    found = sorted(folder.name for folder in run.output_dir.glob("checkpoint-*"))
    if not run.resume:
        if found:
            raise ValueError(
                f"{run.output_dir} belongs to a run already: it holds {found[-1]}. Go on with it, --resume, or choose "
                "another trainer.output_dir"
            )
        return None
    last = newest_checkpoint(run.output_dir)
    if last is not None:
        refuse_another_run(run, samples_per_step)
        if not Path(last, "scheduler.pt").is_file():
            raise ValueError(
                f"{last} holds weights alone (trainer.save_only_model): a run cannot go on from it. Choose another "
                "trainer.output_dir, and init_from it to train on from its weights"
            )
    return last


def stream_readers(run: RunConfig, readers: int) -> int:
    """Readers that a stream is dealt to: those that the run started with, since its order depends on them."""
    path = Path(run.output_dir, START_FILE)
    return read_json(path)["readers"] if run.resume and path.is_file() else readers


def leave_marks(
    run: RunConfig, samples_per_step: int, processes: int, readers: int, environment: dict[str, Any]
) -> None:
    """Write what the run is known by."""
    run.output_dir.mkdir(parents=True, exist_ok=True)
    Path(run.output_dir, RUN_FILE).write_text(run.to_yaml())
    counts = {"samples_per_step": samples_per_step, "processes": processes, "readers": readers}
    write_json(Path(run.output_dir, START_FILE), {**counts, "environment": environment})


def refuse_another_run(run: RunConfig, samples_per_step: int) -> None:
    """Raise `ValueError` unless the stored run is this one, but for settings that `resume_with` names."""
    path, start = Path(run.output_dir, RUN_FILE), Path(run.output_dir, START_FILE)
    if not path.is_file() or not start.is_file():
        raise ValueError(
            f"{run.output_dir} holds checkpoints, but no {RUN_FILE} and {START_FILE} that say whose: choose another "
            "trainer.output_dir, and init_from one of them to train on from its weights"
        )
    differences = dict(changed_settings(load_run_config(path), run))
    before = read_json(start)["samples_per_step"]
    if before != samples_per_step:
        differences[STEP] = (before, samples_per_step)
    known = {STEP, *trainer_defaults(), *flat(dataclasses.asdict(run)), *differences}
    if unknown := sorted(name for name in run.resume_with if not any(_covers(name, setting) for setting in known)):
        raise ValueError(f"resume_with names {unknown}, which are no settings; those that differ: {list(differences)}")
    refused = {
        name: values
        for name, values in differences.items()
        if not any(_covers(permitted, name) for permitted in run.resume_with)
    }
    if refused:
        listed = "; ".join(f"{name} was {old!r}, is {new!r}" for name, (old, new) in sorted(refused.items()))
        raise ValueError(
            f"{run.output_dir} belongs to another run: {listed}. Go on with the settings of {path}, choose another "
            "trainer.output_dir, or name in resume_with what is to change"
        )


def changed_settings(stored: RunConfig, given: RunConfig) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """Names of the settings that decide what a run learns and differ, with both values."""
    first, second = (flat(dataclasses.asdict(run)) for run in (stored, given))
    defaults = trainer_defaults()
    free = (*FREE, *(f"trainer.{prefix}" for prefix in FREE_TRAINER))
    for name in sorted({*first, *second}):
        if name.startswith(free):
            continue
        values = [settings.get(name, defaults.get(name)) for settings in (first, second)]
        old, new = (None if value in ({}, []) else value for value in values)  # what an empty section lacks is named
        if old != new:
            yield name, (old, new)


def trainer_defaults() -> dict[str, Any]:
    """What the HF Trainer takes for settings that are not given, by their dotted names."""
    return {f"trainer.{f.name}": f.default for f in dataclasses.fields(TrainingArguments) if f.init}


def _covers(name: str, setting: str) -> bool:
    """Whether a name is that of a setting or of a section around it."""
    return f"{setting}.".startswith(f"{name}.")


def flat(settings: Any, place: str = "") -> dict[str, Any]:
    """Values of nested settings by their dotted names; an empty section is one value."""
    if isinstance(settings, (dict, list)) and settings:
        items = settings.items() if isinstance(settings, dict) else enumerate(settings)
        return {name: value for key, inner in items for name, value in flat(inner, f"{place}{key}.").items()}
    return {place.removesuffix("."): settings}
