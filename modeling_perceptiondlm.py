"""PerceptionDLM: encoded tiles, region replay, and a bidirectional Llama that denoises all captions at once.

Reading order: `PerceptionDLMForConditionalGeneration.forward` is the table of contents; the parts stand above it.
Legend of tensor names: see sequence_perceptiondlm.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.utils import ModelOutput
from transformers.utils.output_capturing import capture_outputs

from .cache_perceptiondlm import EncodedImage, weights_fingerprint
from .configuration_perceptiondlm import PerceptionDLMConfig, num_tiles
from .focal_perceptiondlm import APPEARANCE_CHANNELS, FocalReplay
from .generation_config_perceptiondlm import PerceptionDLMGenerationConfig
from .generation_perceptiondlm import PerceptionDLMGenerationMixin
from .inputs_perceptiondlm import PromptInputs
from .language_perceptiondlm import BidirectionalLlamaModel, PassAttention
from .loss_perceptiondlm import drawn_noise, mask_answers, masked_diffusion_loss, token_losses
from .naming_perceptiondlm import RegionNamer, patches_of
from .passes_perceptiondlm import run_packed
from .region_features_perceptiondlm import RegionReplay, bin_shares, box_geometry, roi_align, roi_align_each
from .sequence_perceptiondlm import ROI, AnswerSpans, Names, Prompt
from .vision_perceptiondlm import build_tower


if TYPE_CHECKING:  # named here so that save_pretrained copies these files next to every checkpoint
    from .pipeline_perceptiondlm import RegionCaptioningPipeline  # noqa: F401
    from .processing_perceptiondlm import PerceptionDLMProcessor  # noqa: F401


@dataclass
class PerceptionDLMOutput(ModelOutput):
    """Output of [`PerceptionDLMForConditionalGeneration`].

    Args:
        loss (`torch.FloatTensor` of shape `()`, when `labels` are given): equation 2 of the paper.
        logits (`torch.FloatTensor` of shape `(A, G, V)`): scores for every slot of every answer. Left out while a model
            in training mode computes its loss, which scores the masked slots alone.
        masked (`torch.BoolTensor` of shape `(A, G)`, when `labels` are given): the slots that the noise masked.
        token_losses (`torch.FloatTensor` of shape `(A, G)`, when `labels` are given): their negative log-likelihoods, 0
            elsewhere; no gradient flows through these.
        hidden_states, attentions (tuples of tensors, when asked for): of the language model's layers, over packed rows
            (prompt, then answers): (B, X, D), first the embeddings, last before the final norm; (B, heads, X, X).
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    masked: torch.Tensor | None = None
    token_losses: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


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


