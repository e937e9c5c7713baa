"""Masks predicted anew from what a caption says; a mask that none of them meets is dropped (the paper: with SAM 3)."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

from pycocotools import mask as coco_mask

from perceptiondlm.data_engine.record import Changes, Drop, Record
from perceptiondlm.data_engine.segmenters import TextSegmenter, check_segmenter, make_segmenter
from perceptiondlm.data_engine.stages.base import HOW, Stage, check_share


@dataclass
class SegmentCheck(Stage):
    """Drops regions of whose name the segmenter finds nothing (``not found``), or nothing that fits (``low IoU``).

    Of all masks that the segmenter finds for the name, the one with the highest IoU counts: an image may hold several
    things of a name.

    Attributes:
        segmenter: see `segmenters.make_segmenter`.
        min_iou: in [0, 1].
        device: for models.
    """

    kind: ClassVar[str] = "segment_check"
    segmenter: str = "sam3"
    min_iou: float = 0.7
    device: str | None = field(default=None, metadata=HOW)

    def check(self) -> None:
        check_share(self.name, min_iou=self.min_iou)
        check_segmenter(self.name, self.segmenter)

    def open(self) -> None:
        _ = self._segmenter

    def finish(self) -> None:
        self.__dict__.pop("_segmenter", None)

    @cached_property
    def _segmenter(self) -> TextSegmenter:
        return make_segmenter(self.segmenter, self.device)

    def run(self, records: Sequence[Record]) -> list[Changes]:
        return [self._look(record) if record.kept else {} for record in records]

    def _look(self, record: Record) -> Changes:
        if unnamed := [region.id for region in record.kept if not region.name]:
            raise ValueError(f"regions {unnamed} of {record.id} have no name; a stage core_category must stand before")
        names = list(dict.fromkeys(str(region.name) for region in record.kept))
        found = dict(zip(names, self._segmenter(record, names), strict=True))
        changes: Changes = {}
        for region in record.kept:
            masks = found[str(region.name)]
            best = float(coco_mask.iou([dict(region.mask)], masks, [0] * len(masks)).max()) if masks else 0.0
            change: dict = {"facts": {"iou": round(best, 4)}}
            if best < self.min_iou:
                reason = "low IoU" if masks else "not found"
                detail = f"{len(masks)} masks of {region.name!r}, the best with an IoU of {best:.2f}"
                change["drop"] = Drop(self.name, reason, detail)
            changes[region.id] = change
        return changes
