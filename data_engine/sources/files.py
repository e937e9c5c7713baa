"""Published sets and own folders: COCO-style annotations (COCONut, too), SA-1B, a folder with a segmenter."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from perceptiondlm.common.json_files import read_json
from perceptiondlm.data_engine.record import Record, region_of
from perceptiondlm.data_engine.sources.base import Source, pictures_in
from perceptiondlm.evaluation.photos.annotations import NamedPicture, read_pictures
from perceptiondlm.images_perceptiondlm import load_image
from perceptiondlm.regions_perceptiondlm import region_masks


@dataclass
class CocoSource(Source):
    """Masks with categories: COCO instances, LVIS, COCO panoptic (COCONut is published so), or region JSON.

    See `evaluation.photos.annotations` for the forms. Crowds are left out.

    Attributes:
        path: the annotation file.
        images: folder of the pictures; default: the file's own.
    """

    kind: ClassVar[str] = "coco"
    path: str = ""
    images: str | None = None

    def check(self) -> None:
        if not Path(self.path).is_file():
            raise FileNotFoundError(f"source.path: no annotation file at {self.path!r}")

    @cached_property
    def _pictures(self) -> list[NamedPicture]:
        return read_pictures(self.path, self.images)

    def keys(self) -> Sequence[int]:
        return range(len(self._pictures))

    def name(self, key: int) -> str:
        return f"{key}-{self._pictures[key].path.stem}"

    def read(self, key: int) -> Record:
        picture = self._pictures[key]
        image = picture.open()
        masks = picture.masks((image.height, image.width))
        regions = tuple(
            region_of(str(number), mask, region.category)
            for number, (region, mask) in enumerate(zip(picture.regions, masks, strict=True))
        )
        return Record(self.name(key), str(picture.path), image.width, image.height, regions)


@dataclass
class SA1BSource(Source):
    """SA-1B as it is unpacked: ``sa_N.jpg`` with ``sa_N.json`` beside it; masks only.

    Attributes:
        folder: searched with its sub-folders.
        min_predicted_iou, min_stability: SAM's own estimates below which a mask is left out.
    """

    kind: ClassVar[str] = "sa1b"
    folder: str = ""
    min_predicted_iou: float = 0.0
    min_stability: float = 0.0

    def check(self) -> None:
        pictures_in(Path(self.folder))

    def keys(self) -> Sequence[Path]:
        return [path for path in pictures_in(Path(self.folder)) if path.with_suffix(".json").is_file()]

    def name(self, key: Path) -> str:
        return str(key.relative_to(self.folder).with_suffix(""))

    def read(self, key: Path) -> Record:
        content = read_json(key.with_suffix(".json"))
        image = load_image(key, name=str(key))
        size = (image.height, image.width)
        regions = []
        for number, annotation in enumerate(content["annotations"]):
            if (
                annotation.get("predicted_iou", 1.0) >= self.min_predicted_iou
                and annotation.get("stability_score", 1.0) >= self.min_stability
            ):
                name = f"annotation {number} of {key.with_suffix('.json')}"
                (mask,) = region_masks(size, masks=[annotation["segmentation"]], name=name)
                regions.append(region_of(str(annotation.get("id", number)), mask))
        return Record(self.name(key), str(key), image.width, image.height, tuple(regions))


@dataclass
class FolderSource(Source):
    """A folder of pictures, and a segmenter that finds the regions.

    Attributes:
        folder: searched with its sub-folders.
        segmenter: a mask-generation model of transformers, a folder or a Hub id, such as ``facebook/sam2-hiera-small``.
        points_per_batch: prompts that it works on at once.
    """

    kind: ClassVar[str] = "folder"
    folder: str = ""
    segmenter: str = ""
    points_per_batch: int = 64

    def check(self) -> None:
        pictures_in(Path(self.folder))
        if not self.segmenter:
            raise ValueError("source.segmenter: name a mask-generation model, such as facebook/sam2-hiera-small")

    def keys(self) -> Sequence[Path]:
        return pictures_in(Path(self.folder))

    def name(self, key: Path) -> str:
        return str(key.relative_to(self.folder))

    @cached_property
    def _segment(self) -> Callable[[Any], Sequence[np.ndarray]]:
        from transformers import pipeline

        generator = pipeline("mask-generation", model=self.segmenter)
        return lambda image: generator(image, points_per_batch=self.points_per_batch)["masks"]

    def read(self, key: Path) -> Record:
        image = load_image(key, name=str(key))
        masks = [np.asarray(mask, dtype=bool) for mask in self._segment(image)]
        regions = tuple(region_of(str(number), mask) for number, mask in enumerate(masks) if mask.any())
        return Record(self.name(key), str(key), image.width, image.height, regions)