class PerceptionDLMPreTrainedModel(PreTrainedModel):
    config_class = PerceptionDLMConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    output_modalities = ("text",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["SiglipEncoderLayer", "LlamaDecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["attending"]  # noqa: RUF012
    _can_record_outputs = {"hidden_states": LlamaDecoderLayer, "attentions": PassAttention}  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, ignore_mismatched_sizes=False, **kwargs):
        """As in transformers, but a checkpoint that does not fill exactly this config's weights is a `ValueError`.

        `ignore_mismatched_sizes=True` returns to transformers' behaviour: a warning, and fresh weights where needed; so
        does `None` in place of a checkpoint, with `config` and `state_dict`.
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
        if problems and not ignore_mismatched_sizes and pretrained_model_name_or_path is not None:
            raise ValueError(
                f"the weights in {pretrained_model_name_or_path} and the config disagree: {'; '.join(problems)}. Load "
                "the config that belongs to them, or pass ignore_mismatched_sizes=True to initialise what is missing"
            )
        return (model, info) if wants_info else model


class PerceptionDLMForConditionalGeneration(PerceptionDLMGenerationMixin, PerceptionDLMPreTrainedModel):
    """Captions every region of an image in parallel by masked diffusion; without regions, answers questions."""

    _tied_weights_keys = {"lm_head.weight": "language_model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012
    generation_config_class = PerceptionDLMGenerationConfig

    def __init__(self, config: PerceptionDLMConfig):
        super().__init__(config)
        self.generation_config = PerceptionDLMGenerationConfig()
        if not config.text_only:
            self.vision_tower = build_tower(config.vision_config, config.vision_feature_layer)
            self.projector = PerceptionDLMProjector(config)
        self.region_replay = RegionReplay(config)
        if config.focuses_regions:
            self.focal_replay = FocalReplay(config)
        if config.namer:
            self.region_namer = RegionNamer(config)
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
        added = [*self.region_replay.children(), *getattr(self, "focal_replay", nn.Module()).children()]
        if any(module is layer for layer in added):
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

    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        answer_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        mask_probability: torch.Tensor | None = None,
        answer_noise: torch.Tensor | None = None,
        answer_masked: torch.Tensor | None = None,
        loss_weighting: str = "elbo",
        num_items: torch.Tensor | None = None,
        use_all_parts: bool = False,
        sample_ids: torch.Tensor | None = None,
        region_order: torch.Tensor | None = None,
        **prompt: Any,
    ) -> PerceptionDLMOutput:
        """Score the slots of every answer; with `labels`, noise them and return the loss of equation 2.

        The prompt's tensors, those in `prompt` included, are those of [`PerceptionDLMProcessor`], which documents their
        shapes (`sample_ids` and `region_order` matter to `generate` alone). `output_hidden_states`,
        `output_attentions` and `return_dict` do what they do elsewhere in transformers.

        Args:
            inputs_embeds: (B, L, D) text embeddings instead of `input_ids`.
            answer_ids: (A, G) ids in the slots, masked ones holding the mask token. Give these or `labels`.
            labels: (A, G) clean ids, -100 behind the end of an answer: those slots do not exist. A may be a multiple of
                the number of regions: answers of one region then stand next to each other.
            mask_probability: (A, 1) p of equation 2 in (0, 1]; drawn uniformly when left out. An int32 tensor holds the
                bits of p as fp32, which no mixed precision changes on the way.
            answer_noise: (A, G) draws from U(0, 1) that decide which tokens are masked; drawn when left out. With
                `supervise_markers` (A, Z), whole spans, and so are the output's logits and masked tokens.
            answer_masked: (A, G) or (A, Z) bool, which tokens are masked, instead of `answer_noise`.
            loss_weighting, num_items: see `masked_diffusion_loss`.
            use_all_parts: run the vision side with no effect where the batch has no images or no regions, so that all
                processes that share their weights run the same modules and every parameter has a gradient.
        """
        if (answer_ids is None) == (labels is None):
            raise ValueError(
                "forward needs answer_ids (slots to score) or labels (clean answers to train on), not both"
            )
        # 1. condition: text, image and regions
        for switch in ("output_hidden_states", "output_attentions", "use_cache"):  # served by the decorator, or moot
            prompt.pop(switch, None)
        inputs = PromptInputs(input_ids, inputs_embeds, attention_mask, pixel_values=pixel_values, **prompt)
        conditioned = self.embed_prompt(inputs.checked(self), training=labels is not None)
        if use_all_parts:
            idle = pixel_values is None, inputs.region_boxes is None, len(inputs.cropped_regions) == 0
            conditioned.embeds = self.run_idle_parts(conditioned.embeds, *idle)
        if labels is None:
            assert answer_ids is not None  # one of the two was given
            spans = self.place_answers(conditioned, answer_ids.shape[0], answer_ids.shape[1])
            return PerceptionDLMOutput(logits=self.score_slots(conditioned, spans, answer_ids))
        # 2. noise the clean answers (equation 1)
        spans = self.place_answers(conditioned, labels.shape[0], labels.shape[1], (labels != -100).sum(dim=1))
        if self.config.supervise_markers:
            labels = spans.enclose_labels(labels)
        probability, chosen = drawn_noise(labels, mask_probability, answer_noise, answer_masked)
        noised, masked = mask_answers(labels, self.config.mask_token_id, chosen)
        # 3. denoise all answers in one pass
        if self.config.supervise_markers:
            hidden = self.run_spans(conditioned, spans, noised)
        else:
            hidden = self.run_spans(conditioned, spans, spans.enclose(noised))[:, spans.slots]
        logits = None if self.training else self.lm_head(hidden)
        # 4. loss (equation 2)
        scores_NV = self.lm_head(hidden[masked.to(hidden.device)]) if logits is None else logits[masked]
        nll = token_losses(scores_NV, labels, masked)
        loss = masked_diffusion_loss(nll, labels, masked, probability, loss_weighting, num_items)
        return PerceptionDLMOutput(loss=loss, logits=logits, masked=masked, token_losses=nll.detach())

    def find_ids(self, inputs_embeds: torch.Tensor) -> torch.Tensor:
        """Ids (B, L) that stand for text embeddings (B, L, D): image placeholders are found, the rest is any text."""
        image_token = torch.tensor(self.config.image_token_id, device=inputs_embeds.device)
        placeholder = (inputs_embeds == self.get_input_embeddings()(image_token)).all(dim=-1)
        return torch.where(placeholder, image_token, self.config.end_of_text_token_id)

    def embed_prompt(
        self, inputs: PromptInputs, tiles: list[torch.Tensor] | None = None, training: bool = False
    ) -> Prompt:
        """Embed the text, put image features and RoI tokens in place.

        Args:
            inputs: checked.
            tiles: encoded tiles (T, n, n, X) of every image of every row, in order, where they are known already.
            training: whether the rows are trained on; RoIs of the published weights differ then.
        """
        embeds = inputs.inputs_embeds
        if embeds is None:
            embeds = self.get_input_embeddings()(inputs.input_ids)
        if tiles is None:
            tiles = self._encode_shown(inputs)
        if self.config.image_in_prompt:
            features = torch.cat([image.flatten(0, 2) for image in tiles]) if tiles else embeds[:0]
            features = features[..., : embeds.shape[-1]]
            embeds = scatter_features(embeds, inputs.input_ids == self.config.image_token_id, features, "image")
        roles, names = inputs.roles, None
        if self.config.use_roi_replay and inputs.region_boxes is not None and len(inputs.region_boxes):
            regions_RbD, names = self.replay_regions(inputs, tiles, training)
            embeds = scatter_features(embeds, roles.role == ROI, regions_RbD, "RoI")
        layout, counts_B = self.config.layout, inputs.num_regions
        first_R = (counts_B.cumsum(0) - counts_B).repeat_interleave(counts_B)
        places_R = torch.arange(len(first_R), device=first_R.device) - first_R
        markers = layout.marker_index(places_R, inputs.prompt_ids)
        return Prompt(inputs.input_ids, embeds, roles, layout.prompt_positions(roles), counts_B, markers, names)

    def _encode_shown(self, inputs: PromptInputs) -> list[torch.Tensor]:
        """Encoded tiles (T, n, n, X) of every image of every row, in order."""
        shown = [image for row in inputs.shown_images for image in row]
        if inputs.encoded_image is not None:
            return [inputs.encoded_image.tiles for _ in shown]
        if inputs.pixel_values is None or not shown:
            return []
        if inputs.prompt_coverage is None:
            encoded = self.encode_images(inputs)
            return [encoded[image] for image in shown]
        pixels = inputs.pixel_values.split(self._tile_counts(inputs))
        together = self.encode_tiles(torch.cat([pixels[image] for image in shown]), inputs.prompt_coverage)
        return list(together.split([len(pixels[image]) for image in shown]))

    def encode_images(self, inputs: PromptInputs) -> list[torch.Tensor]:
        """Encoded tiles (T, n, n, X) of every image, which know no region."""
        counts = self._tile_counts(inputs)
        grids = [(1, 1)] * len(counts) if inputs.tile_grids is None else grid_pairs(inputs.tile_grids)
        return list(self.encode_tiles(inputs.pixel_values, grids=grids).split(counts))

    @staticmethod
    def _tile_counts(inputs: PromptInputs) -> list[int]:
        if inputs.tile_grids is None:  # every tile is an image
            return [1] * len(inputs.pixel_values)
        return [num_tiles(grid) for grid in inputs.tile_grids.tolist()]

    @torch.no_grad()
    def encode_image(
        self,
        pixel_values: torch.Tensor,
        tile_grids: torch.Tensor,
        image_sizes: torch.Tensor,
        picture: Any = None,
        fingerprint: bool = True,
        **_inputs: Any,
    ) -> EncodedImage:
        """Encode one image for any number of later calls: `generate(..., encoded_image=...)`.

        Args:
            pixel_values, tile_grids, image_sizes: of [`PerceptionDLMProcessor`], for one image; its other keys are
                ignored.
            picture: the image itself, which later regions of a model with `region_crop_size` or `region_appearance` are
                cut out of; the pipeline's `encode_image` gives it.
            fingerprint: remember which weights made it, and let later calls refuse other ones. Reading them takes time
                at every call: leave it out where a program holds the image and its model, and never changes either.
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
        PromptInputs(pixel_values=pixel_values, tile_grids=tile_grids).check_tiles(self.config)
        made_by = weights_fingerprint(self) if fingerprint else None
        tiles = self.encode_tiles(pixel_values, grids=grid_pairs(tile_grids))
        return EncodedImage(tiles, tile_grids, image_sizes, made_by, picture)

    def check_encoded_image(self, image: EncodedImage) -> None:
        """Refuse an image that other weights encoded."""
        side, width = self.config.tokens_per_side, self.config.tile_width
        if image.tiles.shape[1:] != (side, side, width):
            raise ValueError(
                f"the encoded image holds tiles of {tuple(image.tiles.shape[1:])}, this model's are "
                f"{(side, side, width)}: encode it with this model"
            )
        if image.made_by is not None and image.made_by != weights_fingerprint(self):
            raise ValueError(
                "the encoded image was made by other weights, or by these in another dtype or on another device: "
                "encode it with this model"
            )

    def encode_tiles(
        self,
        pixel_values: torch.Tensor,
        prompt_coverage: torch.Tensor | None = None,
        grids: Sequence[tuple[int, int]] | None = None,
    ) -> torch.Tensor:
        """Tiles (T, 3, H, W) to image tokens (T, n, n, D), and behind them what a namer sees, unless the model trains.

        Args:
            prompt_coverage: (T, k, P, P) by which region prompts enter.
            grids: columns and rows of the images that the tiles make up; None for pictures that stand alone.
        """
        pixels = self.normalised(pixel_values)
        patches_TPC = self.tile_features(pixels, prompt_coverage)
        tokens_TnnD = self.projector(patches_TPC)
        if self.config.namer is None or self.training:
            return tokens_TnnD
        mean, std = self.pixel_statistics(pixels)
        seen_TPPK = self.region_namer.evidence(pixels * std + mean, patches_TPC, grids)
        seen_TnnX = pixel_unshuffle(seen_TPPK.flatten(1, 2), self.config.pixel_unshuffle).to(tokens_TnnD)
        return torch.cat((tokens_TnnD, seen_TnnX), dim=-1)

    def tile_features(self, pixel_values: torch.Tensor, prompt_coverage: torch.Tensor | None = None) -> torch.Tensor:
        """Tiles (T, 3, H, W) to features (T, P * P, C) of the vision tower.

        Tiles in uint8 are normalised here, on the device; floats are taken as normalised already.
        """
        config, addend = self.config, None
        if config.region_conditioning == "vision" and config.use_region_prompts and prompt_coverage is not None:
            prompts_KC = self.region_prompts(torch.arange(config.num_region_prompts, device=prompt_coverage.device))
            coverage = prompt_coverage.flatten(2).to(prompts_KC)
            addend = torch.einsum("tkp,kc->tpc", coverage, prompts_KC)
        return self.vision_tower(self.normalised(pixel_values), config.vision_feature_layer, addend)

    def normalised(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Tiles as the vision tower takes them: uint8 is normalised, floats are taken as normalised already."""
        if pixel_values.dtype != torch.uint8:
            return pixel_values
        mean, std = self.pixel_statistics(pixel_values)
        return (pixel_values.float() / 255 - mean) / std

    def pixel_statistics(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`image_mean` and `image_std`, (3, 1, 1) each."""
        means, deviations = (
            torch.tensor(values, dtype=torch.float32, device=like.device)[:, None, None]
            for values in (self.config.image_mean, self.config.image_std)
        )
        return means, deviations

    def encode_crops(self, inputs: PromptInputs) -> tuple[torch.Tensor, torch.Tensor]:
        """The regions' own crops, all encoded in one pass (Q, n, n, X), and which regions have one (Q,)."""
        chosen, crops = inputs.cropped_regions, inputs.region_crops
        if not len(chosen):
            side = self.config.region_crop_size // self.config.vision_config.patch_size // self.config.pixel_unshuffle
            shape = (0, side, side, self.config.tile_width)
            return torch.zeros(shape, dtype=self.dtype, device=crops.device), chosen
        return self.encode_tiles(crops[chosen.to(crops.device)]), chosen

    def align_images(
        self, inputs: PromptInputs, maps: Sequence[torch.Tensor], boxes: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """RoI features (R, bins², X) of all regions on the images they lie on.

        Args:
            maps: tiles (T, side, side, X) of every image of every row, in order.
            boxes: (regions, 4) of every row, as fractions of its first image.
        """
        config, features = self.config, []
        places = itertools.accumulate((len(row) for row in inputs.shown_images), initial=0)
        for place, row, boxes_R4 in zip(places, inputs.shown_images, boxes, strict=False):
            if len(boxes_R4):
                feature_map = config.rois.feature_map(maps[place], tuple(inputs.tile_grids[row[0]].tolist()))
                features.append(roi_align(feature_map, boxes_R4, config.roi_size, config.roi_sampling_ratio))
        return torch.cat(features)

    def align_crops(self, inputs: PromptInputs, maps_QnnX: torch.Tensor, cropped_Q: torch.Tensor) -> torch.Tensor:
        """RoI features (Q, bins², X) of regions inside their own crops."""
        if not len(maps_QnnX):
            return maps_QnnX.new_zeros(0, self.config.roi_size**2, maps_QnnX.shape[-1])
        boxes_Q4 = inputs.crop_boxes[cropped_Q].to(maps_QnnX.device)
        return roi_align_each(maps_QnnX, boxes_Q4, self.config.roi_size, self.config.roi_sampling_ratio)

    def run_idle_parts(
        self, embeds: torch.Tensor, no_images: bool, no_regions: bool, no_crops: bool = True
    ) -> torch.Tensor:
        """Embeddings unchanged, with a gradient of zero to what a batch leaves out: an empty tile or region is run."""
        config, replays = self.config, self.config.region_conditioning == "replay"
        if not config.text_only and (no_images or (no_regions and config.region_conditioning == "vision")):
            side, patches = config.vision_config.image_size, config.patches_per_side
            coverage = embeds.new_zeros(1, config.num_region_prompts, patches, patches)
            embeds = embeds + 0.0 * self.encode_tiles(embeds.new_zeros(1, 3, side, side), coverage, [(1, 1)]).mean()
        if (side := config.region_crop_size) and no_crops:
            embeds = embeds + 0.0 * self.encode_tiles(embeds.new_zeros(1, 3, side, side)).mean()
        if no_regions and replays:
            cells, bins = config.roi_size * config.coverage_subsamples, config.roi_size**2
            features = embeds.new_zeros(1, bins, embeds.shape[-1])
            if config.focuses_regions:
                place, covered = torch.zeros(1, dtype=torch.int64, device=embeds.device), embeds.new_ones(1, bins)
                colours = embeds.new_zeros(1, bins, APPEARANCE_CHANNELS)
                features = self.focal_replay(features, features, place, colours, covered)
            replayed = self.region_replay(features, embeds.new_zeros(1, cells, cells), embeds.new_zeros(1, 6))
            embeds = embeds + 0.0 * replayed.mean()
        return embeds

    def replay_regions(
        self, inputs: PromptInputs, tiles: list[torch.Tensor], training: bool = False
    ) -> tuple[torch.Tensor, Names | None]:
        """RoI tokens (R, bins², D) of all regions, and their names where the tiles hold what a namer needs.

        Args:
            inputs: checked; tiles: encoded tiles (T, n, n, X) of every image of every row, in order.
        """
        config, device = self.config, tiles[0].device
        counts = inputs.num_regions.tolist()
        images = torch.tensor([row[0] for row, n in zip(inputs.shown_images, counts, strict=True) for _ in range(n)])
        sizes_R2 = inputs.image_sizes[images.to(inputs.image_sizes.device)].to(device)
        boxes_R4 = inputs.region_boxes.to(device)
        sampled = config.rois.boxes(boxes_R4, sizes_R2, training).split(counts)
        coverage = None if inputs.region_coverage is None else inputs.region_coverage.to(device)
        covered_Rb = None if coverage is None else bin_shares(coverage, config.coverage_subsamples)
        geometry_R6 = box_geometry(boxes_R4.float() / sizes_R2.flip(-1).repeat(1, 2), sizes_R2)
        # 1. tokens: features of the image, of the regions' crops, and their colours
        width, crops_QnnX, cropped_Q = config.text_config.hidden_size, None, None
        features_RbD, crops_QbD = self.align_images(inputs, [image[..., :width] for image in tiles], sampled), None
        if config.region_crop_size:
            crops_QnnX, chosen = self.encode_crops(inputs)
            crops_QbD = self.align_crops(inputs, crops_QnnX[..., :width], chosen).to(device)
            cropped_Q = chosen.to(device)
        if config.focuses_regions:
            appearance = None if inputs.region_appearance is None else inputs.region_appearance.to(device)
            features_RbD = self.focal_replay(features_RbD, crops_QbD, cropped_Q, appearance, covered_Rb)
        tokens_RbD = self.region_replay(features_RbD, coverage, geometry_R6)
        if config.namer is None or tiles[0].shape[-1] == width:
            return tokens_RbD, None
        # 2. names: what a namer saw in tiles and crops, patch by patch
        assert covered_Rb is not None  # a namer needs "replay", and that its coverage
        seen = [patches_of(image[..., width:], config.pixel_unshuffle) for image in tiles]
        seen_RbK, own_QbK = self.align_images(inputs, seen, sampled), None
        if crops_QnnX is not None and cropped_Q is not None:
            own = patches_of(crops_QnnX[..., width:], config.pixel_unshuffle)
            own_QbK = self.align_crops(inputs, own, chosen).to(device)
        return tokens_RbD, self.region_namer(seen_RbK, own_QbK, cropped_Q, covered_Rb, geometry_R6)

    def place_answers(self, prompt: Prompt, num_answers: int, num_slots: int, lengths_A=None, bare=False):
        """Place the answers behind the prompt; refuses sequences longer than the model's positions."""
        spans = AnswerSpans(prompt, num_answers, num_slots, self.config, lengths_A, bare)
        end, limit = int(spans.positions.max()) + 1, self.config.text_config.max_position_embeddings
        if end > limit:
            raise ValueError(
                f"the sequence needs {end} positions, the model has {limit}: use fewer tiles, tokens or regions"
            )
        return spans

    def score_slots(self, prompt: Prompt, spans: AnswerSpans, slots_AG: torch.Tensor) -> torch.Tensor:
        """Logits (A, G, V) for the ids in the slots of all answers, in one pass over whole rows."""
        return self.lm_head(self.run_spans(prompt, spans, spans.enclose(slots_AG))[:, spans.slots])

    def run_spans(self, prompt: Prompt, spans: AnswerSpans, spans_AZ: torch.Tensor) -> torch.Tensor:
        """Hidden states (A, Z, D) for the ids of whole spans, in one pass over whole rows."""
        roles = prompt.roles.cat(spans.roles)
        return run_packed(self, prompt, spans, spans_AZ, self.config.layout.allowed(roles, roles))


def grid_pairs(tile_grids: torch.Tensor) -> list[tuple[int, int]]:
    """Columns and rows (images, 2) as pairs."""
    return [(columns, rows) for columns, rows in tile_grids.tolist()]


def scatter_features(embeds_BLD, places_BL, features, kind: str):
    """Write features (…, D) into the marked places in order; raises when their numbers differ."""
    features = features.reshape(-1, embeds_BLD.shape[-1]).to(embeds_BLD)
    places = int(places_BL.sum())
    if places != len(features):
        raise ValueError(
            f"the prompt has {places} {kind} tokens but the model computed {len(features)} {kind} features"
        )
    return embeds_BLD.masked_scatter(places_BL[..., None], features)


__all__ = ["PerceptionDLMForConditionalGeneration", "PerceptionDLMOutput", "PerceptionDLMPreTrainedModel"]
