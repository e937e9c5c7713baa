"""How captions are decoded: one table of settings, with defaults and what is accepted.

`PerceptionDLMGenerationConfig` documents each setting. The rest of the file is about names: presets, what other tools
call `steps`, and keywords of autoregressive `generate` that ask for nothing that is not done anyway.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite
from typing import Any

from transformers import GenerationConfig


FIXED_SAMPLERS = ("low_confidence", "random", "left_to_right")
ADAPTIVE_SAMPLERS = ("threshold", "margin", "entropy_bound")
SAMPLERS = (*FIXED_SAMPLERS, *ADAPTIVE_SAMPLERS)

# Named settings; keywords given beside a preset override it.
GENERATION_PRESETS: dict[str, dict[str, Any]] = {"fast": {"sampler": "threshold", "threshold": 0.9}}

# What other libraries call `steps`.
ALIASES = {"num_inference_steps": "steps", "max_denoising_steps": "steps"}

# Keywords of autoregressive generation, and the values under which they ask for nothing else.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "do_sample": (False,),
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "num_beam_groups": (1,),
    "penalty_alpha": (None, 0),
    "repetition_penalty": (None, 1.0),
    "length_penalty": (None, 1.0),
    "no_repeat_ngram_size": (None, 0),
    "typical_p": (None, 1.0),
    "min_p": (None, 0),
    "output_scores": (False,),
    "output_logits": (False,),
    "output_attentions": (False,),
    "output_hidden_states": (False,),
    "synced_gpus": (False,),
    "logits_processor": (None, []),
    "stopping_criteria": (None, []),
    "assistant_model": (None,),
    "assistant_tokenizer": (None,),
    "tokenizer": (None,),
    "max_length": (None,),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
}


@dataclass(frozen=True)
class Setting:
    """A setting's default, what its values must fulfil, and that in words."""

    default: Any
    valid: Callable[[Any], bool]
    accepted: str


def _count(default: int | None) -> Setting:
    def valid(value: Any) -> bool:
        return (value is None and default is None) or (type(value) is int and value >= 1)

    return Setting(default, valid, "an integer of at least 1")


def _flag(default: bool) -> Setting:
    return Setting(default, lambda value: type(value) is bool, "True or False")


def _number(default: float | None, valid: Callable[[float], bool], accepted: str) -> Setting:
    def check(value: Any) -> bool:
        if value is None:
            return default is None
        return isinstance(value, (int, float)) and not isinstance(value, bool) and valid(value)

    return Setting(default, check, accepted)


def _is_ids(value: Any) -> bool:
    return value is None or (isinstance(value, (list, tuple)) and all(type(i) is int and i >= 0 for i in value))


def _is_bias(value: Any) -> bool:
    return value is None or (
        isinstance(value, (list, tuple))
        and all(isinstance(entry, (list, tuple)) and len(entry) == 2 for entry in value)
        and all(_is_ids(ids) and ids is not None and len(ids) == 1 for ids, _ in value)
        and all(isinstance(bias, (int, float)) and type(bias) is not bool and isfinite(bias) for _, bias in value)
    )


def as_pairs(biases: Any) -> Any:
    """Biases by tuples of ids in the form that JSON can hold; any other value as it is."""
    if not isinstance(biases, dict):
        return biases
    return [[list(ids) if isinstance(ids, tuple) else ids, bias] for ids, bias in biases.items()]


_ANYTHING = Setting(None, lambda _value: True, "anything")

