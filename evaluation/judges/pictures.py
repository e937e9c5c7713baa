"""What a judge sees: a region's crop and mask, or other pictures, hashed for the cache, encoded for a chat message."""

import base64
import hashlib
import io
import json
import threading
import zlib
from collections.abc import Sequence

import numpy as np
from PIL import Image


_BEFORE_IMAGE, _BEFORE_MASK = "The image around the object:", "The object's mask, white on black:"


class Pictures:
    """Pictures that questions share: a region's crop and mask, or others with a line of text before each.

    They are encoded when the first of these questions is asked, by the thread that asks it: what the cache answers
    needs no encoding.

    Args:
        image: the crop.
        mask: its mask, (H, W) bool.

    Attributes:
        hashes: of the pixels of crop and mask; files vary with the encoder.
    """

    def __init__(self, image: Image.Image, mask: np.ndarray) -> None:
        white = Image.fromarray(mask.astype(np.uint8) * 255)
        self._show([(_BEFORE_IMAGE, image), (_BEFORE_MASK, white)])

    @classmethod
    def of(cls, shown: Sequence[tuple[str, Image.Image]]) -> "Pictures":
        """Any pictures, each with the text that stands before it."""
        pictures = cls.__new__(cls)
        pictures._show(shown)
        pictures.hashes = [part for text, image in shown for part in (text, _pixel_hash(image))]
        return pictures

    def _show(self, shown: Sequence[tuple[str, Image.Image]]) -> None:
        self._shown = list(shown)
        self.hashes = [_pixel_hash(image) for _, image in shown]
        self._encoding = threading.Lock()
        self._message_parts: bytes | None = None

    def message_parts(self) -> bytes:
        """The pictures as parts of a message in OpenAI's form: JSON, without the brackets of the list of parts."""
        with self._encoding:
            if self._message_parts is None:
                parts = [part for text, image in self._shown for part in (_text_part(text), _picture_part(image))]
                self._message_parts = b", ".join(parts)
            return self._message_parts


def _text_part(text: str) -> bytes:
    return json.dumps({"type": "text", "text": text}).encode("ascii")


def _picture_part(image: Image.Image) -> bytes:
    """A PNG file as part of a message; run lengths make it no larger than zlib's level 1 does, and in less time."""
    file = io.BytesIO()
    image.save(file, format="PNG", compress_type=zlib.Z_RLE)
    encoded = base64.b64encode(file.getbuffer())  # needs no escapes in JSON
    return b'{"type": "image_url", "image_url": {"url": "data:image/png;base64,%b"}}' % encoded


def _pixel_hash(image: Image.Image) -> str:
    return hashlib.sha256(f"{image.mode} {image.size}".encode() + image.tobytes()).hexdigest()
