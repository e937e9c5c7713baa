"""Attention rules and positions against slow loops written from their definitions, on random prompts.

Tokens are written as the sequence reads: ("S",) shared, ("R", i) RoI of region i, ("N", i) the newline that ends its
span, ("C", i, b) caption block b, which describes region i, ("P",) padding.
"""

import random

import pytest
import torch

from perceptiondlm.attention_perceptiondlm import attention_mask
from perceptiondlm.configuration_perceptiondlm import LAYOUTS
from perceptiondlm.sequence_perceptiondlm import CAPTION, PAD, ROI, SEPARATOR, SHARED, TokenRoles, exclusive_cumsum


ROLES = {"S": SHARED, "R": ROI, "N": SEPARATOR, "C": CAPTION, "P": PAD}


def random_prompt(dice: random.Random, num_regions: int, layout: str) -> list[tuple]:
    """Shared tokens, one RoI span per region, shared tokens; outside `isolated` the last newline is shared."""
    span = dice.randint(1, 4)
    prompt = [("S",)] * dice.randint(1, 4)
    for region in range(num_regions):
        last = layout != "isolated" and region == num_regions - 1
        prompt += [("R", region)] * span + [("S",) if last else ("N", region)]
    return prompt + [("S",)] * dice.randint(1, 4)


