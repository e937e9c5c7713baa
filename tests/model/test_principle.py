"""The principle: a region sees the sequence it would see if it were the only region, so it gets the captions it would
get alone, whatever else is asked in the same pass; under every switch of the config."""

import itertools

import pytest
import torch
from model_batches import (
    CONDITIONINGS,
    LAYOUTS,
    SLOTS,
    generate,
    half_masked,
    masks_of,
    region_batch,
)
from model_passes import scores


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