SETTINGS: dict[str, Setting] = {
    "max_new_tokens": _count(32),
    "steps": _count(32),
    "block_length": _count(None),
    "shared_schedule": _flag(False),
    "remasking": _flag(False),
    "sampler": Setting("low_confidence", lambda value: value in SAMPLERS, f"one of {SAMPLERS}"),
    "threshold": _number(0.9, lambda value: 0 < value <= 1, "in (0, 1]"),
    "entropy_bound": _number(0.1, lambda value: 0 <= value < float("inf"), "a finite number of at least 0"),
    "naming_threshold": _number(None, lambda value: 0 <= value <= 1, "in [0, 1]"),
    "early_exit": _flag(True),
    "refresh_interval": _count(1),
    "compile": _flag(False),
    "temperature": _number(0.0, lambda value: 0 <= value < float("inf"), "a finite number of at least 0"),
    "top_k": _count(None),
    "top_p": _number(None, lambda value: 0 < value <= 1, "in (0, 1]"),
    "suppress_tokens": Setting(None, _is_ids, "a list of token ids"),
    "sequence_bias": Setting(None, _is_bias, "{(id,): bias} or [[[id], bias]] with finite biases, one token each"),
    "seed": Setting(
        None, lambda v: v is None or (type(v) is int and 0 <= v < 2**63), "an integer in [0, 2**63)"
    ),
    "bos_token_id": _ANYTHING,
    "eos_token_id": _ANYTHING,
    "pad_token_id": _ANYTHING,
}  # fmt: skip


class PerceptionDLMGenerationConfig(GenerationConfig):
    """How captions are decoded; unknown keywords are refused.

    Args:
        max_new_tokens (`int`, defaults to 32): slots per answer.
        steps (`int`, defaults to 32): denoising steps per answer, shared evenly by its blocks; also accepted as
            `num_inference_steps` and `max_denoising_steps`. A step commits at least one token, so more steps than slots
            are not run.
        block_length (`int`, *optional*): slots are finished in blocks of this many, left to right
            (semi-autoregressive); by default one block. Must divide `max_new_tokens`.
        shared_schedule (`bool`): regions of one image share a schedule: a step decides a number of slots among all of
            them (as the published weights are used), instead of a number in each. More steps than slots may then be
            asked for.
        remasking (`bool`): decided slots compete again at every step, by the confidence of their new most probable
            token, and losing ones are masked again (as the published weights are used); by default a decided slot
            stays.
        sampler (`str`): which slots a step commits. By number: `"low_confidence"` takes those whose token is most
            probable (LLaDA's low-confidence remasking), `"random"`, `"left_to_right"`. Adaptive ones commit besides all
            slots that are sure, so that an answer needs fewer than `steps` steps: `"threshold"` (probability of the
            token, Fast-dLLM), `"margin"` (to the second likeliest token), `"entropy_bound"`.
        threshold (`float`, defaults to 0.9): from which a slot is sure, in (0, 1]; for `"threshold"` and `"margin"`.
        entropy_bound (`float`, defaults to 0.1): nats that the slots committed at once may have; for `"entropy_bound"`.
        early_exit (`bool`, defaults to True): an answer is finished when an end token and everything before it are
            decided; its text cannot change any more. Later slots are filled, and the answer leaves the running batch.
            In layouts where captions see each other, all answers finish together.
        naming_threshold (`float`, *optional*): of a model with a namer: an answer about a region begins with the word
            that the namer has for it where that is true with more than this probability, in [0, 1]; the language model
            writes the rest. At 1, and by default, the language model names every region, too.
        refresh_interval (`int`, defaults to 1): in layouts where the prompt sees captions, every how many passes its
            keys and values are computed anew; 1 is exact. In the isolated layout they never change.
        compile (`bool`): run the passes through `torch.compile`, for many images of a kind: shapes recur (the regions
            of an image are padded to a power of two, prompts have any length), and every new one is compiled first.
        temperature (`float`, defaults to 0): 0 takes the most probable token; above, tokens are sampled.
        top_k (`int`, *optional*), top_p (`float`, *optional*): restrict sampling to the likeliest tokens.
        suppress_tokens (`list[int]`, *optional*): ids that are never chosen.
        sequence_bias (`dict[tuple[int], float]` or `list`, *optional*): biases of single tokens, added to their logits
            where a slot's token is chosen; `confidences` stay the model's own probabilities. As transformers has it,
            but for sequences of several tokens, since slots are decided at once.
        preset (`str`, *optional*): named settings, of `GENERATION_PRESETS`; what is given besides overrides them.
        seed (`int`, *optional*): makes sampling repeatable, on any device; or pass `generator` to `generate`.
        bos_token_id, eos_token_id, pad_token_id (`int`, *optional*): the tokenizer's, recorded for other tools; answers
            end at the processor's end tokens.
    """

    def __init__(self, preset: str | None = None, **kwargs: Any):
        kwargs = {**preset_settings(preset), **renamed(kwargs)}
        # GenerationConfig's own fields are those of autoregressive decoding: deliberately not initialised.
        kwargs["sequence_bias"] = as_pairs(kwargs.get("sequence_bias"))
        for name, setting in SETTINGS.items():
            setattr(self, name, kwargs.pop(name, setting.default))
        self._commit_hash = kwargs.pop("_commit_hash", None)
        self._from_model_config = kwargs.pop("_from_model_config", None)
        self.transformers_version = kwargs.pop("transformers_version", None)
        refuse_unneutral(kwargs)
        if unknown := sorted(set(kwargs) - set(NEUTRAL)):
            raise ValueError(f"unknown generate keywords {unknown}, known are {sorted(SETTINGS)}")
        self.validate()

    @staticmethod
    def fields() -> tuple[str, ...]:
        """Names of the public settings."""
        return tuple(SETTINGS)

    def validate(self, **_unused: Any) -> None:
        """Raise `ValueError` naming the setting, its value and what is accepted."""
        for name, setting in SETTINGS.items():
            if not setting.valid(getattr(self, name)):
                raise ValueError(f"{name} must be {setting.accepted}, got {getattr(self, name)!r}")
        if self.block_length is not None and self.max_new_tokens % self.block_length:
            raise ValueError(f"block_length={self.block_length} must divide max_new_tokens={self.max_new_tokens}")
        if self.steps < self.num_blocks:
            raise ValueError(f"steps={self.steps} must be at least the number of blocks, {self.num_blocks}")
        if self.naming_threshold is not None and self.remasking:
            raise ValueError("naming_threshold does not go with remasking, under which a given word is masked again")
        if self.sampler in ADAPTIVE_SAMPLERS and (self.remasking or self.shared_schedule):
            raise ValueError(f"sampler={self.sampler!r} goes with neither remasking nor shared_schedule")

    @property
    def num_blocks(self) -> int:
        """Blocks an answer is decoded in."""
        return 1 if self.block_length is None else self.max_new_tokens // self.block_length

    @classmethod
    def from_model_config(cls, model_config):
        """Generation settings never live in the model config; transformers then falls back to the defaults."""
        raise NotImplementedError("PerceptionDLM keeps generation settings out of its model config")


