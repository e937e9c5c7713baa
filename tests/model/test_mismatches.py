"""Inputs that do not fit the model or one another are named, with both numbers."""

import pytest
import torch
from model_batches import region_batch

from perceptiondlm.modeling_perceptiondlm import (
    scatter_features,
)
from perceptiondlm.sequence_perceptiondlm import ROI, SHARED


def without(batch, name):
    return {key: value for key, value in batch.items() if key != name}


def replaced_once(batch, name, old, new):
    """The batch with the first entry that is `old` set to `new`."""
    changed = batch[name].clone()
    changed.view(-1)[(changed == old).flatten().nonzero()[0]] = new
    return {**batch, name: changed}


@pytest.mark.parametrize(
    ("conditioning", "change", "message"),
    [
        ("replay", lambda b: {**b, "pixel_values": b["pixel_values"][..., :48]}, r"\(3, 3, 64, 48\).*64, 64"),
        ("replay", lambda b: {**b, "pixel_values": b["pixel_values"][:2]}, r"\b2\b.*\b3\b"),
        ("replay", lambda b: without(b, "region_coverage"), r"region_coverage.*\(3, 8, 8\).*missing"),
        ("replay", lambda b: {**b, "region_coverage": b["region_coverage"][:2]}, r"\(3, 8, 8\).*\(2, 8, 8\)"),
        ("replay", lambda b: {**b, "region_boxes": b["region_boxes"][:2]}, r"\b3\b.*\b2\b"),
        ("vision", lambda b: without(b, "prompt_coverage"), r"prompt_coverage.*\(3, 6, 8, 8\).*missing"),
        ("vision", lambda b: {**b, "prompt_coverage": b["prompt_coverage"][:, :4]}, r"\(3, 6, 8, 8\).*\(3, 4, 8, 8\)"),
    ],
)
def test_mismatched_inputs_are_named_with_both_sizes(tiny_model, tiny_processor, scene, conditioning, change, message):
    model = tiny_model(region_conditioning=conditioning)
    batch = change(dict(region_batch(tiny_processor(model), scene)))
    with pytest.raises(ValueError, match=message):
        model(**batch, answer_ids=torch.zeros(3, 4, dtype=torch.long))


def test_placeholders_and_features_are_counted(tiny_model, tiny_processor, scene):
    model = tiny_model()
    batch = dict(region_batch(tiny_processor(model), scene))
    ids = torch.zeros(3, 4, dtype=torch.long)
    one_image_token_less = replaced_once(batch, "input_ids", model.config.image_token_id, 5)
    with pytest.raises(ValueError, match=r"47 image tokens.*48 image features"):
        model(**one_image_token_less, answer_ids=ids)
    one_roi_token_less = replaced_once(batch, "token_roles", ROI, SHARED)
    with pytest.raises(ValueError, match=r"47 RoI tokens.*48 RoI features"):
        model(**one_roi_token_less, answer_ids=ids)


def test_regions_need_one_image_per_row(tiny_model, tiny_processor, scene):
    model = tiny_model()
    batch = dict(region_batch(tiny_processor(model), scene))
    batch["tile_grids"], batch["image_sizes"] = torch.ones(3, 2, dtype=torch.long), batch["image_sizes"].repeat(3, 1)
    with pytest.raises(ValueError, match="3 images for 1 rows"):
        model(**batch, answer_ids=torch.zeros(3, 4, dtype=torch.long))


@pytest.mark.parametrize("num_answers", [0, 2, 4])
def test_answers_that_do_not_fit_the_regions_are_refused(tiny_model, tiny_processor, scene, num_answers):
    model = tiny_model()
    with pytest.raises(ValueError, match=f"{num_answers} answers do not fit 3 regions"):
        model(**region_batch(tiny_processor(model), scene), answer_ids=torch.zeros(num_answers, 4, dtype=torch.long))


def test_forward_needs_answers_or_labels(tiny_model, tiny_processor, scene):
    model = tiny_model()
    batch = region_batch(tiny_processor(model), scene)
    ids = torch.zeros(3, 4, dtype=torch.long)
    for given in ({}, {"answer_ids": ids, "labels": ids}):
        with pytest.raises(ValueError, match=r"answer_ids.*labels"):
            model(**batch, **given)


def test_sequences_longer_than_the_model_are_refused(tiny_model, tiny_processor, scene):
    model = tiny_model(text_config={"max_position_embeddings": 100})
    with pytest.raises(ValueError, match=r"needs \d+ positions, the model has 100"):
        model.generate(**region_batch(tiny_processor(model), scene))


def test_scattering_counts_places_and_features():
    embeds, places = torch.zeros(1, 4, 2), torch.tensor([[False, True, False, True]])
    filled = scatter_features(embeds, places, torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "image")
    assert filled.tolist() == [[[0, 0], [1, 2], [0, 0], [3, 4]]]
    assert not embeds.any()
    with pytest.raises(ValueError, match=r"2 image tokens.*3 image features"):
        scatter_features(embeds, places, torch.ones(3, 2), "image")
