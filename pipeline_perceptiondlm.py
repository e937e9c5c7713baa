"""`pipeline("region-captioning")`: images and regions in, one caption per region out.

>>> pipe = pipeline("region-captioning", model=".", trust_remote_code=True)
>>> pipe(image, masks=masks)
[{"caption": "...", "score": 0.97, "box": {"xmin": 12, "ymin": 40, "xmax": 96, "ymax": 131}}, ...]

Importing this file registers the task, so that `pipeline("region-captioning", model=model, processor=processor)` works
with objects, too.
"""

import itertools
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from transformers import AutoModelForImageTextToText, Pipeline
from transformers.image_utils import is_valid_image
from transformers.pipelines import PIPELINE_REGISTRY

from .images_perceptiondlm import is_encoded, is_picture_source, load_image
from .samples_perceptiondlm import BAD_SAMPLE, ahead_of, checked_count, each, named
from .segmenting_perceptiondlm import Finding


TASK = "region-captioning"
REGION_FORMS = ("masks", "boxes", "label_map", "points")
SAMPLE_KEYS = ("image", "text", "point_labels", *REGION_FORMS)
FOUND_FROM = ("boxes", "points")  # forms that a segmenter makes regions of
PROCESSOR_KEYS = ("max_regions_per_pass", "max_tiles", "exif", "resize_masks", "share_prompt_ids")
ON_ERROR = ("raise", "skip")
CORNERS = ("xmin", "ymin", "xmax", "ymax")

logger = logging.getLogger(__name__)


@dataclass
class PreparedSample:
    """A sample on its way to the model: what the processor made of image and regions, or what was wrong with it."""

    number: int | None
    text: Any = None
    encoded_image: Any = None
    passes: list[dict] = field(default_factory=list)
    found: list[Any] | None = None  # what a segmenter found
    error: Exception | None = None


