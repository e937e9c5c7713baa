"""Answers on their way: what `generate` runs to its end, and what an engine takes step by step, beside others.

    Decoding     the answers of one batch of prompts, and the steps they need
    JointSteps   takes steps of several decodings in shared passes

A step of one decoding knows nothing of other decodings, and in a layout whose prompt looks at no answer a shared pass
gives each answer what it gets alone, up to the rounding of matrix products of another size. So decodings may join and
leave between any two steps.

Legend: see sequence_perceptiondlm.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.utils import ModelOutput

from .cache_perceptiondlm import EncodedImage, KeyValues
from .denoising_perceptiondlm import Denoiser, Policy, Step
from .generation_config_perceptiondlm import PerceptionDLMGenerationConfig
from .inputs_perceptiondlm import PromptInputs
from .passes_perceptiondlm import PackedPasses, StaticPasses, join_spans, run_joined
from .sampling_perceptiondlm import LOGITS_AT_ONCE, Canvas


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


class Decoding:
    """The answers of one batch of prompts, from masks everywhere to the last decided slot.

    Args:
        model: a [`PerceptionDLMForConditionalGeneration`].
        inputs: checked.
        settings: how to decode.
        sample_ids, region_order, use_cache, generator, draft: see `generate`.

    Attributes:
        row_A: row of every answer, on the host; rows (A,) the same on the device.
        order: (A,) the answers in the caller's order.
        num_passes: denoising passes of the rounds that are over.
    """

    def __init__(
        self,
        model: Any,
        inputs: PromptInputs,
        settings: PerceptionDLMGenerationConfig,
        sample_ids: torch.Tensor | None = None,
        region_order: torch.Tensor | None = None,
        use_cache: bool = True,
        generator: torch.Generator | None = None,
        draft: torch.Tensor | None = None,
    ):
        self.model, self.inputs, self.settings = model, inputs, settings
        self.use_cache, self.generator, self.num_passes = use_cache, generator, 0
        self.row_A, device = inputs.rows_of_answers(), inputs.input_ids.device
        self.rows = torch.tensor(self.row_A, device=device)
        self.canvas = Canvas.blank(len(self.row_A), settings.max_new_tokens, model.config.mask_token_id, device)
        self.samples_A = self.rows if sample_ids is None else sample_ids[self.rows]
        self.order = caller_order(self.samples_A, region_order)
        self.sample_of_row = None if sample_ids is None else sample_ids.tolist()
        self.draft = None if draft is None else checked_draft(draft, self.canvas, self.order)
        self._round: tuple[torch.Tensor, Canvas] | None = None  # the answers that run, and their part of the canvas

    def steps(self) -> Iterator[Step]:
        """All steps, round by round, each to be taken before the next is asked for.

        Images are encoded before the first one, and the prompts of a round before its first one.

        Raises:
            ValueError: the model's logits are not numbers.
        """
        images = self._encoded_images()
        for chosen, last in self.inputs.rounds(self.sample_of_row):
            answers = torch.tensor(
                [a for a, row in enumerate(self.row_A) if row in chosen], device=self.canvas.ids.device
            )
            part = self.canvas.rows(answers)
            draft_AG = None if self.draft is None else self.draft[answers]
            denoiser = self._denoiser(self.inputs.rows(chosen), images, part, draft_AG)
            self._round = answers, part
            yield from denoiser.steps()
            denoiser.check()
            self.canvas.put(answers, part)
            self._round = None
            self.num_passes += denoiser.passes.count
            for image in last:
                images.pop(image, None)

    def drafts(self) -> torch.Tensor:
        """Ids (A, G) as they stand, on the host, in the caller's order."""
        if self._round is not None:
            self.canvas.put(*self._round)
        return self.canvas.ids[self.order].cpu()

    def output(self) -> PerceptionDLMGenerationOutput:
        """What the steps have made, once all are taken."""
        committed = self.canvas.ids.numel() - int(self.canvas.filled.sum())
        return PerceptionDLMGenerationOutput(
            sequences=self.canvas.ids[self.order],
            confidences=self.canvas.confidence[self.order],
            sample_ids=self.samples_A[self.order],
            region_indices=self.order,
            num_forward_passes=self.num_passes,
            tokens_per_forward=committed / self.num_passes,
        )

    def _encoded_images(self) -> dict[int, EncodedImage]:
        """Every image encoded once; none where prompts enter the vision encoder, which sees each group by itself."""
        inputs = self.inputs
        if inputs.encoded_image is not None:
            return {0: inputs.encoded_image}
        if inputs.pixel_values is None or self.model.config.region_conditioning == "vision":
            return {}
        tiles = self.model.encode_images(inputs)
        return {
            image: EncodedImage(features, inputs.tile_grids[image][None], inputs.image_sizes[image][None])
            for image, features in enumerate(tiles)
        }

    def _denoiser(
        self,
        inputs: PromptInputs,
        images: dict[int, EncodedImage],
        canvas: Canvas,
        draft_AG: torch.Tensor | None,
    ) -> Denoiser:
        """Prefill the rows of a round and set up its loop, with what is known before it."""
        model, settings, config = self.model, self.settings, self.model.config
        shown = inputs.shown_images
        tiles = [images[image].tiles for row in shown for image in row] if images else None
        prompt = model.embed_prompt(inputs, tiles)
        layout, length = config.layout, settings.max_new_tokens
        passes: StaticPasses | PackedPasses
        if layout.static_prompt and self.use_cache:
            remembering = [images.get(row[0]) if len(row) == 1 else None for row in shown]
            passes = StaticPasses(model, prompt, remembering, length, settings.compile)
        else:
            interval = settings.refresh_interval if self.use_cache and not layout.static_prompt else 1
            passes = PackedPasses(model, prompt, length, interval, settings.compile)
        policy = Policy(
            settings, layout.static_prompt, passes.answers_can_leave, inputs.rows_of_answers(), canvas.ids.device
        )
        ends = (config.end_of_turn_token_id, config.end_of_text_token_id)
        denoiser = Denoiser(
            canvas, passes, model.lm_head, policy, settings, ends, config.text_config.vocab_size, self.generator
        )
        if draft_AG is not None:
            denoiser.start_from(draft_AG)
        if prompt.names is not None and settings.naming_threshold is not None:
            denoiser.begin_with(prompt.names, inputs.num_regions, settings.naming_threshold)
        return denoiser


