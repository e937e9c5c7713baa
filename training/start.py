"""The model a run starts from: fresh weights with a learned tokenizer, or a checkpoint, with region parts added."""

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from perceptiondlm.checkpoints.convert import local_folder
from perceptiondlm.checkpoints.folder import prepare_config
from perceptiondlm.checkpoints.recipes import Recipe, detect, region_recipe
from perceptiondlm.checkpoints.tokenizer import build_tokenizer, scene_texts, special_token_ids
from perceptiondlm.configuration_perceptiondlm import PRESETS, PerceptionDLMConfig
from perceptiondlm.generation_config_perceptiondlm import PerceptionDLMGenerationConfig
from perceptiondlm.modeling_perceptiondlm import PerceptionDLMForConditionalGeneration
from perceptiondlm.processing_perceptiondlm import IMAGE_SETTINGS, PerceptionDLMProcessor
from perceptiondlm.training.config import PARTS, RunConfig


Start = tuple[PerceptionDLMForConditionalGeneration, PerceptionDLMProcessor]


def build_model(run: RunConfig) -> Start:
    """The model in fp32 and its processor, from nothing or from `init_from`."""
    model, processor = fresh_model(run) if run.init_from is None else model_from_checkpoint(run, run.init_from)
    prepare_config(model.config)
    slots = model.generation_config.max_new_tokens
    if run.init_from is None or slots < run.loss.num_slots:
        model.generation_config = PerceptionDLMGenerationConfig(
            max_new_tokens=run.loss.num_slots, steps=run.loss.num_slots, suppress_tokens=[model.config.mask_token_id]
        )
    return model, processor


def build_config(model: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> PerceptionDLMConfig:
    """A model config whose ids are the tokenizer's."""
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": tokenizer.model_max_length}
    special = {"bos_token_id": tokenizer.bos_token_id}
    special |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    text_config = {**text, **special, **model["text_config"]}
    return PerceptionDLMConfig(**{**model, "text_config": text_config}, **special_token_ids(tokenizer))


def model_settings(run: RunConfig) -> dict[str, Any]:
    """Keyword arguments of a new model's config: the preset's, replaced by `model`'s."""
    return changed(PRESETS[run.preset] if run.preset else {}, run.model)


def changed(settings: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Settings of a config with changes, sub-configs entry by entry."""
    result = copy.deepcopy(settings)
    for name, value in changes.items():
        result[name] = {**result.get(name, {}), **value} if isinstance(value, dict) else value
    return result


def fresh_model(run: RunConfig) -> Start:
    """A model with fresh weights, its tokenizer learned from drawn scenes."""
    settings = model_settings(run)
    settings["text_config"].pop("vocab_size", None)  # the tokenizer's
    texts = scene_texts(run.tokenizer.seed, run.tokenizer.scenes)
    positions = settings["text_config"].get("max_position_embeddings", run.data.max_length)
    tokenizer = build_tokenizer(texts, run.tokenizer.vocab_size, positions)
    config = build_config(settings, tokenizer)
    return PerceptionDLMForConditionalGeneration(config), PerceptionDLMProcessor.from_config(
        config, tokenizer, **run.processor
    )


def model_from_checkpoint(run: RunConfig, source: str) -> Start:
    """A checkpoint's model with `model`'s changes; parts it lacks or `train.reset` names are fresh.

    Raises:
        FileNotFoundError, ValueError: naming what does not fit.
    """
    folder = local_folder(source)
    if (kind := detect(folder)) != "perceptiondlm":
        raise ValueError(f"init_from {source} holds {kind!r} weights: bring them here first, perceptiondlm convert")
    config = PerceptionDLMConfig.from_pretrained(folder)
    conditioning = run.model.get("region_conditioning", config.region_conditioning)
    processor = PerceptionDLMProcessor.from_pretrained(folder, trust_remote_code=True)  # its tokenizer asks for this
    image_settings = {name: getattr(processor.image_processor, name) for name in IMAGE_SETTINGS}
    generation = PerceptionDLMGenerationConfig.from_pretrained(folder)
    tokenizer = processor.tokenizer
    if config.region_conditioning == "none" != conditioning:
        recipe = added_regions(run, folder, config, conditioning)
        config, tokenizer = recipe.config, recipe.tokenizer
        generation = PerceptionDLMGenerationConfig(**recipe.generation)
    config = PerceptionDLMConfig.from_dict(changed(config.to_dict(), run.model))
    model = load_weights(folder, config, tuple(run.train.reset), source)
    model.generation_config = generation
    fresh_processor = PerceptionDLMProcessor.from_config(
        model.config, tokenizer, chat_template=processor.chat_template, **{**image_settings, **run.processor}
    )
    return model, fresh_processor


def added_regions(run: RunConfig, folder: Path, base: PerceptionDLMConfig, conditioning: str) -> Recipe:
    """What the converter makes of a base model that learns regions."""
    layout = run.model.get("attention_layout", "isolated")
    rows = base.text_config.vocab_size
    recipe = region_recipe(folder, "perceptiondlm", rows, conditioning, layout)
    if recipe.config.text_config.vocab_size != rows:
        raise ValueError(
            f"{folder} has {rows} rows of embeddings, with region tokens there are "
            f"{recipe.config.text_config.vocab_size}: perceptiondlm convert {folder} TARGET --to region adds rows"
        )
    return recipe


def load_weights(
    folder: Path, config: PerceptionDLMConfig, reset: tuple[str, ...], source: str
) -> PerceptionDLMForConditionalGeneration:
    """A checkpoint's weights in fp32 under a config that may have other parts for regions."""
    model, info = PerceptionDLMForConditionalGeneration.from_pretrained(
        folder, config=config, dtype=torch.float32, ignore_mismatched_sizes=True, output_loading_info=True
    )
    regions = PARTS["regions"]
    wrong = [str(entry) for entry in info["mismatched_keys"]]
    wrong += [
        name for kind in ("missing_keys", "unexpected_keys") for name in info[kind] if not name.startswith(regions)
    ]
    if wrong:
        raise ValueError(
            f"init_from {source} does not fit the config: {len(wrong)} tensors, such as {sorted(wrong)[0]}"
        )
    for name, module in model.named_modules():
        if f"{name}.".startswith(tuple(prefix for part in reset for prefix in PARTS[part])):
            for parameter in module.parameters(recurse=False):
                parameter._is_hf_initialized = False  # transformers leaves loaded weights alone
            model._init_weights(module)
    return model
