"""Decoding. The principle first: a region sees the sequence it would see if it were the only region, so it gets the
captions it would get alone, whatever else is asked in the same pass. Then schedules, samplers, settings and chat."""

import itertools
import math

import pytest
import torch
from model_passes import passes, scores
from transformers import GenerationConfig

from perceptiondlm.drawn.scenes import draw_scene
from perceptiondlm.generation_config_perceptiondlm import (
    ADAPTIVE_SAMPLERS,
    FIXED_SAMPLERS,
    SAMPLERS,
    PerceptionDLMGenerationConfig,
)
from perceptiondlm.modeling_perceptiondlm import PerceptionDLMForConditionalGeneration
from perceptiondlm.released_perceptiondlm import released_schedule
from perceptiondlm.sampling_perceptiondlm import Canvas, TokenSampler, linear_schedule, rank_in_group


LAYOUTS = ("isolated", "released", "full")
CONDITIONINGS = ("replay", "vision")
SLOTS = 6


def masks_of(scene) -> list:
    return [item.mask for item in scene.objects]


def region_batch(processor, scene, **kwargs):
    """The scene's regions as model inputs."""
    return processor(images=scene.image, masks=masks_of(scene), **kwargs)


def half_masked(model, num_answers: int, num_slots: int = SLOTS, seed: int = 0) -> torch.Tensor:
    """A random canvas (A, G) in the middle of decoding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 500, (num_answers, num_slots), generator=generator)
    return ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.5, model.config.mask_token_id)


def generate(model, batch, **settings):
    return model.generate(**batch, **{"max_new_tokens": SLOTS, "steps": SLOTS, **settings})


class Recorder:
    """A streamer that keeps every draft."""

    def __init__(self):
        self.drafts, self.ended = [], 0

    def put_draft(self, ids):
        self.drafts.append(ids.clone())

    def end(self):
        self.ended += 1


@pytest.fixture(scope="module")
def replay(tiny_model):
    """The default model."""
    return tiny_model()


@pytest.fixture(scope="module")
def batch(replay, tiny_processor, scene):
    """Three regions of one image for the default model."""
    return region_batch(tiny_processor(replay), scene)


@pytest.fixture(scope="module")
def pictures():
    """Scenes that differ in tiles and in the number of regions (at most six)."""
    chosen = {}
    for index in range(60):
        candidate = draw_scene(0, index)
        width, height = candidate.image.size
        if len(candidate.objects) <= 6:
            chosen.setdefault((round(width / height), len(candidate.objects)), candidate)
    return sorted(chosen.values(), key=lambda s: (len(s.objects), s.index))[:6:2]


# --- the principle ------------------------------------------------------------------------------------------------


def test_regions_together_get_the_captions_they_get_alone(replay, tiny_processor, scene, batch):
    processor = tiny_processor(replay)
    together = generate(replay, batch)
    assert len({tuple(ids) for ids in together.sequences.tolist()}) == 3  # the regions do differ
    for region, mask in enumerate(masks_of(scene)):
        alone = generate(replay, processor(images=scene.image, masks=[mask]))
        assert torch.equal(alone.sequences[0], together.sequences[region])
        torch.testing.assert_close(alone.confidences[0], together.confidences[region], atol=1e-4, rtol=0)


@pytest.mark.parametrize("cached", [False, True])
def test_regions_together_get_the_logits_they_get_alone(replay, tiny_processor, scene, batch, cached):
    processor, ids = tiny_processor(replay), half_masked(replay, 3)
    together = scores(replay, batch, ids, cached)
    for region, mask in enumerate(masks_of(scene)):
        single = processor(images=scene.image, masks=[mask])
        alone = scores(replay, single, ids[region : region + 1], cached)
        torch.testing.assert_close(alone[0], together[region], atol=1e-4, rtol=0)


def test_given_the_same_features_the_same_holds_under_vision(tiny_model, tiny_processor, scene, monkeypatch):
    """The image is encoded with the prompts of all regions; a region alone then reuses those features and its id."""
    model = tiny_model(region_conditioning="vision")
    processor, ids = tiny_processor(model), half_masked(model, 3)
    every = region_batch(processor, scene)
    with torch.no_grad():
        features = model.encode_tiles(every["pixel_values"], every["prompt_coverage"])
    logits, output = scores(model, every, ids), generate(model, every)
    markers = model.config.caption_token_ids
    monkeypatch.setattr(model, "encode_tiles", lambda *_: features)
    for region, mask in enumerate(masks_of(scene)):
        monkeypatch.setattr(model.config, "caption_token_ids", markers[region:])
        single = processor(images=scene.image, masks=[mask])
        torch.testing.assert_close(
            scores(model, single, ids[region : region + 1])[0], logits[region], atol=1e-4, rtol=0
        )
        assert torch.equal(generate(model, single).sequences[0], output.sequences[region])


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_captions_leak_only_where_the_layout_lets_them(tiny_model, tiny_processor, scene, conditioning, layout):
    """Other tokens in one caption: no other region's logits move in the isolated layout; they do in the others."""
    model = tiny_model(region_conditioning=conditioning, attention_layout=layout)
    inputs = region_batch(tiny_processor(model), scene)
    ids = half_masked(model, 3)
    changed = ids.clone()
    changed[1] = half_masked(model, 1, seed=1)[0]
    moved = (scores(model, inputs, changed) - scores(model, inputs, ids)).abs().amax(dim=(1, 2))
    assert moved[1] > 1e-2
    if layout == "isolated":
        assert moved[[0, 2]].max() <= 1e-6
        by_step = scores(model, inputs, changed, cached=True) - scores(model, inputs, ids, cached=True)
        assert by_step[[0, 2]].abs().max() <= 1e-6
    else:
        assert moved[[0, 2]].min() > 1e-3


