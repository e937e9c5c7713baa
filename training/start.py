"""The model a run starts from: fresh weights with a learned tokenizer, or a checkpoint, with region parts added."""

import copy
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from accelerate.state import PartialState
from transformers import BitsAndBytesConfig, PreTrainedTokenizerFast
from transformers.utils import is_bitsandbytes_available

from perceptiondlm.checkpoints.convert import local_folder
from perceptiondlm.checkpoints.files import Checkpoint
from perceptiondlm.checkpoints.folder import prepare_config
from perceptiondlm.checkpoints.recipes import Recipe, detect, region_recipe
from perceptiondlm.checkpoints.tokenizer import build_tokenizer, colour_texts, scene_texts, special_token_ids
from perceptiondlm.checkpoints.vision_towers import load_tower_weights
from perceptiondlm.configuration_perceptiondlm import PRESETS, PerceptionDLMConfig
from perceptiondlm.generation_config_perceptiondlm import PerceptionDLMGenerationConfig
from perceptiondlm.modeling_perceptiondlm import PerceptionDLMForConditionalGeneration
from perceptiondlm.processing_perceptiondlm import IMAGE_SETTINGS, PerceptionDLMProcessor
from perceptiondlm.training.config import FITTED, PARTS, QUANTIZED, RunConfig
from perceptiondlm.training.data.named_regions import caption_names
from perceptiondlm.training.sharding import sharding_asked


Start = tuple[PerceptionDLMForConditionalGeneration, PerceptionDLMProcessor]


def build_model(run: RunConfig, as_stored: bool = False) -> Start:
    """The model and its processor, from nothing or from `init_from`.

    Args:
        as_stored: with all weights as the checkpoint stores them, for adapters to be merged into; else for training,
            see `TrainConfig.frozen_weights`: what trains is still to be brought to fp32.
    """
    if run.init_from is None:
        model, processor = fresh_model(run)
        if run.train.frozen_weights == "bfloat16" and not as_stored:
            model = model.bfloat16()
    else:
        model, processor = model_from_checkpoint(run, run.init_from, as_stored)
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
    config, processor = fresh_parts(run)
    model = PerceptionDLMForConditionalGeneration(config)
    if run.vision_weights is not None:
        load_tower_weights(model.vision_tower, run.vision_weights)
    return model, processor


def fresh_parts(run: RunConfig) -> tuple[PerceptionDLMConfig, PerceptionDLMProcessor]:
    """Config and processor of a model from nothing."""
    settings = model_settings(run)
    settings["text_config"].pop("vocab_size", None)  # the tokenizer's
    texts, names = scene_texts(run.tokenizer.seed, run.tokenizer.scenes), []
    if run.tokenizer.names:
        texts, names = chain(texts, colour_texts()), caption_names(run.data.sources)
    positions = settings["text_config"].get("max_position_embeddings", run.data.max_length)
    tokenizer = build_tokenizer(texts, run.tokenizer.vocab_size, positions, names)
    config = build_config(settings, tokenizer)
    return config, PerceptionDLMProcessor.from_config(config, tokenizer, **run.processor)


def model_from_checkpoint(run: RunConfig, source: str, as_stored: bool = False) -> Start:
    """A checkpoint's model with `model`'s changes; parts it lacks or `train.reset` names are fresh.

    Raises:
        FileNotFoundError, ValueError: naming what does not fit.
    """
    config, processor, generation = checkpoint_parts(run, source)
    folder = local_folder(source)
    held = held_weights(run, folder, as_stored)
    model = load_weights(folder, config, tuple(run.train.reset), source, held)
    model.generation_config = generation
    return model, processor


def build_processor(run: RunConfig) -> tuple[PerceptionDLMConfig, PerceptionDLMProcessor]:
    """Config and processor of a run's model, without its weights. Raises as `build_model` does."""
    if run.init_from:
        return checkpoint_parts(run, run.init_from)[:2]
    return fresh_parts(run)


def checkpoint_parts(
    run: RunConfig, source: str
) -> tuple[PerceptionDLMConfig, PerceptionDLMProcessor, PerceptionDLMGenerationConfig]:
    """Config, processor and generation settings of a checkpoint with `model`'s and `processor`'s changes.

    A namer is left behind: a language model that learns is to name regions as it is taught, and another may be fitted.
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
    generation.naming_threshold = None
    config = PerceptionDLMConfig.from_dict(changed(config.to_dict(), {"namer": None, **run.model}))
    fresh_processor = PerceptionDLMProcessor.from_config(
        config, tokenizer, chat_template=processor.chat_template, **{**image_settings, **run.processor}
    )
    return config, fresh_processor, generation


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


def held_weights(run: RunConfig, folder: Path, as_stored: bool) -> str:
    """How a checkpoint's weights are to be held: of `FROZEN`, but `auto`."""
    stored = {tensor.dtype for tensor in Checkpoint(folder).tensors.values()}
    own = "bfloat16" if stored == {"BF16"} else "float32"
    if as_stored:
        return own
    if run.train.frozen_weights != "auto":
        return run.train.frozen_weights
    return own if run.trainer.get("bf16") and not sharding_asked() else "float32"


def loading_settings(held: str) -> dict[str, Any]:
    """Keyword arguments of `from_pretrained` for weights held so; quantized ones lie on this process's device.

    Raises:
        ImportError: bitsandbytes is missing.
    """
    if held not in QUANTIZED:
        return {"dtype": getattr(torch, held)}
    if not is_bitsandbytes_available():
        raise ImportError(
            f"train.frozen_weights {held!r} needs bitsandbytes: pip install 'perceptiondlm[quantization]'"
        )
    whole = [prefix.rstrip(".") for part in PARTS for prefix in PARTS[part] if prefix != "language_model."]
    if held == "8bit":
        quantization = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=whole)
    else:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16, llm_int8_skip_modules=whole,
        )  # fmt: skip
    return {"dtype": torch.bfloat16, "quantization_config": quantization, "device_map": {"": PartialState().device}}


def load_weights(
    folder: Path, config: PerceptionDLMConfig, reset: tuple[str, ...], source: str, held: str = "float32"
) -> PerceptionDLMForConditionalGeneration:
    """A checkpoint's weights, held as `loading_settings` says, under a config that may have other parts for regions."""
    model, info = PerceptionDLMForConditionalGeneration.from_pretrained(
        folder, config=config, ignore_mismatched_sizes=True, output_loading_info=True, **loading_settings(held)
    )
    optional = (*PARTS["regions"], FITTED)
    wrong = [str(entry) for entry in info["mismatched_keys"]]
    wrong += [
        name for kind in ("missing_keys", "unexpected_keys") for name in info[kind] if not name.startswith(optional)
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
