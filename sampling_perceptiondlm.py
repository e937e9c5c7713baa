"""What a denoising step decides: schedules (how many slots), samplers (which tokens, which slots), the canvas.

Legend: see sequence_perceptiondlm.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch


LOGITS_AT_ONCE = 2**25  # numbers of the vocabulary's width that scoring holds at a time, 128 MB in fp32


def linear_schedule(num_slots: int, steps: int) -> list[int]:
    """Slots decided after each step, all at the last; the first steps take the remainder (LLaDA)."""
    steps = min(steps, num_slots)
    share, remainder = divmod(num_slots, steps)
    return [share * step + min(step, remainder) for step in range(1, steps + 1)]


@dataclass
class TokenSampler:
    """Chooses a token for every open slot; greedy at temperature 0, otherwise sampled after top-k and top-p.

    Args:
        temperature, top_k, top_p, suppress_tokens: settings of `PerceptionDLMGenerationConfig`.
        bias: its `sequence_bias`, ids and what is added to their logits, (n,) each.
        certainty: what an adaptive sampler ranks slots by, `"margin"` or `"entropy_bound"`; otherwise unused.
        generator: source of randomness, on any device.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    suppress_tokens: torch.Tensor | None = None
    bias: tuple[torch.Tensor, torch.Tensor] | None = None
    certainty: str = "confidence"
    generator: torch.Generator | None = None

    def score(self, hidden_ND: torch.Tensor, head: Callable[[torch.Tensor], torch.Tensor], vocabulary: int):
        """Token ids, their probability, and the slots' certainty, (N,) each, a bounded number of logits at once.

        Args:
            hidden_ND: hidden states of the open slots.
            head: to logits (..., V); vocabulary: V.
        """
        parts = [self(head(part)) for part in hidden_ND.split(max(1, LOGITS_AT_ONCE // vocabulary))]
        return tuple(torch.cat(column) for column in zip(*parts, strict=True))

    def __call__(self, logits_NV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Token ids, their probability by the model's own distribution, and certainty, (N,), the latter two fp32."""
        logits = logits_NV.float()
        if self.suppress_tokens is not None and self.suppress_tokens.numel():
            logits = logits.index_fill(-1, self.suppress_tokens.to(logits.device), float("-inf"))
        probabilities = logits.softmax(dim=-1)
        if self.bias is not None:
            ids, values = self.bias
            logits = logits.index_add(-1, ids, values.to(logits).expand(len(logits), -1))
        if self.temperature == 0 and self.bias is None:
            confidence, tokens = probabilities.max(dim=-1)
        else:
            tokens = self._draw(logits / self.temperature) if self.temperature else logits.argmax(dim=-1)
            confidence = probabilities.gather(-1, tokens[:, None])[:, 0]
        if self.certainty == "margin":
            likeliest = probabilities.topk(2, dim=-1).values
            return tokens, confidence, likeliest[:, 0] - likeliest[:, 1]
        if self.certainty == "entropy_bound":
            return tokens, confidence, -torch.special.entr(probabilities).sum(dim=-1)
        return tokens, confidence, confidence

    def _draw(self, logits_NV: torch.Tensor) -> torch.Tensor:
        """Tokens (N,) drawn from what top-k and top-p leave."""
        kept, ids = self._restrict(logits_NV)
        cumulative = kept.softmax(dim=-1).cumsum(dim=-1)
        target = uniform((len(cumulative), 1), self.generator, cumulative.device) * cumulative[:, -1:]
        place = torch.searchsorted(cumulative, target, right=True).clamp(max=cumulative.shape[-1] - 1)
        return (place if ids is None else ids.gather(-1, place))[:, 0]

    def _restrict(self, logits_NV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The logits that may be drawn, -inf elsewhere, and the ids that they belong to (None: all, in order)."""
        ids = None
        if self.top_k is not None and self.top_k < logits_NV.shape[-1]:
            logits_NV, ids = logits_NV.topk(self.top_k, dim=-1)
        if self.top_p is not None and self.top_p < 1:
            if ids is None:
                logits_NV, ids = logits_NV.sort(dim=-1, descending=True)
            share = logits_NV.softmax(dim=-1)
            beyond = share.cumsum(dim=-1) - share >= self.top_p  # the likeliest token always stays
            logits_NV = logits_NV.masked_fill(beyond, float("-inf"))
        return logits_NV, ids


def uniform(shape: tuple[int, ...], generator: torch.Generator | None, device: torch.device) -> torch.Tensor:
    """Draws from U(0, 1) in fp32, made where the generator is and brought to a device."""
    source = device if generator is None else generator.device
    return torch.rand(shape, generator=generator, device=source, dtype=torch.float32).to(device)


@dataclass
class SlotSampler:
    """Ranks open slots, the highest being committed first; adaptive ones also say which slots are sure.

    Args:
        name: one of `SAMPLERS`.
        num_answers: of the whole batch: `"random"` draws for all of them, so that it does not matter who has left.
        threshold: probability, or margin between the two likeliest tokens, from which a slot is sure.
        entropy_bound: nats. Slots are sure, in order of entropy, while the entropies of those before add up to at most
            this, which bounds what their joint distribution loses by deciding them at once.
        generator: source of randomness of `"random"`.
    """

    name: str
    num_answers: int
    threshold: float = 0.9
    entropy_bound: float = 0.1
    generator: torch.Generator | None = None

    def __call__(self, certainty_AG: torch.Tensor, open_AG: torch.Tensor, answers: torch.Tensor | None = None):
        """Priorities (A, G), and for adaptive samplers the slots (A, G) to commit whatever the schedule says.

        Args:
            certainty_AG: of `TokenSampler`, for the open slots.
            open_AG: slots that may be decided now.
            answers: which answers (A,) of the batch these are, by default all.
        """
        if self.name == "random":
            draws = uniform((self.num_answers, certainty_AG.shape[1]), self.generator, certainty_AG.device)
            return (draws if answers is None else draws[answers]), None
        if self.name == "left_to_right":
            slots = torch.arange(certainty_AG.shape[1], device=certainty_AG.device, dtype=torch.float32)
            return -slots.expand_as(certainty_AG), None
        if self.name in ("threshold", "margin"):
            return certainty_AG, open_AG & (certainty_AG >= self.threshold)
        if self.name == "low_confidence":
            return certainty_AG, None
        ordered, index = (-certainty_AG).masked_fill(~open_AG, float("inf")).sort(dim=-1)
        before = ordered.cumsum(dim=-1) - ordered
        sure = torch.zeros_like(open_AG).scatter(-1, index, before <= self.entropy_bound)
        return certainty_AG, open_AG & sure


@dataclass
class Canvas:
    """The state of decoding.

    Args:
        ids: (A, G), the mask token where undecided.
        decided: (A, G) bool.
        filled: (A, G) bool, the decided slots that no pass decided but an early exit.
        confidence: (A, G) in [0, 1].
        mask_token_id: id of the mask token.
    """

    ids: torch.Tensor
    decided: torch.Tensor
    filled: torch.Tensor
    confidence: torch.Tensor
    mask_token_id: int

    @classmethod
    def blank(cls, num_answers: int, num_slots: int, mask_token_id: int, device: torch.device) -> "Canvas":
        """A canvas of mask tokens."""
        ids = torch.full((num_answers, num_slots), mask_token_id, device=device)
        nothing = torch.zeros_like(ids, dtype=torch.bool)
        return cls(ids, nothing, nothing.clone(), torch.zeros_like(ids, dtype=torch.float32), mask_token_id)

    def rows(self, index_A: torch.Tensor) -> "Canvas":
        """Some answers' part of the canvas, as a copy."""
        ids, decided, filled = self.ids[index_A], self.decided[index_A], self.filled[index_A]
        return Canvas(ids, decided, filled, self.confidence[index_A], self.mask_token_id)

    def put(self, index_A: torch.Tensor, part: "Canvas") -> None:
        """Write a part made by `rows` back."""
        for name in ("ids", "decided", "filled", "confidence"):
            getattr(self, name)[index_A] = getattr(part, name)

    def update(self, tokens, confidence, priority, sure, block: slice, group_A, target_A, remasking: bool) -> None:
        """Decide slots of a block so that every group of answers then has as many decided ones as its target says.

        Args:
            tokens, confidence, priority: (A, G) for this step; undecided slots of highest priority are decided first.
            sure: (A, G) slots to decide besides, or None.
            group_A: (A,) which answers share a target; answers of one group stand next to each other.
            target_A: (A,) decided slots of the block, in the whole group of an answer, after this step.
            remasking: whether decided slots compete too and, if they lose, are masked again.
        """
        decided = self.decided[:, block]
        ranked = priority[:, block]
        if not remasking:
            ranked = ranked.masked_fill(decided, float("inf"))
        chosen = (rank_in_group(ranked, group_A) < target_A[:, None]) | (decided & (not remasking))
        if sure is not None:
            chosen = chosen | sure[:, block]
        new = chosen & ~decided
        self.ids[:, block] = torch.where(new, tokens[:, block], self.ids[:, block])
        self.ids[:, block] = torch.where(chosen, self.ids[:, block], self.mask_token_id)
        self.confidence[:, block] = torch.where(new, confidence[:, block], self.confidence[:, block])
        self.decided[:, block] = chosen

    def close(self, end_ids: tuple[int, ...], fill_id: int, all_at_once: bool = False) -> None:
        """Fill what follows a decided end token with `fill_id`, once all slots before it are decided.

        Nothing can change such an answer's text any more, unless it depends on other answers: with `all_at_once`
        nothing is filled before every answer has come to its end.
        """
        ends = torch.zeros_like(self.decided)
        for end_id in end_ids:
            ends |= self.ids == end_id
        whole = self.decided.long().cumprod(dim=1).bool()  # slots with everything up to them decided
        first = (ends & whole).long()
        behind = first.cumsum(dim=1) - first > 0
        new = behind & ~self.decided
        if all_at_once:
            new &= (self.decided | behind).all()
        self.ids = self.ids.masked_fill(new, fill_id)
        self.confidence = self.confidence.masked_fill(new, 1.0)
        self.decided, self.filled = self.decided | new, self.filled | new


def rank_in_group(priority_AG: torch.Tensor, group_A: torch.Tensor) -> torch.Tensor:
    """Place of every entry among all entries of its group of rows, 0 for the highest; (A, G) int64."""
    groups = group_A[:, None].expand_as(priority_AG).flatten()
    order = priority_AG.flatten().argsort(descending=True, stable=True)
    order = order[groups[order].argsort(stable=True)]  # by group, and within it by priority
    starts = torch.searchsorted(groups[order], groups[order])
    ranks = torch.empty_like(order)
    ranks[order] = torch.arange(len(order), device=order.device) - starts
    return ranks.view_as(priority_AG)