def test_permuting_regions_permutes_captions(replay, tiny_processor, scene, batch):
    order = [2, 0, 1]
    masks = masks_of(scene)
    permuted = tiny_processor(replay)(images=scene.image, masks=[masks[i] for i in order])
    assert torch.equal(generate(replay, permuted).sequences, generate(replay, batch).sequences[order])
    ids = half_masked(replay, 3)
    expected = scores(replay, batch, ids)[order]
    torch.testing.assert_close(scores(replay, permuted, ids[order]), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_images_in_a_batch_get_the_captions_they_get_alone(tiny_model, tiny_processor, pictures, conditioning, layout):
    model = tiny_model(region_conditioning=conditioning, attention_layout=layout)
    processor = tiny_processor(model)
    counts = [len(picture.objects) for picture in pictures]
    assert len(set(counts)) > 1
    inputs = processor(images=[p.image for p in pictures], masks=[masks_of(p) for p in pictures])
    assert len(set(map(tuple, inputs["tile_grids"].tolist()))) > 1
    together = generate(model, inputs)
    assert together.sample_ids.tolist() == [index for index, count in enumerate(counts) for _ in range(count)]
    captions = processor.post_process_region_captions(together)
    ids = half_masked(model, sum(counts))
    logits = scores(model, inputs, ids).split(counts)
    for index, picture in enumerate(pictures):
        single = region_batch(processor, picture)
        alone = generate(model, single)
        assert torch.equal(alone.sequences, together.sequences[together.sample_ids == index])
        assert processor.post_process_region_captions(alone) == [captions[index]]
        alone_logits = scores(model, single, ids.split(counts)[index])
        torch.testing.assert_close(alone_logits, logits[index], atol=1e-4, rtol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_questions_and_regions_can_share_a_batch(tiny_model, tiny_processor, scene, layout):
    """A row without regions next to one with three: each is scored as it is alone."""
    model = tiny_model(attention_layout=layout)
    processor, ids = tiny_processor(model), half_masked(model, 4)
    regions = processor.region_rows(scene.image, None, "masks", masks_of(scene))
    question = processor.text_rows(scene.image, "How many objects are there?")
    together = scores(model, processor.collate(regions + question), ids)
    torch.testing.assert_close(scores(model, processor.collate(regions), ids[:3]), together[:3], atol=1e-4, rtol=0)
    torch.testing.assert_close(scores(model, processor.collate(question), ids[3:]), together[3:], atol=1e-4, rtol=0)


def test_sixty_regions_in_one_pass(replay, tiny_processor, scene):
    processor = tiny_processor(replay)
    boxes = [[8 * i, 4 * i, 8 * i + 20 + i % 7, 4 * i + 9 + i % 5] for i in range(30)]
    boxes += [[8 * i, 5, 8 * i + 11, 60 + i] for i in range(30)]
    inputs = processor(images=scene.image, boxes=boxes)
    assert inputs["num_regions"].tolist() == [60]
    output = generate(replay, inputs)
    assert output.num_forward_passes == SLOTS
    for chosen in (0, 31, 59):
        alone = generate(replay, processor(images=scene.image, boxes=[boxes[chosen]]))
        assert torch.equal(alone.sequences[0], output.sequences[chosen])


def test_splitting_regions_over_passes_changes_no_caption(replay, tiny_processor, scene, batch):
    processor = tiny_processor(replay)
    split = region_batch(processor, scene, max_regions_per_pass=2)
    assert split["num_regions"].tolist() == [2, 1]
    output = generate(replay, split)
    assert torch.equal(output.sequences, generate(replay, batch).sequences)
    assert output.sample_ids.tolist() == [0, 0, 0]


def test_more_regions_than_prompt_ids_take_two_passes_in_order(tiny_model, tiny_processor, scene):
    model = tiny_model(region_conditioning="vision")
    processor = tiny_processor(model)
    boxes = [[30 * i, 20 + 5 * i, 30 * i + 40, 60 + 12 * i] for i in range(7)]
    inputs = processor(images=scene.image, boxes=boxes)
    assert inputs["num_regions"].tolist() == [6, 1]
    together = generate(model, inputs)
    assert together.sample_ids.tolist() == [0] * 7
    apart = [generate(model, processor(images=scene.image, boxes=part)) for part in (boxes[:6], boxes[6:])]
    assert torch.equal(together.sequences, torch.cat([part.sequences for part in apart]))
    confidences = torch.cat([part.confidences for part in apart])
    torch.testing.assert_close(together.confidences, confidences, atol=1e-4, rtol=0)
    assert torch.cdist(confidences, confidences).add(torch.eye(7)).min() > 1e-3  # no two regions look alike
    assert [len(captions) for captions in processor.post_process_region_captions(together)] == [7]


# --- layouts and switches -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides",
    [
        *({"attention_layout": layout, "region_conditioning": c} for layout in LAYOUTS for c in CONDITIONINGS),
        {"region_conditioning": "vision", "use_region_prompts": False},
        {"region_conditioning": "vision", "use_roi_replay": False},
        {"region_conditioning": "vision", "use_roi_replay": False, "attention_layout": "released"},
        {"region_geometry": False},
        {"roi_size": 2, "coverage_subsamples": 3, "roi_sampling_ratio": 1},
        {"pixel_unshuffle": 1, "vision_feature_layer": -1},
        {"vision_config": {"patch_size": 16}, "text_config": {"num_key_value_heads": 2}},
    ],
    ids=lambda overrides: "-".join(str(v) for v in overrides.values()) or "default",
)
def test_every_switch_captions_every_region(tiny_model, tiny_processor, scene, overrides):
    model = tiny_model(**overrides)
    processor = tiny_processor(model)
    inputs = region_batch(processor, scene)
    output = generate(model, inputs, suppress_tokens=[model.config.mask_token_id])
    assert output.sequences.shape == output.confidences.shape == (3, SLOTS)
    assert not (output.sequences == model.config.mask_token_id).any()
    assert output.confidences.min() > 0
    assert output.confidences.max() <= 1
    assert [len(captions) for captions in processor.post_process_region_captions(output)] == [3]
    # every region reaches its own answer: blank canvases are scored differently
    blank = torch.full((3, SLOTS), model.config.mask_token_id)
    logits = scores(model, inputs, blank)
    for one, other in itertools.combinations(logits, 2):
        assert (one - other).abs().max() > 1e-3
    has_roi = bool((inputs["token_roles"] != 0).any())
    assert has_roi == model.config.use_roi_replay


# --- cache --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_length", [None, 3, 2])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_cached_decoding_is_uncached_decoding(replay, batch, sampler, block_length):
    settings = {"sampler": sampler, "block_length": block_length, "seed": 5}
    cached, uncached = (generate(replay, batch, use_cache=use, **settings) for use in (True, False))
    assert torch.equal(cached.sequences, uncached.sequences)
    torch.testing.assert_close(cached.confidences, uncached.confidences, atol=1e-4, rtol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("use_cache", [True, False])
def test_a_cached_step_runs_the_answers_alone(tiny_model, tiny_processor, scene, layout, use_cache):
    """Only the isolated layout caches: there, and only there, no prompt token depends on a caption."""
    model = tiny_model(attention_layout=layout)
    inputs = region_batch(tiny_processor(model), scene)
    lengths = []
    hook = model.language_model.layers[0].register_forward_hook(
        lambda _module, x, _output: lengths.append(x[0].shape[0] * x[0].shape[1])
    )
    output = generate(model, inputs, use_cache=use_cache, steps=3)
    hook.remove()
    prompt, answers = inputs["input_ids"].shape[1], 3 * (1 + SLOTS + (layout != "isolated"))
    spans = 3 * (model.config.roi_size**2 + 1)
    cached = use_cache and layout == "isolated"
    assert lengths == ([prompt - spans, spans] + [answers] * 3 if cached else [prompt + answers] * 3)
    assert output.num_forward_passes == 3


def test_one_cache_serves_any_later_canvas(replay, batch):
    """Steps overwrite what the step before left: the same canvas gets the same logits after another one."""
    first, second = half_masked(replay, 3, seed=1), half_masked(replay, 3, seed=2)
    with torch.no_grad():
        denoise = passes(replay, batch, SLOTS)
        before, other, after = denoise(first), denoise(second), denoise(first)
    assert torch.equal(before, after)
    assert not torch.allclose(before, other, atol=1e-2)


# --- schedule and samplers ----------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("seed", range(50))
def test_cached_and_uncached_decoding_agree_on_random_models(tiny_model, tiny_processor, pictures, seed):
    """A model per seed: every sampler in turn, batches of different images, passes of few and of many regions."""
    # In double precision: single would leave ties between tokens to the rounding of either way.
    model = tiny_model(seed, region_conditioning=CONDITIONINGS[seed % 2]).double()
    settings = {
        "sampler": SAMPLERS[seed % len(SAMPLERS)], "threshold": 0.12, "entropy_bound": 4.0, "seed": seed,
        "block_length": (None, 3)[seed // 2 % 2], "early_exit": seed % 3 > 0, "steps": (4, 6)[seed // 4 % 2],
    }  # fmt: skip
    images, masks = [s.image for s in pictures], [masks_of(s) for s in pictures]
    batch = tiny_processor(model)(images=images, masks=masks, max_regions_per_pass=(2, 6)[seed // 8 % 2])
    cached, uncached = (generate(model, batch, use_cache=flag, **settings) for flag in (True, False))
    assert torch.equal(cached.sequences, uncached.sequences)
    assert cached.num_forward_passes == uncached.num_forward_passes


# --- adaptive decoding and early exit -----------------------------------------------------------------------------


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


def test_fast_preset_is_a_set_of_keywords(replay, batch):
    fast = PerceptionDLMGenerationConfig(preset="fast", max_new_tokens=SLOTS, steps=SLOTS)
    assert fast.sampler in ADAPTIVE_SAMPLERS
    assert PerceptionDLMGenerationConfig(preset="fast", sampler="random").sampler == "random"
    output = generate(replay, batch, preset="fast")
    assert torch.equal(output.sequences, replay.generate(**batch, generation_config=fast).sequences)
    with pytest.raises(ValueError, match=r"preset must be one of.*fast.*'faster'"):
        generate(replay, batch, preset="faster")


@pytest.mark.parametrize("settings", [{"remasking": True}, {"shared_schedule": True}])
def test_adaptive_samplers_refuse_released_rules(settings):
    with pytest.raises(ValueError, match="sampler='threshold' goes with neither"):
        PerceptionDLMGenerationConfig(sampler="threshold", **settings)


# --- the released rules -------------------------------------------------------------------------------------------


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


def test_ranks_within_groups_against_sorting():
    generator = torch.Generator().manual_seed(0)
    priority = torch.rand(6, 5, generator=generator).round(decimals=1)  # with ties: the first slot wins
    groups = torch.tensor([0, 0, 1, 2, 2, 2])
    ranks = rank_in_group(priority, groups)
    for group in range(3):
        places = [(row, slot) for row in range(6) for slot in range(5) if groups[row] == group]
        ordered = sorted(places, key=lambda place: -float(priority[place]))
        assert [int(ranks[place]) for place in ordered] == list(range(len(places)))


def drafts_of(model, batch, **settings):
    """Which slots are decided after each step (list of (A, G) bool), and the drafts themselves."""
    recorder = Recorder()
    output = generate(model, batch, streamer=recorder, suppress_tokens=[model.config.mask_token_id], **settings)
    assert recorder.ended == 1
    assert len(recorder.drafts) == output.num_forward_passes
    assert torch.equal(recorder.drafts[-1], output.sequences)
    return [draft != model.config.mask_token_id for draft in recorder.drafts], recorder.drafts


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


@pytest.mark.parametrize(
    ("steps", "block_length", "passes"),
    [(6, None, 6), (4, None, 4), (1, None, 1), (50, None, 6), (6, 2, 6), (3, 2, 3), (4, 3, 4), (5, 3, 4), (50, 3, 6)],
)
def test_forward_passes_are_counted(replay, batch, steps, block_length, passes):
    """Steps are shared evenly by the blocks, and none is run that could commit nothing."""
    output = generate(replay, batch, steps=steps, block_length=block_length)
    assert output.num_forward_passes == passes
    assert output.tokens_per_forward == pytest.approx(3 * SLOTS / passes)


# --- settings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *itertools.product(("max_new_tokens", "steps"), (0, -1, 2.0, "8", None, True)),
        *itertools.product(("block_length", "top_k"), (0, -1, 2.0, "8", True)),
        ("block_length", 5),
        ("block_length", 64),
        ("sampler", "entropy"),
        ("sampler", None),
        ("shared_schedule", 1),
        ("early_exit", None),
        *(("threshold", value) for value in (0, 1.1, "high", None)),
        *(("entropy_bound", value) for value in (-0.1, float("inf"), None)),
        ("remasking", "yes"),
        *(("temperature", value) for value in (-0.1, float("nan"), float("inf"), "1", None)),
        *(("top_p", value) for value in (0, 0.0, -0.5, 1.01, float("nan"), "0.9")),
        *(("seed", value) for value in (1.5, "1", True)),
        *(("suppress_tokens", value) for value in (5, [-1], ["a"], [1.0])),
    ],
)
def test_settings_out_of_range_are_named(replay, batch, name, value):
    with pytest.raises(ValueError, match=name):
        PerceptionDLMGenerationConfig(**{name: value})
    with pytest.raises(ValueError, match=name):
        replay.generate(**batch, **{name: value})


def test_fewer_steps_than_blocks_are_refused():
    with pytest.raises(ValueError, match=r"steps=3.*number of blocks, 4"):
        PerceptionDLMGenerationConfig(max_new_tokens=8, block_length=2, steps=3)


@pytest.mark.parametrize(("name", "value"), [("num_beams", 4), ("do_sample", True), ("max_length", 64)])
def test_what_diffusion_does_not_do_is_refused_by_name_and_what_asks_for_nothing_accepted(replay, batch, name, value):
    neutral = {"num_beams": 1, "do_sample": False, "max_length": None}[name]
    assert torch.equal(generate(replay, batch, **{name: neutral}).sequences, generate(replay, batch).sequences)
    message = rf"{name}={value} belongs to autoregressive generation; accepted: {neutral}"
    with pytest.raises(ValueError, match=message):
        replay.generate(**batch, **{name: value})
    with pytest.raises(ValueError, match=message):
        PerceptionDLMGenerationConfig(**{name: value})


@pytest.mark.parametrize("name", ["num_inference_steps", "max_denoising_steps"])
def test_steps_answer_to_the_names_of_other_libraries(replay, batch, name):
    assert generate(replay, batch, steps=None, **{name: 3}).num_forward_passes == 3
    assert PerceptionDLMGenerationConfig(**{name: 5, "steps": 5}).steps == 5
    with pytest.raises(ValueError, match=rf"{name}=4 and steps=3 are one setting"):
        replay.generate(**batch, steps=3, **{name: 4})


@pytest.mark.parametrize("name", ["cfg_scale", "block_size", "labels"])
def test_unknown_keywords_are_refused(replay, batch, name):
    with pytest.raises(ValueError, match=rf"\['{name}'\].*block_length"):
        replay.generate(**batch, **{name: 1})
    with pytest.raises(ValueError, match=rf"\['{name}'\].*block_length"):
        PerceptionDLMGenerationConfig(**{name: 1})


def test_a_plain_generation_config_is_refused(replay, batch):
    with pytest.raises((TypeError, ValueError), match="PerceptionDLMGenerationConfig"):
        replay.generate(**batch, generation_config=GenerationConfig())


def test_keywords_override_the_config_given_and_that_the_model_s(tiny_model, tiny_processor, scene):
    model = tiny_model()
    inputs = region_batch(tiny_processor(model), scene)
    model.generation_config = PerceptionDLMGenerationConfig(max_new_tokens=4, steps=2)
    given = PerceptionDLMGenerationConfig(max_new_tokens=6, steps=3)
    outputs = (
        model.generate(**inputs),
        model.generate(**inputs, generation_config=given),
        model.generate(**inputs, generation_config=given, steps=6),
    )
    found = [(output.sequences.shape[1], output.num_forward_passes) for output in outputs]
    assert found == [(4, 2), (6, 3), (6, 6)]
    assert (given.steps, model.generation_config.steps) == (3, 2)  # a call changes no setting


def test_a_saved_generation_config_comes_back_the_same(tmp_path):
    settings = {
        "max_new_tokens": 12, "steps": 9, "block_length": 4, "sampler": "random", "temperature": 0.7, "top_k": 20,
        "top_p": 0.9, "suppress_tokens": [3, 5], "seed": 11, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
            "shared_schedule": False, "remasking": True, "threshold": 0.8, "entropy_bound": 0.3, "early_exit": False,
        "refresh_interval": 4, "compile": True,
    }  # fmt: skip
    assert set(settings) == set(PerceptionDLMGenerationConfig.fields())
    PerceptionDLMGenerationConfig(**settings).save_pretrained(tmp_path)
    loaded = PerceptionDLMGenerationConfig.from_pretrained(tmp_path)
    assert {name: getattr(loaded, name) for name in settings} == settings
    PerceptionDLMGenerationConfig().save_pretrained(tmp_path)
    defaults = PerceptionDLMGenerationConfig.from_pretrained(tmp_path)
    assert all(getattr(defaults, n) == getattr(PerceptionDLMGenerationConfig(), n) for n in settings)


def test_a_loaded_model_decodes_as_the_saved_one(tiny_model, tiny_processor, scene, tmp_path):
    model = tiny_model()
    inputs = region_batch(tiny_processor(model), scene)
    model.generation_config = PerceptionDLMGenerationConfig(
        max_new_tokens=6, steps=4, block_length=3, temperature=1.0, top_p=0.9, seed=7
    )
    model.save_pretrained(tmp_path)
    loaded = PerceptionDLMForConditionalGeneration.from_pretrained(tmp_path)
    assert type(loaded.generation_config) is PerceptionDLMGenerationConfig
    assert torch.equal(loaded.generate(**inputs).sequences, model.generate(**inputs).sequences)
    (tmp_path / "generation_config.json").unlink()
    fresh = PerceptionDLMForConditionalGeneration.from_pretrained(tmp_path)
    assert fresh.generation_config.max_new_tokens == PerceptionDLMGenerationConfig().max_new_tokens


# --- questions without regions ------------------------------------------------------------------------------------


def chat(processor, messages):
    return processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, add_generation_prompt=True, return_tensors="pt"
    )


def user(*parts):
    content = [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image", "image": p} for p in parts]
    return {"role": "user", "content": content}


def test_text_alone_is_answered(replay, tiny_processor):
    processor = tiny_processor(replay)
    inputs = chat(processor, [{"role": "user", "content": "What is a car?"}])
    assert "pixel_values" not in inputs
    assert torch.equal(inputs["input_ids"], processor(text="What is a car?")["input_ids"])
    output = generate(replay, inputs)
    assert output.sequences.shape == (1, SLOTS)
    assert output.sample_ids.tolist() == [0]
    assert processor.post_process_image_text_to_text(output) == [
        answer["text"] for answer in processor.decode_answers(output)
    ]


def test_the_answer_depends_on_image_and_question(replay, tiny_processor, scene):
    processor = tiny_processor(replay)
    other = draw_scene(0, scene.index + 1).image.resize(scene.image.size)
    asked = [("How many?", scene.image), ("What color?", scene.image), ("How many?", other)]
    logits = [
        scores(replay, processor(images=image, text=question), half_masked(replay, 1)) for question, image in asked
    ]
    for one, another in itertools.combinations(logits, 2):
        assert (one - another).abs().max() > 1e-2


def test_two_images_and_several_turns(replay, tiny_processor, scene, pictures):
    processor = tiny_processor(replay)
    images = [scene.image, pictures[0].image]
    messages = [
        {"role": "system", "content": "Be brief."},
        user(images[0], "What is this?"),
        {"role": "assistant", "content": "a car"},
        user("And this?", images[1]),
    ]
    inputs = chat(processor, messages)
    text = processor.tokenizer.decode(inputs["input_ids"][0])
    first, rest = text.split("<|eot_id|>\n", 2)[1:]
    assert "<img>" in first
    assert rest.index("a car") < rest.index("And this?") < rest.index("<img>")
    assert rest.endswith("<|start_header_id|>assistant<|end_header_id|>\n")
    image_tokens = int((inputs["input_ids"] == replay.config.image_token_id).sum())
    assert image_tokens == len(inputs["pixel_values"]) * processor.config.tokens_per_side**2
    assert len(inputs["tile_grids"]) == 2
    ids = half_masked(replay, 1)
    swapped = dict(inputs)
    swapped["pixel_values"] = inputs["pixel_values"].flip(0)
    assert (scores(replay, inputs, ids) - scores(replay, swapped, ids)).abs().max() > 1e-2
    cached, uncached = (generate(replay, inputs, use_cache=use, block_length=3) for use in (True, False))
    assert torch.equal(cached.sequences, uncached.sequences)
    assert cached.num_forward_passes == SLOTS


@pytest.mark.parametrize("layout", LAYOUTS)
def test_questions_in_a_batch_get_the_answers_they_get_alone(tiny_model, tiny_processor, scene, pictures, layout):
    """Texts of different lengths, with no, one and two images."""
    model = tiny_model(attention_layout=layout)
    processor = tiny_processor(model)
    texts = ["Why?", "What can be seen in this picture, and where is it?", "What do these two have in common?"]
    images = [[], [scene.image], [pictures[0].image, pictures[-1].image]]
    inputs = processor(images=images, text=texts)
    assert len(set(inputs["attention_mask"].sum(dim=1).tolist())) == 3
    together = generate(model, inputs)
    assert together.sample_ids.tolist() == [0, 1, 2]
    ids = half_masked(model, 3)
    logits = scores(model, inputs, ids)
    for index in range(3):
        single = processor(images=[images[index]] if images[index] else None, text=[texts[index]])
        assert torch.equal(generate(model, single).sequences[0], together.sequences[index])
        alone = scores(model, single, ids[index : index + 1])[0]
        torch.testing.assert_close(alone, logits[index], atol=1e-4, rtol=0)


def test_answers_are_decoded_up_to_their_end(replay, tiny_processor):
    """Text and score stop at the end token, which counts as decided; what follows it is filler."""
    processor = tiny_processor(replay)
    end, fill = replay.config.end_of_turn_token_id, replay.config.end_of_text_token_id
    car, red = (processor.tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in (" car", " red"))

    class Output:
        sequences = torch.tensor([[car, red, end, red], [fill, car, car, car], [car, car, red, red]])
        confidences = torch.tensor([[0.5, 0.7, 0.9, 0.1], [0.4, 1.0, 1.0, 1.0], [0.1, 0.2, 0.3, 0.4]])
        sample_ids = torch.tensor([0, 0, 1])

    words = [processor.tokenizer.decode(ids).strip() for ids in ([car, red], [], [car, car, red, red])]
    answers = processor.decode_answers(Output)
    assert [answer["text"] for answer in answers] == words
    assert [answer["score"] for answer in answers] == pytest.approx([0.7, 0.4, 0.25])
    scored = processor.post_process_region_captions(Output, output_scores=True)
    assert [[item["caption"] for item in image] for image in scored] == [words[:2], words[2:]]
