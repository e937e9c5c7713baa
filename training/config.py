"""Run configuration: one YAML per training, read into typed dataclasses. Unknown names and wrong types are refused."""

import dataclasses
import re
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from transformers import LlamaConfig, TrainingArguments

from perceptiondlm.checkpoints.vision_towers import TOWER_WEIGHTS
from perceptiondlm.common.settings import build, check_names, checked, read_settings
from perceptiondlm.configuration_perceptiondlm import PRESETS, PerceptionDLMConfig
from perceptiondlm.processing_perceptiondlm import IMAGE_SETTINGS, OWN_SETTINGS
from perceptiondlm.training.data.data_config import DataConfig, LossConfig, SourceConfig
from perceptiondlm.training.recomputation import NEWER_NAMES, declared, settled
from perceptiondlm.vision_perceptiondlm import vision_config_class


# What can be trained or frozen by name: the model's modules, by the beginnings of their parameters' names.
PARTS: dict[str, tuple[str, ...]] = {
    "vision_tower": ("vision_tower.",),
    "projector": ("projector.",),
    "regions": ("region_replay.", "focal_replay.", "region_prompts."),
    "language_model": ("language_model.", "lm_head."),
}

FITTED = "region_namer."  # parameters that no gradient changes: a run leaves them behind, fit_namer makes them

FROZEN = ("auto", "float32", "bfloat16", "8bit", "4bit")
QUANTIZED = ("8bit", "4bit")


@dataclass
class TokenizerConfig:
    """The tokenizer to learn: its size (special tokens included), and what it is learned from.

    Args:
        vocab_size: most entries.
        scenes: drawn scenes of `seed`, whose texts are read.
        names: whether each name of COCO's categories and of the run's `named_regions` is a token, with its article.
    """

    vocab_size: int = 1024
    scenes: int = 1000
    seed: int = 1
    names: bool = False


@dataclass
class LoraConfig:
    """Low-rank adapters on the language model, whose own weights then stay as they are.

    Args:
        rank, alpha, dropout: of the adapters; they enter scaled by alpha / rank.
        target_modules: regular expression of the modules that get one.
    """

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    target_modules: str = r"language_model\..*\.(q|k|v|o|gate|up|down)_proj"

    def __post_init__(self):
        if self.rank < 1 or self.alpha < 1:
            raise ValueError(f"train.lora.rank and alpha must be at least 1, got {self.rank} and {self.alpha}")
        try:
            re.compile(self.target_modules)
        except re.error as error:
            raise ValueError(f"train.lora.target_modules {self.target_modules!r} is no pattern: {error}") from error


