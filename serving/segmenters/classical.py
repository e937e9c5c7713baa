"""Regions without weights: superpixels merged by colour and edge (scikit-image), the merges kept as a tree.

Every region that existed on the way to a single one is a node of the tree ([`MergeTree`]), and the tree answers all
prompts:

- everything: the nodes that stand out most, no two of which overlap, without what surrounds them;
- a box: the superpixels inside the box that are unlike the ring around it;
- points: the node that holds all points of the region and none of the others, and stands out most.

Works on a copy of the image of at most `working_side` pixels; masks come back at full size. Deterministic.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from perceptiondlm.serving.found import FoundRegion
from perceptiondlm.serving.segmenters.merge_tree import MergeTree


RING = 0.15  # width of the ring around a box, in shares of its sides
LEAST_OF_BOX = 0.1  # share of a box that its region must have; below, the box itself is the region
LARGEST_SHARE = 0.6  # of the image, for a region of "everything"


class ClassicalSegmenter:
    """Superpixels merged by colour and edge; needs no weights, knows no objects.

    Args:
        working_side: longer side of the copy it works on, in pixels.
        superpixels: about so many of them.
        least_share: smallest region of "everything", as a share of the image.
        least_contrast: least that such a region must stand out, in [0, 1].
        most_regions: of "everything"; the largest are kept.
    """

    name = "classical"

    def __init__(
        self, working_side: int = 384, superpixels: int = 400, least_share: float = 0.002,
        least_contrast: float = 0.45, most_regions: int = 64,
    ):  # fmt: skip
        counts = {"working_side": working_side, "superpixels": superpixels, "most_regions": most_regions}
        for name, value in counts.items():
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        for name, share in {"least_share": least_share, "least_contrast": least_contrast}.items():
            if not 0 <= share <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {share!r}")
        self.working_side, self.superpixels, self.most_regions = working_side, superpixels, most_regions
        self.least_share, self.least_contrast = least_share, least_contrast
        self._last: tuple[bytes, MergeTree] | None = None

    def everything(self, image: Image.Image) -> list[FoundRegion]:
        """Regions that stand out, largest first, no two overlapping."""
        tree = self._tree(image)
        nodes = tree.best_partition(self.least_share, LARGEST_SHARE, self.least_contrast)
        nodes = sorted(nodes, key=lambda node: -tree.areas_M[node])[: self.most_regions]
        found = [self._found(tree, tree.members_MS[node], image, tree.contrast_M[node]) for node in nodes]
        return sorted(found, key=lambda region: -region.area)

    def at_boxes(self, image: Image.Image, boxes: Sequence[tuple[int, int, int, int]]) -> list[FoundRegion]:
        """What differs from the surroundings of each box, inside it; the box itself where hardly anything does."""
        tree = self._tree(image)
        return [self._at_box(tree, image, box) for box in boxes]

    def at_points(self, image: Image.Image, points: Sequence[Any], labels: Any = None) -> list[FoundRegion]:
        """The region around the points of each entry that stands out most."""
        tree = self._tree(image)
        found = []
        for index, entry in enumerate(points):
            pairs = [entry] if np.ndim(entry) == 1 else entry
            signs = [1] * len(pairs) if labels is None else np.atleast_1d(labels[index]).tolist()
            places = [self._superpixel(tree, image, pair) for pair in pairs]
            inside = {place for place, sign in zip(places, signs, strict=True) if sign}
            outside = {place for place, sign in zip(places, signs, strict=True) if not sign}
            if inside & outside:
                raise ValueError(f"points[{index}] has points inside and outside the region too close to tell apart")
            node = tree.best_around(sorted(inside), sorted(outside), LARGEST_SHARE)
            if node is None:  # no merge keeps them apart: the superpixels of the points alone
                members = np.isin(np.arange(tree.members_MS.shape[1]), sorted(inside))
                found.append(self._found(tree, members, image, 0.0))
            else:
                found.append(self._found(tree, tree.members_MS[node], image, tree.contrast_M[node]))
        return found

    def named(self, image: Image.Image, text: str) -> list[FoundRegion]:
        raise ValueError("the classical segmenter knows no words; accepted for texts: the Hub id or folder of a SAM 3")

    def _tree(self, image: Image.Image) -> MergeTree:
        """The tree of an image; that of the last one is kept, since prompts come one by one."""
        small = image.copy()
        small.thumbnail((self.working_side, self.working_side), Image.Resampling.BOX)
        key = small.tobytes() + repr(small.size).encode()
        last = self._last  # another thread may replace it
        if last is None or last[0] != key:
            last = self._last = (key, MergeTree.of_image(np.asarray(small), self.superpixels))
        return last[1]

    def _superpixel(self, tree: MergeTree, image: Image.Image, point: Sequence[float]) -> int:
        rows, columns = tree.labels_hw.shape
        x, y = (int(value * n / m) for value, n, m in zip(point, (columns, rows), image.size, strict=True))
        return int(tree.labels_hw[min(y, rows - 1), min(x, columns - 1)])

    def _found(self, tree: MergeTree, members_S: np.ndarray, image: Image.Image, score: float) -> FoundRegion:
        found = FoundRegion.of_mask(self._full(tree.mask(members_S), image), round(float(score), 4))
        assert found is not None  # a superpixel has pixels
        return found

    @staticmethod
    def _full(mask_hw: np.ndarray, image: Image.Image) -> np.ndarray:
        """A mask of the working copy at the image's own size."""
        return np.asarray(Image.fromarray(mask_hw).resize(image.size, Image.Resampling.NEAREST))

    def _at_box(self, tree: MergeTree, image: Image.Image, box: tuple[int, int, int, int]) -> FoundRegion:
        rows, columns = tree.labels_hw.shape
        scale = np.array([columns / image.width, rows / image.height] * 2)
        x0, y0, x1, y1 = np.array(box) * scale
        margin_x, margin_y = max(1.0, RING * (x1 - x0)), max(1.0, RING * (y1 - y0))
        inner = _area(tree.labels_hw.shape, (x0, y0, x1, y1))
        ring = _area(tree.labels_hw.shape, (x0 - margin_x, y0 - margin_y, x1 + margin_x, y1 + margin_y)) & ~inner
        chosen = tree.unlike_ring(inner, ring)
        mask = self._full(tree.mask(chosen), image)
        inside = np.zeros_like(mask)
        inside[box[1] : box[3], box[0] : box[2]] = True
        mask = mask & inside
        share = mask.sum() / inside.sum()
        if share < LEAST_OF_BOX:
            mask, share = inside, 0.0
        found = FoundRegion.of_mask(mask, round(float(share > 0) * tree.contrast_of(chosen), 4))
        assert found is not None  # a box has pixels
        return found


def _area(shape: tuple[int, ...], box: Sequence[float]) -> np.ndarray:
    """The pixels whose centres a box holds, at least one, bool (h, w)."""
    x0, y0, x1, y1 = box
    rows, columns = np.arange(shape[0]) + 0.5, np.arange(shape[1]) + 0.5
    inside_y, inside_x = (rows >= y0) & (rows < y1), (columns >= x0) & (columns < x1)
    if not inside_y.any():
        inside_y[min(int((y0 + y1) / 2), shape[0] - 1)] = True
    if not inside_x.any():
        inside_x[min(int((x0 + x1) / 2), shape[1] - 1)] = True
    return np.outer(inside_y, inside_x)
