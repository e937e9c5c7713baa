"""Sizes, presets and precision of models, and settings that do not fit one another."""

import pytest
import torch
from model_batches import (
    CONDITIONINGS,
    region_batch,
)
from torch.nn import functional as F

from perceptiondlm.configuration_perceptiondlm import PerceptionDLMConfig
from perceptiondlm.modeling_perceptiondlm import (
    PerceptionDLMForConditionalGeneration,
)


def parameters_8b() -> dict[str, int]:
    """The 8B preset's parameters by part, from its sizes."""
    c, f, d, h, vocabulary = 1152, 4304, 4096, 12288, 126464
    vision_layer = 4 * (c * c + c) + (c * f + f) + (f * c + c) + 2 * (2 * c)
    embeddings = (3 * 16 * 16 * c + c) + (512 // 16) ** 2 * c
    text_layer = 4 * d * d + 3 * d * h + 2 * d
    return {
        "vision_tower": embeddings + 27 * vision_layer + 2 * c,
        "projector": (4 * c * d + d) + (d * d + d),
        "region_replay": (4 * d + d) + 16 * d + (6 * d + d),
        "language_model": vocabulary * d + 32 * text_layer + d,
        "lm_head": vocabulary * d,
    }


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_parameters_of_the_8b_preset(conditioning):
    config = PerceptionDLMConfig.from_preset("8b", region_conditioning=conditioning)
    with torch.device("meta"):
        model = PerceptionDLMForConditionalGeneration(config)
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    expected = parameters_8b()
    if conditioning == "vision":
        expected |= {"region_replay": 0, "region_prompts": 6 * 1152}
    assert counts == expected
    assert model.num_parameters() == {"replay": 8_464_890_096, "vision": 8_464_782_320}[conditioning]
    assert model.dtype == torch.float32


def test_a_model_can_be_built_in_half_precision():
    with torch.device("meta"):
        model = PerceptionDLMForConditionalGeneration._from_config(
            PerceptionDLMConfig.from_preset("8b"), dtype=torch.bfloat16
        )
    assert model.dtype == torch.bfloat16
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_half_precision_runs_and_stays_close(tiny_model, tiny_processor, scene, conditioning):
    model = tiny_model(region_conditioning=conditioning)
    batch = region_batch(tiny_processor(model), scene)
    ids = torch.full((3, 4), model.config.mask_token_id)
    with torch.no_grad():
        exact = model(**batch, answer_ids=ids).logits
        rough = model.to(torch.bfloat16)(**batch, answer_ids=ids).logits
    assert rough.dtype == torch.bfloat16
    assert F.cosine_similarity(exact.flatten(), rough.float().flatten(), dim=0) > 0.98


def test_unknown_preset_is_refused():
    with pytest.raises(ValueError, match=r"'9b'.*8b"):
        PerceptionDLMConfig.from_preset("9b")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"attention_layout": "causal"}, "attention_layout.*causal"),
        ({"region_conditioning": "prompt"}, "region_conditioning.*prompt"),
        ({"vision_config": {"patch_size": 10}}, "64 px.*10 px"),
        ({"pixel_unshuffle": 3}, "pixel_unshuffle=3"),
        ({"vision_feature_layer": -4}, r"vision_feature_layer.*\[-3, -1\].*-4"),
        ({"vision_feature_layer": 0}, r"vision_feature_layer.*got 0"),
        ({"use_roi_replay": False}, "use_roi_replay"),
        (
            {"region_conditioning": "vision", "use_roi_replay": False, "use_region_prompts": False},
            "both False",
        ),
        ({"region_conditioning": "vision", "num_region_prompts": 17}, "roi_token_ids holds 16 ids, 17"),
        ({"roi_size": 0}, "roi_size.*0"),
        ({"num_region_prompts": 0}, "num_region_prompts.*0"),
        ({"roi_variant": "shifted"}, "roi_variant.*aligned.*released.*'shifted'"),
        ({"text_only": True}, "text_only=True.*none.*replay"),
    ],
)
def test_settings_that_do_not_fit_are_refused(tiny_model, overrides, message):
    with pytest.raises(ValueError, match=message):
        tiny_model(**overrides)


def test_a_folder_of_another_model_is_refused(tiny_model, tmp_path):
    """Before any weight is made: what its config lacks would be filled in with the sizes of the 8B preset."""
    tiny_model().language_model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"of type 'llama', PerceptionDLMConfig takes 'perceptiondlm'"):
        PerceptionDLMForConditionalGeneration.from_pretrained(tmp_path)
