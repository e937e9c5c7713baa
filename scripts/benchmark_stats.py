"""`perceptiondlm benchmark-stats`: masks per image, areas and questions of a benchmark (the paper's figure 4)."""

import argparse
from pathlib import Path

from perceptiondlm.common.json_files import write_json
from perceptiondlm.evaluation.benchmark_stats import benchmark_statistics, statistics_markdown, write_figure
from perceptiondlm.evaluation.benchmarks import load_benchmark


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the subcommand."""
    parser.add_argument("benchmark", help="a benchmark folder, or paradlc or dlc (downloaded)")
    parser.add_argument("--figure", type=Path, help="draw the figure here (PNG, SVG or PDF); needs matplotlib")
    parser.add_argument("--json", type=Path, help="write the counts here")


def run(options: argparse.Namespace) -> None:
    """Count, print, draw, write."""
    found = benchmark_statistics(load_benchmark(options.benchmark))
    print(statistics_markdown(found))
    if options.figure:
        write_figure(found, options.figure)
    if options.json:
        write_json(options.json, found)
