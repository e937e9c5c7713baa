"""A region that was found: its mask as COCO run lengths, its box, and what its finder says about it.

Shape legend: H rows, W columns of the image, h, w of a box. Boxes are x0, y0, x1, y1 in pixels, half-open.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from perceptiondlm.coverage_perceptiondlm import CroppedRegion, Region, StripedRegion


@dataclass(frozen=True)
class FoundRegion:
    """One region of an image; give its `mask` to the processor, the pipeline or a COCO file as it is.

    Attributes:
        mask: COCO RLE, `{"size": [height, width], "counts": str}`, compressed; at least one pixel.
        box: x0, y0, x1, y1, whole pixels, tight around the mask, half-open.
        score: how sure the finder is, in [0, 1]; None where it does not say (a box or mask that a user gave).
        label: what the finder calls it (the text of a text prompt); None where it does not say.
    """

    mask: dict[str, Any]
    box: tuple[int, int, int, int]
    score: float | None = None
    label: str | None = None

    @classmethod
    def of_region(cls, region: Region, score: float | None = None, label: str | None = None) -> FoundRegion:
        """What `regions_of` of the root read."""
        return cls(_run_lengths(region), region.box, score, label)

    @classmethod
    def of_mask(cls, mask_HW: np.ndarray, score: float | None = None, label: str | None = None) -> FoundRegion | None:
        """The region of a bool mask (H, W); None where no pixel is set."""
        region = CroppedRegion.of_mask(mask_HW)
        return None if region is None else cls.of_region(region, score, label)

    @classmethod
    def whole(cls, width: int, height: int) -> FoundRegion:
        """The region that is all of a picture of so many pixels."""
        packed = coco_mask.frPyObjects({"size": [height, width], "counts": [0, height * width]}, height, width)
        return cls({"size": [height, width], "counts": packed["counts"].decode("ascii")}, (0, 0, width, height))

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the image, in pixels."""
        height, width = self.mask["size"]
        return height, width

    @property
    def area(self) -> int:
        """Pixels of the mask."""
        return int(coco_mask.area(self.mask))

    def pixels(self) -> np.ndarray:
        """The full mask, bool (H, W)."""
        return coco_mask.decode(self.mask).astype(bool)


def _run_lengths(region: Region) -> dict[str, Any]:
    """A region as compressed COCO RLE, made from its strips without its full mask."""
    height, width = region.image_size
    columns, tops, bottoms = _strips(region)
    starts, ends = columns * height + tops, columns * height + bottoms
    apart = starts[1:] != ends[:-1]  # a run that goes on at the top of the next column is one run
    starts, ends = starts[np.append(True, apart)], ends[np.append(apart, True)]
    turns = np.stack((starts, ends), axis=1).ravel()
    counts = np.diff(turns, prepend=0, append=height * width)
    counts = counts if counts[-1] else counts[:-1]
    packed = coco_mask.frPyObjects({"size": [height, width], "counts": counts.tolist()}, height, width)
    return {"size": [height, width], "counts": packed["counts"].decode("ascii")}


def _strips(region: Region) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Columns, first and last + 1 rows of a region's vertical strips, ordered by column and row, int64 each."""
    if isinstance(region, StripedRegion):
        return region.columns, region.tops, region.bottoms
    x0, y0, _, _ = region.box
    columns_wh = np.pad(region.crop().T.astype(np.int8), ((0, 0), (1, 1)))
    turns = np.diff(columns_wh, axis=1)
    columns, tops = np.nonzero(turns == 1)
    _, bottoms = np.nonzero(turns == -1)
    return columns + x0, tops + y0, bottoms + y0
