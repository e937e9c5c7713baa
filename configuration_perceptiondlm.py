"""Configuration of PerceptionDLM: every id, size and switch of the model, validated where it is read.

The vision tower is one of vision_perceptiondlm (a stock `SiglipVisionConfig` by default), the language model a stock
`LlamaConfig`; the composite adds what joins them (projector, pixel-unshuffle), how a region enters the network, and
which attention layout the tokens follow.

This file is also the seam to released_perceptiondlm, which holds what exists for the published weights alone: each of
those rules has a switch here, and the rest of the model asks the switch.
"""

from typing import Any

from transformers import LlamaConfig, PreTrainedConfig, SiglipVisionConfig

from .naming_perceptiondlm import NamerShape
from .region_features_perceptiondlm import AlignedRois
from .released_perceptiondlm import ReleasedLayout, ReleasedRois, nearest_coverage, released_schedule
from .sequence_perceptiondlm import FullLayout, IsolatedLayout
from .vision_perceptiondlm import vision_config_class


LAYOUTS = {layout.name: layout for layout in (IsolatedLayout(), ReleasedLayout(), FullLayout())}
ATTENTION_LAYOUTS = tuple(LAYOUTS)
REGION_CONDITIONINGS = ("replay", "vision", "none")
ROI_VARIANTS = {"aligned": AlignedRois(), "released": ReleasedRois()}
LOSS_WEIGHTINGS = ("elbo", "released", "masked")  # the first two are one rule: the paper's and the published code's
shared_schedule = released_schedule  # how generation's `shared_schedule` spends its steps
nearest_sampling = nearest_coverage  # what the processor's `mask_sampling="nearest"` asks of a mask

# What `roi_variant` was called in configs of before: values of the variants "aligned" and "released".
FORMER_ROI_FIELDS: dict[str, tuple[Any, Any]] = {
    "roi_first_tile": (0, 1),
    "roi_spatial_scale": (None, 1 / 32),
    "roi_training_spatial_scale": (None, 1 / 28),
    "roi_inclusive_boxes": (False, True),
}

# Special-token ids of the LLaDA-8B-Instruct tokenizer as the released PerceptionDLM uses them.
LLADA_ROI_TOKEN_IDS = tuple(range(126084, 126084 + 16))  # <|reserved_token_0|> ...
LLADA_CAPTION_TOKEN_IDS = tuple(range(126352, 126352 + 16))  # <|Mask_Cap_0|> ...

# Named presets: keyword arguments of `PerceptionDLMConfig`. "8b" is siglip2-so400m-patch16-512 + LLaDA-8B-Instruct.
PRESETS: dict[str, dict[str, Any]] = {
    "8b": {
        "vision_config": {
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "image_size": 512,
            "patch_size": 16,
            "vision_use_head": False,
        },
        "text_config": {
            "vocab_size": 126464,
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "max_position_embeddings": 16384,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
            "bos_token_id": 126080,
            "eos_token_id": 126081,
            "pad_token_id": 126081,
        },
    },
}