@dataclass
class TrainConfig:
    """What trains.

    Args:
        parts: of `PARTS`; the others are frozen.
        learning_rates: of single parts, where they differ from `trainer.learning_rate`.
        reset: parts that start with fresh weights although `init_from` has them.
        lora: train adapters instead of the language model; the other parts are trained as they are.
        ema_decay: keep a moving average of the weights with this decay per step, in (0, 1), and finish with it.
        frozen_weights: of `FROZEN`, how weights that do not train are held: `auto` as the checkpoint stores them where
            that is bf16 and `trainer.bf16` is on, else fp32; `8bit` and `4bit` quantize the language model's layers
            (bitsandbytes) and are for adapters. What trains is held in fp32 in any case, and the finished checkpoint is
            merged into the weights as they are stored.
        tower_features: folder that keeps a frozen tower's features, so that a tile seen before costs no vision pass; it
            may be shared by runs. `tower_features_gib`: most GiB of it per side of tile.
        tower_dropout: share in [0, 1) of a frozen tower's channels that are dropped per tile while training.
    """

    parts: list[str] = field(default_factory=lambda: list(PARTS))
    learning_rates: dict[str, float] = field(default_factory=dict)
    reset: list[str] = field(default_factory=list)
    lora: LoraConfig | None = None
    ema_decay: float | None = None
    frozen_weights: str = "auto"
    tower_features: str | None = None
    tower_features_gib: float = 16.0
    tower_dropout: float = 0.0

    def __post_init__(self):
        for name, given in (("parts", self.parts), ("learning_rates", self.learning_rates), ("reset", self.reset)):
            check_names(given, PARTS, f"train.{name}.")
        if not self.parts:
            raise ValueError(f"train.parts is empty: nothing would be trained. Accepted: some of {list(PARTS)}")
        if idle := sorted(set(self.learning_rates) - set(self.parts)):
            raise ValueError(f"train.learning_rates names {idle}, which train.parts leaves frozen")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"train.ema_decay must be in (0, 1), got {self.ema_decay}")
        if self.lora and "language_model" not in self.parts:
            raise ValueError("train.lora adapts the language model: add 'language_model' to train.parts")
        if self.frozen_weights not in FROZEN:
            raise ValueError(f"train.frozen_weights must be one of {FROZEN}, got {self.frozen_weights!r}")
        if not 0 <= self.tower_dropout < 1:
            raise ValueError(f"train.tower_dropout must be in [0, 1), got {self.tower_dropout}")
        if self.frozen_weights in QUANTIZED and not self.lora:
            raise ValueError(
                f"train.frozen_weights {self.frozen_weights!r} cannot train but for adapters: add train.lora"
            )


@dataclass
class EvaluationConfig:
    """A look at the model during training, every `steps` optimizer steps (0: never) and at the end.

    Args:
        source: held-out samples: drawn `scenes` (scored by the protocol of ParaDLC-Bench), `scene_conversations` (share
            of answers exactly right), or a set on disk (held-out loss; of regions, also how many words of the captions
            are right).
        at_start: look before the first step, too.
        pictures: of the held-out samples with regions, how many are drawn with their captions.
    """

    source: SourceConfig = field(default_factory=lambda: SourceConfig("scenes", samples=24, seed=2))
    steps: int = 500
    pictures: int = 2
    at_start: bool = False

    def __post_init__(self):
        if self.source.samples is None or self.source.streaming:
            raise ValueError("evaluation.source needs samples, the number of held-out records, and cannot stream")


@dataclass
class PlanConfig:
    """What `perceptiondlm plan` assumes where it cannot know before reading the data.

    Args:
        samples: of an epoch, where the sources do not say (an image with many masks is several samples).
        tiles: of a typical image, thumbnail included; default: the most there can be.
        regions: of a typical sample; default: half of what a pass may hold.
        text_tokens, answer_tokens: of a typical prompt and of its answer (conversations).
    """

    samples: int | None = None
    tiles: int | None = None
    regions: float | None = None
    text_tokens: int = 60
    answer_tokens: int = 256


