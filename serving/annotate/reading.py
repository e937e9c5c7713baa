"""From what a source says to what the model takes: images decoded, regions found, checked one by one, and measured."""

import pickle
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers import AutoProcessor

from perceptiondlm.common.loading import from_checkpoint, model_path
from perceptiondlm.common.region_files import read_regions
from perceptiondlm.images_perceptiondlm import read_image
from perceptiondlm.regions_perceptiondlm import regions_of
from perceptiondlm.samples_perceptiondlm import BAD_SAMPLE
from perceptiondlm.serving.annotate.job import AnnotationJob
from perceptiondlm.serving.annotate.loaded import LoadedImage
from perceptiondlm.serving.annotate.plan import Plan
from perceptiondlm.serving.annotate.sources import load_part
from perceptiondlm.serving.found import FoundRegion
from perceptiondlm.serving.segmenters import load_segmenter


@dataclass
class PreparedImage:
    """An image on its way to the model.

    Attributes:
        record: `{"id", "image", "width", "height", "place"}`, the last being its number within the part; of an image
            of which some regions are read, `items`, the keys of all that the source names.
        found, keys: its regions and their keys.
        spans: seconds of a video that each speaks for.
        passes: what the processor made of them, a dict per pass.
        picture: kept where a segmenter with weights has to see it first.
        failures: of the image (then there is nothing else), or of some regions.
    """

    record: dict[str, Any]
    found: list[FoundRegion] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    spans: list[tuple[float, float] | None] = field(default_factory=list)
    passes: list[dict] = field(default_factory=list)
    picture: Image.Image | None = None
    failures: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class PreparedPart:
    """A part's images."""

    number: int
    images: list[PreparedImage]

    def packed(self) -> bytes:
        """The part as bytes, to be sent to where the model is."""
        return pickle.dumps(self, protocol=pickle.HIGHEST_PROTOCOL)


def failure(identity: str, name: str, error: Any, region: str | None = None) -> dict[str, Any]:
    """An entry of the failure list: of an image, or of the region of that key in it."""
    if region is None:
        return {"id": identity, "image": name, "kind": "image", "error": str(error)}
    return {"id": f"{identity}/{region}", "image": name, "kind": "region", "region": region, "error": str(error)}


class PartReader:
    """Reads parts of a run; used by threads and by Ray's tasks alike.

    Args:
        job: settled.
        processor: the model's; loaded where it is not given.
    """

    def __init__(self, job: AnnotationJob, processor: Any = None):
        self.job = job
        self.processor = processor or load_processor(model_path(job.model))
        self.plan = Plan.open(job.folder)
        beside_model = job.regions.needs_model
        self.segmenter = None if beside_model else load_segmenter(job.regions.segmenter or "none")

    def __call__(self, number: int) -> PreparedPart:
        """Read, find and measure. What is wrong with an image or region is noted; the others go on.

        `only` of a part names the places of the images that are read, each with the keys of its regions, None for all.
        """
        spec = self.plan.part(number)
        only = spec.get("only")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a warning per image would bury the progress
            images = [
                self.prepared(loaded, place, only and only[str(place)])
                for place, loaded in enumerate(load_part(spec, self.job))
                if only is None or str(place) in only
            ]
        return PreparedPart(number, images)

    def prepared(self, loaded: LoadedImage, place: int, wanted: list[str] | None = None) -> PreparedImage:
        """One image, the number `place` of its part; `wanted` are keys of regions, None for all."""
        record = {"id": loaded.id, "image": loaded.name, "width": None, "height": None, "place": place}
        prepared = PreparedImage(record)
        try:
            if loaded.error is not None:
                raise ValueError(loaded.error)
            picture, turned = read_image(loaded.image, "image", self.job.exif)
            prepared.record |= {"width": picture.width, "height": picture.height}
            if turned != 1 and wanted is None and self.job.regions.where != "segmenter":
                prepared.record["turned"] = turned  # nobody has said which picture the regions refer to
            if self.segmenter is None:
                prepared.picture = picture
                prepared.found = self.given(loaded, picture, prepared, wanted)  # boxes for the segmenter
            else:
                found = self.given(loaded, picture, prepared, wanted)
                measure(
                    prepared, segmented(self.job, self.segmenter, picture, found), picture, self.job, self.processor
                )
        except BAD_SAMPLE as error:
            return PreparedImage(prepared.record, failures=[failure(loaded.id, loaded.name, error)])
        return prepared

    def given(
        self, loaded: LoadedImage, picture: Image.Image, prepared: PreparedImage, wanted: list[str] | None
    ) -> list[FoundRegion]:
        """The regions that the source names, each read by itself where they are a list; sets the image's keys."""
        job, size, found = self.job, (picture.height, picture.width), []
        if job.regions.where == "segmenter":
            return []
        value = loaded.regions
        for file in loaded.files:
            part = read_regions(Path(file), Path(loaded.image), size, job.regions.form)
            value = part if value is None else [*value, *part]
        items = list(one_by_one(value, job.regions.form))
        names = [loaded.keys[place] if loaded.keys else str(place) for place in range(len(items))]
        if wanted is not None:
            prepared.record["items"] = names
        for place, (key, item) in enumerate(zip(names, items, strict=True)):
            if wanted is not None and key not in wanted:
                continue
            try:
                regions = list(regions_of(size, **{job.regions.form: item}, resize_masks=job.resize_masks))
            except BAD_SAMPLE as error:
                prepared.failures.append(failure(loaded.id, loaded.name, error, key))
                continue
            for number, region in enumerate(regions):
                label = loaded.labels[place] if loaded.labels and place < len(loaded.labels) else None
                found.append(FoundRegion.of_region(region, label=label))
                prepared.keys.append(key if len(regions) == 1 else str(number))
                prepared.spans.append(loaded.spans[place] if loaded.spans else None)
        if len(set(prepared.keys)) < len(prepared.keys):
            raise ValueError(f"{len(prepared.keys)} regions have {len(set(prepared.keys))} ids; accepted: one id each")
        return found


