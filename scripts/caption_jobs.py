"""What `perceptiondlm caption` is asked: a job per image, which reads image and regions when its turn comes."""

import argparse
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image
from torch.utils.data import Dataset

from perceptiondlm.common.loading import generate_settings, model_state
from perceptiondlm.common.region_files import FORMS, is_about_many, read_regions
from perceptiondlm.images_perceptiondlm import load_image


BOX_FILES = (".json", ".xml", ".txt", ".npy", ".npz")


class Job:
    """One image of a run.

    Attributes:
        path: the image's file.
        form: the processor's keyword of its regions.
        files, boxes: where the regions are: files, or numbers on the command line.
        target: the annotated picture to write, or None.
        image, regions: what was read, until `forget`.
    """

    def __init__(
        self, options: argparse.Namespace, path: Path, files: Sequence[Path], boxes: Sequence[list[float]] = ()
    ):
        self.options, self.path, self.files, self.boxes = options, path, files, boxes
        self.form = form_of(options)
        self.target: Path | None = None
        self.forget()

    def forget(self) -> None:
        """Give back the memory of image and regions."""
        self.image: Image.Image | None = None
        self.regions: Any = None

    @cached_property
    def request(self) -> str:
        """What identifies this job's result: image, regions, question, settings and model."""
        options = self.options
        asked = [str(self.path), self.form, list(self.boxes), options.question, options.exif, options.resize_masks]
        settings = [generate_settings(options), options.max_regions_per_pass, options.dtype, options.quantize]
        asked += [options.attributes] if options.attributes is not None else []
        digest = hashlib.sha256(json.dumps([asked, settings, model_state(options.model)]).encode())
        for path in (self.path, *self.files):
            digest.update(hashlib.sha256(path.read_bytes()).digest())
        return digest.hexdigest()

    def sample(self) -> dict[str, Any]:
        """Read image and regions."""
        self.image = load_image(self.path, str(self.path), self.options.exif)
        size = (self.image.height, self.image.width)
        self.regions = list(self.boxes)
        if self.files:
            found = [read_regions(file, self.path, size, self.form) for file in self.files]
            self.regions = found[0] if len(found) == 1 else [region for part in found for region in part]
        return {"image": self.image, self.form: self.regions, "text": self.options.question}

    def result(self, captions: list[dict]) -> dict[str, Any]:
        """The entry of the results file."""
        assert self.image is not None  # it was read before it was captioned
        size = {"width": self.image.width, "height": self.image.height}
        return {"image": str(self.path), **size, "regions": captions, "request": self.request}


class Samples(Dataset):
    """The samples of jobs, each read when asked for."""

    def __init__(self, jobs: list[Job]):
        self.jobs = jobs

    def __len__(self) -> int:
        return len(self.jobs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.jobs[index].sample()


def plan_jobs(options: argparse.Namespace) -> list[Job]:
    """The jobs of a run, in the order of its images.

    Raises:
        FileNotFoundError: if an image or a region file does not exist.
        ValueError: if regions and images do not fit together.
    """
    form, images = form_of(options), options.images
    given = getattr(options, form)
    must_exist(images, "image")
    if form == "boxes" and not all(Path(value).suffix.lower() in BOX_FILES for value in given):
        boxes = [parsed_box(value) for value in given]
        if len(images) == 1:
            return [Job(options, images[0], (), boxes)]
        refuse_other_count(images, boxes, form)
        return [Job(options, path, (), [box]) for path, box in zip(images, boxes, strict=True)]
    paths = [Path(value) for value in given]
    must_exist(paths, form.replace("_", " "))
    return [Job(options, path, files) for path, files in zip(images, files_of_images(paths, images, form), strict=True)]


def files_of_images(paths: list[Path], images: Sequence[Path], form: str) -> Iterator[list[Path]]:
    """The region files of every image: pictures or one file for a single image, one each, or one about all of them."""
    if len(images) == 1:
        pictures = form == "masks" and not any(path.suffix.lower() in BOX_FILES for path in paths)
        if len(paths) > 1 and not pictures:
            accepted = "several mask pictures" if form == "masks" else "one"
            raise ValueError(f"one image takes {accepted} or one file of regions, got {[str(path) for path in paths]}")
        yield paths
    elif len(paths) == 1 and is_about_many(paths[0]):
        yield from (paths for _ in images)
    else:
        refuse_other_count(images, paths, form)
        yield from ([path] for path in paths)


def refuse_other_count(images: Sequence[Path], values: Sequence[Any], form: str) -> None:
    """Refuse regions that are not one entry per image."""
    if len(images) != len(values):
        keyword = form.replace("_", "-")
        raise ValueError(f"{len(images)} images need {len(images)} entries of --{keyword}, got {len(values)}")


def must_exist(paths: Iterable[Path], kind: str) -> None:
    """Refuse missing files by name, before any work."""
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"no {kind} file at {path}")


def parsed_box(text: str) -> list[float]:
    """A box of the command line."""
    try:
        return [float(number) for number in text.split(",")]
    except ValueError as error:
        raise ValueError(f"--boxes takes x0,y0,x1,y1 or files ({', '.join(BOX_FILES)}), got {text[:80]!r}") from error


def form_of(options: argparse.Namespace) -> str:
    """The processor's keyword of the regions that were given."""
    return next(form for form in FORMS if getattr(options, form))