class RegionCaptioningPipeline(Pipeline):
    """Captions regions of images with a [`PerceptionDLMForConditionalGeneration`].

    Keywords of the call (or of `pipeline(...)`, as defaults): `max_regions_per_pass`, `max_tiles`, `exif`,
    `resize_masks` and `share_prompt_ids` of the processor, and every setting of [`PerceptionDLMGenerationConfig`], such
    as `steps`, `max_new_tokens`, `temperature`, `seed`.

    Attributes:
        failures: under `on_error="skip"`, `{"sample": number, "error": message}` of the samples that the last call
            could not caption so far.
    """

    _load_processor = True
    _load_tokenizer = False
    _load_image_processor = False
    _load_feature_extractor = False
    _pipeline_calls_generate = False  # the settings are those of our own generation config

    def __call__(
        self, images: Any, text=None, masks=None, boxes=None, label_map=None, points=None, point_labels=None,
        segmenter=None, everything=False, find=None, batch_size=None, num_workers=None, on_error="raise", **kwargs,
    ):  # fmt: skip
        """Caption regions.

        Args:
            images: an image, with `masks`, `boxes` or `label_map`; or a list of images, with a list of them, one entry
                an image; or a list, generator or `datasets.Dataset` of samples `{"image", "masks" | "boxes" |
                "label_map", "text"?}` (other columns of a dataset are ignored). What images and regions may be: see
                the processor.
            text: question that replaces the default one, for one image or a list with one an image.
            points, point_labels: what a segmenter makes regions of: (x, y) in pixels or a list of (x, y) per region,
                and 1 or 0 for a point inside or outside of it.
            segmenter: an object that finds regions (see segmenting_perceptiondlm; `perceptiondlm.serving.segmenters`
                has some): those of points and of boxes, which without it are used as they are.
            everything: caption all regions that the segmenter finds.
            find: caption the regions that this text names, with a segmenter that knows words.
            batch_size: images per forward pass, 1 by default.
            num_workers: threads that read images and regions of the next batches while the model runs, 0 by default.
            on_error: what a sample that cannot be read does: `"raise"` its error, after the results before it; or
                `"skip"`: its result is None, a warning and `failures` name it. An error of the model's call before any
                sample went through is raised in any case, since it comes from the settings.
        Returns:
            for one image, a list with a dict per region, in the order given: `caption` (`str`), `score` (mean
            probability of its tokens, in [0, 1]) and `box` (`xmin`, `ymin`, `xmax`, `ymax` in pixels, half-open); an
            image without regions gives an empty list. Regions that a segmenter found come with their `mask`, and with
            `mask_score` and `label` where it gives them. For a list, a list of those; for a generator or dataset, an
            iterator of them.
        """
        if on_error not in ON_ERROR:
            raise ValueError(f"on_error must be one of {ON_ERROR}, got {on_error!r}")
        size = checked_count("batch_size", batch_size, self._batch_size, 1)
        workers = checked_count("num_workers", num_workers, self._num_workers, 0)
        preprocess_params, forward_params, _ = self._sanitize_parameters(**kwargs)
        params = ({**self._preprocess_params, **preprocess_params}, {**self._forward_params, **forward_params})
        regions = dict(zip(REGION_FORMS, (masks, boxes, label_map, points), strict=True))
        regions |= {"text": text, "point_labels": point_labels}
        given = {name: value for name, value in regions.items() if value is not None}
        params[0]["finding"] = Finding(segmenter, everything, find)
        self.failures: list[dict[str, Any]] = []
        if self._is_image(images) or isinstance(images, Mapping):
            sample = {"image": images} if self._is_image(images) else images
            return next(self._run([{**sample, **given}], *params, on_error=on_error, single=True))
        if isinstance(images, Sequence):
            return list(self._run(self._samples(images, given), *params, size, workers, on_error))
        if not (isinstance(images, Iterable) or hasattr(images, "__getitem__")):
            raise TypeError(f"images is a {type(images).__name__}; accepted: an image, a list, generator or dataset")
        if given:
            raise ValueError(f"a dataset's samples carry their own regions: leave out {sorted(given)}")
        return self._run(images, *params, size, workers, on_error)

    def _sanitize_parameters(self, **kwargs):
        preprocess = {name: kwargs.pop(name) for name in PROCESSOR_KEYS if name in kwargs}
        return preprocess, kwargs, {}

    @staticmethod
    def _is_image(value: Any) -> bool:
        return is_encoded(value) or is_picture_source(value) or is_valid_image(value)

    def _samples(self, images: Sequence[Any], given: dict[str, Any]) -> list[Any]:
        """One sample per image of a list; regions and texts come one per image."""
        is_sample = [isinstance(image, Mapping) and not self._is_image(image) for image in images]
        samples = [dict(i) if whole else {"image": i} for i, whole in zip(images, is_sample, strict=True)]
        for name, values in given.items():
            if name == "text" and isinstance(values, str):
                values = [values] * len(samples)
            listed = isinstance(values, Sequence) and not isinstance(values, (str, bytes))
            if not listed or len(values) != len(samples):
                found = len(values) if listed else type(values).__name__
                raise ValueError(f"{len(samples)} images need a list of {len(samples)} entries of {name}, got {found}")
            for sample, value in zip(samples, values, strict=True):
                sample[name] = value
        return samples

    def _run(
        self, samples: Any, preprocess_params, forward_params, batch_size=1, workers=0, on_error="raise", single=False
    ) -> Iterator:
        """Samples through preparation, model and postprocessing in batches; results one by one, in order."""
        work = partial(self._prepare, single=single, **preprocess_params)
        numbered = enumerate(each(samples, skip=on_error == "skip"))
        prepared = ahead_of(numbered, work, workers, batch_size + workers)
        went_through = False
        while batch := list(itertools.islice(prepared, batch_size)):
            bad = next((sample for sample in batch if sample.error is not None), None)
            if bad is not None and on_error == "raise":
                yield from self._caption(batch[: batch.index(bad)], forward_params)
                raise bad.error
            try:
                results = self._caption([sample for sample in batch if sample.error is None], forward_params)
            except BAD_SAMPLE:
                if on_error == "raise" or not went_through:
                    raise
                results = self._caption_one_by_one(batch, forward_params)
            went_through = went_through or len(results) > 0
            following = iter(results)
            for sample in batch:
                if sample.error is None:
                    yield next(following)
                else:
                    self._note(sample)
                    yield None

    def _note(self, sample: PreparedSample) -> None:
        """Remember and report a sample that failed; its result is None."""
        self.failures.append({"sample": sample.number, "error": str(sample.error)})
        logger.warning("%s; its result is None", sample.error)

    def _prepare(self, numbered: tuple[int, Any], single: bool, finding: Finding, **settings: Any) -> PreparedSample:
        """What the processor makes of a sample's image and regions; runs in worker threads, which leave text alone."""
        number, sample = numbered
        prepared = PreparedSample(None if single else number)
        try:
            if isinstance(sample, Exception):
                raise sample
            if not isinstance(sample, Mapping):
                raise TypeError(f"a sample is a {type(sample).__name__}; accepted: a dict with {SAMPLE_KEYS}")
            given = [form for form in REGION_FORMS if sample.get(form) is not None]
            known = [key for key in sample if key in SAMPLE_KEYS]
            if finding.by_itself and ("image" not in sample or given):
                raise ValueError(f"with {finding.by_itself} a sample needs 'image' and no regions, got {known}")
            if not finding.by_itself and ("image" not in sample or len(given) != 1):
                raise ValueError(f"a sample needs 'image' and one of {REGION_FORMS}, got {known}")
            image, form = sample["image"], given[0] if given else ""
            regions = sample.get(form)
            if finding.by_itself or (finding.segmenter is not None and form in FOUND_FROM):
                image = self._picture(image, settings)
                prepared.found = finding.regions(
                    image, **{form: regions} if form else {}, labels=sample.get("point_labels")
                )
                form, regions = "masks", [region.mask for region in prepared.found]
            prepared.text = sample.get("text") or self.processor.region_question
            prepared.encoded_image = image if is_encoded(image) else None
            prepared.passes = self.processor.region_passes(image, form, regions, **settings)
        except BAD_SAMPLE as error:
            prepared.error = named(error, prepared.number)
        return prepared

    def _picture(self, image: Any, settings: dict[str, Any]) -> Any:
        """The RGB picture that a segmenter looks at."""
        if is_encoded(image):
            raise ValueError("an encoded image holds no picture to find regions in; accepted with a segmenter: images")
        return load_image(image, exif=settings.get("exif") or self.processor.image_processor.exif)

    def _caption(self, samples: list[PreparedSample], forward_params) -> list[list[dict[str, Any]]]:
        """Results of a batch of samples; images without regions never reach the model."""
        filled = [sample for sample in samples if sample.passes]
        if not filled:
            return [[] for _ in samples]
        outputs = self.forward(self.preprocess(filled), **forward_params)
        results = iter(self.postprocess(outputs, len(filled)))
        return [with_found(next(results), sample.found) if sample.passes else [] for sample in samples]

    def _caption_one_by_one(self, batch: list[PreparedSample], forward_params) -> list[list[dict[str, Any]]]:
        """Results of the samples of a batch that the model takes; the others get their error."""
        results = []
        for sample in batch:
            if sample.error is None:
                try:
                    results += self._caption([sample], forward_params)
                except BAD_SAMPLE as error:
                    sample.error = named(error, sample.number)
        return results

    def preprocess(self, samples: list[PreparedSample]) -> dict[str, Any]:
        """Prepared samples, each with a region at least, to model inputs."""
        encoded = [sample.encoded_image for sample in samples if sample.encoded_image is not None]
        if encoded and len(samples) > 1:
            raise ValueError("encoded images are captioned one by one: use batch_size=1")
        rows = []
        for index, sample in enumerate(samples):
            if not isinstance(sample.text, str):
                raise TypeError(f"text must be a string, got {type(sample.text).__name__}")
            rows += self.processor.lay_out(sample.passes, sample.text, index)
        inputs = self.processor.collate(rows)
        return {**inputs, "encoded_image": encoded[0]} if encoded else inputs

    def encode_image(self, image: Any) -> Any:
        """Encode an image once; the result stands for it in later calls, with any regions, questions and settings."""
        picture = load_image(image)
        tiles = self.processor.image_processor.preprocess(picture, return_tensors="pt")
        kept = picture if self.processor.own_pixels.wanted else None
        return self.model.encode_image(**tiles.to(self.device), picture=kept)

    def _forward(self, model_inputs, **generate_kwargs: Any) -> dict[str, Any]:
        return {
            "output": self.model.generate(**model_inputs, **generate_kwargs),
            "boxes": model_inputs["region_boxes"],
        }

    def save_pretrained(self, save_directory, **kwargs: Any) -> None:
        """Save model, processor and code; the base class would leave the processor out."""
        super().save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory)

    def postprocess(self, model_outputs: dict[str, Any], num_images: int | None = None) -> list[list[dict[str, Any]]]:
        """Model outputs to a list per image of `{"caption", "score", "box"}`."""
        captions = self.processor.post_process_region_captions(model_outputs["output"], True, num_images)
        corners = iter(model_outputs["boxes"][model_outputs["output"].region_indices].tolist())
        return [
            [{**region, "box": dict(zip(CORNERS, next(corners), strict=True))} for region in regions]
            for regions in captions
        ]


def with_found(regions: list[dict[str, Any]], found: list[Any] | None) -> list[dict[str, Any]]:
    """Results of an image with what its segmenter says of them."""
    if found is None:
        return regions
    parts = [
        {"mask": one.mask, "mask_score": getattr(one, "score", None), "label": getattr(one, "label", None)}
        for one in found
    ]
    told = [{name: value for name, value in part.items() if value is not None} for part in parts]
    return [{**region, **part} for region, part in zip(regions, told, strict=True)]


if TASK not in PIPELINE_REGISTRY.supported_tasks:
    PIPELINE_REGISTRY.register_pipeline(
        TASK, RegionCaptioningPipeline, pt_model=AutoModelForImageTextToText, type="multimodal"
    )

__all__ = ["RegionCaptioningPipeline"]
