"""What a run takes of a machine: weights, activations and operations, by formulas. They stand in docs/training.md."""

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from perceptiondlm.configuration_perceptiondlm import PRESETS, PerceptionDLMConfig, num_tiles
from perceptiondlm.modeling_perceptiondlm import PerceptionDLMForConditionalGeneration
from perceptiondlm.training.config import QUANTIZED, RunConfig, TrainConfig
from perceptiondlm.training.data.data_config import REGION_KINDS
from perceptiondlm.training.modules import count_parameters, prepare_parts
from perceptiondlm.training.start import changed, model_settings


SHARDINGS = ("ddp", "zero2", "fsdp")
# TFLOP/s that one GPU really does: what the paper's base stages (three weeks on 32 H100) come to by these formulas.
PAPER_TFLOPS = 130.0
# Bytes of a weight that does not train, as `train.frozen_weights` has it; 4 bits in blocks of 64 with doubly quantized
# scales (QLoRA, section 3) take 0.127 bits more.
FROZEN_BYTES = {"float32": 4.0, "bfloat16": 2.0, "8bit": 1.0, "4bit": 0.516}
_counted: dict[str, dict[str, dict[str, int]]] = {}  # parameters of models that were planned with
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
class Footprint:
    """What a run takes of one GPU: bytes of weights and optimizer, bytes and operations of a sample."""

    config: PerceptionDLMConfig
    sequence: Sequence
    parameters: dict[str, dict[str, int]]
    state: float
    sample: float
    flop: float

    def free(self, machine: Machine) -> float:
        """Bytes left for samples; less than `sample` where the run does not fit."""
        return machine.memory * 1e9 * RESERVE - self.state


def footprint(run: RunConfig, machine: Machine) -> Footprint:
    """What a run takes of a machine's GPU."""
    config = planned_config(run)
    parameters, sequence = planned_parameters(config, run.train), planned_sequence(run, config)
    state = state_bytes(parameters, config, machine, frozen_weights(run))
    sample = sample_bytes(run, config, sequence, parameters)
    return Footprint(config, sequence, parameters, state, sample, flop_per_sample(run, config, sequence, parameters))


def planned_parameters(config: PerceptionDLMConfig, train: TrainConfig) -> dict[str, dict[str, int]]:
    """Parameters of every part, in all and trained. Plans compare many machines and few models: counts are kept."""
    key = f"{config.to_json_string()} {train.parts} {train.lora}"
    if key not in _counted:
        with torch.device("meta"):
            model = prepare_parts(PerceptionDLMForConditionalGeneration(config), copy.deepcopy(train))
        _counted[key] = count_parameters(model)
    return copy.deepcopy(_counted[key])


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
    image = config.image_tokens(tiles)
    if all(source.kind in REGION_KINDS for source in run.data.sources):
        regions = run.plan.regions or (1 + config.num_region_prompts) / 2
        answers = round(regions * (run.loss.num_slots + 1) * run.loss.noise_copies)
        text = run.plan.text_tokens + round(regions * (config.roi_size**2 + 1))
    else:
        answers, text = run.plan.answer_tokens * run.loss.noise_copies, run.plan.text_tokens
    room = max(run.data.max_length - image - text, 1)
    return Sequence(tiles, image, text, min(answers, room))


def frozen_weights(run: RunConfig) -> str:
    """How weights that do not train are held; `auto` as the published ones are stored, bf16."""
    held = run.train.frozen_weights
    return held if held != "auto" else "bfloat16" if run.trainer.get("bf16") else "float32"


def state_bytes(
    parameters: dict[str, dict[str, int]], config: PerceptionDLMConfig, machine: Machine, frozen: str = "float32"
) -> float:
    """Weights, gradients and AdamW's state on one GPU; `frozen` is how weights that do not train are held (ddp)."""
    total = sum(part["total"] for part in parameters.values())
    trained = sum(part["trained"] for part in parameters.values())
    if machine.sharding == "ddp":  # what trains: fp32 weights, gradients and two moments
        return 16 * trained + frozen_bytes(total - trained, config, frozen)
    if machine.sharding == "zero2":  # bf16 weights; bf16 gradients, fp32 weights and moments are shared
        return 2 * total + 14 * trained / machine.gpus
    text = config.text_config
    gathered = (
        2 * 2 * (layer_weights(config) + text.vocab_size * text.hidden_size)
    )  # a layer and the table, twice, bf16
    return (4 * total + 12 * trained) / machine.gpus + gathered


def layer_weights(config: PerceptionDLMConfig) -> int:
    """Weights of one layer of the language model, norms left out."""
    text = config.text_config
    return 4 * text.hidden_size**2 + 3 * text.hidden_size * text.intermediate_size


def frozen_bytes(count: int, config: PerceptionDLMConfig, frozen: str) -> float:
    """Bytes of weights that do not train; quantizing concerns the layers of the language model, the rest is bf16."""
    if frozen not in QUANTIZED:
        return FROZEN_BYTES[frozen] * count
    layers = min(layer_weights(config) * config.text_config.num_hidden_layers, count)
    return FROZEN_BYTES[frozen] * layers + 2 * (count - layers)


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
