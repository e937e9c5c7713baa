"""Encoded images, kept by the content of their pixels within a bound of memory."""

import hashlib
import threading
from collections import OrderedDict
from typing import Any

from PIL import Image


class ImageCache:
    """Encoded images, of which the one that was not asked for longest leaves first.

    An image's size grows with the questions it remembers, so it is counted again whenever it is kept. Reading is safe
    from any thread.

    Args:
        max_bytes: most bytes of all images together, 0 keeps none. What a request holds while it runs is not counted.
    """

    def __init__(self, max_bytes: int):
        if type(max_bytes) is not int or max_bytes < 0:
            raise ValueError(f"max_bytes must be an integer of at least 0, got {max_bytes!r}")
        self.max_bytes, self.num_bytes, self.hits, self.misses = max_bytes, 0, 0, 0
        self._images: OrderedDict[bytes, tuple[Any, int]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._images)

    def get(self, key: bytes, count: bool = True) -> Any | None:
        """The encoded image of a content, None where it is not kept; `count` whether this is a hit or a miss."""
        with self._lock:
            found, _ = self._images.get(key, (None, 0))
            if found is not None:
                self._images.move_to_end(key)
            self.hits += count and found is not None
            self.misses += count and found is None
            return found

    def keep(self, key: bytes, image: Any) -> None:
        """Keep an image, or count one again that is kept, and let older ones go until all fit."""
        size = image.num_bytes + pixel_bytes(image.picture)
        with self._lock:
            _, before = self._images.pop(key, (None, 0))
            self.num_bytes += size - before
            self._images[key] = image, size
            while self.num_bytes > self.max_bytes:
                _, (_, freed) = self._images.popitem(last=False)
                self.num_bytes -= freed


def pixel_bytes(picture: Image.Image | None) -> int:
    """Memory of an RGB picture's pixels."""
    return 0 if picture is None else picture.width * picture.height * 3


def content_key(picture: Image.Image, *settings: Any) -> bytes:
    """A key of a picture's pixels and of the settings that decide what is made of them."""
    digest = hashlib.blake2b(f"{picture.mode} {picture.size} {settings}".encode(), digest_size=20)
    digest.update(picture.tobytes())
    return digest.digest()
