"""A picture on its way into a model of the SAM family, and masks on their way back.

The models come from transformers; their image processors need torchvision, which this project does without, for two
steps: resize and normalise. The settings are those of the checkpoint's preprocessor_config.json. Checked against
transformers' own processor of SAM in the tests.

Shape legend: H, W the image, h, w what the model sees of it, P, Q the model's input, m, n its masks, all in pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image


@dataclass(frozen=True)
class PictureSettings:
    """How a checkpoint wants its pictures.

    Attributes:
        longest_edge: side that the longer side of an image gets, the rest padded (SAM, SAM-HQ); None where `input_size`
            is filled whatever the aspect ratio (SAM 2, SAM 3).
        input_size: (P, Q).
        mean, std: three numbers each, for values in [0, 1].
        resample: Pillow's number of the filter.
    """

    longest_edge: int | None
    input_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resample: int

    @classmethod
    def of(cls, settings: dict[str, Any], name: str) -> PictureSettings:
        """The settings of a preprocessor_config.json, refused where sizes or colours are not told.

        Args:
            name: the checkpoint, for messages.
        """
        size, pad = settings.get("size") or {}, settings.get("pad_size") or {}
        longest = size.get("longest_edge")
        whole = pad if longest else size
        mean, std = settings.get("image_mean"), settings.get("image_std")
        if not all(key in whole for key in ("height", "width")) or mean is None or std is None:
            known = {key: settings.get(key) for key in ("size", "pad_size", "image_mean", "image_std")}
            raise ValueError(
                f"the image processor settings of {name} are {known}; accepted: size with height and width, or size "
                "with longest_edge and pad_size, and image_mean and image_std"
            )
        return cls(longest, (whole["height"], whole["width"]), tuple(mean), tuple(std), settings.get("resample", 2))

    def frame(self, size: tuple[int, int]) -> Frame:
        """Where an image of (H, W) lies in the model's input."""
        if self.longest_edge is None:
            return Frame(size, self.input_size, self.input_size)
        scale = self.longest_edge / max(size)
        return Frame(size, (max(1, int(size[0] * scale + 0.5)), max(1, int(size[1] * scale + 0.5))), self.input_size)

    def pixel_values(self, image: Image.Image) -> torch.Tensor:
        """An RGB image as float32 (1, 3, P, Q); padding is 0 after normalising."""
        frame = self.frame((image.height, image.width))
        (seen_h, seen_w), (height, width) = frame.seen, frame.whole
        values_hw3 = np.asarray(image.resize((seen_w, seen_h), Image.Resampling(self.resample))) / np.float32(255)
        values_hw3 = (values_hw3 - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)
        pixels_3hw = torch.from_numpy(values_hw3).permute(2, 0, 1)
        return F.pad(pixels_3hw, (0, width - seen_w, 0, height - seen_h))[None].contiguous()


@dataclass(frozen=True)
class Frame:
    """The way from an image to a model's input and back.

    Attributes:
        size: (H, W) of the image.
        seen: (h, w) of the image inside the input, top left.
        whole: (P, Q) of the input.
    """

    size: tuple[int, int]
    seen: tuple[int, int]
    whole: tuple[int, int]

    def points(self, points: Any) -> torch.Tensor:
        """Points (..., 2) as x, y in pixels of the image, to float32 in pixels of the input."""
        scale = torch.tensor([self.seen[1] / self.size[1], self.seen[0] / self.size[0]])
        return torch.as_tensor(points, dtype=torch.float32) * scale

    def boxes_of(self, masks_Nmn: torch.Tensor) -> torch.Tensor:
        """Boxes (N, 4) of low-resolution masks, bool, in pixels of the image, float32; zeros of an empty mask."""
        rows, columns = masks_Nmn.any(dim=2).float(), masks_Nmn.any(dim=1).float()
        height, width = masks_Nmn.shape[1:]
        sides = [
            columns.argmax(1), rows.argmax(1), width - columns.flip(1).argmax(1), height - rows.flip(1).argmax(1),
        ]  # fmt: skip
        boxes = torch.stack(sides, dim=1).float() * masks_Nmn.flatten(1).any(dim=1)[:, None]
        step_y, step_x = self.whole[0] / height, self.whole[1] / width
        ratio_y, ratio_x = self.size[0] / self.seen[0], self.size[1] / self.seen[1]
        return boxes * torch.tensor([step_x * ratio_x, step_y * ratio_y] * 2, device=boxes.device)

    def mask(self, logits_mn: torch.Tensor, threshold: float = 0.0) -> np.ndarray:
        """A mask's logits at the image's size, above the threshold, bool (H, W)."""
        logits = logits_mn[None, None].float()
        if self.seen != self.whole:
            logits = F.interpolate(logits, self.whole, mode="bilinear", align_corners=False)
            logits = logits[..., : self.seen[0], : self.seen[1]]
        logits = F.interpolate(logits, self.size, mode="bilinear", align_corners=False)
        return (logits[0, 0] > threshold).cpu().numpy()
