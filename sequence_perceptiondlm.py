"""The sequence as tensors: tokens and their roles, who may attend to whom, at which position every token stands.

A row holds the prompt (text, image tokens, one RoI span per region) and behind it the spans of its answers::

    [shared tokens ... image ...] [RoI span 0] [RoI span 1] ... [shared tokens] | [answer span 0] [answer span 1] ...

An attention layout is one object that answers every question about the order of things: who may see whom, which
position a token has, which marker opens an answer, and whether the prompt is static, that is, looks at no answer.

Legend of tensor names, for all files of the model: B rows of the batch, L prompt tokens of a row, S shared tokens of a
row, R regions (all rows), U tokens of a RoI span (features and separator), A answers (all rows), G slots of an answer,
Z tokens of an answer span, M answers of a row (padded), X tokens of a pass, N open slots, V vocabulary, D width of the
language model; T tiles (all images), n image tokens per tile side, P patches per tile side, C vision width, K region
prompts; h attention heads, d their width.
"""

from dataclasses import dataclass
from typing import Any

import torch


PAD, SHARED, ROI, SEPARATOR, CAPTION = -1, 0, 1, 2, 3


@dataclass
class TokenRoles:
    """What the layouts need to know of a run of tokens; every tensor is (B, n) of dtype int64.

    Args:
        role: SHARED (system turn, image, question, assistant header), ROI (replayed features of one region), SEPARATOR
            (the newline that ends a RoI span), CAPTION (marker, slots, terminator of one answer) or PAD.
        region: index of the region a token belongs to within its row, -1 for padding. Of a shared token it is the turn
            of a conversation from which on it is seen, by tokens whose own is as large: -1 always.
        answer: for CAPTION tokens, the index of the answer within its row; equal to `region` unless several answers
            describe one region (as the noised copies of a caption do in training). -1 otherwise.
    """

    role: torch.Tensor
    region: torch.Tensor
    answer: torch.Tensor

    @classmethod
    def of_prompt(cls, role_BL: torch.Tensor, region_BL: torch.Tensor) -> "TokenRoles":
        """Roles of tokens among which there is no answer."""
        return cls(role_BL, region_BL, torch.full_like(region_BL, -1))

    def tokens(self, start: int, end: int | None = None) -> "TokenRoles":
        """A run of tokens of every row."""
        return TokenRoles(*(x[:, start:end] for x in (self.role, self.region, self.answer)))

    def cat(self, other: "TokenRoles") -> "TokenRoles":
        """This run followed by another."""
        pairs = ((self.role, other.role), (self.region, other.region), (self.answer, other.answer))
        return TokenRoles(*(torch.cat(pair, dim=1) for pair in pairs))


@dataclass
class Relations:
    """What a layout decides by; bool tensors that broadcast to (B, queries, keys)."""

    real_key: torch.Tensor
    shared_key: torch.Tensor
    own_roi: torch.Tensor
    own_separator: torch.Tensor
    own_answer: torch.Tensor
    region_query: torch.Tensor
    caption_query: torch.Tensor


