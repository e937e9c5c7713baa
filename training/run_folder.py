"""A run folder belongs to one run: what may start and go on in it, and what a run leaves there to be known by.

`run.yaml` holds the configuration, `started.json` how many samples a step takes on how many processes, and where.
"""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from perceptiondlm.checkpoints.folder import newest_checkpoint
from perceptiondlm.common.json_files import write_json
from perceptiondlm.training.config import RunConfig, load_run_config


RUN_FILE, START_FILE = "run.yaml", "started.json"
# Settings that change nothing about the weights a run ends with: these may differ when it goes on.
FREE = ("export_dir", "export_dtype", "resume", "resume_with", "evaluation", "plan", "batch_size")
FREE_TRAINER = (
    "output_dir", "logging_", "log_", "save_", "report_to", "run_name", "project", "trackio_", "disable_tqdm",
    "dataloader_num_workers", "dataloader_prefetch_factor", "dataloader_pin_memory", "gradient_accumulation_steps",
    "gradient_checkpointing", "activation_checkpointing", "ddp_", "use_cpu", "push_to_hub", "hub_", "torch_empty_cache",
)  # fmt: skip


def claim_folder(run: RunConfig, samples_per_step: int) -> Path | None:
    """The checkpoint to go on from, or None for a start from the beginning.

    Raises:
        ValueError: the folder holds another run: it has checkpoints and `resume` is off; or data, loss, model, rates or
            samples per step differ from the stored ones, naming each that does and is not in `resume_with`.
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
    return last


def leave_marks(run: RunConfig, samples_per_step: int, processes: int, environment: dict[str, Any]) -> None:
    """Write what the run is known by."""
    run.output_dir.mkdir(parents=True, exist_ok=True)
    Path(run.output_dir, RUN_FILE).write_text(run.to_yaml())
    start = {"samples_per_step": samples_per_step, "processes": processes, "environment": environment}
    write_json(Path(run.output_dir, START_FILE), start)


def refuse_another_run(run: RunConfig, samples_per_step: int) -> None:
    """Raise `ValueError` unless the stored run is this one, but for settings that `resume_with` names."""
    path, start = Path(run.output_dir, RUN_FILE), Path(run.output_dir, START_FILE)
    if not path.is_file() or not start.is_file():
        raise ValueError(
            f"{run.output_dir} holds checkpoints, but no {RUN_FILE} and {START_FILE} that say whose: choose another "
            "trainer.output_dir, and init_from one of them to train on from its weights"
        )
    differences = dict(changed_settings(load_run_config(path), run))
    before = json.loads(start.read_text())["samples_per_step"]
    if before != samples_per_step:
        differences["samples per step"] = (before, samples_per_step)
    if unknown := sorted(set(run.resume_with) - set(differences)):
        raise ValueError(f"resume_with names {unknown}, which do not differ; those that do: {sorted(differences)}")
    refused = {name: values for name, values in differences.items() if name not in run.resume_with}
    if refused:
        listed = "; ".join(f"{name} was {old!r}, is {new!r}" for name, (old, new) in sorted(refused.items()))
        raise ValueError(
            f"{run.output_dir} belongs to another run: {listed}. Go on with the settings of {path}, choose another "
            "trainer.output_dir, or name in resume_with what is to change"
        )


def changed_settings(stored: RunConfig, given: RunConfig) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """Names of the settings that decide what a run learns and differ, with both values."""
    first, second = (flat(dataclasses.asdict(run)) for run in (stored, given))
    defaults = {f"trainer.{f.name}": f.default for f in dataclasses.fields(TrainingArguments)}
    for name in sorted({*first, *second}):
        if name.split(".")[0] in FREE or name.startswith(tuple(f"trainer.{prefix}" for prefix in FREE_TRAINER)):
            continue
        values = [settings.get(name, defaults.get(name)) for settings in (first, second)]
        if values[0] != values[1]:
            yield name, (values[0], values[1])


def flat(settings: Any, place: str = "") -> dict[str, Any]:
    """Values of nested settings by their dotted names; an empty section is one value."""
    if isinstance(settings, (dict, list)) and settings:
        items = settings.items() if isinstance(settings, dict) else enumerate(settings)
        return {name: value for key, inner in items for name, value in flat(inner, f"{place}{key}.").items()}
    return {place.removesuffix("."): settings}
