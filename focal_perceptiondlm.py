"""Focal replay: what a region adds of its own, out of a crop around it and out of its pixels.

The image is encoded once and knows no region; a small region then lies on a handful of its features. Under focal
replay each region also has a crop, its box grown by a factor and resized, which the same tower and projector encode.
RoI-Align of the region's box *inside its crop* gives as many features as that of its box in the image, and a learned
projection of the one is added to the other: no token more, and a region still sees what it would see alone. A region
above a share of its image skips its crop, since the image shows it as large. Appearance is what features of a deep
tower lose: mean and spread of the colours under the mask in each bin. Pooling adds the mean of the region's features
under its mask, which also stands where the mask leaves a bin empty: what lies there is not the region.

Legend: R regions, Q regions with a crop, S bins per RoI side, b = S² bins, c crop side in pixels, n image tokens per
crop side, D language width, N boxes of an image, H x W pixels of a picture.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from .coverage_perceptiondlm import Region
from .images_perceptiondlm import load_image


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


def mask_appearance(pixels_HW3: np.ndarray, mask_HW: np.ndarray, bins: int) -> np.ndarray:
    """Mean and spread of the colours under a mask in each bin of its box.

    Args:
        pixels_HW3: uint8, the picture inside the box; mask_HW: bool, the mask inside it, not empty.
    Returns:
        float32 (bins², 6) in row-major order, colours scaled to [-1, 1]; a bin without a pixel of the mask carries the
        values of the whole region.
    """
    rows, columns = ([-(-side * part // bins) for part in range(bins + 1)] for side in mask_HW.shape)
    sums_b7 = np.zeros((bins**2, 7))
    for index, ((y0, y1), (x0, x1)) in enumerate(product(pairwise(rows), pairwise(columns))):
        colours = pixels_HW3[y0:y1, x0:x1][mask_HW[y0:y1, x0:x1]].astype(np.float64)
        sums_b7[index] = (len(colours), *colours.sum(axis=0), *(colours**2).sum(axis=0))
    sums_b7 = np.where(sums_b7[:, :1] > 0, sums_b7, sums_b7.sum(axis=0))
    means, squares = np.split(sums_b7[:, 1:] / sums_b7[:, :1], 2, axis=1)
    spread = np.sqrt(np.maximum(squares - means**2, 0))
    return np.concatenate((means / 127.5 - 1, spread / 127.5), axis=1).astype(np.float32)


@dataclass(frozen=True)
class OwnPixels:
    """What a processor takes of its regions' own pixels.

    Args:
        crop_size, appearance, context, max_share, bins: `region_crop_size`, `region_appearance`, `crop_context`,
            `crop_max_share` and `roi_size` of [`PerceptionDLMProcessor`].
    """

    crop_size: int
    appearance: bool
    context: float
    max_share: float
    bins: int

    @property
    def wanted(self) -> bool:
        """Whether anything is taken."""
        return bool(self.crop_size or self.appearance)

    def checked(self, picture: Any, size: tuple[int, int], name: str) -> Any:
        """The picture in RGB; refuses an encoded image without it, or with one of another (height, width)."""
        if not self.wanted:
            return None
        if picture is None:
            raise ValueError(
                f"{name} is an encoded image without its picture, which this model cuts regions out of: encode it with "
                "the pipeline's encode_image, or give model.encode_image the picture"
            )
        picture = load_image(picture, name)
        if (found := (picture.height, picture.width)) != tuple(size):
            raise ValueError(f"{name} was encoded at {tuple(size)} (height, width), its picture is {found}")
        return picture

    def measure(self, picture: Image.Image, region: Region) -> dict[str, np.ndarray]:
        """Of one region: `crops` (1, c, c, 3) uint8, `crop_boxes` (1, 4) and `appearance` (1, bins², 6) float32."""
        found: dict[str, np.ndarray] = {}
        box_14, (height, width) = np.array([region.box]), region.image_size
        if side := self.crop_size:
            found["crops"], found["crop_boxes"] = np.zeros((1, side, side, 3), np.uint8), np.zeros((1, 4), np.float32)
            if np.prod(box_14[0, 2:] - box_14[0, :2]) <= self.max_share * height * width:
                crop_14 = grown_boxes(box_14, region.image_size, self.context)
                found["crops"] = cut_crops(picture, crop_14, side)
                found["crop_boxes"] = boxes_in_crops(box_14, crop_14)
        if self.appearance:
            pixels_hw3 = np.asarray(picture.crop(region.box))
            found["appearance"] = mask_appearance(pixels_hw3, region.crop(), self.bins)[None]
        return found

    def of_pass(
        self, measured: list[dict[str, np.ndarray]], as_tiles: Callable[[np.ndarray], np.ndarray]
    ) -> dict[str, np.ndarray]:
        """Those of a pass's regions together; crops take the form of tiles."""
        if not self.wanted:
            return {}
        found = {name: np.concatenate([region[name] for region in measured]) for name in measured[0]}
        return found | ({"crops": as_tiles(found["crops"])} if self.crop_size else {})


