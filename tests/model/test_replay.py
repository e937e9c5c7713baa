"""What a region adds to its RoI features: coverage, place of the bin, geometry."""

import numpy as np
import pytest
import torch
from model_batches import region_batch
from PIL import Image

from perceptiondlm.region_features_perceptiondlm import box_geometry


def bare_replay(tiny_model):
    """A replay module that adds the four cells of coverage to the first four channels, and nothing else."""
    replay = tiny_model().region_replay
    with torch.no_grad():
        for parameter in replay.parameters():
            parameter.zero_()
        replay.coverage_proj.weight[:4] = torch.eye(4)
    return replay


def test_only_the_covered_cell_of_a_bin_is_active(tiny_model):
    """Coverage of the lower right quarter of bin (1, 2) reaches token 6 as its fourth cell, and nothing else."""
    coverage = torch.zeros(1, 8, 8)
    coverage[0, 3, 5] = 1.0
    with torch.no_grad():
        tokens = bare_replay(tiny_model)(torch.zeros(1, 16, 48), coverage, torch.zeros(1, 6))
    assert tokens.nonzero().tolist() == [[0, 6, 3]]
    assert tokens[0, 6, 3] == 1.0


def test_a_mask_reaches_its_tokens_cell_by_cell(tiny_model, tiny_processor):
    """From pixels to tokens: a random pattern of 2 px cells, read back from each bin's channels."""
    pattern = np.random.default_rng(1).random((8, 8)) < 0.5
    pattern[0, 0] = pattern[7, 7] = True  # the box reaches from cell to cell
    mask = np.zeros((40, 50), dtype=bool)
    mask[9:25, 21:37] = pattern.repeat(2, axis=0).repeat(2, axis=1)
    batch = tiny_processor(tiny_model())(images=Image.new("RGB", (50, 40)), masks=[mask])
    with torch.no_grad():
        tokens = bare_replay(tiny_model)(torch.zeros(1, 16, 48), batch["region_coverage"], torch.zeros(1, 6))[0]
    for row in range(8):
        for column in range(8):
            token, cell = (row // 2) * 4 + column // 2, (row % 2) * 2 + column % 2
            assert tokens[token, cell] == pytest.approx(float(pattern[row, column]), abs=1e-6)


def test_replay_adds_bin_place_and_geometry(tiny_model):
    replay = tiny_model().region_replay
    features, coverage = torch.randn(2, 16, 48), torch.rand(2, 8, 8)
    geometry = torch.rand(2, 6)
    with torch.no_grad():
        tokens = replay(features, coverage, geometry)
        for region in range(2):
            for token in range(16):
                row, column = divmod(token, 4)
                cells = coverage[region, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].flatten()
                expected = features[region, token] + replay.coverage_proj(cells)
                expected += replay.bin_embedding.weight[token] + replay.geometry_proj(geometry[region])
                torch.testing.assert_close(tokens[region, token], expected, atol=1e-5, rtol=1e-5)


def test_box_geometry_measures_extent_in_shorter_sides():
    boxes = torch.tensor([[0.25, 0.5, 0.75, 1.0], [0.0, 0.0, 1.0, 1.0]])
    found = box_geometry(boxes, torch.tensor([[100, 200], [300, 60]]))
    assert found.tolist() == [[0.25, 0.5, 0.75, 1.0, 1.0, 0.5], [0.0, 0.0, 1.0, 1.0, 1.0, 5.0]]


@pytest.mark.parametrize("field", ["region_coverage", "region_boxes"])
def test_logits_depend_on_shape_and_place_of_a_region(tiny_model, tiny_processor, scene, field):
    """Same image, same question: the mask's outline alone, and the box alone, change the answer's scores."""
    model = tiny_model()
    batch = region_batch(tiny_processor(model), scene)
    ids = torch.full((3, 4), model.config.mask_token_id)
    changed = dict(batch)
    changed[field] = batch[field].flip(0)
    with torch.no_grad():
        assert (model(**batch, answer_ids=ids).logits - model(**changed, answer_ids=ids).logits).abs().max() > 1e-2
