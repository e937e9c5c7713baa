"""What a checkpoint is, and what it becomes: config, processor and generation settings of every kind of conversion."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from perceptiondlm.checkpoints import layouts
from perceptiondlm.checkpoints.tokenizer import REGION_TOKENS, VISION_TOKENS, special_token_ids
from perceptiondlm.common.json_files import read_json
from perceptiondlm.configuration_perceptiondlm import PerceptionDLMConfig


KINDS = {
    "released": "the released PerceptionDLM",
    "released-base": "the released PerceptionDLM-Base",
    "llada": "LLaDA in its original naming",
    "llada-hf": "LLaDA in Llama's naming",
    "siglip": "a SigLIP or SigLIP2 vision tower",
    "perceptiondlm": "a checkpoint of this repository",
}
RULES = {
    "released": layouts.RELEASED_RULES,
    "released-base": layouts.RELEASED_RULES,
    "llada": layouts.LLADA_RULES,
    "llada-hf": layouts.LLAMA_RULES,
    "siglip": layouts.SIGLIP_RULES,
    "perceptiondlm": layouts.OWN_RULES,
}
VOCABULARY = ("language_model.embed_tokens.weight", "lm_head.weight")


@dataclass
class Recipe:
    """What a target is made of, apart from its tensors.

    Args:
        config: of the target.
        tokenizer: with every token the target needs.
        fresh: beginnings of the names of tensors that are initialised anew.
        processor: keywords of `PerceptionDLMProcessor.from_config`.
        generation: keywords of `PerceptionDLMGenerationConfig`.
    """

    config: PerceptionDLMConfig
    tokenizer: PreTrainedTokenizerFast
    fresh: tuple[str, ...] = ()
    processor: dict[str, Any] = field(default_factory=dict)
    generation: dict[str, Any] = field(default_factory=dict)


def detect(folder: Path) -> str:
    """The kind of a checkpoint directory, by its config; see `KINDS`."""
    config = read_json(folder / "config.json")
    model_type = config.get("model_type")
    if model_type == "llada":
        return "llada" if "d_model" in config else "llada-hf"
    kinds = {
        "pdmllm": "released",
        "dmllm": "released-base",
        "siglip": "siglip",
        "siglip_vision_model": "siglip",
        "perceptiondlm": "perceptiondlm",
    }
    if model_type not in kinds:
        known = ", ".join(sorted({*kinds, "llada"}))
        raise ValueError(f"{folder}/config.json has model_type {model_type!r}; accepted: {known}")
    return kinds[model_type]


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a checkpoint directory."""
    if not (folder / "tokenizer.json").is_file():
        raise FileNotFoundError(f"{folder} has no tokenizer.json")
    return PreTrainedTokenizerFast.from_pretrained(
        folder, bos_token="<|startoftext|>", eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )


def finish_config(
    fields: dict[str, Any], tokenizer: PreTrainedTokenizerFast, rows: int, declared: int
) -> PerceptionDLMConfig:
    """A config from translated fields, with the tokenizer's ids and the vocabulary rows that the tensors have.

    A published checkpoint has as many rows as its config says, or as its tokenizer has tokens. Fewer rows than tokens
    will grow.
    """
    if rows not in (declared, len(tokenizer)) and not rows < len(tokenizer):
        raise ValueError(
            f"the embeddings have {rows} rows; accepted: {declared} (config) or {len(tokenizer)} (tokenizer)"
        )
    text = {**fields["text_config"], "vocab_size": max(rows, len(tokenizer)), **token_ids(tokenizer)}
    return PerceptionDLMConfig(**{**fields, "text_config": text}, **special_token_ids(tokenizer))


