"""PerceptionDLM: SigLIP tiles, region replay, and a bidirectional Llama that denoises all captions at once.

Reading order: `PerceptionDLMForConditionalGeneration.forward` is the table of contents; the parts stand above it.

Legend for tensor names: B rows of the batch, L prompt tokens, T tiles (all images), P patches per tile side, C vision
width, n image tokens per tile side, D language width, R regions (all rows), S bins per RoI side, K region prompts,
A answers (caption blocks, all rows), G slots per answer, M answers per row (padded), W tokens per answer, V vocabulary.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F
from transformers import LlamaModel, PreTrainedModel, SiglipVisionModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from transformers.utils import ModelOutput

from .attention_perceptiondlm import PAD, ROI, TokenRoles, allowed_attention, attention_bias, prompt_positions
from .configuration_perceptiondlm import PerceptionDLMConfig, num_tiles
from .denoiser_perceptiondlm import EncodedImage
from .generation_perceptiondlm import PerceptionDLMGenerationConfig, PerceptionDLMGenerationMixin
from .layout_perceptiondlm import AnswerLayout, Prompt


if TYPE_CHECKING:  # named here so that save_pretrained copies these files next to every checkpoint
    from .pipeline_perceptiondlm import RegionCaptioningPipeline  # noqa: F401
    from .processing_perceptiondlm import PerceptionDLMProcessor  # noqa: F401


@dataclass
class PerceptionDLMOutput(ModelOutput):
    """Output of [`PerceptionDLMForConditionalGeneration`].

    Args:
        loss (`torch.FloatTensor` of shape `()`, when `labels` are given): equation 2 of the paper.
        logits (`torch.FloatTensor` of shape `(A, G, V)`): scores for every slot of every answer.
        masked (`torch.BoolTensor` of shape `(A, G)`, when `labels` are given): the slots that the noise masked.
        token_losses (`torch.FloatTensor` of shape `(A, G)`, when `labels` are given): their negative log-likelihoods, 0
            elsewhere; no gradient flows through these.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    masked: torch.Tensor | None = None
    token_losses: torch.Tensor | None = None


class PromptedSiglipVisionModel(SiglipVisionModel):
    """SigLIP's vision tower, read at one of its hidden states, with an optional addend per patch (region prompts)."""

    def __init__(self, config):
        super().__init__(config)
        self.post_layernorm.requires_grad_(False)  # features are taken before it

    def forward(self, pixel_values: torch.Tensor, feature_layer: int, patch_addend: torch.Tensor | None = None):
        """(T, 3, H, W) in [-1, 1] to (T, P * P, C): `hidden_states[feature_layer]`; later layers are not run."""
        hidden_TPC = self.embeddings(pixel_values)
        if patch_addend is not None:
            hidden_TPC = hidden_TPC + patch_addend
        for layer in self.encoder.layers[: len(self.encoder.layers) + 1 + feature_layer]:
            hidden_TPC = layer(hidden_TPC, None)
        return hidden_TPC


class BidirectionalLlamaModel(LlamaModel):
    """Llama without the causal mask: who sees whom is decided by the mask passed in."""

    def __init__(self, config):
        super().__init__(config)
        # Llama freezes the padding token's embedding at zero; here that token fills answers and is learned.
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        for layer in self.layers:
            layer.self_attn.is_causal = False

    def forward(self, inputs_embeds, attention_mask, position_ids, past_key_values=None):
        """Embeddings (B, X, D) to normalised hidden states (B, X, D).

        Args:
            attention_mask: (B, 1, X, keys), bool or additive as the implementation expects; None: all see all.
            position_ids: (B, X) int64.
            past_key_values: a `PrefixCache`, or None.
        """
        hidden, _ = self._through(self.layers, inputs_embeds, attention_mask, position_ids, past_key_values)
        return self.norm(hidden)

    def fill(self, inputs_embeds, attention_mask, position_ids, past_key_values) -> None:
        """Add keys and values of tokens to a `PrefixCache`. Nothing reads what the last layer makes of them."""
        *layers, last = self.layers
        hidden, rotary = self._through(layers, inputs_embeds, attention_mask, position_ids, past_key_values)
        attention, hidden = last.self_attn, last.input_layernorm(hidden)
        shape = (*hidden.shape[:2], -1, attention.head_dim)
        key, value = (proj(hidden).view(shape).transpose(1, 2) for proj in (attention.k_proj, attention.v_proj))
        _, key = apply_rotary_pos_emb(key, key, *rotary)
        past_key_values.update(key, value, attention.layer_idx)

    def _through(self, layers, hidden, attention_mask, position_ids, past_key_values):
        """Hidden states (B, X, D) behind some layers, and the rotation of the tokens' positions.

        Layers get the rotation, not the ids: flash attention takes repeated ids for packed sequences.
        """
        rotary = self.rotary_emb(hidden, position_ids=position_ids)
        for layer in layers:
            hidden = layer(
                hidden, attention_mask=attention_mask, past_key_values=past_key_values, position_embeddings=rotary
            )
        return hidden, rotary


