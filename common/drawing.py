"""Pictures for people: an image with its regions tinted, outlined and numbered, captions beside it or next to them.

Sizes follow the picture: letters, lines and badges grow with its longer side, and small pictures are enlarged, so that
300 pixels and 4,000 pixels both read well. Colours are told apart by people with every kind of colour blindness, and
numbers say the same again. Letters are Pillow's own font, which has Latin ones alone.

Shape legend: H, W rows and columns of the picture, h, w of a region's box.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from pycocotools import mask as coco_mask

from perceptiondlm.common.label_places import Occupied, best_place
from perceptiondlm.common.palette import color_of
from perceptiondlm.common.text_blocks import TextBlock, badge, badge_side, legend


PLACES = ("beside", "inside")
LEAST_SIDE = 480  # shorter side that pictures with captions are enlarged to, in pixels
LEAST_LETTERS = 14  # pixels
LETTERS = {"beside": 44, "inside": 60}  # parts of the longer side that letters are high
TINT, HALO = 0.25, 0.7  # opacity of a region's colour inside it, and of the pale line around its outline
BADGE_SHARE = 0.12  # of a region that its number may cover; smaller regions get it beside them
MOST_LINES = 5  # of a caption inside the picture; the rest becomes "…"
MOST_COVERED = 0.15  # share of a caption inside the picture that may lie on regions; others go beside it


@dataclass(frozen=True)
class Mark:
    """A region on the canvas.

    Attributes:
        box: x0, y0, x1, y1 of its pixels, half-open.
        mask_hw: its pixels inside the box, bool.
        color: of its outline and badge.
        number: 1 for the first region.
    """

    box: tuple[int, int, int, int]
    mask_hw: np.ndarray
    color: tuple[int, int, int]
    number: int


def draw_regions(
    image: Image.Image, regions: Sequence[Any] | np.ndarray, captions: Sequence[str] | None = None,
    place: str = "beside", numbers: Sequence[int] | None = None,
) -> Image.Image:  # fmt: skip
    """Draw regions, numbered from 1, and their captions.

    Args:
        image: RGB.
        regions: masks (N, H, W) bool at the image's size, a list of such masks (H, W), of COCO RLEs, or of objects
            that hold one as `.mask`; none empty.
        captions: N texts; None draws no text, and the picture keeps its size.
        place: of the captions: `"beside"` the image, in a panel, or `"inside"`, next to each region and on none; those
            for which there is no room go into the panel.
        numbers: instead of 1 to N, which also choose the colours.

    Returns:
        RGB picture: the image, enlarged if small and captioned, with marks and captions.

    Raises:
        ValueError: for masks that are empty or of another size, and other numbers of captions than of regions.
    """
    if place not in PLACES:
        raise ValueError(f"place must be one of {PLACES}, got {place!r}")
    for name, given in {"captions": captions, "numbers": numbers}.items():
        if given is not None and len(given) != len(regions):
            raise ValueError(f"{len(regions)} masks need {len(regions)} {name}, got {len(given)}")
    scale = 1.0 if captions is None else max(1.0, LEAST_SIDE / min(image.size))
    size = (round(image.width * scale), round(image.height * scale))
    numbers = range(1, len(regions) + 1) if numbers is None else numbers
    masks = [_mask(region, image.size, size, f"regions[{index}]") for index, region in enumerate(regions)]
    marks = [_mark(mask_HW, number) for mask_HW, number in zip(masks, numbers, strict=True)]
    if size != image.size:
        image = image.resize(size, Image.Resampling.LANCZOS)
    font = ImageFont.load_default(size=letter_size(size, place))
    picture = _painted(image, marks)
    occupied = Occupied.of((size[1], size[0]), [(mark.box, mark.mask_hw) for mark in marks])
    blocks = [] if captions is None else _blocks(marks, captions)
    left = list(zip(marks, blocks, strict=True)) if blocks else [(mark, None) for mark in marks]
    if place == "inside":
        left = _label(picture, left, occupied, font)
    _number(picture, [mark for mark, _ in left], occupied, font)
    beside = [block for _, block in left if block is not None]
    return legend(picture, beside, font) if beside else picture


def letter_size(size: tuple[int, int], place: str = "beside") -> int:
    """Height of the letters of a picture (width, height), in pixels."""
    return max(LEAST_LETTERS, max(size) // LETTERS[place])


def _mask(region: Any, given: tuple[int, int], wanted: tuple[int, int], name: str) -> np.ndarray:
    """A region's pixels, bool (H, W), brought from the image's size to the picture's, (width, height) both."""
    region = getattr(region, "mask", region)
    mask_HW = coco_mask.decode(_packed(region)) if isinstance(region, dict) else np.asarray(region)
    if mask_HW.shape != (given[1], given[0]):
        raise ValueError(f"{name} is {' x '.join(map(str, mask_HW.shape))}; accepted: {given[1]} x {given[0]}")
    if not mask_HW.any():
        raise ValueError(f"{name} is empty (0 pixels set); accepted: at least 1 pixel")
    mask_HW = mask_HW.astype(bool)
    if given == wanted:
        return mask_HW
    return np.asarray(Image.fromarray(mask_HW).resize(wanted, Image.Resampling.NEAREST))


