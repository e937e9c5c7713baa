"""From the body of a request to what the engine takes. Runs on threads of its own: decoding holds nobody up."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from PIL import Image
from pydantic import BaseModel, ValidationError

from perceptiondlm.serving.found import FoundRegion
from perceptiondlm.serving.prompts import RegionPrompts
from perceptiondlm.serving.segmenters import Segmenter
from perceptiondlm.serving.server.limits import Limits, Refused, too_large
from perceptiondlm.serving.server.pictures import MaskPictures, picture_bytes, read_picture
from perceptiondlm.serving.server.schemas import CaptionRequest, Regions, RunLengths


Model = TypeVar("Model", bound=BaseModel)
UNFIT = (ValueError, TypeError, OSError)  # what the readers of pictures and regions raise
MOST_ERRORS = 3  # that a message lists


@dataclass
class Upload:
    """The parts of a form.

    Args:
        request: everything but files, as JSON text; image, masks: contents of files.
    """

    request: str = "{}"
    image: bytes | None = None
    masks: list[bytes] = field(default_factory=list)


@dataclass
class RegionAsk:
    """A picture and its regions, ready for the engine.

    Args:
        num_found: regions that a segmenter has found, of which `regions` are the first ones.
    """

    picture: Image.Image
    regions: list[FoundRegion]
    num_found: int


def parse(content: bytes | str, kind: type[Model]) -> Model:
    """JSON to a model.

    Raises:
        Refused: it is not JSON, or not what the model describes, naming the field.
    """
    try:
        data = json.loads(content, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the body is not JSON: {str(error)[:200]}", "json") from error
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False, include_context=False)
        places = [f"{'.'.join(map(str, one['loc']))[:100] or 'the body'}: {one['msg']}" for one in found[:MOST_ERRORS]]
        more = f" (and {len(found) - MOST_ERRORS} more)" if len(found) > MOST_ERRORS else ""
        raise Refused(400, "; ".join(places) + more, "fields") from error


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


class Reader:
    """Reads pictures and regions within bounds.

    Args:
        limits: the bounds.
        segmenter: makes regions of points, boxes, texts and "everything".
    """

    def __init__(self, limits: Limits, segmenter: Segmenter | None = None):
        self.limits, self.segmenter = limits, segmenter

    def captions(self, request: CaptionRequest, upload: Upload) -> RegionAsk:
        """The picture and regions of a request for captions."""
        if (request.image is None) == (upload.image is None):
            raise Refused(400, "give one image: the field image in JSON, or a file of that name in a form", "picture")
        content = upload.image
        if content is None:
            content = picture_bytes(request.image, "image", self.limits)
        self.check_regions(request, len(upload.masks))
        self.check_text(request.question)
        picture = read_picture(content, "image", self.limits, request.exif)
        return self.region_ask(picture, request, upload.masks)

    def check_regions(self, regions: Regions, files: int = 0) -> None:
        """Refuse more regions and longer outlines than are accepted, before any picture is decoded."""
        given: list[Any] = [regions.masks or [], regions.boxes or [], regions.points or []]
        count, most = sum(map(len, given)) + files, self.limits.max_regions
        if count > most:
            raise too_large(f"{count} regions were given; accepted: {most} per request")
        numbers = sum(map(_numbers, regions.masks or [])) + sum(map(len, regions.points or []))
        if numbers > self.limits.max_points:
            raise too_large(f"the outlines of all regions hold {numbers} numbers; accepted: {self.limits.max_points}")
        self.check_text(regions.text)

    def check_text(self, *texts: str | None) -> None:
        """Refuse questions that are longer than accepted, or no Unicode text."""
        whole = "".join(text for text in texts if text)
        if len(whole) > self.limits.max_text:
            raise too_large(f"the texts have {len(whole)} characters; accepted: {self.limits.max_text}")
        try:
            whole.encode()
        except UnicodeEncodeError as error:
            raise Refused(
                400, f"a text holds half a character ({error.reason}); accepted: Unicode", "fields"
            ) from error

    def region_ask(self, picture: Image.Image, given: Regions, files: Sequence[bytes] = ()) -> RegionAsk:
        """The regions of a picture: masks first, those in files behind the others, then boxes and points."""
        pictures = MaskPictures(self.limits)
        masks: list[Any] = [
            self._mask(mask, f"masks[{place}]", pictures) for place, mask in enumerate(given.masks or [])
        ]
        masks += [pictures.checked(content, f"masks[{len(masks) + place}]") for place, content in enumerate(files)]
        prompts = RegionPrompts(
            masks=masks or None,
            boxes=[list(box) for box in given.boxes] if given.boxes else None,
            points=given.points or None,
            point_labels=given.point_labels,
            text=given.text,
            everything=given.everything,
        )
        found = prompts.find(picture, self.segmenter)
        return RegionAsk(picture, found[: self.limits.max_regions], len(found))

    def _mask(self, mask: Any, name: str, pictures: MaskPictures) -> Any:
        """A mask as the reader of regions takes it: never as a string, which it would read as a path."""
        if isinstance(mask, RunLengths):
            return {"size": list(mask.size), "counts": mask.counts}
        if isinstance(mask, str):
            return pictures.checked(picture_bytes(mask, name, self.limits), name)
        if not mask:
            raise Refused(400, f"{name} is an empty list; accepted: run lengths, a polygon, a picture", "regions")
        return mask if isinstance(mask[0], list) else [mask]


def _numbers(mask: Any) -> int:
    """Numbers of an outline."""
    if isinstance(mask, RunLengths):
        return len(mask.counts)
    if isinstance(mask, str):
        return 0
    return sum(len(ring) if isinstance(ring, list) else 1 for ring in mask)


def refusal_of(error: Exception) -> Refused:
    """The answer to what the readers of pictures and regions, or the model, did not take."""
    return error if isinstance(error, Refused) else Refused(400, short_reason(error), "invalid")


def short_reason(error: Exception) -> str:
    """An error's message, at a bounded length."""
    text = str(error)
    return text if len(text) <= 600 else f"{text[:600]}…"


__all__ = ["UNFIT", "Reader", "RegionAsk", "Upload", "parse", "refusal_of"]
