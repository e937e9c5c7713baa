"""What a run will take: parameters, memory, micro-batch, steps and days, estimated before anything is read.

The formulas stand in docs/training.md.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from perceptiondlm.training.config import QUANTIZED, LoraConfig, RunConfig
from perceptiondlm.training.footprint import SHARDINGS, Machine, Sequence, footprint


@dataclass
class Plan:
    """The estimate. Memory is of one GPU, in GB; `days` is None when the number of samples is unknown."""

    machine: Machine
    sequence: Sequence
    parameters: dict[str, dict[str, int]]
    state_gb: float
    sample_gb: float
    micro_batch: int
    accumulation: int
    batch_size: int
    samples: int | None
    steps: int | None
    tflop_per_sample: float
    tokens_per_second: float
    days: float | None


def make_plan(run: RunConfig, machine: Machine) -> Plan:
    """Estimate a run on a machine.

    Raises:
        ValueError: if the weights and the optimizer alone do not fit.
    """
    taken = footprint(run, machine)
    free = taken.free(machine)
    if free < taken.sample:
        needed = f"weights and optimizer take {taken.state / 1e9:.1f} GB and one sample {taken.sample / 1e9:.1f} GB"
        fitting = "; ".join(what_fits(run, machine)) or "nothing short of more GPUs, more memory or shorter sequences"
        raise ValueError(f"{needed} of the {machine.memory:.0f} GB of a GPU. What fits: {fitting}")
    batch = run.batch_size or run.trainer.get("per_device_train_batch_size", 8) * machine.gpus
    micro, accumulation = micro_batch(batch / machine.gpus, int(free // taken.sample))
    flop, sequence = taken.flop, taken.sequence
    speed = machine.tokens_per_second or machine.tflops * 1e12 / flop * sequence.tokens
    samples = planned_samples(run)
    steps = planned_steps(run, samples, batch)
    days = None if steps is None else steps * batch * sequence.tokens / (speed * machine.gpus) / 86400
    return Plan(
        machine, sequence, taken.parameters, taken.state / 1e9, taken.sample / 1e9, micro, accumulation, batch, samples,
        steps, flop / 1e12, speed, days,
    )  # fmt: skip


def planned_samples(run: RunConfig) -> int | None:
    """Samples of an epoch: `plan.samples`, or what the sources say."""
    counts = [source.samples for source in run.data.sources]
    if run.plan.samples is not None:
        return run.plan.samples
    return None if None in counts or not counts else sum(count for count in counts if count)


def planned_steps(run: RunConfig, samples: int | None, batch: int) -> int | None:
    """Optimizer steps of the run."""
    if run.trainer.get("max_steps", -1) > 0:
        return run.trainer["max_steps"]
    return None if samples is None else math.ceil(samples / batch * run.trainer.get("num_train_epochs", 3.0))


def micro_batch(per_gpu: float, fitting: int) -> tuple[int, int]:
    """The largest number of samples per pass that fits and divides a GPU's share of the batch, and the passes."""
    share = max(int(per_gpu), 1)
    size = max(n for n in range(1, share + 1) if share % n == 0 and n <= max(fitting, 1))
    return size, share // size


def what_fits(run: RunConfig, machine: Machine) -> Iterator[str]:
    """Settings, smallest changes first, with which a sample fits into the memory of a GPU."""
    checkpointing = {"gradient_checkpointing": True}
    changes: list[tuple[str, dict[str, Any], dict[str, Any]]] = [("", {}, {})]
    changes += [("trainer.gradient_checkpointing=true", checkpointing, {})]
    if "language_model" in run.train.parts:
        changes += [
            (
                f"train.lora='{{rank: 16}}' train.frozen_weights={held} trainer.gradient_checkpointing=true",
                {**checkpointing, "bf16": True},
                {"lora": LoraConfig(rank=16), "frozen_weights": held},
            )
            for held in ("bfloat16", *QUANTIZED)
        ]
    for sharding in dict.fromkeys((machine.sharding, *SHARDINGS)):
        shared = replace(machine, sharding=sharding)
        for name, trainer, train in changes:
            if train and sharding != "ddp":  # adapters need whole weights
                continue
            changed_run = replace(run, trainer={**run.trainer, **trainer}, train=replace(run.train, **train))
            taken = footprint(changed_run, shared)
            if taken.free(shared) >= taken.sample:
                yield f"{name} --sharding {sharding}".strip()


def show_plan(plan: Plan) -> str:
    """The plan for a terminal."""
    machine, sequence = plan.machine, plan.sequence
    lines = [f"{'part':16s}{'parameters':>18s}{'trained':>18s}"]
    lines += [f"{name:16s}{part['total']:18,}{part['trained']:18,}" for name, part in plan.parameters.items()]
    steps = "unknown: set plan.samples" if plan.steps is None else f"{plan.steps:,}"
    days = "unknown: set plan.samples" if plan.days is None else f"{plan.days:.2f}"
    facts = {
        "GPUs": f"{machine.gpus} of {machine.memory:.0f} GB, sharding {machine.sharding}",
        "a sample": f"{sequence.image} image + {sequence.text} text + {sequence.answers} answer tokens",
        "weights, optimizer": f"{plan.state_gb:.1f} GB per GPU",
        "activations": f"{plan.sample_gb:.2f} GB per sample",
        "batch": f"{plan.batch_size} = {machine.gpus} GPUs x {plan.micro_batch} x {plan.accumulation} passes",
        "samples": "unknown" if plan.samples is None else f"{plan.samples:,} per epoch",
        "steps": steps,
        "operations": f"{plan.tflop_per_sample:.1f} TFLOP per sample",
        "speed": f"{plan.tokens_per_second:,.0f} tokens per second and GPU",
        "days": days,
    }
    return "\n".join([*lines, *(f"{name:20s}{value}" for name, value in facts.items())])


def plan_json(plan: Plan) -> dict:
    """The plan as JSON-ready numbers."""
    return asdict(plan)
