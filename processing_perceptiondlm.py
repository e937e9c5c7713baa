"""Processor of PerceptionDLM: tiling, regions as coverage and boxes, the prompt, batching and post-processing.

Keys of a batch (the model documents none of them again). B rows, L prompt tokens, T tiles and R regions over all rows,
s tile side in pixels, P patches per tile side, K region prompts:

    input_ids        (B, L) int64     prompt; answers are appended by the model
    attention_mask   (B, L) int64     1 for tokens, 0 for padding (on the right)
    token_roles      (B, L) int64     SHARED, ROI or SEPARATOR of sequence_perceptiondlm
    region_ids       (B, L) int64     region of a RoI or separator token within its row, -1 elsewhere
                                      (of a shared token the turn from which on it is seen, -1 always: training alone)
    num_regions      (B,) int64       regions of each row, 0 for plain text
    sample_ids       (B,) int64       which sample a row belongs to: an image may need several passes, hence rows
    pixel_values     (T, 3, s, s) uint8     tiles in row-major order, thumbnail last; the model normalises them. Floats
                                            are normalised already
    tile_grids       (images, 2) int64      columns and rows of each image
    image_sizes      (images, 2) int64      height and width of each image in pixels
    image_ids        (B,) int64             image of each row, where several rows show groups of one image's regions
    region_boxes     (R, 4) int64           half-open boxes x0, y0, x1, y1 in pixels of the original image
    region_coverage  (R, c, c) float32      under `replay`: share of each cell of the box the mask covers, in [0, 1]
    region_crops     (R, 3, c, c) uint8     with `region_crop_size` c: crops around the regions, like `pixel_values`
    crop_boxes       (R, 4) float32         the regions' boxes as fractions of their crops; zeros where one is skipped
    region_appearance (R, bins², 6) float32 with `region_appearance`: mean and spread of the colours under the mask
    prompt_coverage  (T, K, P, P) float32   under `vision`: share of each patch covered by the region with prompt id k
    prompt_ids       (R,) int64             under `vision`: prompt id of each region
    region_order     (R,) int64             with `sort_regions`: place of each region in the order it was given
"""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature
from transformers.processing_utils import ProcessorMixin

from .configuration_perceptiondlm import (
    ATTENTION_LAYOUTS,
    LAYOUTS,
    REGION_CONDITIONINGS,
    nearest_sampling,
    num_tiles,
)
from .coverage_perceptiondlm import Region
from .focal_perceptiondlm import OwnPixels
from .images_perceptiondlm import is_encoded, read_image
from .pipeline_perceptiondlm import RegionCaptioningPipeline  # noqa: F401 - registers the task with the processor
from .regions_perceptiondlm import regions_of
from .sequence_perceptiondlm import ROI, SEPARATOR, SHARED


IMAGE_TOKEN, IMAGE_START, IMAGE_END = "<IMG_CONTEXT>", "<img>", "</img>"
ROI_TOKEN, CAPTION_TOKEN, PROMPT_TOKEN = "<|reserved_token_{}|>", "<|Mask_Cap_{}|>", "<Prompt{}>"
MASK_TOKEN, END_OF_TURN, END_OF_TEXT = "<|mdm_mask|>", "<|eot_id|>", "<|endoftext|>"
START_HEADER = "<|start_header_id|>"
MASK_SAMPLINGS = ("area", "nearest")
REGION_FORMS = ("masks", "boxes", "label_map", "points")


# LLaDA's chat format. Images stand where the message puts them; an assistant header is opened on request. `generation`
# marks what the assistant says: `return_assistant_tokens_mask` and training find the answers by it. The variants of
# other checkpoints are built in checkpoints/.
CHAT_TEMPLATE = (
    "{% macro body(content) %}{% if content is string %}{{ content }}{% else %}{% for part in content %}"
    "{% if part['type'] == 'image' %}{{ '<img><IMG_CONTEXT></img>' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{% endmacro %}"
    "{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>{{ '\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ body(message['content']) }}<|eot_id|>{% endgeneration %}"
    "{% else %}{{ body(message['content']) }}<|eot_id|>{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>{{ '\\n' }}{% endif %}"
)


