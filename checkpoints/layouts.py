"""How other checkpoints name their tensors and write their configs, translated to and from PerceptionDLM's.

Facts about the released PerceptionDLM, PerceptionDLM-Base, LLaDA (original and Llama-style naming) and SigLIP. A rule
that drops a tensor says why.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from perceptiondlm.checkpoints.chat_templates import chat_template


# Decoding of the released base model never emits these: end of text, start of text, headers, mask.
BASE_SUPPRESSED = (126081, 126080, 126346, 126347, 126336)

# The base model's chat: a newline after the image, none after a turn.
BASE_CHAT_TEMPLATE = chat_template(after_image="\n", after_turn="")
# LLaDA-8B-Instruct's own chat.
LLADA_CHAT_TEMPLATE = chat_template(start="<|startoftext|>", after_header="\n\n", after_turn="")


@dataclass(frozen=True)
class Rule:
    """Tensors whose name starts with `prefix` (a regular expression) are renamed, or dropped for a reason."""

    prefix: str
    replacement: str | None
    reason: str = ""


def rename(name: str, rules: tuple[Rule, ...]) -> Rule | str | None:
    """The new name by the first rule that matches, the rule itself if it drops the tensor, None without a match."""
    for rule in rules:
        if re.match(rule.prefix, name):
            return rule if rule.replacement is None else re.sub(rf"^{rule.prefix}", rule.replacement, name)
    return None


SIGLIP_RULES = (
    Rule(r"text_model\.", None, "SigLIP's text tower is no part of the model"),
    Rule(r"logit_(scale|bias)$", None, "belongs to SigLIP's contrastive loss"),
    Rule(r"vision_model\.head\.", None, "attention pooling head: features are taken before it"),
    Rule(r"vision_model\.embeddings\.position_ids$", None, "a constant, counted anew"),
    Rule(r"vision_model\.", "vision_tower."),
)
LLAMA_RULES = (
    Rule(r"model\.layers\.\d+\.self_attn\.rotary_emb\.", None, "a constant, computed anew"),
    Rule(r"model\.", "language_model."),
    Rule(r"lm_head\.", "lm_head."),
)
LLADA_BLOCK = r"model\.transformer\.blocks\.(\d+)\."
LLADA_RULES = (
    Rule(r"model\.transformer\.wte\.", "language_model.embed_tokens."),
    Rule(r"model\.transformer\.ln_f\.", "language_model.norm."),
    Rule(r"model\.transformer\.ff_out\.", "lm_head."),
    Rule(rf"{LLADA_BLOCK}attn_norm\.", r"language_model.layers.\1.input_layernorm."),
    Rule(rf"{LLADA_BLOCK}ff_norm\.", r"language_model.layers.\1.post_attention_layernorm."),
    Rule(rf"{LLADA_BLOCK}(q|k|v)_proj\.", r"language_model.layers.\1.self_attn.\2_proj."),
    Rule(rf"{LLADA_BLOCK}attn_out\.", r"language_model.layers.\1.self_attn.o_proj."),
    Rule(rf"{LLADA_BLOCK}ff_proj\.", r"language_model.layers.\1.mlp.gate_proj."),
    Rule(rf"{LLADA_BLOCK}up_proj\.", r"language_model.layers.\1.mlp.up_proj."),
    Rule(rf"{LLADA_BLOCK}ff_out\.", r"language_model.layers.\1.mlp.down_proj."),
)
RELEASED_RULES = (
    *(Rule(r"vision_model\." + rule.prefix, rule.replacement, rule.reason) for rule in SIGLIP_RULES),
    Rule(r"vision_abstractor\.projection\.0\.", "projector.linear_1."),
    Rule(r"vision_abstractor\.projection\.2\.", "projector.linear_2."),
    *(Rule(r"language_model\." + rule.prefix, rule.replacement, rule.reason) for rule in LLAMA_RULES),
    Rule(r"mask_id_embedding\.", "region_prompts."),
)
OWN_RULES = (Rule("", ""),)
TO_RELEASED_RULES = (
    Rule(r"vision_tower\.", "vision_model.vision_model."),
    Rule(r"projector\.linear_1\.", "vision_abstractor.projection.0."),
    Rule(r"projector\.linear_2\.", "vision_abstractor.projection.2."),
    Rule(r"language_model\.", "language_model.model."),
    Rule(r"lm_head\.", "language_model.lm_head."),
    Rule(r"region_prompts\.", "mask_id_embedding."),
)

SIGLIP_FIELDS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_channels", "patch_size",
    "image_size", "attention_dropout", "layer_norm_eps", "hidden_act",
)  # fmt: skip
LLAMA_FIELDS = (
    "vocab_size", "max_position_embeddings", "hidden_size", "intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "hidden_act", "initializer_range", "rms_norm_eps",
)  # fmt: skip
LLADA_FIELDS = {
    "vocab_size": "embedding_size",
    "max_position_embeddings": "max_sequence_length",
    "hidden_size": "d_model",
    "intermediate_size": "mlp_hidden_size",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "hidden_act": "activation_type",
    "initializer_range": "init_std",
    "rms_norm_eps": "rms_norm_eps",
}
# What the released region model computes differently from this model's defaults, as config fields.
RELEASED_QUIRKS = {
    "attention_layout": "released",
    "region_conditioning": "vision",
    "roi_variant": "released",
    "supervise_markers": True,
}
RELEASED_PROCESSOR = {"mask_sampling": "nearest", "mask_threshold": 1, "sort_regions": True}
# A model without regions: everything sees everything, an answer ends where its labels end.
BASE_FIELDS = {"attention_layout": "full", "region_conditioning": "none", "supervise_markers": True}


def require(config: Mapping[str, Any], expected: Mapping[str, tuple], where: str) -> None:
    """Refuse a config whose computation this model does not have; an absent field passes."""
    for name, accepted in expected.items():
        if name in config and config[name] not in accepted:
            raise ValueError(f"{where}.{name} is {config[name]!r}; accepted: {' or '.join(map(repr, accepted))}")


def pick(config: Mapping[str, Any], fields: Mapping[str, str], where: str) -> dict[str, Any]:
    """The fields of a config under our names; names the first one missing."""
    missing = [name for name in fields.values() if config.get(name) is None]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}")
    return {ours: config[theirs] for ours, theirs in fields.items()}


def llama_text_config(config: Mapping[str, Any], where: str = "config.json") -> dict[str, Any]:
    """`text_config` of a LLaDA config in Llama's naming."""
    accepted = {
        "attention_bias": (False,),
        "rope_scaling": (None,),
        "tie_word_embeddings": (False,),
        "hidden_act": ("silu",),
    }
    require(config, accepted, where)
    fields = pick(config, {name: name for name in LLAMA_FIELDS}, where)
    return {**fields, **rotary(config)}


