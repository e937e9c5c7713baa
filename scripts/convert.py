"""`perceptiondlm convert`: make published checkpoints loadable here, and write them back in the released layout.

SOURCE may be the released PerceptionDLM or PerceptionDLM-Base, LLaDA-8B-Instruct (original or Llama-style naming, alone
or with a SigLIP2 tower), or a checkpoint of this repository. TARGET appears only when everything went well.
"""

import argparse
import re
import sys
from pathlib import Path

import torch

from perceptiondlm.checkpoints.convert import Options, Report, convert
from perceptiondlm.checkpoints.files import DTYPES
from perceptiondlm.configuration_perceptiondlm import ATTENTION_LAYOUTS


UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the subcommand."""
    parser.add_argument("source", help="directory or Hub id, such as MSALab/PerceptionDLM")
    parser.add_argument("target", type=Path, help="directory to make")
    parser.add_argument(
        "--to",
        choices=("perceptiondlm", "released", "region"),
        default="perceptiondlm",
        help="this repository's layout (default), the released one, or a base model with fresh region parts",
    )
    parser.add_argument("--vision-tower", help="directory or Hub id of a SigLIP2 tower to join to LLaDA (stage 1)")
    conditionings = ("replay", "vision")
    parser.add_argument("--region-conditioning", choices=conditionings, default="replay", help="with --to region")
    parser.add_argument("--attention-layout", choices=ATTENTION_LAYOUTS, default="isolated", help="with --to region")
    names = [str(dtype).removeprefix("torch.") for dtype in DTYPES.values()]
    parser.add_argument("--dtype", choices=names, help="of the weights written; by default the source's")
    parser.add_argument("--max-shard-size", default="5GB", help="such as 500MB; a shard never spans two source shards")
    parser.add_argument("--seed", type=int, default=0, help="of fresh parts")
    parser.add_argument("--push-to-hub", metavar="REPO_ID", help="upload TARGET when it is finished")


def run(options: argparse.Namespace) -> None:
    """Convert and print what was done."""
    report = convert(
        Options(
            source=options.source,
            target=options.target,
            to=options.to,
            vision_tower=options.vision_tower,
            region_conditioning=options.region_conditioning,
            attention_layout=options.attention_layout,
            dtype=getattr(torch, options.dtype) if options.dtype else None,
            max_shard_size=parse_size(options.max_shard_size),
            seed=options.seed,
            push_to_hub=options.push_to_hub,
        )
    )
    print_report(report)


def parse_size(text: str) -> int:
    """`500MB` as bytes."""
    match = re.fullmatch(r"(\d+)(KB|MB|GB|)", text)
    if not match or int(match[1]) == 0:
        raise ValueError(f"--max-shard-size must be a size such as 500MB or 5GB, got {text!r}")
    return int(match[1]) * UNITS[match[2]]


def print_report(report: Report) -> None:
    """What was used, dropped and made anew, and what it took."""
    print(
        f"{report.kind} -> {report.target}: {report.used} tensors used, {report.num_bytes / 1e9:.2f} GB {report.dtype}"
    )
    reasons: dict[str, list[str]] = {}
    for name, reason in report.dropped.items():
        reasons.setdefault(reason, []).append(name)
    for reason, names in reasons.items():
        print(f"  dropped {len(names)} ({names[0]}{', …' if len(names) > 1 else ''}): {reason}")
    if report.fresh:
        print(f"  initialised anew: {', '.join(report.fresh)}")
    memory = report.peak_memory_bytes
    print(f"  {report.seconds:.1f} s" + (f", peak memory {memory / 1e9:.2f} GB" if memory else ""), file=sys.stdout)
