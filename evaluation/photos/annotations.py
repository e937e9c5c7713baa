"""Pictures with named regions, in the forms they are published in, brought into one record each.

======================  ==============================================================================================
region JSON             a list of `{"image", "width", "height", "regions": [{"category", "segmentation", "isthing"?,
                        "supercategory"?, "names"?, "hypernyms"?}], "names"?, "hypernyms"?}`; without regions the
                        picture itself is named (`names`, WordNet lemmas, as a sample of ImageNet has them); a region
                        whose name is a guess has `guesses` instead, each a category or names with its `chance`
COCO instances, LVIS    an object with `images`, `annotations` (`segmentation`: polygons or RLE) and `categories`
                        (LVIS: with `synonyms`)
COCO panoptic           the same with `segments_info` per picture and a PNG whose colours are the segments' ids
======================  ==============================================================================================

Crowds (`iscrowd`) are left out: they are no single region.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from perceptiondlm.common.json_files import read_json
from perceptiondlm.evaluation.photos.names import CategoryNames
from perceptiondlm.images_perceptiondlm import load_image
from perceptiondlm.regions_perceptiondlm import region_masks


@dataclass(frozen=True)
class NamedRegion:
    """A region and what it is.

    Args:
        category: its key in a `NameTable`, or the first of `names`.
        mask: what `region_masks` takes for one region; None for the whole picture.
        isthing: whether it can be counted.
        lemmas: accepted words from the annotations themselves, where they carry any.
        guesses: what else it may be, with the chance of each; empty for a name that is known. `category` and `lemmas`
            are those of the likeliest.
    """

    category: str
    mask: Any
    isthing: bool = True
    lemmas: CategoryNames | None = None
    guesses: Sequence[tuple["NamedRegion", float]] = ()


@dataclass(frozen=True)
class NamedPicture:
    """A picture with its named regions; pixels and masks are read when asked for.

    Args:
        path: its file.
        size: (height, width) in pixels as annotated, None where the annotations do not say.
        regions: at least one.
        segments: PNG whose colours are the regions' `mask`, segment ids (panoptic).
        credit: licence and source, where the annotations name them.
    """

    path: Path
    size: tuple[int, int] | None
    regions: Sequence[NamedRegion]
    segments: Path | None = None
    credit: Mapping[str, str] = field(default_factory=dict)

    def open(self) -> Image.Image:
        """The picture in RGB; raises as `load_image` does, and ValueError where its size is not the annotated one."""
        return self.checked(load_image(self.path, name=str(self.path)))

    def read(self) -> tuple[Image.Image, np.ndarray]:
        """The picture in RGB and the masks (N, H, W) of all regions; raises as `open` and `masks` do."""
        image = self.open()
        return image, self.masks((image.height, image.width))

    def checked(self, image: Image.Image) -> Image.Image:
        """The opened picture; ValueError where its size is not the annotated one."""
        if self.size is not None and (image.height, image.width) != self.size:
            raise ValueError(f"{self.path} is {image.height} x {image.width}, annotated as {self.size} (height, width)")
        return image

    def masks(self, size: tuple[int, int], chosen: Sequence[int] | None = None) -> np.ndarray:
        """Bool masks (N, H, W) of regions, by default of all, in a picture of `size` (height, width)."""
        regions = self.regions if chosen is None else [self.regions[index] for index in chosen]
        if self.segments is None:
            whole = np.ones(size, bool)
            masks = [whole if region.mask is None else region.mask for region in regions]
            return region_masks(size, masks=masks, name=f"regions of {self.path.name}")
        with Image.open(self.segments) as picture:
            channels = np.asarray(picture.convert("RGB")).astype(np.int64)
        ids_HW = channels @ np.array([1, 256, 256**2])
        segments = np.stack([ids_HW == region.mask for region in regions])
        return region_masks(size, masks=segments, name=f"segments of {self.segments.name}")


def read_pictures(path: str | Path, image_root: str | Path | None = None) -> list[NamedPicture]:
    """All pictures of an annotation file with at least one region.

    Args:
        path: JSON in one of the forms above.
        image_root: folder that picture names are relative to, by default the file's own. A panoptic file's PNGs lie in
            a folder of the file's name beside it, as published.
    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming what the file lacks.
    """
    path = Path(path)
    root = Path(image_root) if image_root else path.parent
    content = read_json(path)
    if isinstance(content, list):
        pictures = [_own_record(record, root, f"{path}, record {index}") for index, record in enumerate(content)]
    elif isinstance(content, dict) and {"images", "annotations", "categories"} <= set(content):
        panoptic = any("segments_info" in annotation for annotation in content["annotations"][:1])
        pictures = (_panoptic if panoptic else _instances)(content, root, path)
    else:
        found = list(content) if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{path} holds {found}; accepted: a list of records, or images, annotations and categories")
    if not (pictures := [picture for picture in pictures if picture.regions]):
        raise ValueError(f"{path} names no region of any picture")
    return pictures


def _own_record(record: Any, root: Path, place: str) -> NamedPicture:
    if not isinstance(record, Mapping) or "image" not in record:
        raise ValueError(f"{place} is no object with an 'image'")
    size = (record["height"], record["width"]) if {"height", "width"} <= set(record) else None
    if "regions" in record:
        regions = [_own_region(region, f"{place}, region {index}") for index, region in enumerate(record["regions"])]
    else:
        regions = [_own_region({**record, "segmentation": None}, place)]
    credit = {key: str(record[key]) for key in ("license", "license_url", "source_url") if key in record}
    return NamedPicture(root / record["image"], size, regions, credit=credit)


def _own_region(region: Mapping, place: str) -> NamedRegion:
    if region.get("guesses"):
        return _guessed_region(region, place)
    if "segmentation" not in region or not ("category" in region or region.get("names")):
        raise ValueError(f"{place} has {sorted(region)}; needed: segmentation, and category or names")
    names, hypernyms = region.get("names"), region.get("hypernyms", ())
    lemmas = CategoryNames.of_lemmas(names, hypernyms) if names else None
    category = region["category"] if lemmas is None else lemmas.category
    return NamedRegion(category, region["segmentation"], bool(region.get("isthing", True)), lemmas)


def _guessed_region(region: Mapping, place: str) -> NamedRegion:
    if "segmentation" not in region:
        raise ValueError(f"{place} has {sorted(region)}; needed: segmentation")
    guesses = []
    for number, guess in enumerate(region["guesses"]):
        chance = guess.get("chance") if isinstance(guess, Mapping) else None
        if isinstance(chance, bool) or not isinstance(chance, (int, float)) or not 0 < chance <= 1:
            raise ValueError(f"{place}, guess {number} has the chance {chance!r}; accepted: a number in (0, 1]")
        guesses.append((_own_region({"segmentation": None, **guess}, f"{place}, guess {number}"), float(chance)))
    likeliest = max(guesses, key=lambda guess: guess[1])[0]
    return replace(likeliest, mask=region["segmentation"], guesses=tuple(guesses))


def _instances(content: Mapping, root: Path, path: Path) -> list[NamedPicture]:
    """COCO instances and LVIS, whose pictures may be given by `coco_url` instead of a file name."""
    categories = _categories(content, path)
    regions = defaultdict(list)
    for annotation in content["annotations"]:
        if not annotation.get("iscrowd"):
            category, isthing, lemmas = categories[annotation["category_id"]]
            regions[annotation["image_id"]].append(
                NamedRegion(category, {"segmentation": annotation["segmentation"]}, isthing, lemmas)
            )
    return [
        NamedPicture(root / _file_name(image, path), (image["height"], image["width"]), regions[image["id"]])
        for image in content["images"]
    ]


def _panoptic(content: Mapping, root: Path, path: Path) -> list[NamedPicture]:
    categories = _categories(content, path)
    images = {image["id"]: image for image in content["images"]}
    pictures = []
    for annotation in content["annotations"]:
        image = images[annotation["image_id"]]
        regions = [
            NamedRegion(category, segment["id"], isthing)
            for segment in annotation["segments_info"]
            if not segment.get("iscrowd")
            for category, isthing, _ in [categories[segment["category_id"]]]
        ]
        segments = path.with_suffix("") / annotation["file_name"]
        size = (image["height"], image["width"])
        pictures.append(NamedPicture(root / _file_name(image, path), size, regions, segments))
    return pictures


def _categories(content: Mapping, path: Path) -> dict[int, tuple[str, bool, CategoryNames | None]]:
    """Key, whether a thing, and words of LVIS by category id."""
    categories = {}
    for category in content["categories"]:
        if not {"id", "name"} <= set(category):
            raise ValueError(f"{path} has a category with {sorted(category)}; needed: id and name")
        lemmas = CategoryNames.of_lemmas(category["synonyms"]) if category.get("synonyms") else None
        key = category["name"] if lemmas is None else lemmas.category
        categories[category["id"]] = (key, bool(category.get("isthing", True)), lemmas)
    return categories


def _file_name(image: Mapping, path: Path) -> str:
    if "file_name" in image:
        return image["file_name"]
    if "coco_url" in image:
        return "/".join(image["coco_url"].split("/")[-2:])
    raise ValueError(f"{path} has a picture with {sorted(image)}; needed: file_name or coco_url")
