"""Focal replay: what a region adds of its own, out of a crop around it and out of its pixels.

The image is encoded once and knows no region; a small region then lies on a handful of its features. Under focal
replay each region also has a crop, its box grown by a factor and resized, which the same tower and projector encode.
RoI-Align of the region's box *inside its crop* gives as many features as that of its box in the image, and a learned
projection of the one is added to the other: no token more, and a region still sees what it would see alone. A region
above a share of its image skips its crop, since the image shows it as large. Appearance is what features of a deep
tower lose: mean and spread of the colours under the mask in each bin.

Legend: R regions, Q regions with a crop, S bins per RoI side, b = S² bins, c crop side in pixels, n image tokens per
crop side, D language width, N, H, W masks of an image.
"""

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn


MIN_CROP_SIDE = 16  # pixels of the image that the longer side of a region counts as at least, before it grows
APPEARANCE_CHANNELS = 6  # mean and standard deviation of red, green and blue


def grown_boxes(boxes_N4: np.ndarray, size: tuple[int, int], factor: float) -> np.ndarray:
    """Crops (N, 4) int64, half-open, around regions: squares where the image has room for them.

    Args:
        boxes_N4: half-open boxes x0, y0, x1, y1 in pixels.
        size: (height, width) of the image.
        factor: side of the crop over the longer side of the box, at least 1.
    """
    low, high = boxes_N4[:, :2].astype(np.float64), boxes_N4[:, 2:].astype(np.float64)
    limit = np.array(size[::-1])
    side = factor * np.maximum((high - low).max(axis=1, keepdims=True), MIN_CROP_SIDE)
    side = np.minimum(np.maximum(side, high - low), limit)
    start = np.clip((low + high - side) / 2, 0, limit - side)
    first = np.minimum(np.floor(start), low)
    last = np.clip(np.ceil(start + side), high, limit)
    return np.concatenate((first, last), axis=1).astype(np.int64)


def cut_crops(image: Image.Image, crops_N4: np.ndarray, side: int) -> np.ndarray:
    """Crops of an RGB image, resized: uint8 (N, side, side, 3)."""
    shape = (side, side)
    pictures = [image.resize(shape, Image.Resampling.BICUBIC, box=tuple(crop)) for crop in crops_N4.tolist()]
    return np.stack([np.asarray(picture) for picture in pictures]) if pictures else np.zeros((0, *shape, 3), np.uint8)


def boxes_in_crops(boxes_N4: np.ndarray, crops_N4: np.ndarray) -> np.ndarray:
    """The regions' boxes as fractions of their crops: float32 (N, 4) in [0, 1]."""
    start, extent = crops_N4[:, :2], crops_N4[:, 2:] - crops_N4[:, :2]
    return ((boxes_N4 - np.tile(start, 2)) / np.tile(extent, 2)).astype(np.float32)


def mask_appearance(pixels_HW3: np.ndarray, masks_NHW: np.ndarray, boxes_N4: np.ndarray, bins: int) -> np.ndarray:
    """Mean and spread of the colours under each mask in each bin of its box.

    Args:
        pixels_HW3: uint8 (H, W, 3); masks_NHW: bool; boxes_N4: the masks' half-open boxes.
    Returns:
        float32 (N, bins², 6) in row-major order, colours scaled to [-1, 1]; a bin without a pixel of the mask carries
        the values of the whole region.
    """
    found = np.empty((len(masks_NHW), bins**2, APPEARANCE_CHANNELS), np.float32)
    for index, (x0, y0, x1, y1) in enumerate(boxes_N4.tolist()):
        inside = masks_NHW[index, y0:y1, x0:x1]
        rows, columns = np.nonzero(inside)
        colours = pixels_HW3[y0:y1, x0:x1][inside].astype(np.float64) / 127.5 - 1
        bin_of = rows * bins // (y1 - y0) * bins + columns * bins // (x1 - x0)
        counts = np.bincount(bin_of, minlength=bins**2)
        sums, squares = (
            np.stack([np.bincount(bin_of, values[:, channel], bins**2) for channel in range(3)], axis=1)
            for values in (colours, colours**2)
        )
        filled = counts > 0
        divisor = np.where(filled, counts, 1)[:, None]
        means = np.where(filled[:, None], sums / divisor, colours.mean(axis=0))
        mean_squares = np.where(filled[:, None], squares / divisor, (colours**2).mean(axis=0))
        spread = np.sqrt(np.maximum(mean_squares - means**2, 0))
        found[index] = np.concatenate((means, spread), axis=1)
    return found


class FocalReplay(nn.Module):
    """Adds what crops and appearance say of regions to their RoI features."""

    def __init__(self, config: Any):
        super().__init__()
        width = config.text_config.hidden_size
        self.crop_proj = nn.Linear(width, width) if config.region_crop_size else None
        self.appearance_proj = nn.Linear(APPEARANCE_CHANNELS, width) if config.region_appearance else None

    def forward(
        self,
        features_RbD: torch.Tensor,
        crop_features_QbD: torch.Tensor | None = None,
        cropped_Q: torch.Tensor | None = None,
        appearance_Rb6: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """RoI features (R, b, D) with those of the regions' crops and their colours added.

        Args:
            crop_features_QbD: RoI-aligned inside the crops; cropped_Q: the regions that have one.
            appearance_Rb6: see `mask_appearance`.
        """
        if self.crop_proj is not None and crop_features_QbD is not None and cropped_Q is not None:
            added_QbD = self.crop_proj(crop_features_QbD).to(features_RbD.dtype)
            features_RbD = features_RbD.index_add(0, cropped_Q, added_QbD)
        if self.appearance_proj is not None and appearance_Rb6 is not None:
            features_RbD = features_RbD + self.appearance_proj(appearance_Rb6.to(features_RbD.dtype))
        return features_RbD
