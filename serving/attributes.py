"""Structured output: one question per attribute and region, all answered together, as JSON per region.

The image is encoded once. Every attribute is a row of one batch, with its question in the shared tokens and all regions
behind it; the rows denoise in the same passes. Each answer is what its question alone would get for its region alone
(isolated layout). A model answers as well as it was trained to be asked: the embedded one was trained on one question
about regions, and its answers to others are sentences of its captions.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import Pipeline

from perceptiondlm.images_perceptiondlm import is_encoded
from perceptiondlm.regions_perceptiondlm import short


QUESTION = "What is the {name} of the masked region? Answer with one word or a short phrase."
QUESTIONS = {
    "name": "What is the masked object? Answer with its name alone.",
    "count": "How many objects are in the masked region? Answer with a number.",
    "text": "Which text can be read in the masked region? Answer with the text alone.",
    "state": "In which state is the masked object? Answer with one word or a short phrase.",
    "action": "What is the masked subject doing? Answer with one word or a short phrase.",
}
NAME = re.compile(r"[A-Za-z][A-Za-z0-9 _-]*")


@dataclass(frozen=True)
class Attribute:
    """A key of the output and the question that fills it."""

    name: str
    question: str

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise ValueError(f"attribute {short(self.name)}: accepted are names of letters, digits, spaces, _ and -")
        if not self.question.strip():
            raise ValueError(f"attribute {self.name!r} has an empty question")

    @classmethod
    def of(cls, given: str) -> Attribute:
        """An attribute by its name, `color`, or with its own question, `age=How old does the person look?`."""
        name, own, question = given.partition("=")
        name = name.strip()
        known = QUESTIONS.get(name.lower(), QUESTION.format(name=name.replace("_", " ")))
        return cls(name, question.strip() if own else known)


def parse_attributes(given: str | Sequence[str]) -> list[Attribute]:
    """The attributes of `--attributes name,color,material` or of a list of such, in order.

    A question holds no comma in the text form; in a list it may.

    Raises:
        ValueError: for names that are no names or come twice, and for none.
    """
    parts = given.split(",") if isinstance(given, str) else list(given)
    attributes = [Attribute.of(part) for part in parts if part.strip()]
    names = [attribute.name for attribute in attributes]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"attributes are {short(names)}; accepted: one name at least, each once, such as name,color")
    return attributes


def ask_attributes(
    pipe: Pipeline, image: Any, attributes: Sequence[Attribute], *, masks: Any = None, boxes: Any = None,
    label_map: Any = None, exif: str | None = None, resize_masks: bool = False,
    max_regions_per_pass: int | None = None, max_tiles: int | None = None, **settings: Any,
) -> list[dict[str, dict[str, Any]]]:  # fmt: skip
    """Ask about every region of an image.

    Args:
        pipe: `pipeline("region-captioning")`.
        image: every form that the processor takes, or `pipe.encode_image(image)`.
        attributes: of `parse_attributes`.
        masks, boxes, label_map, exif, resize_masks, max_regions_per_pass, max_tiles: as for the pipeline.
        settings: of decoding, such as `preset="fast"` or `max_new_tokens=8`; by default the pipeline's.

    Returns:
        a dict per region, in the order given: attribute name to `{"value": str, "score": float}`, the score being the
        mean probability of the answer's tokens, in [0, 1].
    """
    regions = {"masks": masks, "boxes": boxes, "label_map": label_map}
    given = [form for form, value in regions.items() if value is not None]
    if len(given) != 1:
        raise ValueError(f"give regions in one of {tuple(regions)}, got {given}")
    keywords = {"exif": exif, "max_tiles": max_tiles, "max_regions_per_pass": max_regions_per_pass}
    options = {name: value for name, value in keywords.items() if value is not None} | {"resize_masks": resize_masks}
    processor = pipe.processor
    passes = processor.region_passes(image, given[0], regions[given[0]], **options)
    if not passes:
        return []
    rows = [row for sample, one in enumerate(attributes) for row in processor.lay_out(passes, one.question, sample)]
    inputs = dict(processor.collate(rows))
    if is_encoded(image):
        image.max_prefixes = max(image.max_prefixes, len(attributes) + 1)
        inputs["encoded_image"] = image
    output = pipe.forward(inputs, **{**pipe._forward_params, **settings})["output"]
    answers = processor.post_process_region_captions(output, True, len(attributes))
    return [
        {one.name: {"value": a["caption"], "score": a["score"]} for one, a in zip(attributes, region, strict=True)}
        for region in zip(*answers, strict=True)
    ]
