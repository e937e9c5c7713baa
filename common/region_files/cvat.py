"""CVAT's XML ('CVAT for images')."""

from functools import lru_cache
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from perceptiondlm.common.region_files.entry import ImageEntry, check_drawn, few, is_end_of, size_text
from perceptiondlm.common.region_files.shapes import corners, ellipse, placed, turned


def read_xml(path: Path) -> ElementTree.Element:
    try:
        return ElementTree.fromstring(path.read_bytes())
    except (ElementTree.ParseError, ValueError, LookupError, RecursionError) as error:
        raise ValueError(f"{path} is no XML: {error}") from error


@lru_cache(maxsize=2)
def _images_of(path: Path, _changed: int) -> list[ElementTree.Element]:
    """A file's images, kept for the next one that is looked for."""
    return read_xml(path).findall("image")


def of_cvat(path: Path, image: ImageEntry) -> list[Any]:
    images = _images_of(path, path.stat().st_mtime_ns)
    if not images:
        raise ValueError(f"{path} has no <image>; accepted: 'CVAT for images' exports")
    if len(images) > 1:
        found = [entry for entry in images if image.is_named(entry.get("name"))]
        exact = [entry for entry in found if is_end_of(entry.get("name", ""), image.path)]
        found = exact if len(exact) == 1 else found
        if len(found) != 1:
            names = few([entry.get("name") for entry in images])
            raise ValueError(f"{path} is about {len(images)} images ({names}), {len(found)} named {image.path.name}")
        images = found
    (entry,) = images
    drawn = (int(entry.get("height", image.size[0])), int(entry.get("width", image.size[1])))
    check_drawn(drawn, path, image)
    shapes = [shape for shape in entry if shape.tag != "tag"]
    return [_cvat_shape(shape, f"{path}, shape {number}", image) for number, shape in enumerate(shapes)]


def _cvat_shape(shape: ElementTree.Element, name: str, image: ImageEntry) -> Any:
    def numbers(*keys: str) -> list[float]:
        return [float(shape.attrib[key]) for key in keys]

    angle = float(shape.get("rotation", 0))
    if shape.tag == "polygon":
        return [[float(n) for point in shape.attrib["points"].split(";") for n in point.split(",")]]
    if shape.tag == "box":
        x0, y0, x1, y1 = numbers("xtl", "ytl", "xbr", "ybr")
        return [turned(corners(x0, y0, x1, y1), ((x0 + x1) / 2, (y0 + y1) / 2), angle)]
    if shape.tag == "ellipse":
        x, y, radius_x, radius_y = numbers("cx", "cy", "rx", "ry")
        return [ellipse(x, y, radius_x, radius_y, angle, image.size)]
    if shape.tag == "mask":
        left, top, width, height = (int(number) for number in numbers("left", "top", "width", "height"))
        runs = [int(run) for run in shape.attrib["rle"].split(",")]
        if min(width, height, *runs) < 0 or sum(runs) != width * height:
            raise ValueError(f"{name} has a mask of {sum(runs)} pixels in a box of {height} x {width}")
        if not (left >= 0 and top >= 0 and left + width <= image.size[1] and top + height <= image.size[0]):
            raise ValueError(f"{name} has a mask that leaves the image of {size_text(image.size)}")
        flat = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
        return placed(flat.reshape(height, width), left, top, image.size, name)
    raise ValueError(f"{name} is a {shape.tag}, which is no region; accepted: polygon, box, ellipse, mask")