class FullLayout:
    """No structure: every token sees every other one, and positions count tokens (the paper's ablation)."""

    name = "full"
    static_prompt = False  # whether no token of the prompt sees an answer
    terminated = True  # whether an answer ends with a newline, the last one with the end of the turn
    last_separator_shared = True  # whether the newline behind the last RoI span belongs to all
    numbered_by_place = False  # whether markers and RoI placeholders follow a region's place instead of its prompt id

    def allowed(self, queries: TokenRoles, keys: TokenRoles) -> torch.Tensor:
        """Which key each query may attend to: bool (B, 1, queries, keys).

        Where a row asks several turns, a shared token is seen by the shared tokens and answers of its turn and later
        ones. Padding is never attended to; a padding query sees the shared tokens, so that its row stays finite.
        """
        q_role, k_role = queries.role[:, :, None], keys.role[:, None, :]
        same_region = queries.region[:, :, None] == keys.region[:, None, :]
        same_answer = queries.answer[:, :, None] == keys.answer[:, None, :]
        relations = Relations(
            real_key=k_role != PAD,
            shared_key=(k_role == SHARED) & (keys.region[:, None, :] <= queries.region[:, :, None]),
            own_roi=same_region & (k_role == ROI),
            own_separator=same_region & (k_role == SEPARATOR),
            own_answer=same_answer & (k_role == CAPTION),
            region_query=(q_role == ROI) | (q_role == SEPARATOR) | (q_role == CAPTION),
            caption_query=q_role == CAPTION,
        )
        return torch.where(q_role == PAD, k_role == SHARED, self._sees(relations)).unsqueeze(1)

    def _sees(self, relations: Relations) -> torch.Tensor:
        return relations.real_key

    def prompt_positions(self, prompt: TokenRoles) -> torch.Tensor:
        """Position ids of prompt tokens, (B, L) int64."""
        return exclusive_cumsum(prompt.role != PAD)

    def answer_positions(self, prompt: TokenRoles, answers: TokenRoles, _answers_per_row: int) -> torch.Tensor:
        """Position ids of the answers' tokens, (B, M * Z) int64; padding takes no position."""
        return (prompt.role != PAD).sum(dim=1)[:, None] + exclusive_cumsum(answers.role != PAD)

    def marker_index(self, place_R: torch.Tensor, _prompt_ids_R: torch.Tensor | None) -> torch.Tensor:
        """Which marker opens a region's answer (R,), given its place in the row and its prompt id."""
        return place_R if _prompt_ids_R is None or self.numbered_by_place else _prompt_ids_R


class IsolatedLayout(FullLayout):
    """A region sees the sequence it would see if it were the only one, at the positions it would have there::

    query \\ key            S     own R   own C   other R, C
    S shared              yes   -       -       -
    R RoI span            yes   yes     -       -
    C answer              yes   yes     yes     -
    """

    name = "isolated"
    static_prompt = True
    terminated = False
    last_separator_shared = False

    def _sees(self, relations: Relations) -> torch.Tensor:
        own_span = relations.own_roi | relations.own_separator
        own_answer = relations.caption_query & relations.own_answer
        return relations.shared_key | (relations.region_query & own_span) | own_answer

    def prompt_positions(self, prompt: TokenRoles) -> torch.Tensor:
        """Position ids (B, L): all RoI spans start where the first does, what follows continues after one span."""
        in_span = (prompt.role == ROI) | (prompt.role == SEPARATOR)
        first_span = in_span & (prompt.region == 0)
        shared_before = exclusive_cumsum(prompt.role == SHARED)
        index = torch.arange(prompt.role.shape[1], device=prompt.role.device).expand_as(prompt.role)
        starts = torch.ones_like(prompt.region, dtype=torch.bool)
        starts[:, 1:] = prompt.region[:, 1:] != prompt.region[:, :-1]
        offset_in_span = index - torch.where(starts, index, 0).cummax(dim=1).values
        positions = shared_before + torch.where(in_span, offset_in_span, exclusive_cumsum(first_span))
        return positions.masked_fill(prompt.role == PAD, 0)

    def answer_positions(self, prompt: TokenRoles, answers: TokenRoles, answers_per_row: int) -> torch.Tensor:
        """Position ids (B, M * Z): every answer starts behind the prompt of its region, or turn, alone."""
        in_span = (prompt.role == ROI) | (prompt.role == SEPARATOR)
        first_span_B1 = (in_span & (prompt.region == 0)).sum(dim=1, keepdim=True)
        turn_BM = answers.region.unflatten(1, (answers_per_row, -1)).amax(dim=2)
        seen_BML = (prompt.role == SHARED)[:, None] & (prompt.region[:, None] <= turn_BM[:, :, None])
        within_BMZ = exclusive_cumsum((answers.role != PAD).unflatten(1, (answers_per_row, -1)))
        return ((seen_BML.sum(dim=2) + first_span_B1)[:, :, None] + within_BMZ).flatten(1)