@dataclass
class RunConfig:
    """One training run.

    Args:
        export_dir: where the finished, self-contained checkpoint goes.
        trainer: keyword arguments of `transformers.TrainingArguments`.
        init_from: checkpoint to start from, a directory or Hub id of this repository's layout; a base model gets fresh
            region parts when `model.region_conditioning` asks for regions. Without, the model starts from nothing.
        vision_weights: published weights of the vision tower of a model from nothing, "efficientnet-lite0".
        preset: named shape (`PRESETS`) of a model from nothing, and what a plan assumes while `init_from` is not there.
        model: keyword arguments of `PerceptionDLMConfig`; with `init_from`, only what differs from the checkpoint.
        processor: settings of `PerceptionDLMProcessor.from_config`.
        batch_size: samples of an optimizer step over all processes; sets `trainer.gradient_accumulation_steps`.
        export_dtype: storage of the finished weights, a torch dtype name.
        resume: continue from the newest complete checkpoint in `trainer.output_dir` when there is one, which must be of
            this run: the same data, loss, model, rates and samples per step.
        resume_with: names of settings that differ on purpose from the run that is continued, such as
            `trainer.learning_rate`.
    """

    export_dir: str
    trainer: dict[str, Any]
    init_from: str | None = None
    vision_weights: str | None = None
    preset: str | None = None
    model: dict[str, Any] = field(default_factory=dict)
    processor: dict[str, Any] = field(default_factory=dict)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    batch_size: int | None = None
    export_dtype: str = "float16"
    resume: bool = False
    resume_with: list[str] = field(default_factory=list)

    def __post_init__(self):
        self.trainer = check_trainer(self.trainer)
        check_model(self.model)
        check_names(self.processor, (*OWN_SETTINGS, *IMAGE_SETTINGS, "chat_template"), "processor.")
        if self.preset is not None and self.preset not in PRESETS:
            raise ValueError(f"preset must be one of {sorted(PRESETS)}, got {self.preset!r}")
        if self.init_from is None and self.preset is None and "text_config" not in self.model:
            raise ValueError("give init_from, preset or the sizes of a new model in model.text_config")
        if self.vision_weights is not None and self.vision_weights not in TOWER_WEIGHTS:
            raise ValueError(f"vision_weights must be one of {sorted(TOWER_WEIGHTS)}, got {self.vision_weights!r}")
        if self.vision_weights is not None and self.init_from is not None:
            raise ValueError("vision_weights is for a model from nothing: init_from has a vision tower of its own")
        if self.resume_with and not self.resume:
            raise ValueError(f"resume_with names {self.resume_with}, but resume is off: add --resume")
        if self.train.frozen_weights not in ("auto", "float32") and not self.trainer.get("bf16"):
            raise ValueError(f"train.frozen_weights {self.train.frozen_weights!r} needs trainer.bf16=true")
        if self.init_from is None and self.train.frozen_weights in QUANTIZED:
            raise ValueError(f"train.frozen_weights {self.train.frozen_weights!r} needs init_from: what to quantize")
        if self.init_from is None and self.train.reset:
            raise ValueError("train.reset is for init_from: a model from nothing is fresh as a whole")

    @property
    def output_dir(self) -> Path:
        """Where checkpoints and everything written during the run goes."""
        return Path(self.trainer["output_dir"])

    def to_yaml(self) -> str:
        """The whole configuration, defaults included, as a file that starts the same run."""
        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False, width=120)


def check_trainer(values: dict[str, Any]) -> dict[str, Any]:
    """`trainer` with values of the types that `TrainingArguments` declares."""
    hints = typing.get_type_hints(TrainingArguments)
    values = settled(values)
    known = {f.name for f in dataclasses.fields(TrainingArguments) if f.init}
    check_names(values, known | set(NEWER_NAMES), "trainer.")
    if "output_dir" not in values:
        raise ValueError("missing settings ['trainer.output_dir']")
    return {
        name: checked(hints[kept], value, f"trainer.{name}")
        for (name, value), kept in zip(values.items(), declared(values), strict=True)
    }


def check_model(values: dict[str, Any]) -> None:
    """Refuse names that `PerceptionDLMConfig` and its sub-configs do not have; they check the values."""
    vision = values.get("vision_config")
    kind = vision.get("model_type") if isinstance(vision, dict) else None
    sub_configs = {"vision_config": vision_config_class(kind), "text_config": LlamaConfig}
    check_names(values, _field_names(PerceptionDLMConfig), "model.")
    for name, kind in sub_configs.items():
        if not isinstance(values.get(name, {}), dict):
            raise ValueError(f"model.{name} must be a section, got {values[name]!r}")
        check_names(values.get(name, {}), {*_field_names(kind), "vision_use_head", "model_type"}, f"model.{name}.")


def _field_names(config_class: type) -> list[str]:
    return [item.name for item in dataclasses.fields(config_class)]


def load_run_config(path: str | Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Read a run's YAML, apply `a.b=value` overrides, and check every name and type."""
    return build(RunConfig, read_settings(path, overrides))
