"""Time and peak memory of converting a checkpoint of the released 8B shape, written here with random bf16 weights.

    python -m perceptiondlm.studies.conversion --tokenizer DIR --work DIR --json report.json

Needs about 36 GB of disk in `--work`, which is emptied afterwards. `--tokenizer` is any checkpoint directory with
LLaDA's tokenizer. The conversion runs in a process of its own, whose peak resident memory is reported.
"""

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tqdm.auto import tqdm

from perceptiondlm.checkpoints.convert import target_shapes
from perceptiondlm.checkpoints.files import INDEX, write_json
from perceptiondlm.checkpoints.layouts import RELEASED_QUIRKS, TO_RELEASED_RULES, rename, to_released_config
from perceptiondlm.common.environment import environment
from perceptiondlm.configuration_perceptiondlm import PerceptionDLMConfig


SHARD_BYTES = 5 * 10**9


def released_8b() -> PerceptionDLMConfig:
    """The released model's shape."""
    return PerceptionDLMConfig.from_preset("8b", **RELEASED_QUIRKS)


def shards(config: PerceptionDLMConfig) -> Iterator[dict[str, tuple[int, ...]]]:
    """Names and shapes of the released tensors, at most 5 GB of bf16 at a time."""
    group: dict[str, tuple[int, ...]] = {}
    size = 0
    for name, shape in target_shapes(config).items():
        num_bytes = 2 * int(torch.Size(shape).numel())
        if group and size + num_bytes > SHARD_BYTES:
            yield group
            group, size = {}, 0
        released = rename(name, TO_RELEASED_RULES)
        assert isinstance(released, str)
        group[released] = shape
        size += num_bytes
    yield group


def write_source(folder: Path, tokenizer: Path, config: PerceptionDLMConfig) -> int:
    """Write a checkpoint of random bf16 weights in the released layout, shard by shard; returns its bytes."""
    folder.mkdir(parents=True)
    groups = list(shards(config))
    generator = torch.Generator().manual_seed(0)
    weight_map: dict[str, str] = {}
    total = 0
    for number, group in enumerate(tqdm(groups, desc="random shards"), start=1):
        name = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        tensors = {
            k: torch.empty(shape, dtype=torch.bfloat16).normal_(std=config.initializer_range, generator=generator)
            for k, shape in group.items()
        }
        save_file(tensors, folder / name)
        weight_map |= dict.fromkeys(group, name)
        total += sum(tensor.nbytes for tensor in tensors.values())
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    write_json(folder / "config.json", to_released_config(config))
    for path in tokenizer.glob("*token*.json"):
        shutil.copy(path, folder)
    return total


# What the fresh process runs.
CONVERSION = """
import dataclasses, json, sys
from pathlib import Path
from perceptiondlm.checkpoints.convert import Options, convert
print(json.dumps(dataclasses.asdict(convert(Options(sys.argv[1], Path(sys.argv[2]), to=sys.argv[3])))))
"""


def measure(source: Path, target: Path, to: str = "perceptiondlm") -> dict[str, Any]:
    """Convert in a fresh process; its seconds and peak resident memory."""
    command = [sys.executable, "-c", CONVERSION, str(source), str(target), to]
    report = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])
    largest = max(path.stat().st_size for path in source.glob("*.safetensors"))
    return {
        "seconds": round(report["seconds"], 1),
        "peak_resident_bytes": report["peak_memory_bytes"],
        "largest_shard_bytes": largest,
        "bound_bytes": largest + 2 * 10**9,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="a directory to make and to empty")
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    options.work.mkdir(parents=True)
    try:
        total = write_source(options.work / "source", options.tokenizer, released_8b())
        result = {"checkpoint_bytes": total, **measure(options.work / "source", options.work / "target")}
    finally:
        shutil.rmtree(options.work)
    result["within_bound"] = result["peak_resident_bytes"] <= result["bound_bytes"]
    write_json(options.json, {**result, "environment": environment()})
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
