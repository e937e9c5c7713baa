"""Masked-diffusion decoding: its settings, its output and its loop.

The loop is `PerceptionDLMGenerationMixin.generate`: all answers start fully masked; each step scores every slot in one
pass, picks a token per slot, and commits some; a committed token stays. Every answer (region) decides for itself, so
decoding N regions together gives what decoding them one by one gives. An answer that has come to its end leaves the
running batch.

Legend: B rows of the batch, R regions, A answers, G slots per answer.
"""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.utils import ModelOutput, logging

from .denoiser_perceptiondlm import Denoiser
from .sampling_perceptiondlm import (
    ADAPTIVE_SAMPLERS,
    SAMPLERS,
    Canvas,
    SlotSampler,
    TokenSampler,
    linear_schedule,
    released_schedule,
)


logger = logging.get_logger(__name__)

# Named settings; keywords given beside a preset override it.
GENERATION_PRESETS: dict[str, dict[str, Any]] = {"fast": {"sampler": "threshold", "threshold": 0.9}}


class PerceptionDLMGenerationConfig(GenerationConfig):
    """How captions are decoded; unknown keywords are refused.

    Args:
        max_new_tokens (`int`, defaults to 32): slots per answer.
        steps (`int`, defaults to 32): denoising steps per answer, shared evenly by its blocks. A step commits at least
            one token, so more steps than slots are not run.
        block_length (`int`, *optional*): slots are finished in blocks of this many, left to right
            (semi-autoregressive); by default one block. Must divide `max_new_tokens`.
        shared_schedule (`bool`): regions of one image share a schedule: a step decides a number of slots among all of
            them (the released model), instead of a number in each. More steps than slots may then be asked for.
        remasking (`bool`): decided slots compete again at every step, by the confidence of their new most probable
            token, and losing ones are masked again (the released model); by default a decided slot stays.
        sampler (`str`): which slots a step commits. By number: `"low_confidence"` takes those whose token is most
            probable (LLaDA's low-confidence remasking), `"random"`, `"left_to_right"`. Adaptive ones commit besides all
            slots that are sure, so that an answer needs fewer than `steps` steps: `"threshold"` (probability of the
            token, Fast-dLLM), `"margin"` (to the second likeliest token), `"entropy_bound"`.
        threshold (`float`, defaults to 0.9): from which a slot is sure, in (0, 1]; for `"threshold"` and `"margin"`.
        entropy_bound (`float`, defaults to 0.1): nats that the slots committed at once may have; for `"entropy_bound"`.
        early_exit (`bool`, defaults to True): an answer is finished when an end token and everything before it are
            decided; its text cannot change any more. Later slots are filled, and the answer leaves the running
            batch.
            In layouts where captions see each other, all answers finish together.
        refresh_interval (`int`, defaults to 1): in layouts where the prompt sees captions, every how many passes its
            keys and values are computed anew; 1 is exact. In the isolated layout they never change.
        compile (`bool`): run the passes through `torch.compile`, for many images of a kind: shapes recur (prompts are
            padded to a multiple of 256 tokens, regions to a power of two), and every new one is compiled first.
        temperature (`float`, defaults to 0): 0 takes the most probable token; above, tokens are sampled.
        top_k (`int`, *optional*), top_p (`float`, *optional*): restrict sampling to the likeliest tokens.
        suppress_tokens (`list[int]`, *optional*): ids that are never chosen.
        preset (`str`, *optional*): named settings, of `GENERATION_PRESETS`; what is given besides overrides them.
        seed (`int`, *optional*): makes sampling repeatable; or pass `generator` to `generate`.
        bos_token_id, eos_token_id, pad_token_id (`int`, *optional*): the tokenizer's, recorded for other tools; answers
            end at the processor's end tokens.
    """

    def __init__(self, preset: str | None = None, **kwargs: Any):
        kwargs = {**preset_settings(preset), **kwargs}
        # GenerationConfig's own fields are those of autoregressive decoding: deliberately not initialised.
        self.max_new_tokens: int = kwargs.pop("max_new_tokens", 32)
        self.steps: int = kwargs.pop("steps", 32)
        self.block_length: int | None = kwargs.pop("block_length", None)
        self.shared_schedule: bool = kwargs.pop("shared_schedule", False)
        self.remasking: bool = kwargs.pop("remasking", False)
        self.sampler: str = kwargs.pop("sampler", "low_confidence")
        self.threshold: float = kwargs.pop("threshold", 0.9)
        self.entropy_bound: float = kwargs.pop("entropy_bound", 0.1)
        self.early_exit: bool = kwargs.pop("early_exit", True)
        self.refresh_interval: int = kwargs.pop("refresh_interval", 1)
        self.compile: bool = kwargs.pop("compile", False)
        self.temperature: float = kwargs.pop("temperature", 0.0)
        self.top_k: int | None = kwargs.pop("top_k", None)
        self.top_p: float | None = kwargs.pop("top_p", None)
        self.suppress_tokens: list[int] | None = kwargs.pop("suppress_tokens", None)
        self.seed: int | None = kwargs.pop("seed", None)
        self.bos_token_id: int | None = kwargs.pop("bos_token_id", None)
        self.eos_token_id: int | list[int] | None = kwargs.pop("eos_token_id", None)
        self.pad_token_id: int | None = kwargs.pop("pad_token_id", None)
        self._commit_hash = kwargs.pop("_commit_hash", None)
        self._from_model_config = kwargs.pop("_from_model_config", None)
        self.transformers_version = kwargs.pop("transformers_version", None)
        if kwargs:
            raise ValueError(f"unknown generate keywords {sorted(kwargs)}, known are {sorted(self.fields())}")
        self.validate()

    @staticmethod
    def fields() -> tuple[str, ...]:
        """Names of the public settings."""
        return (
            "max_new_tokens", "steps", "block_length", "shared_schedule", "remasking", "sampler", "threshold",
            "entropy_bound", "early_exit", "refresh_interval", "compile", "temperature", "top_k", "top_p",
            "suppress_tokens", "seed", "bos_token_id", "eos_token_id", "pad_token_id",
        )  # fmt: skip

    def validate(self, **_unused: Any) -> None:
        """Raise `ValueError` naming the setting, its value and what is accepted."""
        for name in ("max_new_tokens", "steps", "block_length", "refresh_interval", "top_k"):
            value = getattr(self, name)
            optional = name in ("block_length", "top_k")
            if not (optional and value is None) and (type(value) is not int or value < 1):
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
        if self.block_length is not None and self.max_new_tokens % self.block_length:
            raise ValueError(f"block_length={self.block_length} must divide max_new_tokens={self.max_new_tokens}")
        if self.steps < self.num_blocks:
            raise ValueError(f"steps={self.steps} must be at least the number of blocks, {self.num_blocks}")
        for name in ("shared_schedule", "remasking", "early_exit", "compile"):
            if type(getattr(self, name)) is not bool:
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if self.sampler not in SAMPLERS:
            raise ValueError(f"sampler must be one of {SAMPLERS}, got {self.sampler!r}")
        if self.sampler in ADAPTIVE_SAMPLERS and (self.remasking or self.shared_schedule):
            raise ValueError(f"sampler={self.sampler!r} goes with neither remasking nor shared_schedule")
        if not isinstance(self.threshold, (int, float)) or not 0 < self.threshold <= 1:
            raise ValueError(f"threshold must be in (0, 1], got {self.threshold!r}")
        if not isinstance(self.entropy_bound, (int, float)) or not 0 <= self.entropy_bound < float("inf"):
            raise ValueError(f"entropy_bound must be a finite number of at least 0, got {self.entropy_bound!r}")
        if not isinstance(self.temperature, (int, float)) or not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be a finite number of at least 0, got {self.temperature!r}")
        if self.top_p is not None and not (isinstance(self.top_p, (int, float)) and 0 < self.top_p <= 1):
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p!r}")
        if self.seed is not None and not (type(self.seed) is int and 0 <= self.seed < 2**63):
            raise ValueError(f"seed must be an integer in [0, 2**63), got {self.seed!r}")
        ids = [] if self.suppress_tokens is None else self.suppress_tokens
        if not isinstance(ids, (list, tuple)) or not all(type(i) is int and i >= 0 for i in ids):
            raise ValueError(f"suppress_tokens must be a list of token ids, got {self.suppress_tokens!r}")

    @property
    def num_blocks(self) -> int:
        """Blocks an answer is decoded in."""
        return 1 if self.block_length is None else self.max_new_tokens // self.block_length

    @classmethod
    def from_model_config(cls, model_config):
        """Generation settings never live in the model config; transformers then falls back to the defaults."""
        raise NotImplementedError("PerceptionDLM keeps generation settings out of its model config")


