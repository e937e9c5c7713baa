"""Segmenters that are told in words what to find: SAM 3 through transformers, and a stand-in for drawn scenes."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from perceptiondlm.data_engine.drawn_stand_ins import drawn_masks
from perceptiondlm.data_engine.record import Record, encoded


# A record and names -> for each name the masks found, as COCO run lengths.
TextSegmenter = Callable[[Record, Sequence[str]], list[list[dict[str, Any]]]]

SAM3 = "facebook/sam3"


def check_segmenter(stage: str, spec: str) -> None:
    """Raise ValueError for a name that `make_segmenter` does not know."""
    if spec != "drawn" and spec.partition(":")[0] != "sam3":
        raise ValueError(f"{stage}: the segmenter {spec!r} is none of sam3, sam3:PATH, drawn")


def make_segmenter(spec: str, device: str | None = None) -> TextSegmenter:
    """A segmenter by name: ``sam3`` (from the Hub), ``sam3:PATH``, or ``drawn``.

    Raises:
        OSError: the model is not there.
    """
    if spec == "drawn":
        return lambda record, names: [drawn_masks(record, name) for name in names]
    return Sam3Segmenter(spec.partition(":")[2] or SAM3, device)


class Sam3Segmenter:
    """SAM 3 with text prompts.

    Args:
        path: folder or Hub id.
        device: default: the first GPU, else the CPU.
        threshold: of a mask's score, in [0, 1].
    """

    def __init__(self, path: str, device: str | None = None, threshold: float = 0.5) -> None:
        from transformers import Sam3Model, Sam3Processor

        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.threshold = threshold
        self.processor = Sam3Processor.from_pretrained(path)
        self.model = Sam3Model.from_pretrained(path).to(self.device).eval()

    @torch.inference_mode()
    def __call__(self, record: Record, names: Sequence[str]) -> list[list[dict[str, Any]]]:
        """The masks of each name; the image is encoded once."""
        image = record.open()
        pixels = self.processor(images=image, return_tensors="pt").to(self.device)
        features = self.model.get_vision_features(pixel_values=pixels["pixel_values"])
        found = []
        for name in names:
            text = self.processor(text=name, return_tensors="pt").to(self.device)
            outputs = self.model(vision_embeds=features, **text)
            (result,) = self.processor.post_process_instance_segmentation(
                outputs, threshold=self.threshold, target_sizes=[(record.height, record.width)]
            )
            masks = result["masks"].cpu().numpy().astype(bool)  # (N, H, W)
            found.append([encoded(np.asarray(mask)) for mask in masks if mask.any()])
        return found
