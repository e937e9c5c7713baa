"""`perceptiondlm compare`: results of `perceptiondlm evaluate` side by side, with paired bootstrap differences.

The first is what the others are compared to. Results of one system by several judges show how much the judge matters.
"""

import argparse
from pathlib import Path

from perceptiondlm.common.json_files import write_json
from perceptiondlm.evaluation.benchmarks import load_benchmark
from perceptiondlm.evaluation.reports.compare import compare, comparison_markdown
from perceptiondlm.evaluation.reports.results import read_results
from perceptiondlm.evaluation.reports.side_by_side import write_side_by_side


PAPER_TABLES = (2, 5, 6, 7, 9, 10, 11, 12)  # those with the columns Pos, Neg and Avg


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the subcommand."""
    parser.add_argument("results", nargs="+", type=Path, help="results.json files of the same benchmark")
    parser.add_argument("--allow-partial", action="store_true", help="compare on the regions that all results have")
    parser.add_argument(
        "--paper-table", type=int, choices=PAPER_TABLES, help="print this table of the paper beside ours"
    )
    parser.add_argument("--markdown", type=Path, help="write the tables here")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument(
        "--page", type=Path, help="write all captions side by side here (HTML), right and wrong marked; needs --data"
    )
    parser.add_argument("--data", help="the benchmark the results are of: a folder, or paradlc or dlc (downloaded)")


def run(options: argparse.Namespace) -> None:
    """Compare, print, write."""
    if options.page and not options.data:
        raise ValueError("--page needs the benchmark: name it with --data")
    benchmark = load_benchmark(options.data) if options.page else None
    comparison = compare([read_results(path) for path in options.results], options.allow_partial)
    text = comparison_markdown(comparison, options.paper_table)
    print(text)
    if options.markdown:
        options.markdown.parent.mkdir(parents=True, exist_ok=True)
        options.markdown.write_text(text, encoding="utf-8")
    if options.json:
        write_json(options.json, comparison.to_dict())
    if benchmark is not None:
        write_side_by_side(comparison, benchmark, options.page)
        print(options.page)
