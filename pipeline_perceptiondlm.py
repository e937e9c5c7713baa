"""`pipeline("region-captioning")`: images and regions in, one caption per region out.

>>> pipe = pipeline("region-captioning", model=".", trust_remote_code=True)
>>> pipe(image, masks=masks)
[{"caption": "...", "score": 0.97, "box": {"xmin": 12, "ymin": 40, "xmax": 96, "ymax": 131}}, ...]
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from transformers import Pipeline
from transformers.image_utils import is_valid_image

from .regions_perceptiondlm import is_encoded, load_image


REGION_FORMS = ("masks", "boxes", "label_map")
SAMPLE_KEYS = ("image", "text", *REGION_FORMS)
PROCESSOR_KEYS = ("max_regions_per_pass", "max_tiles")


class RegionCaptioningPipeline(Pipeline):
    """Captions regions of images with a [`PerceptionDLMForConditionalGeneration`].

    Keywords of the call (or of `pipeline(...)`, as defaults): `max_regions_per_pass`, `max_tiles`, and every setting of
    [`PerceptionDLMGenerationConfig`], such as `steps`, `max_new_tokens`, `temperature`, `seed`.
    """

    _load_processor = True
    _load_tokenizer = False
    _load_image_processor = False
    _load_feature_extractor = False
    _pipeline_calls_generate = False  # the settings are those of our own generation config

    def __call__(self, images: Any, text=None, masks=None, boxes=None, label_map=None, batch_size=None, **kwargs):
        """Caption regions.

        Args:
            images: an image, with `masks`, `boxes` or `label_map`; or a list of images, with a list of them, one entry
                an image; or a list, generator or `datasets.Dataset` of samples `{"image", "masks" | "boxes" |
                "label_map", "text"?}` (other columns of a dataset are ignored). What images and regions may be: see
                the processor.
            text: question that replaces the default one, for one image or a list with one an image.
            batch_size: images per forward pass, 1 by default.
        Returns:
            for one image, a list with a dict per region, in the order given: `caption` (`str`), `score` (mean
            probability of its tokens, in [0, 1]) and `box` (`xmin`, `ymin`, `xmax`, `ymax` in pixels, half-open). For
            a list, a list of those; for a generator or dataset, an iterator of them.
        """
        preprocess_params, forward_params, _ = self._sanitize_parameters(**kwargs)
        params = ({**self._preprocess_params, **preprocess_params}, {**self._forward_params, **forward_params})
        regions = {"masks": masks, "boxes": boxes, "label_map": label_map}
        given = {name: value for name, value in (("text", text), *regions.items()) if value is not None}
        size = next((value for value in (batch_size, self._batch_size) if value is not None), 1)
        if type(size) is not int or size < 1:
            raise ValueError(f"batch_size must be an integer of at least 1, got {size!r}")
        if isinstance(images, dict) or self._is_image(images):
            sample = images if isinstance(images, dict) else {"image": images}
            return next(self._run([{**sample, **given}], 1, *params))
        if isinstance(images, (list, tuple)):
            return list(self._run(self._samples(images, given), size, *params))
        if not (isinstance(images, Iterable) or hasattr(images, "__getitem__")) or isinstance(images, bytes):
            raise TypeError(f"images is a {type(images).__name__}; accepted: an image, a list, generator or dataset")
        if given:
            raise ValueError(f"a dataset's samples carry their own regions: leave out {sorted(given)}")
        return self._run(images, size, *params)

    def _sanitize_parameters(self, **kwargs):
        preprocess = {name: kwargs.pop(name) for name in PROCESSOR_KEYS if name in kwargs}
        return preprocess, kwargs, {}

    @staticmethod
    def _is_image(value: Any) -> bool:
        return is_encoded(value) or isinstance(value, str) or hasattr(value, "__fspath__") or is_valid_image(value)

    @staticmethod
    def _samples(images: Iterable[Any], given: dict[str, Any]) -> list[dict[str, Any]]:
        """One dict per image of a list; regions and texts come one per image."""
        images = list(images)
        samples = [dict(image) if isinstance(image, dict) else {"image": image} for image in images]
        for name, values in given.items():
            if name == "text" and isinstance(values, str):
                values = [values] * len(samples)
            if not isinstance(values, (list, tuple)) or len(values) != len(samples):
                found = len(values) if isinstance(values, (list, tuple)) else type(values).__name__
                raise ValueError(f"{len(samples)} images need a list of {len(samples)} entries of {name}, got {found}")
            for sample, value in zip(samples, values, strict=True):
                sample[name] = value
        return samples

    def _run(self, samples: Iterable[dict[str, Any]], batch_size: int, preprocess_params, forward_params) -> Iterator:
        """Batches of samples through preprocess, forward and postprocess; results one by one."""
        iterator = iter(samples)
        while batch := list(itertools.islice(iterator, batch_size)):
            inputs = self.preprocess(batch, **preprocess_params)
            yield from self.postprocess(self.forward(inputs, **forward_params))

    def preprocess(self, samples: list[dict[str, Any]], **processor_kwargs: Any) -> dict[str, Any]:
        """Samples to model inputs; all samples of a batch give their regions in one form."""
        for sample in samples:
            if not isinstance(sample, Mapping):
                raise TypeError(f"a sample is a {type(sample).__name__}; accepted: a dict with {SAMPLE_KEYS}")
        forms = [tuple(form for form in REGION_FORMS if sample.get(form) is not None) for sample in samples]
        for sample, given in zip(samples, forms, strict=True):
            if "image" not in sample or len(given) != 1:
                known = [key for key in sample if key in SAMPLE_KEYS]
                raise ValueError(f"a sample needs 'image' and one of {REGION_FORMS}, got {known}")
        if len(set(forms)) > 1:
            raise ValueError(f"the samples of a batch must give regions in one form, got {sorted(set(forms))}")
        (form,) = forms[0]
        texts = [sample.get("text") or self.processor.region_question for sample in samples]
        images = [sample["image"] for sample in samples]
        encoded = [image for image in images if is_encoded(image)]
        if encoded and len(samples) > 1:
            raise ValueError("encoded images are captioned one by one: use batch_size=1")
        regions = {form: [sample[form] for sample in samples]}
        inputs = self.processor(images=images, text=texts, **regions, **processor_kwargs)
        return {**inputs, "encoded_image": encoded[0]} if encoded else inputs

    def encode_image(self, image: Any) -> Any:
        """Encode an image once; the result stands for it in later calls, with any regions, questions and settings."""
        inputs = self.processor(images=image, text=self.processor.region_question)
        return self.model.encode_image(**inputs.to(self.device), picture=load_image(image))

    def _forward(self, model_inputs, **generate_kwargs: Any) -> dict[str, Any]:
        return {
            "output": self.model.generate(**model_inputs, **generate_kwargs),
            "boxes": model_inputs["region_boxes"],
        }

    def save_pretrained(self, save_directory, **kwargs: Any) -> None:
        """Save model, processor and code; the base class would leave the processor out."""
        super().save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory)

    def postprocess(self, model_outputs: dict[str, Any]) -> list[list[dict[str, Any]]]:
        """Model outputs to a list per image of `{"caption", "score", "box"}`."""
        captions = self.processor.post_process_region_captions(model_outputs["output"], output_scores=True)
        corners = iter(model_outputs["boxes"][model_outputs["output"].region_indices].tolist())
        names = ("xmin", "ymin", "xmax", "ymax")
        return [
            [{**region, "box": dict(zip(names, next(corners), strict=True))} for region in regions]
            for regions in captions
        ]


__all__ = ["RegionCaptioningPipeline"]
