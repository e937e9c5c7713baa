"""Where a label goes on a picture: near its region, on no region and no other label where there is room.

A coarse grid remembers what is covered. Shape legend: R x C its cells, A x B the places of a label's upper left cell.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image


CELLS = 128  # of the grid along the longer side
ON_LABEL, ON_REGION, AWAY = (
    20.0,
    4.0,
    2.0,
)  # costs: whole label on others, on regions; as far away as the picture is long


@dataclass
class Occupied:
    """What labels should not cover.

    Attributes:
        step: pixels per cell.
        size: height and width of the picture in pixels.
        regions_RC: share of each cell that regions cover, in [0, 1].
        labels_RC: the same for labels.
    """

    step: float
    size: tuple[int, int]
    regions_RC: np.ndarray
    labels_RC: np.ndarray

    @classmethod
    def of(cls, size: tuple[int, int], regions: Sequence[tuple[tuple[int, int, int, int], np.ndarray]]) -> Occupied:
        """A picture (height, width) with regions: the box and the pixels in it, bool (h, w), of each."""
        step = max(1.0, max(size) / CELLS)
        union = np.zeros(size, np.uint8)
        for (x0, y0, x1, y1), mask_hw in regions:
            union[y0:y1, x0:x1] |= mask_hw.astype(np.uint8)
        rows, columns = (max(1, round(length / step)) for length in size)
        shares = Image.fromarray(union * 255).resize((columns, rows), Image.Resampling.BOX)
        covered = np.asarray(shares, np.float64) / 255
        return cls(step, size, covered, np.zeros_like(covered))

    def take(self, box: tuple[int, int, int, int]) -> None:
        """Remember a label."""
        x0, y0, x1, y1 = (value / self.step for value in box)
        self.labels_RC[int(y0) : int(np.ceil(y1)), int(x0) : int(np.ceil(x1))] = 1.0


def best_place(
    occupied: Occupied, size: tuple[int, int], box: tuple[int, int, int, int]
) -> tuple[tuple[int, int], float]:
    """Where a label of (width, height) pixels for the region with a box goes, within the picture.

    Returns:
        the upper left corner (x, y) in pixels, and the share of the label that covers regions or labels there.
    """
    rows, columns = occupied.regions_RC.shape
    high, wide = (min(n, int(np.ceil(s / occupied.step))) for n, s in ((rows, size[1]), (columns, size[0])))
    on_region_AB = _window_means(occupied.regions_RC, high, wide)
    on_label_AB = _window_means(occupied.labels_RC, high, wide)
    cost_AB = ON_REGION * on_region_AB + ON_LABEL * on_label_AB
    x0, y0, x1, y1 = (value / occupied.step for value in box)
    tops_A, lefts_B = np.arange(cost_AB.shape[0])[:, None], np.arange(cost_AB.shape[1])[None]
    gap_y = np.maximum(np.maximum(y0 - (tops_A + high), tops_A - y1), 0)
    gap_x = np.maximum(np.maximum(x0 - (lefts_B + wide), lefts_B - x1), 0)
    cost_AB += AWAY * np.hypot(gap_x, gap_y) / max(rows, columns)
    centred = np.hypot(tops_A + high / 2 - (y0 + y1) / 2, lefts_B + wide / 2 - (x0 + x1) / 2)
    cost_AB += 0.1 * centred / max(rows, columns)  # of equally good places the one nearest to the middle
    top, left = np.unravel_index(int(cost_AB.argmin()), cost_AB.shape)
    y = min(round(top * occupied.step), max(0, occupied.size[0] - size[1]))
    x = min(round(left * occupied.step), max(0, occupied.size[1] - size[0]))
    return (int(x), int(y)), float(on_region_AB[top, left] + on_label_AB[top, left])


def _window_means(values_RC: np.ndarray, high: int, wide: int) -> np.ndarray:
    """Mean of every window of high x wide cells, (R - high + 1, C - wide + 1)."""
    sums = np.pad(values_RC.cumsum(axis=0).cumsum(axis=1), ((1, 0), (1, 0)))
    windows = sums[high:, wide:] - sums[:-high, wide:] - sums[high:, :-wide] + sums[:-high, :-wide]
    return windows / (high * wide)
