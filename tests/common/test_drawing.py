"""Pictures of regions: what is marked, what stays as it was, where captions go, and that they can be read."""

import numpy as np
import pytest
from PIL import Image, ImageFont
from pycocotools import mask as coco_mask

from perceptiondlm.common.drawing import draw_regions, letter_size
from perceptiondlm.common.label_places import Occupied, best_place
from perceptiondlm.common.palette import PALETTE, color_of, contrast, ink_on
from perceptiondlm.common.text_blocks import wrap


LONG = "a large striped red house with a blue roof, two windows and a door, beside a small tree " * 2


def masks_of(size, *boxes):
    masks = np.zeros((len(boxes), size[1], size[0]), bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes, strict=True):
        mask[y0:y1, x0:x1] = True
    return masks


@pytest.mark.parametrize("size", [(300, 200), (300, 300), (4000, 3000), (4000, 700), (500, 4000)])
@pytest.mark.parametrize("place", ["beside", "inside"])
def test_letters_grow_with_the_picture_and_everything_lies_inside(size, place):
    width, height = size
    masks = masks_of(
        size, (width // 10, height // 10, width // 3, height // 2), (width // 2, height // 2, width - 5, height - 5)
    )
    picture = draw_regions(Image.new("RGB", size, "white"), masks, [LONG, "a tree"], place=place)
    letters = letter_size(size, place)
    assert letters >= 14
    assert letters >= max(size) / 62  # readable when a screen shows the whole picture
    shown = np.asarray(picture)
    assert (shown < 60).all(axis=2).sum() > letters * 20  # dark letters
    if place == "inside" and size != (500, 4000):
        assert picture.width / picture.height == pytest.approx(width / height, rel=0.02)
    else:
        assert picture.width * picture.height < 6 * max(size[0] * size[1], 480 * 480)


def test_captions_inside_cover_no_region_where_there_is_room():
    size = (800, 600)
    masks = masks_of(size, (50, 50, 350, 300), (500, 350, 700, 560), (400, 80, 430, 110))
    plain = np.asarray(draw_regions(Image.new("RGB", size, (120, 160, 120)), masks))
    captioned = np.asarray(
        draw_regions(Image.new("RGB", size, (120, 160, 120)), masks, ["a house", "a red car", "a cat"], "inside")
    )
    changed = (plain != captioned).any(axis=2)
    paper = (captioned > 200).all(axis=2) & changed
    assert paper.sum() > 1000
    assert (paper & masks.any(axis=0)).sum() < 0.02 * paper.sum()  # leader lines alone


def test_labels_do_not_cover_each_other():
    occupied = Occupied.of((600, 800), [])
    boxes = []
    for _ in range(12):
        corner, _ = best_place(occupied, (180, 60), (390, 290, 410, 310))
        box = (*corner, corner[0] + 180, corner[1] + 60)
        assert box[0] >= 0
        assert box[2] <= 800
        assert box[1] >= 0
        assert box[3] <= 600
        for other in boxes:
            across = min(box[2], other[2]) - max(box[0], other[0])
            down = min(box[3], other[3]) - max(box[1], other[1])
            assert across <= 7 or down <= 7  # a cell of the grid
        boxes.append(box)
        occupied.take(box)


def test_numbers_of_small_regions_stand_beside_them():
    size = (480, 480)
    masks = masks_of(size, (200, 200, 212, 212), (20, 300, 180, 460))
    picture = np.asarray(draw_regions(Image.new("RGB", size, "white"), masks)).astype(int)
    small = picture[203:209, 203:209].reshape(-1, 3)
    tinted = 0.75 * 255 + 0.25 * np.array(color_of(0))
    assert np.abs(small - tinted).max() <= 40  # its pixels can be seen
    badge = np.abs(picture - np.array(color_of(0))).max(axis=2) < 10
    badge[198:214, 198:214] = False
    assert badge.sum() > 100  # the badge is elsewhere


def test_regions_come_in_every_form_and_numbers_choose_colours():
    size = (100, 80)
    masks = masks_of(size, (10, 10, 40, 40))
    packed = coco_mask.encode(np.asfortranarray(masks[0].astype(np.uint8)))
    plain = {"size": [80, 100], "counts": [10 * 80 + 10, *[30, 50] * 29, 30, 80 * 100 - 39 * 80 - 40]}

    class Found:
        mask = packed

    image = Image.new("RGB", size, "white")
    pictures = [np.asarray(draw_regions(image, form)) for form in (masks, [packed], [plain], [Found()])]
    assert all((picture == pictures[0]).all() for picture in pictures)
    other = np.asarray(draw_regions(image, masks, numbers=[2]))
    assert (other[12, 12] != pictures[0][12, 12]).any()


def test_what_does_not_fit_is_refused():
    image, masks = Image.new("RGB", (100, 80)), masks_of((100, 80), (0, 0, 9, 9))
    for arguments, message in (
        ({"regions": masks, "captions": ["a", "b"]}, "1 masks need 1 captions, got 2"),
        ({"regions": masks_of((90, 80), (0, 0, 9, 9))}, r"regions\[0\] is 80 x 90; accepted: 80 x 100"),
        ({"regions": np.zeros((1, 80, 100), bool)}, r"regions\[0\] is empty"),
        ({"regions": masks, "place": "above"}, "place must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            draw_regions(image, **arguments)


@pytest.mark.parametrize("text", [LONG, "a" * 300, "", "  one\n two  "])
def test_wrapped_lines_hold_the_text_and_fit(text):
    font = ImageFont.load_default(size=20)
    lines = wrap(text, font, 200)
    assert "".join(lines).replace(" ", "") == "".join(text.split())
    assert all(font.getlength(line) <= 200 for line in lines)


# Machado, Oliveira and Fernandes 2009, severity 1, on linear RGB.
BLINDNESS = {
    "none": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


@pytest.mark.parametrize("matrix", BLINDNESS.values(), ids=BLINDNESS)
def test_colours_are_told_apart_with_every_kind_of_sight(matrix):
    color = pytest.importorskip("skimage.color", reason="colour distances need scikit-image")
    shares = np.array(PALETTE) / 255
    linear = np.where(shares <= 0.04045, shares / 12.92, ((shares + 0.055) / 1.055) ** 2.4) @ np.array(matrix).T
    linear = np.clip(linear, 0, 1)
    seen = np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)
    lab = color.rgb2lab(seen[None])[0]
    apart = [color.deltaE_ciede2000(one, other) for i, one in enumerate(lab) for other in lab[:i]]
    assert min(apart) > 12


def test_numbers_read_on_their_colours_and_colours_on_white():
    for one in PALETTE:
        assert contrast(one, (255, 255, 255)) >= 3
        assert contrast(one, ink_on(one)) >= 4.5
