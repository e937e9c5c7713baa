"""From boxes, points, texts and "everything" to regions: one protocol, chosen by name.

>>> segmenter = load_segmenter("classical")                  # superpixels merged by colour and edge, no weights
>>> segmenter = load_segmenter("facebook/sam2.1-hiera-tiny")   # any SAM, SAM 2, SAM 3 or SAM-HQ of transformers
>>> segmenter.at_points(image, [(120, 80)])
[FoundRegion(mask={...}, box=(96, 61, 160, 118), score=0.93, label=None)]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from PIL import Image

from perceptiondlm.regions_perceptiondlm import regions_of as read_regions
from perceptiondlm.serving.found import FoundRegion


CLASSICAL, NONE = "classical", "none"
Box = tuple[int, int, int, int]
Point = tuple[float, float]


@runtime_checkable
class Segmenter(Protocol):
    """What turns prompts into regions. Images are RGB; coordinates are pixels; results come in the prompts' order.

    Each method raises ValueError where it finds no pixel for a prompt, naming the prompt, and where this kind of
    prompt is beyond it. `everything` and `named` may find nothing: an empty list.
    """

    name: str

    def everything(self, image: Image.Image) -> list[FoundRegion]:
        """All regions worth a caption, largest first."""
        ...

    def at_boxes(self, image: Image.Image, boxes: Sequence[Box]) -> list[FoundRegion]:
        """One region per box, x0, y0, x1, y1, half-open."""
        ...

    def at_points(
        self,
        image: Image.Image,
        points: Sequence[Point | Sequence[Point]],
        labels: Sequence[int | Sequence[int]] | None = None,
    ) -> list[FoundRegion]:
        """One region per entry: a point x, y, or several points of one region.

        `labels` has the same nesting: 1 for a point of the region, 0 for one outside it; all 1 by default.
        """
        ...

    def named(self, image: Image.Image, text: str) -> list[FoundRegion]:
        """All regions that a short text names, such as "red car", the surest first."""
        ...


class NoSegmenter:
    """Boxes as they are; everything else needs a segmenter, and the message says so."""

    name = NONE

    def everything(self, image: Image.Image) -> list[FoundRegion]:
        raise ValueError(f"finding everything {NEEDED}")

    def at_boxes(self, image: Image.Image, boxes: Sequence[Box]) -> list[FoundRegion]:
        """The filled boxes."""
        found = read_regions((image.height, image.width), boxes=list(boxes))
        return [FoundRegion.of_region(region) for region in found]

    def at_points(self, image: Image.Image, points: Sequence[Any], labels: Any = None) -> list[FoundRegion]:
        raise ValueError(f"points show where a region is, not which pixels it has: that {NEEDED}")

    def named(self, image: Image.Image, text: str) -> list[FoundRegion]:
        raise ValueError(f"finding regions by a text {NEEDED}")


NEEDED = (
    f"needs a segmenter, got {NONE!r}; accepted: {CLASSICAL!r} (no weights; not for texts), or the Hub id or folder of "
    "a SAM, SAM 2 or SAM 3 model (texts: SAM 3)"
)


def load_segmenter(name: str, device: str | None = None, **options: Any) -> Segmenter:
    """The segmenter of a name.

    Args:
        name: `"classical"` (superpixels, needs scikit-image), `"none"` (boxes as they are), or the Hub id or folder of
            a SAM, SAM 2, SAM 3, SAM-HQ or other mask-generation model of transformers.
        device: where a model runs, such as `"cuda:0"`; by default an accelerator if there is one.
        options: settings of the segmenter's class: `ClassicalSegmenter`, `SamSegmenter`.

    Raises:
        ImportError: if a package is missing, with its install line.
        ValueError: for a folder or model that is none of these.
    """
    if name == NONE:
        return NoSegmenter()
    if name == CLASSICAL:
        from perceptiondlm.serving.segmenters.classical import ClassicalSegmenter

        return ClassicalSegmenter(**options)
    from perceptiondlm.serving.segmenters.models import load_sam

    return load_sam(name, device, **options)


__all__ = ["CLASSICAL", "NONE", "FoundRegion", "NoSegmenter", "Segmenter", "load_segmenter"]
