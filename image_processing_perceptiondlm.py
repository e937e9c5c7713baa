"""Images become tiles: the image processor, which `AutoImageProcessor` loads and the processor holds.

Shape legend: T tiles over all images, s tile side in pixels.
"""

from typing import Any

import numpy as np
from PIL import Image
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.processing_utils import ImagesKwargs

from .images_perceptiondlm import EXIF_CHOICES, read_image
from .importable_perceptiondlm import make_importable


IMAGE_SETTINGS = ("max_tiles", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std", "exif")
NEUTRAL_STATISTIC = 0.5  # mean and deviation of every channel by which the model normalises bytes


class PerceptionDLMImagesKwargs(ImagesKwargs):
    """Keywords of the image processor."""

    tile_size: int
    max_tiles: int
    exif: str | None


class PerceptionDLMImageProcessor(BaseImageProcessor):
    """Cuts images into tiles of a grid that fits their shape, and adds a thumbnail where the grid has several cells.

    Args:
        tile_size (`int`, defaults to 512): side of a tile in pixels.
        max_tiles (`int`, defaults to 6): most grid tiles of one image, thumbnail not counted.
        do_rescale, do_normalize (`bool`, *optional*): whether tiles are multiplied by `rescale_factor`, and then
            normalised, here: they are float32 then. By default they stay bytes, which the model normalises by its own
            config, unless other statistics than 0.5 are given.
        rescale_factor (`float`, defaults to 1 / 255): what bytes are multiplied by.
        image_mean, image_std (`list[float]`, defaults to 0.5): of each channel, after scaling.
        exif (`str`, *optional*): whether `"applied"` turns a picture as its EXIF orientation says, or its pixels stay
            as `"stored"`, which is the default.

    Raises:
        ValueError: naming the setting, its value and what is accepted.
    """

    model_input_names = ["pixel_values", "tile_grids", "image_sizes"]  # noqa: RUF012
    valid_kwargs = PerceptionDLMImagesKwargs

    def __init__(
        self,
        tile_size=512,
        max_tiles=6,
        do_rescale=None,
        rescale_factor=1 / 255,
        do_normalize=None,
        image_mean=(NEUTRAL_STATISTIC,) * 3,
        image_std=(NEUTRAL_STATISTIC,) * 3,
        exif=None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.tile_size, self.max_tiles = tile_size, max_tiles
        self.image_mean, self.image_std = list(image_mean), list(image_std)
        here = {*self.image_mean, *self.image_std} != {NEUTRAL_STATISTIC}
        self.do_rescale = here if do_rescale is None else do_rescale
        self.do_normalize = here if do_normalize is None else do_normalize
        self.rescale_factor, self.exif = rescale_factor, exif
        for name in ("tile_size", "max_tiles"):
            check_count(name, getattr(self, name))
        if len(self.image_mean) != 3 or len(self.image_std) != 3 or 0 in self.image_std:
            found = f"{self.image_mean} and {self.image_std}"
            raise ValueError(f"image_mean and image_std must be 3 numbers each, deviations above 0, got {found}")
        if exif not in EXIF_CHOICES:
            raise ValueError(f"exif must be one of {EXIF_CHOICES}, got {exif!r}")

    def preprocess(self, images: Any, return_tensors: str | None = None, **kwargs: Any) -> BatchFeature:
        """Cut one image or a list of them, nested or not, into tiles.

        Args:
            images: in every form of `load_image`.
            return_tensors: `"pt"` or `"np"`; by default arrays.
            kwargs: settings of the constructor that replace the processor's.
        Returns:
            pixel_values (T, 3, s, s) uint8 (float32 where they are rescaled or normalised), every image's tiles in
            row-major order, thumbnail last; tile_grids (images, 2) int64, columns and rows; image_sizes (images, 2)
            int64, height and width in pixels.
        """
        processor = self.with_settings(**kwargs)
        pictures = _flat(images)
        if not pictures:
            raise ValueError("images is an empty list; accepted: at least one image")
        names = [f"images[{index}]" for index in range(len(pictures))]
        read = [read_image(image, name, processor.exif)[0] for image, name in zip(pictures, names, strict=True)]
        tiles, grids = zip(*(processor.tile(image) for image in read), strict=True)
        data = {
            "pixel_values": np.concatenate(tiles),
            "tile_grids": np.array(grids),
            "image_sizes": np.array([(image.height, image.width) for image in read]),
        }
        return BatchFeature(data, tensor_type=return_tensors)

    def with_settings(self, **changes: Any) -> "PerceptionDLMImageProcessor":
        """This image processor with settings changed; those that are None stay."""
        changes = {name: value for name, value in changes.items() if value is not None}
        known = ("tile_size", *IMAGE_SETTINGS)
        if unknown := sorted(set(changes) - set(known)):
            raise TypeError(f"unknown image processor keywords {unknown}; accepted: {known}")
        if not changes:
            return self
        return type(self)(**{**{name: getattr(self, name) for name in known}, **changes})

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Columns and rows for an image of (width, height) pixels."""
        return best_grid(*size, self.tile_size, self.max_tiles)

    def tile(self, image: Image.Image) -> tuple[np.ndarray, tuple[int, int]]:
        """Cut an RGB image into tiles (T, 3, s, s), thumbnail last, and return the grid (columns, rows)."""
        grid = self.grid(image.size)
        return self.as_tiles(self.cut(image, grid)), grid

    def as_tiles(self, tiles: np.ndarray) -> np.ndarray:
        """Pictures (N, s, s, 3) uint8 as the model takes tiles and crops, (N, 3, s, s)."""
        if self.do_rescale or self.do_normalize:
            tiles = tiles.astype(np.float32)
        if self.do_rescale:
            tiles = tiles / 255.0 if self.rescale_factor == 1 / 255 else tiles * np.float32(self.rescale_factor)
        if self.do_normalize:
            tiles = (tiles - np.array(self.image_mean, np.float32)) / np.array(self.image_std, np.float32)
        return np.ascontiguousarray(tiles.transpose(0, 3, 1, 2))

    def cut(self, image: Image.Image, grid: tuple[int, int]) -> np.ndarray:
        """Tiles (T, s, s, channels) uint8 of an image resized to the grid, row-major, thumbnail last."""
        side, (columns, rows) = self.tile_size, grid
        pixels = np.asarray(image.resize((columns * side, rows * side), Image.Resampling.BICUBIC))
        tiles = pixels.reshape(rows, side, columns, side, -1).swapaxes(1, 2).reshape(rows * columns, side, side, -1)
        if len(tiles) == 1:
            return tiles
        thumbnail = np.asarray(image.resize((side, side), Image.Resampling.BICUBIC))
        return np.concatenate((tiles, thumbnail.reshape(1, side, side, -1)))


def best_grid(width: int, height: int, tile_size: int, max_tiles: int) -> tuple[int, int]:
    """Grid (columns, rows) of at most `max_tiles` cells whose aspect ratio is closest to the image's.

    A tie goes to the larger grid when the image's area exceeds half of that grid's.
    """
    check_count("max_tiles", max_tiles)
    cells = range(1, max_tiles + 1)
    grids = sorted(((c, r) for c in cells for r in cells if c * r <= max_tiles), key=lambda grid: grid[0] * grid[1])
    best, smallest = (1, 1), float("inf")
    for columns, rows in grids:
        difference = abs(width / height - columns / rows)
        large_enough = width * height > 0.5 * tile_size**2 * columns * rows
        if difference < smallest or (difference == smallest and large_enough):
            best, smallest = (columns, rows), difference
    return best


def check_count(name: str, value: Any) -> None:
    """Refuse a setting that is no integer of at least 1."""
    if type(value) is not int or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")


def _flat(images: Any) -> list[Any]:
    """The images of a list, nested or not."""
    if not isinstance(images, (list, tuple)):
        return [images]
    flat: list[Any] = []
    for image in images:
        flat += image if isinstance(image, (list, tuple)) else [image]
    return flat


make_importable(__name__)

__all__ = ["PerceptionDLMImageProcessor"]