def preset_settings(name: str | None) -> dict[str, Any]:
    """The settings of a preset; none without a name."""
    if name is None:
        return {}
    if name not in GENERATION_PRESETS:
        raise ValueError(f"preset must be one of {sorted(GENERATION_PRESETS)}, got {name!r}")
    return GENERATION_PRESETS[name]


def renamed(keywords: dict[str, Any]) -> dict[str, Any]:
    """Keywords under our names; two names of one setting with different values are refused."""
    ours = {name: value for name, value in keywords.items() if name not in ALIASES}
    for alias, name in ALIASES.items():
        if keywords.get(alias) is None:
            continue
        if ours.get(name) not in (None, keywords[alias]):
            raise ValueError(f"{alias}={keywords[alias]!r} and {name}={ours[name]!r} are one setting: give one of them")
        ours[name] = keywords[alias]
    return ours


def refuse_unneutral(keywords: dict[str, Any]) -> None:
    """Raise `ValueError` for keywords of autoregressive generation that ask for what diffusion does not do."""
    for name, values in NEUTRAL.items():
        if name in keywords and keywords[name] not in values:
            hint = {"do_sample": "set temperature above 0 to sample", "max_length": "set max_new_tokens"}.get(name)
            raise ValueError(
                f"{name}={keywords[name]!r} belongs to autoregressive generation; accepted: {values[0]!r}"
                + (f" ({hint})" if hint else "")
            )


__all__ = ["GENERATION_PRESETS", "SAMPLERS", "PerceptionDLMGenerationConfig"]
