"""Run configuration: a YAML file into typed dataclasses, `section.key=value` overrides; unknown keys are refused."""

import dataclasses
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml


@dataclass
class TokenizerConfig:
    """The tokenizer to learn: size of its vocabulary (special tokens included) and the scenes it is learned from."""

    vocab_size: int = 1024
    scenes: int = 1000


@dataclass
class DataConfig:
    """Drawn scenes to train on: seed of the world, how many, and the share asked about the whole image, in [0, 1].

    The first `coarse_epochs` are a curriculum: every image is a single tile and only the first `coarse_slots` of an
    answer are trained ("a large striped red house"). Nothing but the region tells these words, so seeing is learned
    first, on short sequences; the rest of the caption comes after.
    """

    seed: int = 1
    num_images: int = 20000
    conversation_share: float = 0.1
    coarse_epochs: int = 0
    coarse_slots: int | None = None


@dataclass
class LossConfig:
    """Equation 2 and its variance reductions: slots per answer, noised copies of an answer (2 are antithetic), and
    `weighting`, "elbo" (1/p, the paper) or "masked" (mean over masked tokens)."""

    num_slots: int = 32
    noise_copies: int = 2
    weighting: str = "masked"


@dataclass
class EvaluationConfig:
    """Scoring on held-out scenes during training: every `steps` optimizer steps (0 never), on `num_images` scenes."""

    seed: int = 2
    num_images: int = 24
    steps: int = 500


@dataclass
class RunConfig:
    """One training run. `model`, `processor` and `trainer` are keyword arguments of `PerceptionDLMConfig`,
    `PerceptionDLMProcessor` and `transformers.TrainingArguments`.

    Args:
        export_dir: where the finished, self-contained checkpoint goes.
        export_dtype: storage of its weights, a torch dtype name.
        resume: continue from the newest checkpoint in `trainer.output_dir` when there is one.
    """

    export_dir: str
    trainer: dict[str, Any]
    model: dict[str, Any]
    processor: dict[str, Any] = field(default_factory=dict)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    export_dtype: str = "float16"
    resume: bool = False


def load_run_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
    """Read a run's YAML, apply `a.b=value` overrides (values in YAML syntax), and check every key and type."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no training config at {path}")
    content = yaml.safe_load(path.read_text())
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a mapping of settings, got {type(content).__name__}")
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator or not key:
            raise ValueError(f"override {override!r} must have the form key=value or section.key=value")
        _assign(content, key.split("."), yaml.safe_load(value), override)
    return _build(RunConfig, content, "")


def _assign(content: dict, keys: list[str], value: Any, override: str) -> None:
    for key in keys[:-1]:
        content = content.setdefault(key, {})
        if not isinstance(content, dict):
            raise ValueError(f"override {override!r}: {key!r} is a value, not a section")
    content[keys[-1]] = value


def _build(kind: type, values: dict[str, Any], where: str) -> Any:
    """An instance of a dataclass from a mapping; `where` is its place in the file, for messages."""
    hints = typing.get_type_hints(kind)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise ValueError(f"unknown settings {[where + name for name in unknown]}, known are {sorted(hints)}")
    required = {f.name for f in dataclasses.fields(kind) if _is_required(f)}
    if missing := sorted(required - set(values)):
        raise ValueError(f"missing settings {[where + name for name in missing]}")
    return kind(**{name: _checked(hints[name], value, where + name) for name, value in values.items()})


def _is_required(item: dataclasses.Field) -> bool:
    return item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING


def _checked(hint: Any, value: Any, name: str) -> Any:
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise ValueError(f"{name} must be a section, got {value!r}")
        return _build(hint, value, name + ".")
    if isinstance(hint, types.UnionType):  # only `X | None` occurs
        return None if value is None else _checked(typing.get_args(hint)[0], value, name)
    kind = typing.get_origin(hint) or hint
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"{name} must be of type {kind.__name__}, got {value!r}")
    return value
