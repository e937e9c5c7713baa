"""Prompts of every kind become regions: what goes together, in which order, and what is refused."""

import sys
from importlib import import_module

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from perceptiondlm.pipeline_perceptiondlm import RegionCaptioningPipeline
from perceptiondlm.regions_perceptiondlm import region_masks
from perceptiondlm.serving.found import FoundRegion
from perceptiondlm.serving.prompts import RegionPrompts, regions_of
from perceptiondlm.serving.segmenters import NoSegmenter, Segmenter, load_segmenter


IMAGE = Image.new("RGB", (60, 40), "white")
RANDOM = np.random.default_rng(0).random((40, 60)) < 0.3


class Squares:
    """A segmenter that answers a point with the square around its first positive point, a box with its left half."""

    name = "squares"

    def __init__(self):
        self.asked = []

    def square(self, x, y, score=0.5, label=None):
        mask = np.zeros((40, 60), bool)
        mask[max(0, int(y) - 3) : int(y) + 4, max(0, int(x) - 3) : int(x) + 4] = True
        return FoundRegion.of_mask(mask, score, label)

    def everything(self, image):
        self.asked.append(image)
        return [self.square(10, 10), self.square(40, 20)]

    def at_boxes(self, image, boxes):
        return [self.square((x0 + x1) / 2, (y0 + y1) / 2) for x0, y0, x1, y1 in boxes]

    def at_points(self, image, points, labels=None):
        first = [next(p for p, s in zip(*pair, strict=True) if s) for pair in zip(points, labels, strict=True)]
        return [self.square(*point) for point in first]

    def named(self, image, text):
        return [self.square(30, 30, 0.9, text)]


@pytest.mark.parametrize(
    "mask",
    [RANDOM, np.ones((40, 60), bool), np.eye(40, 60, dtype=bool), np.pad(np.ones((40, 20), bool), ((0, 0), (10, 30)))],
    ids=["noise", "everything", "diagonal", "whole columns"],
)
def test_run_lengths_are_those_of_pycocotools(mask):
    found = FoundRegion.of_mask(mask)
    expected = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    assert found.mask == {"size": [40, 60], "counts": expected["counts"].decode()}
    assert (found.pixels() == mask).all()
    assert found.area == mask.sum()
    assert found.size == (40, 60)
    x, y, width, height = coco_mask.toBbox(expected)
    assert found.box == (x, y, x + width, y + height)


def test_a_mask_without_a_pixel_is_no_region():
    assert FoundRegion.of_mask(np.zeros((4, 4), bool)) is None


@pytest.mark.parametrize("segmenter", [None, "none", NoSegmenter()])
def test_without_a_segmenter_boxes_are_the_regions(segmenter):
    found = regions_of(IMAGE, boxes=[[2.5, 3, 10, 12], [0, 0, 60, 40]], segmenter=segmenter)
    assert [region.box for region in found] == [(2, 3, 10, 12), (0, 0, 60, 40)]
    assert [region.area for region in found] == [8 * 9, 60 * 40]
    assert found[0].score is None


def test_prompts_that_say_where_come_together_in_one_order():
    labels = np.zeros((40, 60), int)
    labels[30:, 50:] = 7
    found = regions_of(
        IMAGE, masks=[RANDOM], label_map=labels, boxes=[[20, 20, 30, 30]],
        points=[(10, 10), [(5, 30), (50, 30)]], point_labels=[1, [0, 1]], segmenter=Squares(),
    )  # fmt: skip
    assert [region.box for region in found] == [
        FoundRegion.of_mask(RANDOM).box, (50, 30, 60, 40), (22, 22, 29, 29), (7, 7, 14, 14), (47, 27, 54, 34),
    ]  # fmt: skip
    masks = region_masks((40, 60), masks=[region.mask for region in found])  # as the processor reads them
    assert (masks[0] == RANDOM).all()


def test_everything_and_texts_find_regions_by_themselves():
    assert len(regions_of(IMAGE, everything=True, segmenter=Squares())) == 2
    (found,) = regions_of(IMAGE, text="a red car", segmenter=Squares())
    assert (found.label, found.score) == ("a red car", 0.9)


@pytest.mark.parametrize(
    "points", [[(10, 10)], np.array([[10, 10]]), torch.tensor([[10.0, 10.0]]), [[(10, 10), (12, 11)]]]
)
def test_points_come_as_lists_arrays_and_tensors(points):
    assert regions_of(IMAGE, points=points, segmenter=Squares())[0].box == (7, 7, 14, 14)


REFUSED = {
    "nothing": ({}, "nothing says where the regions are; accepted: masks, boxes"),
    "everything beside boxes": (
        {"everything": True, "boxes": [[0, 0, 5, 5]], "segmenter": Squares()},
        "everything finds regions by itself, and boxes were given, too",
    ),
    "two that find": ({"everything": True, "text": "x", "segmenter": Squares()}, "text and everything were both given"),
    "an empty text": ({"text": " ", "segmenter": Squares()}, "text is ' '; accepted: a few words"),
    "points without a segmenter": ({"points": [(1, 1)]}, "needs a segmenter, got 'none'; accepted: 'classical'"),
    "everything without a segmenter": ({"everything": True}, "finding everything needs a segmenter"),
    "a text without a segmenter": ({"text": "car"}, "by a text needs a segmenter"),
    "labels without points": ({"point_labels": [1], "boxes": [[0, 0, 5, 5]]}, "point_labels were given without points"),
    "one bare point": ({"points": (3, 4), "segmenter": Squares()}, "points is one point"),
    "a point outside": ({"points": [(60, 4)], "segmenter": Squares()}, r"points\[0\] is at \(60, 4\), outside"),
    "no number": ({"points": [(float("nan"), 4)], "segmenter": Squares()}, r"points\[0\] is at \(nan, 4\)"),
    "three numbers": ({"points": [(1, 2, 3)], "segmenter": Squares()}, r"points\[0\] is 1; accepted: \(x, y\)"),
    "an empty entry": ({"points": [[]], "segmenter": Squares()}, r"points\[0\] is empty"),
    "labels of another number": (
        {"points": [(1, 1), (2, 2)], "point_labels": [1], "segmenter": Squares()},
        r"there are \[1\] labels for \[1, 1\] points",
    ),
    "no point inside": (
        {"points": [(1, 1)], "point_labels": [0], "segmenter": Squares()},
        r"the labels of points\[0\] are \[0\]; accepted: 1 \(inside",
    ),
    "a box outside": ({"boxes": [[0, 0, 90, 5]]}, r"boxes\[0\]"),
    "an empty mask": ({"masks": [np.zeros((40, 60), bool)]}, r"masks\[0\] is empty"),
    "an unknown segmenter": ({"everything": True, "segmenter": "/no/such/folder"}, "cannot be loaded"),
}