class FocalReplay(nn.Module):
    """Adds what crops, appearance and the mean under the mask say of regions to their RoI features."""

    def __init__(self, config: Any):
        super().__init__()
        width, crops = config.text_config.hidden_size, bool(config.region_crop_size)
        self.gain = config.region_gain
        self.crop_proj = nn.Linear(width, width) if crops else None
        self.appearance_proj = nn.Linear(APPEARANCE_CHANNELS, width) if config.region_appearance else None
        self.pooled_proj = nn.Linear(width, width) if config.region_pooling else None
        self.pooled_crop_proj = nn.Linear(width, width) if config.region_pooling and crops else None

    def forward(
        self,
        features_RbD: torch.Tensor,
        crop_features_QbD: torch.Tensor | None = None,
        cropped_Q: torch.Tensor | None = None,
        appearance_Rb6: torch.Tensor | None = None,
        covered_Rb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """RoI features (R, b, D) with those of the regions' crops, their means and their colours added.

        Args:
            crop_features_QbD: RoI-aligned inside the crops; cropped_Q: the regions that have one (both may be empty).
            appearance_Rb6: see `mask_appearance`.
            covered_Rb: share of each bin that the mask covers, in [0, 1].
        """
        if self.pooled_proj is not None and covered_Rb is not None:
            features_RbD, mean_R1D = fill_missed_bins(features_RbD, covered_Rb)
            features_RbD = features_RbD + self.pooled_proj(mean_R1D)
        if self.crop_proj is not None and crop_features_QbD is not None and cropped_Q is not None:
            pooled_Q1D = None
            if self.pooled_crop_proj is not None and covered_Rb is not None:
                crop_features_QbD, mean_Q1D = fill_missed_bins(crop_features_QbD, covered_Rb[cropped_Q])
                pooled_Q1D = self.pooled_crop_proj(mean_Q1D)
            added_QbD = self.crop_proj(crop_features_QbD)
            added_QbD = added_QbD if pooled_Q1D is None else added_QbD + pooled_Q1D
            features_RbD = features_RbD.index_add(0, cropped_Q, added_QbD.to(features_RbD.dtype))
        if self.appearance_proj is not None and appearance_Rb6 is not None:
            features_RbD = features_RbD + self.gain * self.appearance_proj(appearance_Rb6.to(features_RbD.dtype))
        return features_RbD


def fill_missed_bins(features_RbD: torch.Tensor, covered_Rb: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Features in which bins that a mask does not touch hold the mean of the others, and that mean (R, 1, D).

    The mean weighs each bin by the share of it that the mask covers.
    """
    weights_Rb1 = covered_Rb[..., None].to(features_RbD)
    total_R11 = weights_Rb1.sum(dim=1, keepdim=True).clamp(min=torch.finfo(weights_Rb1.dtype).tiny)
    mean_R1D = (features_RbD * weights_Rb1).sum(dim=1, keepdim=True) / total_R11
    return torch.where(weights_Rb1 > 0, features_RbD, mean_R1D), mean_R1D
