"""Regions from SAM 3: all that a short text names, and, where the checkpoint holds the tracker, boxes and points.

Shape legend: Q candidates of the detector, m, n a mask's rows and columns at low resolution.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from transformers import AutoTokenizer
from transformers.image_processing_base import ImageProcessingMixin
from transformers.models.sam3.modeling_sam3 import Sam3Model  # by its file: the lazy name asks for torchvision

from perceptiondlm.common.loading import torch_device
from perceptiondlm.serving.found import FoundRegion
from perceptiondlm.serving.image_cache import content_key
from perceptiondlm.serving.segmenters.sam import SamSegmenter, default_device
from perceptiondlm.serving.segmenters.sam_pictures import PictureSettings


TEXT_TOKENS = 32  # a text's length, padded, as SAM 3 was trained


class Sam3Segmenter:
    """The detector of SAM 3, for texts, beside its tracker, for everything else.

    Args:
        name: Hub id or folder.
        device: where the models run; by default an accelerator if there is one.
        dtype: of the weights, such as `"bfloat16"`; by default the checkpoint's.
        has_tracker: whether the checkpoint holds the tracker (`facebook/sam3` does).
        least_named: least score of a region that a text names, in [0, 1].
        options: settings of `SamSegmenter`, for boxes, points and everything.
    """

    def __init__(
        self, name: str, device: str | None = None, dtype: str = "auto", has_tracker: bool = False,
        least_named: float = 0.5, **options: Any,
    ):  # fmt: skip
        self.name, self.least_named = name, least_named
        self.device = default_device() if device is None else torch_device(device)
        self.settings = PictureSettings.of(ImageProcessingMixin.get_image_processor_dict(name)[0], name)
        self.tokenizer = AutoTokenizer.from_pretrained(name)
        self.model = Sam3Model.from_pretrained(name, dtype=dtype).to(self.device).eval()
        self._tracker_options = {"device": device, "dtype": dtype, **options} if has_tracker else None
        self._tracker: SamSegmenter | None = None
        self._last: tuple[bytes, Any] | None = None

    @torch.inference_mode()
    def named(self, image: Image.Image, text: str) -> list[FoundRegion]:
        """All regions that a text names, the surest first."""
        words = self.tokenizer(text, return_tensors="pt", padding="max_length", max_length=TEXT_TOKENS)
        if words["input_ids"].shape[1] > TEXT_TOKENS:
            raise ValueError(f"text has {words['input_ids'].shape[1]} tokens; accepted: up to {TEXT_TOKENS}")
        keywords = {key: words[key].to(self.device) for key in ("input_ids", "attention_mask")}
        output = self.model(vision_embeds=self._encoded(image), **keywords)
        scores_Q = (output.pred_logits[0].sigmoid() * output.presence_logits[0].sigmoid()).float()
        frame, found = self.settings.frame((image.height, image.width)), []
        for index in scores_Q.argsort(descending=True).tolist():
            if scores_Q[index] < self.least_named:
                break
            mask = frame.mask(output.pred_masks[0, index].float().sigmoid(), threshold=0.5)
            found.append(FoundRegion.of_mask(mask, round(float(scores_Q[index]), 4), text))
        return [region for region in found if region is not None]

    def everything(self, image: Image.Image) -> list[FoundRegion]:
        return self.tracker.everything(image)

    def at_boxes(self, image: Image.Image, boxes: Sequence[tuple[int, int, int, int]]) -> list[FoundRegion]:
        return self.tracker.at_boxes(image, boxes)

    def at_points(self, image: Image.Image, points: Sequence[Any], labels: Any = None) -> list[FoundRegion]:
        return self.tracker.at_points(image, points, labels)

    @property
    def tracker(self) -> SamSegmenter:
        """The model for boxes, points and everything, loaded when it is first asked."""
        if self._tracker_options is None:
            raise ValueError(
                f"{self.name} holds SAM 3's detector alone, which takes texts; accepted for boxes, points and "
                "everything: a checkpoint with the tracker, such as facebook/sam3"
            )
        if self._tracker is None:
            self._tracker = SamSegmenter(self.name, **self._tracker_options)
        return self._tracker

    def _encoded(self, image: Image.Image) -> Any:
        """What the vision tower made of an image; the last one is kept, since texts come one by one."""
        key = content_key(image)
        last = self._last  # another thread may replace it
        if last is None or last[0] != key:
            pixels = self.settings.pixel_values(image).to(self.device, self.model.dtype)
            last = self._last = (key, self.model.get_vision_features(pixels))
        return last[1]
