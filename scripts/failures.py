"""`perceptiondlm failures`: how systems fail, by the classes of the paper's figure 7, from results of `evaluate`."""

import argparse
from pathlib import Path

from perceptiondlm.common.json_files import write_json
from perceptiondlm.evaluation.benchmarks import load_benchmark
from perceptiondlm.evaluation.reports.failures import TINY, count_failures, failures_markdown
from perceptiondlm.evaluation.reports.results import read_results


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the subcommand."""
    parser.add_argument("results", nargs="+", type=Path, help="results.json files of the same benchmark")
    parser.add_argument("--data", required=True, help="the benchmark: a folder, or paradlc or dlc (downloaded)")
    parser.add_argument("--tiny", type=float, default=TINY, help="share of the image below which a region is tiny")
    parser.add_argument("--examples", type=int, default=3, help="shown of each class")
    parser.add_argument("--json", type=Path, help="write every failure here")


def run(options: argparse.Namespace) -> None:
    """Count, print, write."""
    benchmark = load_benchmark(options.data)
    results = [read_results(path) for path in options.results]
    titles = [f"{one.title} (judge {one.judge})" for one in results]
    if len(set(titles)) < len(titles):  # one system twice: told apart by their files
        titles = [f"{title}, {path}" for title, path in zip(titles, options.results, strict=True)]
    failures = {
        title: count_failures(one.score.regions, benchmark, options.tiny)
        for title, one in zip(titles, results, strict=True)
    }
    print(failures_markdown(failures, options.examples))
    if options.json:
        write_json(options.json, failures)
