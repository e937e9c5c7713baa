"""The data of ParaDLC-Bench and DLC-Bench, and of folders laid out like them.

A benchmark folder holds three files, at its top or in ``annotations/``, and the images in ``images/`` beside them or at
its top:

====================  ======================================================================================
``annotations.json``  ParaDLC-Bench: a list of images ``{"image_id", "file_name", "height", "width", "annotations":
                      [{"index", "mask_rle"}, …]}``; region ids read ``IMAGEID_INDEX``. DLC-Bench: the COCO
                      format; region ids are the annotations' ids.
``class_names.json``  region id -> class name
``qa.json``           region id -> questions, see ``questions.py``
====================  ======================================================================================
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import snapshot_download
from PIL import Image
from pycocotools import mask as coco_mask

from perceptiondlm.common.json_files import read_json
from perceptiondlm.evaluation.questions import PROTOCOLS, Question
from perceptiondlm.evaluation.scoring import BenchmarkScore, Crop, Judge, score_captions


HUB_IDS = {"paradlc": "MSALab/ParaDLC-Bench", "dlc": "nvidia/DLC-Bench"}
FILES = ("annotations.json", "class_names.json", "qa.json")

# The judge's crop: the mask's box grown to three times its size, from a box of at least this many pixels a side.
MIN_CROP_BOX = 56


@dataclass(frozen=True)
class BenchmarkRegion:
    """One region of an image.

    Attributes:
        region_id: its key in captions, questions and class names.
        class_name: name of its class.
        questions: its questions; recognition is not among them.
        rle: COCO run lengths, ``{"size": [H, W], "counts": str or list}``.
    """

    region_id: str
    class_name: str
    questions: Sequence[Question]
    rle: Mapping[str, Any]

    def mask(self) -> np.ndarray:
        """The mask, (H, W) bool, decoded anew at every call."""
        rle = self.rle
        if isinstance(rle["counts"], list):
            rle = coco_mask.frPyObjects(rle, *rle["size"])
        return coco_mask.decode(rle).astype(bool)


@dataclass(frozen=True)
class BenchmarkImage:
    """One image with its regions, in the order of the annotations.

    Attributes:
        image_id: its key.
        path: its file; it need not exist before it is opened.
        height, width: in pixels, as the annotations have it.
        regions: the regions that have questions; at least one.
    """

    image_id: str
    path: Path
    height: int
    width: int
    regions: Sequence[BenchmarkRegion]

    def open(self) -> Image.Image:
        """The image in RGB.

        Raises:
            FileNotFoundError: the file is missing.
            ValueError: its size is not the annotations'.
        """
        with Image.open(self.path) as file:
            image = file.convert("RGB")
        if image.size != (self.width, self.height):
            raise ValueError(
                f"{self.path} is {image.width} x {image.height}, annotated as {self.width} x {self.height}"
            )
        return image


@dataclass(frozen=True)
class Benchmark:
    """A benchmark: images, regions and questions; pixels are read when asked for.

    Attributes:
        name: ``"paradlc"``, ``"dlc"`` or the folder's name.
        protocol: ``"paradlc"`` (the judge sees image and mask) or ``"dlc"`` (it reads the caption alone).
        images: the images, in the order of the annotations.
    """

    name: str
    protocol: str
    images: Sequence[BenchmarkImage]

    @property
    def regions(self) -> list[BenchmarkRegion]:
        """All regions, image by image."""
        return [region for image in self.images for region in image.regions]

    @property
    def questions(self) -> dict[str, Sequence[Question]]:
        """Questions per region id."""
        return {region.region_id: region.questions for region in self.regions}

    @property
    def class_names(self) -> dict[str, str]:
        """Class name per region id."""
        return {region.region_id: region.class_name for region in self.regions}

    @property
    def image_ids(self) -> dict[str, str]:
        """Image per region id."""
        return {region.region_id: image.image_id for image in self.images for region in image.regions}

    def shows_image(self, judge: Judge) -> bool:
        """Whether a judge gets the regions' crops: as the protocol says, unless the judge reads text alone."""
        return self.protocol == "paradlc" and getattr(judge, "sees_image", True)

    def crops(self) -> Mapping[str, Crop]:
        """Crop and mask per region id, as `crop` makes them, made when looked up."""
        return _Crops(self)

    def references(self) -> list[dict[str, Any]]:
        """One reference per region for ``evaluate.load("evaluation/paradlc")``, in the order of `regions`."""
        image_ids = self.image_ids
        return [
            {
                "region_id": region.region_id,
                "image_id": image_ids[region.region_id],
                "class_name": region.class_name,
                "questions": list(region.questions),
            }
            for region in self.regions
        ]

    def score(
        self,
        captions: Mapping[str, str],
        judge: Judge,
        *,
        show_image: bool | None = None,
        allow_missing: bool = False,
        progress: bool = False,
    ) -> BenchmarkScore:
        """Score captions by this benchmark's protocol, see `scoring.score_captions`.

        Args:
            captions: caption per region id.
            judge: see ``judges.py``.
            show_image: whether the judge gets image and mask; default: `shows_image`.
            allow_missing: score only the regions that have captions.
            progress: show a progress bar.
        """
        shown = self.shows_image(judge) if show_image is None else show_image
        return score_captions(
            captions,
            self.questions,
            self.class_names,
            judge,
            progress,
            protocol=self.protocol,
            crops=self.crops() if shown else None,
            image_ids=self.image_ids,
            allow_missing=allow_missing,
        )


