"""A region as its box and the shares of cells that it covers, computed without ever holding its full mask.

A region is kept either as the crop of its mask, or, where it came as run lengths, as vertical strips. Both answer the
same questions with the same numbers.

Shape legend: H rows, W columns of the image, h, w of the box, S strips, R x C cells of a grid, B bins per side.
Boxes are x0, y0, x1, y1 in pixels, half-open (x1, y1 lie just outside).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch


MOST_BYTES_OF_A_RUN = 12  # of a compressed RLE: 60 bits
STRIPS_AT_ONCE = 4096  # bounds the memory of pooling: this many times R + C numbers


@dataclass(frozen=True)
class Region(ABC):
    """One region of an image, with at least one pixel.

    Args:
        image_size: (H, W) in pixels.
        box: x0, y0, x1, y1, tight and half-open.
        area: pixels.
        tells_size: whether its form told the size of the image it belongs to, as masks do and polygons do not.
    """

    image_size: tuple[int, int]
    box: tuple[int, int, int, int]
    area: int
    tells_size: bool

    @abstractmethod
    def crop(self) -> np.ndarray:
        """The mask inside the box, bool (h, w)."""

    @abstractmethod
    def _sums(self, x_edges: np.ndarray, y_edges: np.ndarray) -> np.ndarray:
        """Pixels of the region in each cell, in parts where an edge cuts one; float64 (R, C)."""

    def mask(self) -> np.ndarray:
        """The full mask, bool (H, W)."""
        x0, y0, x1, y1 = self.box
        mask_HW = np.zeros(self.image_size, dtype=bool)
        mask_HW[y0:y1, x0:x1] = self.crop()
        return mask_HW

    def pool(self, x_edges: np.ndarray, y_edges: np.ndarray) -> np.ndarray:
        """Return the share of each cell of a grid that the region covers; a pixel cut by an edge counts in part.

        Args:
            x_edges: (C + 1,) increasing positions in [0, W], in pixels, fractions allowed.
            y_edges: (R + 1,) increasing positions in [0, H].

        Returns:
            float32 (R, C) in [0, 1], summed in float64; above 0 where a cell meets the region.

        Raises:
            ValueError: if the edges are not as described.
        """
        x_edges = _checked_edges(x_edges, self.image_size[1], "x_edges")
        y_edges = _checked_edges(y_edges, self.image_size[0], "y_edges")
        return (self._sums(x_edges, y_edges) / np.outer(np.diff(y_edges), np.diff(x_edges))).astype(np.float32)

    def coverage(self, bins: int) -> np.ndarray:
        """Return the exact share of each of bins x bins parts of the box that the region covers, however small.

        Returns:
            float32 (B, B) in [0, 1], rows first.

        Raises:
            ValueError: if bins < 1.
        """
        if bins < 1:
            raise ValueError(f"a box was to be covered in {bins} bins; accepted: at least 1")
        x0, y0, x1, y1 = self.box
        return self.pool(np.linspace(x0, x1, bins + 1), np.linspace(y0, y1, bins + 1))


@dataclass(frozen=True)
class CroppedRegion(Region):
    """A region kept as the crop of its mask, bool (h, w)."""

    pixels: np.ndarray

    @classmethod
    def of_mask(cls, mask_HW: np.ndarray, tells_size: bool = True) -> CroppedRegion | None:
        """The region of a bool mask (H, W), sharing its memory; None where no pixel is set."""
        rows = np.flatnonzero(mask_HW.any(axis=1))
        if rows.size == 0:
            return None
        y0, y1 = int(rows[0]), int(rows[-1]) + 1
        columns = np.flatnonzero(mask_HW[y0:y1].any(axis=0))
        x0, x1 = int(columns[0]), int(columns[-1]) + 1
        crop = mask_HW[y0:y1, x0:x1]
        height, width = mask_HW.shape
        return cls((height, width), (x0, y0, x1, y1), int(np.count_nonzero(crop)), tells_size, crop)

    def crop(self) -> np.ndarray:
        return self.pixels

    def _sums(self, x_edges: np.ndarray, y_edges: np.ndarray) -> np.ndarray:
        x0, y0, _, _ = self.box
        rows_Rw = _row_sums(self.pixels, y_edges, y0)
        return _row_sums(rows_Rw.T, x_edges, x0).T


@dataclass(frozen=True)
class StripedRegion(Region):
    """A region kept as vertical strips, ordered by column, then from top to bottom.

    Args:
        columns, tops, bottoms: (S,) int64; a strip covers rows tops to bottoms (half-open) of its column.
    """

    columns: np.ndarray
    tops: np.ndarray
    bottoms: np.ndarray

    @classmethod
    def of_runs(cls, runs: np.ndarray, image_size: tuple[int, int]) -> StripedRegion | None:
        """The region of run lengths as COCO counts them: column by column, zeros first, summing to H * W."""
        ends = np.cumsum(runs, dtype=np.int64)
        starts, ends = ends[:-1:2], ends[1::2]
        kept = ends > starts
        starts, ends, height = starts[kept], ends[kept], image_size[0]
        if starts.size == 0:
            return None
        first, last = starts // height, (ends - 1) // height
        counts = last - first + 1  # a run that goes on in the next column becomes a strip of each
        run = np.repeat(np.arange(starts.size), counts)
        place = np.arange(run.size) - np.repeat(np.cumsum(counts) - counts, counts)
        columns = first[run] + place
        tops = np.where(place == 0, starts[run] % height, 0)
        bottoms = np.where(columns == last[run], (ends[run] - 1) % height + 1, height)
        return cls.of_strips(columns, tops, bottoms, image_size, tells_size=True)

    @classmethod
    def of_box(cls, box: tuple[int, int, int, int], image_size: tuple[int, int]) -> StripedRegion:
        """A filled box."""
        x0, y0, x1, y1 = box
        columns = np.arange(x0, x1)
        return cls.of_strips(columns, np.full_like(columns, y0), np.full_like(columns, y1), image_size, False)

    @classmethod
    def of_strips(cls, columns, tops, bottoms, image_size, tells_size: bool) -> StripedRegion:
        """A region of at least one strip."""
        box = (int(columns[0]), int(tops.min()), int(columns[-1]) + 1, int(bottoms.max()))
        return cls(image_size, box, int((bottoms - tops).sum()), tells_size, columns, tops, bottoms)

    def crop(self) -> np.ndarray:
        x0, y0, x1, y1 = self.box
        height, width = y1 - y0, x1 - x0
        offsets = (self.columns - x0) * height - y0
        turns = np.stack((self.tops + offsets, self.bottoms + offsets), axis=1).ravel()
        lengths = np.diff(turns, prepend=0, append=height * width)
        flat = np.repeat(np.arange(lengths.size) % 2 == 1, lengths)
        return torch.from_numpy(flat.reshape(width, height)).T.contiguous().numpy()  # three times as fast as numpy's

    def _sums(self, x_edges: np.ndarray, y_edges: np.ndarray) -> np.ndarray:
        sums_RC = np.zeros((len(y_edges) - 1, len(x_edges) - 1))
        for start in range(0, self.columns.size, STRIPS_AT_ONCE):
            part = slice(start, start + STRIPS_AT_ONCE)
            heights_SR = _overlaps(self.tops[part], self.bottoms[part], y_edges)
            sums_RC += heights_SR.T @ _overlaps(self.columns[part], self.columns[part] + 1, x_edges)
        return sums_RC


def _overlaps(starts: np.ndarray, ends: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Length of each interval inside each cell between neighbouring edges, float64 (intervals, cells)."""
    return np.clip(np.minimum(ends[:, None], edges[1:]) - np.maximum(starts[:, None], edges[:-1]), 0, None)


