"""Fixtures shared by all tests: a small tokenizer, tiny seeded models with their processors, and a drawn scene.

Everything is random but seeded, in fp32 and in eval mode, so results can be compared to rounding.
"""

import pytest
import torch

from perceptiondlm.checkpoints.tokenizer import build_tokenizer, scene_texts
from perceptiondlm.drawn.scenes import draw_scene
from perceptiondlm.modeling_perceptiondlm import PerceptionDLMForConditionalGeneration
from perceptiondlm.processing_perceptiondlm import PerceptionDLMProcessor
from perceptiondlm.training.start import build_config


TINY_VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 64,
    "patch_size": 8,
    "vision_use_head": False,
}
TINY_TEXT = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 4096,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
TINY_CONV = {
    "model_type": "efficientnet_lite",
    "image_size": 64,
    "patch_size": 8,
    "stem_channels": 8,
    "stages": [[1, 3, 1, 1, 8], [1, 3, 2, 2, 8], [1, 5, 2, 2, 16]],
    "feature_stages": [0, 1, 2],
}
# Sharp attention makes answers depend on slot and region, large scores make tokens differ in probability.
GAINS = {"q_proj": 2.0, "k_proj": 2.0, "projector": 3.0, "region_replay": 3.0, "lm_head": 3.0}


def randomize(model: torch.nn.Module, seed: int = 0) -> None:
    """Seeded weights of a size at which every part of a tiny model matters to its logits.

    The usual initialisation (standard deviation 0.02) leaves a two-layer model almost constant.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim < 2:
                is_norm = "norm" in name and name.endswith("weight")
                weight.copy_(float(is_norm) + 0.1 * noise)
            elif "embed" in name or "prompts" in name:
                weight.copy_(noise)
            else:
                gain = next((gain for part, gain in GAINS.items() if part in name), 1.0)
                weight.copy_(gain * noise / weight[0].numel() ** 0.5)


@pytest.fixture(scope="session")
def tokenizer():
    """A tokenizer of the embedded default's kind, learned from 60 drawn scenes (about 600 entries)."""
    return build_tokenizer(scene_texts(seed=0, num_images=60), vocab_size=768, max_length=4096)


@pytest.fixture(scope="session")
def tiny_model(tokenizer):
    """Factory `tiny_model(seed=0, attn_implementation=None, **config_overrides)` of a seeded random model.

    Tiles of 64 px with patches of 8 px, hence 4 x 4 image tokens a tile; two layers on each side. Overrides are fields
    of `PerceptionDLMConfig`; dicts given for `vision_config` and `text_config` are merged into the tiny defaults.
    """

    def build(seed: int = 0, attn_implementation: str | None = None, **overrides):
        vision = {**TINY_VISION, **overrides.pop("vision_config", {})}
        text = {**TINY_TEXT, **overrides.pop("text_config", {})}
        config = build_config({**overrides, "vision_config": vision, "text_config": text}, tokenizer)
        choice = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
        model = PerceptionDLMForConditionalGeneration._from_config(config, **choice)
        randomize(model, seed)
        return model.float().eval()

    return build


@pytest.fixture(scope="session")
def tiny_conv():
    """Settings of a tiny model with a convolutional tower, as `build_config` takes them, and further ones."""

    def settings(**further):
        return {"vision_config": TINY_CONV, "text_config": TINY_TEXT, "vision_feature_layer": -1, **further}

    return settings


@pytest.fixture(scope="session")
def tiny_processor(tokenizer):
    """Factory `tiny_processor(model_or_config, **overrides)` of the processor that fits a model."""

    def build(model_or_config, **overrides):
        config = getattr(model_or_config, "config", model_or_config)
        return PerceptionDLMProcessor.from_config(config, tokenizer, **overrides)

    return build


@pytest.fixture(scope="session")
def scene():
    """A drawn scene of three objects whose picture takes several tiles (a 1 x 2 or 2 x 1 grid and the thumbnail).

    `scene.image` is a PIL image, `[item.mask for item in scene.objects]` are its (H, W) bool masks and
    `[item.caption ...]` their captions.
    """
    scenes = (draw_scene(0, index) for index in range(100))
    return next(s for s in scenes if len(s.objects) == 3 and max(s.image.size) > 1.5 * min(s.image.size))


@pytest.fixture(scope="module")
def model(tiny_model):
    """The tiny model with default settings, one per test file."""
    return tiny_model()


@pytest.fixture(scope="module")
def processor(model, tiny_processor):
    """The processor of `model`."""
    return tiny_processor(model)
