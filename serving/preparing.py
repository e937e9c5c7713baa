"""From what is asked of an image to what the model takes: first on any thread, then on the model's.

Reading pictures and measuring regions needs neither model nor tokenizer, so it runs beside the model, on several
threads. Encoding an image and writing the prompt happen on the one thread that runs the model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from perceptiondlm.images_perceptiondlm import is_encoded, load_image
from perceptiondlm.regions_perceptiondlm import short
from perceptiondlm.serving.found import FoundRegion
from perceptiondlm.serving.image_cache import ImageCache, content_key


REGION_FORMS = ("masks", "boxes", "label_map")
IMAGE_TENSORS = ("pixel_values", "tile_grids", "image_sizes")


@dataclass(frozen=True)
class Ask:
    """What is asked: captions of an image's regions, an answer about an image, or the next turn of a conversation.

    Args:
        image: any form that the processor takes, an encoded image included; None where `messages` has the images.
        regions: found regions, or one of `{"masks": …}`, `{"boxes": …}`, `{"label_map": …}` in any form of the
            processor; None asks about the whole image.
        question: about the image; with regions it replaces the default one.
        messages: a conversation, its image parts holding pictures, instead of image and question.
        settings: keywords of `generate`.
        max_tiles, exif: settings of the image processor.
        encode_only: nothing is asked yet: encode the image and keep it.
    """

    image: Any = None
    regions: Sequence[FoundRegion] | Mapping[str, Any] | None = None
    question: str | None = None
    messages: Sequence[Mapping[str, Any]] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    max_tiles: int | None = None
    exif: str | None = None
    encode_only: bool = False

    def __post_init__(self) -> None:
        if self.question is not None and not isinstance(self.question, str):
            raise TypeError(f"question must be a string, got {type(self.question).__name__}")
        if self.messages is not None and not (self.image is self.regions is self.question is None):
            raise ValueError("messages hold their own images and questions: leave out image, regions and question")
        if self.messages is None and self.regions is None and self.question is None and not self.encode_only:
            raise ValueError("nothing is asked; accepted: regions, a question, or messages")
        if self.regions is not None and self.image is None:
            raise ValueError("regions were given without an image")

    @property
    def region_form(self) -> tuple[str, Any] | None:
        """The form of the regions and the regions, as the processor takes them; None without regions."""
        if self.regions is None:
            return None
        if isinstance(self.regions, Mapping):
            given = [(form, value) for form, value in self.regions.items() if value is not None]
            if len(given) != 1 or given[0][0] not in REGION_FORMS:
                raise ValueError(
                    f"regions is a mapping of {short(list(self.regions))}; accepted: one of {REGION_FORMS}"
                )
            return given[0]
        if not all(isinstance(region, FoundRegion) for region in self.regions):
            raise TypeError("regions must be found regions, or a mapping such as {'masks': masks}")
        return "masks", [region.mask for region in self.regions]


@dataclass
class Prepared:
    """An ask whose picture and regions have been read.

    Args:
        ask: what it was.
        passes: of the processor's `region_passes`; empty for questions.
        messages: the conversation, for questions; None for regions, and where nothing is asked.
        picture: its one image in RGB, or an encoded one, which later calls may share; None for none and for several.
        key: of the picture's content, None where it is not to be kept.
        known: the encoded image, where it was kept already.
        tiles: `IMAGE_TENSORS` of the picture, where it has to be encoded.
    """

    ask: Ask
    passes: list[dict] = field(default_factory=list)
    messages: list[dict[str, Any]] | None = None
    picture: Any = None
    key: bytes | None = None
    known: Any = None
    tiles: dict[str, Any] | None = None

    @property
    def num_answers(self) -> int:
        """Most answers that run at a time."""
        return max((len(one["boxes"]) for one in self.passes), default=0 if self.is_empty else 1)

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to answer."""
        return self.messages is None and not self.passes


