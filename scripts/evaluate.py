"""`perceptiondlm evaluate`: score a model by the protocol of ParaDLC-Bench."""

import argparse
import json
from pathlib import Path
from typing import Any

from perceptiondlm.evaluation.environment import environment
from perceptiondlm.evaluation.scenes import evaluate_scenes
from perceptiondlm.scripts.loading import add_model_arguments, generate_settings, load_pipeline


DATASETS = ("scenes",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the subcommand."""
    parser.add_argument("--dataset", choices=DATASETS, default="scenes", help="what to evaluate on")
    parser.add_argument("--seed", type=int, default=1000, help="seed of the drawn world (training used 1 and 2)")
    parser.add_argument("--images", type=int, default=100, help="number of pictures")
    parser.add_argument("--json", type=Path, help="write the whole report here, captions included")
    add_model_arguments(parser, seed=False)


def run(options: argparse.Namespace) -> None:
    """Evaluate and print."""
    pipe = load_pipeline(options)
    report = evaluate_scenes(
        pipe.model,
        pipe.processor,
        options.seed,
        options.images,
        progress=True,
        **generate_settings(options, leave_out=("seed",)),
    )
    report["environment"] = environment(pipe.device)
    print(table(report))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=1) + "\n")


def table(report: dict[str, Any]) -> str:
    """The report for a terminal."""
    head = f"{'':12s}{'Pos':>8s}{'Neg':>8s}{'Avg':>8s}{'Recog':>8s}"
    rows = [("model", report), *report["baselines"].items()]
    names = ("positive", "negative", "average", "recognition")
    lines = [
        f"{report['dataset']}, seed {report['seed']}: {report['num_images']} images, {report['num_regions']} regions"
    ]
    lines += [head, *(f"{name:12s}" + "".join(f"{row[key]:8.1f}" for key in names) for name, row in rows)]
    lines += [f"captions equal to the reference: {report['exact']:.1f} %"]
    lines += [f"accuracy of {name}: {value:.1f} %" for name, value in report["per_attribute"].items()]
    lines += [f"tokens per forward: {report['tokens_per_forward']:.2f}"]
    lines += [f"seconds per image: {report['seconds_per_image']:.3f}"]
    where = report["environment"]
    lines += [f"on {where['hardware']}, {where['threads']} threads, torch {where['torch']}"]
    return "\n".join(lines)