def load_benchmark(name_or_path: str | Path, protocol: str | None = None, revision: str | None = None) -> Benchmark:
    """Load ``"paradlc"`` or ``"dlc"`` from the Hub (downloaded once), or a folder laid out like either.

    Args:
        name_or_path: a name of `HUB_IDS`, or a folder.
        protocol: ``"paradlc"`` or ``"dlc"``; default: by the format of the annotations.
        revision: commit, tag or branch of the Hub's data set.

    Raises:
        FileNotFoundError: the folder, or one of its three files, is missing.
        OSError: the data set cannot be downloaded.
        ValueError: a region has questions but no annotation or class name, or twice the same id.
    """
    if protocol is not None and protocol not in PROTOCOLS:
        raise ValueError(f"protocol {protocol!r} is none of {PROTOCOLS}")
    name = str(name_or_path)
    folder = Path(name)
    if name in HUB_IDS:
        folder = _download(HUB_IDS[name], revision)
    elif not folder.is_dir():
        raise FileNotFoundError(f"{name!r} is neither a folder nor one of the benchmarks {tuple(HUB_IDS)}")
    annotations, class_names, questions = (read_json(_find(folder, file)) for file in FILES)
    image_folder = _find(folder, "images")
    if isinstance(annotations, list):
        images, found = list(_paradlc_images(annotations)), "paradlc"
    else:
        images, found = list(_coco_images(annotations)), "dlc"
    return Benchmark(
        name if name in HUB_IDS else folder.resolve().name,
        protocol or found,
        _join(images, class_names, questions, image_folder),
    )


def crop(image: Image.Image, mask: np.ndarray) -> Crop:
    """What a judge sees of a region: image and mask around its box, grown to three times its size.

    A side of the box below 56 px counts as 56 px, about the same centre. What would lie outside the image is cut off.

    Args:
        image: the whole image.
        mask: (H, W) bool, same size, not empty.

    Returns:
        the cropped image (RGB) and the cropped mask (bool).

    Raises:
        ValueError: the sizes differ, or the mask is empty.
    """
    if mask.shape != (image.height, image.width):
        raise ValueError(f"the mask is {mask.shape[1]} x {mask.shape[0]}, the image {image.width} x {image.height}")
    if not mask.any():
        raise ValueError("the mask is empty")
    rows, columns = (
        _grown(np.flatnonzero(mask.any(axis=axis)), size) for axis, size in ((1, image.height), (0, image.width))
    )
    box = (columns.start, rows.start, columns.stop, rows.stop)
    return image.crop(box).convert("RGB"), mask[rows, columns]


