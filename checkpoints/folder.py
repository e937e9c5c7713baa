"""Checkpoints that stand alone: weights, configs, tokenizer, the code that reads them and a card, in one directory."""

import json
import shutil
from pathlib import Path

import torch

from perceptiondlm.configuration_perceptiondlm import PerceptionDLMConfig
from perceptiondlm.image_processing_perceptiondlm import PerceptionDLMImageProcessor
from perceptiondlm.modeling_perceptiondlm import PerceptionDLMForConditionalGeneration
from perceptiondlm.processing_perceptiondlm import PerceptionDLMProcessor


AUTO_MAP = {
    "AutoImageProcessor": "image_processing_perceptiondlm.PerceptionDLMImageProcessor",
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

SPARE_BYTES = 64 * 2**20  # room for tokenizer, code and configs


def register_auto_classes() -> None:
    """Make `save_pretrained` of these classes copy their code next to what they save."""
    PerceptionDLMConfig.register_for_auto_class()
    PerceptionDLMForConditionalGeneration.register_for_auto_class("AutoModel")
    PerceptionDLMImageProcessor.register_for_auto_class()
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
    state_dict: dict[str, torch.Tensor] | None = None,
) -> None:
    """Save a self-contained checkpoint. Weights are stored as `dtype`, but load in the model's own dtype by default.

    Args:
        state_dict: the weights, where the model holds only this process's share of them.
    """
    register_auto_classes()
    prepare_config(model.config)
    weights = model.state_dict() if state_dict is None else state_dict
    require_space(folder, sum(weight.numel() for weight in weights.values()) * dtype.itemsize)
    stored = {name: weight.to(dtype) if weight.is_floating_point() else weight for name, weight in weights.items()}
    model.save_pretrained(folder, state_dict=stored)
    processor.save_pretrained(folder)


def require_space(folder: str | Path, num_bytes: int) -> None:
    """Raise `OSError` if the disk of a folder to be written has no room for so many bytes."""
    place = next(parent for parent in Path(folder).absolute().parents if parent.is_dir())
    free = shutil.disk_usage(place).free
    if free < num_bytes + SPARE_BYTES:
        needed, available = (f"{size / 2**30:.2f} GiB" for size in (num_bytes + SPARE_BYTES, free))
        raise OSError(f"{folder} needs {needed}, the disk has {available} free")


def newest_checkpoint(output_dir: str | Path) -> Path | None:
    """The latest complete checkpoint of a run, or None. One that a killed run was still writing does not count."""
    folders = Path(output_dir).glob("checkpoint-*")
    numbered = sorted((int(f.name.split("-")[-1]), f) for f in folders if f.name.split("-")[-1].isdecimal())
    for _, folder in reversed(numbered):
        try:
            json.loads((folder / "trainer_state.json").read_text())  # written last
            return folder
        except (OSError, json.JSONDecodeError) as error:
            print(f"{folder} is not complete and is passed over: {error}")
    return None