class PerceptionDLMProjector(nn.Module):
    """Pixel-unshuffle followed by a two-layer MLP (paper, section 2.1): a square of patches becomes one image token."""

    def __init__(self, config: PerceptionDLMConfig):
        super().__init__()
        self.factor, width = config.pixel_unshuffle, config.text_config.hidden_size
        self.linear_1 = nn.Linear(config.vision_config.hidden_size * self.factor**2, width)
        self.act = ACT2FN[config.projector_hidden_act]
        self.linear_2 = nn.Linear(width, width)

    def forward(self, patches_TPC: torch.Tensor) -> torch.Tensor:
        """(T, P * P, C) to (T, n, n, D)."""
        return self.linear_2(self.act(self.linear_1(pixel_unshuffle(patches_TPC, self.factor))))


def pixel_unshuffle(patches_TPC: torch.Tensor, factor: int) -> torch.Tensor:
    """Stack each `factor` x `factor` square of patches into channels: (T, P * P, C) to (T, n, n, factor² * C)."""
    tiles, patches, channels = patches_TPC.shape
    n = int(patches**0.5) // factor
    squares = patches_TPC.view(tiles, n, factor, n, factor, channels)
    return squares.permute(0, 1, 3, 2, 4, 5).reshape(tiles, n, n, factor * factor * channels)


