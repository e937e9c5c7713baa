"""Focal replay: crops around regions, boxes inside them, and colours under masks."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from perceptiondlm.focal_perceptiondlm import (
    FocalReplay,
    boxes_in_crops,
    cut_crops,
    fill_missed_bins,
    grown_boxes,
    mask_appearance,
)
from perceptiondlm.region_features_perceptiondlm import RegionReplay


SIZE = (480, 640)


@pytest.mark.parametrize("factor", [1.0, 1.3, 2.5])
def test_a_crop_holds_its_region_and_stays_in_the_image(factor):
    dice = np.random.default_rng(0)
    low = dice.integers(0, (600, 440), (200, 2))
    boxes = np.concatenate((low, np.minimum(low + dice.integers(1, 600, (200, 2)), (640, 480))), axis=1)
    crops = grown_boxes(boxes, SIZE, factor)
    assert (crops[:, :2] >= 0).all()
    assert (crops[:, 2:] <= (640, 480)).all()
    assert (crops[:, :2] <= boxes[:, :2]).all()
    assert (crops[:, 2:] >= boxes[:, 2:]).all()
    inside = boxes_in_crops(boxes, crops)
    assert inside.min() >= 0
    assert inside.max() <= 1


def test_a_crop_is_a_square_where_there_is_room():
    ((x0, y0, x1, y1),) = grown_boxes(np.array([[300, 200, 340, 220]]), SIZE, 1.5).tolist()
    assert x1 - x0 == y1 - y0 == 60
    assert (x0 + x1, y0 + y1) == (640, 420)  # around the middle of the box


def test_a_one_pixel_region_has_a_crop_of_context():
    ((x0, y0, x1, y1),) = grown_boxes(np.array([[0, 0, 1, 1]]), SIZE, 1.3).tolist()
    assert x1 - x0 >= 16
    assert y1 - y0 >= 16


def test_boxes_in_crops_show_the_same_pixels():
    """What lies in the region's box of the image lies in the box inside the crop."""
    pixels = np.zeros((*SIZE, 3), np.uint8)
    pixels[100:140, 200:260] = 255
    boxes = np.array([[200, 100, 260, 140]])
    crops = grown_boxes(boxes, SIZE, 2.0)
    (crop,) = cut_crops(Image.fromarray(pixels), crops, 240)
    x0, y0, x1, y1 = (boxes_in_crops(boxes, crops)[0] * 240).round().astype(int)
    assert crop[y0 + 3 : y1 - 3, x0 + 3 : x1 - 3].min() > 250
    outside = crop.astype(int).sum() - crop[y0 - 3 : y1 + 3, x0 - 3 : x1 + 3].astype(int).sum()
    assert outside == 0


def test_appearance_is_the_colour_under_the_mask_alone():
    pixels = np.full((40, 40, 3), 255, np.uint8)
    mask = np.zeros((40, 40), bool)
    mask[10:30, 10:20] = True
    pixels[10:30, 10:20] = (255, 0, 0)
    found = mask_appearance(pixels[10:30, 10:30], mask[10:30, 10:30], 2)
    red = np.array([1, -1, -1, 0, 0, 0], np.float32)
    np.testing.assert_allclose(found, np.tile(red, (4, 1)), atol=1e-6)  # empty bins carry the region's values


def test_appearance_tells_stripes_from_their_mean():
    striped = np.zeros((32, 32, 3), np.uint8)
    striped[::2] = 255
    plain = np.full((32, 32, 3), 128, np.uint8)
    stripes, flat = (mask_appearance(pixels, np.ones((32, 32), bool), 4) for pixels in (striped, plain))
    np.testing.assert_allclose(stripes[:, :3], flat[:, :3], atol=0.01)
    assert stripes[:, 3:].min() > 0.9
    assert flat[:, 3:].max() < 0.01


def focal_config(**switches):
    off = {"region_crop_size": 0, "region_appearance": False, "region_pooling": False, "region_gain": 1.0}
    replay = {"roi_size": 2, "coverage_subsamples": 2, "region_conditioning": "replay", "region_geometry": True}
    return SimpleNamespace(text_config=SimpleNamespace(hidden_size=8), **{**replay, **off, **switches})


def test_the_mean_under_the_mask_stands_where_the_mask_does_not():
    features = torch.tensor([[[1.0, 2.0], [3.0, 6.0], [50.0, 50.0], [70.0, 0.0]]])
    filled, mean = fill_missed_bins(features, torch.tensor([[0.75, 0.25, 0.0, 0.0]]))
    torch.testing.assert_close(mean, torch.tensor([[[1.5, 3.0]]]))
    torch.testing.assert_close(filled[0], torch.tensor([[1.0, 2.0], [3.0, 6.0], [1.5, 3.0], [1.5, 3.0]]))


def test_a_gain_makes_box_mask_and_colours_louder_and_nothing_else():
    features, colours, geometry, coverage = (
        torch.randn(2, 4, 8), torch.rand(2, 4, 6), torch.rand(2, 6), torch.rand(2, 4, 4)
    )  # fmt: skip
    plain, loud = (focal_config(region_appearance=True, region_gain=gain) for gain in (1.0, 5.0))
    for kind, rest in ((FocalReplay, (None, None, colours)), (RegionReplay, (coverage, geometry))):
        quiet = kind(plain)
        louder = kind(loud)
        louder.load_state_dict(quiet.state_dict())
        for module in (quiet, louder):  # what is said of a region alone, without its constant part
            for name, layer in module.named_children():
                if name.endswith("_proj"):
                    layer.bias.data.zero_()
        silent = quiet(features, *(None if said is None else torch.zeros_like(said) for said in rest))
        torch.testing.assert_close(louder(features, *rest) - silent, 5 * (quiet(features, *rest) - silent))


def test_pooling_hides_what_lies_beside_the_mask():
    torch.manual_seed(0)
    module = FocalReplay(focal_config(region_crop_size=64, region_pooling=True))
    features, crops, covered = torch.randn(1, 4, 8), torch.randn(1, 4, 8), torch.tensor([[1.0, 0.5, 0.0, 0.0]])
    places = torch.tensor([0])
    before = module(features, crops, places, None, covered)
    beside = features.clone(), crops.clone()
    for changed in beside:
        changed[:, 2:] += 1
    torch.testing.assert_close(module(*beside, places, None, covered), before)
    assert not torch.allclose(module(features, crops, places, None, torch.tensor([[1.0, 0.5, 0.5, 0.0]])), before)


def test_a_crop_reaches_its_own_region_alone():
    torch.manual_seed(0)
    module = FocalReplay(focal_config(region_crop_size=64, region_appearance=True))
    features, crops = torch.randn(3, 4, 8), torch.randn(2, 4, 8)
    colours = torch.randn(3, 4, 6)
    together = module(features, crops, torch.tensor([0, 2]), colours)
    changed = module(features, torch.stack((crops[0], crops[1] + 1)), torch.tensor([0, 2]), colours)
    assert torch.equal(together[:2], changed[:2])
    assert not torch.equal(together[2], changed[2])
    alone = module(features[2:], crops[1:], torch.tensor([0]), colours[2:])
    torch.testing.assert_close(alone[0], together[2])
    skipped = module(features[1:2], None, None, colours[1:2])
    torch.testing.assert_close(skipped[0], together[1])
