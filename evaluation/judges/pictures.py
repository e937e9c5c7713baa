"""What a judge sees of a region: its crop and its mask, hashed for the cache and encoded for a chat message."""

import base64
import hashlib
import io
import threading
import zlib

import numpy as np
from PIL import Image


_BEFORE_IMAGE = b'{"type": "text", "text": "The image around the object:"}'
_BEFORE_MASK = b'{"type": "text", "text": "The object\'s mask, white on black:"}'


class Pictures:
    """A region's crop and mask, shared by the questions about it.

    They are encoded when the first of these questions is asked, by the thread that asks it: what the cache answers
    needs no encoding.

    Args:
        image: the crop.
        mask: its mask, (H, W) bool.

    Attributes:
        hashes: of the pixels of crop and mask; files vary with the encoder.
    """

    def __init__(self, image: Image.Image, mask: np.ndarray) -> None:
        self._image, self._mask = image, Image.fromarray(mask.astype(np.uint8) * 255)
        self.hashes = [_pixel_hash(self._image), _pixel_hash(self._mask)]
        self._encoding = threading.Lock()
        self._message_parts: bytes | None = None

    def message_parts(self) -> bytes:
        """Crop and mask as parts of a message in OpenAI's form: JSON, without the brackets of the list of parts."""
        with self._encoding:
            if self._message_parts is None:
                image, mask = _picture_part(self._image), _picture_part(self._mask)
                self._message_parts = b", ".join((_BEFORE_IMAGE, image, _BEFORE_MASK, mask))
            return self._message_parts


def _picture_part(image: Image.Image) -> bytes:
    """A PNG file as part of a message; run lengths make it no larger than zlib's level 1 does, and in less time."""
    file = io.BytesIO()
    image.save(file, format="PNG", compress_type=zlib.Z_RLE)
    encoded = base64.b64encode(file.getbuffer())  # needs no escapes in JSON
    return b'{"type": "image_url", "image_url": {"url": "data:image/png;base64,%b"}}' % encoded


def _pixel_hash(image: Image.Image) -> str:
    return hashlib.sha256(f"{image.mode} {image.size}".encode() + image.tobytes()).hexdigest()
