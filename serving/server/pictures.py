"""Pictures that strangers send: only raster formats, only of a bounded size, and never a path.

A picture comes as the bytes of an upload, as base64, as a `data:` URL, or, where the server allows it, as an http(s)
address. Its format is told by its contents, whatever its name or declared type says; its size by its header, before a
pixel is decoded.
"""

import base64
import binascii
import re
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image

from perceptiondlm.images_perceptiondlm import UNREADABLE, load_image, load_pixels, with_alpha
from perceptiondlm.serving.server.limits import Limits, Refused, too_large
from perceptiondlm.serving.server.remote import fetch


FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "MPO")
SOURCES = "base64 of a picture, a data: URL"
DATA_URL = re.compile(r"data:[\w.+/-]*(?:;[\w.+=-]+)*?;base64,", re.IGNORECASE)


def picture_bytes(source: Any, name: str, limits: Limits) -> bytes:
    """The contents of a picture's file, given as text.

    Raises:
        Refused: it is nothing that is accepted, or an address that is not allowed.
    """
    if not isinstance(source, str) or not source:
        raise Refused(400, f"{name} is a {type(source).__name__} of no text; accepted: {accepted(limits)}", "picture")
    if re.match("https?:", source, re.IGNORECASE):
        if not limits.allow_urls:
            raise Refused(400, f"{name} is an address, which this server does not fetch; accepted: {SOURCES}", "url")
        return fetch(source, name, limits)
    header = DATA_URL.match(source)
    payload = source[header.end() :] if header else source
    try:
        content = base64.b64decode("".join(payload.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise Refused(
            400, f"{name} is no base64 (it begins with {source[:30]!r}); accepted: {accepted(limits)}", "picture"
        ) from error
    return content


def accepted(limits: Limits) -> str:
    """What a picture may be given as."""
    return f"{SOURCES}, an http(s) address" if limits.allow_urls else SOURCES


def open_picture(content: bytes, name: str, limits: Limits) -> Image.Image:
    """A picture whose format and size are accepted; nothing of it is decoded yet.

    Raises:
        Refused: it is none, or too large.
    """
    kinds = ", ".join(kind for kind in FORMATS if kind != "MPO")
    try:
        picture = Image.open(BytesIO(content), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise too_large(f"{name} has more than {limits.max_pixels} pixels ({error})") from error
    except UNREADABLE as error:
        raise Refused(415, f"{name} is no picture that is accepted: {kinds}", "picture") from error
    if picture.width * picture.height > limits.max_pixels:
        raise too_large(
            f"{name} has {picture.width} x {picture.height} pixels; accepted: {limits.max_pixels} pixels in all"
        )
    return picture


def read_picture(content: bytes, name: str, limits: Limits, exif: str | None = None) -> Image.Image:
    """A decoded picture in RGB."""
    return load_image(open_picture(content, name, limits), name, exif)


def read_with_region(content: bytes, name: str, limits: Limits) -> tuple[Image.Image, np.ndarray | None]:
    """A picture, and the region (H, W) bool that its alpha channel marks.

    This is how describe-anything's server takes a region: the colours are the whole picture, and alpha is above 0
    inside the region. A picture without transparent pixels marks none.
    """
    picture = load_pixels(open_picture(content, name, limits), name)
    if not picture.has_transparency_data:
        return load_image(picture, name), None
    clear = with_alpha(picture)
    inside = np.asarray(clear.getchannel("A")) > 0
    if inside.all():
        return load_image(picture, name), None
    if not inside.any():
        raise Refused(400, f"{name} is transparent everywhere: its alpha channel marks no region", "picture")
    return Image.fromarray(np.asarray(clear)[..., :3].copy()), inside


class MaskPictures:
    """Checks the mask pictures of one request, each and all of them together.

    They stay the bytes of their files, so that the reader of regions holds one decoded mask at a time.
    """

    def __init__(self, limits: Limits):
        self.limits, self.num_pixels = limits, 0

    def checked(self, content: bytes, name: str) -> bytes:
        """The contents of a mask picture's file."""
        picture = open_picture(content, name, self.limits)
        self.num_pixels += picture.width * picture.height
        if self.num_pixels > self.limits.max_mask_pixels:
            raise too_large(
                f"the mask pictures up to {name} have {self.num_pixels} pixels together; accepted: "
                f"{self.limits.max_mask_pixels} (masks as run lengths or polygons take far less)"
            )
        return content
