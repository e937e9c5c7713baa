"""Training's two equations: the noise of equation 1 and the loss of equation 2.

Legend: see sequence_perceptiondlm.
"""

import torch
from torch.nn import functional as F

from .configuration_perceptiondlm import LOSS_WEIGHTINGS


def drawn_noise(
    labels_AG: torch.Tensor,
    mask_probability_A1: torch.Tensor | None,
    uniform_AG: torch.Tensor | None,
    chosen_AG: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The probabilities p (A, 1) in fp32 and which tokens (A, G) they mask, drawn as far as they are not given.

    Args:
        mask_probability_A1: p, or its bits as fp32 in int32.
        uniform_AG: draws from U(0, 1); chosen_AG: bool, what they decided.
    """
    if mask_probability_A1 is None:
        mask_probability_A1 = torch.rand(len(labels_AG), 1, device=labels_AG.device) * 0.999 + 1e-3
    elif mask_probability_A1.dtype == torch.int32:
        mask_probability_A1 = mask_probability_A1.view(torch.float32)
    if chosen_AG is None:
        if uniform_AG is None:
            uniform_AG = torch.rand(labels_AG.shape, device=labels_AG.device)
        chosen_AG = uniform_AG < mask_probability_A1
    return mask_probability_A1, chosen_AG


def noise_answers(
    labels_AG: torch.Tensor, mask_token_id: int, mask_probability_A1: torch.Tensor, uniform_AG: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Forward process of equation 1: every supervised token becomes the mask token with probability p.

    Args:
        labels_AG: clean ids, -100 where a slot is not supervised (it then stays masked from the model's view).
        mask_probability_A1: p in (0, 1]; uniform_AG: draws from U(0, 1).
    Returns:
        noised ids (A, G), and the bool mask (A, G) of supervised tokens that were replaced.
    """
    return mask_answers(labels_AG, mask_token_id, uniform_AG < mask_probability_A1)


def mask_answers(
    labels_AG: torch.Tensor, mask_token_id: int, chosen_AG: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`noise_answers` where it is decided which tokens are masked, (A, G) bool."""
    supervised = labels_AG != -100
    masked = supervised & chosen_AG
    return torch.where(masked | ~supervised, mask_token_id, labels_AG), masked


def token_losses(logits_NV: torch.Tensor, labels_AG: torch.Tensor, masked_AG: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of the clean token in every masked slot, (A, G) in fp32, 0 elsewhere.

    Args:
        logits_NV: scores of the masked slots, in their order.
    """
    nll = F.cross_entropy(logits_NV.float(), labels_AG[masked_AG].to(logits_NV.device), reduction="none")
    return torch.zeros(masked_AG.shape, device=nll.device).masked_scatter(masked_AG.to(nll.device), nll)


def masked_diffusion_loss(
    nll_AG, labels_AG, masked_AG, mask_probability_A1, weighting: str = "elbo", num_items: torch.Tensor | None = None
):
    """Equation 2 from the `token_losses` of the masked tokens.

    Args:
        weighting: of `LOSS_WEIGHTINGS`. `"elbo"` weighs a token by 1/p and divides by the number of supervised tokens;
            `"masked"` averages over the masked tokens, which bounds the weight (lower variance).
        num_items: what to divide by instead, for a batch that is spread over passes and processes.
    """
    if weighting not in LOSS_WEIGHTINGS:
        raise ValueError(f"unknown loss weighting {weighting!r}, known are {LOSS_WEIGHTINGS}")
    if weighting == "masked":
        total, items = nll_AG.sum(), masked_AG.sum()
    else:
        total, items = (nll_AG / mask_probability_A1).sum(), (labels_AG != -100).sum()
    return total / (items.clamp(min=1) if num_items is None else num_items)
