"""`perceptiondlm prepare`: look through a run's data before its GPUs are rented. See docs/training.md."""

import argparse
import re

from perceptiondlm.training.config import load_run_config
from perceptiondlm.training.prepare import prepare


COLUMNS = ("records", "samples", "bad", "bad_regions", "too_long", "cut")
SHOWN = 5  # bad records that are printed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the subcommand."""
    parser.add_argument("config", help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", help="section.key=value, values in YAML syntax")
    parser.add_argument("--shard", default="1/1", metavar="I/N", help="look at the I-th of N shares, I from 1 to N")
    parser.add_argument("--workers", type=int, help="processes that read; by default one for every core")


def run(options: argparse.Namespace) -> None:
    """Look, and print what was found."""
    share = shard(options.shard)
    if options.workers is not None and options.workers < 1:
        raise ValueError(f"--workers must be at least 1, got {options.workers}")
    settings = load_run_config(options.config, options.overrides)
    for report, missing in prepare(settings, share, options.workers):
        if missing:
            print(f"{report.name}: {missing} parts are left to other shards; when they are done, run this once more")
            continue
        print(f"{report.name}: " + ", ".join(f"{getattr(report, name):,} {name}" for name in COLUMNS))
        for text in (report.bad_records + report.bad_region_records)[:SHOWN]:
            print(f"    {text}")


def shard(text: str) -> tuple[int, int]:
    """`I/N` as a number from 0 and a count."""
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise ValueError(f"--shard must be I/N with I from 1 to N, such as 1/4, got {text!r}")
    return int(found[1]) - 1, int(found[2])
