"""Label Studio's exports: tasks, results in percent of the image."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from perceptiondlm.common.region_files.entry import ImageEntry, base_name, check_drawn, few
from perceptiondlm.common.region_files.shapes import corners, ellipse, turned


VALUE_BITS, LENGTH_BITS = 8, (3, 4, 8, 16)  # of the brushes that are written
NO_SHAPES = ("choices", "textarea", "rating", "number", "taxonomy", "relation")  # results about the whole image


def of_label_studio(tasks: list[Mapping], path: Path, image: ImageEntry) -> list[Any]:
    """Results of the task whose image has this one's name; exported files carry a prefix before the name."""
    if len(tasks) > 1:
        named = {index: _task_image(task) for index, task in enumerate(tasks)}
        found = [index for index, name in named.items() if image.is_named(name)]
        found = found or [i for i, name in named.items() if name and base_name(name).endswith(f"-{image.path.name}")]
        if len(found) != 1:
            names = few(list(named.values()))
            raise ValueError(
                f"{path} has {len(tasks)} tasks ({names}), {len(found)} about {image.path.name}; accepted: one"
            )
        tasks = [tasks[found[0]]]
    (task,) = tasks
    if "annotations" in task:
        done = [a for a in task["annotations"] if not a.get("was_cancelled") and a.get("result")]
        if len(done) > 1:
            raise ValueError(
                f"{path} has {len(done)} annotations of {image.path.name}, by several people; accepted: one"
            )
        results = done[0]["result"] if done else []
    elif "predictions" in task:  # pre-annotations, of which the last one counts
        results = task["predictions"][-1]["result"] if task["predictions"] else []
    else:  # the short export: results stand under the name of their tag
        results = [r for v in task.values() if isinstance(v, list) for r in v if isinstance(r, Mapping)]
    shapes = [result for result in results if result.get("type") not in NO_SHAPES]
    return [_label_studio_shape(shape, f"{path}, result {n}", image) for n, shape in enumerate(shapes)]


def _task_image(task: Mapping) -> str | None:
    data = task["data"] if isinstance(task.get("data"), Mapping) else task
    texts = [value for key, value in data.items() if isinstance(value, str)]
    name = data.get("image") or next((t for t in texts if "." in base_name(t)), None)
    return name if isinstance(name, str) else None


def _label_studio_shape(result: Mapping, name: str, image: ImageEntry) -> Any:
    value = result.get("value", result)
    drawn = tuple(result.get(key, value.get(key)) for key in ("original_height", "original_width"))
    check_drawn(drawn, name, image)
    height, width = image.size
    x_unit, y_unit = width / 100, height / 100  # coordinates are percentages
    angle = float(value.get("rotation") or 0)
    if "points" in value:
        return [[n * unit for point in value["points"] for n, unit in zip(point, (x_unit, y_unit), strict=True)]]
    if "rle" in value:
        return decode_brush(value["rle"], image.size, name)
    if "radiusX" in value:
        x, y, radius_x, radius_y = (value[key] for key in ("x", "y", "radiusX", "radiusY"))
        return [ellipse(x * x_unit, y * y_unit, radius_x * x_unit, radius_y * y_unit, angle, image.size)]
    if "width" in value and "height" in value:
        x, y, w, h = (value[k] * u for k, u in zip(("x", "y", "width", "height"), (x_unit, y_unit) * 2, strict=True))
        return [turned(corners(x, y, x + w, y + h), (x, y), angle)]
    kind = result.get("type", "result")
    raise ValueError(f"{name} is a {kind}, which is no region; accepted: polygons, rectangles, ellipses, brushes")


def decode_brush(rle: Sequence[int], size: tuple[int, int], name: str) -> np.ndarray:
    """A brush stroke of Label Studio as a bool mask (H, W).

    The bytes are a stream of bits: how many values follow (32 bits), the bits of a value less one (5), and the bits of
    four kinds of lengths less one (4 each). Then, until all values are there: 1 bit whether a run or a list follows, 2
    bits which kind of length, the length less one, and one value or as many. The values are an RGBA picture.

    Raises:
        ValueError: if the stream is not complete or not of this size.
    """
    bits = _Bits(rle, name)
    count, value_bits = bits.take(32), bits.take(5) + 1
    length_bits = [bits.take(4) + 1 for _ in range(4)]
    if count != 4 * size[0] * size[1]:
        raise ValueError(f"{name} is a brush of {count} values; accepted: 4 x {size[0]} x {size[1]}, the image's")
    values = np.zeros(count, dtype=np.int64)
    place = 0
    while place < count:
        is_run = bits.take(1)
        length = bits.take(length_bits[bits.take(2)]) + 1
        end = min(place + length, count)
        if is_run:
            values[place:end] = bits.take(value_bits)
        else:
            for index in range(place, end):
                values[index] = bits.take(value_bits)
        place = end
    return values.reshape(*size, 4)[..., 3] > 0


def encode_brush(mask: np.ndarray) -> list[int]:
    """A bool mask (H, W) as a brush stroke, the inverse of `decode_brush`: runs of one value, in all four channels."""
    flat = mask.ravel()
    edges = np.flatnonzero(np.diff(flat)) + 1
    starts = np.concatenate(([0], edges))
    lengths = 4 * np.diff(starts, append=flat.size)
    bits = [f"{4 * flat.size:032b}{VALUE_BITS - 1:05b}", *(f"{width - 1:04b}" for width in LENGTH_BITS)]
    longest = 2 ** LENGTH_BITS[-1]
    for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
        value = f"{255 if flat[start] else 0:0{VALUE_BITS}b}"
        while length:
            part = min(length, longest)
            kind = next(kind for kind, width in enumerate(LENGTH_BITS) if part <= 2**width)
            bits.append(f"1{kind:02b}{part - 1:0{LENGTH_BITS[kind]}b}{value}")
            length -= part
    stream = np.frombuffer("".join(bits).encode(), dtype=np.uint8) - ord("0")
    return np.packbits(stream).tolist()


class _Bits:
    """Numbers of any width from a list of bytes."""

    def __init__(self, values: Sequence[int], name: str):
        self.name, self.place = name, 0
        if not isinstance(values, list) or not all(isinstance(v, int) and 0 <= v < 256 for v in values):
            raise ValueError(f"{name}: rle must be a list of bytes")
        self.bits = np.unpackbits(np.array(values, dtype=np.uint8))

    def take(self, width: int) -> int:
        part = self.bits[self.place : self.place + width]
        if len(part) < width:
            raise ValueError(f"{self.name}: its rle ends early")
        self.place += width
        return int("".join(map(str, part)), 2)
