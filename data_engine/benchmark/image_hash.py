"""Perceptual hashes: whether an image of a benchmark is, re-encoded or resized, an image of a training set.

The hash says which of the 256 lowest frequencies of the grey picture (cosine transform) are above their median. It
hardly changes with size, encoding and light; a mirrored or cropped copy is not found.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from perceptiondlm.data_engine.sources.base import pictures_in
from perceptiondlm.images_perceptiondlm import load_image


SIDE, PIXELS = 16, 64  # frequencies kept and pixels looked at, along each axis
NEAR = 40  # bits by which a copy may differ, of 256
AT_ONCE = 128  # training images compared at once

_PLACES = np.arange(PIXELS) + 0.5
COSINES = np.cos(np.pi * np.arange(1, SIDE + 1)[:, None] * _PLACES / PIXELS)  # (SIDE, PIXELS); no constant one


def image_hash(image: Image.Image) -> np.ndarray:
    """(32,) uint8: 256 bits."""
    grey = np.asarray(image.convert("L").resize((PIXELS, PIXELS), Image.Resampling.BOX), dtype=np.float64)
    waves = COSINES @ grey @ COSINES.T  # (SIDE, SIDE)
    return np.packbits(waves > np.median(waves))


@dataclass(frozen=True)
class Copy:
    """An image found among others: its file, the other's, and the bits by which their hashes differ."""

    image: str
    other: str
    bits: int


def find_copies(images: Sequence[Path], others: Iterable[Path], near: int = NEAR) -> list[Copy]:
    """The images that are among `others`; those that cannot be read are an error.

    Args:
        near: bits by which a copy's hash may differ, of 256.
    """
    ours = np.stack([image_hash(load_image(path, name=str(path))) for path in images])  # (N, 32)
    found = []
    for batch in _batches(tqdm(list(others), desc="training images", unit="image", disable=None)):
        theirs = np.stack([image_hash(load_image(path, name=str(path))) for path in batch])  # (M, 32)
        bits = np.unpackbits(ours[:, None] ^ theirs[None], axis=-1).sum(-1)  # (N, M)
        places = zip(*np.nonzero(bits <= near), strict=True)
        found += [Copy(str(images[n]), str(batch[m]), int(bits[n, m])) for n, m in places]
    return sorted(found, key=lambda copy: copy.bits)


def _batches(paths: Iterable[Path]) -> Iterator[list[Path]]:
    batch: list[Path] = []
    for path in paths:
        batch.append(path)
        if len(batch) == AT_ONCE:
            yield batch
            batch = []
    if batch:
        yield batch


def training_images(place: Path) -> list[Path]:
    """The pictures of a training set: a folder of them, or a region set (JSON lines with ``image``).

    Raises:
        FileNotFoundError, ValueError: there are none.
    """
    if place.is_dir():
        return pictures_in(place)
    if not place.is_file() or place.suffix != ".jsonl":
        raise FileNotFoundError(
            f"no training images at {place}; accepted: a folder of pictures, or a region set .jsonl"
        )
    rows = [json.loads(line) for line in place.read_text(encoding="utf-8").splitlines() if line.strip()]
    if any(not isinstance(row, dict) or not isinstance(row.get("image"), str) for row in rows):
        raise ValueError(f"{place} has lines without the path of an image")
    return [place.parent / row["image"] for row in rows]