class PerceptionDLMConfig(PreTrainedConfig):
    """Configuration of [`PerceptionDLMForConditionalGeneration`].

    Args:
        vision_config (`dict`, `SiglipVisionConfig` or `EfficientNetLiteConfig`): the tile encoder, chosen by its
            `model_type` (SigLIP without one); `image_size` is the tile side in pixels.
        text_config (`dict` or `LlamaConfig`): the language model, run without a causal mask.
        vision_feature_layer (`int`, defaults to -2): index into the encoder's hidden states (negative, -1 is the last
            layer's output); no post-layernorm is applied.
        pixel_unshuffle (`int`, defaults to 2): side of the square of patches that becomes one image token.
        projector_hidden_act (`str`): activation between the projector's two linear layers.
        attention_layout (`str`): `"isolated"` (a region sees the sequence it would see if it were the only one),
            `"released"` (the rules baked into the published weights) or `"full"` (no structure, the paper's ablation).
        region_conditioning (`str`): where a region enters the network. `"vision"`: a learned prompt is added to its
            patches before the vision encoder (paper, section 3.2). `"replay"`: the RoI tokens carry the mask's coverage
            and the encoder knows no region. `"none"`: a base model without region parts.
        use_region_prompts (`bool`): under `"vision"`, whether prompts are added at all (Table 7 drops them).
        use_roi_replay (`bool`): whether RoI tokens are part of the sequence (Table 7 drops them).
        num_region_prompts (`int`): prompt ids, hence the most regions of one pass under `"vision"`.
        roi_size (`int`): a region is replayed as `roi_size ** 2` tokens in row-major order.
        roi_sampling_ratio (`int`): bilinear samples per bin side, averaged.
        coverage_subsamples (`int`): under `"replay"`, cells per bin side in which mask coverage is measured.
        region_geometry (`bool`): under `"replay"`, whether RoI tokens also carry the box (position, extent), which
            RoI-Align normalises away.
        region_crop_size (`int`, defaults to 0): under `"replay"`, side in pixels of a region's own crop, whose features
            are added to its RoI tokens (focal replay); 0: no crops.
        region_appearance (`bool`, defaults to `False`): under `"replay"`, whether RoI tokens also carry mean and spread
            of the colours under the mask.
        region_pooling (`bool`, defaults to `False`): under `"replay"`, whether RoI tokens also carry the mean of the
            region's features under its mask, which stands in for the features of bins that the mask does not touch.
        region_gain (`float`, defaults to 1.0): under `"replay"`, factor on what mask, box and colours add to the image
            features of RoI tokens; features of a tower of many channels drown them otherwise.
        namer (`dict`, *optional*): under `"replay"`, sizes of what names regions beside the language model, see
            `NamerShape`; none by default.
        image_in_prompt (`bool`, defaults to `True`): whether the language model reads the image's tokens. Without them,
            under `"replay"` only, an image reaches it through regions alone, one placeholder stands for it in the
            prompt, and more tiles cost no tokens.
        text_only (`bool`): a language model without vision tower and projector, as converted from LLaDA alone; needs
            `region_conditioning="none"`.
        roi_variant (`str`, defaults to `"aligned"`): where RoI features are sampled: `"aligned"`, at a region's true
            box, or `"released"`, as the published weights know it (see `ReleasedRois`).
        supervise_markers (`bool`): whether training noises and supervises marker and terminator of a caption block too,
            and ends a block where its labels end (released), instead of supervising a fixed number of slots.
        image_token_id, mask_token_id, newline_token_id, end_of_turn_token_id, end_of_text_token_id (`int`): ids.
        roi_token_ids, caption_token_ids (`list[int]`): placeholder of a RoI token and marker that opens a caption, by
            prompt id; `"replay"` knows no ids and uses the first of each.
        image_mean, image_std (`list[float]`): normalisation of tiles in uint8, after they are scaled to [0, 1].
        initializer_range (`float`): standard deviation for new linear and embedding weights.

    Raises:
        ValueError: for a switch outside its values, or sizes that do not fit together.
    """

    model_type = "perceptiondlm"
    sub_configs = {"vision_config": SiglipVisionConfig, "text_config": LlamaConfig}  # noqa: RUF012

    vision_config: Any = None
    text_config: Any = None
    vision_feature_layer: int = -2
    pixel_unshuffle: int = 2
    projector_hidden_act: str = "gelu"
    attention_layout: str = "isolated"
    region_conditioning: str = "replay"
    use_region_prompts: bool = True
    use_roi_replay: bool = True
    num_region_prompts: int = 6
    roi_size: int = 4
    roi_sampling_ratio: int = 2
    coverage_subsamples: int = 2
    region_geometry: bool = True
    region_crop_size: int = 0
    region_appearance: bool = False
    region_pooling: bool = False
    region_gain: float = 1.0
    namer: dict[str, int] | None = None
    image_in_prompt: bool = True
    text_only: bool = False
    roi_variant: str = "aligned"
    supervise_markers: bool = False
    image_token_id: int = 126349
    mask_token_id: int = 126336
    newline_token_id: int = 198
    end_of_turn_token_id: int = 126348
    end_of_text_token_id: int = 126081
    roi_token_ids: list[int] | tuple[int, ...] = LLADA_ROI_TOKEN_IDS
    caption_token_ids: list[int] | tuple[int, ...] = LLADA_CAPTION_TOKEN_IDS
    image_mean: list[float] | tuple[float, ...] = (0.5, 0.5, 0.5)
    image_std: list[float] | tuple[float, ...] = (0.5, 0.5, 0.5)
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        for name, config_class in self.sub_configs.items():
            value = getattr(self, name)
            if value is None or isinstance(value, dict):
                defaults = PRESETS["8b"][name] if value is None else {}
                given = {**defaults, **(value or {})}
                if name == "vision_config":
                    config_class = vision_config_class(given.get("model_type"))
                fields = {k: v for k, v in given.items() if k != "model_type"}
                setattr(self, name, config_class(**fields))
        former = {name: kwargs.pop(name) for name in FORMER_ROI_FIELDS if name in kwargs}
        if former:
            self.roi_variant = former_roi_variant(former)
        super().__post_init__(**kwargs)
        self.validate_switches()

    def validate_switches(self) -> None:
        """Check the fields against each other; raises `ValueError` naming the field and what is accepted."""
        for name, accepted in (
            ("attention_layout", ATTENTION_LAYOUTS),
            ("region_conditioning", REGION_CONDITIONINGS),
            ("roi_variant", tuple(ROI_VARIANTS)),
        ):
            if getattr(self, name) not in accepted:
                raise ValueError(f"{name} must be one of {accepted}, got {getattr(self, name)!r}")
        patches = self.patches_per_side
        if self.vision_config.image_size % self.vision_config.patch_size or patches % self.pixel_unshuffle:
            raise ValueError(
                f"a tile of {self.vision_config.image_size} px must hold a whole number of "
                f"{self.vision_config.patch_size} px patches, and their count per side be divisible by "
                f"pixel_unshuffle={self.pixel_unshuffle}"
            )
        layers = self.vision_config.num_hidden_layers
        if not -layers - 1 <= self.vision_feature_layer <= -1:
            raise ValueError(f"vision_feature_layer must be in [{-layers - 1}, -1], got {self.vision_feature_layer}")
        step = self.vision_config.patch_size * self.pixel_unshuffle
        if self.region_crop_size < 0 or self.region_crop_size % step:
            raise ValueError(f"region_crop_size must be 0 or a multiple of {step} px, got {self.region_crop_size}")
        for name in ("region_crop_size", "region_appearance", "region_pooling", "namer"):
            if getattr(self, name) and self.region_conditioning != "replay":
                raise ValueError(f"{name} needs region_conditioning='replay', got {self.region_conditioning!r}")
        if self.namer is not None:
            NamerShape.of(self.namer)
        if self.region_gain <= 0:
            raise ValueError(f"region_gain must be above 0, got {self.region_gain}")
        if not self.image_in_prompt and self.region_conditioning != "replay":
            raise ValueError(
                f"image_in_prompt=False needs region_conditioning='replay', got {self.region_conditioning!r}: regions "
                "alone show the image then"
            )
        if self.region_conditioning == "replay" and not self.use_roi_replay:
            raise ValueError("region_conditioning='replay' needs use_roi_replay=True: nothing else carries the region")
        if self.region_conditioning == "vision" and not (self.use_roi_replay or self.use_region_prompts):
            raise ValueError("use_roi_replay and use_region_prompts are both False: no region would reach the model")
        if self.text_only and self.region_conditioning != "none":
            raise ValueError(f"text_only=True needs region_conditioning='none', got {self.region_conditioning!r}")
        needed = {"vision": self.num_region_prompts, "replay": 1, "none": 0}[self.region_conditioning]
        for name in ("roi_token_ids", "caption_token_ids"):
            ids = getattr(self, name)
            if len(ids) < needed:
                raise ValueError(f"{name} holds {len(ids)} ids, {needed} are needed")
        for name in ("roi_size", "roi_sampling_ratio", "coverage_subsamples", "num_region_prompts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any):
        """As in transformers, but another model's config is a `ValueError`, not one of 8 billion parameters."""
        found = config_dict.get("model_type", cls.model_type)
        if found != cls.model_type:
            raise ValueError(
                f"this is the config of a model of type {found!r}, {cls.__name__} takes {cls.model_type!r}"
            )
        return super().from_dict(config_dict, **kwargs)

    @property
    def focuses_regions(self) -> bool:
        """Whether regions add to their RoI features what `FocalReplay` makes of them."""
        return bool(self.region_crop_size or self.region_appearance or self.region_pooling)

    @property
    def namer_shape(self) -> NamerShape | None:
        """Sizes of the namer, if there is one."""
        return None if self.namer is None else NamerShape.of(self.namer)

    @property
    def tile_width(self) -> int:
        """Numbers that an encoded image holds for each of its tokens: D, and the namer's evidence behind them."""
        evidence = self.namer_shape.kinds * self.pixel_unshuffle**2 if self.namer_shape else 0
        return self.text_config.hidden_size + evidence

    @property
    def layout(self) -> FullLayout:
        """The attention layout's rules."""
        return LAYOUTS[self.attention_layout]

    @property
    def rois(self) -> AlignedRois:
        """Where RoI features are sampled."""
        return ROI_VARIANTS[self.roi_variant]

    @property
    def patches_per_side(self) -> int:
        """Patches along one side of a tile."""
        return self.vision_config.image_size // self.vision_config.patch_size

    @property
    def tokens_per_side(self) -> int:
        """Image tokens along one side of a tile, after pixel-unshuffle."""
        return self.patches_per_side // self.pixel_unshuffle

    def image_tokens(self, tiles: int) -> int:
        """Tokens of the prompt that stand for an image of so many tiles."""
        return tiles * self.tokens_per_side**2 if self.image_in_prompt else 1

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> "PerceptionDLMConfig":
        """Build a named configuration, e.g. `PerceptionDLMConfig.from_preset("8b")`.

        Args:
            name: one of `PRESETS`.
            overrides: fields that replace the preset's.
        """
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}, known are {sorted(PRESETS)}")
        return cls(**{**PRESETS[name], **overrides})


def former_roi_variant(fields: dict[str, Any]) -> str:
    """The variant that a config of before described in `FORMER_ROI_FIELDS`; other mixtures were never published."""
    for place, variant in enumerate(("aligned", "released")):
        if all(fields.get(name, values[0]) == values[place] for name, values in FORMER_ROI_FIELDS.items()):
            return variant
    raise ValueError(f"{fields} are neither roi_variant='aligned' nor 'released'; accepted: one of the two")


def num_tiles(grid: tuple[int, int]) -> int:
    """Tiles of an image cut into (columns, rows): the grid's cells, and a thumbnail when there is more than one."""
    cells = grid[0] * grid[1]
    return cells + 1 if cells > 1 else cells


__all__ = ["ATTENTION_LAYOUTS", "PRESETS", "REGION_CONDITIONINGS", "PerceptionDLMConfig", "num_tiles"]
