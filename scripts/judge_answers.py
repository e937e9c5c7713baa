"""`perceptiondlm judge-answers`: judge short answers strictly, from the sample logs of lmms-eval.

As the paper does for ChartQA, DocVQA and InfoVQA, with Qwen3-8B.
"""

import argparse
from pathlib import Path

from perceptiondlm.common.json_files import write_json
from perceptiondlm.evaluation.general.strict_answers import (
    TextJudge,
    judge_answers,
    read_samples,
    strict_report,
    task_of_log,
)
from perceptiondlm.evaluation.general.tasks import find_benchmark
from perceptiondlm.evaluation.judges.registry import judge_report
from perceptiondlm.evaluation.reports.paper_tables import cell_text, markdown_table, paper_table
from perceptiondlm.scripts.judging import add_judge_arguments, load_judge


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the subcommand."""
    parser.add_argument("logs", nargs="+", type=Path, help="TIME_samples_TASK.jsonl files of lmms-eval --log_samples")
    add_judge_arguments(parser, "openai:MODEL, azure:DEPLOYMENT or transformers:PATH")
    parser.add_argument("--json", type=Path, help="write accuracies and every verdict here")


def run(options: argparse.Namespace) -> None:
    """Judge, print, write."""
    if not options.judge:
        raise ValueError("--judge is missing: openai:MODEL, azure:DEPLOYMENT or transformers:PATH")
    logs = {path: (task_of_log(path), read_samples(path)) for path in options.logs}
    judge = load_judge(options, options.judge)
    if not isinstance(judge, TextJudge):
        raise ValueError(f"judge {options.judge} answers only questions about captions")
    paper, rows, reports = paper_table(1), [], []
    for task, samples in logs.values():
        report = strict_report(task, judge_answers(samples, judge))
        benchmark = find_benchmark(task)
        printed = paper.rows[benchmark.row][0] if benchmark else None
        rows.append([task, str(len(samples)), cell_text(report["accuracy"]), cell_text(printed)])
        reports.append(report)
        if report["unreadable"]:
            print(f"{task}: unreadable verdicts, counted as wrong: {', '.join(report['unreadable'])}")
    print(markdown_table(["task", "answers", "strict accuracy", f"{paper.columns[0]} in the paper"], rows))
    if options.json:
        write_json(options.json, {"judge": judge_report(judge), "tasks": reports})
