"""Masked-diffusion decoding, step by step.

All answers start fully masked; each step scores the open slots in one pass, picks a token for each, and commits some; a
committed token stays. Every answer (region) decides for itself, so decoding N regions together gives what decoding them
one by one gives. An answer that has come to its end leaves the running batch.

Legend: see sequence_perceptiondlm.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from .configuration_perceptiondlm import shared_schedule
from .generation_config_perceptiondlm import ADAPTIVE_SAMPLERS, PerceptionDLMGenerationConfig
from .passes_perceptiondlm import PackedPasses, StaticPasses
from .sampling_perceptiondlm import Canvas, SlotSampler, TokenSampler, linear_schedule
from .sequence_perceptiondlm import Names


BROKEN = (
    "the model's logits are not numbers (NaN): weights or activations overflowed. Likely causes: float16 for weights "
    "made in bfloat16 (load with dtype=torch.bfloat16 or torch.float32), weights that were not loaded or are damaged, "
    "pixel values that are not finite"
)


class Policy:
    """What settings mean for a run of answers: who goes on, who leaves, and how many slots a step decides.

    Args:
        settings: how to decode.
        static_prompt: whether answers depend on nothing but their prompt, that is, not on each other.
        answers_can_leave: whether passes can run some of the answers.
        row_A: row of every answer, on the host.
    """

    def __init__(
        self,
        settings: PerceptionDLMGenerationConfig,
        static_prompt: bool,
        answers_can_leave: bool,
        row_A: list[int],
        device: torch.device,
    ):
        self.length = settings.block_length or settings.max_new_tokens
        self.blocks = [slice(start, start + self.length) for start in range(0, settings.max_new_tokens, self.length)]
        self.remasking = settings.remasking
        alone = not (settings.remasking or settings.shared_schedule)  # whether answers decide for themselves
        self.closes = alone and settings.early_exit
        self.closes_together = not static_prompt
        self.runs_ahead = self.closes or settings.sampler in ADAPTIVE_SAMPLERS  # of its schedule
        self.leaves = alone and static_prompt and answers_can_leave
        groups = row_A if settings.shared_schedule else list(range(len(row_A)))
        sizes = [size for _, size in sorted(Counter(groups).items())]
        self.plans = self._plans(settings, sizes)
        self.group_A = torch.tensor(groups, device=device)
        targets = [[self.plans[group][step] for group in groups] for step in range(self.steps)]
        self.targets_A = torch.tensor(targets, device=device)  # of every step

    def _plans(self, settings: PerceptionDLMGenerationConfig, sizes: list[int]) -> list[list[int]]:
        """Decided slots of a block after each step, for groups of so many answers."""
        steps = settings.steps // settings.num_blocks
        schedule = shared_schedule if settings.shared_schedule else linear_schedule
        plans = {size: schedule(size * self.length, steps) for size in set(sizes)}
        self.steps = max(map(len, plans.values()))
        return [plans[size] + plans[size][-1:] * (self.steps - len(plans[size])) for size in sizes]

    def open_slots(self, step: int) -> int:
        """Slots of a block that a schedule leaves open before a step, over all answers; all if they compete again."""
        total = sum(plan[-1] for plan in self.plans)
        return total if self.remasking or not step else total - sum(plan[step - 1] for plan in self.plans)


@dataclass
class OpenSlots:
    """The slots that a step scores.

    Args:
        answers: the answers that run (A'), None for all.
        places: (N,) the open slots in the flattened (A', G) of these.
    """

    answers: list[int] | None
    places: torch.Tensor


@dataclass
class Step:
    """One step of a denoiser, to be taken before the next one is asked for.

    Args:
        denoiser: whose step it is.
        block: slots that may be decided; number: of the step within its block.
        slots: what it scores.
        part: the canvas of the answers that run (A').
        index: (A',) which answers these are, None for all.
    """

    denoiser: "Denoiser"
    block: slice
    number: int
    slots: OpenSlots
    part: Canvas
    index: torch.Tensor | None

    def take(self) -> None:
        """One pass, and what it decides."""
        hidden_AGD = self.denoiser.passes(self.part.ids, self.slots.answers)
        self.commit(self.denoiser.score(self.of_open_slots(hidden_AGD)))

    def of_open_slots(self, hidden_AGD: torch.Tensor) -> torch.Tensor:
        """Hidden states (N, D) of the slots to score, out of those of all slots of the running answers."""
        return hidden_AGD.flatten(0, 1)[self.slots.places.to(hidden_AGD.device)]

    def commit(self, scored: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
        """Decide slots, given tokens, confidence and certainty (N,) of the open ones."""
        self.denoiser.commit(self, scored)


class Denoiser:
    """The loop: steps on a canvas until all slots are decided.

    Args:
        canvas: fully masked.
        passes: from slots to hidden states, see passes_perceptiondlm.
        head: from hidden states to logits (..., V).
        policy, settings: how to decode.
        end_ids: tokens that end an answer; the last one fills what follows.
        vocabulary: V.
        generator: source of randomness.
    """

    def __init__(
        self,
        canvas: Canvas,
        passes: StaticPasses | PackedPasses,
        head: Callable[[torch.Tensor], torch.Tensor],
        policy: Policy,
        settings: PerceptionDLMGenerationConfig,
        end_ids: tuple[int, ...],
        vocabulary: int,
        generator: torch.Generator | None,
    ):
        self.canvas, self.passes, self.head, self.policy = canvas, passes, head, policy
        self.end_ids, self.vocabulary = end_ids, vocabulary
        self.device = canvas.ids.device
        suppressed = torch.tensor(settings.suppress_tokens or [], dtype=torch.int64, device=self.device)
        bias = None
        if settings.sequence_bias:
            ids, values = zip(*settings.sequence_bias, strict=True)
            bias = torch.tensor(ids, device=self.device)[:, 0], torch.tensor(values, device=self.device)
        self.choose_tokens = TokenSampler(
            settings.temperature, settings.top_k, settings.top_p, suppressed, bias, settings.sampler, generator
        )
        self.rank_slots = SlotSampler(
            settings.sampler, len(canvas.ids), settings.threshold, settings.entropy_bound, generator
        )
        self.broken = torch.zeros((), dtype=torch.bool, device=self.device)
        self.threshold, self.begun = settings.threshold, False

    def start_from(self, draft_AG: torch.Tensor) -> None:
        """Decide the slots of a draft that the model confirms, in two passes.

        Each half of a draft's slots is predicted from the other half; what is predicted as it stands there, with at
        least the threshold's probability, is decided. Slots of mask tokens are open.
        """
        even_G = torch.arange(draft_AG.shape[1], device=self.device) % 2 == 0
        for half_G in (even_G, ~even_G):
            shown = draft_AG.masked_fill(half_G, self.canvas.mask_token_id)
            hidden_AHD = self.passes(shown)[:, half_G.to(draft_AG.device)]
            scored = self.choose_tokens.score(hidden_AHD.flatten(0, 1), self.head, self.vocabulary)
            tokens, confidence = (values.to(self.device).view(hidden_AHD.shape[:2]) for values in scored[:2])
            self.broken |= confidence.isnan().any()
            kept = (tokens == draft_AG[:, half_G]) & (confidence >= self.threshold)
            self.canvas.ids[:, half_G] = torch.where(kept, tokens, self.canvas.mask_token_id)
            self.canvas.confidence[:, half_G] = torch.where(kept, confidence, 0.0)
            self.canvas.decided[:, half_G] = kept
        if self.policy.closes:
            self.canvas.close(self.end_ids, self.end_ids[-1], self.policy.closes_together)
        self.begun = True

    def begin_with(self, names: Names, regions_B: torch.Tensor, threshold: float) -> None:
        """Decide the first slot of answers about regions whose name is true with more than a probability.

        Args:
            names: of all regions.
            regions_B: regions of each row; a row without any has one answer, which is about none.
        """
        about_A = (regions_B > 0).repeat_interleave(regions_B.clamp(min=1)).to(self.device)
        ids_R, chances_R = names.ids.to(self.device), names.chances.to(self.device)
        sure_R = chances_R > threshold
        answers = about_A.nonzero()[:, 0][sure_R]
        self.canvas.ids[answers, 0] = ids_R[sure_R]
        self.canvas.confidence[answers, 0] = chances_R[sure_R]
        self.canvas.decided[answers, 0] = True
        self.begun = True

    def steps(self) -> Iterator[Step]:
        """The steps, each to be taken before the next is asked for."""
        for block in self.policy.blocks:
            for number in range(self.policy.steps):
                slots = self._open(block, number)
                if slots is None:
                    break
                index = None if slots.answers is None else torch.tensor(slots.answers, device=self.device)
                part = self.canvas if index is None else self.canvas.rows(index)
                yield Step(self, block, number, slots, part, index)

    def check(self) -> None:
        """Raise `ValueError` if a pass gave logits that are not numbers."""
        if self.broken.item():
            raise ValueError(BROKEN)

    def _open(self, block: slice, step: int) -> OpenSlots | None:
        """The slots to score; None where all are decided.

        Where answers run ahead of their schedule the device is asked for them, once; elsewhere their number is known.
        """
        policy, canvas = self.policy, self.canvas
        if self.policy.runs_ahead and (step or block.start or self.begun):
            state = torch.cat(((~canvas.decided[:, block]).flatten(), self.broken[None])).tolist()
            if state.pop():
                raise ValueError(BROKEN)
            undecided = [state[at : at + policy.length] for at in range(0, len(state), policy.length)]
            open_answers = [answer for answer, row in enumerate(undecided) if any(row)]
            if not open_answers:
                return None
            answers = open_answers if policy.leaves and len(open_answers) < len(undecided) else None
            running = range(len(undecided)) if answers is None else answers
            width = canvas.ids.shape[1]
            places = [
                place * width + block.start + slot
                for place, answer in enumerate(running)
                for slot, is_open in enumerate(undecided[answer])
                if is_open
            ]
            return OpenSlots(answers, torch.tensor(places, device=self.device))
        free = torch.zeros_like(canvas.decided)
        free[:, block] = ~canvas.decided[:, block] | policy.remasking
        order = free.flatten().to(torch.uint8).argsort(descending=True, stable=True)
        return OpenSlots(None, order[: policy.open_slots(step)])

    def score(self, hidden_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Tokens, confidence and certainty (N,) of open slots, given their hidden states."""
        return self.choose_tokens.score(hidden_ND, self.head, self.vocabulary)

    def commit(self, step: Step, scored: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
        """What a step decides, given tokens, confidence and certainty (N,) of its open slots."""
        policy, target, group = self.policy, self.policy.targets_A[step.number], self.policy.group_A
        block, part, index = step.block, step.part, step.index
        if index is not None:
            target, group = target[index], group[index]
        tokens, confidence, certainty = (self._spread(values, step.slots, part) for values in scored)
        self.broken |= confidence.isnan().any()
        # 1. rank the open slots, and commit
        free = torch.zeros_like(part.decided)
        free[:, block] = ~part.decided[:, block]
        priority, sure = self.rank_slots(certainty, free, index)
        if policy.runs_ahead:  # an answer that ran ahead of its schedule still goes on
            target = torch.maximum(target, part.decided[:, block].sum(dim=1) + 1).clamp(max=policy.length)
        part.update(tokens, confidence, priority, sure, block, group, target, policy.remasking)
        # 2. close what has come to its end
        if policy.closes:
            part.close(self.end_ids, self.end_ids[-1], policy.closes_together)
        if index is not None:
            self.canvas.put(index, part)

    def _spread(self, values_N: torch.Tensor, slots: OpenSlots, part: Canvas) -> torch.Tensor:
        """Values of the open slots where they stand in (A', G), 0 elsewhere."""
        values_N = values_N.to(self.device)
        flat = values_N.new_zeros(part.ids.numel())
        return flat.scatter(0, slots.places, values_N).view_as(part.ids)