def one_by_one(value: Any, form: str) -> Iterator[Any]:
    """The regions of a list one by one, each in a form of several; anything else whole."""
    listed = isinstance(value, list) and form != "label_map"
    flat = listed and value and all(isinstance(item, (int, float)) for item in value)
    if listed and not flat and not rings_of_one(value, form):
        yield from ([item] for item in value)
    elif isinstance(value, np.ndarray) and form == "masks" and value.ndim == 3:
        yield from (item[None] for item in value)
    elif value is not None:
        yield value


def rings_of_one(value: list[Any], form: str) -> bool:
    """Whether a list of lists of numbers is the rings of one region, as the processor reads it."""
    if form != "masks":
        return False
    return bool(value) and all(
        isinstance(item, list) and item and not isinstance(item[0], (list, dict)) for item in value
    )


def segmented(job: AnnotationJob, segmenter: Any, picture: Image.Image, given: list[FoundRegion]) -> list[FoundRegion]:
    """The regions that a segmenter finds, or makes of boxes; those given where it has nothing to do."""
    if job.regions.where == "segmenter":
        text = job.regions.text
        return segmenter.everything(picture) if text is None else segmenter.named(picture, text)
    if job.regions.form != "boxes" or job.regions.segmenter in (None, "none") or not given:
        return given
    made = segmenter.at_boxes(picture, [region.box for region in given])
    return [
        FoundRegion(region.mask, region.box, region.score, source.label)
        for region, source in zip(made, given, strict=True)
    ]


def measure(
    prepared: PreparedImage, found: list[FoundRegion], picture: Image.Image, job: AnnotationJob, processor: Any
) -> None:
    """Give a prepared image its regions and what the processor makes of them; the picture itself is let go."""
    prepared.found, prepared.picture = found, None
    prepared.keys = prepared.keys or [str(number) for number in range(len(found))]
    prepared.spans = prepared.spans or [None] * len(found)
    if found:
        masks = [region.mask for region in found]
        limit = {"max_regions_per_pass": job.regions_per_batch, "exif": job.exif or "stored"}
        prepared.passes = processor.region_passes(picture, "masks", masks, **limit)


@lru_cache(maxsize=1)
def load_processor(path: str) -> Any:
    """The processor of a model, once a process."""
    return from_checkpoint(AutoProcessor, path)
