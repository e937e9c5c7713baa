"""The one record that all stages of the data engine pass on: an image with its regions.

A stage does not change records; it says what changes (`Changes`), and `Record.with_changes` makes the next record of
it. A region that is dropped stays in the record with the stage, the reason and what was measured, and no later stage
sees it.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from perceptiondlm.images_perceptiondlm import load_image


# Region id -> new values of some of `CHANGEABLE`; "facts" are added to those that are there, "drop" is a `Drop`.
Changes = dict[str, dict[str, Any]]
CHANGEABLE = ("caption", "name", "facts", "drop")


@dataclass(frozen=True)
class Drop:
    """Why a region was dropped.

    Attributes:
        stage: name of the stage.
        reason: one of few words, the same for all regions that fall to the same rule.
        detail: what was measured or said, for people.
    """

    stage: str
    reason: str
    detail: str = ""


@dataclass(frozen=True)
class Region:
    """A region of an image.

    Attributes:
        id: unique in its image.
        mask: COCO run lengths, ``{"size": [H, W], "counts": str}``.
        area: pixels of the mask, at least 1.
        category: as annotated, None where the source has none.
        caption: as written by the captioner.
        name: what the caption says the region is, where a stage has asked for it.
        facts: what stages have measured, JSON-ready, by name.
        dropped: why it is out; None while it is kept.
    """

    id: str
    mask: Mapping[str, Any]
    area: int
    category: str | None = None
    caption: str | None = None
    name: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    dropped: Drop | None = None

    def pixels(self) -> np.ndarray:
        """The mask, (H, W) bool, decoded anew at every call."""
        return coco_mask.decode(dict(self.mask)).astype(bool)

    def changed(self, change: Mapping[str, Any]) -> "Region":
        """The region after one stage's change."""
        if unknown := set(change) - set(CHANGEABLE):
            raise ValueError(f"a stage changes {sorted(unknown)} of region {self.id!r}; accepted: {CHANGEABLE}")
        values = {key: change[key] for key in ("caption", "name") if key in change}
        facts = {**self.facts, **change.get("facts", {})}
        return replace(self, **values, facts=facts, dropped=change.get("drop", self.dropped))


@dataclass(frozen=True)
class Record:
    """An image with its regions.

    Attributes:
        id: unique in the run, and the same whenever the source is read.
        image: path of its file.
        width, height: in pixels.
        regions: all of them, dropped ones too; none where the source could not read the image.
        faults: stage and message of every failure on this record.
    """

    id: str
    image: str
    width: int
    height: int
    regions: tuple[Region, ...] = ()
    faults: tuple[tuple[str, str], ...] = ()

    @cached_property
    def kept(self) -> list[Region]:
        """The regions that no stage has dropped."""
        return [region for region in self.regions if region.dropped is None]

    def open(self) -> Image.Image:
        """The image in RGB.

        Raises:
            OSError, ValueError: the file is missing or no picture, or its size is not the annotated one.
        """
        image = load_image(Path(self.image), name=self.image)
        if image.size != (self.width, self.height):
            raise ValueError(f"{self.image} is {image.width} x {image.height}, annotated {self.width} x {self.height}")
        return image

    def with_changes(self, changes: Changes, faults: tuple[tuple[str, str], ...] = ()) -> "Record":
        """The record after one stage.

        Raises:
            ValueError: a change names a region that is not there or was dropped before.
        """
        known = {region.id for region in self.kept}
        if unknown := sorted(set(changes) - known):
            raise ValueError(f"a stage changes the regions {unknown} of {self.id!r}, which are dropped or not there")
        regions = tuple(region.changed(changes.get(region.id, {})) for region in self.regions)
        return replace(self, regions=regions, faults=(*self.faults, *faults))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> "Record":
        """The record from `to_dict`."""
        regions = tuple(
            Region(**{**region, "dropped": None if region["dropped"] is None else Drop(**region["dropped"])})
            for region in plain["regions"]
        )
        faults = tuple((stage, message) for stage, message in plain["faults"])
        return cls(**{**plain, "regions": regions, "faults": faults})


def changes_to_dict(changes: Changes) -> dict[str, Any]:
    """Changes, JSON-ready."""
    return {
        region: {key: asdict(value) if isinstance(value, Drop) else value for key, value in change.items()}
        for region, change in changes.items()
    }


def changes_from_dict(plain: Mapping[str, Mapping[str, Any]]) -> Changes:
    """Changes from `changes_to_dict`."""
    return {
        region: {key: Drop(**value) if key == "drop" else value for key, value in change.items()}
        for region, change in plain.items()
    }


def encoded(mask_HW: np.ndarray) -> dict[str, Any]:
    """A bool mask (H, W) as compressed COCO run lengths."""
    rle = coco_mask.encode(np.asfortranarray(mask_HW, dtype=np.uint8))
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode("ascii")}


def region_of(region_id: str, mask_HW: np.ndarray, category: str | None = None, **facts: Any) -> Region:
    """A region from a bool mask (H, W).

    Raises:
        ValueError: the mask is empty.
    """
    area = int(np.count_nonzero(mask_HW))
    if area == 0:
        raise ValueError(f"the mask of region {region_id!r} is empty")
    return Region(region_id, encoded(mask_HW), area, category, facts=facts)
