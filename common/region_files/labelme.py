"""LabelMe's files: one image, shapes in pixels."""

import base64
import binascii
from collections.abc import Mapping
from io import BytesIO
from math import hypot
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from perceptiondlm.common.region_files.entry import ImageEntry, check_drawn
from perceptiondlm.common.region_files.shapes import corners, ellipse, placed


def of_labelme(content: Mapping, path: Path, image: ImageEntry) -> list[Any]:
    found = (content.get("imageHeight"), content.get("imageWidth"))
    check_drawn(found, path, image)
    return [_labelme_shape(shape, f"{path}, shape {number}", image) for number, shape in enumerate(content["shapes"])]


def _labelme_shape(shape: Mapping, name: str, image: ImageEntry) -> Any:
    kind, points = shape.get("shape_type") or "polygon", shape["points"]
    flat = [number for point in points for number in point]
    if kind in ("polygon", "oriented_rectangle"):
        return [flat]
    if kind == "rectangle":
        (x0, y0), (x1, y1) = points[0], points[-1] if len(points) == 2 else points[2]
        return [corners(min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1))]
    if kind == "circle":
        (x, y), (edge_x, edge_y) = points
        radius = hypot(edge_x - x, edge_y - y)
        return [ellipse(x, y, radius, radius, 0.0, image.size)]
    if kind == "mask":
        return placed(_png_mask(shape["mask"], name), int(points[0][0]), int(points[0][1]), image.size, name)
    raise ValueError(f"{name} is a {kind}, which is no region; accepted: polygon, rectangle, circle, mask")


def _png_mask(text: str, name: str) -> np.ndarray:
    try:
        with Image.open(BytesIO(base64.b64decode(text, validate=True))) as picture:
            return np.asarray(picture.convert("L")) > 0
    except (binascii.Error, OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{name}: its mask is no PNG in base64 ({error})") from error
