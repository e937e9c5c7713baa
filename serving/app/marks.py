"""What a visitor marks on the picture, checked: boxes, points and brush strokes become regions.

Marks come from a browser, so nothing about them is taken for granted.
"""

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from perceptiondlm.serving.found import FoundRegion
from perceptiondlm.serving.prompts import regions_of
from perceptiondlm.serving.segmenters import Segmenter


MOST_POINTS = 20_000  # of all strokes of a brush together
SMALLEST_BOX = 2  # pixels of each side; less is a slip of the hand


def region_of_mark(mark: Mapping[str, Any], image: Image.Image, segmenter: Segmenter, fit: bool) -> FoundRegion:
    """The region that a mark shows.

    Args:
        mark: `{"kind": "box", "box": [x0, y0, x1, y1]}`, `{"kind": "point", "point": [x, y]}` or `{"kind": "brush",
            "strokes": [[[x, y], ...], ...], "radius": r}`, all in image pixels.
        image: RGB.
        segmenter: makes masks of points, and of boxes with `fit`.
        fit: fit boxes to the object inside.
    Raises:
        ValueError: naming what is wrong with the mark.
    """
    kind = mark.get("kind")
    if kind == "box":
        box = checked_box(mark.get("box"), image.size)
        found = regions_of(image, boxes=[box], segmenter=segmenter if fit else None)
    elif kind == "point":
        found = regions_of(image, points=[checked_point(mark.get("point"), image.size)], segmenter=segmenter)
    elif kind == "brush":
        region = FoundRegion.of_mask(brushed(mark.get("strokes"), mark.get("radius"), image.size))
        found = [] if region is None else [region]
    else:
        raise ValueError(f"a mark is a box, point or brush, got {kind!r}")
    if not found:
        raise ValueError("the brush marked no pixel of the image")
    return found[0]


def checked_point(point: Any, size: tuple[int, int]) -> tuple[float, float]:
    """A point (x, y) inside an image of (width, height) pixels; less than a pixel outside is moved in."""
    x, y = _numbers(point, 2, "a point")
    width, height = size
    if not (-1 <= x <= width and -1 <= y <= height):
        raise ValueError(f"point {x:.0f}, {y:.0f} lies outside the image of {width} x {height} pixels")
    return min(max(x, 0.0), width - 1.0), min(max(y, 0.0), height - 1.0)


def checked_box(box: Any, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """A box cut to an image of (width, height) pixels: x0, y0, x1, y1, half-open, grown to whole pixels."""
    xa, ya, xb, yb = _numbers(box, 4, "a box")
    width, height = size
    x0, x1 = (min(max(x, 0), width) for x in sorted((xa, xb)))
    y0, y1 = (min(max(y, 0), height) for y in sorted((ya, yb)))
    if x1 - x0 < SMALLEST_BOX or y1 - y0 < SMALLEST_BOX:
        raise ValueError(f"that box has less than {SMALLEST_BOX} pixels of the image on a side: drag a larger one")
    return int(x0), int(y0), int(np.ceil(x1)), int(np.ceil(y1))


def brushed(strokes: Any, radius: Any, size: tuple[int, int]) -> np.ndarray:
    """Pixels (H, W) bool that strokes with a round brush cover."""
    (radius,) = _numbers([radius], 1, "a brush's radius")
    if not 0.5 <= radius <= max(size):
        raise ValueError(f"the brush's radius is between 0.5 and {max(size)} pixels, got {radius:g}")
    if not isinstance(strokes, Sequence) or isinstance(strokes, str) or not strokes:
        raise ValueError("a brush mark needs a list of strokes")
    if not all(isinstance(stroke, Sequence) and stroke for stroke in strokes):
        raise ValueError("a stroke is a list of points")
    if (count := sum(len(stroke) for stroke in strokes)) > MOST_POINTS:
        raise ValueError(f"a brush mark has at most {MOST_POINTS} points, got {count}")
    canvas = Image.new("1", size)
    draw = ImageDraw.Draw(canvas)
    for stroke in strokes:
        points = [_numbers(point, 2, "a stroke's point") for point in stroke]
        if len(points) > 1:
            draw.line(points, fill=1, width=max(1, round(2 * radius)), joint="curve")
        for x, y in points:
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=1)
    return np.asarray(canvas, dtype=bool)


def _numbers(values: Any, count: int, what: str) -> tuple[float, ...]:
    """`count` finite numbers of a size that pixels have."""
    if not isinstance(values, Sequence) or isinstance(values, str) or len(values) != count:
        raise ValueError(f"{what} needs {count} number{'s' * (count > 1)}, got {str(values)[:80]}")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not isfinite(value) or abs(value) > 1e6:
            raise ValueError(f"{what} needs numbers of pixels, got {str(value)[:80]}")
    return tuple(float(value) for value in values)