def llada_text_config(config: Mapping[str, Any], where: str = "config.json") -> dict[str, Any]:
    """`text_config` of a LLaDA config in its original naming."""
    accepted = {
        "weight_tying": (False,), "include_bias": (False,), "include_qkv_bias": (False, None), "alibi": (False,),
        "attention_layer_norm": (False,), "input_emb_norm": (False,), "scale_logits": (False,), "rope": (True,),
        "layer_norm_type": ("rms",), "activation_type": ("silu",), "block_type": ("llama",),
    }  # fmt: skip
    require(config, accepted, where)
    defaults = {"n_kv_heads": config.get("n_heads"), "embedding_size": config.get("vocab_size"), "init_std": 0.02}
    given = {name: value for name, value in config.items() if value is not None}
    return {**pick({**defaults, **given}, LLADA_FIELDS, where), **rotary(config)}


def rotary(config: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary embedding of a LLaDA config, in either naming."""
    return {"rope_parameters": {"rope_type": "default", "rope_theta": config.get("rope_theta", 500000.0)}}


def siglip_vision_config(config: Mapping[str, Any], where: str = "config.json") -> dict[str, Any]:
    """`vision_config` of a SigLIP config, composite or vision only; the pooling head is left out."""
    inner = config.get("vision_config", config)
    defaults = {"num_channels": 3, "attention_dropout": 0.0, "layer_norm_eps": 1e-6, "hidden_act": "gelu_pytorch_tanh"}
    fields = pick({**defaults, **inner}, {name: name for name in SIGLIP_FIELDS}, where)
    return {**fields, "vision_use_head": False}


def released_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `PerceptionDLMConfig` for a released config (`pdmllm`: regions, `dmllm`: base)."""
    require(config, {"replacement_noise_mode": (False,)}, "config.json")
    require(
        config.get("vision_abstractor_config", {}), {"projection_type": ("mlp2x_gelu",)}, "vision_abstractor_config"
    )
    fields: dict[str, Any] = {
        "vision_config": siglip_vision_config(config["vision_model_config"], "vision_model_config"),
        "text_config": llama_text_config(config["language_model_config"], "language_model_config"),
        "vision_feature_layer": config.get("vision_select_layer", -2),
        "pixel_unshuffle": round(1 / config.get("downsample_ratio", 0.5)),
        "projector_hidden_act": "gelu",
    }
    vision = fields["vision_config"]
    for name in ("image_size", "patch_size"):
        require(config, {name: (vision[name],)}, "config.json")
    if config["model_type"] == "dmllm":
        return {**fields, **BASE_FIELDS}
    roi_size = config.get("roi_output_size")
    if type(roi_size) is not int:
        raise ValueError(f"config.json.roi_output_size is {roi_size!r}; accepted: an integer")
    return {**fields, **RELEASED_QUIRKS, "num_region_prompts": config["prompt_numbers"], "roi_size": roi_size}


def to_released_config(config: Any) -> dict[str, Any]:
    """A released config written from a `PerceptionDLMConfig`, for a model that was not converted from one."""
    vision, text = config.vision_config, config.text_config
    theta = text.rope_parameters["rope_theta"]
    language = {name: getattr(text, name) for name in LLAMA_FIELDS}
    language |= {"model_type": "llada", "_name_or_path": "LLaDA-8B-Instruct", "rope_theta": theta, "rope_scaling": None}
    language |= {"attention_bias": False, "tie_word_embeddings": False, "use_cache": False, "eos_token_id": 126081}
    content = {
        "model_type": "dmllm",
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "downsample_ratio": 1 / config.pixel_unshuffle,
        "num_image_token": config.tokens_per_side**2,
        "vision_select_layer": config.vision_feature_layer,
        "replacement_noise_mode": False,
        "image_token_id": config.image_token_id,
        "language_model_config": language,
        "vision_model_config": {
            "model_type": "siglip",
            "_name_or_path": "siglip2-so400m-patch16-512",
            "vision_config": {"model_type": "siglip_vision_model", **{f: getattr(vision, f) for f in SIGLIP_FIELDS}},
        },
        "vision_abstractor_config": {"projection_type": "mlp2x_gelu"},
    }
    if config.region_conditioning == "vision":
        content |= {
            "model_type": "pdmllm",
            "prompt_numbers": config.num_region_prompts,
            "roi_output_size": config.roi_size,
            "mask_patch_embedding_in_channels": 3,
            "mask_patch_embedding_out_channels": vision.hidden_size,
            "kernel_size": [vision.patch_size] * 2,
        }
    return content
