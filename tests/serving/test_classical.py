"""Superpixels merged by colour and edge: how well regions of drawn scenes are found without weights."""

import numpy as np
import pytest
from PIL import Image

from perceptiondlm.drawn.scenes import draw_scene
from perceptiondlm.serving.segmenters import Segmenter, load_segmenter


pytest.importorskip("skimage", reason="the classical segmenter needs scikit-image")
SCENES = [draw_scene(7, index) for index in range(6)]


def overlap(one: np.ndarray, other: np.ndarray) -> float:
    return (one & other).sum() / (one | other).sum()


def box_of(mask: np.ndarray) -> tuple[int, int, int, int]:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


@pytest.fixture(scope="module")
def segmenter():
    return load_segmenter("classical")


def test_it_is_a_segmenter_that_knows_no_words(segmenter):
    assert isinstance(segmenter, Segmenter)
    with pytest.raises(ValueError, match="knows no words"):
        segmenter.named(SCENES[0].image, "house")


def test_regions_of_boxes_are_closer_to_the_objects_than_the_boxes(segmenter):
    found, boxes = [], []
    for scene in SCENES:
        corners = [box_of(item.mask) for item in scene.objects]
        for item, corner, region in zip(scene.objects, corners, segmenter.at_boxes(scene.image, corners), strict=True):
            x0, y0, x1, y1 = region.box
            assert corner[0] <= x0 < x1 <= corner[2]
            assert corner[1] <= y0 < y1 <= corner[3]
            found.append(overlap(region.pixels(), item.mask))
            boxes.append(item.mask.sum() / ((corner[2] - corner[0]) * (corner[3] - corner[1])))
    assert np.mean(found) > np.mean(boxes) + 0.05
    assert np.mean(found) > 0.6


def test_everything_finds_most_objects_without_overlaps_and_little_of_the_background(segmenter):
    best, background = [], []
    for scene in SCENES:
        regions = segmenter.everything(scene.image)
        masks = [region.pixels() for region in regions]
        assert np.sum(masks, axis=0).max() == 1
        assert [region.area for region in regions] == sorted((region.area for region in regions), reverse=True)
        best += [max(overlap(mask, item.mask) for mask in masks) for item in scene.objects]
        objects = np.any([item.mask for item in scene.objects], axis=0)
        background.append(np.any(masks, axis=0)[~objects].mean())
    assert np.mean(best) > 0.45
    assert np.mean(np.array(best) > 0.5) > 0.5
    assert np.mean(background) < 0.5


def test_points_in_the_middle_of_objects_find_much_of_them(segmenter):
    found = []
    for scene in SCENES:
        places = [np.argwhere(item.mask)[item.mask.sum() // 2][::-1].tolist() for item in scene.objects]
        regions = segmenter.at_points(scene.image, places)
        found += [overlap(r.pixels(), item.mask) for r, item in zip(regions, scene.objects, strict=True)]
    assert np.mean(found) > 0.35


def test_a_point_finds_a_region_that_holds_it_and_others_restrict_it(segmenter):
    scene = SCENES[0]
    item = max(scene.objects, key=lambda item: item.mask.sum())
    rows, columns = np.nonzero(item.mask)
    middle = len(rows) // 2
    inside = (int(columns[middle]), int(rows[middle]))
    (region,) = segmenter.at_points(scene.image, [inside])
    assert region.pixels()[inside[1], inside[0]]
    x0, y0, _, y1 = box_of(region.pixels())
    outside = (max(0, x0 - 12), (y0 + y1) // 2)
    (restricted,) = segmenter.at_points(scene.image, [[inside, outside]], [[1, 0]])
    assert restricted.pixels()[inside[1], inside[0]]
    assert not restricted.pixels()[outside[1], outside[0]]


def test_results_are_the_same_every_time_and_at_the_size_of_the_image(segmenter):
    scene = SCENES[1]
    large = scene.image.resize((scene.image.width * 3, scene.image.height * 3), Image.Resampling.LANCZOS)
    found = segmenter.everything(large)
    assert found == load_segmenter("classical").everything(large)
    assert found[0].size == (large.height, large.width)


@pytest.mark.parametrize("size", [(1, 1), (2, 40), (300, 1), (17, 23)])
def test_small_and_plain_images_have_regions_at_boxes_and_points(segmenter, size):
    image = Image.new("RGB", size, (200, 30, 30))
    assert segmenter.everything(image) == []
    (boxed,) = segmenter.at_boxes(image, [(0, 0, *size)])
    assert boxed.area == size[0] * size[1]
    (pointed,) = segmenter.at_points(image, [(size[0] - 1, size[1] - 1)])
    assert pointed.area >= 1


@pytest.mark.parametrize("option", [{"superpixels": 0}, {"working_side": 2.5}, {"least_contrast": 2}])
def test_settings_are_checked(option):
    with pytest.raises(ValueError, match=next(iter(option))):
        load_segmenter("classical", **option)