def released_recipe(folder: Path, rows: int) -> Recipe:
    """The released models, quirks and all."""
    source = read_json(folder / "config.json")
    tokenizer = load_tokenizer(folder)
    declared = source["language_model_config"]["vocab_size"]
    if rows < len(tokenizer):
        raise ValueError(f"the embeddings have {rows} rows for {len(tokenizer)} tokens; accepted: as many or more")
    config = finish_config(layouts.released_config(source), tokenizer, rows, declared)
    ids = token_ids(tokenizer)
    if source["model_type"] == "dmllm":
        settings = {"max_new_tokens": 128, "steps": 128, "suppress_tokens": list(layouts.BASE_SUPPRESSED)}
        return Recipe(config, tokenizer, (), {"chat_template": layouts.BASE_CHAT_TEMPLATE}, {**settings, **ids})
    settings = {"max_new_tokens": 32, "steps": 32, "shared_schedule": True, "remasking": True}
    return Recipe(config, tokenizer, (), dict(layouts.RELEASED_PROCESSOR), {**settings, **ids})


def llada_recipe(folder: Path, rows: int, tower: Path | None) -> Recipe:
    """LLaDA alone, or with a vision tower and a fresh projector: the composite that stage 1 trains."""
    source = read_json(folder / "config.json")
    original = "d_model" in source
    text = (layouts.llada_text_config if original else layouts.llama_text_config)(source)
    tokenizer = load_tokenizer(folder)
    add_tokens(tokenizer, VISION_TOKENS)
    fields: dict[str, Any] = {**layouts.BASE_FIELDS, "text_config": text, "text_only": tower is None}
    settings: dict[str, Any] = {"max_new_tokens": 128, "steps": 128, "block_length": 32, **token_ids(tokenizer)}
    settings["suppress_tokens"] = [tokenizer.convert_tokens_to_ids("<|mdm_mask|>")]
    if tower is None:
        config = finish_config(fields, tokenizer, rows, text["vocab_size"])
        return Recipe(config, tokenizer, (), {"chat_template": layouts.LLADA_CHAT_TEMPLATE}, settings)
    fields["vision_config"] = layouts.siglip_vision_config(read_json(tower / "config.json"), f"{tower}/config.json")
    config = finish_config(fields, tokenizer, rows, text["vocab_size"])
    return Recipe(config, tokenizer, ("projector.",), {}, settings)


def region_recipe(folder: Path, kind: str, rows: int, conditioning: str, layout: str) -> Recipe:
    """A region model on a base model: the parts for regions are fresh, everything else is the base's."""
    if kind == "released-base":
        fields = layouts.released_config(read_json(folder / "config.json"))
    else:
        base = PerceptionDLMConfig.from_pretrained(folder)
        if base.region_conditioning != "none" or base.text_only:
            raise ValueError(f"{folder} is no base model with a vision tower: regions cannot be added to it")
        fields = {
            name: getattr(base, name) for name in ("vision_feature_layer", "pixel_unshuffle", "projector_hidden_act")
        }
        fields |= {"vision_config": base.vision_config.to_dict(), "text_config": base.text_config.to_dict()}
    fields |= {"attention_layout": layout, "region_conditioning": conditioning, "supervise_markers": False}
    tokenizer = load_tokenizer(folder)
    add_tokens(tokenizer, (*VISION_TOKENS, *REGION_TOKENS))
    config = finish_config(fields, tokenizer, rows, fields["text_config"]["vocab_size"])
    settings = {"max_new_tokens": 32, "steps": 32, "suppress_tokens": [config.mask_token_id]}
    return Recipe(config, tokenizer, ("region_replay.", "region_prompts."), {}, {**settings, **token_ids(tokenizer)})


def add_tokens(tokenizer: PreTrainedTokenizerFast, tokens: tuple[str, ...]) -> None:
    """Add the special tokens that a tokenizer lacks, in order: a LLaDA tokenizer then has the released model's ids."""
    vocabulary = tokenizer.get_vocab()
    missing = [token for token in tokens if token not in vocabulary]
    tokenizer.add_tokens(missing, special_tokens=True)


def token_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    """Special ids that a generation config records for other tools."""
    return {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