def _mark(mask_HW: np.ndarray, number: int) -> Mark:
    rows, columns = np.flatnonzero(mask_HW.any(axis=1)), np.flatnonzero(mask_HW.any(axis=0))
    x0, x1, y0, y1 = int(columns[0]), int(columns[-1]) + 1, int(rows[0]), int(rows[-1]) + 1
    return Mark((x0, y0, x1, y1), mask_HW[y0:y1, x0:x1], color_of(number - 1), number)


def _packed(rle: dict[str, Any]) -> dict[str, Any]:
    """A COCO RLE in the form that pycocotools decodes."""
    if isinstance(rle["counts"], (list, tuple)):
        return coco_mask.frPyObjects(rle, *rle["size"])
    return rle


def _painted(image: Image.Image, marks: Sequence[Mark]) -> Image.Image:
    """The image with tints and outlines; an outline has a thin pale line around it, to stand out from anything."""
    picture = image.copy()
    width = max(2, max(image.size) // 320)
    halo = max(1, width // 3)
    for mark in marks:
        _paint(picture, mark.color, mark.mask_hw, mark.box, TINT)
    for mark in marks:
        grown, box = _grown(mark, halo, picture.size)
        inner = _shrunk(grown, halo)
        _paint(picture, (255, 255, 255), grown & ~inner, box, HALO)
        _paint(picture, mark.color, inner & ~_shrunk(inner, width), box, 1.0)
    return picture


def _paint(picture: Image.Image, color, mask_hw: np.ndarray, box: tuple[int, int, int, int], opacity: float) -> None:
    picture.paste(color, box, Image.fromarray(mask_hw.astype(np.uint8) * np.uint8(round(255 * opacity))))


def _grown(mark: Mark, width: int, size: tuple[int, int]) -> tuple[np.ndarray, tuple[int, int, int, int]]:
    """A mask grown by `width` pixels, and its box, both within a picture of (width, height)."""
    x0, y0, x1, y1 = mark.box
    grown = ~_shrunk(~np.pad(mark.mask_hw, width), width, outside=True)
    left, top = min(width, x0), min(width, y0)
    right, bottom = min(width, size[0] - x1), min(width, size[1] - y1)
    rows = slice(width - top, grown.shape[0] - width + bottom)
    columns = slice(width - left, grown.shape[1] - width + right)
    return grown[rows, columns], (x0 - left, y0 - top, x1 + right, y1 + bottom)


def _shrunk(mask: np.ndarray, width: int, outside: bool = False) -> np.ndarray:
    """The pixels of a mask at least `width` pixels from its border; `outside` says what lies beyond the array."""
    padded = np.pad(mask, width, constant_values=outside)
    shrunk = mask.copy()
    diagonal = round(0.7 * width)
    steps = [(-width, 0), (width, 0), (0, -width), (0, width)]
    steps += [(dy, dx) for dy in (-diagonal, diagonal) for dx in (-diagonal, diagonal)]
    for dy, dx in steps:
        shrunk &= padded[width + dy : width + dy + mask.shape[0], width + dx : width + dx + mask.shape[1]]
    return shrunk


def _center(mark: Mark) -> tuple[int, int]:
    """The mask pixel closest to its centroid, (x, y)."""
    ys, xs = np.nonzero(mark.mask_hw)
    nearest = np.argmin((ys - ys.mean()) ** 2 + (xs - xs.mean()) ** 2)
    return int(xs[nearest]) + mark.box[0], int(ys[nearest]) + mark.box[1]


def _number(picture: Image.Image, marks: Sequence[Mark], occupied: Occupied, font) -> None:
    """A badge per region: on large ones, beside small ones, where it hides no other."""
    draw = ImageDraw.Draw(picture)
    for mark in sorted(marks, key=lambda mark: mark.mask_hw.sum()):
        side = round(badge_side(str(mark.number), font))
        x, y = _center(mark)
        corner = (x - side // 2, y - side // 2)
        if side * side > BADGE_SHARE * mark.mask_hw.sum():
            corner, _ = best_place(occupied, (side, side), mark.box)
            _lead(draw, (*corner, corner[0] + side, corner[1] + side), mark, font)
        occupied.take((*corner, corner[0] + side, corner[1] + side))
        badge(draw, (corner[0] + side / 2, corner[1] + side / 2), str(mark.number), mark.color, font)


def _lead(draw, box: tuple[int, int, int, int], mark: Mark, font) -> None:
    """A line from a label to the nearest pixel of its region, and a dot there."""
    x0, y0, x1, y1 = box
    ys, xs = np.nonzero(mark.mask_hw)
    xs, ys = xs + mark.box[0], ys + mark.box[1]
    away = np.maximum(np.maximum(x0 - xs, xs - x1), 0) ** 2 + np.maximum(np.maximum(y0 - ys, ys - y1), 0) ** 2
    nearest = int(away.argmin())
    end = (int(xs[nearest]), int(ys[nearest]))
    start = (min(max(end[0], x0), x1), min(max(end[1], y0), y1))
    width = max(2, font.size // 9)
    draw.line((*start, *end), fill="white", width=width + 2)
    draw.line((*start, *end), fill=mark.color, width=width)
    draw.circle(end, 1.5 * width, fill=mark.color, outline="white")


def _blocks(marks: Sequence[Mark], captions: Sequence[str]) -> list[TextBlock]:
    return [TextBlock(str(m.number), m.color, text or "(no caption)") for m, text in zip(marks, captions, strict=True)]


def _label(picture: Image.Image, pairs: list[tuple[Mark, Any]], occupied: Occupied, font) -> list[tuple[Mark, Any]]:
    """Captions on the picture, small regions first, since they have least room around them; returns those left over."""
    draw = ImageDraw.Draw(picture, "RGBA")
    width = min(picture.width - 2, max(11 * font.size, picture.width // 4))
    placed, left = [], []
    for mark, block in sorted(pairs, key=lambda pair: pair[0].mask_hw.sum()):
        lines = block.wrapped(font, width, MOST_LINES)
        size = block.size(lines, font)
        corner, covered = best_place(occupied, size, mark.box)
        if covered > MOST_COVERED:
            left.append((mark, block))
            continue
        box = (*corner, corner[0] + size[0], corner[1] + size[1])
        occupied.take(box)
        placed.append((block, corner, lines))
        _lead(draw, box, mark, font)
    for block, corner, lines in placed:  # above all lines
        block.draw(draw, corner, lines, font)
    return sorted(left, key=lambda pair: pair[0].number)
