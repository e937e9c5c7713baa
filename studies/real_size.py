"""The 8B shape on this machine: load it memory-mapped and caption an image of seven tiles, phase by phase.

    python -m perceptiondlm.studies.real_size FOLDER --json studies/results/real_size_cpu.json
    python -m perceptiondlm.studies.real_size --show studies/results/real_size_cpu.json

Makes a checkpoint of random bf16 weights once, in FOLDER, which needs 36 GB of disk meanwhile and 17 GB afterwards: a
base model in the released layout, written shard by shard and converted by `--to region`. The report is written after
every phase, so that an interrupted run keeps what it measured; a checkpoint that is there is used again.

The first run of a part reads its weights from disk, the second finds them in memory. A pass is the difference between
`STEPS` steps and one, over which half of the slots are open on average, as over a whole caption. Weights are mapped
files: they count as resident once they were read.
"""

import argparse
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from perceptiondlm.checkpoints.layouts import BASE_FIELDS
from perceptiondlm.common.environment import environment
from perceptiondlm.common.json_files import read_json, write_json
from perceptiondlm.common.loading import REPOSITORY
from perceptiondlm.common.measuring import peak_allocation, peak_memory, timed
from perceptiondlm.configuration_perceptiondlm import PerceptionDLMConfig
from perceptiondlm.modeling_perceptiondlm import PerceptionDLMForConditionalGeneration
from perceptiondlm.processing_perceptiondlm import PerceptionDLMProcessor
from perceptiondlm.studies import conversion, memory_model
from perceptiondlm.studies.memory_model import MemoryModel, gigabytes
from perceptiondlm.studies.regions_at_scale import boxes, picture


CPU = torch.device("cpu")
STEPS = 3
MADE = "made.json"  # beside the checkpoint: how it was made


def shape(layers: int | None = None) -> PerceptionDLMConfig:
    """The 8B shape as a base model; with `layers`, that many in the language model and in the vision tower."""
    config = PerceptionDLMConfig.from_preset("8b", **BASE_FIELDS)
    if layers is not None:
        config.text_config.num_hidden_layers = config.vision_config.num_hidden_layers = layers
    return config


def make_checkpoint(folder: Path, config: PerceptionDLMConfig, tokenizer: Path) -> dict[str, Any]:
    """Make the checkpoint `folder/checkpoint` unless it is there; how it was made.

    Raises:
        ValueError: if there is one of another shape.
    """
    target, source = folder / "checkpoint", folder / ".source"
    sizes = {name: getattr(config.text_config, name) for name in ("hidden_size", "num_hidden_layers")}
    if target.exists():
        made = read_json(folder / MADE)
        if made["sizes"] != sizes:
            raise ValueError(f"{target} has {made['sizes']}, asked for is {sizes}: name another folder")
        return made
    for left_over in (source, folder / ".new"):  # of a run that was interrupted
        shutil.rmtree(left_over, ignore_errors=True)
    try:
        num_bytes = conversion.write_source(source, tokenizer, config)
        made = {"sizes": sizes, "bytes": num_bytes, "conversion": conversion.measure(source, folder / ".new", "region")}
        write_json(folder / MADE, made)
        (folder / ".new").rename(target)
    finally:
        shutil.rmtree(source, ignore_errors=True)
    return made


class Report:
    """The phases measured so far, on disk as well.

    Args:
        path: of the JSON file.
        head: what stands above the phases.
    """

    def __init__(self, path: Path, head: dict[str, Any], total: int):
        self.path, self.content = path, {**head, "phases": []}
        self.bar = tqdm(total=total, desc="phases")

    def phase(self, name: str, function: Callable[[], Any], count: bool = True, **facts: Any) -> Any:
        """Run a phase and write down its seconds and memory; with `count` also what its tensors took at most."""
        self.bar.set_postfix_str(name)
        outputs: list[Any] = []
        allocated: list[int] = []

        def run() -> None:
            if count:
                allocated.append(peak_allocation(lambda: outputs.append(function()), CPU))
            else:
                outputs.append(function())

        seconds, _ = timed(run, CPU)
        row = {"phase": name, **facts, "seconds": seconds, "peak_resident_bytes": peak_memory()}
        if count:
            row["allocated_bytes"] = allocated[0]
        self.content["phases"].append(row)
        write_json(self.path, self.content)
        self.bar.update()
        return outputs[0]


def measure(folder: Path, config: PerceptionDLMConfig, regions: list[int], path: Path, tokenizer: Path) -> dict:
    """All phases; see the top of this file. Returns the report."""
    made = make_checkpoint(folder, config, tokenizer)
    head = {"checkpoint": made, "regions": regions, "steps": STEPS, "environment": environment()}
    report = Report(path, head, total=5 + 2 * len(regions))
    checkpoint = folder / "checkpoint"
    trusted = {"trust_remote_code": True}  # the code is this package's own; without this the library asks
    load = partial(PerceptionDLMForConditionalGeneration.from_pretrained, checkpoint, dtype=torch.bfloat16, **trusted)
    model = report.phase("load", load, count=False).eval()
    processor = PerceptionDLMProcessor.from_pretrained(checkpoint, **trusted)
    inputs = processor(images=picture(), boxes=boxes(regions[0]))
    shared = int((inputs["token_roles"] == 0).sum())
    tiles = len(inputs["pixel_values"])
    report.content |= {"config": model.config.to_dict(), "tiles": tiles, "shared_tokens": shared}
    with torch.inference_mode():
        for run in ("first", "again"):
            image = report.phase("vision", lambda: model.encode_image(**inputs), run=run)
        for run in ("first", "again"):
            image.prefixes.clear()
            caption = partial(captions, model, processor, image, regions[0], 1)
            report.phase("prefill and one pass", caption, run=run, regions=regions[0])
        for count in regions:
            for steps in (1, STEPS):
                caption = partial(captions, model, processor, image, count, steps)
                report.phase("passes", caption, regions=count, steps=steps)
    report.bar.close()
    return report.content


