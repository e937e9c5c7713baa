"""Images, as people have them, brought to RGB.

`load_image` is the door; masks and label maps that are pictures come in through `open_image`, which takes the same
sources. Messages name the item and what is accepted, and never print the contents of a `data:` URL.
"""

from __future__ import annotations

import base64
import os
import re
import struct
import zlib
from collections.abc import Mapping
from http.client import HTTPException
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes
from urllib.request import Request, urlopen

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError


CONVERTED_MODES = ("1", "L", "LA", "La", "P", "PA", "RGBA", "RGBa", "RGBX")
EXIF_CHOICES = (None, "stored", "applied")
URL_TIMEOUT_SECONDS = 60
SHOWN_CHARACTERS = 80  # of a path or URL in a message
IMAGE_FORMS = (
    "PIL image, path, URL, data: URL, bytes, file object, dict of bytes and path, non-empty uint8 array (H, W, 3) or "
    "(H, W), uint8 tensor (3, H, W)"
)
# What reading a broken source raises: files and network, and Pillow's decoders.
UNREADABLE = (
    OSError, HTTPException, SyntaxError, EOFError, ValueError, TypeError, LookupError, OverflowError, MemoryError,
    struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip


def is_encoded(image: Any) -> bool:
    """Whether an object stands for an image that a model has encoded (an `EncodedImage`)."""
    return hasattr(image, "tile_grids")


def is_picture_source(value: Any) -> bool:
    """Whether `open_image` would read `value`: a path, URL, bytes, file object, or a dict of bytes and path."""
    if isinstance(value, Mapping):
        return 0 < len(value) <= 2 and set(value) <= {"bytes", "path"}
    return isinstance(value, (str, os.PathLike, bytes, bytearray, memoryview)) or hasattr(value, "read")


def load_image(image: Any, name: str = "image", exif: str | None = None) -> Image.Image:
    """Return `image` as a PIL image of mode RGB.

    Args:
        image: a PIL image, a path, an http(s) or `data:` URL, the bytes of an image file, a binary file object, a dict
            of `bytes` and `path` as `datasets` stores images (the bytes count where both are given), a uint8 array
            (H, W, 3) or (H, W), or a uint8 tensor (3, H, W). Modes 1, L, P, and those with alpha are converted, and
            transparency of every kind is laid over white. Of an MPO photo (a phone's JPEG that carries further
            pictures) the first picture is taken.
        name: what messages call the image.
        exif: `"applied"` turns the picture as its EXIF orientation says; by default, and with `"stored"`, the pixels
            stay as they are stored.

    Raises:
        TypeError: for any other type.
        FileNotFoundError: if a path does not exist.
        ValueError: for other modes, dtypes and shapes, and animated, empty, truncated or unreadable images.
    """
    return read_image(image, name, exif)[0]


def read_image(image: Any, name: str = "image", exif: str | None = None) -> tuple[Image.Image, int]:
    """As `load_image`, with the EXIF orientation (1 to 8) that nobody has decided about; 1 where `exif` is given."""
    if exif not in EXIF_CHOICES:
        raise ValueError(f"exif must be one of {EXIF_CHOICES}, got {exif!r}")
    if isinstance(image, (np.ndarray, torch.Tensor)):
        image = _image_from_array(image, name)
    elif is_picture_source(image):
        image = open_image(image, name)
    if not isinstance(image, Image.Image):
        raise TypeError(f"{name} is a {type(image).__name__}; accepted: {IMAGE_FORMS}")
    image = load_pixels(image, name)
    turned = _orientation(image)
    if exif == "applied" and turned != 1:
        image = ImageOps.exif_transpose(image)
    return _over_white(image, name), turned if exif is None else 1


def open_image(source: Any, name: str) -> Image.Image:
    """Open the picture that a path, URL, `data:` URL, bytes, file object or dict of bytes and path stands for.

    Raises:
        FileNotFoundError: if a path does not exist.
        TypeError: for a file object that gives text.
        ValueError: if it cannot be read as an image.
    """
    if isinstance(source, Mapping):
        given = [source.get(key) for key in ("bytes", "path") if source.get(key) is not None]
        if not given or not isinstance(given[0], (str, os.PathLike, bytes, bytearray, memoryview)):
            kinds = {key: type(value).__name__ for key, value in source.items()}
            raise ValueError(f"{name} is a dict of {kinds}; accepted: bytes of an image file, or a path")
        source = given[0]
    try:
        return Image.open(BytesIO(_file_contents(source, name)))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{name}: there is no file {shown(source)}") from error
    except UnidentifiedImageError as error:
        raise ValueError(f"{name}: {shown(source)} cannot be read (no image format fits); accepted: images") from error
    except UNREADABLE as error:
        if isinstance(error, TypeError) and hasattr(source, "read"):
            raise
        reason = getattr(error, "strerror", None) or f"{error}"[:SHOWN_CHARACTERS]
        raise ValueError(f"{name}: {shown(source)} cannot be read ({reason}); accepted: images") from error


def load_pixels(image: Image.Image, name: str) -> Image.Image:
    """Decode an opened picture; refuses damaged, animated and empty ones."""
    try:
        image.load()
        frames = getattr(image, "n_frames", 1)
    except UNREADABLE as error:
        raise ValueError(f"{name} is truncated or damaged ({error}); accepted: complete images") from error
    if frames > 1 and image.format != "MPO":
        raise ValueError(f"{name} is animated or has several pages ({frames} frames); accepted: one frame")
    if 0 in image.size:
        raise ValueError(f"{name} is {image.height} x {image.width} (height x width); accepted: at least 1 x 1")
    return image


def shown(source: Any) -> str:
    """A source as messages print it: the beginning of long ones, of contents only the kind and size."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"{len(source)} bytes"
    if hasattr(source, "read"):
        return f"a {type(source).__name__}"
    text = os.fspath(source) if isinstance(source, os.PathLike) else source
    text = text if isinstance(text, str) else repr(text)
    if re.match("data:", text, re.IGNORECASE):
        return f"{text[: text.find(',') + 1][:SHOWN_CHARACTERS]}… ({len(text)} characters)"
    return text if len(text) <= 4 * SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}… ({len(text)} characters)"


def _file_contents(source: Any, name: str) -> bytes:
    if isinstance(source, (bytes, bytearray, memoryview)):
        return bytes(source)
    if hasattr(source, "read") and not isinstance(source, os.PathLike):
        if hasattr(source, "seekable") and source.seekable():
            source.seek(0)
        content = source.read()
        if not isinstance(content, bytes):
            raise TypeError(
                f"{name} is a file that gives {type(content).__name__}; accepted: one opened in binary mode"
            )
        return content
    if isinstance(source, str) and re.match("https?://", source, re.IGNORECASE):
        request = Request(source, headers={"User-Agent": "perceptiondlm"})
        with urlopen(request, timeout=URL_TIMEOUT_SECONDS) as reply:
            return reply.read()
    if isinstance(source, str) and re.match("data:", source, re.IGNORECASE):
        header, comma, payload = source.partition(",")
        if not comma:
            raise ValueError("a data: URL without a comma")
        content = unquote_to_bytes(payload)
        if header.lower().endswith(";base64"):
            content = base64.b64decode(b"".join(content.split()), validate=True)
        return content
    return Path(source).read_bytes()


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation of a picture, 1 where it has none or its EXIF block is damaged."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except UNREADABLE:
        return 1
    return value if value in range(2, 9) else 1


def _over_white(image: Image.Image, name: str) -> Image.Image:
    """The RGB form of a picture, its transparency laid over white."""
    if image.mode not in ("RGB", *CONVERTED_MODES):
        raise ValueError(f"{name} has mode {image.mode}; accepted: RGB, {', '.join(CONVERTED_MODES)}")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, with_alpha(image)).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def with_alpha(image: Image.Image) -> Image.Image:
    """The RGBA form of a picture that carries transparency in any way."""
    steps = {"La": ("LA", "RGBA"), "PA": ("RGBA",)}.get(image.mode, ("RGBA",))
    for mode in steps:
        image = image.convert(mode)
    return image


def _image_from_array(image: np.ndarray | torch.Tensor, name: str) -> Image.Image:
    array = to_numpy(image)
    found = f"{name} is a {type(image).__name__} of {image.dtype} {tuple(image.shape)}"
    if isinstance(image, torch.Tensor):
        valid = array.ndim == 3 and array.shape[0] == 3
        array = np.moveaxis(array, 0, -1) if valid else array
    else:
        valid = array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3)
    if not valid or array.size == 0 or array.dtype != np.uint8:
        raise ValueError(f"{found}; accepted: {IMAGE_FORMS}")
    return Image.fromarray(np.ascontiguousarray(array))


def to_numpy(value: np.ndarray | torch.Tensor) -> np.ndarray:
    """The numpy form of an array or tensor; half-precision tensors that numpy lacks become float32."""
    if isinstance(value, np.ndarray):
        return value
    value = value.detach().cpu()
    return (value.float() if value.dtype == torch.bfloat16 else value).numpy()
