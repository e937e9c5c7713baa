"""YOLO's label files: a class and fractions of the image per line, a polygon or a box (center, width, height)."""

from pathlib import Path
from typing import Any

from perceptiondlm.common.region_files.entry import ImageEntry
from perceptiondlm.common.region_files.shapes import corners, inside


def of_yolo(path: Path, image: ImageEntry) -> list[Any]:
    height, width = image.size
    regions: list[Any] = []
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text: {error}") from error
    for row, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            numbers = [float(word) for word in line.split()][1:]
        except ValueError as error:
            raise ValueError(f"{path}, line {row}: {error}; accepted: class and coordinates") from error
        is_box = len(numbers) == 4
        if not is_box and (len(numbers) < 6 or len(numbers) % 2):
            raise ValueError(f"{path}, line {row} has {len(numbers)} coordinates; accepted: 4, or 6 and more in pairs")
        if not all(-0.01 <= number <= 1.01 for number in numbers):
            raise ValueError(f"{path}, line {row} leaves [0, 1]; accepted: fractions of the image")
        if is_box:
            x, y, w, h = (number * unit for number, unit in zip(numbers, (width, height) * 2, strict=True))
            numbers = corners(x - w / 2, y - h / 2, x + w / 2, y + h / 2)
        else:
            numbers = [number * (height if index % 2 else width) for index, number in enumerate(numbers)]
        regions.append([inside(numbers, image.size)])
    return regions