def captions(model, processor, image, regions: int, steps: int) -> torch.Tensor:
    """Token ids of N regions of an encoded image after so many steps."""
    inputs = processor(images=image, boxes=boxes(regions))
    return model.generate(**inputs, encoded_image=image, steps=steps, early_exit=False).sequences


def summary(result: dict[str, Any]) -> dict[str, Any]:
    """What the phases of a finished report amount to.

    Returns:
        seconds to load, of the vision tower, of the language model's prefill and of a pass by number of regions, each
        as found the second time where there is one; peak resident bytes by phase.
    """
    phases = result["phases"]
    seconds = {(p["phase"], p.get("run"), p.get("regions"), p.get("steps")): p["seconds"] for p in phases}
    first = result["regions"][0]
    once = {count: seconds["passes", None, count, 1] for count in result["regions"]}
    passes = result["steps"] - 1
    peaks: dict[str, int] = {}
    for phase in phases:
        peaks[phase["phase"]] = max(peaks.get(phase["phase"], 0), phase["peak_resident_bytes"])
    return {
        "load": seconds["load", None, None, None],
        "vision": [seconds["vision", run, None, None] for run in ("first", "again")],
        "prefill": [seconds["prefill and one pass", run, first, None] - once[first] for run in ("first", "again")],
        "pass": {n: (seconds["passes", None, n, result["steps"]] - once[n]) / passes for n in result["regions"]},
        "peak_resident_bytes": peaks,
    }


def markdown(result: dict[str, Any]) -> str:
    """A report as two Markdown tables: what was measured, and memory by formula beside it."""
    found, made = summary(result), result["checkpoint"]
    peaks = found["peak_resident_bytes"]

    def twice(pair: list[float]) -> str:
        return f"{pair[0]:.1f}, again {pair[1]:.1f}"

    rows = [
        ("conversion of the checkpoint", f"{made['conversion']['seconds']:.1f}",
         gigabytes(made["conversion"]["peak_resident_bytes"])),
        ("load", f"{found['load']:.1f}", gigabytes(peaks["load"])),
        ("vision tower, seven tiles", twice(found["vision"]), gigabytes(peaks["vision"])),
        ("language model, prefill", twice(found["prefill"]), gigabytes(peaks["prefill and one pass"])),
        *((f"a pass, {n} region{'s' if n > 1 else ''}", f"{s:.2f}", gigabytes(peaks["passes"]))
          for n, s in found["pass"].items()),
    ]  # fmt: skip
    lines = ["| phase | seconds | peak resident memory, GB |", "| --- | --- | --- |"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    lines += ["", "| tensors held at most beyond what was there, GB | measured | by formula |", "| --- | --- | --- |"]
    lines += [
        f"| {name} | {measured / 1e9:.3f} | {formula / 1e9:.3f} |" for name, measured, formula in compared(result)
    ]
    config = PerceptionDLMConfig.from_dict(result["config"])
    model = MemoryModel(config, result["tiles"], result["shared_tokens"])
    return "\n".join([*lines, "", memory_model.table(model)])


def compared(result: dict[str, Any]) -> list[tuple[str, int, int]]:
    """What tensors took at most in each phase, measured and by formula, in bytes."""
    config = PerceptionDLMConfig.from_dict(result["config"])
    model = MemoryModel(config, result["tiles"], result["shared_tokens"], copies_casts=True)
    rows = []
    for phase in result["phases"]:
        if phase.get("run") == "first" or "allocated_bytes" not in phase or phase.get("steps", 1) > 1:
            continue
        if phase["phase"] == "vision":
            rows.append(("vision tower", phase["allocated_bytes"], model.vision()))
            continue
        count = phase["regions"]
        moments = model.moments(count)
        held = model.weights + model.pixels + model.image
        if phase["phase"] == "passes":
            held += model.prefix
            moments.pop("prefix")
            title = f"{count} region{'s' if count > 1 else ''}, prefix remembered"
        else:
            title = f"prefill, and a pass over {count} region{'s' if count > 1 else ''}"
        moments.pop("vision")
        kept = model.prefix if phase["phase"] == "passes" else 0
        moments["regions"] += kept  # the prefix was there before the regions were looked at
        rows.append((title, phase["allocated_bytes"], max(moments.values()) - held))
    return rows


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="where the checkpoint is made, or was made before")
    parser.add_argument("--json", type=Path, help="where the report goes")
    parser.add_argument("--regions", type=int, nargs="+", default=[1, 4, 20], metavar="N")
    parser.add_argument("--layers", type=int, help="so many layers in tower and language model, for a trial")
    parser.add_argument("--tokenizer", type=Path, default=REPOSITORY, help="by default the embedded model's")
    parser.add_argument("--show", type=Path, help="print a report as Markdown instead of measuring")
    options = parser.parse_args()
    if options.show:
        print(markdown(read_json(options.show)))
        return
    if options.folder is None or options.json is None:
        parser.error("give FOLDER and --json to measure, or --show to print a report")
    if min(options.regions) < 1 or (options.layers is not None and options.layers < 2):
        parser.error("--regions must be at least 1, --layers at least 2")
    result = measure(options.folder, shape(options.layers), options.regions, options.json, options.tokenizer)
    print(markdown(result))


if __name__ == "__main__":
    main()
