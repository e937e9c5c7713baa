"""The prompt's tensors, checked once: what `forward` and `generate` take from the processor.

Legend: see sequence_perceptiondlm.
"""

from collections import Counter
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch

from .cache_perceptiondlm import EncodedImage
from .configuration_perceptiondlm import PerceptionDLMConfig, num_tiles
from .sequence_perceptiondlm import PAD, TokenRoles


REGION_TENSORS = (
    "region_boxes",
    "region_coverage",
    "region_crops",
    "crop_boxes",
    "region_appearance",
    "prompt_ids",
)  # (R, ...)
ROW_TENSORS = ("input_ids", "inputs_embeds", "attention_mask", "token_roles", "region_ids", "num_regions")  # (B, ...)


@dataclass
class PromptInputs:
    """The tensors of [`PerceptionDLMProcessor`], which documents their shapes, and what stands for some of them.

    Args:
        inputs_embeds: (B, L, D) text embeddings instead of `input_ids`; image placeholders are found among them.
        encoded_image: an `EncodedImage` instead of `pixel_values`; every row shows it.
        shown_images: the images of each row, found by `checked`.
    """

    input_ids: Any = None
    inputs_embeds: torch.Tensor | None = None
    attention_mask: Any = None
    token_roles: Any = None
    region_ids: Any = None
    num_regions: Any = None
    pixel_values: Any = None
    tile_grids: Any = None
    image_sizes: Any = None
    image_ids: torch.Tensor | None = None
    region_boxes: Any = None
    region_coverage: torch.Tensor | None = None
    region_crops: Any = None
    crop_boxes: Any = None
    region_appearance: torch.Tensor | None = None
    prompt_coverage: torch.Tensor | None = None
    prompt_ids: torch.Tensor | None = None
    encoded_image: EncodedImage | None = None
    shown_images: list[list[int]] = field(default_factory=list)

    @staticmethod
    def tensor_names() -> tuple[str, ...]:
        """Names of the tensors."""
        return tuple(item.name for item in fields(PromptInputs) if item.name not in ("encoded_image", "shown_images"))

    @property
    def cropped_regions(self) -> torch.Tensor:
        """(Q,) int64: the regions that have a crop."""
        if self.crop_boxes is None:
            return torch.empty(0, dtype=torch.int64)
        return (self.crop_boxes[:, 2] > self.crop_boxes[:, 0]).nonzero()[:, 0]

    @property
    def roles(self) -> TokenRoles:
        """Roles of the prompt's tokens."""
        return TokenRoles.of_prompt(self.token_roles.masked_fill(self.attention_mask == 0, PAD), self.region_ids)

    def checked(self, model: Any) -> "PromptInputs":
        """These inputs with what may be left out filled in.

        Raises:
            ValueError: naming what is missing, or does not fit the model or the rest, with both numbers.
        """
        config, tokens = model.config, self.inputs_embeds if self.input_ids is None else self.input_ids
        if tokens is None:
            raise ValueError("give input_ids or inputs_embeds")
        if (self.token_roles is None) != (self.region_ids is None):
            raise ValueError("token_roles and region_ids describe the same tokens: give both or neither")
        shape = tokens.shape[:2]
        ids = model.find_ids(self.inputs_embeds) if self.input_ids is None else self.input_ids
        whole = replace(
            self,
            input_ids=ids,
            attention_mask=ids.new_ones(shape) if self.attention_mask is None else self.attention_mask,
            token_roles=ids.new_zeros(shape) if self.token_roles is None else self.token_roles,
            region_ids=ids.new_full(shape, -1) if self.region_ids is None else self.region_ids,
            num_regions=ids.new_zeros(shape[0]) if self.num_regions is None else self.num_regions,
        )
        if self.encoded_image is not None:
            whole = whole._with_encoded_image(model)
        check_tokens(ids, config)
        whole.check_tiles(config)
        whole.shown_images = whole._shown_images(config)
        if not config.image_in_prompt and any(whole.shown_images[row] for row in (whole.num_regions == 0).nonzero()):
            raise ValueError(
                "this model sees regions alone (image_in_prompt=False), no image as a whole: give masks or boxes with "
                "the question, such as one of the whole picture"
            )
        if whole.region_boxes is not None or whole.num_regions.any():
            whole._check_regions(config)
        return whole

    def rows(self, chosen: list[int]) -> "PromptInputs":
        """The inputs of some rows; images stay as they are."""
        if chosen == list(range(len(self.num_regions))):
            return self
        index = torch.tensor(chosen, device=self.num_regions.device)
        part: dict[str, Any] = {name: _of(getattr(self, name), index) for name in ROW_TENSORS}
        counts = self.num_regions.tolist()
        for name in REGION_TENSORS:
            if (tensor := getattr(self, name)) is not None:
                split = tensor.split(counts)
                part[name] = torch.cat([split[row] for row in chosen])
        if self.prompt_coverage is not None:
            tiles = [sum(num_tiles(self.tile_grids[image].tolist()) for image in row) for row in self.shown_images]
            split = self.prompt_coverage.split(tiles)
            part["prompt_coverage"] = torch.cat([split[row] for row in chosen])
        return replace(self, **part, shown_images=[self.shown_images[row] for row in chosen])

    def rows_of_answers(self) -> list[int]:
        """The row of every answer: one for each region, and one for a row without regions."""
        counts = self.num_regions.clamp(min=1).tolist()
        return [row for row, count in enumerate(counts) for _ in range(count)]

    def rounds(self, samples: list[int] | None = None) -> list[tuple[list[int], list[int]]]:
        """Rows that run together, and the images that no later round needs.

        Groups of one sample's regions take their turns; different samples run together even where they show one image,
        as several questions about it do. Rows with and without regions do not mix.

        Args:
            samples: the sample of each row; by default rows that show the same image are of one sample.
        """
        turns: Counter = Counter()
        rounds: dict[tuple[bool, int], list[int]] = {}
        for row, (count, images) in enumerate(zip(self.num_regions.tolist(), self.shown_images, strict=True)):
            sample = samples[row] if samples is not None else images[0] if images else None
            rounds.setdefault((count > 0, turns[sample] if count else 0), []).append(row)
            turns[sample] += count > 0
        ordered = list(rounds.values())
        last = {image: turn for turn, rows in enumerate(ordered) for row in rows for image in self.shown_images[row]}
        return [(rows, [i for i, turn in last.items() if turn == number]) for number, rows in enumerate(ordered)]

    def _with_encoded_image(self, model: Any) -> "PromptInputs":
        image = self.encoded_image
        assert image is not None
        if self.pixel_values is not None:
            raise ValueError("give pixel_values or encoded_image, not both")
        model.check_encoded_image(image)
        return replace(self, tile_grids=image.tile_grids, image_sizes=image.image_sizes)

    def check_tiles(self, config: PerceptionDLMConfig) -> None:
        """Refuse tiles made by a processor whose sizes are not this model's, or that the grids do not describe."""
        if self.pixel_values is None:
            return
        side, pixels = config.vision_config.image_size, self.pixel_values
        if config.text_only:
            raise ValueError("this model has no vision tower (text_only=True): ask it without images")
        if tuple(pixels.shape[1:]) != (3, side, side):
            raise ValueError(f"pixel_values are {tuple(pixels.shape)}, this model takes (tiles, 3, {side}, {side})")
        described = len(pixels) if self.tile_grids is None else sum(num_tiles(g) for g in self.tile_grids.tolist())
        if described != len(pixels):
            raise ValueError(f"pixel_values hold {len(pixels)} tiles, tile_grids describe {described}")

    def _shown_images(self, config: PerceptionDLMConfig) -> list[list[int]]:
        """The images of each row: those named by `image_ids`, otherwise in order, as its placeholders need them."""
        rows = len(self.num_regions)
        if self.image_ids is not None:
            if len(self.image_ids) != rows:
                raise ValueError(f"image_ids name the image of {len(self.image_ids)} rows, there are {rows}")
            return [[image] for image in self.image_ids.tolist()]
        places = torch.eq(self.input_ids, config.image_token_id).sum(dim=1).tolist()
        if self.encoded_image is not None:
            return [[0] if count else [] for count in places]
        if self.tile_grids is None:
            images = [] if self.pixel_values is None else [1] * len(self.pixel_values)
        else:
            images = [num_tiles(grid) for grid in self.tile_grids.tolist()]
        sizes, shown, image = [config.image_tokens(tiles) for tiles in images], [], 0
        for count in places:
            row = []
            while count > 0 and image < len(sizes):
                row.append(image)
                count -= sizes[image]
                image += 1
            shown.append(row)
        if image < len(sizes) or sum(places) != sum(sizes):
            raise ValueError(
                f"the prompt has {sum(places)} image tokens but the model computed {sum(sizes)} image features"
            )
        return shown

    def _check_regions(self, config: PerceptionDLMConfig) -> None:
        """Refuse regions that are incomplete, or made by a processor whose switches are not this model's."""
        if config.region_conditioning == "none":
            raise ValueError("this is a base model (region_conditioning='none'): it answers questions, without regions")
        pictured = self.pixel_values if self.encoded_image is None else self.encoded_image.tiles
        if pictured is None or self.tile_grids is None or self.image_sizes is None:
            raise ValueError("regions need pixel_values, tile_grids and image_sizes of their images")
        counts = self.num_regions.tolist()
        boxes = 0 if self.region_boxes is None else len(self.region_boxes)
        if boxes != sum(counts) or len(self.tile_grids) != len(self.image_sizes):
            raise ValueError(
                f"num_regions counts {sum(counts)} regions, region_boxes holds {boxes}; there are "
                f"{len(self.tile_grids)} tile_grids and {len(self.image_sizes)} image_sizes"
            )
        if any(count and len(images) != 1 for count, images in zip(counts, self.shown_images, strict=True)):
            raise ValueError(
                f"regions need one image per row: got {len(self.tile_grids)} images for {len(counts)} rows"
            )
        if config.region_conditioning == "replay":
            name, given, cells = "region_coverage", self.region_coverage, config.roi_size * config.coverage_subsamples
            expected: tuple[int, ...] = (boxes, cells, cells)
        else:
            name, given, side = "prompt_coverage", self.prompt_coverage, config.patches_per_side
            tiles = sum(num_tiles(self.tile_grids[image].tolist()) for row in self.shown_images for image in row)
            expected = (tiles, config.num_region_prompts, side, side)
        self._check_own_pixels(config, boxes)
        if given is None or tuple(given.shape) != expected:
            found = "missing" if given is None else tuple(given.shape)
            raise ValueError(
                f"{name} must have shape {expected} under region_conditioning={config.region_conditioning!r}, got "
                f"{found}: build the processor with PerceptionDLMProcessor.from_config(model.config, tokenizer)"
            )

    def _check_own_pixels(self, config: PerceptionDLMConfig, regions: int) -> None:
        """Refuse regions without the crops and colours that this model was trained with, or with others."""
        side = config.region_crop_size
        wanted: dict[str, tuple[int, ...] | None] = {
            "region_crops": (regions, 3, side, side) if side else None,
            "crop_boxes": (regions, 4) if side else None,
            "region_appearance": (regions, config.roi_size**2, 6) if config.region_appearance else None,
        }
        for name, shape in wanted.items():
            given = getattr(self, name)
            if shape is not None and (given is None or tuple(given.shape) != shape):
                found = "missing" if given is None else tuple(given.shape)
                raise ValueError(
                    f"{name} must have shape {shape} for this model, got {found}: build the processor with "
                    "PerceptionDLMProcessor.from_config(model.config, tokenizer)"
                )


def check_tokens(ids: torch.Tensor, config: PerceptionDLMConfig) -> None:
    """Refuse token ids of another tokenizer."""
    vocabulary = config.text_config.vocab_size
    if not 0 <= int(ids.min()) <= (largest := int(ids.max())) < vocabulary:
        raise ValueError(f"input_ids hold {largest}, the model's vocabulary has {vocabulary} tokens")


def _of(tensor: torch.Tensor | None, index: torch.Tensor) -> torch.Tensor | None:
    return None if tensor is None else tensor[index]