def merge_tiles(tiles_TnnD: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Lay an image's grid tiles (row-major, thumbnail left out) side by side: (T, n, n, D) to (rows*n, cols*n, D)."""
    columns, rows = grid
    _, n, _, depth = tiles_TnnD.shape
    tiled = tiles_TnnD[: columns * rows].view(rows, columns, n, n, depth)
    return tiled.permute(0, 2, 1, 3, 4).reshape(rows * n, columns * n, depth)


def roi_align(feature_map_hwD: torch.Tensor, boxes_R4: torch.Tensor, bins: int, samples: int) -> torch.Tensor:
    """RoI-Align: average of `samples`² aligned bilinear samples in each of `bins`² bins of every box.

    Args:
        feature_map_hwD: (h, w, D) features that cover the whole image.
        boxes_R4: (R, 4) half-open boxes x0, y0, x1, y1 as fractions of the image in [0, 1].
    Returns:
        (R, bins * bins, D), bins in row-major order, computed in fp32 and cast back.
    """
    count, points = boxes_R4.shape[0], bins * samples
    fractions = (torch.arange(points, device=boxes_R4.device, dtype=torch.float32) + 0.5) / points
    low, size = boxes_R4[:, :2].float(), (boxes_R4[:, 2:] - boxes_R4[:, :2]).float()
    xy = 2.0 * (low[:, None, :] + size[:, None, :] * fractions[None, :, None]) - 1.0  # (R, points, 2) in [-1, 1]
    grid = torch.stack(
        (
            xy[:, None, :, 0].expand(count, points, points),
            xy[:, :, None, 1].expand(count, points, points),
        ),
        dim=-1,
    )
    sampled = F.grid_sample(
        feature_map_hwD.float().permute(2, 0, 1)[None],
        grid.reshape(1, count * points, points, 2),
        mode="bilinear",
        padding_mode="border",
        align_corners=False,
    )
    sampled = sampled[0].view(-1, count, points, points).transpose(0, 1)  # (R, D, points, points)
    return F.avg_pool2d(sampled, samples).flatten(2).transpose(1, 2).to(feature_map_hwD.dtype)


class RegionReplay(nn.Module):
    """RoI tokens: the RoI-aligned features of a region and, under `replay`, what its mask looks like in each bin."""

    def __init__(self, config: PerceptionDLMConfig):
        super().__init__()
        self.bins, self.samples = config.roi_size, config.roi_sampling_ratio
        self.conditioned = config.region_conditioning == "replay"
        self.geometry = self.conditioned and config.region_geometry
        width = config.text_config.hidden_size
        if self.conditioned:
            self.coverage_proj = nn.Linear(config.coverage_subsamples**2, width)
            self.bin_embedding = nn.Embedding(self.bins**2, width)
        if self.geometry:
            self.geometry_proj = nn.Linear(6, width)

    def forward(self, features_RbD: torch.Tensor, coverage: torch.Tensor, geometry_R6: torch.Tensor) -> torch.Tensor:
        """Condition RoI features (R, S², D) on coverage (R, cells, cells) in [0, 1] and geometry (R, 6)."""
        if not self.conditioned:
            return features_RbD
        dtype = features_RbD.dtype
        cells = coverage.shape[-1] // self.bins
        cells_RbC = F.unfold(coverage[:, None].to(dtype), cells, stride=cells)
        tokens = features_RbD + self.coverage_proj(cells_RbC.transpose(1, 2)) + self.bin_embedding.weight
        if self.geometry:
            tokens = tokens + self.geometry_proj(geometry_R6.to(dtype))[:, None]
        return tokens


def box_geometry(boxes_R4: torch.Tensor, image_size_R2: torch.Tensor) -> torch.Tensor:
    """Boxes (R, 4) as fractions of the image, then their width and height over the image's shorter side: (R, 6)."""
    height, width = image_size_R2.to(boxes_R4.dtype).unbind(-1)
    extent = (boxes_R4[:, 2:] - boxes_R4[:, :2]) * torch.stack((width, height), -1)
    return torch.cat((boxes_R4, extent / torch.minimum(width, height)[:, None]), dim=-1)


def noise_answers(
    labels_AG: torch.Tensor, mask_token_id: int, mask_probability_A1: torch.Tensor, uniform_AG: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Forward process of equation 1: every supervised token becomes the mask token with probability p.

    Args:
        labels_AG: clean ids, -100 where a slot is not supervised (it then stays masked from the model's view).
        mask_probability_A1: p in (0, 1]; uniform_AG: draws from U(0, 1).
    Returns:
        noised ids (A, G), and the bool mask (A, G) of supervised tokens that were replaced.
    """
    return mask_answers(labels_AG, mask_token_id, uniform_AG < mask_probability_A1)


def mask_answers(
    labels_AG: torch.Tensor, mask_token_id: int, chosen_AG: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`noise_answers` where it is decided which tokens are masked, (A, G) bool."""
    supervised = labels_AG != -100
    masked = supervised & chosen_AG
    return torch.where(masked | ~supervised, mask_token_id, labels_AG), masked


def token_losses(logits_AGV: torch.Tensor, labels_AG: torch.Tensor, masked_AG: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of the clean token in every masked slot, (A, G) in fp32, 0 elsewhere."""
    nll = F.cross_entropy(logits_AGV[masked_AG].float(), labels_AG[masked_AG], reduction="none")
    return torch.zeros(masked_AG.shape, device=nll.device).masked_scatter(masked_AG, nll)


def masked_diffusion_loss(
    nll_AG, labels_AG, masked_AG, mask_probability_A1, weighting: str = "elbo", num_items: torch.Tensor | None = None
):
    """Equation 2 from the `token_losses` of the masked tokens.

    Args:
        weighting: `"elbo"` and `"released"` weigh a token by 1/p and divide by the number of supervised tokens (the
            paper and the released code); `"masked"` averages over the masked tokens, which bounds the weight (lower
            variance).
        num_items: what to divide by instead, for a batch that is spread over passes and processes.
    """
    if weighting not in ("elbo", "masked", "released"):
        raise ValueError(f"unknown loss weighting {weighting!r}, known are 'elbo', 'masked' and 'released'")
    if weighting == "masked":
        total, items = nll_AG.sum(), masked_AG.sum()
    else:
        total, items = (nll_AG / mask_probability_A1).sum(), (labels_AG != -100).sum()
    return total / (items.clamp(min=1) if num_items is None else num_items)


class PerceptionDLMPreTrainedModel(PreTrainedModel):
    config_class = PerceptionDLMConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    output_modalities = ("text",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["SiglipEncoderLayer", "LlamaDecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, ignore_mismatched_sizes=False, **kwargs):
        """As in transformers, but a checkpoint that does not fill exactly this config's weights is a `ValueError`.

        `ignore_mismatched_sizes=True` returns to transformers' behaviour: a warning, and fresh weights where needed.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(
            pretrained_model_name_or_path, *args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
        problems = [
            f"{len(info[kind])} {kind.replace('_', ' ')}, such as {sorted(map(str, info[kind]))[0]}"
            for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
            if info[kind]
        ]
        if problems and not ignore_mismatched_sizes:
            raise ValueError(
                f"the weights in {pretrained_model_name_or_path} and the config disagree: {'; '.join(problems)}. Load "
                "the config that belongs to them, or pass ignore_mismatched_sizes=True to initialise what is missing"
            )
        return (model, info) if wants_info else model


class PerceptionDLMForConditionalGeneration(PerceptionDLMGenerationMixin, PerceptionDLMPreTrainedModel):
    """Captions every region of an image in parallel by masked diffusion; without regions, answers questions."""

    _tied_weights_keys = {"lm_head.weight": "language_model.embed_tokens.weight"}  # noqa: RUF012
    generation_config_class = PerceptionDLMGenerationConfig

    def __init__(self, config: PerceptionDLMConfig):
        super().__init__(config)
        self.generation_config = PerceptionDLMGenerationConfig()
        if not config.text_only:
            self.vision_tower = PromptedSiglipVisionModel(config.vision_config)
            self.projector = PerceptionDLMProjector(config)
            for layer in self.vision_tower.encoder.layers[config.vision_feature_layer :][1:]:
                layer.requires_grad_(False)  # never run
        self.region_replay = RegionReplay(config)
        if config.region_conditioning == "vision":
            self.region_prompts = nn.Embedding(config.num_region_prompts, config.vision_config.hidden_size)
        self.language_model = BidirectionalLlamaModel(config.text_config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Fresh weights as in transformers, but what a region adds to its RoI features starts at their scale.

        Coverage and geometry have few inputs: at the deviation of the other layers they would start an order of
        magnitude below the image features they are added to, and be learned late.
        """
        super()._init_weights(module)
        if any(module is layer for layer in self.region_replay.children()):
            if isinstance(module, nn.Linear):
                init.normal_(module.weight, std=module.in_features**-0.5)
            elif isinstance(module, nn.Embedding):
                init.normal_(module.weight, std=module.num_embeddings**-0.5)

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.language_model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(
        self,
        input_ids: torch.Tensor,
        token_roles: torch.Tensor | None = None,
        region_ids: torch.Tensor | None = None,
        num_regions: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        tile_grids: torch.Tensor | None = None,
        image_sizes: torch.Tensor | None = None,
        region_boxes: torch.Tensor | None = None,
        region_coverage: torch.Tensor | None = None,
        prompt_coverage: torch.Tensor | None = None,
        prompt_ids: torch.Tensor | None = None,
        sample_ids: torch.Tensor | None = None,
        region_order: torch.Tensor | None = None,
        answer_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        mask_probability: torch.Tensor | None = None,
        answer_noise: torch.Tensor | None = None,
        answer_masked: torch.Tensor | None = None,
        loss_weighting: str = "elbo",
        num_items: torch.Tensor | None = None,
        use_all_parts: bool = False,
    ) -> PerceptionDLMOutput:
        """Score the slots of every answer; with `labels`, noise them and return the loss of equation 2.

        The prompt's tensors are those of [`PerceptionDLMProcessor`], which documents their shapes (`sample_ids` and
        `region_order` matter to `generate` alone).

        Args:
            answer_ids: (A, G) ids in the slots, masked ones holding the mask token. Give these or `labels`.
            labels: (A, G) clean ids, -100 behind the end of an answer: those slots do not exist. A may be a multiple of
                the number of regions: answers of one region then stand next to each other.
            mask_probability: (A, 1) p of equation 2 in (0, 1]; drawn uniformly when left out. An int32 tensor holds the
                bits of p as fp32, which no mixed precision changes on the way.
            answer_noise: (A, G) draws from U(0, 1) that decide which tokens are masked; drawn when left out. With
                `supervise_markers` (A, W), whole blocks, and so are the output's logits and masked tokens.
            answer_masked: (A, G) or (A, W) bool, which tokens are masked, instead of `answer_noise`.
            loss_weighting, num_items: see `masked_diffusion_loss`.
            use_all_parts: run the vision side with no effect where the batch has no images or no regions, so that all
                processes that share their weights run the same modules and every parameter has a gradient.
        """
        if (answer_ids is None) == (labels is None):
            raise ValueError(
                "forward needs answer_ids (slots to score) or labels (clean answers to train on), not both"
            )
        # 1. condition: text, image and regions
        prompt = self.embed_prompt(
            input_ids, token_roles, region_ids, num_regions, attention_mask, pixel_values, tile_grids, image_sizes,
            region_boxes, region_coverage, prompt_coverage, prompt_ids,
            roi_scale=None if labels is None else self.config.roi_training_spatial_scale,
        )  # fmt: skip
        if use_all_parts:
            prompt.embeds = self.run_idle_parts(prompt.embeds, pixel_values is None, region_boxes is None)
        if labels is None:
            assert answer_ids is not None  # one of the two was given
            layout = self.lay_out_answers(prompt, answer_ids.shape[0], answer_ids.shape[1])
            return PerceptionDLMOutput(logits=self.score_answers(prompt, layout, answer_ids))
        # 2. noise the clean answers (equation 1)
        layout = self.lay_out_answers(prompt, labels.shape[0], labels.shape[1], (labels != -100).sum(dim=1))
        if self.config.supervise_markers:
            labels = layout.enclose_labels(labels)
        if mask_probability is None:
            mask_probability = torch.rand(len(labels), 1, device=labels.device) * 0.999 + 1e-3
        elif mask_probability.dtype == torch.int32:
            mask_probability = mask_probability.view(torch.float32)
        if answer_masked is None:
            answer_noise = torch.rand(labels.shape, device=labels.device) if answer_noise is None else answer_noise
            answer_masked = answer_noise < mask_probability
        noised, masked = mask_answers(labels, self.config.mask_token_id, answer_masked)
        # 3. denoise all answers in one pass
        logits = self.score_answers(prompt, layout, noised)
        # 4. loss (equation 2)
        nll = token_losses(logits, labels, masked)
        loss = masked_diffusion_loss(nll, labels, masked, mask_probability, loss_weighting, num_items)
        return PerceptionDLMOutput(loss=loss, logits=logits, masked=masked, token_losses=nll.detach())

    def embed_prompt(
        self,
        input_ids,
        token_roles=None,
        region_ids=None,
        num_regions=None,
        attention_mask=None,
        pixel_values=None,
        tile_grids=None,
        image_sizes=None,
        region_boxes=None,
        region_coverage=None,
        prompt_coverage=None,
        prompt_ids=None,
        roi_scale=None,
        encoded_image: EncodedImage | None = None,
    ) -> Prompt:
        """Embed the text, put image features and RoI tokens in place; `roi_scale` replaces `roi_spatial_scale`."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if (token_roles is None) != (region_ids is None):
            raise ValueError("token_roles and region_ids describe the same tokens: give both or neither")
        token_roles = torch.zeros_like(input_ids) if token_roles is None else token_roles
        region_ids = torch.full_like(input_ids, -1) if region_ids is None else region_ids
        num_regions = input_ids.new_zeros(len(input_ids)) if num_regions is None else num_regions
        roles = TokenRoles.of_prompt(token_roles.masked_fill(attention_mask == 0, PAD), region_ids)
        if encoded_image is not None:
            if pixel_values is not None:
                raise ValueError("give pixel_values or encoded_image, not both")
            tile_grids, image_sizes = self._grids_of(encoded_image, len(input_ids))
        self._check_inputs(input_ids, pixel_values, tile_grids)
        if region_boxes is not None or num_regions.any():
            images = (pixel_values if encoded_image is None else encoded_image.tiles, tile_grids, image_sizes)
            self._check_regions(num_regions, images, region_boxes, region_coverage, prompt_coverage)
        embeds = self.get_input_embeddings()(input_ids)
        tiles_TnnD = regions_RbD = embeds[:0]
        if encoded_image is not None:
            tiles_TnnD = encoded_image.tiles.repeat(len(input_ids), 1, 1, 1)
        elif pixel_values is not None:
            tiles_TnnD = self.encode_tiles(pixel_values, prompt_coverage)
        if self.config.use_roi_replay and region_boxes is not None:
            regions_RbD = self.replay_regions(
                tiles_TnnD, tile_grids, image_sizes, num_regions, region_boxes, region_coverage, roi_scale
            )
        embeds = scatter_features(embeds, input_ids == self.config.image_token_id, tiles_TnnD, "image")
        embeds = scatter_features(embeds, roles.role == ROI, regions_RbD, "RoI")
        positions = prompt_positions(roles, self.config.attention_layout)
        return Prompt(input_ids, embeds, roles, positions, num_regions, self._markers(num_regions, prompt_ids))

    def _grids_of(self, encoded_image: EncodedImage, num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Grid and size of an encoded image for every row; refuses one that belongs to another model."""
        side, width = self.config.tokens_per_side, self.config.text_config.hidden_size
        if encoded_image.tiles.shape[1:] != (side, side, width):
            raise ValueError(
                f"the encoded image holds tiles of {tuple(encoded_image.tiles.shape[1:])}, this model's are "
                f"{(side, side, width)}: encode it with this model"
            )
        return encoded_image.tile_grids.repeat(num_rows, 1), encoded_image.image_sizes.repeat(num_rows, 1)

    @torch.no_grad()
    def encode_image(self, pixel_values: torch.Tensor, tile_grids: torch.Tensor, image_sizes: torch.Tensor, **_inputs):
        """Encode one image for any number of later calls: `generate(..., encoded_image=...)`.

        Args:
            pixel_values, tile_grids, image_sizes: of [`PerceptionDLMProcessor`], for one image; its other keys are
                ignored.
        Returns:
            [`EncodedImage`], which the processor and the pipeline take in place of the image.
        Raises:
            ValueError: for several images, or under `vision`, where the features depend on the regions.
        """
        if self.config.region_conditioning == "vision":
            raise ValueError(
                "region_conditioning='vision' encodes the image together with its regions: nothing to keep"
            )
        if len(tile_grids) != 1:
            raise ValueError(f"encode_image takes one image, got {len(tile_grids)}")
        self._check_inputs(tile_grids, pixel_values, tile_grids)
        return EncodedImage(self.encode_tiles(pixel_values), tile_grids, image_sizes)

    def _markers(self, num_regions: torch.Tensor, prompt_ids: torch.Tensor | None) -> torch.Tensor:
        """Index of every region's caption marker: its prompt id, but its place in the row in the released layout."""
        if prompt_ids is not None and self.config.attention_layout != "released":
            return prompt_ids
        first_R = (num_regions.cumsum(0) - num_regions).repeat_interleave(num_regions)
        return torch.arange(len(first_R), device=first_R.device) - first_R

    def _check_inputs(self, input_ids, pixel_values, tile_grids) -> None:
        """Refuse text and tiles made by a processor whose tokenizer or sizes are not this model's."""
        side, vocabulary = self.config.vision_config.image_size, self.config.text_config.vocab_size
        if not 0 <= int(input_ids.min()) <= (largest := int(input_ids.max())) < vocabulary:
            raise ValueError(f"input_ids hold {largest}, the model's vocabulary has {vocabulary} tokens")
        if pixel_values is None:
            return
        if self.config.text_only:
            raise ValueError("this model has no vision tower (text_only=True): ask it without images")
        if tuple(pixel_values.shape[1:]) != (3, side, side):
            raise ValueError(
                f"pixel_values are {tuple(pixel_values.shape)}, this model takes (tiles, 3, {side}, {side})"
            )
        tiles = len(pixel_values) if tile_grids is None else sum(num_tiles(grid) for grid in tile_grids.tolist())
        if tiles != len(pixel_values):
            raise ValueError(f"pixel_values hold {len(pixel_values)} tiles, tile_grids describe {tiles}")

    def _check_regions(self, num_regions, images, region_boxes, region_coverage, prompt_coverage) -> None:
        """Refuse regions that are incomplete, or made by a processor whose switches are not this model's."""
        config, (pixel_values, tile_grids, image_sizes) = self.config, images
        if config.region_conditioning == "none":
            raise ValueError("this is a base model (region_conditioning='none'): it answers questions, without regions")
        if any(tensor is None for tensor in images):
            raise ValueError("regions need pixel_values, tile_grids and image_sizes of their images")
        counted, boxes = int(num_regions.sum()), 0 if region_boxes is None else len(region_boxes)
        if boxes != counted or len(tile_grids) != len(image_sizes):
            raise ValueError(
                f"num_regions counts {counted} regions, region_boxes holds {boxes}; there are {len(tile_grids)} "
                f"tile_grids and {len(image_sizes)} image_sizes"
            )
        if config.region_conditioning == "replay":
            name, given, cells = (
                "region_coverage",
                region_coverage,
                config.roi_size * config.coverage_subsamples,
            )
            expected: tuple[int, ...] = (len(region_boxes), cells, cells)
        else:
            name, given, patches = "prompt_coverage", prompt_coverage, config.patches_per_side
            expected = (len(pixel_values), config.num_region_prompts, patches, patches)
        if given is None or tuple(given.shape) != expected:
            found = "missing" if given is None else tuple(given.shape)
            raise ValueError(
                f"{name} must have shape {expected} under region_conditioning={config.region_conditioning!r}, got "
                f"{found}: build the processor with PerceptionDLMProcessor.from_config(model.config, tokenizer)"
            )

    def encode_tiles(self, pixel_values: torch.Tensor, prompt_coverage: torch.Tensor | None = None) -> torch.Tensor:
        """Tiles (T, 3, H, W) to image tokens (T, n, n, D); region prompts enter by their coverage (T, K, P, P)."""
        addend = None
        if (
            self.config.region_conditioning == "vision"
            and self.config.use_region_prompts
            and prompt_coverage is not None
        ):
            weight_KC = self.region_prompts.weight
            addend = torch.einsum("tkp,kc->tpc", prompt_coverage.flatten(2).to(weight_KC.dtype), weight_KC)
        pixels = pixel_values.to(self.vision_tower.embeddings.patch_embedding.weight.dtype)
        return self.projector(self.vision_tower(pixels, self.config.vision_feature_layer, addend))

    def run_idle_parts(self, embeds: torch.Tensor, no_images: bool, no_regions: bool) -> torch.Tensor:
        """Embeddings unchanged, with a gradient of zero to what a batch leaves out: an empty tile or region is run."""
        config, replays = self.config, self.config.region_conditioning == "replay"
        if not config.text_only and (no_images or (no_regions and config.region_conditioning == "vision")):
            side, patches = config.vision_config.image_size, config.patches_per_side
            coverage = embeds.new_zeros(1, config.num_region_prompts, patches, patches)
            embeds = embeds + 0.0 * self.encode_tiles(embeds.new_zeros(1, 3, side, side), coverage).mean()
        if no_regions and replays:
            cells = config.roi_size * config.coverage_subsamples
            features = embeds.new_zeros(1, config.roi_size**2, embeds.shape[-1])
            replayed = self.region_replay(features, embeds.new_zeros(1, cells, cells), embeds.new_zeros(1, 6))
            embeds = embeds + 0.0 * replayed.mean()
        return embeds

    def replay_regions(
        self, tiles_TnnD, tile_grids, image_sizes, num_regions, region_boxes, region_coverage, scale=None
    ):
        """RoI tokens (R, S², D) of all regions; row b's regions lie in image b. The config's quirks act here."""
        if len(tile_grids) != len(num_regions):
            raise ValueError(
                f"regions need one image per row: got {len(tile_grids)} images for {len(num_regions)} rows"
            )
        grids, counts = [tuple(grid) for grid in tile_grids.tolist()], num_regions.tolist()
        tiles = tiles_TnnD.split([num_tiles(grid) for grid in grids])
        if self.config.roi_first_tile:
            tiles = [image_tiles[len(image_tiles) > 1 :] for image_tiles in tiles]
        sizes_R2 = image_sizes.repeat_interleave(num_regions, dim=0)
        boxes_R4 = region_boxes.float() / sizes_R2.flip(-1).repeat(1, 2)
        sampled_R4 = boxes_R4
        if self.config.roi_inclusive_boxes:
            sampled_R4 = torch.cat((boxes_R4[:, :2], (region_boxes[:, 2:] - 1) / sizes_R2.flip(-1)), dim=1)
        sampled_R4 = sampled_R4 * (scale or self.config.roi_spatial_scale or 1.0)
        features = [
            roi_align(merge_tiles(t, grid), boxes, self.config.roi_size, self.config.roi_sampling_ratio)
            for t, grid, boxes in zip(tiles, grids, sampled_R4.split(counts), strict=True)
            if len(boxes)
        ]
        return self.region_replay(torch.cat(features), region_coverage, box_geometry(boxes_R4, sizes_R2))

    def lay_out_answers(self, prompt: Prompt, num_answers: int, num_slots: int, lengths_A=None, **options):
        """Place the answers behind the prompt; refuses sequences longer than the model's positions."""
        layout = AnswerLayout(prompt, num_answers, num_slots, self.config, lengths_A, **options)
        end = int(layout.positions.max()) + 1
        limit = self.config.text_config.max_position_embeddings
        if end > limit:
            raise ValueError(
                f"the sequence needs {end} positions, the model has {limit}: use fewer tiles, tokens or regions"
            )
        return layout

    def attention_mask(self, queries: TokenRoles, keys: TokenRoles) -> torch.Tensor | None:
        """Who sees whom, in the form the language model's attention implementation expects."""
        allowed = allowed_attention(queries, keys, self.config.attention_layout)
        return attention_bias(allowed, self.dtype, self.config.text_config._attn_implementation)

    def score_answers(
        self, prompt: Prompt, layout: AnswerLayout, answer_ids: torch.Tensor, cache=None, mask=None, run=None
    ) -> torch.Tensor:
        """Logits (A, G, V) for slots (A, G), or (A, W, V) for whole blocks (A, W).

        Args:
            cache: a `PrefixCache`; the prompt's tokens that it holds are not run again.
            mask: the pass's attention mask where the caller has it already.
            run: what runs the tokens, by default the language model.
        """
        slots_only = answer_ids.shape[1] == layout.num_slots
        blocks_AW = layout.enclose(answer_ids) if slots_only else answer_ids
        answers_BXD = self.get_input_embeddings()(layout.token_ids(blocks_AW))
        new = prompt if cache is None else prompt.tokens(cache.length)
        if mask is None:
            mask = self.attention_mask(new.roles.cat(layout.roles), prompt.roles.cat(layout.roles))
        embeds, positions = torch.cat((new.embeds, answers_BXD), 1), torch.cat((new.positions, layout.positions), 1)
        hidden = (run or self.language_model)(embeds, mask, positions, cache)
        hidden_AWD = layout.pick(hidden[:, -answers_BXD.shape[1] :])
        return self.lm_head(hidden_AWD[:, layout.slots] if slots_only else hidden_AWD)


def scatter_features(embeds_BLD, places_BL, features, kind: str):
    """Write features (…, D) into the marked places in order; raises when their numbers differ."""
    features = features.reshape(-1, embeds_BLD.shape[-1]).to(embeds_BLD.dtype)
    places = int(places_BL.sum())
    if places != len(features):
        raise ValueError(
            f"the prompt has {places} {kind} tokens but the model computed {len(features)} {kind} features"
        )
    return embeds_BLD.masked_scatter(places_BL[..., None], features)


__all__ = ["PerceptionDLMForConditionalGeneration", "PerceptionDLMOutput", "PerceptionDLMPreTrainedModel"]