def _row_sums(values_hw: np.ndarray, edges: np.ndarray, first_row: int) -> np.ndarray:
    """Sum over the rows between neighbouring edges, float64 (R, w); one band of rows at a time."""
    end = first_row + values_hw.shape[0]
    sums_Rw = np.zeros((len(edges) - 1, values_hw.shape[1]))
    for index, (low, high) in enumerate(pairwise(edges)):
        rows = np.arange(max(int(np.floor(low)), first_row), min(int(np.ceil(high)), end))
        if rows.size:
            lengths = np.minimum(rows + 1, high) - np.maximum(rows, low)
            band = values_hw[rows[0] - first_row : rows[-1] + 1 - first_row]
            sums_Rw[index] = lengths @ band.astype(np.float64)
    return sums_Rw


def _checked_edges(edges: np.ndarray, limit: int, name: str) -> np.ndarray:
    edges = np.asarray(edges, dtype=np.float64)
    inside = edges.ndim == 1 and edges.size > 1 and edges[0] >= 0 and edges[-1] <= limit
    if not (inside and (np.diff(edges) > 0).all()):
        raise ValueError(f"{name} is {edges.tolist()}; accepted: 2 or more increasing values in [0, {limit}]")
    return edges


def decode_counts(counts: str | bytes, name: str) -> np.ndarray:
    """Runs of a compressed COCO RLE: 5 bits a byte, from the fourth run on as difference to two runs before.

    Read here because pycocotools decodes a string cut short into uninitialised memory; runs can be checked.
    """
    text = counts.encode(errors="surrogatepass") if isinstance(counts, str) else counts
    codes = np.frombuffer(text, dtype=np.uint8).astype(np.int64) - 48
    strange = np.flatnonzero((codes < 0) | (codes > 63))
    if strange.size:
        raise ValueError(f"{name} has byte {codes[strange[0]] + 48} in its RLE string; accepted: 48 to 111")
    ends = np.flatnonzero((codes & 32) == 0)  # the last byte of a number, which carries its sign
    if codes.size and (ends.size == 0 or ends[-1] != codes.size - 1):
        raise ValueError(f"{name} has an RLE string that ends inside a number; accepted: complete strings")
    if not ends.size:
        return np.zeros(0, dtype=np.int64)
    starts = np.concatenate(([0], ends[:-1] + 1))
    lengths = ends - starts + 1
    if lengths.max() > MOST_BYTES_OF_A_RUN:
        raise ValueError(f"{name} has a number of {lengths.max()} bytes in its RLE string; accepted: up to 12")
    place = np.arange(codes.size) - np.repeat(starts, lengths)
    runs = np.add.reduceat((codes & 31) << (5 * place), starts)
    runs -= np.where(codes[ends] & 16, np.int64(1) << (5 * lengths), 0)
    if np.abs(runs).sum(dtype=np.float64) >= 2**62:
        raise ValueError(f"{name} has RLE counts whose sum is beyond any image; accepted: runs that fit the image")
    runs[1::2], runs[2::2] = np.cumsum(runs[1::2]), np.cumsum(runs[2::2])
    return runs


def patch_coverage(region: Region, grid: tuple[int, int], patches: int) -> np.ndarray:
    """Share that a region covers of every patch of an image's tiles, thumbnail last.

    Args:
        grid: columns and rows of the image's tiles.
        patches: P, patches along one side of a tile.

    Returns:
        float32 (tiles, P, P) in [0, 1].
    """
    height, width = region.image_size

    def share(columns: int, rows: int) -> np.ndarray:
        x_edges, y_edges = (np.linspace(0, length, n * patches + 1) for length, n in ((width, columns), (height, rows)))
        cover = region.pool(x_edges, y_edges).reshape(rows, patches, columns, patches)
        return cover.transpose(0, 2, 1, 3).reshape(rows * columns, patches, patches)

    return share(1, 1) if grid == (1, 1) else np.concatenate((share(*grid), share(1, 1)))
