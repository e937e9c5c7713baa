"""What the published weights need from the processor: how they saw masks, in which order, and under which numbers."""

from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from .coverage_perceptiondlm import Region


def nearest_coverage(
    region: Region, prompt_id: int, cut: Callable[[Image.Image], np.ndarray], patch_size: int
) -> np.ndarray:
    """Whether one pixel of every patch belongs to a region: float32 (T, P, P), 0 or 1; small regions can vanish.

    A picture of the prompt id on 255 is resized like the image; every level below 255 counts as region.

    Args:
        cut: a grey picture to tiles (T, s, s, 1), as the image is cut.
        patch_size: side of a patch in pixels.
    """
    picture = Image.fromarray(np.where(region.mask(), prompt_id, 255).astype(np.uint8))
    return (cut(picture)[:, ::patch_size, ::patch_size, 0] != 255).astype(np.float32)


def largest_first(areas: Sequence[int]) -> np.ndarray:
    """Order of regions by area in pixels, the largest first: (N,) int64."""
    return np.array(areas, dtype=np.int64).argsort()[::-1]


def markers_by_place(attention_layout: str) -> bool:
    """Whether the placeholders and markers of a pass are numbered by the regions' places, not by their prompt ids."""
    return attention_layout == "released"
