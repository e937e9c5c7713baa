"""Which slots are decided first, and which tokens are drawn."""

import math

import pytest
import torch
from model_batches import drafts_of, generate

from perceptiondlm.generation_config_perceptiondlm import (
    FIXED_SAMPLERS,
)
from perceptiondlm.sampling_perceptiondlm import TokenSampler, rank_in_group


def test_ranks_within_groups_against_sorting():
    generator = torch.Generator().manual_seed(0)
    priority = torch.rand(6, 5, generator=generator).round(decimals=1)  # with ties: the first slot wins
    groups = torch.tensor([0, 0, 1, 2, 2, 2])
    ranks = rank_in_group(priority, groups)
    for group in range(3):
        places = [(row, slot) for row in range(6) for slot in range(5) if groups[row] == group]
        ordered = sorted(places, key=lambda place: -float(priority[place]))
        assert [int(ranks[place]) for place in ordered] == list(range(len(places)))


def test_samplers_commit_in_different_orders(replay, batch):
    """Ranking by confidence, by chance and by place decide different slots first; chance follows its seed."""
    firsts = {
        (sampler, seed): drafts_of(replay, batch, sampler=sampler, seed=seed)[0][2].tolist()
        for sampler in FIXED_SAMPLERS
        for seed in (0, 1)
    }
    assert firsts["low_confidence", 0] == firsts["low_confidence", 1] != firsts["left_to_right", 0]
    assert firsts["random", 0] != firsts["random", 1]
    assert firsts["random", 0] == drafts_of(replay, batch, sampler="random", seed=0)[0][2].tolist()


def test_greedy_decoding_is_deterministic_and_ignores_the_seed(replay, batch):
    outputs = [generate(replay, batch, seed=seed).sequences for seed in (None, None, 1, 2)]
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])


def test_sampling_follows_its_seed(replay, batch):
    first, again, other = (generate(replay, batch, temperature=1.0, seed=seed).sequences for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    generator = torch.Generator().manual_seed(1)
    assert torch.equal(generate(replay, batch, temperature=1.0, generator=generator).sequences, first)
    following = generate(replay, batch, temperature=1.0, generator=generator).sequences
    assert not torch.equal(following, first)  # the generator has moved on


def test_sampling_among_one_is_greedy(replay, batch):
    greedy = generate(replay, batch)
    for settings in ({"top_k": 1}, {"top_p": 1e-6}):
        output = generate(replay, batch, temperature=2.0, seed=0, **settings)
        assert torch.equal(output.sequences, greedy.sequences)
        torch.testing.assert_close(output.confidences, greedy.confidences)


def slow_restriction(logits: list[float], top_k: int | None, top_p: float | None) -> set[int]:
    """Tokens that may be sampled: the `top_k` likeliest; of those the fewest whose probability reaches `top_p`."""
    kept = sorted(range(len(logits)), key=lambda token: -logits[token])[: top_k or len(logits)]
    total = sum(math.exp(logits[token]) for token in kept)
    chosen, mass = set(), 0.0
    for token in kept:
        if top_p is not None and mass >= top_p:
            break
        chosen.add(token)
        mass += math.exp(logits[token]) / total
    return chosen


@pytest.mark.parametrize(
    ("top_k", "top_p"), [(None, 0.5), (None, 0.9), (None, 1.0), (3, None), (5, 0.7), (1, 0.1), (99, 0.6)]
)
def test_top_k_and_top_p_against_a_loop(top_k, top_p):
    logits = torch.randn(24, 12, generator=torch.Generator().manual_seed(0)) * 2
    restricted, ids = TokenSampler(temperature=1.0, top_k=top_k, top_p=top_p)._restrict(logits)
    ids = torch.arange(12).expand_as(logits) if ids is None else ids
    for slot in range(24):
        expected = slow_restriction(logits[slot].tolist(), top_k, top_p)
        kept = restricted[slot].isfinite()
        assert set(ids[slot, kept].tolist()) == expected
        assert torch.equal(restricted[slot, kept], logits[slot, ids[slot, kept]])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_in_proportion(temperature):
    """Frequencies over many slots follow softmax(logits / temperature); confidence stays the model's own."""
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5])
    sampler = TokenSampler(temperature, suppress_tokens=torch.tensor([4]), generator=torch.Generator().manual_seed(0))
    tokens, confidence, _ = sampler(logits.expand(20_000, 5).clone())
    frequency = torch.bincount(tokens.flatten(), minlength=5) / tokens.numel()
    expected = (logits[:4] / temperature).softmax(dim=0)
    torch.testing.assert_close(frequency[:4], expected, atol=0.015, rtol=0)
    assert frequency[4] == 0
    torch.testing.assert_close(confidence, logits[:4].softmax(dim=0)[tokens])


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.5, "seed": 0}])
def test_suppressed_tokens_never_appear(replay, batch, settings):
    chosen = set(generate(replay, batch, **settings).sequences.flatten().tolist())
    output = generate(replay, batch, suppress_tokens=sorted(chosen), **settings)
    assert not chosen & set(output.sequences.flatten().tolist())


def test_a_bias_changes_which_token_is_chosen_and_not_its_probability(replay, batch):
    plain = generate(replay, batch)
    word = int(plain.sequences.flatten().mode().values)
    rarer = generate(replay, batch, sequence_bias={(word,): -30.0})
    assert word not in rarer.sequences
    everywhere = generate(replay, batch, sequence_bias=[[[word], 1000.0]])
    assert (everywhere.sequences == word).all()
    logits = torch.tensor([[0.0, 1.0, 0.9]])
    tokens, confidence, _ = TokenSampler(bias=(torch.tensor([2]), torch.tensor([0.2])))(logits)
    assert tokens.tolist() == [2]
    torch.testing.assert_close(confidence, logits.softmax(dim=-1)[:, 2])
    bias = torch.tensor([0]), torch.tensor([2.0])
    sampler = TokenSampler(1.0, bias=bias, generator=torch.Generator().manual_seed(0))
    drawn = torch.bincount(sampler(logits.expand(20_000, 3))[0], minlength=3) / 20_000
    torch.testing.assert_close(drawn, (logits[0] + torch.tensor([2.0, 0, 0])).softmax(dim=0), atol=0.015, rtol=0)