@dataclass
class PerceptionDLMGenerationOutput(ModelOutput):
    """What `generate` returns.

    Args:
        sequences (`torch.LongTensor` of shape `(A, G)`): token ids of every answer's slots.
        confidences (`torch.FloatTensor` of shape `(A, G)`): probability of each token when it was committed, in [0, 1].
        sample_ids (`torch.LongTensor` of shape `(A,)`): which sample (image) of the batch an answer belongs to; answers
            of one sample come in the order its regions were given.
        region_indices (`torch.LongTensor` of shape `(A,)`): row of `region_boxes` that an answer describes.
        num_forward_passes (`int`): denoising passes of the language model (a prefill not counted).
        tokens_per_forward (`float`): slots committed per denoising pass, over the whole batch.
    """

    sequences: torch.Tensor | None = None
    confidences: torch.Tensor | None = None
    sample_ids: torch.Tensor | None = None
    region_indices: torch.Tensor | None = None
    num_forward_passes: int | None = None
    tokens_per_forward: float | None = None


def preset_settings(name: str | None) -> dict[str, Any]:
    """The settings of a preset; none without a name."""
    if name is None:
        return {}
    if name not in GENERATION_PRESETS:
        raise ValueError(f"preset must be one of {sorted(GENERATION_PRESETS)}, got {name!r}")
    return GENERATION_PRESETS[name]


