"""How many slots a step decides: of one answer, of all together, and with remasking."""

import itertools

import pytest
import torch
from model_batches import (
    SLOTS,
    drafts_of,
    generate,
    masks_of,
    region_batch,
)
from model_passes import scores

from perceptiondlm.generation_config_perceptiondlm import (
    FIXED_SAMPLERS,
    PerceptionDLMGenerationConfig,
)
from perceptiondlm.released_perceptiondlm import released_schedule
from perceptiondlm.sampling_perceptiondlm import linear_schedule


@pytest.mark.parametrize(("slots", "steps"), [(8, 8), (8, 3), (7, 4), (5, 1), (4, 9), (32, 20)])
def test_schedule_is_llada_s(slots, steps):
    """An equal share per step, and one more in each of the first steps until the remainder is used up."""
    decided = linear_schedule(slots, steps)
    schedule = [after - before for before, after in itertools.pairwise([0, *decided])]
    run = min(steps, slots)
    assert schedule == [slots // run + (1 if step < slots % run else 0) for step in range(run)]
    assert sum(schedule) == slots
    assert min(schedule) >= 1


def slow_decode(model, batch, settings: PerceptionDLMGenerationConfig):
    """Greedy low-confidence decoding, one answer and one slot at a time."""
    num_answers, slots = int(batch["num_regions"].sum()), settings.max_new_tokens
    ids = torch.full((num_answers, slots), model.config.mask_token_id)
    confidences = torch.zeros(num_answers, slots)
    undecided = [set(range(slots)) for _ in range(num_answers)]
    length = settings.block_length or slots
    for start in range(0, slots, length):
        steps = min(settings.steps * length // slots, length)
        for step in range(steps):
            probabilities = scores(model, batch, ids).softmax(dim=-1)
            for answer in range(num_answers):
                ranked = sorted(
                    (slot for slot in undecided[answer] if start <= slot < start + length),
                    key=lambda slot: -float(probabilities[answer, slot].max()),
                )
                for slot in ranked[: length // steps + (step < length % steps)]:
                    ids[answer, slot] = int(probabilities[answer, slot].argmax())
                    confidences[answer, slot] = probabilities[answer, slot].max()
                    undecided[answer].remove(slot)
    assert not any(undecided)
    return ids, confidences


@pytest.mark.parametrize(("steps", "block_length"), [(6, None), (4, None), (1, None), (6, 3), (4, 3), (3, 2)])
def test_decoding_against_a_loop(replay, batch, steps, block_length):
    settings = PerceptionDLMGenerationConfig(max_new_tokens=SLOTS, steps=steps, block_length=block_length)
    ids, confidences = slow_decode(replay, batch, settings)
    output = replay.generate(**batch, generation_config=settings)
    assert torch.equal(output.sequences, ids)
    torch.testing.assert_close(output.confidences, confidences, atol=1e-4, rtol=0)


def slow_remasking(model, batch, slots: int, steps: int) -> tuple[torch.Tensor, int]:
    """The released rule for one image: after step s, the int(n (S - 1 - s) / S) slots whose new most probable token is
    least confident are masked, decided or not; decided ones that stay keep their token."""
    num_answers = int(batch["num_regions"].sum())
    total = num_answers * slots
    ids = torch.full((num_answers, slots), model.config.mask_token_id)
    for step in range(steps):
        probabilities = scores(model, batch, ids).double().softmax(dim=-1)
        masked = ids == model.config.mask_token_id
        ids = torch.where(masked, probabilities.argmax(dim=-1), ids)
        confidence = {divmod(i, slots): float(probabilities[divmod(i, slots)].max()) for i in range(total)}
        remaining = int(total * (steps - 1 - step) / steps)
        for place in sorted(confidence, key=confidence.__getitem__)[:remaining]:
            ids[place] = model.config.mask_token_id
        if remaining == 0:
            return ids, step + 1
    raise AssertionError("some slots were never decided")


@pytest.mark.parametrize("layout", ["released", "isolated"])
@pytest.mark.parametrize("steps", [3, 6, 20, 40])
def test_shared_schedule_with_remasking_against_a_loop(tiny_model, tiny_processor, scene, layout, steps):
    model = tiny_model(region_conditioning="vision", attention_layout=layout)
    batch = region_batch(tiny_processor(model), scene)
    ids, passes = slow_remasking(model, batch, SLOTS, steps)
    output = generate(model, batch, steps=steps, shared_schedule=True, remasking=True)
    assert torch.equal(output.sequences, ids)
    assert output.num_forward_passes == passes


def test_images_of_a_batch_keep_their_own_shared_schedule(replay, tiny_processor, pictures):
    """Images with different numbers of regions finish at different steps, and together as alone."""
    processor, settings = tiny_processor(replay), {"steps": 11, "shared_schedule": True, "remasking": True}
    batch = processor(images=[s.image for s in pictures], masks=[masks_of(s) for s in pictures])
    together = generate(replay, batch, **settings)
    for index, picture in enumerate(pictures):
        alone = generate(replay, region_batch(processor, picture), **settings)
        assert torch.equal(together.sequences[together.sample_ids == index], alone.sequences)


def test_sharing_without_remasking_decides_the_surest_slots_of_all_regions(replay, batch):
    """Decided tokens stay, and every step decides as many slots among all regions as the schedule says."""
    settings = {"shared_schedule": True, "remasking": False}
    decided, drafts = drafts_of(replay, batch, steps=5, **settings)
    assert [int(found.sum()) for found in decided] == released_schedule(3 * SLOTS, 5)
    assert any(len(set(found.sum(dim=1).tolist())) > 1 for found in decided)  # regions advance unevenly
    for before, after, known in zip(drafts, drafts[1:], decided, strict=False):
        assert torch.equal(before[known], after[known])


def test_remasking_revises_decided_slots(replay, batch):
    """Some slot is decided, masked again and decided otherwise; per region as many slots stay as without."""
    decided, _ = drafts_of(replay, batch, steps=6, remasking=True)
    assert [found.sum(dim=1).tolist() for found in decided] == [[count] * 3 for count in linear_schedule(SLOTS, 6)]
    assert any((before & ~after).any() for before, after in itertools.pairwise(decided))


@pytest.mark.parametrize(("slots", "steps"), [(16, 8), (16, 32), (48, 32), (7, 3), (1, 5)])
def test_released_schedule_ends_where_nothing_is_masked(slots, steps):
    masked = [slots - decided for decided in released_schedule(slots, steps)]
    assert masked == [int(slots * (steps - 1 - step) / steps) for step in range(len(masked))]
    assert masked[-1] == 0
    assert all(masked[:-1])


@pytest.mark.parametrize("sampler", FIXED_SAMPLERS)
@pytest.mark.parametrize(("steps", "block_length"), [(6, None), (4, None), (4, 3), (6, 2)])
def test_committed_tokens_stay_and_blocks_finish_in_order(replay, batch, sampler, steps, block_length):
    decided, drafts = drafts_of(replay, batch, sampler=sampler, steps=steps, block_length=block_length, seed=3)
    length = block_length or SLOTS
    share = linear_schedule(length, steps * length // SLOTS)
    expected = [start + count for start in range(0, SLOTS, length) for count in share]
    assert [found.sum(dim=1).tolist() for found in decided] == [[count] * 3 for count in expected]
    for before, after, known in zip(drafts, drafts[1:], decided, strict=False):
        assert torch.equal(before[known], after[known])
    for found in decided:
        for answer in found.view(3, -1, length):
            started = [bool(block.any()) for block in answer]
            finished = [bool(block.all()) for block in answer]
            assert all(done or not begun for done, begun in zip(finished, started[1:], strict=False))


@pytest.mark.parametrize("steps", [6, 4, 2])
def test_left_to_right_commits_a_growing_prefix(replay, batch, steps):
    decided, _ = drafts_of(replay, batch, sampler="left_to_right", steps=steps)
    for found, count in zip(decided, linear_schedule(SLOTS, steps), strict=True):
        assert found[:, :count].all()
        assert not found[:, count:].any()


@pytest.mark.parametrize(
    ("steps", "block_length", "passes"),
    [(6, None, 6), (4, None, 4), (1, None, 1), (50, None, 6), (6, 2, 6), (3, 2, 3), (4, 3, 4), (5, 3, 4), (50, 3, 6)],
)
def test_forward_passes_are_counted(replay, batch, steps, block_length, passes):
    """Steps are shared evenly by the blocks, and none is run that could commit nothing."""
    output = generate(replay, batch, steps=steps, block_length=block_length)
    assert output.num_forward_passes == passes
    assert output.tokens_per_forward == pytest.approx(3 * SLOTS / passes)
