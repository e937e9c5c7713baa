"""NanoDet-g's class scores, densely: which of a detector's classes is seen at each place of a picture.

The detector (RangiLyu, github.com/RangiLyu/nanodet, Apache-2.0) is a small network of plain convolutions that was made
for processors without a GPU: stages that keep half of their channels untouched (CSPNet, Wang et al. 2020), a feature
pyramid that goes down and up (PANet, Liu et al. 2018), and a head of two convolutions at each of three strides. Boxes
are not predicted here: regions are given, so the scores alone are read.

Legend: T pictures, W channels of the stem, K classes, H x W pixels.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.nn import functional as F


LEAK = 0.1  # slope of the activation below 0
STAGE_BLOCKS = (1, 2, 2, 3)  # of the published network; strides 4, 8, 16 and 32
PIXEL_MEAN, PIXEL_STD = (103.53, 116.28, 123.675), (57.375, 57.12, 58.395)  # blue, green, red, of 255
SMALLEST_STEP = 32  # pixels that a side must be a multiple of


class CspStage(nn.Module):
    """Convolve, refine half of the channels block by block, and lay the result beside what came in: C to 2 C."""

    def __init__(self, channels: int, blocks: int, stride: int):
        super().__init__()
        half = channels // 2
        self.enter = nn.Conv2d(channels, channels, 3, stride, padding=1)
        self.narrow = nn.ModuleList(nn.Conv2d(channels, half, 3, padding=1) for _ in range(blocks))
        self.refine = nn.ModuleList(nn.Conv2d(half, half, 3, padding=1) for _ in range(blocks))
        self.leave = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        kept = refined = activate(self.enter(maps))
        for narrow, refine in zip(self.narrow, self.refine, strict=True):
            narrowed = activate(narrow(refined))
            refined = torch.cat((activate(refine(narrowed)), narrowed), dim=1)
        return torch.cat((activate(self.leave(refined)), kept), dim=1)


class NanoDet(nn.Module):
    """Scores of classes at strides 8, 16 and 32.

    Args:
        width: channels of the stem, 32 as published; even.
        classes: that it was trained on, 80 for COCO's things.
    """

    def __init__(self, width: int = 32, classes: int = 80):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, 2, padding=1)
        self.stages = nn.ModuleList(
            CspStage(width * 2**place, blocks, 2 if place else 1) for place, blocks in enumerate(STAGE_BLOCKS)
        )
        pyramid = 4 * width
        self.laterals = nn.ModuleList(nn.Conv2d(width * 2**place, pyramid, 1) for place in (2, 3, 4))
        self.heads = nn.ModuleList(nn.Conv2d(pyramid, pyramid, 3, padding=1) for _ in range(3))
        self.scores = nn.ModuleList(nn.Conv2d(pyramid, classes, 1) for _ in range(3))

    def forward(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        """Log-odds (T, K, H / stride, W / stride) of the classes, finest first.

        Args:
            pixels: (T, 3, H, W) red, green and blue in [0, 1]; sides are multiples of 32.
        """
        mean, std = (pixels.new_tensor(values)[:, None, None] for values in (PIXEL_MEAN, PIXEL_STD))
        normalised = ((pixels.flip(1) * 255 - mean) / std).to(self.stem.weight.dtype)
        maps = activate(self.stem(normalised.contiguous(memory_format=torch.channels_last)))
        maps, seen = F.max_pool2d(maps, 3, 2, padding=1), []
        for stage in self.stages:
            maps = stage(maps)
            seen.append(maps)
        levels = [lateral(maps) for lateral, maps in zip(self.laterals, seen[1:], strict=True)]
        merged = merge_levels(levels)
        heads = zip(self.heads, self.scores, merged, strict=True)
        return [scores(activate(head(maps))) for head, scores, maps in heads]


def activate(maps: torch.Tensor) -> torch.Tensor:
    """The activation behind a convolution."""
    return F.leaky_relu(maps, LEAK)


def merge_levels(levels: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Three levels, finest first, each with what the others saw: coarse ones added on the way down, fine ones up."""
    fine, middle, coarse = levels
    middle = middle + resized(coarse, middle)
    fine = fine + resized(middle, fine)
    middle = middle + resized(fine, middle)
    return [fine, middle, coarse + resized(middle, coarse)]


def resized(maps: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Maps interpolated to the sides of others."""
    return F.interpolate(maps, like.shape[-2:], mode="bilinear")


def nanodet_weights(
    convolutions: Sequence[tuple[torch.Tensor, torch.Tensor]], classes: int
) -> Mapping[str, torch.Tensor]:
    """Weights of [`NanoDet`] from the published network's convolutions in the order in which they are computed.

    Args:
        convolutions: weight (out, in, k, k) and bias of each, batch norms folded in: backbone, laterals, then head and
            output of each stride. The output's channels behind the classes are the boxes', which are left out.
        classes: how many of the output's channels are classes.
    Raises:
        ValueError: for a network of another number of convolutions.
    """
    names = ["stem"]
    for stage, blocks in enumerate(STAGE_BLOCKS):
        inner = [f"{kind}.{block}" for block in range(blocks) for kind in ("narrow", "refine")]
        names += [f"stages.{stage}.{name}" for name in ("enter", *inner, "leave")]
    names += [f"laterals.{level}" for level in range(3)]
    names += [f"{kind}.{level}" for level in range(3) for kind in ("heads", "scores")]
    if len(names) != len(convolutions):
        raise ValueError(f"NanoDet-g has {len(names)} convolutions, got {len(convolutions)}")
    state = {}
    for name, (weight, bias) in zip(names, convolutions, strict=True):
        kept = classes if name.startswith("scores") else len(weight)
        state[f"{name}.weight"], state[f"{name}.bias"] = weight[:kept].clone(), bias[:kept].clone()
    return state