def exclusive_cumsum(flags: torch.Tensor) -> torch.Tensor:
    """Number of True entries before each entry along the last dimension."""
    counts = flags.to(torch.int64)
    return counts.cumsum(dim=-1) - counts


@dataclass(frozen=True)
class Names:
    """What regions are called, by a namer.

    Args:
        ids: (R,) token of each region's word.
        chances: (R,) fp32, that the word is true of the region, in [0, 1].
    """

    ids: torch.Tensor
    chances: torch.Tensor


@dataclass
class Prompt:
    """What the answers are conditioned on.

    Args:
        ids, embeds: tokens (B, L) and their embeddings (B, L, D), with image and RoI features in place.
        roles, positions: roles and position ids (B, L).
        num_regions: regions per row (B,).
        markers: index of the marker that opens each region's answer (R,).
        names: what the regions are called, where the model has a namer.
    """

    ids: torch.Tensor
    embeds: torch.Tensor
    roles: TokenRoles
    positions: torch.Tensor
    num_regions: torch.Tensor
    markers: torch.Tensor
    names: Names | None = None

    def tokens(self, start: int) -> "Prompt":
        """The tokens of every row from a place on."""
        tensors = (self.ids[:, start:], self.embeds[:, start:], self.roles.tokens(start), self.positions[:, start:])
        return Prompt(*tensors, self.num_regions, self.markers, self.names)

    def shared(self, row: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Ids (S,), embeddings (1, S, D) and positions (1, S) of the shared tokens of a row."""
        places = (self.roles.role[row] == SHARED).nonzero()[:, 0]
        return self.ids[row, places], self.embeds[row, places][None], self.positions[row, places][None]

    def spans(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings (R, U, D) and positions (R, U) of all RoI spans, U = 0 where regions are not replayed.

        Raises:
            ValueError: the spans are not of one length.
        """
        places = ((self.roles.role == ROI) | (self.roles.role == SEPARATOR)).nonzero(as_tuple=True)
        regions = int(self.num_regions.sum())
        if len(places[0]) % max(regions, 1):
            raise ValueError(f"{len(places[0])} RoI tokens do not make {regions} spans of one length")
        shape = (regions, len(places[0]) // max(regions, 1))
        return self.embeds[places].unflatten(0, shape), self.positions[places].unflatten(0, shape)


class AnswerSpans:
    """Where the slots of A answers stand: a span of Z tokens each, M spans per row, rows padded with PAD spans.

    A span is `[marker, slots]`, in layouts with terminators followed by one. The answer of a row without regions is
    `[slots]` alone: its marker and terminator are padding, and left out of `bare` spans.

    Args:
        prompt: the prompt, with the number of regions of every row.
        num_answers: A, a multiple of the number of targets (regions; turns of a conversation; one for other rows):
            several noised copies of one answer may stand next to each other.
        num_slots: G.
        config: the model's configuration.
        lengths_A: slots that exist in each answer, by default all G; the others are padding.
        bare: no answer has a marker; only for prompts without regions.
    """

    def __init__(
        self,
        prompt: Prompt,
        num_answers: int,
        num_slots: int,
        config: Any,
        lengths_A: torch.Tensor | None = None,
        bare: bool = False,
    ):
        self.config, self.device = config, prompt.embeds.device
        turns_B = prompt.roles.region.masked_fill(prompt.roles.role != SHARED, -1).amax(dim=1) + 1
        targets_B = torch.maximum(prompt.num_regions, turns_B).clamp(min=1)
        targets = int(targets_B.sum())
        if num_answers == 0 or num_answers % targets:
            raise ValueError(f"{num_answers} answers do not fit {targets} regions (or rows without regions)")
        copies = num_answers // targets
        self.first_slot = int(not bare)
        self.terminated = config.layout.terminated and not bare
        self.num_slots, self.width = num_slots, self.first_slot + num_slots + self.terminated
        counts_B = targets_B * copies
        first_B = counts_B.cumsum(0) - counts_B
        self.row_A = torch.arange(len(counts_B), device=self.device).repeat_interleave(counts_B)
        self.index_A = torch.arange(num_answers, device=self.device) - first_B[self.row_A]
        self.last_A = self.index_A == counts_B[self.row_A] - 1
        self.marked_A = (prompt.num_regions > 0)[self.row_A]
        self.marker_A = self._marker_ids(prompt, self.index_A // copies)
        self.answers_per_row = int(counts_B.max())
        self.roles = self._roles(len(counts_B), self.index_A // copies, lengths_A)
        self.positions = config.layout.answer_positions(prompt.roles, self.roles, self.answers_per_row)

    @property
    def slots(self) -> slice:
        """Where the slots are in a span."""
        return slice(self.first_slot, self.first_slot + self.num_slots)

    def _marker_ids(self, prompt: Prompt, region_A: torch.Tensor) -> torch.Tensor:
        """Id of the token that opens each answer's span; where a row has no regions, it is padding."""
        markers_A = torch.full_like(region_A, self.config.end_of_text_token_id)
        index_R = prompt.markers if self.config.region_conditioning == "vision" else torch.zeros_like(prompt.markers)
        first_B = prompt.num_regions.cumsum(0) - prompt.num_regions
        regions = (first_B[self.row_A] + region_A)[self.marked_A]
        ids = torch.tensor(self.config.caption_token_ids, device=self.device, dtype=torch.int64)
        markers_A[self.marked_A] = ids[index_R[regions]]
        return markers_A

    def _roles(self, num_rows: int, region_A: torch.Tensor, lengths_A: torch.Tensor | None) -> TokenRoles:
        exists_AZ = self.marked_A[:, None].repeat(1, self.width)
        exists_AZ[:, self.slots] = True
        if lengths_A is not None:
            exists_AZ[:, self.slots] = torch.arange(self.num_slots, device=self.device) < lengths_A[:, None]
        shape = (num_rows, self.answers_per_row, self.width)
        role = torch.full(shape, PAD, device=self.device)
        region, answer = torch.full_like(role, -1), torch.full_like(role, -1)
        role[self.row_A, self.index_A] = torch.where(exists_AZ, CAPTION, PAD)
        region[self.row_A, self.index_A] = region_A[:, None].expand(-1, self.width)
        answer[self.row_A, self.index_A] = self.index_A[:, None].expand(-1, self.width)
        return TokenRoles(*(x.flatten(1) for x in (role, region, answer)))

    def enclose(self, slots_AG: torch.Tensor, answers: torch.Tensor | None = None) -> torch.Tensor:
        """Ids of whole spans (A, Z): the slots (A, G) of all answers, or of these, between marker and terminator."""
        chosen = slice(None) if answers is None else answers
        parts = [self.marker_A[chosen, None], slots_AG] if self.first_slot else [slots_AG]
        if self.terminated:
            ends = torch.where(self.last_A[chosen], self.config.end_of_turn_token_id, self.config.newline_token_id)
            parts.append(ends[:, None])
        return torch.cat(parts, dim=1)

    def enclose_labels(self, labels_AG: torch.Tensor) -> torch.Tensor:
        """Labels of whole spans (A, Z), -100 where a span has no token, and throughout a span without slots."""
        exists_AZ = (self.pick(self.roles.role) != PAD) & (labels_AG != -100).any(dim=1, keepdim=True)
        return self.enclose(labels_AG).masked_fill(~exists_AZ, -100)

    def lay_out(self, spans_AZ: torch.Tensor) -> torch.Tensor:
        """Ids of whole spans (A, Z) in their rows, (B, M * Z)."""
        ids = torch.full_like(self.roles.role, self.config.end_of_text_token_id)
        ids.view(-1, self.answers_per_row, self.width)[self.row_A, self.index_A] = spans_AZ
        return ids

    def pick(self, tokens_BX: torch.Tensor) -> torch.Tensor:
        """Whole spans out of all answer tokens: (B, M * Z, ...) to (A, Z, ...)."""
        return tokens_BX.unflatten(1, (self.answers_per_row, self.width))[self.row_A, self.index_A]
