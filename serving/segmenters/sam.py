"""Regions from a mask-generation model of transformers: SAM, SAM-HQ, SAM 2, EdgeTAM, and the tracker of SAM 3.

Boxes and points are the models' own prompts. "Everything" asks a grid of points for three masks each, keeps those that
the model is sure of and that do not change with the threshold, and drops near-duplicates, as the paper of SAM does.

Shape legend: R prompts, K points of a prompt, C masks of a prompt, m, n a mask's rows and columns at low resolution.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForMaskGeneration
from transformers.image_processing_base import ImageProcessingMixin

from perceptiondlm.common.loading import torch_device
from perceptiondlm.serving.found import FoundRegion
from perceptiondlm.serving.image_cache import content_key
from perceptiondlm.serving.segmenters.sam_pictures import Frame, PictureSettings


STABILITY_OFFSET = 1.0  # by which the threshold moves, in logits


class SamSegmenter:
    """A mask-generation model.

    Args:
        name: Hub id or folder.
        device: where the model runs; by default an accelerator if there is one.
        dtype: of the weights, such as `"bfloat16"`; by default the checkpoint's.
        points_per_side: of the grid of "everything".
        prompts_per_pass: how many prompts one pass of the mask decoder takes.
        least_score: least IoU that the model predicts for a mask of "everything", in [0, 1].
        least_stability: least IoU of such a mask at a higher and at a lower threshold, in [0, 1].
        most_overlap: IoU of boxes from which the less sure of two such masks is dropped, in [0, 1].
        least_share: smallest such mask, as a share of the image.
    """

    def __init__(
        self, name: str, device: str | None = None, dtype: str = "auto", points_per_side: int = 32,
        prompts_per_pass: int = 64, least_score: float = 0.88, least_stability: float = 0.95,
        most_overlap: float = 0.7, least_share: float = 0.0002,
    ):  # fmt: skip
        for setting, value in {"points_per_side": points_per_side, "prompts_per_pass": prompts_per_pass}.items():
            if type(value) is not int or value < 1:
                raise ValueError(f"{setting} must be a whole number of at least 1, got {value!r}")
        self.name = name
        self.device = default_device() if device is None else torch_device(device)
        self.points_per_side, self.prompts_per_pass = points_per_side, prompts_per_pass
        self.least_score, self.least_stability = least_score, least_stability
        self.most_overlap, self.least_share = most_overlap, least_share
        self.settings = PictureSettings.of(ImageProcessingMixin.get_image_processor_dict(name)[0], name)
        self.model = AutoModelForMaskGeneration.from_pretrained(name, dtype=dtype).to(self.device).eval()
        self._last: tuple[bytes, dict[str, Any]] | None = None

    def everything(self, image: Image.Image) -> list[FoundRegion]:
        """Masks of a grid of points, near-duplicates dropped, largest first."""
        frame = self._frame(image)
        steps = (np.arange(self.points_per_side) + 0.5) / self.points_per_side
        grid_R2 = np.stack(np.meshgrid(steps * image.width, steps * image.height), axis=-1).reshape(-1, 2)
        kept, scores, boxes = [], [], []
        for start in range(0, len(grid_R2), self.prompts_per_pass):
            points = grid_R2[start : start + self.prompts_per_pass, None]
            logits, sure = self._ask(image, points=points, labels=np.ones(points.shape[:2], int), many=True)
            logits, sure = logits.flatten(0, 1).float(), sure.flatten().float()
            stable = (logits > STABILITY_OFFSET).sum((1, 2)) / (logits > -STABILITY_OFFSET).sum((1, 2)).clamp(min=1)
            good = (sure >= self.least_score) & (stable >= self.least_stability) & (logits > 0).flatten(1).any(1)
            kept.append(logits[good])
            scores.append(sure[good])
            boxes.append(frame.boxes_of(logits[good] > 0))
        logits, sure = torch.cat(kept), torch.cat(scores)
        chosen = distinct(torch.cat(boxes).cpu().numpy(), sure.cpu().numpy(), self.most_overlap)
        found = [self._found(frame, logits[index], sure[index]) for index in chosen]
        least = self.least_share * image.width * image.height
        regions = [region for region in found if region is not None and region.area >= least]
        return sorted(regions, key=lambda region: -region.area)

    def at_boxes(self, image: Image.Image, boxes: Sequence[tuple[int, int, int, int]]) -> list[FoundRegion]:
        """The model's mask of each box."""
        frame, found = self._frame(image), []
        for start in range(0, len(boxes), self.prompts_per_pass):
            logits, sure = self._ask(image, boxes=np.asarray(boxes[start : start + self.prompts_per_pass], np.float64))
            found += [self._found(frame, logits[i, 0], sure[i, 0]) for i in range(len(logits))]
        return _all_there(found, "boxes", boxes)

    def at_points(self, image: Image.Image, points: Sequence[Any], labels: Any = None) -> list[FoundRegion]:
        """The model's mask of each entry's points; of the three that a single point gets, the surest."""
        frame = self._frame(image)
        pairs = [np.asarray(entry, np.float64).reshape(-1, 2) for entry in points]
        given = [None] * len(pairs) if labels is None else labels
        signs = [np.ones(len(p), int) if g is None else np.atleast_1d(g) for p, g in zip(pairs, given, strict=True)]
        alike = defaultdict(list)  # entries of as many points: padding would be tokens that the decoder sees
        for index, entry in enumerate(pairs):
            alike[len(entry)].append(index)
        found: list[FoundRegion | None] = [None] * len(pairs)
        for count, indices in alike.items():
            for start in range(0, len(indices), self.prompts_per_pass):
                part = indices[start : start + self.prompts_per_pass]
                asked = {"points": np.stack([pairs[i] for i in part]), "labels": np.stack([signs[i] for i in part])}
                logits, sure = self._ask(image, many=count == 1, **asked)
                best = sure.argmax(dim=1)
                for row, index in enumerate(part):
                    found[index] = self._found(frame, logits[row, best[row]], sure[row, best[row]])
        return _all_there(found, "points", points)

    def named(self, image: Image.Image, text: str) -> list[FoundRegion]:
        raise ValueError(f"{self.name} ({self.model.config.model_type}) knows no words; accepted for texts: SAM 3")

    def _frame(self, image: Image.Image) -> Frame:
        return self.settings.frame((image.height, image.width))

    def _found(self, frame: Frame, logits_mn: torch.Tensor, score: torch.Tensor) -> FoundRegion | None:
        return FoundRegion.of_mask(frame.mask(logits_mn), round(float(score.float().clamp(0, 1)), 4))

    @torch.inference_mode()
    def _ask(self, image: Image.Image, points=None, labels=None, boxes=None, many: bool = False):
        """Logits (R, C, m, n) and predicted IoU (R, C) of points (R, K, 2) with labels (R, K), or of boxes (R, 4)."""
        frame, asked = self._frame(image), {}
        if points is not None:
            asked["input_points"] = frame.points(points)[None].to(self.device, self.model.dtype)
            asked["input_labels"] = torch.as_tensor(labels)[None].to(self.device)
        if boxes is not None:
            corners = frame.points(np.asarray(boxes).reshape(-1, 2, 2)).reshape(1, -1, 4)
            asked["input_boxes"] = corners.to(self.device, self.model.dtype)
        output = self.model(**self._encoded(image), **asked, multimask_output=many)
        return output.pred_masks[0], output.iou_scores[0]

    def _encoded(self, image: Image.Image) -> dict[str, Any]:
        """What the model's vision tower made of an image; the last one is kept, since prompts come one by one."""
        key = content_key(image)
        last = self._last  # another thread may replace it
        if last is None or last[0] != key:
            pixels = self.settings.pixel_values(image).to(self.device, self.model.dtype)
            encoded = self.model.get_image_embeddings(pixels)
            if isinstance(encoded, tuple):  # SAM-HQ
                keywords = {"image_embeddings": encoded[0], "intermediate_embeddings": encoded[1]}
            else:
                keywords = {"image_embeddings": encoded}
            last = self._last = (key, keywords)
        return last[1]


def default_device() -> torch.device:
    """The accelerator of this machine, or its CPU."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def distinct(boxes_N4: np.ndarray, scores_N: np.ndarray, most_overlap: float) -> list[int]:
    """The boxes that overlap no surer one by more than `most_overlap` (IoU), the surest first."""
    kept: list[int] = []
    areas_N = np.prod(boxes_N4[:, 2:] - boxes_N4[:, :2], axis=1)
    for index in np.argsort(-scores_N, kind="stable"):
        others = boxes_N4[kept]
        low, high = np.maximum(others[:, :2], boxes_N4[index, :2]), np.minimum(others[:, 2:], boxes_N4[index, 2:])
        shared = np.prod(np.clip(high - low, 0, None), axis=1)
        if not (shared > most_overlap * (areas_N[kept] + areas_N[index] - shared)).any():
            kept.append(int(index))
    return kept


def _all_there(found: Sequence[FoundRegion | None], form: str, prompts: Sequence[Any]) -> list[FoundRegion]:
    """The regions, refused where a prompt got none."""
    for index, region in enumerate(found):
        if region is None:
            raise ValueError(f"{form}[{index}] is {prompts[index]}, where the segmenter found no pixel")
    return [region for region in found if region is not None]
