"""Writing checkpoints that stand alone: weights, configs, tokenizer and the code that reads them, in one directory."""

from pathlib import Path

import torch

from perceptiondlm.configuration_perceptiondlm import PerceptionDLMConfig
from perceptiondlm.modeling_perceptiondlm import PerceptionDLMForConditionalGeneration
from perceptiondlm.processing_perceptiondlm import PerceptionDLMProcessor


AUTO_MAP = {
    "AutoConfig": "configuration_perceptiondlm.PerceptionDLMConfig",
    "AutoModel": "modeling_perceptiondlm.PerceptionDLMForConditionalGeneration",
    "AutoModelForImageTextToText": "modeling_perceptiondlm.PerceptionDLMForConditionalGeneration",
    "AutoProcessor": "processing_perceptiondlm.PerceptionDLMProcessor",
}
CUSTOM_PIPELINES = {
    "region-captioning": {
        "impl": "pipeline_perceptiondlm.RegionCaptioningPipeline",
        "pt": ["AutoModelForImageTextToText"],
        "type": "multimodal",
    }
}


def register_auto_classes() -> None:
    """Make `save_pretrained` of these classes copy their code next to what they save."""
    PerceptionDLMConfig.register_for_auto_class()
    PerceptionDLMForConditionalGeneration.register_for_auto_class("AutoModel")
    PerceptionDLMProcessor.register_for_auto_class()


def prepare_config(config: PerceptionDLMConfig) -> PerceptionDLMConfig:
    """Record in a config which code reads the checkpoint."""
    config.auto_map = dict(AUTO_MAP)
    config.custom_pipelines = {name: dict(entry) for name, entry in CUSTOM_PIPELINES.items()}
    return config


def export(
    model: PerceptionDLMForConditionalGeneration,
    processor: PerceptionDLMProcessor,
    folder: str | Path,
    dtype: torch.dtype,
) -> None:
    """Save a self-contained checkpoint. Weights are stored as `dtype`, but load in the model's own dtype by default."""
    register_auto_classes()
    prepare_config(model.config)
    stored = {name: weight.to(dtype) for name, weight in model.state_dict().items()}
    model.save_pretrained(folder, state_dict=stored)
    processor.save_pretrained(folder)
