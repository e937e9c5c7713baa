"""`perceptiondlm plan`: what a training run will take, before it starts. The formulas stand in docs/training.md."""

import argparse
from pathlib import Path

import torch

from perceptiondlm.common.environment import environment
from perceptiondlm.common.json_files import write_json
from perceptiondlm.training.calibrate import calibrate
from perceptiondlm.training.config import load_run_config
from perceptiondlm.training.footprint import PAPER_TFLOPS, SHARDINGS, Machine
from perceptiondlm.training.planner import make_plan, plan_json, show_plan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the subcommand."""
    parser.add_argument("overrides", nargs="*", help="section.key=value, values in YAML syntax")
    parser.add_argument("--config", type=Path, required=True, help="YAML file of the run")
    parser.add_argument("--gpus", type=int, default=32, help="number of GPUs (the paper's 32)")
    parser.add_argument("--memory", type=float, default=80.0, help="GB of each")
    parser.add_argument("--sharding", choices=SHARDINGS, default="zero2", help="what the GPUs share")
    speed = parser.add_mutually_exclusive_group()
    speed.add_argument("--tflops", type=float, default=PAPER_TFLOPS, help="TFLOP/s that one GPU really does")
    speed.add_argument(
        "--measure", action="store_true", help="measure TFLOP/s on this machine, on a slice of the model"
    )
    speed.add_argument("--tokens-per-second", type=float, help="of one GPU on this run, as its log says")
    parser.add_argument("--json", type=Path, help="write the numbers here")


def run(options: argparse.Namespace) -> None:
    """Plan and print."""
    run_config = load_run_config(options.config, options.overrides)
    machine = Machine(options.gpus, options.memory, options.sharding, options.tflops, options.tokens_per_second)
    if options.measure:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        measured = calibrate(run_config, device)
        machine.tflops = measured.tflops
        print(f"measured on {environment(device)['hardware']}: {measured.tflops:.4g} TFLOP/s")
    plan = make_plan(run_config, machine)
    print(show_plan(plan))
    if options.json:
        write_json(options.json, plan_json(plan))
