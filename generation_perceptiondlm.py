"""`generate`: masked-diffusion decoding of a batch, from the processor's tensors to token ids.

Legend: see sequence_perceptiondlm.
"""

import os
from collections.abc import Callable
from typing import Any

import torch
from transformers.utils import logging

from .cache_perceptiondlm import EncodedImage
from .decoding_perceptiondlm import Decoding, JointSteps, PerceptionDLMGenerationOutput
from .generation_config_perceptiondlm import (
    NEUTRAL,
    PerceptionDLMGenerationConfig,
    preset_settings,
    refuse_unneutral,
    renamed,
)
from .inputs_perceptiondlm import PromptInputs


logger = logging.get_logger(__name__)


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
        if streamer is not None and not hasattr(streamer, "put_draft"):
            raise TypeError(f"streamer must have put_draft(ids) and end(), got {type(streamer).__name__}")
        decoding = self.start_decoding(
            input_ids, sample_ids, region_order, generation_config, generator, use_cache, encoded_image, draft, **kwargs
        )
        for step in decoding.steps():
            step.take()
            if streamer is not None:
                streamer.put_draft(decoding.drafts())
        if streamer is not None:
            streamer.end()
        if return_dict_in_generate:
            return decoding.output()
        answers = ended(
            decoding.canvas.ids[decoding.order], self.config.end_of_turn_token_id, self.config.end_of_text_token_id
        )
        return torch.cat((input_ids[decoding.rows[decoding.order]], answers), dim=1)

    @torch.no_grad()
    def start_decoding(
        self,
        input_ids: torch.Tensor,
        sample_ids: torch.Tensor | None = None,
        region_order: torch.Tensor | None = None,
        generation_config: PerceptionDLMGenerationConfig | None = None,
        generator: torch.Generator | None = None,
        use_cache: bool = True,
        encoded_image: EncodedImage | None = None,
        draft: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Decoding:
        """What `generate` would run, to be taken step by step: `for step in decoding.steps(): step.take()`.

        Nothing is computed before the first step is asked for. The arguments are those of `generate`. Call it, and
        take steps, under `torch.no_grad()`.
        """
        settings, tensors = self._settings_and_inputs(generation_config, kwargs)
        if generator is None and settings.seed is not None:
            generator = torch.Generator().manual_seed(settings.seed)
        inputs = PromptInputs(input_ids=input_ids, encoded_image=encoded_image, **tensors).checked(self)
        return Decoding(self, inputs, settings, sample_ids, region_order, use_cache, generator, draft)

    def joint_steps(self) -> JointSteps:
        """What takes steps of several decodings of this model in shared passes."""
        return JointSteps(self)

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
        if beyond := [ids[0] for ids, _ in settings.sequence_bias or () if ids[0] >= vocabulary]:
            raise ValueError(f"sequence_bias must be of ids below {vocabulary}, got {beyond[0]}")
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
        if (subfolder := location.get("subfolder")) and os.path.isdir(pretrained_model_name_or_path):
            # transformers looks into the folder above first, and reads what lies there
            pretrained_model_name_or_path = os.path.join(pretrained_model_name_or_path, subfolder)
            location["subfolder"] = ""
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


__all__ = ["PerceptionDLMGenerationMixin", "PerceptionDLMGenerationOutput"]
