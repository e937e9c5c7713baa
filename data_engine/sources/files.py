"""Published sets and own folders: COCO-style annotations (COCONut, too), SA-1B, a folder with a segmenter."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

from pycocotools import mask as coco_mask

from perceptiondlm.common.json_files import read_json
from perceptiondlm.data_engine.record import Record, Region, region_of
from perceptiondlm.data_engine.sources.base import Source, pictures_in
from perceptiondlm.evaluation.photos.annotations import NamedPicture, read_pictures
from perceptiondlm.images_perceptiondlm import load_image
from perceptiondlm.regions_perceptiondlm import region_masks
from perceptiondlm.serving.segmenters import Segmenter, load_segmenter


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
        image, masks = picture.read()
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
        segmenter: ``classical``, or a folder or Hub id for `load_segmenter`, such as ``facebook/sam2-hiera-small``.
    """

    kind: ClassVar[str] = "folder"
    folder: str = ""
    segmenter: str = ""

    def check(self) -> None:
        pictures_in(Path(self.folder))
        if not self.segmenter:
            raise ValueError("source.segmenter: name one, such as classical or facebook/sam2-hiera-small")

    def keys(self) -> Sequence[Path]:
        return pictures_in(Path(self.folder))

    def name(self, key: Path) -> str:
        return str(key.relative_to(self.folder))

    @cached_property
    def _segmenter(self) -> Segmenter:
        return load_segmenter(self.segmenter)

    def read(self, key: Path) -> Record:
        image = load_image(key, name=str(key))
        masks = [region.mask for region in self._segmenter.everything(image)]
        regions = tuple(Region(str(number), mask, int(coco_mask.area(mask))) for number, mask in enumerate(masks))
        return Record(self.name(key), str(key), image.width, image.height, regions)
