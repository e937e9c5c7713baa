"""The namer: what a region is called, by a linear classifier of its features and a detector's class scores.

A language model that learns from a thousand annotated regions learns them by heart, and a detector that has seen a
hundred thousand pictures knows better what things look like. So the first word of a caption may come from here, and the
language model writes the rest (docs/photos.md). The namer is linear in features averaged under the mask, hence every
tile's share of it is computed once, when the image is encoded, and a region costs a sum: it sees what it would see
alone. Between names and more general words it takes the likelier one, a general word counting `q` of the chances of all
kinds it stands for.

Legend: T tiles, P patches and n image tokens per tile side, C tower width, E classes of the detector, K kinds, W words,
R regions, Q regions with a crop, b = bins² of a region, D language width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from .focal_perceptiondlm import fill_missed_bins
from .nanodet_perceptiondlm import SMALLEST_STEP, NanoDet
from .sequence_perceptiondlm import Names
from .vision_perceptiondlm import to_grid


@dataclass(frozen=True)
class NamerShape:
    """Sizes of a namer, the field `namer` of [`PerceptionDLMConfig`].

    Args:
        kinds: K that it tells apart.
        words: W that a caption may begin with, names and more general words.
        detector_width: channels of the detector's stem.
        detector_classes: E.
    """

    kinds: int
    words: int
    detector_width: int = 32
    detector_classes: int = 80

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if type(value) is not int or value < 1:
                raise ValueError(f"namer.{name} must be an integer of at least 1, got {value!r}")
        if self.detector_width % 2:
            raise ValueError(f"namer.detector_width must be even, got {self.detector_width}")

    @classmethod
    def of(cls, given: Any) -> "NamerShape":
        """From the fields of a config; raises `ValueError` naming one that is missing or unknown."""
        try:
            return cls(**given)
        except TypeError as error:
            raise ValueError(f"namer is {given!r}; accepted: {sorted(cls.__annotations__)} ({error})") from None


class RegionNamer(nn.Module):
    """Names regions; fitted beside the language model (training/fit_namer.py), never trained with it.

    `word_ids` (W,) are the tokens of the words; `word_shares` (W, K) how much of each kind's chance counts for a word:
    1 for a kind's own name, q for a more general word.
    """

    word_ids: torch.Tensor
    word_shares: torch.Tensor

    def __init__(self, config: Any):
        super().__init__()
        shape = config.namer_shape
        width = config.vision_config.hidden_size + shape.detector_classes
        self.detector = NanoDet(shape.detector_width, shape.detector_classes)
        self.image = nn.Linear(width, shape.kinds, bias=False)
        self.crop = nn.Linear(width, shape.kinds, bias=False) if config.region_crop_size else None
        self.box = nn.Linear(6, shape.kinds)
        self.register_buffer("word_ids", torch.zeros(shape.words, dtype=torch.int64))
        self.register_buffer("word_shares", torch.zeros(shape.words, shape.kinds))
        self.requires_grad_(False)

    def evidence(
        self, pixels: torch.Tensor, patches_TPC: torch.Tensor, grids: Sequence[tuple[int, int]] | None
    ) -> torch.Tensor:
        """What tiles of images, or crops of regions, show of the kinds at each patch: (T, P, P, K).

        Args: see `look`.
        """
        layer = self.crop if grids is None else self.image
        assert layer is not None  # crops are there where the config has them
        return layer(self.look(pixels, patches_TPC, grids).to(layer.weight.dtype))

    def look(
        self, pixels: torch.Tensor, patches_TPC: torch.Tensor, grids: Sequence[tuple[int, int]] | None
    ) -> torch.Tensor:
        """The tower's features beside the detector's mean log-odds at each patch: (T, P, P, C + E).

        Args:
            pixels: (T, 3, H, W) red, green and blue in [0, 1]; patches_TPC: their features (T, P * P, C).
            grids: columns and rows of each image's tiles, which the detector sees as one picture, since a thing that is
                cut is harder to tell; None for crops, each a picture of its own.
        """
        side = int(patches_TPC.shape[1] ** 0.5)
        scores = self.scores(pixels, side) if grids is None else self.scores_of_images(pixels, side, grids)
        features = patches_TPC.unflatten(1, (side, side)).to(scores)
        return torch.cat((features, scores), dim=-1)

    def scores(self, pictures: torch.Tensor, rows: int, columns: int | None = None) -> torch.Tensor:
        """Mean log-odds (T, rows, columns, E) of the detector's three strides, on one grid."""
        cells = rows, columns or rows
        levels = [to_grid(level, cells) for level in self.detector(pixels_in_steps(pictures))]
        return torch.stack(levels).mean(dim=0).permute(0, 2, 3, 1)

    def scores_of_images(self, pixels: torch.Tensor, side: int, grids: Sequence[tuple[int, int]]) -> torch.Tensor:
        """Those of images cut into tiles, tile by tile (T, P, P, E); of thumbnails, which no region lies on, zeros."""
        found, start = [], 0
        for columns, rows in grids:
            cells = columns * rows
            tiles = pixels[start : start + cells].unflatten(0, (rows, columns))
            picture = tiles.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)[None]
            whole = self.scores(picture, rows * side, columns * side)[0]
            found.append(whole.unflatten(1, (columns, side)).unflatten(0, (rows, side)).transpose(1, 2).flatten(0, 1))
            start += cells
            if cells > 1:
                found.append(torch.zeros_like(found[-1][:1]))
                start += 1
        return torch.cat(found)

    def forward(
        self,
        image_RbK: torch.Tensor,
        crop_QbK: torch.Tensor | None,
        cropped_Q: torch.Tensor | None,
        covered_Rb: torch.Tensor,
        geometry_R6: torch.Tensor,
    ) -> Names:
        """Names of regions from what bins of their image and crops show of the kinds.

        Args:
            covered_Rb: share of each bin that the mask covers; geometry_R6: see `box_geometry`.
        """
        scores_RK = mean_under_mask(image_RbK, covered_Rb) + self.box(geometry_R6.to(self.box.weight.dtype)).float()
        if crop_QbK is not None and cropped_Q is not None and len(cropped_Q):
            scores_RK = scores_RK.index_add(0, cropped_Q, mean_under_mask(crop_QbK, covered_Rb[cropped_Q]))
        return self.choose(scores_RK)

    def choose(self, scores_RK: torch.Tensor) -> Names:
        """The word whose share of the chances is largest, and the chance that it is true."""
        chances_RK, shares_WK = scores_RK.float().softmax(dim=1), self.word_shares.float()
        best_R = (chances_RK @ shares_WK.T).argmax(dim=1)
        true_R = (chances_RK * (shares_WK[best_R] > 0)).sum(dim=1)
        return Names(self.word_ids[best_R], true_R.clamp(max=1.0))


def mean_under_mask(evidence_RbK: torch.Tensor, covered_Rb: torch.Tensor) -> torch.Tensor:
    """Means (R, K), fp32, of bins weighed by how much of each a mask covers."""
    return fill_missed_bins(evidence_RbK.float(), covered_Rb)[1][:, 0]


def patches_of(squares_TnnX: torch.Tensor, factor: int) -> torch.Tensor:
    """What pixel-unshuffle laid together, patch by patch again: (T, n, n, factor² * K) to (T, P, P, K)."""
    patches = squares_TnnX.unflatten(3, (factor, factor, -1)).transpose(2, 3)
    return patches.flatten(3, 4).flatten(1, 2)


def pixels_in_steps(pixels: torch.Tensor) -> torch.Tensor:
    """Pictures whose sides the detector can halve five times; a side of another length is brought to the next one."""
    sides = [-(-side // SMALLEST_STEP) * SMALLEST_STEP for side in pixels.shape[-2:]]
    return pixels if list(pixels.shape[-2:]) == sides else F.interpolate(pixels, sides, mode="bilinear")
