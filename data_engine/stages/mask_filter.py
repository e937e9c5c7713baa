"""First filter for masks without categories, as SA-1B has them: parts of things, hidden masks, copies, specks.

The rules, in the order in which they are tried; all shares are of the mask's own pixels, "larger" is by pixels:

1. ``too small``, ``too large``: fewer than `min_pixels`, less than `min_share` or more than `max_share` of the image.
2. ``copy``: overlaps a larger mask with an IoU of at least `copy_iou`. Of equals the first stays.
3. ``merged``: with `merged_iou` given, it is what two smaller masks cover together, with an IoU of at least that: two
   things in one. A thing that two masks of parts cut in two without a rest falls to it as well: it is off by default.
4. ``part``: at least `containment` of it lies in one larger mask that is kept and covers no more than `scene_share` of
   the image. What covers more is a scene or a background, and what lies in it is a thing of its own.
5. ``occluded``: with all masks painted over each other, the largest on top (those of rule 4), less than `visibility`
   of it can be seen. This takes what rule 4 leaves: a mask hidden under several larger ones together.

SA-1B's masks come in three levels (whole, part, subpart), and a part lies in its whole; what lies in front of a thing
is as a rule not in that thing's mask. Rules 4 and 5 therefore speak of parts, as the paper has it.
"""

from dataclasses import dataclass
from itertools import combinations
from typing import ClassVar

import numpy as np
from pycocotools import mask as coco_mask

from perceptiondlm.data_engine.record import Changes, Drop, Record
from perceptiondlm.data_engine.stages.base import RegionStage, check_share


@dataclass
class MaskFilter(RegionStage):
    """See the module's rules.

    Attributes:
        min_pixels: in pixels; min_share, max_share, scene_share: of the image, in [0, 1].
        copy_iou, containment, visibility: in [0, 1].
        merged_iou: in [0, 1], None to leave the rule out.
    """

    kind: ClassVar[str] = "mask_filter"
    min_pixels: int = 64
    min_share: float = 0.0005
    max_share: float = 0.95
    copy_iou: float = 0.85
    containment: float = 0.9
    visibility: float = 0.1
    scene_share: float = 0.6
    merged_iou: float | None = None

    def check(self) -> None:
        check_share(
            self.name, min_share=self.min_share, max_share=self.max_share, copy_iou=self.copy_iou,
            containment=self.containment, visibility=self.visibility, scene_share=self.scene_share,
            merged_iou=self.merged_iou or 0.0,
        )  # fmt: skip

    def look(self, record: Record) -> Changes:
        image_area = record.width * record.height
        changes: Changes = {}
        regions = sorted(record.kept, key=lambda region: -region.area)  # stable: of equals the first stays
        masks = [dict(region.mask) for region in regions]
        overlap = coco_mask.iou(masks, masks, [0] * len(masks))
        # inside[i, j]: share of mask i that lies in mask j
        inside = coco_mask.iou(masks, masks, [1] * len(masks))
        wholes: list[int] = []  # larger masks that are kept, the largest first
        for index, region in enumerate(regions):
            share = region.area / image_area
            drop = self._size(region.area, share) or self._copy(index, wholes, overlap, regions)
            drop = drop or self._merged(index, masks, inside, regions)
            drop = drop or self._lies_in(index, wholes, inside, regions)
            drop = drop or self._hidden(
                index, [j for j in wholes if self._is_thing(regions[j].area, image_area)], masks
            )
            facts = {"share": round(share, 6)}
            changes[region.id] = {"facts": facts, **({"drop": Drop(self.name, *drop)} if drop else {})}
            if not drop:
                wholes.append(index)
        return changes

    def _is_thing(self, area: int, image_area: int) -> bool:
        return area <= self.scene_share * image_area

    def _size(self, area: int, share: float) -> tuple[str, str] | None:
        if area < self.min_pixels or share < self.min_share:
            return "too small", f"{area} pixels, {100 * share:.3f} % of the image"
        return ("too large", f"{100 * share:.1f} % of the image") if share > self.max_share else None

    def _copy(self, index: int, wholes: list[int], overlap: np.ndarray, regions) -> tuple[str, str] | None:
        for other in wholes:
            if overlap[index, other] >= self.copy_iou:
                return "copy", f"IoU {overlap[index, other]:.2f} with region {regions[other].id}"
        return None

    def _merged(self, index: int, masks: list[dict], inside: np.ndarray, regions) -> tuple[str, str] | None:
        """Whether two smaller masks, neither in the other, cover the mask together."""
        if self.merged_iou is None:
            return None
        smaller = [k for k in range(index + 1, len(masks)) if inside[k, index] >= self.containment]
        for one, two in combinations(smaller, 2):
            enough = regions[one].area + regions[two].area >= self.merged_iou * regions[index].area
            if enough and max(inside[one, two], inside[two, one]) < self.containment:
                together = coco_mask.merge([masks[one], masks[two]])
                if coco_mask.iou([masks[index]], [together], [0])[0, 0] >= self.merged_iou:
                    return "merged", f"regions {regions[one].id} and {regions[two].id} in one"
        return None

    def _lies_in(self, index: int, wholes: list[int], inside: np.ndarray, regions) -> tuple[str, str] | None:
        image_area = int(np.prod(regions[index].mask["size"]))
        for other in wholes:
            if self._is_thing(regions[other].area, image_area) and inside[index, other] >= self.containment:
                return "part", f"{100 * inside[index, other]:.0f} % of it lie in region {regions[other].id}"
        return None

    def _hidden(self, index: int, wholes: list[int], masks: list[dict]) -> tuple[str, str] | None:
        if not wholes:
            return None
        above = coco_mask.merge([masks[other] for other in wholes])
        seen = 1.0 - float(coco_mask.iou([masks[index]], [above], [1])[0, 0])
        return ("occluded", f"{100 * seen:.0f} % of it can be seen") if seen < self.visibility else None
