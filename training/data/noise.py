"""The noise of equation 1: which tokens of an answer are masked, as a function of a sample's seed alone."""

import random

import torch


MIN_PROBABILITY = 1e-3  # the released code's epsilon: a weight of 1/p stays finite


def stratified_noise(
    num_answers: int, num_slots: int, copies: int, seed: str, level: str = "region"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mask probabilities p and uniform draws u for `copies` noised copies of each answer of a sample.

    Variance reduction, both unbiased in t: t is stratified over the answers of a sample, and of two copies the second
    is antithetic (p' = 1 - p, u' = 1 - u), so that together they mask every token exactly once.

    Args:
        seed: of the sample: (epoch, source, record), so that resuming or re-sharding a run changes nothing.
        level: `"region"`, or `"sample"` for one t that all answers share (as in the released code).

    Returns:
        p (num_answers * copies, 1) and u (num_answers * copies, num_slots), the copies of an answer adjacent.
    """
    generator = torch.Generator().manual_seed(random.Random(seed).getrandbits(62))
    strata = num_answers if level == "region" else 1
    index = torch.randperm(strata, generator=generator)[:, None]
    p = ((index + torch.rand(strata, 1, generator=generator)) / strata).expand(num_answers, 1)
    u = torch.rand(num_answers, num_slots, generator=generator)
    if copies == 2:
        p, u = torch.stack((p, 1 - p), dim=1), torch.stack((u, 1 - u), dim=1)
    elif copies != 1:
        raise ValueError(f"noise copies must be 1 or 2, got {copies}")
    return p.reshape(-1, 1).clamp(min=MIN_PROBABILITY), u.reshape(-1, num_slots)


def probability_bits(p: torch.Tensor) -> torch.Tensor:
    """Probabilities (A, 1) as the bits of fp32 in int32, which mixed precision does not cast as it does floats."""
    return p.float().view(torch.int32)


def probability(bits: torch.Tensor) -> torch.Tensor:
    """The fp32 probabilities (A, 1) of `probability_bits`."""
    return bits.view(torch.float32)
