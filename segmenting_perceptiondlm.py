"""Points, boxes, texts and "everything" become regions through a segmenter, whatever object that is.

A segmenter has the methods that a prompt needs: `at_points(image, points, labels)`, `at_boxes(image, boxes)`,
`named(image, text)` and `everything(image)`, each for an RGB picture; what they return are objects with a `mask` in any
form that the processor takes, and perhaps a `score` and a `label`. perceptiondlm.serving.segmenters has some.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from .regions_perceptiondlm import POINTS_NEED_A_SEGMENTER, regions_of, short


POINT_FORMS = "(x, y), or a list of (x, y) for several points of one region, in pixels inside the image"
POINT_LABELS = "1 (inside the region) or 0 (outside it), in the nesting of the points, one 1 at least per region"
NEEDS = {"points": "at_points", "boxes": "at_boxes", "find": "named", "everything": "everything"}


@dataclass(frozen=True)
class Finding:
    """How the regions of images are found.

    Args:
        segmenter: see the top of this file; None leaves boxes as they are and refuses everything else.
        everything: find all regions.
        find: a text; find what it names.
    """

    segmenter: Any = None
    everything: bool = False
    find: str | None = None

    def __post_init__(self) -> None:
        if self.find is not None and (not isinstance(self.find, str) or not self.find.strip()):
            raise ValueError(f"find is {short(self.find)}; accepted: a few words, such as 'red car'")
        if self.everything not in (True, False):
            raise ValueError(f"everything must be True or False, got {short(self.everything)}")
        if self.everything and self.find is not None:
            raise ValueError("everything and find were both given; accepted: one of them, since each finds regions")
        asked = self.by_itself
        if asked and self.segmenter is None:
            raise ValueError(f"{asked} needs a segmenter, which finds the regions; got none")
        if asked and not callable(getattr(self.segmenter, NEEDS[asked], None)):
            raise TypeError(f"the segmenter is a {type(self.segmenter).__name__} without {NEEDS[asked]}(...)")

    @property
    def by_itself(self) -> str | None:
        """Which prompt finds regions without any that say where: `"everything"`, `"find"` or None."""
        return "everything" if self.everything else "find" if self.find is not None else None

    def regions(self, picture: Image.Image, boxes: Any = None, points: Any = None, labels: Any = None) -> list[Any]:
        """The regions of boxes, then those of points; or all that `everything` or `find` finds.

        Args:
            picture: RGB.
            boxes: in every form of `regions_of`.
            points, labels: see `read_points`.
        """
        if self.everything:
            return list(self.segmenter.everything(picture))
        if self.find is not None:
            return list(self.segmenter.named(picture, self.find))
        if points is not None and self.segmenter is None:
            raise ValueError(f"{POINTS_NEED_A_SEGMENTER}; accepted: points with a segmenter")
        size = (picture.height, picture.width)
        read, signs = read_points(points, labels, size)
        corners = [] if boxes is None else [region.box for region in regions_of(size, boxes=boxes)]
        found: list[Any] = []
        for form, prompts in {"boxes": (corners,), "points": (read, signs)}.items():
            if not prompts[0]:
                continue
            method = getattr(self.segmenter, NEEDS[form], None)
            if not callable(method):
                raise TypeError(f"the segmenter is a {type(self.segmenter).__name__} without {NEEDS[form]}(...)")
            regions = list(method(picture, *prompts))
            if len(regions) != len(prompts[0]):
                raise ValueError(f"the segmenter gave {len(regions)} regions for {len(prompts[0])} {form}")
            found += regions
        return found


def read_points(points: Any, labels: Any, size: tuple[int, int]) -> tuple[list[list[tuple]], list[list[int]]]:
    """Points (x, y) in pixels and their labels, a list per region each; refuses what lies outside the image.

    Args:
        points: an entry per region: (x, y), or a list of (x, y) for several points of one region; lists, arrays,
            tensors.
        labels: with the nesting of the points, 1 for a point of the region, 0 for one outside; all 1 by default.
        size: (height, width) of the image, in pixels.
    """
    entries = [] if points is None else _listed(points, "points")
    if len(entries) == 2 and all(map(_is_number, entries)):
        raise ValueError(f"points is one point {short(entries)}; accepted: a list with an entry per region")
    found = [_points_of(entry, size, f"points[{index}]") for index, entry in enumerate(entries)]
    if labels is None:
        return found, [[1] * len(region) for region in found]
    given = [[entry] if _is_number(entry) else _listed(entry, "labels") for entry in _listed(labels, "labels")]
    counts, wanted = [len(entry) for entry in given], [len(entry) for entry in found]
    if counts != wanted:
        raise ValueError(f"there are {short(counts)} labels for {short(wanted)} points; accepted: {POINT_LABELS}")
    for index, entry in enumerate(given):
        if any(label not in (0, 1) for label in entry) or 1 not in entry:
            raise ValueError(f"the labels of points[{index}] are {short(entry)}; accepted: {POINT_LABELS}")
    return found, [[int(label) for label in entry] for entry in given]


def _points_of(entry: Any, size: tuple[int, int], name: str) -> list[tuple[float, float]]:
    """The points of one region."""
    values = _listed(entry, name)
    pairs = [values] if len(values) == 2 and all(map(_is_number, values)) else values
    if not pairs:
        raise ValueError(f"{name} is empty; accepted: {POINT_FORMS}")
    points = []
    for pair in pairs:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not all(map(_is_number, pair)):
            raise ValueError(f"{name} is {short(pair)}; accepted: {POINT_FORMS}")
        x, y = float(pair[0]), float(pair[1])
        if not (math.isfinite(x) and math.isfinite(y) and 0 <= x < size[1] and 0 <= y < size[0]):
            raise ValueError(
                f"{name} is at ({x:g}, {y:g}), outside of the image, {size[1]} x {size[0]} (width x height)"
            )
        points.append((x, y))
    return points


def _listed(value: Any, name: str) -> Sequence[Any]:
    if isinstance(value, (np.ndarray, torch.Tensor)):
        value = value.tolist()
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{name} is a {type(value).__name__}; accepted: a list")
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
