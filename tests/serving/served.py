"""A server with a tiny model, and the bodies that its tests send."""

import base64
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask
from starlette.testclient import TestClient

from perceptiondlm.serving.engine import Engine
from perceptiondlm.serving.server.app import create_app
from perceptiondlm.serving.server.limits import Limits


SETTINGS = {"max_new_tokens": 6, "steps": 6}


@contextmanager
def client_of(
    model: Any, processor: Any, limits: Limits | None = None, segmenter: Any = None, **engine: Any
) -> Iterator[TestClient]:
    """A client of a server that runs in this process; what the server raises, the client raises."""

    def start() -> Engine:
        return Engine(model, processor, settings=SETTINGS, **engine)

    app = create_app(start, limits, segmenter, "tiny", drain_seconds=10)
    with TestClient(app, raise_server_exceptions=True) as client:
        yield client


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    """A picture's file."""
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def text_of(content: bytes) -> str:
    """A file's contents as base64."""
    return base64.b64encode(content).decode()


def data_url(image: Image.Image, kind: str = "PNG") -> str:
    return f"data:image/{kind.lower()};base64,{text_of(encoded(image, kind))}"


def run_lengths(mask: np.ndarray) -> dict[str, Any]:
    """A mask as compressed COCO run lengths."""
    packed = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(mask.shape), "counts": packed["counts"].decode()}


def with_region(image: Image.Image, mask: np.ndarray) -> Image.Image:
    """The RGBA picture whose alpha channel marks a region."""
    alpha = Image.fromarray(mask.astype(np.uint8) * 255)
    return Image.merge("RGBA", (*image.convert("RGB").split(), alpha))


def question(url: str | None, text: str, **more: Any) -> dict[str, Any]:
    """The body of a chat of one message."""
    content: list[dict[str, Any]] = [{"type": "text", "text": text}]
    if url is not None:
        content.insert(0, {"type": "image_url", "image_url": {"url": url}})
    return {"messages": [{"role": "user", "content": content}], **more}


def events_of(text: str) -> list[tuple[str, Any]]:
    """Server-sent events: name and data."""
    found = []
    for block in filter(None, text.split("\n\n")):
        fields = dict(line.split(": ", 1) for line in block.split("\n"))
        data = fields["data"]
        found.append((fields.get("event", "message"), data if data == "[DONE]" else json.loads(data)))
    return found
