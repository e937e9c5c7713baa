"""Chat completions, in the form of OpenAI's: questions about images, and regions of one image.

A region comes in one of three ways: in the field `regions`; as the transparent part of an RGBA picture left out, which
is how describe-anything's server takes it; or as several such pictures that differ in their alpha alone, a region each.
An answer with regions has a choice per region. A model that sees regions alone is asked about an image without any as
about the region of all its pixels.
"""

import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from perceptiondlm.serving.answers import Answers
from perceptiondlm.serving.found import FoundRegion
from perceptiondlm.serving.server.limits import Refused, too_large
from perceptiondlm.serving.server.pictures import picture_bytes, read_picture, read_with_region
from perceptiondlm.serving.server.reading import Reader, RegionAsk
from perceptiondlm.serving.server.schemas import ChatRequest, ContentPart, Message


OTHER_QUESTION = "Describe the masked region in detail."  # what clients of describe-anything ask
PLACEHOLDERS = ("Image:", "<image>")  # that they may write before it
ONE_TURN = "regions are asked about in one turn: user messages alone, with one image"
REGIONS_ALONE = f"this model sees regions alone, so an image is asked about as one: {ONE_TURN}"


@dataclass
class ChatAsk:
    """What a chat asks the engine: messages, or regions with a question (None: the default one)."""

    messages: list[dict[str, Any]] | None = None
    regions: RegionAsk | None = None
    question: str | None = None

    def keywords(self) -> dict[str, Any]:
        """Of the engine's `submit`."""
        if self.regions is None:
            return {"messages": self.messages}
        return {"image": self.regions.picture, "regions": self.regions.regions, "question": self.question}


def read_chat(request: ChatRequest, reader: Reader, whole_images: bool = True) -> ChatAsk:
    """Read a conversation's pictures and regions; runs on a thread of its own.

    Args:
        whole_images: whether the model sees images as a whole; otherwise an image without regions is one region.
    Raises:
        Refused, ValueError, TypeError: naming what was wrong and what is accepted.
    """
    reader.check_text(*(text for message in request.messages for text in texts_of(message)))
    if request.messages[-1].role != "user":
        raise Refused(400, f"the last message is the {request.messages[-1].role}'s; accepted: the user's", "messages")
    sources = [url for message in request.messages for url in urls_of(message)]
    if len(sources) > reader.limits.max_images:
        raise too_large(f"{len(sources)} images were given; accepted: {reader.limits.max_images} per request")
    if request.regions is not None:
        reader.check_regions(request.regions)
        if len(sources) != 1:
            raise Refused(400, f"{ONE_TURN}; got {len(sources)} images", "messages")
        picture = read_picture(picture_bytes(sources[0], "image", reader.limits), "image", reader.limits)
        return ChatAsk(regions=reader.region_ask(picture, request.regions), question=question_of(request))
    read = [
        read_with_region(picture_bytes(source, name, reader.limits), name, reader.limits)
        for source, name in zip(sources, (f"image {place}" for place in range(len(sources))), strict=True)
    ]
    if any(region is not None for _, region in read):
        return ChatAsk(regions=marked_regions(read), question=question_of(request))
    if read and not whole_images:
        return ChatAsk(regions=whole_picture(read), question=question_of(request, REGIONS_ALONE))
    pictures = iter([picture for picture, _ in read])
    return ChatAsk(messages=[message_of(message, pictures) for message in request.messages])


def marked_regions(read: list[tuple[Image.Image, np.ndarray | None]]) -> RegionAsk:
    """The regions that pictures mark by their transparency, all of one image."""
    first = np.asarray(read[0][0])
    regions = []
    for place, (picture, mask) in enumerate(read):
        if mask is None:
            raise Refused(
                400, f"image {place} marks no region, others do; accepted: an alpha channel in all", "regions"
            )
        if not np.array_equal(np.asarray(picture), first):
            raise Refused(400, f"image {place} has other colours than image 0; {ONE_TURN}", "regions")
        regions.append(FoundRegion.of_mask(mask))
    found = [region for region in regions if region is not None]
    return RegionAsk(read[0][0], found, len(found))


def whole_picture(read: list[tuple[Image.Image, np.ndarray | None]]) -> RegionAsk:
    """The region that is all of the one picture."""
    if len(read) != 1:
        raise Refused(400, f"{REGIONS_ALONE}; got {len(read)} images", "messages")
    picture = read[0][0]
    return RegionAsk(picture, [FoundRegion.whole(*picture.size)], 1)


