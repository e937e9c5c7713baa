"""The sequence as tensors: the prompt that answers are conditioned on, and where the answers' slots stand behind it.

Legend: B rows of the batch, L prompt tokens, D width, R regions (all rows), A answers (caption blocks, all rows), G
slots per answer, M answers per row (padded), W tokens per answer.
"""

import copy
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from .attention_perceptiondlm import CAPTION, PAD, SHARED, TokenRoles, block_positions
from .configuration_perceptiondlm import PerceptionDLMConfig


@dataclass
class Prompt:
    """What the answers are conditioned on.

    Args:
        ids, embeds: tokens (B, L) and their embeddings (B, L, D), with image and RoI features in place.
        roles, positions: roles and position ids (B, L).
        num_regions: regions per row (B,).
        markers: index of the marker that opens each region's caption (R,).
    """

    ids: torch.Tensor
    embeds: torch.Tensor
    roles: TokenRoles
    positions: torch.Tensor
    num_regions: torch.Tensor
    markers: torch.Tensor

    def rows(self, index_B: torch.Tensor) -> "Prompt":
        """The prompt of some rows of the batch."""
        chosen = [self.markers.split(self.num_regions.tolist())[row] for row in index_B.tolist()]
        tensors = (self.ids[index_B], self.embeds[index_B], self.roles.map(lambda x: x[index_B]))
        return Prompt(*tensors, self.positions[index_B], self.num_regions[index_B], torch.cat(chosen))

    def tokens(self, start: int, end: int | None = None) -> "Prompt":
        """A run of tokens of every row."""
        run = slice(start, end)
        tensors = (self.ids[:, run], self.embeds[:, run], self.roles.map(lambda x: x[:, run]))
        return Prompt(*tensors, self.positions[:, run], self.num_regions, self.markers)

    def gather(self, index_BN: torch.Tensor) -> "Prompt":
        """Chosen tokens of every row, (B, N) places."""
        embeds = self.embeds.gather(1, index_BN[..., None].expand(-1, -1, self.embeds.shape[2]))
        roles, positions = self.roles.map(lambda x: x.gather(1, index_BN)), self.positions.gather(1, index_BN)
        return Prompt(self.ids.gather(1, index_BN), embeds, roles, positions, self.num_regions, self.markers)

    def shared_first(self) -> tuple["Prompt", int]:
        """The same tokens with the shared ones in front, and their number, which is the same in every row."""
        shared = self.roles.role == SHARED
        counts = shared.sum(dim=1).tolist()
        if len(set(counts)) > 1:
            raise ValueError(
                "encoded images and flash attention need rows with one number of shared tokens (image and question), "
                f"got {sorted(set(counts))}"
            )
        return self.gather((~shared).long().argsort(dim=1, stable=True)), counts[0]

    def one_region_per_row(self, num_shared: int) -> tuple["Prompt", torch.Tensor]:
        """Every region in a row of its own, `[shared tokens, its RoI span]`, and the row it came from (R,).

        Args:
            num_shared: number of shared tokens, which come first in every row (see `shared_first`).
        Raises:
            ValueError: some rows have regions and others have none.
        """
        row_R = torch.arange(len(self.ids), device=self.ids.device).repeat_interleave(self.num_regions.clamp(min=1))
        if not self.num_regions.any():
            return self, row_R
        if not self.num_regions.all():
            raise ValueError("rows with and without regions cannot be unpacked together")
        first_B = self.num_regions.cumsum(0) - self.num_regions
        index_R = torch.arange(len(row_R), device=row_R.device) - first_B[row_R]
        span = int((self.roles.region[0] == 0).sum())
        own_RS = num_shared + index_R[:, None] * span + torch.arange(span, device=row_R.device)
        shared_RS = torch.arange(num_shared, device=row_R.device).expand(len(row_R), -1)
        whole = Prompt(
            self.ids[row_R], self.embeds[row_R], self.roles.map(lambda x: x[row_R]), self.positions[row_R],
            torch.ones_like(row_R), self.markers,
        )  # fmt: skip
        rows = whole.gather(torch.cat((shared_RS, own_RS), dim=1))
        rows.roles.region = rows.roles.region.clamp(max=0)  # the only region of its row
        return rows, row_R

    def pad_to(self, length: int, pad_id: int) -> "Prompt":
        """The prompt with padding behind it, (B, `length`)."""
        extra = length - self.ids.shape[1]
        roles = TokenRoles(
            F.pad(self.roles.role, (0, extra), value=PAD),
            F.pad(self.roles.region, (0, extra), value=-1),
            F.pad(self.roles.block, (0, extra), value=-1),
        )
        ids, embeds = F.pad(self.ids, (0, extra), value=pad_id), F.pad(self.embeds, (0, 0, 0, extra))
        return Prompt(ids, embeds, roles, F.pad(self.positions, (0, extra)), self.num_regions, self.markers)


