"""Mask-generation models of transformers with tiny seeded weights, saved to a folder."""

import json
from pathlib import Path

import torch


def saved(model, folder, settings) -> str:
    """A model with seeded weights, large enough that masks depend on prompts, and its picture settings, in a folder."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim < 2:
                noise = 0.1 * noise + float("norm" in name and name.endswith("weight"))
            elif "embed" not in name:
                noise = noise / weight[0].numel() ** 0.5
            weight.copy_(noise)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return str(folder)


def saved_sam3(folder: Path, tokenizer) -> str:
    """The detector of SAM 3, which takes texts; its queries find what they happen to find."""
    from transformers.models.sam3.configuration_sam3 import Sam3Config
    from transformers.models.sam3.modeling_sam3 import Sam3Model

    side, part = 56, {"hidden_size": 32, "num_attention_heads": 2, "num_layers": 1, "intermediate_size": 32}
    backbone = {
        "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "image_size": side, "patch_size": 7, "window_size": 4, "global_attn_indexes": [1], "pretrain_image_size": 28,
        "model_type": "sam3_vit_model",
    }  # fmt: skip
    vision = {
        "backbone_config": backbone, "fpn_hidden_size": 32, "backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]],
    }  # fmt: skip
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 32, "projection_dim": 32,
        "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 32,
        "eos_token_id": tokenizer.eos_token_id or 0,
    }  # fmt: skip
    config = Sam3Config(
        vision_config=vision, text_config=text, geometry_encoder_config=part, detr_encoder_config=part,
        detr_decoder_config={**part, "num_queries": 6},
        mask_decoder_config={"hidden_size": 32, "num_attention_heads": 2},
    )  # fmt: skip
    tokenizer.save_pretrained(folder)
    grey = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"height": side, "width": side}}
    return saved(Sam3Model(config), folder, grey)
