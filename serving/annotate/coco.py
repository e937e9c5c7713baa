"""COCO and LVIS files about many images, read once: the images, and the annotations of each."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from perceptiondlm.common.json_files import read_json
from perceptiondlm.common.region_files.entry import few
from perceptiondlm.serving.annotate.job import AnnotationJob


KEPT = ("segmentation", "bbox")  # of an annotation: what says where it is


@dataclass
class CocoFile:
    """A file's images by id, the annotations of each, and the names of categories. Crowds are left out."""

    path: Path
    images: dict[Any, str]
    annotations: dict[Any, list[Mapping]]
    categories: dict[Any, str]

    @classmethod
    def read(cls, path: Path) -> "CocoFile":
        """Read a file.

        Raises:
            ValueError: if it is no COCO file, or names an image twice.
        """
        content = read_json(path)
        if not isinstance(content, Mapping) or not {"images", "annotations"} <= set(content):
            raise ValueError(f"{path} is no COCO file: it needs images and annotations")
        try:
            images = {entry["id"]: name_of(entry) for entry in content["images"]}
            by_image: dict[Any, list[Mapping]] = defaultdict(list)
            for annotation in content["annotations"] or []:
                if not annotation.get("iscrowd"):
                    by_image[annotation["image_id"]].append(annotation)
            categories = {entry["id"]: entry["name"] for entry in content.get("categories") or []}
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not laid out as COCO files are: {type(error).__name__}: {error}") from error
        if strange := [number for number in by_image if number not in images]:
            raise ValueError(f"{path} has annotations of images that it does not list: {few(strange)}")
        names = list(images.values())
        if len(set(names)) < len(names):
            twice = [name for name in set(names) if names.count(name) > 1]
            raise ValueError(f"{path} lists images of one name twice: {few(twice)}")
        return cls(path, images, dict(by_image), categories)

    def regions_of_id(self, number: Any, form: str = "masks") -> dict[str, Any]:
        """What a plan says of an image's regions: where they are, their ids and names."""
        found = self.annotations.get(number, [])
        kept = KEPT if form == "masks" else KEPT[1:]
        regions = [{key: annotation[key] for key in kept if key in annotation} for annotation in found]
        keys = [str(annotation.get("id", place)) for place, annotation in enumerate(found)]
        labels = [self.categories.get(annotation.get("category_id")) for annotation in found]
        return {"regions": regions, "keys": keys, "labels": labels}

    def regions_of_name(self, name: str, form: str = "masks") -> dict[str, Any]:
        """The same for an image by its path: the entry whose name ends it, or the only one of its base name."""
        whole, last = self._by_name
        numbers = next((whole[end] for end in ends_of(name) if end in whole), None)
        numbers = numbers or last.get(PurePosixPath(name).name, [])
        if len(numbers) != 1:
            return {"error": f"{self.path} has {len(numbers)} images named {name}; accepted: one"}
        return self.regions_of_id(numbers[0], form)

    @cached_property
    def _by_name(self) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
        """Images by their whole names and by the last parts of those."""
        whole: dict[str, list[Any]] = defaultdict(list)
        last: dict[str, list[Any]] = defaultdict(list)
        for number, name in self.images.items():
            whole[name].append(number)
            last[PurePosixPath(name).name].append(number)
        return whole, last


def items_of_coco(job: AnnotationJob) -> Iterator[dict[str, Any]]:
    """The images of a COCO file that is a job's source, with its own annotations or none."""
    path = Path(job.source)
    coco = CocoFile.read(path)
    folder = Path(job.images) if job.images else path.parent
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder} of the pictures of {path}")
    names = list(coco.images.values())
    if names and not any((folder / name).is_file() for name in names):
        raise FileNotFoundError(
            f"none of the {len(names)} pictures of {path} ({few(names)}) lies in {folder}: name their folder, --images"
        )
    own = job.regions.where == "source"
    if not own and job.regions.where != "segmenter":
        raise ValueError(f"{path} carries regions of its own: leave out --masks, or name a segmenter")
    for number, name in coco.images.items():
        item = {"id": name, "image": str(folder / name)}
        yield item | (coco.regions_of_id(number, job.regions.form) if own else {})


def name_of(entry: Mapping) -> str:
    """An image's file name; LVIS has it as the end of an address, folder included."""
    name = entry.get("file_name")
    if not name and isinstance(entry.get("coco_url"), str):
        name = "/".join(entry["coco_url"].split("/")[-2:])
    if not isinstance(name, str) or not name:
        raise KeyError(f"image {entry.get('id')!r} has no file_name")
    return name


def ends_of(name: str) -> Iterator[str]:
    """A path, and what is left of it without its first folders."""
    parts = PurePosixPath(name).parts
    yield from (str(PurePosixPath(*parts[start:])) for start in range(len(parts)))