@pytest.mark.parametrize(("prompts", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_understood_is_refused_by_name(prompts, message):
    with pytest.raises(ValueError, match=message):
        regions_of(IMAGE, **prompts)


def test_an_object_without_the_methods_is_no_segmenter():
    with pytest.raises(TypeError, match="segmenter is a dict; accepted: a name"):
        regions_of(IMAGE, everything=True, segmenter={})
    assert isinstance(Squares(), Segmenter)
    assert isinstance(load_segmenter("none"), Segmenter)


def test_prompts_can_be_kept_and_asked_later():
    prompts = RegionPrompts(points=[(10, 10)])
    assert prompts.find(IMAGE, Squares())[0].box == (7, 7, 14, 14)


@pytest.mark.parametrize(
    ("package", "module", "load", "extra"),
    [
        ("skimage", "segmenters.merge_tree", lambda: load_segmenter("classical"), "segment"),
        ("av", "video.frames", lambda: import_module("perceptiondlm.serving.video"), "video"),
    ],
)
def test_a_missing_package_is_named_with_its_install_line(monkeypatch, package, module, load, extra):
    for name in [name for name in sys.modules if name.startswith("perceptiondlm.serving.")]:
        if module.split(".")[0] in name:
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf'pip install "perceptiondlm\[{extra}\]"'):
        load()


# --- the pipeline -----------------------------------------------------------------------------------------------------


@pytest.fixture
def pipe(model, processor):
    return RegionCaptioningPipeline(model=model, processor=processor, max_new_tokens=6, steps=6)


def test_the_pipeline_captions_what_a_segmenter_finds(pipe, scene):
    class Objects(Squares):
        def everything(self, image):
            self.asked.append(image)
            return [FoundRegion.of_mask(item.mask, 0.8) for item in scene.objects]

    segmenter = Objects()
    plain = pipe(scene.image, masks=[item.mask for item in scene.objects])
    found = pipe(scene.image, segmenter=segmenter, everything=True)
    assert segmenter.asked[0].size == scene.image.size
    assert [{key: region[key] for key in plain[0]} for region in found] == plain
    assert [region["mask_score"] for region in found] == [0.8] * len(plain)
    assert "label" not in found[0]
    again = pipe(scene.image, masks=[region["mask"] for region in found])
    assert again == plain


def test_points_and_boxes_of_several_images_go_through_the_segmenter(pipe):
    by_list = pipe([IMAGE, IMAGE], points=[[(10, 10)], [(20, 20), (30, 30)]], segmenter=Squares(), batch_size=2)
    assert [[tuple(r["box"].values()) for r in image] for image in by_list] == [
        [(7, 7, 14, 14)], [(17, 17, 24, 24), (27, 27, 34, 34)],
    ]  # fmt: skip
    samples = [{"image": IMAGE, "points": [[(1, 1), (30, 30)]], "point_labels": [[0, 1]]}]
    assert [tuple(r["box"].values()) for r in next(pipe(iter(samples), segmenter=Squares()))] == [(27, 27, 34, 34)]
    (boxed,) = pipe(IMAGE, boxes=[[20, 20, 30, 30]], segmenter=Squares())
    assert tuple(boxed["box"].values()) == (22, 22, 29, 29)


def test_an_image_in_which_nothing_is_found_has_no_captions(pipe):
    class Blind(Squares):
        def everything(self, image):
            return []

    assert pipe([IMAGE, IMAGE], segmenter=Blind(), everything=True) == [[], []]


WRONG_CALLS = {
    "no segmenter": ({"everything": True}, ValueError, "everything needs a segmenter"),
    "no method": ({"find": "car", "segmenter": object()}, TypeError, r"object without named\(...\)"),
    "regions beside": (
        {"everything": True, "segmenter": Squares(), "boxes": [[0, 0, 5, 5]]}, ValueError, "with everything a sample",
    ),
    "points alone": ({"points": [(3, 3)]}, ValueError, "a segmenter such as SAM"),
}  # fmt: skip


@pytest.mark.parametrize(("keywords", "kind", "message"), WRONG_CALLS.values(), ids=WRONG_CALLS)
def test_the_pipeline_names_what_does_not_go_together(pipe, keywords, kind, message):
    with pytest.raises(kind, match=message):
        pipe(IMAGE, **keywords)


def test_an_encoded_image_has_no_picture_for_a_segmenter(pipe):
    with pytest.raises(ValueError, match="an encoded image holds no picture"):
        pipe(pipe.encode_image(IMAGE), segmenter=Squares(), everything=True)
