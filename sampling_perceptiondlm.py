"""What a denoising step decides: schedules (how many slots), samplers (which slots, which tokens), the canvas.

Legend: A answers, G slots per answer, V vocabulary.
"""

from dataclasses import dataclass

import torch


FIXED_SAMPLERS = ("low_confidence", "random", "left_to_right")
ADAPTIVE_SAMPLERS = ("threshold", "margin", "entropy_bound")
SAMPLERS = (*FIXED_SAMPLERS, *ADAPTIVE_SAMPLERS)


def linear_schedule(num_slots: int, steps: int) -> list[int]:
    """Slots decided after each step, all at the last; the first steps take the remainder (LLaDA)."""
    steps = min(steps, num_slots)
    share, remainder = divmod(num_slots, steps)
    return [share * step + min(step, remainder) for step in range(1, steps + 1)]


def released_schedule(num_slots: int, steps: int) -> list[int]:
    """Slots decided after each step of the released model: `int(n (S - 1 - s) / S)` of n are still masked after step s.

    Ends where none is masked any more, which is before the last step when there are more steps than slots.
    """
    decided = [num_slots - int(num_slots * (steps - 1 - step) / steps) for step in range(steps)]
    return decided[: decided.index(num_slots) + 1]


@dataclass
class TokenSampler:
    """Chooses a token for every slot; greedy at temperature 0, otherwise sampled after top-k and top-p."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    suppress_tokens: torch.Tensor | None = None
    generator: torch.Generator | None = None

    def __call__(self, logits_AGV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Token ids (A, G), their probability (A, G), and the model's own distribution (A, G, V), in fp32."""
        logits = logits_AGV.float()
        if self.suppress_tokens is not None:
            logits = logits.index_fill(-1, self.suppress_tokens, float("-inf"))
        probabilities = logits.softmax(dim=-1)
        if self.temperature == 0:
            confidence, tokens = probabilities.max(dim=-1)
            return tokens, confidence, probabilities
        choices = self._restrict(logits / self.temperature).softmax(dim=-1)
        tokens = torch.multinomial(choices.flatten(0, 1), 1, generator=self.generator).view(logits.shape[:2])
        return tokens, probabilities.gather(-1, tokens[..., None])[..., 0], probabilities

    def _restrict(self, logits: torch.Tensor) -> torch.Tensor:
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            kth = logits.topk(self.top_k, dim=-1).values[..., -1:]
            logits = logits.masked_fill(logits < kth, float("-inf"))
        if self.top_p is not None and self.top_p < 1:
            ordered, index = logits.softmax(dim=-1).sort(dim=-1, descending=True)
            beyond = ordered.cumsum(dim=-1) - ordered >= self.top_p  # the likeliest token always stays
            logits = logits.masked_fill(torch.zeros_like(beyond).scatter(-1, index, beyond), float("-inf"))
        return logits


@dataclass
class SlotSampler:
    """Ranks undecided slots, the highest being committed first; adaptive ones also say which slots are sure.

    Args:
        name: one of `SAMPLERS`.
        threshold: probability, or margin between the two likeliest tokens, from which a slot is sure.
        entropy_bound: nats. Slots are sure, in order of entropy, while the entropies of those before add up to at most
            this, which bounds what their joint distribution loses by deciding them at once.
        generator: source of randomness of `"random"`.
    """

    name: str
    threshold: float = 0.9
    entropy_bound: float = 0.1
    generator: torch.Generator | None = None

    def __call__(self, confidence_AG, probabilities_AGV, open_AG) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Priorities (A, G), and for adaptive samplers the slots (A, G) to commit whatever the schedule says.

        Args:
            confidence_AG, probabilities_AGV: of `TokenSampler`.
            open_AG: slots that may be decided now.
        """
        if self.name == "low_confidence":
            return confidence_AG, None
        if self.name == "random":
            return self._noise(confidence_AG), None
        if self.name == "left_to_right":
            slots = torch.arange(confidence_AG.shape[1], device=confidence_AG.device, dtype=torch.float32)
            return -slots.expand_as(confidence_AG), None
        if self.name == "threshold":
            return confidence_AG, open_AG & (confidence_AG >= self.threshold)
        if self.name == "margin":
            likeliest = probabilities_AGV.topk(2, dim=-1).values
            margin = likeliest[..., 0] - likeliest[..., 1]
            return margin, open_AG & (margin >= self.threshold)
        entropy = torch.special.entr(probabilities_AGV).sum(dim=-1)
        ordered, index = entropy.masked_fill(~open_AG, float("inf")).sort(dim=-1)
        before = ordered.cumsum(dim=-1) - ordered
        sure = torch.zeros_like(open_AG).scatter(-1, index, before <= self.entropy_bound)
        return -entropy, open_AG & sure

    def _noise(self, like_AG: torch.Tensor) -> torch.Tensor:
        device = like_AG.device if self.generator is None else self.generator.device
        noise = torch.rand(like_AG.shape, generator=self.generator, device=device, dtype=torch.float32)
        return noise.to(like_AG.device)


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
        shape = (num_answers, num_slots)
        return cls(
            torch.full(shape, mask_token_id, device=device),
            torch.zeros(shape, dtype=torch.bool, device=device),
            torch.zeros(shape, dtype=torch.bool, device=device),
            torch.zeros(shape, dtype=torch.float32, device=device),
            mask_token_id,
        )

    def rows(self, index_A: torch.Tensor) -> "Canvas":
        """Some answers' part of the canvas, as a copy."""
        ids, decided, filled = self.ids[index_A], self.decided[index_A], self.filled[index_A]
        return Canvas(ids, decided, filled, self.confidence[index_A], self.mask_token_id)

    def put(self, index_A: torch.Tensor, part: "Canvas") -> None:
        """Write a part made by `rows` back."""
        for name in ("ids", "decided", "filled", "confidence"):
            getattr(self, name)[index_A] = getattr(part, name)

    def undecided(self, block: slice) -> torch.Tensor:
        """Indices (A',) of the answers with undecided slots in a block. Their number is asked of the device."""
        return (~self.decided[:, block]).any(dim=1).nonzero()[:, 0]

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
        ranked = priority[:, block].double()
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