def question_of(request: ChatRequest, accepted: str = ONE_TURN) -> str | None:
    """The question about regions; None where it is nobody's own. A conversation is refused by what is `accepted`."""
    if any(message.role != "user" for message in request.messages):
        raise Refused(400, f"{accepted}; got roles {[message.role for message in request.messages]}", "messages")
    text = " ".join(text for message in request.messages for text in texts_of(message)).strip()
    for placeholder in PLACEHOLDERS:
        text = text.removeprefix(placeholder).strip()
    return None if text in ("", OTHER_QUESTION) else text


def texts_of(message: Message) -> list[str]:
    """The texts of a message."""
    if isinstance(message.content, str):
        return [message.content]
    for part in message.content:
        if (part.text is None) == (part.type == "text") or (part.image_url is None) == (part.type == "image_url"):
            raise Refused(400, f"a part of type {part.type} needs the field {part.type} and no other", "messages")
    return [part.text for part in message.content if part.text is not None]


def urls_of(message: Message) -> list[str]:
    """The images of a message, as they are given."""
    if isinstance(message.content, str):
        return []
    given = [part.image_url for part in message.content if part.image_url is not None]
    if given and message.role != "user":
        raise Refused(400, f"a message of the {message.role}'s has an image; accepted: those of the user's", "messages")
    return [url if isinstance(url, str) else url.url for url in given]


def message_of(message: Message, pictures: Iterator[Image.Image]) -> dict[str, Any]:
    """A message as the processor takes it."""
    role = "system" if message.role == "developer" else message.role

    def part_of(part: ContentPart) -> dict[str, Any]:
        return (
            {"type": "text", "text": part.text} if part.type == "text" else {"type": "image", "image": next(pictures)}
        )

    content = message.content if isinstance(message.content, str) else [part_of(part) for part in message.content]
    return {"role": role, "content": content}


class Completion:
    """The form of an answer, whole or in pieces.

    Args:
        model: its name.
    """

    def __init__(self, model: str):
        self.head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, answers: Answers) -> dict[str, Any]:
        """The answer with a choice per text; a choice of a region names its box."""
        choices = []
        for index, text in enumerate(answers.texts):
            choice = {
                "index": index,
                "message": {"role": "assistant", "content": text},
                "finish_reason": finish(answers, index),
                "score": answers.scores[index],
            }
            if answers.boxes:
                choice["box"] = dict(zip(("xmin", "ymin", "xmax", "ymax"), answers.boxes[index], strict=True))
            choices.append(choice)
        return {**self.head, "object": "chat.completion", "choices": choices, "usage": usage(answers)}

    def piece(self, index: int, text: str | None, finished: str | None = None, first: bool = False) -> dict[str, Any]:
        """A piece of one choice."""
        delta: dict[str, Any] = {"role": "assistant"} if first else {}
        if text is not None:
            delta["content"] = text
        choice = {"index": index, "delta": delta, "finish_reason": finished}
        return {**self.head, "object": "chat.completion.chunk", "choices": [choice]}


class Settled:
    """Texts of drafts as pieces that are only ever added to: what stands before the first open slot.

    A draft's text may begin with spaces that the answer leaves out, and its last word may still grow; so a piece is
    sent once the final text is known to begin with it.
    """

    def __init__(self) -> None:
        self.sent: list[str] = []

    def pieces(self, texts: list[str], final: bool = False) -> Iterator[tuple[int, str]]:
        """What is new in each text."""
        self.sent += [""] * (len(texts) - len(self.sent))
        for index, text in enumerate(texts):
            text = text if final else text.strip()
            if len(text) > len(self.sent[index]) and text.startswith(self.sent[index]):
                yield index, text[len(self.sent[index]) :]
                self.sent[index] = text


def finish(answers: Answers, index: int) -> str:
    """Why an answer ended."""
    return "stop" if answers.ended[index] else "length"


def usage(answers: Answers) -> dict[str, Any]:
    """Tokens, as OpenAI counts them, and what else is worth knowing."""
    completion = sum(answers.lengths)
    return {
        "prompt_tokens": answers.prompt_tokens,
        "completion_tokens": completion,
        "total_tokens": answers.prompt_tokens + completion,
        **work(answers),
    }


def work(answers: Answers) -> dict[str, Any]:
    """What an answer took."""
    return {
        "num_forward_passes": answers.num_forward_passes,
        "image_was_known": answers.image_was_known,
        "seconds_waiting": round(answers.seconds_waiting, 4),
        "seconds_running": round(answers.seconds_running, 4),
    }