def random_blocks(dice: random.Random, num_regions: int, copies: int, num_blocks: int, width: int) -> list[tuple]:
    """`num_blocks` blocks: the row's captions, then padding. Without regions an answer's marker is padding."""
    tokens = []
    for block in range(num_blocks):
        used = block < max(num_regions, 1) * copies
        tokens += [("C", block // copies, block)] * width if used else [("P",)] * width
        if not num_regions:
            tokens[-width] = ("P",)
    return tokens


def random_rows(seed: int, layout: str) -> tuple[list[list[tuple]], list[list[tuple]], int, int]:
    """Prompts (padded on the right) and answer blocks of four rows, with blocks per row and tokens per block."""
    dice = random.Random(f"{layout}/{seed}")
    counts = [0, 1, *(dice.randint(2, 4) for _ in range(2))]
    dice.shuffle(counts)
    copies, width = dice.randint(1, 3), dice.randint(2, 4)
    prompts = [random_prompt(dice, count, layout) for count in counts]
    length = max(len(prompt) for prompt in prompts) + dice.randint(0, 2)
    prompts = [prompt + [("P",)] * (length - len(prompt)) for prompt in prompts]
    num_blocks = max(counts) * copies
    return prompts, [random_blocks(dice, n, copies, num_blocks, width) for n in counts], num_blocks, width


def as_roles(rows: list[list[tuple]]) -> TokenRoles:
    """The tensors the attention rules take."""

    def tensor(read):
        return torch.tensor([[read(token) for token in row] for row in rows])

    return TokenRoles(
        tensor(lambda t: ROLES[t[0]]),
        tensor(lambda t: t[1] if len(t) > 1 else -1),
        tensor(lambda t: t[2] if len(t) > 2 else -1),
    )


def may_see_isolated(query: tuple, key: tuple) -> bool:
    """The table: S sees S; a region's span sees S and itself; a caption sees S, its region's span and its block."""
    if key[0] == "S":
        return True
    if query[0] == "S":
        return False
    if key[0] in "RN":
        return key[1] == query[1]
    return query[0] == key[0] == "C" and query[2] == key[2]


def may_see_released(query: tuple, key: tuple, key_index: int, roi_places: list[int], prompt_length: int) -> bool:
    """A caption sees what stands before the first and after the last RoI, its own RoIs and its block; others all."""
    if query[0] != "C":
        return True
    if key_index >= prompt_length:
        return key[2] == query[2]
    outside = not roi_places or key_index < roi_places[0] or key_index > roi_places[-1]
    return outside or (key[0] == "R" and key[1] == query[1])


def slow_attention(rows: list[list[tuple]], prompt_length: int, layout: str) -> torch.Tensor:
    """(B, X, X) bool, one decision at a time."""
    allowed = torch.zeros(len(rows), len(rows[0]), len(rows[0]), dtype=torch.bool)
    for b, row in enumerate(rows):
        roi_places = [index for index, token in enumerate(row) if token[0] == "R"]
        for q, query in enumerate(row):
            for k, key in enumerate(row):
                if key[0] == "P":
                    continue
                if query[0] == "P":
                    allowed[b, q, k] = key[0] == "S"
                elif layout == "isolated":
                    allowed[b, q, k] = may_see_isolated(query, key)
                elif layout == "released":
                    allowed[b, q, k] = may_see_released(query, key, k, roi_places, prompt_length)
                else:
                    allowed[b, q, k] = True
    return allowed


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("seed", range(4))
def test_attention_follows_the_table(layout, seed):
    prompts, blocks, *_ = random_rows(seed, layout)
    rows = [prompt + tail for prompt, tail in zip(prompts, blocks, strict=True)]
    roles = as_roles(rows)
    expected = slow_attention(rows, len(prompts[0]), layout)
    assert torch.equal(LAYOUTS[layout].allowed(roles, roles)[:, 0], expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_asks_the_same_as_the_whole_sequence(layout):
    """Prompt and answers as separate runs of queries see what they see when run together."""
    prompts, blocks, *_ = random_rows(7, layout)
    prompt, answers = as_roles(prompts), as_roles(blocks)
    whole = prompt.cat(answers)
    allowed = LAYOUTS[layout].allowed(whole, whole)
    length = len(prompts[0])
    assert torch.equal(LAYOUTS[layout].allowed(answers, whole), allowed[:, :, length:])
    assert torch.equal(LAYOUTS[layout].allowed(prompt, prompt), allowed[:, :, :length, :length])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_row_can_attend_to_something(layout):
    """A row without a single key would turn into nan, padding included."""
    prompts, blocks, *_ = random_rows(3, layout)
    roles = as_roles([prompt + tail for prompt, tail in zip(prompts, blocks, strict=True)])
    assert LAYOUTS[layout].allowed(roles, roles).any(dim=-1).all()


def test_nothing_static_sees_a_caption_only_in_the_isolated_layout():
    """What makes the prompt's keys and values exact in every step."""
    leaks = {}
    for layout in LAYOUTS:
        prompts, blocks, *_ = random_rows(5, layout)
        prompt, whole = as_roles(prompts), as_roles(prompts).cat(as_roles(blocks))
        leaks[layout] = bool(LAYOUTS[layout].allowed(prompt, whole)[..., len(prompts[0]) :].any())
    assert leaks == {"isolated": False, "released": True, "full": True}


@pytest.mark.parametrize("seed", range(4))
def test_isolated_positions_are_those_of_the_single_region_sequences(seed):
    prompts, blocks, num_blocks, _ = random_rows(seed, "isolated")
    found = all_positions(prompts, blocks, num_blocks, "isolated")
    compared = 0
    for row, (before, after) in enumerate(zip(prompts, blocks, strict=True)):
        tokens = before + after
        for block in {token[2] for token in tokens if token[0] == "C"}:
            region = next(token[1] for token in tokens if token[0] == "C" and token[2] == block)
            keep = {("S",), ("R", region), ("N", region), ("C", region, block)}
            alone = [index for index, token in enumerate(tokens) if token in keep]
            assert found[row, alone].tolist() == list(range(len(alone)))
            compared += len(alone)
    assert compared > 100


@pytest.mark.parametrize("layout", ["released", "full"])
@pytest.mark.parametrize("seed", range(2))
def test_other_layouts_count_tokens(layout, seed):
    """arange over prompt and answers, padding taking no position."""
    prompts, blocks, num_blocks, _ = random_rows(seed, layout)
    found = all_positions(prompts, blocks, num_blocks, layout)
    for row, (before, after) in enumerate(zip(prompts, blocks, strict=True)):
        tokens = torch.tensor([token[0] != "P" for token in before + after])
        assert found[row, tokens].tolist() == list(range(int(tokens.sum())))


def all_positions(prompts, blocks, num_blocks, layout):
    """Position ids of prompts and blocks."""
    prompt, answers = as_roles(prompts), as_roles(blocks)
    rules = LAYOUTS[layout]
    pair = (rules.prompt_positions(prompt), rules.answer_positions(prompt, answers, num_blocks))
    return torch.cat(pair, dim=1)


def test_exclusive_cumsum_counts_what_came_before():
    flags = torch.tensor([[True, False, True, True], [False, False, True, False]])
    assert exclusive_cumsum(flags).tolist() == [[0, 1, 1, 2], [0, 0, 0, 1]]


def test_mask_forbids_exactly_what_is_not_allowed():
    allowed, query = torch.tensor([[True, False], [True, True]]), torch.zeros(2, dtype=torch.float32)
    assert attention_mask(allowed, query, "sdpa") is allowed
    bias = attention_mask(allowed, query, "eager")
    assert bias.dtype == torch.float32
    assert bias.tolist() == [[0.0, torch.finfo(torch.float32).min], [0.0, 0.0]]
