"""Run configuration: one YAML per training, read into typed dataclasses. Unknown names and wrong types are refused."""

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Literal

import yaml
from transformers import LlamaConfig, TrainingArguments

from perceptiondlm.checkpoints.vision_towers import TOWER_WEIGHTS
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


FROZEN = ("auto", "float32", "bfloat16", "8bit", "4bit")
QUANTIZED = ("8bit", "4bit")


@dataclass
class TokenizerConfig:
    """The tokenizer to learn: its size (special tokens included), and what it is learned from.

    Args:
        vocab_size: most entries.
        scenes: drawn scenes of `seed`, whose texts are read.
        names: how often each name of COCO's categories is read among them, 0 for a model of the drawn world alone.
    """

    vocab_size: int = 1024
    scenes: int = 1000
    seed: int = 1
    names: int = 0


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
    """

    parts: list[str] = field(default_factory=lambda: list(PARTS))
    learning_rates: dict[str, float] = field(default_factory=dict)
    reset: list[str] = field(default_factory=list)
    lora: LoraConfig | None = None
    ema_decay: float | None = None
    frozen_weights: str = "auto"

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


# --- settings of any kind: YAML into dataclasses, overrides, errors that name the key --------------------------------


class SettingsLoader(yaml.SafeLoader):
    """YAML as people write it: `1e-3` is a number (YAML 1.1 reads a string)."""


SettingsLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read_settings(path: str | Path, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """A YAML file's mapping with `a.b=value` overrides applied (values in YAML syntax, `sources.0.path=...` in lists).

    `extends: other.yaml`, a path relative to the file, starts from another file's settings: sections are merged key by
    key, everything else (lists, too) is replaced.

    Raises:
        FileNotFoundError, ValueError: naming the file or the override.
    """
    content = _read_extended(Path(path), ())
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator or not key:
            raise ValueError(f"override {override!r} must have the form key=value or section.key=value")
        _assign(content, key.split("."), yaml.load(value, SettingsLoader), override)
    return content


def _read_extended(path: Path, extending: tuple[Path, ...]) -> dict[str, Any]:
    """A YAML file's mapping, laid over that of the file it extends."""
    if not path.is_file():
        raise FileNotFoundError(f"no training config at {path}")
    if path.resolve() in extending:
        raise ValueError(f"{path} extends itself, by way of {[str(other) for other in extending]}")
    try:
        content = yaml.load(path.read_text(encoding="utf-8-sig"), SettingsLoader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a mapping of settings, got {type(content).__name__}")
    parent = content.pop("extends", None)
    if parent is None:
        return content
    if not isinstance(parent, str):
        raise ValueError(f"{path}: extends must be the path of another YAML file, got {parent!r}")
    return _merged(_read_extended(path.parent / parent, (*extending, path.resolve())), content)


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A mapping with the values of another laid over it, section by section."""
    merged = dict(base)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = _merged(base[key], value) if both else value
    return merged


def _assign(content: Any, keys: list[str], value: Any, override: str) -> None:
    """Set one value in nested mappings and lists."""
    *path, last = keys
    for key in path:
        content = content[_place(content, key, override)] if isinstance(content, list) else content.setdefault(key, {})
        if not isinstance(content, (dict, list)):
            raise ValueError(f"override {override!r}: {key!r} is a value, not a section")
    content[_place(content, last, override) if isinstance(content, list) else last] = value


def _place(items: list, key: str, override: str) -> int:
    if not key.isdecimal() or int(key) >= len(items):
        raise ValueError(f"override {override!r}: {key!r} is no index of a list of {len(items)}")
    return int(key)


def build(kind: type, values: dict[str, Any], where: str = "") -> Any:
    """An instance of a dataclass from a mapping; `where` is its place in the file, for messages.

    Raises:
        ValueError: for unknown keys (with the nearest known name), missing keys and values of another type.
    """
    hints = typing.get_type_hints(kind)
    check_names(values, hints, where)
    required = {f.name for f in dataclasses.fields(kind) if _is_required(f)}
    if missing := sorted(required - set(values)):
        raise ValueError(f"missing settings {[where + name for name in missing]}")
    return kind(**{name: checked(hints[name], value, where + name) for name, value in values.items()})


def check_names(values: Iterable[str], known: Iterable[str], where: str) -> None:
    """Raise `ValueError` for names that are not known, with the nearest one that is."""
    known = sorted(known)
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean {where + near[0]!r}? Known are" if near else "known are"
            raise ValueError(f"unknown setting {where + str(name)!r}, {hint} {known}")


def _is_required(item: dataclasses.Field) -> bool:
    return item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING


def checked(hint: Any, value: Any, name: str) -> Any:
    """A value as its type hint wants it; raises `ValueError` naming the setting and what is accepted."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise ValueError(f"{name} must be a section, got {value!r}")
        return build(hint, value, name + ".")
    if origin in (typing.Union, types.UnionType):
        return _checked_union(inner, value, name)
    if origin is Literal:
        if value not in inner:
            raise ValueError(f"{name} must be one of {inner}, got {value!r}")
        return value
    if origin is list and isinstance(value, list):
        return [checked(inner[0], item, f"{name}.{index}") for index, item in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        return {key: checked(inner[1], item, f"{name}.{key}") for key, item in value.items()}
    return _checked_plain(origin or hint, value, name)


def _checked_union(options: tuple, value: Any, name: str) -> Any:
    """The first of several types that takes the value; the last one's error if none does."""
    if value is None and type(None) in options:
        return None
    others = [option for option in options if option is not type(None)]
    for option in others[:-1]:
        try:
            return checked(option, value, name)
        except ValueError:
            continue
    return checked(others[-1], value, name)


def _checked_plain(kind: type, value: Any, name: str) -> Any:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        accepted = (
            f"one of {[member.value for member in kind]}" if issubclass(kind, Enum) else f"of type {kind.__name__}"
        )
        raise ValueError(f"{name} must be {accepted}, got {value!r}")
    return value
