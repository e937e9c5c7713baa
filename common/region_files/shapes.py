"""Shapes that other tools draw, as rings x0, y0, x1, y1, ... in pixels, or as masks."""

from math import cos, pi, radians, sin

import numpy as np

from perceptiondlm.common.region_files.entry import size_text


CIRCLE_POINTS = 72  # corners of the polygon that stands for a circle or an ellipse


def corners(x0: float, y0: float, x1: float, y1: float) -> list[float]:
    """A rectangle as a ring."""
    return [x0, y0, x1, y0, x1, y1, x0, y1]


def turned(ring: list[float], center: tuple[float, float], degrees: float) -> list[float]:
    """A ring turned clockwise (y points down) around a point."""
    if not degrees:
        return ring
    turn, (x0, y0) = radians(degrees), center
    pairs = [(x - x0, y - y0) for x, y in zip(ring[::2], ring[1::2], strict=True)]
    return [n for x, y in pairs for n in (x0 + x * cos(turn) - y * sin(turn), y0 + x * sin(turn) + y * cos(turn))]


def ellipse(x: float, y: float, radius_x: float, radius_y: float, degrees: float, size: tuple[int, int]) -> list[float]:
    """An ellipse as a ring, cut at the image's border."""
    angles = [2 * pi * step / CIRCLE_POINTS for step in range(CIRCLE_POINTS)]
    ring = [n for angle in angles for n in (x + radius_x * cos(angle), y + radius_y * sin(angle))]
    return inside(turned(ring, (x, y), degrees), size)


def inside(ring: list[float], size: tuple[int, int]) -> list[float]:
    """A ring whose points are moved to the image's border where they lie beyond it."""
    limits = (size[1], size[0])
    return [min(max(number, 0.0), float(limits[index % 2])) for index, number in enumerate(ring)]


def placed(crop: np.ndarray, left: int, top: int, size: tuple[int, int], name: str) -> np.ndarray:
    """The mask (H, W) of a crop; what lies beyond the image is cut off."""
    mask = np.zeros(size, dtype=bool)
    if left < 0 or top < 0 or left >= size[1] or top >= size[0]:
        raise ValueError(f"{name} has a mask at x, y = {left}, {top}, outside the image of {size_text(size)}")
    part = crop[: size[0] - top, : size[1] - left]
    mask[top : top + part.shape[0], left : left + part.shape[1]] = part
    return mask
