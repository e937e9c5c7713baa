"""Structured attention: who may attend to whom, and at which position every token stands.

A sequence holds tokens of five roles. A *region* is an index within its row; shared tokens belong to none.

    SHARED     system turn, image, question, assistant header
    ROI        the replayed features of one region
    SEPARATOR  the newline that ends a region's RoI span
    CAPTION    marker, slots (and terminator) of one caption block
    PAD        padding

`allowed_attention` is the table of each layout as one vectorised function of (role, region, block), used alike for
training, for the prefill and for the denoising steps; `prompt_positions` and `block_positions` give the position ids.

Legend: B rows of the batch, L prompt tokens, Q queries, K keys, M caption blocks per row, W tokens per block.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch


PAD, SHARED, ROI, SEPARATOR, CAPTION = -1, 0, 1, 2, 3


@dataclass
class TokenRoles:
    """What the attention rules need to know of a run of tokens; every tensor is (B, n) of dtype int64.

    Args:
        role: PAD, SHARED, ROI, SEPARATOR or CAPTION.
        region: index of the region the token belongs to within its row, -1 for padding. Of a shared token it is the
            turn of a conversation from which on it is seen, by tokens whose own is as large: -1 always.
        block: for CAPTION tokens, the caption block; equal to `region` unless several blocks describe one region (as
            the noised copies of a caption do in training). -1 otherwise.
    """

    role: torch.Tensor
    region: torch.Tensor
    block: torch.Tensor

    @classmethod
    def of_prompt(cls, role_BL: torch.Tensor, region_BL: torch.Tensor) -> "TokenRoles":
        """Roles of tokens that contain no caption."""
        return cls(role_BL, region_BL, torch.full_like(region_BL, -1))

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "TokenRoles":
        """The same function of all three tensors."""
        return TokenRoles(function(self.role), function(self.region), function(self.block))

    def cat(self, other: "TokenRoles") -> "TokenRoles":
        """This run followed by another."""
        pairs = zip(
            (self.role, self.region, self.block),
            (other.role, other.region, other.block),
            strict=True,
        )
        return TokenRoles(*(torch.cat(pair, dim=1) for pair in pairs))


def allowed_attention(queries: TokenRoles, keys: TokenRoles, layout: str) -> torch.Tensor:
    """Which key each query may attend to.

    isolated (DESIGN: a region sees the sequence it would see if it were the only region)::

        query \\ key   S     own R   own C   other R, C
        S             yes   -       -       -
        R (+ newline) yes   yes     -       -
        C             yes   yes     yes     -

    released (paper, section 3.2): C as above except that newlines between RoI spans are hidden from it (the last one is
    shared); every other row sees everything. full: everything sees everything.

    Where a row asks several turns, a shared token is seen by the shared tokens and answers of its turn and later ones.
    Padding is never attended to; a padding query sees the shared tokens, so that its row stays finite.

    Args:
        queries, keys: roles of Q and K tokens.
        layout: "isolated", "released" or "full".
    Returns:
        bool tensor of shape (B, 1, Q, K), True where attention is allowed.
    """
    q_role, k_role = queries.role[:, :, None], keys.role[:, None, :]
    same_region = queries.region[:, :, None] == keys.region[:, None, :]
    same_block = queries.block[:, :, None] == keys.block[:, None, :]
    shared_key = (k_role == SHARED) & (keys.region[:, None, :] <= queries.region[:, :, None])
    own_roi = same_region & (k_role == ROI)
    own_block = same_block & (k_role == CAPTION)
    if layout == "full":
        allowed = (k_role != PAD).expand(-1, queries.role.shape[1], -1)
    elif layout == "released":
        caption_sees = shared_key | own_roi | own_block
        allowed = torch.where(q_role == CAPTION, caption_sees, k_role != PAD)
    elif layout == "isolated":
        own_separator = same_region & (k_role == SEPARATOR)
        region_query = (q_role == ROI) | (q_role == SEPARATOR) | (q_role == CAPTION)
        allowed = shared_key | (region_query & (own_roi | own_separator)) | ((q_role == CAPTION) & own_block)
    else:
        raise ValueError(f"unknown attention layout {layout!r}, known are 'isolated', 'released', 'full'")
    return torch.where(q_role == PAD, k_role == SHARED, allowed).unsqueeze(1)


def prompt_positions(prompt: TokenRoles, layout: str) -> torch.Tensor:
    """Position ids of prompt tokens, (B, L) int64.

    `released` and `full` count tokens. `isolated` gives every token its position in the single-region sequence: all RoI
    spans start where the first one starts, and what follows them continues after one span.
    """
    if layout != "isolated":
        return (exclusive_cumsum(prompt.role != PAD)).clamp(min=0)
    in_region = (prompt.role == ROI) | (prompt.role == SEPARATOR)
    first_span = in_region & (prompt.region == 0)
    shared_before = exclusive_cumsum(prompt.role == SHARED)
    index = torch.arange(prompt.role.shape[1], device=prompt.role.device).expand_as(prompt.role)
    starts = torch.ones_like(prompt.region, dtype=torch.bool)
    starts[:, 1:] = prompt.region[:, 1:] != prompt.region[:, :-1]
    offset_in_span = index - torch.where(starts, index, 0).cummax(dim=1).values
    positions = shared_before + torch.where(in_region, offset_in_span, exclusive_cumsum(first_span))
    return positions.masked_fill(prompt.role == PAD, 0)


def block_positions(prompt: TokenRoles, blocks: TokenRoles, num_blocks: int, layout: str) -> torch.Tensor:
    """Position ids of caption blocks that follow the prompt, (B, M * W) int64; padding takes no position.

    Args:
        prompt, blocks: roles of the prompt (B, L) and of the blocks (B, M * W).
        num_blocks: M.
    """
    if layout == "isolated":
        in_region = (prompt.role == ROI) | (prompt.role == SEPARATOR)
        turn_BM = blocks.region.unflatten(1, (num_blocks, -1)).amax(dim=2)
        seen_BML = (prompt.role == SHARED)[:, None] & (prompt.region[:, None] <= turn_BM[:, :, None])
        start_BM = seen_BML.sum(dim=2) + (in_region & (prompt.region == 0)).sum(dim=1, keepdim=True)
    else:
        start_BM = (prompt.role != PAD).sum(dim=1, keepdim=True)
    within_BMW = exclusive_cumsum((blocks.role != PAD).unflatten(1, (start_BM.shape[1], -1)))
    return (start_BM[:, :, None] + within_BMW).flatten(1)


def exclusive_cumsum(flags: torch.Tensor) -> torch.Tensor:
    """Number of True entries before each entry along the last dimension."""
    counts = flags.to(torch.int64)
    return counts.cumsum(dim=-1) - counts


def attention_bias(allowed: torch.Tensor, dtype: torch.dtype, implementation: str) -> torch.Tensor | None:
    """The mask in the form an attention implementation expects.

    Returns:
        bool for sdpa, additive float for eager, None for flash attention, which knows no masks.
    Raises:
        ValueError: flash attention, and some token must not see another.
    """
    if "flash" in implementation:
        if allowed.all():
            return None
        raise ValueError(
            f"attn_implementation={implementation!r} takes no mask, but here some tokens are hidden from others. It "
            "captions regions in the isolated layout and answers questions, of images and questions of one length at a "
            "time; for other batches, compiled passes, the other layouts and training, use attn_implementation='sdpa' "
            "(the vision tower may keep it: {'vision_config': 'flash_attention_2', 'text_config': 'sdpa'})"
        )
    if implementation != "eager":
        return allowed
    return torch.zeros_like(allowed, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)