class JointSteps:
    """Takes steps of several decodings of one model, those of one shape in one pass.

    Steps share a pass where their answers have as many slots, all with regions or all without, and their passes are
    `StaticPasses` that are not compiled; others are taken one by one.

    Args:
        model: the decodings' model.
    """

    def __init__(self, model: Any):
        self.model = model
        self._joined: dict[tuple, tuple[list[StaticPasses], KeyValues | None]] = {}  # RoI spans of the last passes

    @torch.no_grad()
    def take(self, steps: Sequence[Step]) -> int:
        """Take one step of each decoding; returns the number of passes that it took."""
        alone, groups = [], dict[tuple, list[Step]]()
        for step in steps:
            key = step.denoiser.passes.joins_with
            groups.setdefault(key, []).append(step) if key is not None else alone.append([step])
        self._joined = {key: value for key, value in self._joined.items() if len(groups.get(key, ())) > 1}
        parties = [*alone, *groups.values()]
        for party in parties:
            if len(party) == 1:
                party[0].take()
            else:
                self._commit(party, self._run(party))
        return len(parties)

    def _run(self, party: list[Step]) -> list[torch.Tensor]:
        """Hidden states (N, D) of the open slots of each step."""
        members = [passes for step in party if isinstance(passes := step.denoiser.passes, StaticPasses)]
        key = members[0].joins_with
        assert key is not None  # or its step would stand alone
        known, spans = self._joined.get(key, ([], None))
        if len(known) != len(members) or any(a is not b for a, b in zip(known, members, strict=True)):
            spans = join_spans(members)
            self._joined[key] = members, spans
        slots = [(step.part.ids, step.slots.answers) for step in party]
        hidden = run_joined(self.model, members, slots, spans)
        return [step.of_open_slots(states) for step, states in zip(party, hidden, strict=True)]

    def _commit(self, party: list[Step], hidden: list[torch.Tensor]) -> None:
        """Let every step decide; the vocabulary head runs for as many of them at a time as fit its bound."""
        at_once = max(1, LOGITS_AT_ONCE // self.model.config.text_config.vocab_size)
        for start, end in runs_within([len(states) for states in hidden], at_once):
            if end - start == 1:
                party[start].commit(party[start].denoiser.score(hidden[start]))
                continue
            logits = self.model.lm_head(torch.cat(hidden[start:end]))
            parts = logits.split([len(states) for states in hidden[start:end]])
            for step, part in zip(party[start:end], parts, strict=True):
                step.commit(step.denoiser.choose_tokens(part))


def runs_within(sizes: Sequence[int], limit: int) -> list[tuple[int, int]]:
    """Runs (start, end) of neighbours whose sizes add up to at most `limit`; a larger one stands alone."""
    runs, start, total = [], 0, 0
    for place, size in enumerate(sizes):
        if place > start and total + size > limit:
            runs.append((start, place))
            start, total = place, 0
        total += size
    return [*runs, (start, len(sizes))] if sizes else []


def caller_order(samples_A: torch.Tensor, region_order: torch.Tensor | None) -> torch.Tensor:
    """Permutation (A,) of the answers into samples, and within them into the order their regions were given."""
    if region_order is None:
        return torch.arange(len(samples_A), device=samples_A.device)
    within = region_order.argsort(stable=True)
    return within[samples_A[within].argsort(stable=True)]


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