class PerceptionDLMProcessor(ProcessorMixin):
    """Turns images, regions and text into model inputs, and generated ids back into captions.

    Args:
        tokenizer: a tokenizer that knows LLaDA's and PerceptionDLM's special tokens.
        chat_template (`str`, *optional*): Jinja template, by default LLaDA's chat format.
        tile_size (`int`, defaults to 512): side of a tile in pixels.
        patch_size (`int`), pixel_unshuffle (`int`): as in the model's config; an image token covers
            `patch_size * pixel_unshuffle` pixels.
        max_tiles (`int`, defaults to 6): most grid tiles of one image, thumbnail not counted.
        image_mean, image_std (`list[float]`): the model normalises the tiles, by its own config. Other values than its
            default of 0.5 are applied here, and the tiles are then float32.
        region_conditioning, attention_layout (`str`), use_roi_replay (`bool`), num_region_prompts, roi_size,
            coverage_subsamples (`int`): as in the model's config; use `from_config` to keep them in step.
        region_crop_size (`int`), region_appearance (`bool`): as in the model's config.
        crop_context (`float`, defaults to 1.3): side of a crop over the longer side of its region's box.
        crop_max_share (`float`, defaults to 1.0): regions whose box covers more of the image go without a crop.
        max_regions_per_pass (`int`, *optional*): split an image's regions into passes of at most this many. Under
            `vision` a pass never holds more than `num_region_prompts`.
        mask_sampling (`str`): under `vision`, `"area"` gives the share of a patch that a mask covers; `"nearest"` asks
            one pixel per patch of the resized mask, as the published weights know it, where small regions can vanish.
        mask_threshold (`int`, defaults to 128): grey level from which a pixel of a lossily compressed mask picture
            belongs to the region. The published weights take every level but 0.
        sort_regions (`bool`): whether regions enter the sequence by area, largest first, as the published weights
            know it. Captions come back in the order given in any case.
        system_prompt (`str`, *optional*), region_question (`str`): the turns of a region prompt.
    """

    def __init__(
        self,
        tokenizer=None,
        chat_template=None,
        tile_size=512,
        patch_size=16,
        pixel_unshuffle=2,
        max_tiles=6,
        image_mean=(0.5, 0.5, 0.5),
        image_std=(0.5, 0.5, 0.5),
        region_conditioning="replay",
        attention_layout="isolated",
        use_roi_replay=True,
        num_region_prompts=6,
        roi_size=4,
        coverage_subsamples=2,
        region_crop_size=0,
        region_appearance=False,
        crop_context=1.3,
        crop_max_share=1.0,
        max_regions_per_pass=None,
        mask_sampling="area",
        mask_threshold=128,
        sort_regions=False,
        system_prompt="You are a helpful assistant.",
        region_question="Describe each masked region in detail.",
    ):
        self.tile_size, self.patch_size, self.pixel_unshuffle = tile_size, patch_size, pixel_unshuffle
        self.max_tiles = max_tiles
        self.image_mean, self.image_std = list(image_mean), list(image_std)
        self.region_conditioning, self.attention_layout = region_conditioning, attention_layout
        self.use_roi_replay, self.num_region_prompts = use_roi_replay, num_region_prompts
        self.roi_size, self.coverage_subsamples = roi_size, coverage_subsamples
        self.region_crop_size, self.region_appearance = region_crop_size, region_appearance
        self.crop_context, self.crop_max_share = crop_context, crop_max_share
        self.max_regions_per_pass = max_regions_per_pass
        self.mask_sampling, self.mask_threshold = mask_sampling, mask_threshold
        self.sort_regions = sort_regions
        self.system_prompt, self.region_question = system_prompt, region_question
        self._check_switches()
        super().__init__(tokenizer, chat_template=chat_template or CHAT_TEMPLATE)

    def _check_switches(self) -> None:
        """Raise `ValueError` naming the setting, its value and what is accepted."""
        choices = {"region_conditioning": REGION_CONDITIONINGS, "attention_layout": ATTENTION_LAYOUTS}
        for name, accepted in {**choices, "mask_sampling": MASK_SAMPLINGS}.items():
            if getattr(self, name) not in accepted:
                raise ValueError(f"{name} must be one of {accepted}, got {getattr(self, name)!r}")
        sizes = ("tile_size", "patch_size", "pixel_unshuffle", "max_tiles", "num_region_prompts", "roi_size")
        for name in (*sizes, "coverage_subsamples", "mask_threshold"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {getattr(self, name)!r}")
        if self.mask_threshold > 255:
            raise ValueError(f"mask_threshold must be in [1, 255], got {self.mask_threshold}")
        if self.crop_context < 1 or not 0 <= self.crop_max_share <= 1:
            raise ValueError(
                f"crop_context must be at least 1 and crop_max_share in [0, 1], got {self.crop_context!r} and "
                f"{self.crop_max_share!r}"
            )
        if type(self.sort_regions) is not bool:
            raise ValueError(f"sort_regions must be True or False, got {self.sort_regions!r}")

    @classmethod
    def from_config(cls, config, tokenizer, **overrides: Any) -> "PerceptionDLMProcessor":
        """A processor whose sizes and switches are those of a [`PerceptionDLMConfig`]."""
        shared = (
            "region_conditioning",
            "attention_layout",
            "use_roi_replay",
            "num_region_prompts",
            "roi_size",
            "region_crop_size",
            "region_appearance",
        )
        fields = {name: getattr(config, name) for name in (*shared, "coverage_subsamples", "pixel_unshuffle")}
        fields |= {
            "tile_size": config.vision_config.image_size,
            "patch_size": config.vision_config.patch_size,
        }
        return cls(tokenizer, **{**fields, **overrides})

    @property
    def model_input_names(self) -> list[str]:
        return [
            "input_ids", "attention_mask", "token_roles", "region_ids", "num_regions", "sample_ids", "pixel_values",
            "tile_grids", "image_sizes", "image_ids", "region_boxes", "region_coverage", "region_crops", "crop_boxes",
            "region_appearance", "prompt_coverage", "prompt_ids", "region_order",
        ]  # fmt: skip

    @property
    def own_pixels(self) -> OwnPixels:
        """What regions bring besides their image's tiles."""
        return OwnPixels(
            self.region_crop_size, self.region_appearance, self.crop_context, self.crop_max_share, self.roi_size
        )

    @property
    def patches_per_side(self) -> int:
        """P: patches along one side of a tile."""
        return self.tile_size // self.patch_size

    @property
    def tokens_per_tile(self) -> int:
        """Image tokens of one tile."""
        return (self.patches_per_side // self.pixel_unshuffle) ** 2

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        masks: Any = None,
        boxes: Any = None,
        label_map: Any = None,
        points: Any = None,
        prompt_ids: Any = None,
        max_regions_per_pass: int | None = None,
        max_tiles: int | None = None,
        exif: str | None = None,
        resize_masks: bool = False,
        return_tensors: str = "pt",
        **kwargs: Any,
    ) -> BatchFeature:
        """Build a batch, either of regions to caption or of text (with or without images) to continue.

        Args:
            images: one image or a list of them (see `load_image` for what an image may be; an `EncodedImage` stands for
                its image and gives no `pixel_values`); with text and no regions
                also a list of lists, the images of each text.
            text: with regions, the question instead of `region_question` (one, or one per image). Without, a question,
                or a prompt rendered by `apply_chat_template` (one, or one per sample).
            masks, boxes, label_map: the regions, in any form of `regions_of`; one of the three. For a list of images,
                a list with the regions of each. An image without regions gives no row.
            points: refused by name: a segmenter makes masks of them.
            prompt_ids: under `vision`, the prompt id of each region, different ones within a pass (a list; for a list
                of images a list of lists). By default 0, 1, ... in the order of the sequence.
            max_regions_per_pass, max_tiles: override the processor's.
            exif: whether regions refer to the pixels as `"stored"` or to the picture with its EXIF orientation
                `"applied"`, as transformers' and OpenCV's loaders show it. By default as stored, with a warning where
                the two differ and the regions do not tell.
            resize_masks: fit masks and label maps of other sizes to the image, by nearest neighbour.
            return_tensors: only "pt".
        Returns:
            `BatchFeature` with the keys listed at the top of this file.
        Raises:
            ValueError, TypeError: naming what was wrong and what is accepted.
        """
        absent = {name for name in ("videos", "audio") if kwargs.get(name) is None}  # named by apply_chat_template
        unknown = sorted(set(kwargs) - {"padding", "add_special_tokens"} - absent)
        if unknown:
            raise TypeError(f"unknown processor keywords {unknown}")
        if return_tensors != "pt":
            raise ValueError(f"return_tensors must be 'pt', got {return_tensors!r}")
        regions = dict(zip(REGION_FORMS, (masks, boxes, label_map, points), strict=True))
        given = [name for name, value in regions.items() if value is not None]
        if len(given) > 1:
            raise ValueError(f"give regions in one form, got {given}")
        if given:
            form, value = given[0], regions[given[0]]
            rows = self.region_rows(
                images, text, form, value, max_regions_per_pass, max_tiles, prompt_ids, exif, resize_masks
            )
            if not rows:
                accepted = "at least 1 in a batch (the pipeline gives [] for an image without regions)"
                raise ValueError(f"{form} holds no region; accepted: {accepted}")
        elif text is None:
            raise ValueError("nothing to do: give regions (masks, boxes or label_map) to caption, or text to answer")
        else:
            rows = self.text_rows(images, text, max_tiles, exif)
        return self.collate(rows)

    # --- rows -----------------------------------------------------------------------------------------------------

    def region_rows(
        self,
        images,
        text,
        form: str,
        regions,
        max_regions_per_pass=None,
        max_tiles=None,
        prompt_ids=None,
        exif=None,
        resize_masks=False,
    ) -> list[dict]:
        """One row per pass of every image; none of an image without regions."""
        if images is None:
            raise ValueError(f"{form} were given without an image")
        batched = isinstance(images, (list, tuple))
        images = list(images) if batched else [images]
        if not images:
            raise ValueError("images is an empty list; accepted: at least one image")
        regions = list(regions) if batched and isinstance(regions, (list, tuple)) else [regions]
        if len(regions) != len(images):
            raise ValueError(f"{len(images)} images need {len(images)} entries of {form}, got {len(regions)}")
        ids = [None] * len(images) if prompt_ids is None else list(prompt_ids) if batched else [prompt_ids]
        if len(ids) != len(images):
            raise ValueError(f"{len(images)} images need {len(images)} lists of prompt_ids, got {len(ids)}")
        questions = self._per_sample(text, len(images)) if text is not None else [self.region_question] * len(images)
        rows = []
        for index, (image, region, question, given) in enumerate(zip(images, regions, questions, ids, strict=True)):
            passes = self.region_passes(
                image, form, region, max_regions_per_pass, max_tiles, given, exif, resize_masks,
                suffix=f"[{index}]" if batched else "",
            )  # fmt: skip
            rows += self.lay_out(passes, question, index)
        return rows

    def region_passes(
        self,
        image,
        form: str,
        regions,
        max_regions_per_pass=None,
        max_tiles=None,
        prompt_ids=None,
        exif=None,
        resize_masks=False,
        suffix: str = "",
    ) -> list[dict]:
        """Everything of an image's rows but the prompt: tiles, boxes and coverage, a dict per pass.

        Regions are read and measured one by one; none is kept but under `mask_sampling="nearest"`.

        Args:
            suffix: stands behind the names of image and regions in messages.
        """
        if self.region_conditioning == "none":
            raise ValueError(f"{form} were given to a base model, which knows no regions: ask it with text alone")
        tiles, grid, size, turned, picture = self._picture(image, max_tiles, f"image{suffix}", exif)
        own_pixels = self.own_pixels
        picture = own_pixels.checked(picture, size, f"image{suffix}")
        found = regions_of(
            size, **{form: regions}, name=f"{form}{suffix}", threshold=self.mask_threshold, resize_masks=resize_masks,
            size_hint=f"; the picture carries EXIF orientation {turned}, see exif" if turned != 1 else "",
        )  # fmt: skip
        nearest = self.region_conditioning == "vision" and self.mask_sampling == "nearest"
        kept, boxes, areas, features, own, told = [], [], [], [], [], True
        for region in found:
            boxes.append(region.box)
            areas.append(region.area)
            own.append(own_pixels.measure(picture, region) if own_pixels.wanted else {})
            told = told and region.tells_size
            if nearest:
                kept.append(region)
            else:
                features.append(self._coverage(region, grid))
        if turned != 1 and boxes and not (told and turned >= 5 and size[0] != size[1]):
            warn_of_orientation(f"image{suffix}", turned)
        order = np.array(areas).argsort()[::-1] if self.sort_regions else np.arange(len(boxes))
        passes = []
        for group in self._groups(len(boxes), max_regions_per_pass):
            chosen = order[group]
            numbers = self._prompt_ids(prompt_ids, chosen, len(boxes), f"prompt_ids{suffix}")
            row = {"tiles": tiles, "grids": [grid], "sizes": [size], "numbers": numbers}
            row["boxes"] = np.array([boxes[index] for index in chosen], dtype=np.int64)
            row |= {"order": chosen} if self.sort_regions else {}
            if nearest:
                cut, step = lambda picture: self._cut(picture, grid), self.patch_size
                measured = [nearest_sampling(kept[i], k, cut, step) for i, k in zip(chosen, numbers, strict=True)]
            else:
                measured = [features[index] for index in chosen]
            row |= own_pixels.of_pass([own[index] for index in chosen], self._as_tiles)
            passes.append(row | self._coverage_of_pass(measured, numbers))
        return passes

    def lay_out(self, passes: list[dict], question: str, sample: int) -> list[dict]:
        """Rows of an image's passes: their prompts beside what `region_passes` made of image and regions."""
        if not passes:
            return []
        before, after = self._region_prompt(question)
        return [
            {**row, "sample_id": sample, **self._sequence(before, after, row["grids"][0], row["numbers"])}
            for row in passes
        ]

    def _prompt_ids(self, given, chosen: np.ndarray, count: int, name: str) -> np.ndarray:
        """Prompt ids of the regions `chosen` for a pass, out of those given for all regions of an image."""
        if given is None:
            return np.arange(len(chosen))
        accepted = f"one id below {self.num_region_prompts} per region, different ones within a pass, under 'vision'"
        ids = np.asarray(given)
        if self.region_conditioning != "vision" or ids.shape != (count,) or ids.dtype.kind not in "iu":
            raise ValueError(f"{name} is {given!r} for {count} regions; accepted: {accepted}")
        ids = ids[chosen].astype(np.int64)
        if len(set(ids.tolist())) < len(ids) or ids.min() < 0 or ids.max() >= self.num_region_prompts:
            raise ValueError(f"{name} gives a pass the ids {ids.tolist()}; accepted: {accepted}")
        return ids

    def text_rows(self, images, text, max_tiles=None, exif=None) -> list[dict]:
        """One row per text; each may have several images."""
        texts = self._texts(text, 1)
        if images is None:
            images = [[] for _ in texts]
        elif not isinstance(images, (list, tuple)):
            images = [[images]]
        elif not any(isinstance(entry, (list, tuple)) for entry in images):
            images = [list(images)] if len(texts) == 1 else [[image] for image in images]
        else:
            images = [entry if isinstance(entry, (list, tuple)) else [entry] for entry in images]
        if len(images) != len(texts):
            raise ValueError(f"{len(texts)} texts need {len(texts)} lists of images, got {len(images)}")
        rows = []
        for index, (prompt, group) in enumerate(zip(texts, images, strict=True)):
            names = [f"images[{index}][{place}]" for place in range(len(group))]
            pictures = [self._picture(*each, exif) for each in zip(group, [max_tiles] * len(group), names, strict=True)]
            grids = [grid for _, grid, *_ in pictures]
            tiles = [tiles for tiles, *_ in pictures if tiles is not None]
            ids = self._expand_images(self._tokenize(self._wrap(prompt, len(group))), grids, f"text[{index}]")
            rows.append(
                {
                    "sample_id": index,
                    "ids": ids,
                    "roles": [SHARED] * len(ids),
                    "regions": [-1] * len(ids),
                    "num_regions": 0,
                    "tiles": np.concatenate(tiles) if tiles else None,
                    "grids": grids,
                    "sizes": [size for _, _, size, *_ in pictures],
                }
            )
        return rows

    def _picture(self, image, max_tiles: int | None, name: str, exif: str | None):
        """Tiles, grid, (height, width), undecided EXIF orientation and the picture itself, as it was tiled.

        An `EncodedImage` has no tiles any more, and its picture only where the model needs it.
        """
        if is_encoded(image):
            grid, size = image.tile_grids[0].tolist(), image.image_sizes[0].tolist()
            return None, tuple(grid), tuple(size), 1, image.picture
        image, turned = read_image(image, name, exif)
        tiles, grid = self.tile(image, max_tiles)
        return tiles, grid, (image.height, image.width), turned, image

    def _groups(self, count: int, limit: int | None) -> list[slice]:
        """Split `count` regions into passes, in order."""
        limit = limit if limit is not None else self.max_regions_per_pass
        if limit is not None and (type(limit) is not int or limit < 1):
            raise ValueError(f"max_regions_per_pass must be an integer of at least 1, got {limit!r}")
        if self.region_conditioning == "vision":
            limit = min(limit or self.num_region_prompts, self.num_region_prompts)
        step = limit or max(count, 1)
        return [slice(start, min(start + step, count)) for start in range(0, count, step)]

    @staticmethod
    def _texts(text, count: int) -> list[str]:
        """A list of texts, one text repeated `count` times; anything else is refused by its place."""
        if isinstance(text, str):
            return [text] * count
        if not isinstance(text, Sequence) or isinstance(text, bytes):
            raise TypeError(f"text must be a string or a list of strings, got {type(text).__name__}")
        for index, item in enumerate(text):
            if not isinstance(item, str):
                raise TypeError(f"text must be a string or a list of strings, text[{index}] is {type(item).__name__}")
        if not text:
            raise ValueError("text is an empty list; accepted: at least one text")
        return list(text)

    def _per_sample(self, text, count: int) -> list[str]:
        texts = self._texts(text, count)
        if len(texts) != count:
            raise ValueError(f"{count} images need one text or {count}, got {len(texts)}")
        return texts

    # --- prompt ---------------------------------------------------------------------------------------------------

    def _region_prompt(self, question: str) -> tuple[list[int], list[int]]:
        """Token ids before and after the RoI span of the single-region prompt."""
        special = [token for token in self.tokenizer.all_special_tokens if token in question]
        if special:
            raise ValueError(f"a region question may not contain special tokens, found {special}")
        place = ROI_TOKEN.format(0) + "\n"
        content = [{"type": "image"}, {"type": "text", "text": place + question}]
        messages = [{"role": "user", "content": content}]
        if self.system_prompt:
            messages.insert(0, {"role": "system", "content": self.system_prompt})
        before, after = self.apply_chat_template(messages, add_generation_prompt=True).split(place)
        return self._tokenize(before), self._tokenize(after)

    def _sequence(self, before: list[int], after: list[int], grid, prompt_ids: np.ndarray) -> dict:
        """Shared tokens with the regions' RoI spans between them: ids, roles and region ids."""
        head = self._expand_images(before, [grid], "region prompt")
        ids, roles, regions = list(head), [SHARED] * len(head), [-1] * len(head)
        newline = self._tokenize("\n")
        layout = LAYOUTS[self.attention_layout]
        numbers = range(len(prompt_ids)) if layout.numbered_by_place else prompt_ids.tolist()
        for region, number in enumerate(numbers if self.use_roi_replay else ()):
            place = number if self.region_conditioning == "vision" else 0
            roi = self.tokenizer.convert_tokens_to_ids(ROI_TOKEN.format(place))
            ids += [roi] * self.roi_size**2 + newline
            roles += [ROI] * self.roi_size**2 + [SEPARATOR] * len(newline)
            regions += [region] * (self.roi_size**2 + len(newline))
        if self.use_roi_replay and layout.last_separator_shared:
            roles[-len(newline) :], regions[-len(newline) :] = [SHARED] * len(newline), [-1] * len(newline)
        ids, roles, regions = ids + after, roles + [SHARED] * len(after), regions + [-1] * len(after)
        return {"ids": ids, "roles": roles, "regions": regions, "num_regions": len(prompt_ids)}

    def _wrap(self, text: str, num_images: int) -> str:
        """Put a bare question into a user turn behind its images; a rendered prompt stays as it is."""
        if START_HEADER in text:
            return text
        content = [{"type": "image"}] * num_images + [{"type": "text", "text": text}]
        return self.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)

    def _tokenize(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _expand_images(self, ids: list[int], grids: list[tuple[int, int]], name: str) -> list[int]:
        """Repeat every image placeholder for each token of its tiles."""
        image_token = self.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        places = ids.count(image_token)
        if places != len(grids):
            raise ValueError(f"{name} has {places} image placeholders ({IMAGE_TOKEN}) for {len(grids)} images")
        counts = iter(num_tiles(grid) * self.tokens_per_tile for grid in grids)
        return [token for i in ids for token in ([i] * next(counts) if i == image_token else [i])]

    def region_text_length(self) -> int:
        """Tokens of the fixed text of a region prompt, its turns and the question."""
        before, after = self._region_prompt(self.region_question)
        return len(before) - 1 + len(after)  # the image's placeholder is not text

    def prompt_length(self, size: tuple[int, int], num_regions: int, max_tiles: int | None = None) -> int:
        """Tokens that an image of (width, height) pixels with this many regions takes, the fixed text left out."""
        grid = self._grid(size, max_tiles)
        return num_tiles(grid) * self.tokens_per_tile + num_regions * (self.roi_size**2 + 1) * self.use_roi_replay

    def _grid(self, size: tuple[int, int], max_tiles: int | None) -> tuple[int, int]:
        """Grid of an image of (width, height) pixels, under the processor's limit unless another is given."""
        return best_grid(*size, self.tile_size, self.max_tiles if max_tiles is None else max_tiles)

    # --- images and regions ---------------------------------------------------------------------------------------

    def tile(self, image: Image.Image, max_tiles: int | None = None) -> tuple[np.ndarray, tuple[int, int]]:
        """Cut an RGB image into tiles (T, 3, s, s) uint8, thumbnail last, and return the grid (columns, rows)."""
        grid = self._grid(image.size, max_tiles)
        return self._as_tiles(self._cut(image, grid)), grid

    def _as_tiles(self, pictures: np.ndarray) -> np.ndarray:
        """Pictures (N, s, s, 3) uint8 as the model takes tiles and crops, (N, 3, s, s): see `image_mean`."""
        if {*self.image_mean, *self.image_std} != {0.5}:
            mean, std = np.array(self.image_mean, np.float32), np.array(self.image_std, np.float32)
            pictures = (pictures.astype(np.float32) / 255.0 - mean) / std
        return np.ascontiguousarray(pictures.transpose(0, 3, 1, 2))

    def _cut(self, image: Image.Image, grid: tuple[int, int]) -> np.ndarray:
        """Tiles (T, s, s, channels) uint8 of an image resized to the grid, row-major, thumbnail last."""
        side, (columns, rows) = self.tile_size, grid
        pixels = np.asarray(image.resize((columns * side, rows * side), Image.Resampling.BICUBIC))
        tiles = pixels.reshape(rows, side, columns, side, -1).swapaxes(1, 2).reshape(rows * columns, side, side, -1)
        if len(tiles) == 1:
            return tiles
        thumbnail = np.asarray(image.resize((side, side), Image.Resampling.BICUBIC))
        return np.concatenate((tiles, thumbnail.reshape(1, side, side, -1)))

    def _coverage(self, region: Region, grid: tuple[int, int]) -> np.ndarray:
        """Share that a region covers of the cells of its box, (c, c), or under `vision` of every patch, (T, P, P)."""
        if self.region_conditioning == "replay":
            return region.coverage(self.roi_size * self.coverage_subsamples)
        (columns, rows), patches = grid, self.patches_per_side
        height, width = region.image_size

        def share(columns: int, rows: int) -> np.ndarray:
            x_edges, y_edges = (
                np.linspace(0, length, n * patches + 1) for length, n in ((width, columns), (height, rows))
            )
            cover = region.pool(x_edges, y_edges).reshape(rows, patches, columns, patches)
            return cover.transpose(0, 2, 1, 3).reshape(rows * columns, patches, patches)

        return share(1, 1) if columns * rows == 1 else np.concatenate((share(columns, rows), share(1, 1)))

    def _coverage_of_pass(self, measured: list[np.ndarray], numbers: np.ndarray) -> dict:
        """The coverage of a pass's regions, under `vision` each at its prompt id."""
        if self.region_conditioning == "replay":
            return {"coverage": np.stack(measured)}
        tiles, patches = measured[0].shape[0], self.patches_per_side
        coverage = np.zeros((tiles, self.num_region_prompts, patches, patches), np.float32)
        coverage[:, numbers] = np.stack(measured, axis=1)
        return {"prompt_coverage": coverage, "prompt_ids": numbers}

    # --- batch ----------------------------------------------------------------------------------------------------

    def collate(self, rows: list[dict]) -> BatchFeature:
        """Pad the rows' sequences on the right and concatenate everything else."""
        length = max(len(row["ids"]) for row in rows)
        pad_id = self.tokenizer.convert_tokens_to_ids(END_OF_TEXT)

        def padded(name: str, fill: int) -> torch.Tensor:
            return torch.tensor([row[name] + [fill] * (length - len(row[name])) for row in rows])

        data = {
            "input_ids": padded("ids", pad_id),
            "attention_mask": torch.tensor([[1] * len(r["ids"]) + [0] * (length - len(r["ids"])) for r in rows]),
            "token_roles": padded("roles", SHARED),
            "region_ids": padded("regions", -1),
            "num_regions": torch.tensor([row["num_regions"] for row in rows]),
            "sample_ids": torch.tensor([row["sample_id"] for row in rows]),
        }
        if any(row["grids"] for row in rows):
            first = first_rows_of_images(rows)
            if len(set(first)) < len(rows):
                data["image_ids"] = torch.tensor(first).unique(return_inverse=True)[1]
            pictured = [rows[place] for place in sorted(set(first))]
            if tiles := [row["tiles"] for row in pictured if row["tiles"] is not None]:
                data["pixel_values"] = torch.from_numpy(np.concatenate(tiles))
            data["tile_grids"] = torch.tensor([grid for row in pictured for grid in row["grids"]])
            data["image_sizes"] = torch.tensor([size for row in pictured for size in row["sizes"]])
        for key, name in (
            ("boxes", "region_boxes"),
            ("coverage", "region_coverage"),
            ("crops", "region_crops"),
            ("crop_boxes",) * 2,
            ("appearance", "region_appearance"),
            ("prompt_coverage",) * 2,
            ("prompt_ids",) * 2,
            ("order", "region_order"),
        ):
            if found := [row[key] for row in rows if key in row]:
                data[name] = torch.from_numpy(np.concatenate(found))
        return BatchFeature(data)

    # --- answers --------------------------------------------------------------------------------------------------

    def encode_answers(
        self, answers: Sequence[str], num_slots: int, max_slots: int | None = None, cut: bool = False
    ) -> torch.Tensor:
        """Answers as training targets, each ended by the end-of-turn token and filled with end-of-text tokens.

        Args:
            num_slots: an answer takes the smallest multiple of this many slots that holds it and its end.
            max_slots: most slots of an answer, by default `num_slots`; one that fills them has no end.
            cut: shorten longer answers instead of refusing them.
        Returns:
            (A, G) ids, G the most slots of any answer; -100 behind the slots of the others.
        Raises:
            ValueError: naming an answer that is too long or empty.
        """
        limit = max_slots or num_slots
        end, fill = self.tokenizer.convert_tokens_to_ids([END_OF_TURN, END_OF_TEXT])
        targets = []
        for index, answer in enumerate(answers):
            ids = self._tokenize(answer)
            if not ids or (len(ids) > limit and not cut):
                raise ValueError(f"answer {index} has {len(ids)} tokens, accepted are 1 to {limit}: {answer[:80]!r}")
            slots = min(-(-(len(ids) + 1) // num_slots) * num_slots, limit)
            ids = [*ids, end][:slots]
            targets.append(torch.tensor(ids + [fill] * (slots - len(ids))))
        return torch.nn.utils.rnn.pad_sequence(targets, batch_first=True, padding_value=-100)

    def decode_answers(self, output) -> list[dict[str, Any]]:
        """Every answer's text up to its end token and its score, the mean probability of the tokens it is made of.

        Returns:
            one `{"text": str, "score": float in [0, 1], "sample": int}` per answer, in the output's order.
        """
        ends = set(self.tokenizer.convert_tokens_to_ids([END_OF_TURN, END_OF_TEXT]))
        answers = []
        for ids, confidences, sample in zip(
            output.sequences.tolist(), output.confidences.tolist(), output.sample_ids.tolist(), strict=True
        ):
            length = next((i for i, token in enumerate(ids) if token in ends), len(ids))
            used = confidences[: length + 1]  # the end token is part of the decision
            text = self.tokenizer.decode(ids[:length], skip_special_tokens=True).strip()
            answers.append({"text": text, "score": sum(used) / len(used), "sample": sample})
        return answers

    def post_process_region_captions(
        self, output, output_scores: bool = False, num_images: int | None = None
    ) -> list[list]:
        """Captions of `generate`'s output: one list per image, in the order its regions were given.

        Args:
            output_scores: return `{"caption", "score"}` instead of strings.
            num_images: images of the batch, where the last of them may have no regions.
        """
        answers = self.decode_answers(output)
        captions: list[list] = [[] for _ in range(num_images or max(a["sample"] for a in answers) + 1)]
        for answer in answers:
            scored = {"caption": answer["text"], "score": answer["score"]}
            captions[answer["sample"]].append(scored if output_scores else scored["caption"])
        return captions

    def post_process_image_text_to_text(self, generated_outputs, **_kwargs: Any) -> list[str]:
        """Answers of `generate`'s output for text without regions, one string per sample."""
        return [answer["text"] for answer in self.decode_answers(generated_outputs)]


def warn_of_orientation(name: str, orientation: int) -> None:
    """Warn that a picture carries an EXIF orientation, and the regions do not tell whether it is meant."""
    warnings.warn(
        f"{name} carries EXIF orientation {orientation}; its regions are taken to refer to the pixels as stored. Say "
        "exif='stored' if that is so, exif='applied' if they refer to the picture as viewers, transformers and OpenCV "
        "show it",
        stacklevel=4,
    )


def first_rows_of_images(rows: list[dict]) -> list[int]:
    """For every row the first one that shows the same image: groups of an image's regions share their tiles."""
    if not all(len(row["grids"]) == 1 and row["num_regions"] and row["tiles"] is not None for row in rows):
        return list(range(len(rows)))
    first: dict[int, int] = {}
    return [first.setdefault(id(row["tiles"]), place) for place, row in enumerate(rows)]


def best_grid(width: int, height: int, tile_size: int, max_tiles: int) -> tuple[int, int]:
    """Grid (columns, rows) of at most `max_tiles` cells whose aspect ratio is closest to the image's.

    A tie goes to the larger grid when the image's area exceeds half of that grid's.
    """
    if max_tiles < 1:
        raise ValueError(f"max_tiles must be at least 1, got {max_tiles}")
    cells = range(1, max_tiles + 1)
    grids = sorted(((c, r) for c in cells for r in cells if c * r <= max_tiles), key=lambda grid: grid[0] * grid[1])
    best, smallest = (1, 1), float("inf")
    for columns, rows in grids:
        difference = abs(width / height - columns / rows)
        large_enough = width * height > 0.5 * tile_size**2 * columns * rows
        if difference < smallest or (difference == smallest and large_enough):
            best, smallest = (columns, rows), difference
    return best


__all__ = ["CHAT_TEMPLATE", "PerceptionDLMProcessor"]
