"""What a run will take: parameters, memory, micro-batch, steps and days, estimated before anything is read.

The formulas stand in docs/training.md.
"""

import copy
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from perceptiondlm.configuration_perceptiondlm import PRESETS, PerceptionDLMConfig, num_tiles
from perceptiondlm.modeling_perceptiondlm import PerceptionDLMForConditionalGeneration
from perceptiondlm.training.config import RunConfig
from perceptiondlm.training.modules import count_parameters, prepare_parts
from perceptiondlm.training.start import changed, model_settings


SHARDINGS = ("ddp", "zero2", "fsdp")
# TFLOP/s that one GPU really does: what the paper's base stages (three weeks on 32 H100) come to by these formulas.
PAPER_TFLOPS = 130.0
RESERVE = 0.9  # share of the memory that may be planned with: the rest is fragmentation and communication


@dataclass
class Machine:
    """What a run has: GPUs, memory of each in GB, how weights are shared, and measured speed if there is one.

    Args:
        sharding: "ddp" (whole weights everywhere), "zero2" (gradients and optimizer shared), "fsdp" (everything shared;
            also ZeRO-3).
        tflops: what one GPU really does; tokens_per_second: of one GPU on this run, instead.
    """

    gpus: int = 32
    memory: float = 80.0
    sharding: str = "zero2"
    tflops: float = PAPER_TFLOPS
    tokens_per_second: float | None = None

    def __post_init__(self):
        for name in ("gpus", "memory", "tflops"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be more than 0, got {getattr(self, name)}")
        if self.tokens_per_second is not None and self.tokens_per_second <= 0:
            raise ValueError(f"tokens_per_second must be more than 0, got {self.tokens_per_second}")
        if self.sharding not in SHARDINGS:
            raise ValueError(f"sharding must be one of {SHARDINGS}, got {self.sharding!r}")


@dataclass
class Sequence:
    """A training sample as the plan assumes it: image tokens, other tokens of the prompt, answer tokens."""

    tiles: int
    image: int
    text: int
    answers: int

    @property
    def tokens(self) -> int:
        """Tokens of the sequence."""
        return self.image + self.text + self.answers


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
    config = planned_config(run)
    with torch.device("meta"):
        model = prepare_parts(PerceptionDLMForConditionalGeneration(config), copy.deepcopy(run.train))
    parameters = count_parameters(model)
    sequence = planned_sequence(run, config)
    state, sample = state_bytes(parameters, config, machine), sample_bytes(run, config, sequence, parameters)
    free = machine.memory * 1e9 * RESERVE - state
    if free < sample:
        raise ValueError(
            f"weights and optimizer take {state / 1e9:.1f} GB and one sample {sample / 1e9:.1f} GB of the "
            f"{machine.memory:.0f} GB of a GPU: use more GPUs, sharding 'fsdp', gradient checkpointing or train.lora"
        )
    batch = run.batch_size or run.trainer.get("per_device_train_batch_size", 8) * machine.gpus
    micro, accumulation = micro_batch(batch / machine.gpus, int(free // sample))
    flop = flop_per_sample(run, config, sequence, parameters)
    speed = machine.tokens_per_second or machine.tflops * 1e12 / flop * sequence.tokens
    samples = planned_samples(run)
    steps = planned_steps(run, samples, batch)
    days = None if steps is None else steps * batch * sequence.tokens / (speed * machine.gpus) / 86400
    return Plan(
        machine, sequence, parameters, state / 1e9, sample / 1e9, micro, accumulation, batch, samples, steps,
        flop / 1e12, speed, days,
    )  # fmt: skip


def planned_config(run: RunConfig) -> PerceptionDLMConfig:
    """The model's config: that of `init_from` if it is there, or else of the preset or the sizes given."""
    if run.init_from and Path(run.init_from, "config.json").is_file():
        base = PerceptionDLMConfig.from_pretrained(run.init_from).to_dict()
        return PerceptionDLMConfig.from_dict(changed(base, run.model))
    if run.preset is None and run.init_from is not None:
        raise ValueError(f"init_from {run.init_from} is not there: name a preset to plan with, {sorted(PRESETS)}")
    settings = model_settings(run)
    settings["text_config"].setdefault("vocab_size", run.tokenizer.vocab_size)
    return PerceptionDLMConfig(**settings)


def planned_sequence(run: RunConfig, config: PerceptionDLMConfig) -> Sequence:
    """A typical sample: `plan`'s tiles, text and answer, or as many regions as one holds in the mean."""
    most = num_tiles((run.processor.get("max_tiles", 6), 1))
    tiles = run.plan.tiles or most
    image = tiles * config.tokens_per_side**2
    if all(source.kind in ("regions", "scenes") for source in run.data.sources):
        regions = run.plan.regions or (1 + config.num_region_prompts) / 2
        answers = round(regions * (run.loss.num_slots + 1) * run.loss.noise_copies)
        text = run.plan.text_tokens + round(regions * (config.roi_size**2 + 1))
    else:
        answers, text = run.plan.answer_tokens * run.loss.noise_copies, run.plan.text_tokens
    room = max(run.data.max_length - image - text, 1)
    return Sequence(tiles, image, text, min(answers, room))


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


def state_bytes(parameters: dict[str, dict[str, int]], config: PerceptionDLMConfig, machine: Machine) -> float:
    """Weights, gradients and AdamW's state on one GPU."""
    total = sum(part["total"] for part in parameters.values())
    trained = sum(part["trained"] for part in parameters.values())
    if machine.sharding == "ddp":  # fp32 weights, gradients and two moments
        return 4 * total + 12 * trained
    if machine.sharding == "zero2":  # bf16 weights; bf16 gradients, fp32 weights and moments are shared
        return 2 * total + 14 * trained / machine.gpus
    text = config.text_config
    layer = 4 * text.hidden_size**2 + 3 * text.hidden_size * text.intermediate_size
    gathered = 2 * 2 * (layer + text.vocab_size * text.hidden_size)  # a layer and the embeddings, twice, in bf16
    return (4 * total + 12 * trained) / machine.gpus + gathered


def layer_bytes(config: PreTrainedConfig, mlp_inputs: int) -> int:
    """Activations that one layer keeps for its gradient, bytes per token in bf16: attention, norms and MLP."""
    return 2 * (8 * config.hidden_size + (mlp_inputs + 1) * config.intermediate_size)


def sample_bytes(
    run: RunConfig, config: PerceptionDLMConfig, sequence: Sequence, parameters: dict[str, dict[str, int]]
) -> float:
    """Activations of one sample: kept layer inputs (checkpointing) or whole layers, and the scores of the answers."""
    text, vision = config.text_config, config.vision_config
    checkpointed = run.trainer.get("gradient_checkpointing", False)
    patches = sequence.tiles * config.patches_per_side**2
    towers = [(text, sequence.tokens, layer_bytes(text, 2))]
    if trains_vision(run, parameters):
        towers.append((vision, patches, layer_bytes(vision, 1)))
    kept = 0.0
    for tower, tokens, layer in towers:
        layers = tower.num_hidden_layers
        kept += tokens * (4 * tower.hidden_size * layers + layer if checkpointed else layer * layers)
    scores = 10 * sequence.answers * text.vocab_size  # bf16, fp32 and its gradient
    return kept + scores + 12 * sequence.tiles * vision.image_size**2


def trains_vision(run: RunConfig, parameters: dict[str, dict[str, int]]) -> bool:
    """Whether gradients pass through the vision tower: it trains, or the region prompts before it do."""
    return parameters["vision_tower"]["trained"] > 0 or (
        run.model.get("region_conditioning") == "vision" and parameters["regions"]["trained"] > 0
    )


def flop_per_sample(
    run: RunConfig, config: PerceptionDLMConfig, sequence: Sequence, parameters: dict[str, dict[str, int]]
) -> float:
    """Floating point operations of one sample, forward, backward and recomputation."""
    text, vision = config.text_config, config.vision_config
    recomputed = bool(run.trainer.get("gradient_checkpointing", False))
    s, patches = sequence.tokens, config.patches_per_side**2
    table = text.vocab_size * text.hidden_size
    layers = parameters["language_model"]["total"] - 2 * table
    forward = 2 * layers * s + 4 * text.num_hidden_layers * text.hidden_size * s**2 + 2 * table * sequence.answers
    language = forward * (2 + recomputed + (parameters["language_model"]["trained"] > layers / 2))
    tile = (
        2 * parameters["vision_tower"]["total"] * patches
        + 4 * vision.num_hidden_layers * vision.hidden_size * patches**2
    )
    passes = 1 + trains_vision(run, parameters) * (1 + recomputed + (parameters["vision_tower"]["trained"] > 0))
    return language + sequence.tiles * tile * passes + 6 * parameters["projector"]["total"] * sequence.image


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