def _grown(occupied: np.ndarray, size: int) -> slice:
    """The crop along one axis whose pixels ``occupied`` (sorted) the mask covers; rounded as published."""
    first, stop = int(occupied[0]), int(occupied[-1]) + 1
    length = max(stop - first, MIN_CROP_BOX)
    start = int((first + stop) / 2 - length / 2)
    return slice(max(start - length, 0), min(start + 2 * length, size))


class _Crops(Mapping[str, Crop]):
    """Crops made when looked up; the last image stays open, as regions of one image follow one another."""

    def __init__(self, benchmark: Benchmark) -> None:
        self._places = {region.region_id: (image, region) for image in benchmark.images for region in image.regions}
        self._last: tuple[str, Image.Image] | None = None

    def __getitem__(self, region_id: str) -> Crop:
        image, region = self._places[region_id]
        if self._last is None or self._last[0] != image.image_id:
            self._last = (image.image_id, image.open())
        return crop(self._last[1], region.mask())

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, region_id: object) -> bool:
        return region_id in self._places


def _download(repo_id: str, revision: str | None) -> Path:
    """The folder of a data set on the Hub, downloaded where it is not there yet."""
    try:
        return Path(snapshot_download(repo_id, repo_type="dataset", revision=revision))
    except OSError as error:
        reason = " ".join(str(error).split())
        raise OSError(
            f"the data set {repo_id} cannot be downloaded; take a local copy with --data DIR, or load_benchmark(DIR). "
            f"The Hub says: {reason}"
        ) from error


def _find(folder: Path, name: str) -> Path:
    """A file or folder of a benchmark, at its top or in ``annotations/``; images may be missing."""
    places = [folder / name, folder / "annotations" / name]
    found = next((place for place in places if place.exists()), None)
    if found is None and name in FILES:
        raise FileNotFoundError(f"{folder} has no {name}, neither at its top nor in annotations/")
    return found or places[0]


# An image before its questions are joined: id, file name, height, width, region ids with run lengths.
_Drawn = tuple[str, str, int, int, list[tuple[str, Mapping[str, Any]]]]


def _paradlc_images(annotations: Sequence[Mapping[str, Any]]) -> Iterator[_Drawn]:
    for entry in annotations:
        regions = [(f"{entry['image_id']}_{item['index']}", item["mask_rle"]) for item in entry["annotations"]]
        yield str(entry["image_id"]), entry["file_name"], entry["height"], entry["width"], regions


def _coco_images(annotations: Mapping[str, Any]) -> Iterator[_Drawn]:
    by_image: dict[Any, list[tuple[str, Mapping[str, Any]]]] = {entry["id"]: [] for entry in annotations["images"]}
    for item in annotations["annotations"]:
        by_image[item["image_id"]].append((str(item["id"]), item["segmentation"]))
    for entry in annotations["images"]:
        yield str(entry["id"]), entry["file_name"], entry["height"], entry["width"], by_image[entry["id"]]


def _join(
    images: Sequence[_Drawn],
    class_names: Mapping[str, str],
    questions: Mapping[str, Sequence[Question]],
    image_folder: Path,
) -> list[BenchmarkImage]:
    """Images with the regions that have questions; every question finds its region, or it is an error."""
    drawn = [region_id for *_, regions in images for region_id, _ in regions]
    if len(set(drawn)) < len(drawn):
        twice = sorted({region_id for region_id in drawn if drawn.count(region_id) > 1})
        raise ValueError(f"region ids that occur twice in the annotations: {', '.join(twice)}")
    asked = [region_id for region_id, some in questions.items() if some]
    for kind, known in (("annotation", set(drawn)), ("class name", class_names.keys())):
        lost = [region_id for region_id in asked if region_id not in known]
        if lost:
            raise ValueError(f"{len(lost)} regions have questions but no {kind}: {', '.join(lost)}")
    joined = []
    for image_id, file_name, height, width, regions in images:
        kept = [
            BenchmarkRegion(region_id, class_names[region_id], questions[region_id], rle)
            for region_id, rle in regions
            if questions.get(region_id)
        ]
        if kept:
            joined.append(BenchmarkImage(image_id, image_folder / file_name, height, width, kept))
    return joined