class AnswerLayout:
    """Where the slots of A answers stand: one block of W tokens each, M blocks per row, rows padded with PAD blocks.

    A block is `[marker, slots]`, outside the isolated layout followed by a terminator. The answer of a row without
    regions is `[slots]` alone: its marker and terminator are padding, and left out of a `bare` layout.

    Args:
        prompt: the prompt, with the number of regions of every row.
        num_answers: A, a multiple of the number of targets (regions; turns of a conversation; one for other rows):
            several noised copies of one answer may stand next to each other.
        num_slots: G.
        config: the model's configuration.
        lengths_A: slots that exist in each answer, by default all G; the others are padding.
        bare: no answer has a marker; only for prompts without regions.
        round_blocks: make M a power of two, so that few shapes occur.
    """

    def __init__(
        self,
        prompt: Prompt,
        num_answers: int,
        num_slots: int,
        config: PerceptionDLMConfig,
        lengths_A: torch.Tensor | None = None,
        bare: bool = False,
        round_blocks: bool = False,
    ):
        self.config, self.device, self.round_blocks = config, prompt.embeds.device, round_blocks
        turns_B = prompt.roles.region.masked_fill(prompt.roles.role != SHARED, -1).amax(dim=1) + 1
        targets_B = torch.maximum(prompt.num_regions, turns_B).clamp(min=1)
        targets = int(targets_B.sum())
        if num_answers == 0 or num_answers % targets:
            raise ValueError(f"{num_answers} answers do not fit {targets} regions (or rows without regions)")
        copies = num_answers // targets
        self.first_slot = int(not bare)
        self.terminated = config.attention_layout != "isolated" and not bare
        self.num_slots, self.width = num_slots, self.first_slot + num_slots + self.terminated
        blocks_B = targets_B * copies
        self.row_A = torch.arange(len(blocks_B), device=self.device).repeat_interleave(blocks_B)
        index_A = torch.arange(num_answers, device=self.device) - (blocks_B.cumsum(0) - blocks_B)[self.row_A]
        self.region_A = index_A // copies
        self.last_A = index_A == blocks_B[self.row_A] - 1
        self.marked_A = (prompt.num_regions > 0)[self.row_A]
        self.marker_A = self._markers(prompt)
        self.lengths_A = lengths_A
        self._arrange(prompt)

    @property
    def slots(self) -> slice:
        """Where the slots are in a block."""
        return slice(self.first_slot, self.first_slot + self.num_slots)

    def _arrange(self, prompt: Prompt) -> None:
        """Place the answers' blocks side by side in their rows."""
        counts_B = torch.bincount(self.row_A, minlength=len(prompt.num_regions))
        self.num_blocks = int(counts_B.max())
        if self.round_blocks:
            self.num_blocks = 1 << (self.num_blocks - 1).bit_length()
        first_A = (counts_B.cumsum(0) - counts_B)[self.row_A]
        self.block_A = torch.arange(len(self.row_A), device=self.device) - first_A
        self.roles = self._roles(len(counts_B))
        self.positions = block_positions(prompt.roles, self.roles, self.num_blocks, self.config.attention_layout)

    def subset(self, index_A: torch.Tensor, rows_B: torch.Tensor, prompt: Prompt) -> "AnswerLayout":
        """The layout of some answers alone, behind a prompt that has the rows `rows_B` of this one's."""
        part = copy.copy(self)
        for name in ("region_A", "last_A", "marked_A", "marker_A"):
            setattr(part, name, getattr(self, name)[index_A])
        part.lengths_A = None if self.lengths_A is None else self.lengths_A[index_A]
        part.row_A = torch.searchsorted(rows_B, self.row_A[index_A])
        part._arrange(prompt)
        return part

    def _markers(self, prompt: Prompt) -> torch.Tensor:
        """Id of the token that opens each answer's block; where a row has no regions, it is padding."""
        markers_A = torch.full_like(self.region_A, self.config.end_of_text_token_id)
        index_R = prompt.markers if self.config.region_conditioning == "vision" else torch.zeros_like(prompt.markers)
        first_B = prompt.num_regions.cumsum(0) - prompt.num_regions
        regions = (first_B[self.row_A] + self.region_A)[self.marked_A]
        ids = torch.tensor(self.config.caption_token_ids, device=self.device, dtype=torch.int64)
        markers_A[self.marked_A] = ids[index_R[regions]]
        return markers_A

    def _roles(self, num_rows: int) -> TokenRoles:
        exists_AW = self.marked_A[:, None].repeat(1, self.width)
        exists_AW[:, self.slots] = True
        if self.lengths_A is not None:
            slots_G = torch.arange(self.num_slots, device=self.device)
            exists_AW[:, self.slots] = slots_G < self.lengths_A[:, None]
        shape = (num_rows, self.num_blocks, self.width)
        role = torch.full(shape, PAD, device=self.device)
        region, block = torch.full_like(role, -1), torch.full_like(role, -1)
        role[self.row_A, self.block_A] = torch.where(exists_AW, CAPTION, PAD)
        region[self.row_A, self.block_A] = self.region_A[:, None].expand(-1, self.width)
        block[self.row_A, self.block_A] = self.block_A[:, None].expand(-1, self.width)
        return TokenRoles(*(x.flatten(1) for x in (role, region, block)))

    def enclose(self, slots_AG: torch.Tensor) -> torch.Tensor:
        """Ids of whole blocks (A, W): the slots (A, G) between marker and terminator."""
        parts = [self.marker_A[:, None], slots_AG] if self.first_slot else [slots_AG]
        if self.terminated:
            ends = torch.where(self.last_A, self.config.end_of_turn_token_id, self.config.newline_token_id)
            parts.append(ends[:, None])
        return torch.cat(parts, dim=1)

    def enclose_labels(self, labels_AG: torch.Tensor) -> torch.Tensor:
        """Labels of whole blocks (A, W), -100 where a block has no token, and throughout a block without slots."""
        exists_AW = (self.pick(self.roles.role) != PAD) & (labels_AG != -100).any(dim=1, keepdim=True)
        return self.enclose(labels_AG).masked_fill(~exists_AW, -100)

    def token_ids(self, blocks_AW: torch.Tensor) -> torch.Tensor:
        """Lay whole blocks (A, W) out in their rows, (B, M * W)."""
        ids = torch.full_like(self.roles.role, self.config.end_of_text_token_id)
        ids.view(-1, self.num_blocks, self.width)[self.row_A, self.block_A] = blocks_AW
        return ids

    def pick(self, tokens_BX: torch.Tensor) -> torch.Tensor:
        """Whole blocks out of all block tokens: (B, M * W, ...) to (A, W, ...)."""
        return tokens_BX.unflatten(1, (self.num_blocks, self.width))[self.row_A, self.block_A]