class Preparer:
    """Reads asks, and makes model inputs of them.

    Args:
        model, processor: which belong together.
        images: where encoded images are kept.
        max_regions: most regions of one pass; further ones take their turn after it.
    """

    def __init__(self, model: Any, processor: Any, images: ImageCache, max_regions: int):
        self.model, self.processor, self.images = model, processor, images
        self.max_regions = min(max_regions, processor.max_regions_per_pass or max_regions)
        self.encodes_alone = model.config.region_conditioning != "vision"  # the image, knowing no region

    def read(self, ask: Ask) -> Prepared:
        """Read picture and regions; runs on any thread.

        Raises:
            TypeError, ValueError, OSError: naming what was wrong and what is accepted.
        """
        if ask.encode_only:
            return self._with_tiles(self._with_image(Prepared(ask), ask.image))
        if ask.regions is None:
            return self._read_question(ask)
        prepared = self._with_image(Prepared(ask), ask.image)
        form, regions = ask.region_form or ("", None)
        image = prepared.picture if prepared.known is None else prepared.known
        prepared.passes = self.processor.region_passes(
            image, form, regions, max_regions_per_pass=self.max_regions, max_tiles=ask.max_tiles, exif=ask.exif
        )
        if self.encodes_alone and prepared.known is None and prepared.passes:
            first = prepared.passes[0]
            prepared.tiles = {
                "pixel_values": first["tiles"], "tile_grids": first["grids"], "image_sizes": first["sizes"]
            }  # fmt: skip
        return prepared

    def _read_question(self, ask: Ask) -> Prepared:
        messages: list[dict[str, Any]]
        if ask.messages is None:
            content = [] if ask.image is None else [{"type": "image", "image": ask.image}]
            messages = [{"role": "user", "content": [*content, {"type": "text", "text": ask.question}]}]
        else:
            messages = [copied(message) for message in ask.messages]
        prepared = Prepared(ask, messages=messages)
        images = [part["image"] for part in image_parts(messages)]
        if len(images) == 1 and self.encodes_alone:
            prepared = self._with_tiles(self._with_image(prepared, images[0]))
        return prepared

    def _with_tiles(self, prepared: Prepared) -> Prepared:
        """Cut a picture that has to be encoded into tiles."""
        if self.encodes_alone and prepared.known is None:
            made = self.processor.image_processor.preprocess(prepared.picture, max_tiles=prepared.ask.max_tiles)
            prepared.tiles = {name: made[name] for name in IMAGE_TENSORS}
        return prepared

    def _with_image(self, prepared: Prepared, image: Any) -> Prepared:
        """Load the one picture, and look whether it is kept."""
        if is_encoded(image):
            prepared.picture = prepared.known = image
            return prepared
        prepared.picture = load_image(image, exif=prepared.ask.exif)
        if self.encodes_alone:
            prepared.key = content_key(prepared.picture, prepared.ask.max_tiles)
            prepared.known = self.images.get(prepared.key)
        return prepared

    def inputs(self, prepared: Prepared) -> dict[str, Any]:
        """Keywords of `generate`; runs on the model's thread, and encodes the image where it is not kept."""
        image = self.encoded(prepared)
        if prepared.messages is None:
            passes = prepared.passes if image is None else [{**one, "tiles": None} for one in prepared.passes]
            question = prepared.ask.question or self.processor.region_question
            inputs = self.processor.collate(self.processor.lay_out(passes, question, 0))
        else:
            images = [part.pop("image") for part in image_parts(prepared.messages)]  # a dataclass there becomes a dict
            options: dict[str, Any] = {"max_tiles": prepared.ask.max_tiles, "exif": prepared.ask.exif}
            if images:
                options["images"] = images if image is None else [image]
            inputs = self.processor.apply_chat_template(
                prepared.messages, tokenize=True, return_dict=True, add_generation_prompt=True, processor_kwargs=options
            )
        inputs = dict(inputs.to(self.model.device))
        return inputs if image is None else {**inputs, "encoded_image": image}

    def encoded(self, prepared: Prepared) -> Any | None:
        """The ask's image as the model encoded it, now or before; None where the model takes tiles.

        Runs on the model's thread.
        """
        if prepared.known is not None or prepared.tiles is None:
            return prepared.known
        assert prepared.key is not None  # what is encoded here has a picture
        image = self.images.get(prepared.key, count=False)  # another ask may have brought it meanwhile
        if image is None:
            device = self.model.device
            tensors = {name: torch.as_tensor(np.asarray(made)).to(device) for name, made in prepared.tiles.items()}
            kept = prepared.picture if self.processor.own_pixels.wanted else None
            image = self.model.encode_image(**tensors, picture=kept, fingerprint=False)
        prepared.known, prepared.tiles = image, None
        return image

    def remember(self, prepared: Prepared) -> None:
        """Keep an ask's encoded image, with what it has learned of questions."""
        if prepared.key is not None and prepared.known is not None:
            self.images.keep(prepared.key, prepared.known)


def copied(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message whose parts may be changed."""
    content = message.get("content")
    if isinstance(content, (list, tuple)):
        content = [dict(part) if isinstance(part, Mapping) else part for part in content]
    return {**message, "content": content}


def image_parts(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The image parts of a conversation, in order."""
    contents = [message.get("content") for message in messages]
    parts = [part for content in contents if isinstance(content, (list, tuple)) for part in content]
    return [part for part in parts if isinstance(part, dict) and part.get("type") == "image"]
