"""Adaptive samplers, and answers that leave the batch when they are finished."""

import math

import pytest
import torch
from model_batches import LAYOUTS, SLOTS, generate, masks_of, region_batch
from model_passes import scores

from perceptiondlm.generation_config_perceptiondlm import (
    ADAPTIVE_SAMPLERS,
)
from perceptiondlm.sampling_perceptiondlm import Canvas


def slow_sure(name: str, bound: float, probabilities: torch.Tensor, free: list[int]) -> set[int]:
    """Slots of one answer that an adaptive sampler commits at once, by definition."""
    if name == "threshold":
        return {slot for slot in free if float(probabilities[slot].max()) >= bound}
    if name == "margin":
        ordered = {slot: sorted(probabilities[slot].tolist(), reverse=True) for slot in free}
        return {slot for slot in free if ordered[slot][0] - ordered[slot][1] >= bound}
    entropies = {slot: -sum(p * math.log(p) for p in probabilities[slot].tolist() if p > 0) for slot in free}
    chosen: set[int] = set()
    for slot in sorted(free, key=entropies.__getitem__):
        if sum(entropies[other] for other in chosen) <= bound:
            chosen.add(slot)
    return chosen


def slow_adaptive(model, batch, name: str, bound: float, length: int) -> tuple[torch.Tensor, int]:
    """One answer and one slot at a time; every step commits the best slot of each answer and all that are sure."""
    num_answers = int(batch["num_regions"].sum())
    ids = torch.full((num_answers, SLOTS), model.config.mask_token_id)
    passes = 0
    for start in range(0, SLOTS, length):
        free = [list(range(start, start + length)) for _ in range(num_answers)]
        while any(free):
            probabilities = scores(model, batch, ids).softmax(dim=-1)
            passes += 1
            for answer, slots in enumerate(free):
                rows = probabilities[answer]
                best = max(slots, key=lambda slot: slow_priority(name, rows[slot]), default=None)
                for slot in slow_sure(name, bound, rows, slots) | ({best} if slots else set()):
                    ids[answer, slot] = int(rows[slot].argmax())
                    slots.remove(slot)
    return ids, passes


def slow_priority(name: str, probabilities: torch.Tensor) -> float:
    """What an adaptive sampler ranks a slot by."""
    if name == "threshold":
        return float(probabilities.max())
    if name == "margin":
        best, second = probabilities.topk(2).values.tolist()
        return best - second
    return -float(torch.special.entr(probabilities).sum())


@pytest.mark.parametrize("length", [SLOTS, 3])
@pytest.mark.parametrize(("name", "bound"), [("threshold", 0.11), ("margin", 0.02), ("entropy_bound", 4.0)])
def test_adaptive_samplers_against_a_loop(replay, batch, name, bound, length):
    """The loop runs all answers to the end; here finished ones leave the batch. Tokens and passes are the same."""
    settings = {"sampler": name, "block_length": length, "early_exit": False}
    settings["entropy_bound" if name == "entropy_bound" else "threshold"] = bound
    ids, passes = slow_adaptive(replay, batch, name, bound, length)
    assert passes < SLOTS  # some step commits several slots
    for use_cache in (True, False):
        output = generate(replay, batch, use_cache=use_cache, **settings)
        assert torch.equal(output.sequences, ids)
        assert output.num_forward_passes <= passes


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ADAPTIVE_SAMPLERS)
def test_images_leave_the_batch_without_changing_the_others(tiny_model, tiny_processor, pictures, layout, name):
    """Images with different numbers of regions finish at different steps; each gets what it gets alone."""
    model = tiny_model(attention_layout=layout)
    processor, settings = tiny_processor(model), {"sampler": name, "threshold": 0.15, "entropy_bound": 8.0}
    batch = processor(images=[s.image for s in pictures], masks=[masks_of(s) for s in pictures])
    together = generate(model, batch, **settings)
    passes = []
    for index, picture in enumerate(pictures):
        alone = generate(model, region_batch(processor, picture), **settings)
        assert torch.equal(together.sequences[together.sample_ids == index], alone.sequences)
        passes.append(alone.num_forward_passes)
    assert together.num_forward_passes == max(passes)


@pytest.mark.parametrize("block_length", [None, 3])
@pytest.mark.parametrize("layout", ["isolated", "full"])
def test_early_exit_keeps_the_text(tiny_model, tiny_processor, scene, layout, block_length):
    """Everything up to the first end token is as without; what follows is filled, in fewer passes."""
    model = tiny_model(attention_layout=layout)
    batch = region_batch(tiny_processor(model), scene)
    settings = {"sampler": "left_to_right", "block_length": block_length}
    plain = generate(model, batch, early_exit=False, **settings).sequences
    end = model.config.end_of_turn_token_id = int(plain[1, 2])
    plain = generate(model, batch, early_exit=False, **settings)
    exited = generate(model, batch, **settings)
    cut = 0
    for one, other, confidence in zip(plain.sequences, exited.sequences, exited.confidences, strict=True):
        places = (one == end).nonzero()
        length = int(places[0]) + 1 if len(places) else SLOTS
        assert torch.equal(one[:length], other[:length])
        if layout == "isolated":
            assert (other[length:] == model.config.end_of_text_token_id).all()
            assert (confidence[length:] == 1).all()
        cut += SLOTS - length
    assert cut > 0
    assert exited.tokens_per_forward <= plain.tokens_per_forward * plain.num_forward_passes / exited.num_forward_passes


def test_passes_end_with_the_last_answer(tiny_model, tiny_processor, scene):
    """When every answer begins with an end token, one left-to-right step is enough."""
    model = tiny_model()
    batch = region_batch(tiny_processor(model), scene)
    first = generate(model, batch, sampler="left_to_right", early_exit=False).sequences[:, 0]
    mask = model.config.mask_token_id
    model.config.end_of_turn_token_id = int(first[0])
    others = sorted({*first.tolist(), mask} - {int(first[0])})
    output = generate(model, batch, sampler="left_to_right", suppress_tokens=others, steps=SLOTS)
    if (output.sequences[:, 0] == first[0]).all():
        assert output.num_forward_passes == 1
        assert output.tokens_per_forward == 3
    else:
        assert output.num_forward_passes > 1


def test_canvas_closes_behind_a_decided_prefix_only():
    mask, end, fill = 9, 7, 8
    ids = torch.tensor([[1, end, mask, 2], [mask, end, mask, mask], [1, 2, 3, 4], [end, mask, mask, mask]])
    canvas = Canvas(ids, ids != mask, torch.zeros(4, 4, dtype=torch.bool), torch.zeros(4, 4), mask)
    canvas.close((end, fill), fill)
    assert canvas.filled.sum(dim=1).tolist() == [1, 0, 0, 3]
    assert canvas.ids.tolist() == [[1, end, fill, 2], [mask, end, mask, mask], [1, 2, 3, 4], [end, fill, fill, fill]]
    assert canvas.decided.all(dim=1).tolist() == [True, False, True, True]
