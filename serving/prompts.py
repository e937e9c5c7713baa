"""Prompts from anywhere: masks, boxes, points, a text or "everything" become the regions of an image.

The one helper of the pipeline, the app, annotation and the server. What cannot be understood is refused before any
model runs, and the message names the entry, what was found and what is accepted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from perceptiondlm.images_perceptiondlm import load_image
from perceptiondlm.regions_perceptiondlm import regions_of as read_regions
from perceptiondlm.regions_perceptiondlm import short
from perceptiondlm.segmenting_perceptiondlm import Finding
from perceptiondlm.serving.found import FoundRegion
from perceptiondlm.serving.segmenters import NoSegmenter, Segmenter, load_segmenter


PLACED = ("masks", "boxes", "points", "label_map")  # prompts that say where; they may come together


@dataclass(frozen=True)
class RegionPrompts:
    """What a user says about the regions of one image.

    Attributes:
        masks, boxes, label_map: in the forms that the processor takes (docs/inputs.md).
        points: one entry per region: (x, y) in pixels, or a list of those for several points of one region.
        point_labels: with the nesting of `points`, 1 inside the region and 0 outside; all 1 by default.
        text: what to find, such as "red car".
        everything: find all regions.
    """

    masks: Any = None
    boxes: Any = None
    points: Any = None
    point_labels: Any = None
    label_map: Any = None
    text: str | None = None
    everything: bool = False

    def __post_init__(self) -> None:
        placed = [name for name in PLACED if getattr(self, name) is not None]
        finding = [name for name in ("text", "everything") if getattr(self, name) not in (None, False)]
        if self.point_labels is not None and self.points is None:
            raise ValueError("point_labels were given without points; accepted: both, or points alone")
        if self.text is not None and (not isinstance(self.text, str) or not self.text.strip()):
            raise ValueError(f"text is {short(self.text)}; accepted: a few words, such as 'red car'")
        if not placed and not finding:
            raise ValueError(f"nothing says where the regions are; accepted: {', '.join(PLACED)}, text or everything")
        if len(finding) > 1:
            raise ValueError("text and everything were both given; accepted: one of them, since each finds regions")
        if finding and placed:
            raise ValueError(
                f"{finding[0]} finds regions by itself, and {' and '.join(placed)} were given, too; accepted: "
                f"{finding[0]} alone, or {', '.join(PLACED)} together"
            )

    def find(self, image: Any, segmenter: Segmenter | str | None = None) -> list[FoundRegion]:
        """The regions of an image: those of masks, of the label map, of boxes, of points, in this order.

        Args:
            image: any form of an image that the processor takes.
            segmenter: a segmenter or its name; None is "none": boxes are used as they are.
        """
        picture = load_image(image)
        size = (picture.height, picture.width)
        finding = Finding(segmenter_of(segmenter), self.everything, self.text)
        given = [FoundRegion.of_region(region) for form in ("masks", "label_map") for region in self._given(form, size)]
        return given + finding.regions(picture, self.boxes, self.points, self.point_labels)

    def _given(self, form: str, size: tuple[int, int]) -> Any:
        value = getattr(self, form)
        return () if value is None else read_regions(size, **{form: value})


def regions_of(
    image: Any,
    *,
    masks: Any = None,
    boxes: Any = None,
    points: Any = None,
    point_labels: Any = None,
    label_map: Any = None,
    text: str | None = None,
    everything: bool = False,
    segmenter: Segmenter | str | None = None,
) -> list[FoundRegion]:
    """The regions that prompts mean; `[region.mask for region in ...]` is what the pipeline takes as `masks`.

    Args:
        image: PIL image, path, URL, bytes, array: every form that the processor takes.
        masks, boxes, label_map: every form that the processor takes. Without a segmenter boxes are used as they are.
        points: one region per entry, (x, y) or a list of (x, y), in pixels; needs a segmenter.
        point_labels: 1 or 0 per point: inside or outside the region.
        text: what to find; needs SAM 3.
        everything: find all regions; needs a segmenter.
        segmenter: a `Segmenter`, or its name for `load_segmenter`.

    Returns:
        the regions of masks, label map, boxes and points, in this order, each in the order given; or all that `text`
        or `everything` finds, which may be none.

    Raises:
        TypeError, ValueError, OSError: for prompts and images that cannot be read or do not go together, and for a
            segmenter that cannot take them.
    """
    return RegionPrompts(masks, boxes, points, point_labels, label_map, text, everything).find(image, segmenter)


def segmenter_of(given: Segmenter | str | None) -> Segmenter:
    """A segmenter by itself or by its name; None is the one that takes boxes as they are."""
    if given is None:
        return NoSegmenter()
    if isinstance(given, str):
        return load_segmenter(given)
    if not isinstance(given, Segmenter):
        raise TypeError(f"segmenter is a {type(given).__name__}; accepted: a name, or an object of Segmenter's methods")
    return given