class PerceptionDLMGenerationMixin:
    """Adds masked-diffusion `generate` to a model that can embed a prompt, lay out answers and score their slots."""

    config: Any
    device: torch.device
    embed_prompt: Callable[..., Any]

    def can_generate(self) -> bool:
        return True

    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.Tensor,
        sample_ids: torch.Tensor | None = None,
        region_order: torch.Tensor | None = None,
        generation_config: PerceptionDLMGenerationConfig | None = None,
        generator: torch.Generator | None = None,
        streamer: Any | None = None,
        use_cache: bool = True,
        encoded_image: Any | None = None,
        **kwargs: Any,
    ) -> PerceptionDLMGenerationOutput:
        """Denoise the captions of all regions (or one answer per row without regions) in parallel.

        Args:
            input_ids: (B, L), and in `kwargs` the other tensors of [`PerceptionDLMProcessor`].
            sample_ids: (B,) sample of each row; an image whose regions are split over several passes has several rows.
            region_order: (R,) place of each region in its sample as the caller gave it, if rows hold another order.
            generation_config: settings; keywords of [`PerceptionDLMGenerationConfig`] in `kwargs` override them.
            generator: source of randomness for sampling (or set `seed`).
            streamer: its `put_draft` receives the ids (A, G) after every step, and `end()` is called at the end.
            encoded_image: an `EncodedImage` instead of `pixel_values`; all rows then ask one question about it.
            use_cache: keep the prompt's keys and values between passes: exactly in the isolated layout, and elsewhere
                with a `refresh_interval` above 1.
        Raises:
            ValueError: for unknown keywords, settings out of range, or inputs that do not fit together.
        """
        settings, inputs = self._settings_and_inputs(generation_config, kwargs)
        if streamer is not None and not hasattr(streamer, "put_draft"):
            raise TypeError(f"streamer must have put_draft(ids) and end(), got {type(streamer).__name__}")
        generator = generator or self._seeded(settings)
        # 1. condition
        prompt = self.embed_prompt(input_ids, encoded_image=encoded_image, **inputs)
        targets_B = prompt.num_regions.clamp(min=1)  # a row without regions has one answer
        row_A = torch.arange(len(targets_B), device=input_ids.device).repeat_interleave(targets_B)
        kinds = (settings.refresh_interval, settings.compile)
        denoiser = Denoiser(self, prompt, settings.max_new_tokens, encoded_image, use_cache, *kinds)
        # 2. start from masks everywhere
        canvas = Canvas.blank(len(row_A), settings.max_new_tokens, self.config.mask_token_id, input_ids.device)
        samples_A = row_A if sample_ids is None else sample_ids[row_A]
        order = self._caller_order(samples_A, region_order)
        # 3. denoise, step by step
        for _ in self._denoise(canvas, denoiser, row_A, settings, generator):
            if streamer is not None:
                streamer.put_draft(canvas.ids[order].cpu())
        if streamer is not None:
            streamer.end()
        return PerceptionDLMGenerationOutput(
            sequences=canvas.ids[order],
            confidences=canvas.confidence[order],
            sample_ids=samples_A[order],
            region_indices=order,
            num_forward_passes=denoiser.passes,
            tokens_per_forward=(canvas.ids.numel() - int(canvas.filled.sum())) / denoiser.passes,
        )

    def _denoise(self, canvas: Canvas, denoiser: Denoiser, row_A, settings, generator) -> Iterator[None]:
        """Run the steps on a canvas; yields after each.

        Answers whose slots are all decided leave the running batch where nothing else looks at them (isolated layout).
        To find them the device is asked once per step, and not at all where the schedule alone says when to stop.
        """
        config = self.config
        suppressed = torch.tensor(settings.suppress_tokens or [], dtype=torch.int64, device=row_A.device)
        sample_tokens = TokenSampler(settings.temperature, settings.top_k, settings.top_p, suppressed, generator)
        rank_slots = SlotSampler(settings.sampler, settings.threshold, settings.entropy_bound, generator)
        group_A = row_A if settings.shared_schedule else torch.arange(len(row_A), device=row_A.device)
        length = settings.block_length or settings.max_new_tokens
        targets_SA = self._targets(settings, length, group_A)
        ends = (config.end_of_turn_token_id, config.end_of_text_token_id)
        alone = not (settings.remasking or settings.shared_schedule)  # whether answers decide for themselves
        closes = alone and settings.early_exit
        runs_ahead = closes or settings.sampler in ADAPTIVE_SAMPLERS  # of its schedule
        leaves = alone and config.attention_layout == "isolated"
        everything = torch.arange(len(row_A), device=row_A.device)
        for start in range(0, settings.max_new_tokens, length):
            block = slice(start, start + length)
            running = everything
            denoiser.run_all()
            open_A = canvas.undecided(block) if runs_ahead and start else everything
            for target_A in targets_SA:
                if not len(open_A):
                    break
                if leaves and len(open_A) != len(running):
                    running = open_A
                    denoiser.select(running)
                part = canvas.rows(running)
                tokens, confidence, probabilities = sample_tokens(denoiser(part.ids))
                free = torch.zeros_like(part.decided)
                free[:, block] = ~part.decided[:, block]
                priority, sure = rank_slots(confidence, probabilities, free)
                target = target_A[running]
                if runs_ahead:  # an answer that ran ahead of its schedule still goes on
                    target = torch.maximum(target, part.decided[:, block].sum(dim=1) + 1).clamp(max=length)
                part.update(tokens, confidence, priority, sure, block, group_A[running], target, settings.remasking)
                if closes:
                    part.close(ends, config.end_of_text_token_id, all_at_once=not leaves)
                canvas.put(running, part)
                yield
                if runs_ahead:
                    open_A = canvas.undecided(block)

    @staticmethod
    def _caller_order(samples_A: torch.Tensor, region_order: torch.Tensor | None) -> torch.Tensor:
        """Permutation (A,) of the answers into samples, and within them into the order their regions were given."""
        if region_order is None:
            return torch.arange(len(samples_A), device=samples_A.device)
        within = region_order.argsort(stable=True)
        return within[samples_A[within].argsort(stable=True)]

    @staticmethod
    def _targets(settings: PerceptionDLMGenerationConfig, block_length: int, group_A: torch.Tensor) -> torch.Tensor:
        """Decided slots of a block after each step, in the group of every answer: (steps, A)."""
        steps = settings.steps // settings.num_blocks
        schedule = released_schedule if settings.shared_schedule else linear_schedule
        sizes = torch.bincount(group_A).tolist()
        plans = {size: schedule(size * block_length, steps) for size in set(sizes)}
        longest = max(map(len, plans.values()))
        plans = {size: plan + plan[-1:] * (longest - len(plan)) for size, plan in plans.items()}
        return torch.tensor([plans[size] for size in sizes], device=group_A.device)[group_A].T

    def _settings_and_inputs(self, generation_config, kwargs):
        """Split keywords into settings and prompt tensors; anything else is an error."""
        base = generation_config if generation_config is not None else self.generation_config
        fields = PerceptionDLMGenerationConfig.fields()
        if not all(hasattr(base, name) for name in fields):
            raise TypeError(f"generation_config must be a PerceptionDLMGenerationConfig, got {type(base).__name__}")
        prompt_names = set(inspect.signature(self.embed_prompt).parameters)
        unknown = sorted(set(kwargs) - {*fields, *prompt_names, "preset"})
        if unknown:
            known = sorted({*fields, *prompt_names, "preset"})
            raise ValueError(f"unknown generate keywords {unknown}, known are {known}")
        given = {**preset_settings(kwargs.get("preset")), **{k: v for k, v in kwargs.items() if k in fields}}
        values = {name: getattr(base, name) for name in fields} | given
        inputs = {name: value for name, value in kwargs.items() if name in prompt_names}
        settings = PerceptionDLMGenerationConfig(**values)
        vocabulary = self.config.text_config.vocab_size
        suppressed = set(settings.suppress_tokens or ())
        if suppressed and (max(suppressed) >= vocabulary or len(suppressed) == vocabulary):
            raise ValueError(
                f"suppress_tokens must be ids below {vocabulary} and leave at least one token, got "
                f"{len(suppressed)} ids up to {max(suppressed)}"
            )
        return settings, inputs

    def _seeded(self, settings: PerceptionDLMGenerationConfig) -> torch.Generator | None:
        if settings.seed is None:
            return None
        return torch.Generator(device=self.device).manual_seed(settings.seed)

    def adjust_generation_fn(
        self,
        generation_config,
        from_auto_class,
        from_pipeline,
        pretrained_model_name_or_path,
        cache_dir,
        force_download,
        proxies,
        local_files_only,
        token,
        revision,
        subfolder,
        trust_remote_code,
        **kwargs,
    ):
        """Called by `from_pretrained`: load our own generation config class instead of the autoregressive one."""
        if generation_config is not None:
            self.generation_config = PerceptionDLMGenerationConfig.from_dict(generation_config.to_dict())
            return
        try:
            self.generation_config = PerceptionDLMGenerationConfig.from_pretrained(
                pretrained_model_name_or_path,
                cache_dir=cache_dir,
                force_download=force_download,
                proxies=proxies,
                local_files_only=local_files_only,
                token=token,
                revision=revision,
                subfolder=subfolder,
                _from_auto=from_auto_class,
                _from_pipeline=from_pipeline,
                **kwargs,
            )
        except OSError:
            logger.info("no generation_config.json at %s: using the defaults", pretrained_model_name_or_path)


__all__ = [
    "SAMPLERS",
    "PerceptionDLMGenerationConfig",
    "PerceptionDLMGenerationMixin",
    "PerceptionDLMGenerationOutput",
]
