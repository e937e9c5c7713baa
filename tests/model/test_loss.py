"""Noise (equation 1) and loss (equation 2) against loops."""

import pytest
import torch

from perceptiondlm.loss_perceptiondlm import masked_diffusion_loss, noise_answers, token_losses
from perceptiondlm.training.data.noise import stratified_noise


MASK_ID = 50


def noise_case(seed: int = 0):
    """Labels (5, 7) over 20 tokens with some slots unsupervised, p, u and logits."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 20, (5, 7), generator=generator)
    labels[0, 3:], labels[2, 0] = -100, -100
    p, u = torch.rand(5, 1, generator=generator) * 0.9 + 0.1, torch.rand(5, 7, generator=generator)
    return labels, p, u, torch.randn(5, 7, 20, generator=generator)


def test_noise_masks_supervised_tokens_with_probability_p():
    labels, p, u, _ = noise_case()
    noised, masked = noise_answers(labels, MASK_ID, p, u)
    for a in range(5):
        for g in range(7):
            supervised = int(labels[a, g]) != -100
            replaced = supervised and bool(u[a, g] < p[a, 0])
            assert bool(masked[a, g]) == replaced
            assert int(noised[a, g]) == (MASK_ID if replaced or not supervised else int(labels[a, g]))
    assert 0 < masked.sum() < (labels != -100).sum()


def test_noise_at_its_extremes():
    labels, _, u, _ = noise_case()
    assert torch.equal(noise_answers(labels, MASK_ID, torch.ones(5, 1), u)[1], labels != -100)
    assert not noise_answers(labels, MASK_ID, torch.zeros(5, 1), u)[1].any()


@pytest.mark.parametrize("weighting", ["elbo", "masked"])
def test_loss_is_equation_2(weighting):
    labels, p, u, logits = noise_case()
    _, masked = noise_answers(labels, MASK_ID, p, u)
    total, supervised, count = 0.0, 0, 0
    for a in range(5):
        for g in range(7):
            if int(labels[a, g]) == -100:
                continue
            supervised += 1
            if u[a, g] < p[a, 0]:
                scores = logits[a, g].double()
                nll = float(scores.exp().sum().log() - scores[labels[a, g]])
                total += nll / float(p[a, 0]) if weighting == "elbo" else nll
                count += 1
    expected = total / (supervised if weighting == "elbo" else count)
    nll = token_losses(logits[masked], labels, masked)
    assert float(masked_diffusion_loss(nll, labels, masked, p, weighting)) == pytest.approx(expected, rel=1e-5)
    assert float(masked_diffusion_loss(nll, labels, masked, p, weighting, num_items=50)) == pytest.approx(
        expected * (supervised if weighting == "elbo" else count) / 50, rel=1e-5
    )


@pytest.mark.parametrize("weighting", ["elbo", "masked"])
def test_loss_without_a_masked_token_is_zero(weighting):
    labels, p, _, logits = noise_case()
    nothing = torch.zeros_like(labels, dtype=torch.bool)
    loss = masked_diffusion_loss(
        token_losses(logits.requires_grad_()[nothing], labels, nothing), labels, nothing, p, weighting
    )
    loss.backward()
    assert loss.item() == 0.0
    assert not logits.grad.any()


def test_unknown_weighting_is_refused():
    labels, p, _, logits = noise_case()
    with pytest.raises(ValueError, match=r"'mean'.*'elbo'.*'masked'"):
        masked_diffusion_loss(token_losses(logits[labels > 0], labels, labels > 0), labels, labels > 0, p, "mean")


@pytest.mark.parametrize("num_answers", [1, 3, 8])
def test_noise_is_stratified_and_complementary(num_answers):
    p, u = stratified_noise(num_answers, 50, copies=2, seed=f"s/{num_answers}")
    assert p.shape == (2 * num_answers, 1)
    assert u.shape == (2 * num_answers, 50)
    masked = (u < p).view(num_answers, 2, 50)
    assert (masked.sum(dim=1) == 1).all()  # of two copies exactly one masks a token
    for copy in (p[::2, 0], p[1::2, 0]):  # one probability in every n-th of [0, 1]
        assert sorted((copy * num_answers).int().tolist()) == list(range(num_answers))


def test_noise_depends_on_its_seed_alone():
    torch.manual_seed(1)
    first = stratified_noise(3, 8, copies=1, seed="0/1/2")
    torch.manual_seed(2)
    again, other = stratified_noise(3, 8, copies=1, seed="0/1/2"), stratified_noise(3, 8, copies=1, seed="1/1/2")
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[1], other[1])
    with pytest.raises(ValueError, match="3"):
        stratified_noise(3, 8, copies=3, seed="0")
