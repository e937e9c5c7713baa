"""Which class serves a segmentation model of transformers, by its config."""

from typing import Any

from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_MASK_GENERATION_MAPPING_NAMES as MASK_MODELS

from perceptiondlm.serving.segmenters.sam import SamSegmenter
from perceptiondlm.serving.segmenters.sam3 import Sam3Segmenter


TEXT_MODELS = ("sam3", "sam3_video")


def load_sam(name: str, device: str | None = None, **options: Any) -> SamSegmenter | Sam3Segmenter:
    """The segmenter of a Hub id or folder; see `load_segmenter`."""
    try:
        kind = AutoConfig.from_pretrained(name).model_type
    except (OSError, ValueError) as error:
        raise ValueError(
            f"segmenter {name!r} cannot be loaded ({error}); accepted: 'classical', 'none', or the Hub id or folder of "
            "a SAM, SAM 2, SAM 3 or other mask-generation model of transformers"
        ) from error
    if kind in TEXT_MODELS:
        return Sam3Segmenter(name, device, has_tracker=kind in MASK_MODELS, **options)
    if kind not in MASK_MODELS:
        accepted = sorted({*MASK_MODELS, *TEXT_MODELS})
        raise ValueError(f"segmenter {name!r} is a model of type {kind!r}; accepted: {', '.join(accepted)}")
    return SamSegmenter(name, device, **options)
