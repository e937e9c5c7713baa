"""Segmenters that are told in words what to find: SAM 3, and a stand-in for drawn scenes."""

from collections.abc import Callable, Sequence
from typing import Any

from perceptiondlm.data_engine.drawn_stand_ins import drawn_masks
from perceptiondlm.data_engine.record import Record
from perceptiondlm.serving.segmenters import load_segmenter


# A record and names -> for each name the masks found, as COCO run lengths.
TextSegmenter = Callable[[Record, Sequence[str]], list[list[dict[str, Any]]]]

SAM3 = "facebook/sam3"


def check_segmenter(stage: str, spec: str) -> None:
    """Raise ValueError for a name that `make_segmenter` does not know."""
    if spec != "drawn" and spec.partition(":")[0] != "sam3":
        raise ValueError(f"{stage}: the segmenter {spec!r} is none of sam3, sam3:PATH, drawn")


def make_segmenter(spec: str, device: str | None = None) -> TextSegmenter:
    """A segmenter by name: ``sam3`` (from the Hub), ``sam3:PATH``, or ``drawn``.

    Raises:
        OSError: the model is not there.
    """
    if spec == "drawn":
        return lambda record, names: [drawn_masks(record, name) for name in names]
    segmenter = load_segmenter(spec.partition(":")[2] or SAM3, device)

    def find(record: Record, names: Sequence[str]) -> list[list[dict[str, Any]]]:
        image = record.open()  # which the segmenter encodes once
        return [[region.mask for region in segmenter.named(image, name)] for name in names]

    return find
