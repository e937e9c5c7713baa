"""A base model on regions that it was never taught: asked by a box in words, or about a crop.

The paper scores its base model so on ParaDLC-Bench (Avg 53.0) without saying how regions are shown; both ways are ours.
Every region is a question of its own about the image, all of an image in one batch.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image


WAYS = ("boxes", "crops")
BY_BOX = (
    "Describe the object in the box from ({x0}, {y0}) to ({x1}, {y1}) in detail. Coordinates are in percent of the "
    "image's width and height, from its top left corner. Speak of this object alone."
)
BY_CROP = "Describe the object in the middle of the image in detail. Speak of this object alone."
MARGIN = 0.1  # of a crop, on each side, as a share of the box
MIN_SIDE = 16  # of a crop in pixels


def zero_shot_inputs(
    processor, image: Image.Image, masks: Sequence[np.ndarray], way: str, question: str | None = None
) -> Any:
    """The processor's batch of a question per region.

    Args:
        masks: (H, W) bool, none empty.
        way: one of `WAYS`.
        question: asked instead of ours; ``{x0}``, ``{y0}``, ``{x1}`` and ``{y1}`` in it become the box in percent.

    Raises:
        ValueError: the way is unknown.
    """
    if way not in WAYS:
        raise ValueError(f"zero_shot must be one of {WAYS}, got {way!r}")
    boxes = [box_of(mask) for mask in masks]
    if way == "crops":
        crops = [[image.crop(grown(box, image.size))] for box in boxes]
        return processor(images=crops, text=[question or BY_CROP] * len(boxes))
    texts = [(question or BY_BOX).format(**percent(box, image.size)) for box in boxes]
    return processor(images=[[image]] * len(boxes), text=texts)


def zero_shot_answers(processor, output: Any) -> list[dict[str, Any]]:
    """`caption` and `score` of every region, in order."""
    return [
        {"caption": answer["text"].strip(), "score": answer["score"]} for answer in processor.decode_answers(output)
    ]


def box_of(mask: np.ndarray) -> tuple[int, int, int, int]:
    """x0, y0, x1, y1 in pixels, half-open, around a mask (H, W)."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        raise ValueError("the mask is empty")
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def grown(box: tuple[int, int, int, int], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """A box with a margin, at least `MIN_SIDE` a side, inside an image of a size (width, height)."""
    corners = []
    for low, high, side in zip(box[:2], box[2:], size, strict=True):
        wanted = max(high - low + 2 * MARGIN * (high - low), MIN_SIDE)
        middle = (low + high) / 2
        corners.append((max(int(middle - wanted / 2), 0), min(int(middle + wanted / 2 + 0.999), side)))
    (x0, x1), (y0, y1) = corners
    return x0, y0, x1, y1


def percent(box: tuple[int, int, int, int], size: tuple[int, int]) -> dict[str, int]:
    """A box in whole percent of an image of a size (width, height)."""
    width, height = size
    x0, y0, x1, y1 = box
    shares = {"x0": x0 / width, "y0": y0 / height, "x1": x1 / width, "y1": y1 / height}
    return {name: round(100 * share) for name, share in shares.items()}
