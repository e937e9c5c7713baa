"""`generate`: masked-diffusion decoding of a batch, from the processor's tensors to token ids.

Legend: see sequence_perceptiondlm.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers.utils import ModelOutput, logging

from .cache_perceptiondlm import EncodedImage
from .denoising_perceptiondlm import Denoiser, Policy
from .generation_config_perceptiondlm import (
    NEUTRAL,
    PerceptionDLMGenerationConfig,
    preset_settings,
    refuse_unneutral,
    renamed,
)
from .inputs_perceptiondlm import PromptInputs
from .passes_perceptiondlm import PackedPasses, StaticPasses
from .sampling_perceptiondlm import Canvas


logger = logging.get_logger(__name__)


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


class PerceptionDLMGenerationMixin:
    """Adds masked-diffusion `generate` to a model that can embed a prompt, place answers and score their slots."""

    config: Any
    device: torch.device
    embed_prompt: Callable[..., Any]
    encode_images: Callable[..., Any]
    generation_config: PerceptionDLMGenerationConfig
    lm_head: torch.nn.Module

    @classmethod
    def can_generate(cls) -> bool:
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
        encoded_image: EncodedImage | None = None,
        draft: torch.Tensor | None = None,
        return_dict_in_generate: bool = True,
        **kwargs: Any,
    ) -> PerceptionDLMGenerationOutput | torch.Tensor:
        """Denoise the captions of all regions (or one answer per row without regions) in parallel.

        Rows that hold groups of one sample's regions run one after the other on one encoded image: peak memory is that
        of the largest group. Samples run together, also those that ask one image different questions.

        Args:
            input_ids: (B, L), and in `kwargs` the other tensors of [`PerceptionDLMProcessor`].
            sample_ids: (B,) sample of each row; an image whose regions are split over several passes has several rows.
            region_order: (R,) place of each region in its sample as the caller gave it, if rows hold another order.
            generation_config: settings; keywords of [`PerceptionDLMGenerationConfig`] in `kwargs` override them.
            generator: source of randomness for sampling, on any device (or set `seed`).
            streamer: its `put_draft` receives the ids (A, G) after every step, and `end()` is called at the end.
            use_cache: keep the prompt's keys and values between passes: exactly in the isolated layout, and elsewhere
                with a `refresh_interval` above 1.
            encoded_image: an `EncodedImage` instead of `pixel_values`.
            draft: (A, G) ids of earlier answers about the same regions, such as `sequences` of another frame; mask
                tokens where there is none. Slots that the model confirms, in two passes, keep their tokens; the others
                are denoised. Saves passes with an adaptive sampler; an answer then depends on its draft, too.
            return_dict_in_generate: False returns prompts and answers as one tensor (A, L + G), as other models do.
        Raises:
            ValueError: for unknown keywords, settings out of range, inputs that do not fit together, and logits that
                are not numbers.
        """
        settings, tensors = self._settings_and_inputs(generation_config, kwargs)
        if streamer is not None and not hasattr(streamer, "put_draft"):
            raise TypeError(f"streamer must have put_draft(ids) and end(), got {type(streamer).__name__}")
        if generator is None and settings.seed is not None:
            generator = torch.Generator().manual_seed(settings.seed)
        # 1. condition
        inputs = PromptInputs(input_ids=input_ids, encoded_image=encoded_image, **tensors).checked(self)
        images = self._images(inputs)
        # 2. start from masks everywhere
        row_A = inputs.rows_of_answers()
        rows = torch.tensor(row_A, device=input_ids.device)
        canvas = Canvas.blank(len(row_A), settings.max_new_tokens, self.config.mask_token_id, input_ids.device)
        samples_A = rows if sample_ids is None else sample_ids[rows]
        order = caller_order(samples_A, region_order)
        drafts = None if draft is None else checked_draft(draft, canvas, order)
        # 3. denoise, round by round, step by step
        passes = 0
        for chosen, last in inputs.rounds(None if sample_ids is None else sample_ids.tolist()):
            answers = torch.tensor([a for a, row in enumerate(row_A) if row in chosen], device=input_ids.device)
            part = canvas.rows(answers)
            denoiser = self._denoiser(inputs.rows(chosen), images, part, settings, use_cache, generator)
            if drafts is not None:
                denoiser.start_from(drafts[answers])
            for _ in denoiser.steps():
                canvas.put(answers, part)
                if streamer is not None:
                    streamer.put_draft(canvas.ids[order].cpu())
            canvas.put(answers, part)
            denoiser.check()
            passes += denoiser.passes.count
            for image in last:
                images.pop(image, None)
        if streamer is not None:
            streamer.end()
        if not return_dict_in_generate:
            answers = ended(canvas.ids[order], self.config.end_of_turn_token_id, self.config.end_of_text_token_id)
            return torch.cat((input_ids[rows[order]], answers), dim=1)
        return PerceptionDLMGenerationOutput(
            sequences=canvas.ids[order],
            confidences=canvas.confidence[order],
            sample_ids=samples_A[order],
            region_indices=order,
            num_forward_passes=passes,
            tokens_per_forward=(canvas.ids.numel() - int(canvas.filled.sum())) / passes,
        )

    def _images(self, inputs: PromptInputs) -> dict[int, EncodedImage]:
        """Every image encoded once; none where prompts enter the vision encoder, which sees each group by itself."""
        if inputs.encoded_image is not None:
            return {0: inputs.encoded_image}
        if inputs.pixel_values is None or self.config.region_conditioning == "vision":
            return {}
        tiles = self.encode_images(inputs)
        return {
            image: EncodedImage(features, inputs.tile_grids[image][None], inputs.image_sizes[image][None])
            for image, features in enumerate(tiles)
        }

    def _denoiser(self, inputs, images, canvas, settings, use_cache: bool, generator) -> Denoiser:
        """Prefill the rows of a round and set up its loop."""
        shown = inputs.shown_images
        tiles = [images[image].tiles for row in shown for image in row] if images else None
        prompt = self.embed_prompt(inputs, tiles)
        layout, length = self.config.layout, settings.max_new_tokens
        passes: StaticPasses | PackedPasses
        if layout.static_prompt and use_cache:
            remembering = [images.get(row[0]) if len(row) == 1 else None for row in shown]
            passes = StaticPasses(self, prompt, remembering, length, settings.compile)
        else:
            interval = settings.refresh_interval if use_cache and not layout.static_prompt else 1
            passes = PackedPasses(self, prompt, length, interval, settings.compile)
        rows = inputs.rows_of_answers()
        policy = Policy(settings, layout.static_prompt, passes.answers_can_leave, rows, canvas.ids.device)
        ends = (self.config.end_of_turn_token_id, self.config.end_of_text_token_id)
        vocabulary = self.config.text_config.vocab_size
        return Denoiser(canvas, passes, self.lm_head, policy, settings, ends, vocabulary, generator)

    def _settings_and_inputs(self, generation_config, kwargs):
        """Split keywords into settings and prompt tensors; anything else is an error."""
        base = generation_config if generation_config is not None else self.generation_config
        fields, tensors = PerceptionDLMGenerationConfig.fields(), PromptInputs.tensor_names()
        if not all(hasattr(base, name) for name in fields):
            raise TypeError(f"generation_config must be a PerceptionDLMGenerationConfig, got {type(base).__name__}")
        kwargs = renamed(kwargs)
        refuse_unneutral(kwargs)
        known = {*fields, *tensors, "preset"}
        if unknown := sorted(set(kwargs) - known - set(NEUTRAL)):
            raise ValueError(f"unknown generate keywords {unknown}, known are {sorted(known)}")
        given = {**preset_settings(kwargs.get("preset")), **{k: v for k, v in kwargs.items() if k in fields}}
        settings = PerceptionDLMGenerationConfig(**({name: getattr(base, name) for name in fields} | given))
        vocabulary = self.config.text_config.vocab_size
        suppressed = set(settings.suppress_tokens or ())
        if suppressed and (max(suppressed) >= vocabulary or len(suppressed) == vocabulary):
            raise ValueError(
                f"suppress_tokens must be ids below {vocabulary} and leave at least one token, got "
                f"{len(suppressed)} ids up to {max(suppressed)}"
            )
        return settings, {name: value for name, value in kwargs.items() if name in tensors}

    def adjust_generation_fn(
        self,
        generation_config,
        from_auto_class,
        from_pipeline,
        pretrained_model_name_or_path,
        trust_remote_code=None,
        **location,
    ):
        """Called by `from_pretrained`: load our own generation config class instead of the autoregressive one."""
        if generation_config is not None:
            self.generation_config = PerceptionDLMGenerationConfig.from_dict(generation_config.to_dict())
            return
        if pretrained_model_name_or_path is None:  # weights were given as a state dict
            return
        try:
            self.generation_config = PerceptionDLMGenerationConfig.from_pretrained(
                pretrained_model_name_or_path, _from_auto=from_auto_class, _from_pipeline=from_pipeline, **location
            )
        except OSError:
            logger.info("no generation_config.json at %s: using the defaults", pretrained_model_name_or_path)


def ended(ids_AG: torch.Tensor, end_of_turn: int, end_of_text: int) -> torch.Tensor:
    """Answers (A, G) with nothing but `end_of_text` behind the first token that ends each."""
    ends = (ids_AG == end_of_turn) | (ids_AG == end_of_text)
    return ids_AG.masked_fill(ends.cumsum(dim=1) - ends.long() > 0, end_of_text)


def checked_draft(draft_AG: torch.Tensor, canvas: Canvas, order_A: torch.Tensor) -> torch.Tensor:
    """A draft in the caller's order brought to that of the canvas; refused where it has another shape."""
    if draft_AG.shape != canvas.ids.shape or draft_AG.dtype != canvas.ids.dtype:
        raise ValueError(
            f"draft is {draft_AG.dtype} {tuple(draft_AG.shape)}; accepted: {canvas.ids.dtype} "
            f"{tuple(canvas.ids.shape)} (answers, max_new_tokens)"
        )
    placed = torch.empty_like(canvas.ids)
    placed[order_A] = draft_AG.to(canvas.ids.device)
    return placed


def caller_order(samples_A: torch.Tensor, region_order: torch.Tensor | None) -> torch.Tensor:
    """Permutation (A,) of the answers into samples, and within them into the order their regions were given."""
    if region_order is None:
        return torch.arange(len(samples_A), device=samples_A.device)
    within = region_order.argsort(stable=True)
    return within[samples_A[within].argsort(stable=True)]


__all__ = ["PerceptionDLMGenerationMixin", "PerceptionDLMGenerationOutput"]
