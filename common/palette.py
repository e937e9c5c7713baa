"""Colours of regions, and what can be read on them."""

from collections.abc import Sequence

import numpy as np


# Told apart under normal sight, protanopia, deuteranopia and tritanopia, each at least 3:1 against white.
PALETTE = (
    (71, 73, 197),  # blue
    (252, 71, 90),  # red
    (43, 155, 138),  # teal
    (144, 109, 0),  # ochre
    (121, 18, 101),  # plum
    (22, 76, 33),  # dark green
    (189, 110, 197),  # lilac
    (85, 85, 85),  # grey
)


def color_of(index: int) -> tuple[int, int, int]:
    """The colour of region `index`, counted from 0, as RGB."""
    return PALETTE[index % len(PALETTE)]


def ink_on(color: Sequence[int]) -> tuple[int, int, int]:
    """Black or white, whichever reads better on a colour."""
    return (255, 255, 255) if contrast(color, (255, 255, 255)) >= contrast(color, (0, 0, 0)) else (0, 0, 0)


def contrast(one: Sequence[int], other: Sequence[int]) -> float:
    """Contrast of two colours as WCAG 2 defines it, 1 to 21."""
    low, high = sorted((_luminance(one), _luminance(other)))
    return (high + 0.05) / (low + 0.05)


def _luminance(color: Sequence[int]) -> float:
    """Relative luminance of an sRGB colour, in [0, 1]."""
    shares = np.asarray(color[:3], dtype=np.float64) / 255
    linear = np.where(shares <= 0.04045, shares / 12.92, ((shares + 0.055) / 1.055) ** 2.4)
    return float(linear @ (0.2126, 0.7152, 0.0722))
