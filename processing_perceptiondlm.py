"""Processor of PerceptionDLM: tiles, regions as coverage and boxes, the prompt, and what `generate` returned as text.

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
    assistant_masks  (B, L) int64           with `return_assistant_tokens_mask`: 1 for tokens that the assistant said
"""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, BatchFeature
from transformers.processing_utils import ProcessorMixin
from transformers.utils import cached_file, logging

from .answers_perceptiondlm import decode_answers, encode_answers
from .batching_perceptiondlm import collate, grouped, split_options
from .configuration_perceptiondlm import PerceptionDLMConfig, num_tiles
from .focal_perceptiondlm import OwnPixels
from .image_processing_perceptiondlm import IMAGE_SETTINGS, PerceptionDLMImageProcessor, check_count
from .importable_perceptiondlm import make_importable
from .pipeline_perceptiondlm import RegionCaptioningPipeline  # noqa: F401 - registers the task with the processor
from .prompting_perceptiondlm import (
    CHAT_TEMPLATE,
    END_OF_TEXT,
    IMAGE_TOKEN,
    ROI_TOKEN,
    chat_messages,
    chats_of,
    encode,
    expand_images,
    guarded,
    is_rendered,
    region_row,
    shared_row,
)
from .region_passes_perceptiondlm import RegionReader, picture


MASK_SAMPLINGS = ("area", "nearest")
REGION_FORMS = ("masks", "boxes", "label_map", "points")
REGION_SETTINGS = ("max_regions_per_pass", "resize_masks", "share_prompt_ids")  # of a call
OWN_SETTINGS = (
    "crop_context", "crop_max_share", "max_regions_per_pass", "mask_sampling", "mask_threshold", "sort_regions",
    "system_prompt", "region_question", "score_calibration",
)  # fmt: skip
LOCATION = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
# What processors saved before they read the model's config: its fields, and those of its vision config.
FORMER_SWITCHES = (
    "region_conditioning", "attention_layout", "use_roi_replay", "num_region_prompts", "roi_size",
    "coverage_subsamples", "pixel_unshuffle", "region_crop_size", "region_appearance",
)  # fmt: skip

logger = logging.get_logger(__name__)


class PerceptionDLMProcessor(ProcessorMixin):
    """Turns images, regions and text into model inputs, and generated ids back into captions.

    How regions enter the model (`region_conditioning`, `attention_layout`, `roi_size`, ...) is read from the model's
    config, which `from_pretrained` finds beside the processor.

    Args:
        image_processor (`PerceptionDLMImageProcessor`, *optional*): cuts images into tiles of the config's size.
        tokenizer: a tokenizer that knows LLaDA's and PerceptionDLM's special tokens.
        chat_template (`str`, *optional*): Jinja template, by default LLaDA's chat format.
        config (`PerceptionDLMConfig`, *optional*): the model's, by default the default one with tiles of the image
            processor's size.
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
        score_calibration (two `float`s, *optional*): slope and intercept that take the log-odds of an answer's mean
            token probability to those of its being true, as measured on annotated regions (see `perceptiondlm evaluate
            --dataset photos`). Without them `score` is that mean.
    """

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        chat_template=None,
        config=None,
        crop_context=1.3,
        crop_max_share=1.0,
        max_regions_per_pass=None,
        mask_sampling="area",
        mask_threshold=128,
        sort_regions=False,
        system_prompt="You are a helpful assistant.",
        region_question="Describe each masked region in detail.",
        score_calibration=None,
    ):
        if image_processor is None:
            sizes = {} if config is None else {"tile_size": config.vision_config.image_size}
            image_processor = PerceptionDLMImageProcessor(**sizes)
        self.config = config_of_switches({"tile_size": image_processor.tile_size}) if config is None else config
        self.crop_context, self.crop_max_share = crop_context, crop_max_share
        self.max_regions_per_pass = max_regions_per_pass
        self.mask_sampling, self.mask_threshold = mask_sampling, mask_threshold
        self.sort_regions = sort_regions
        self.system_prompt, self.region_question = system_prompt, region_question
        self.score_calibration = score_calibration
        self.image_token = IMAGE_TOKEN
        super().__init__(image_processor, tokenizer, chat_template=chat_template or CHAT_TEMPLATE)
        self._check_settings()
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)

    def _check_settings(self) -> None:
        """Raise `ValueError` naming the setting, its value and what is accepted."""
        side = self.config.vision_config.image_size
        if self.image_processor.tile_size != side:
            raise ValueError(
                f"the image processor cuts tiles of {self.image_processor.tile_size} px, config's are {side}"
            )
        if self.mask_sampling not in MASK_SAMPLINGS:
            raise ValueError(f"mask_sampling must be one of {MASK_SAMPLINGS}, got {self.mask_sampling!r}")
        check_count("mask_threshold", self.mask_threshold)
        if self.mask_threshold > 255:
            raise ValueError(f"mask_threshold must be in [1, 255], got {self.mask_threshold}")
        if self.crop_context < 1 or not 0 <= self.crop_max_share <= 1:
            raise ValueError(
                f"crop_context must be at least 1 and crop_max_share in [0, 1], got {self.crop_context!r} and "
                f"{self.crop_max_share!r}"
            )
        pair = self.score_calibration
        if pair is not None and not (isinstance(pair, (list, tuple)) and [type(x) for x in pair] == [float, float]):
            raise ValueError(f"score_calibration must be None or two floats, slope and intercept, got {pair!r}")
        if type(self.sort_regions) is not bool:
            raise ValueError(f"sort_regions must be True or False, got {self.sort_regions!r}")

    # --- building, loading, saving --------------------------------------------------------------------------------

    @classmethod
    def from_config(cls, config, tokenizer, chat_template=None, **settings: Any) -> "PerceptionDLMProcessor":
        """The processor of a model.

        Args:
            config: a [`PerceptionDLMConfig`].
            settings: of the processor and of its image processor, but for those that the config holds.
        """
        if unknown := sorted(set(settings) - {*OWN_SETTINGS, *IMAGE_SETTINGS}):
            accepted = f"{OWN_SETTINGS + IMAGE_SETTINGS}; the model's config holds everything else"
            raise TypeError(f"unknown processor settings {unknown}; accepted: {accepted}")
        image_settings = {name: settings.pop(name) for name in IMAGE_SETTINGS if name in settings}
        image_processor = PerceptionDLMImageProcessor(tile_size=config.vision_config.image_size, **image_settings)
        return cls(image_processor, tokenizer, chat_template=chat_template, config=config, **settings)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, config=None, **kwargs: Any) -> "PerceptionDLMProcessor":
        """Load a processor and, unless `config` is given, the model's config beside it."""
        if config is None:
            location = {name: kwargs[name] for name in LOCATION if kwargs.get(name) is not None}
            config = find_config(pretrained_model_name_or_path, location)
        return super().from_pretrained(pretrained_model_name_or_path, config=config, **kwargs)

    @classmethod
    def _get_arguments_from_pretrained(cls, pretrained_model_name_or_path, processor_dict=None, **kwargs: Any) -> list:
        """Image processor and tokenizer. Processors of before kept the image settings among their own."""
        saved = processor_dict or {}
        settings = saved.get("image_processor") or {name: saved[name] for name in IMAGE_SETTINGS if name in saved}
        if (config := kwargs.pop("config", None)) is not None:
            settings = {"tile_size": config.vision_config.image_size, **settings}
        elif "tile_size" in saved:
            settings = {**settings, "tile_size": saved["tile_size"]}
        changes = {name: kwargs[name] for name in IMAGE_SETTINGS if name in kwargs}
        others = {name: value for name, value in kwargs.items() if name not in {*IMAGE_SETTINGS, *OWN_SETTINGS}}
        tokenizer = AutoTokenizer.from_pretrained(pretrained_model_name_or_path, config=config, **others)
        return [PerceptionDLMImageProcessor(**{**settings, **changes}), tokenizer]

    @classmethod
    def from_args_and_dict(cls, args, processor_dict: dict[str, Any], **kwargs: Any):
        """As the base class; without a config, the switches that processors of before kept among their settings."""
        if kwargs.get("config") is None and "region_conditioning" in processor_dict:
            kwargs["config"] = config_of_switches(processor_dict)
        return super().from_args_and_dict(args, processor_dict, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """The processor's own settings; the model's config has a file of its own."""
        return {name: value for name, value in super().to_dict().items() if name != "config"}

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs: Any) -> list[str]:
        """Save processor and tokenizer, and the model's config where the folder has none."""
        saved = find_config(save_directory, {}) if os.path.isdir(save_directory) else None
        if saved is not None and switches_of(saved) != switches_of(self.config):
            logger.warning("%s/config.json has other switches than this processor: its model decides", save_directory)
        files = super().save_pretrained(save_directory)
        if not os.path.isfile(os.path.join(save_directory, "config.json")):
            self.config.save_pretrained(save_directory)
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", os.path.basename(os.path.abspath(save_directory))), **kwargs)
        return files

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
        config = self.config
        return OwnPixels(
            config.region_crop_size, config.region_appearance, self.crop_context, self.crop_max_share, config.roi_size
        )

    # --- the call -------------------------------------------------------------------------------------------------

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        masks: Any = None,
        boxes: Any = None,
        label_map: Any = None,
        points: Any = None,
        prompt_ids: Any = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Build a batch, either of regions to caption or of text (with or without images) to continue.

        Args:
            images: one image or a list of them (see `load_image` for what an image may be; an `EncodedImage` stands for
                its image and gives no `pixel_values`); with text and no regions
                also a list of lists, the images of each text.
            text: with regions, the question instead of `region_question` (one, or one per image). Without, a question,
                or a prompt rendered by `apply_chat_template` (one, or one per sample). Special tokens in a question
                are plain text.
            masks, boxes, label_map: the regions, in any form of `regions_of`; one of the three. For a list of images,
                a list with the regions of each. An image without regions gives no row.
            points: refused by name: a segmenter makes masks of them.
            prompt_ids: under `vision`, the prompt id of each region, different ones within a pass (a list; for a list
                of images a list of lists). By default 0, 1, ... in the order of the sequence.
            share_prompt_ids: under `vision`, let regions of a pass have the same prompt id (by default 0), so that more
                than `num_region_prompts` fit into it. The paper's Table 10: it costs accuracy; splitting does not.
            max_regions_per_pass: overrides the processor's.
            resize_masks: fit masks and label maps of other sizes to the image, by nearest neighbour.
            rendered: whether text is a rendered prompt, by default if it begins with a special token.
            exif: whether regions refer to the pixels as `"stored"` or to the picture with its EXIF orientation
                `"applied"`, as transformers' and OpenCV's loaders show it. By default as stored, with a warning where
                the two differ and the regions do not tell.
            kwargs: `max_tiles` and other settings of the image processor, and a tokenizer's keywords as far as
                [`TextOptions`] has them; both may come in `images_kwargs` and `text_kwargs`. return_tensors: only "pt".
        Returns:
            `BatchFeature` with the keys listed at the top of this file.
        Raises:
            ValueError, TypeError: naming what was wrong and what is accepted.
        """
        options, left = split_options(grouped(kwargs))
        image_settings = {name: left.pop(name) for name in IMAGE_SETTINGS if name in left}
        region_settings = {name: left.pop(name) for name in REGION_SETTINGS if name in left}
        rendered = left.pop("rendered", None)
        if left:
            raise TypeError(f"unknown processor keywords {sorted(left)}")
        regions = dict(zip(REGION_FORMS, (masks, boxes, label_map, points), strict=True))
        given = [name for name, value in regions.items() if value is not None]
        if len(given) > 1:
            raise ValueError(f"give regions in one form, got {given}")
        if given:
            form = given[0]
            rows = self.region_rows(images, text, form, regions[form], prompt_ids, **region_settings, **image_settings)
            if not rows:
                accepted = "at least 1 in a batch (the pipeline gives [] for an image without regions)"
                raise ValueError(f"{form} holds no region; accepted: {accepted}")
        elif text is None:
            raise ValueError("nothing to do: give regions (masks, boxes or label_map) to caption, or text to answer")
        else:
            rows = self.text_rows(images, text, rendered=rendered, **image_settings)
        return collate(rows, self._end_of_text, options)

    def collate(self, rows: list[dict], **text_kwargs: Any) -> BatchFeature:
        """A batch of rows, under a tokenizer's keywords `text_kwargs`."""
        options, unknown = split_options(text_kwargs)
        if unknown:
            raise TypeError(f"unknown processor keywords {sorted(unknown)}")
        return collate(rows, self._end_of_text, options)

    @property
    def _end_of_text(self) -> int:
        return self.tokenizer.convert_tokens_to_ids(END_OF_TEXT)

    def apply_chat_template(self, conversation, *args: Any, tokenize: bool = False, **kwargs: Any) -> Any:
        """As the base class; with `tokenize=True` special tokens in the messages' texts are plain text.

        An image part names its image by one of `image` (in any form of `load_image`), `url`, `path` and `base64`. A
        prompt that is returned as a string holds the messages' texts as they are.
        """
        given, batched = chats_of(conversation)
        chats = [
            chat_messages(chat, lambda text: guarded(text, self.tokenizer) if tokenize else text) for chat in given
        ]
        messages = chats if batched else chats[0]
        if not tokenize:
            return super().apply_chat_template(conversation, *args, **kwargs)
        own = {**(kwargs.pop("processor_kwargs", None) or {}), "rendered": True}
        kwargs.pop("sanitize_control_tokens", None)  # it is done in any case
        if kwargs.get("return_tensors", "pt") in ("auto", None):
            kwargs["return_tensors"] = "pt"
        batch = super().apply_chat_template(messages, *args, tokenize=True, processor_kwargs=own, **kwargs)
        if isinstance(batch, BatchFeature) and "assistant_masks" in batch:
            batch["assistant_masks"] = torch.as_tensor(batch["assistant_masks"])
        return batch

    # --- rows -----------------------------------------------------------------------------------------------------

    def region_rows(self, images, text, form: str, regions, prompt_ids=None, **settings: Any) -> list[dict]:
        """One row per pass of every image; none of an image without regions. `settings`: see `region_passes`."""
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
        questions = [self.region_question] * len(images) if text is None else checked_texts(text, len(images))
        if len(questions) != len(images):
            raise ValueError(f"{len(images)} images need one text or {len(images)}, got {len(questions)}")
        rows = []
        for index, (image, region, question, given) in enumerate(zip(images, regions, questions, ids, strict=True)):
            suffix = f"[{index}]" if batched else ""
            passes = self.region_passes(image, form, region, prompt_ids=given, suffix=suffix, **settings)
            rows += self.lay_out(passes, question, index)
        return rows

    def region_passes(self, image, form: str, regions, prompt_ids=None, **settings: Any) -> list[dict]:
        """Everything of an image's rows but the prompt: tiles, boxes and coverage, a dict per pass.

        Args:
            settings: `max_regions_per_pass`, `resize_masks`, `share_prompt_ids`, `suffix` (stands behind the names of
                image and regions in messages) and settings of the image processor.
        """
        changes = {name: settings.pop(name) for name in IMAGE_SETTINGS if name in settings}
        if settings.get("max_regions_per_pass") is None:
            settings["max_regions_per_pass"] = self.max_regions_per_pass
        reader = RegionReader(
            self.config,
            self.image_processor.with_settings(**changes),
            self.mask_sampling,
            self.mask_threshold,
            self.sort_regions,
            self.own_pixels,
        )
        return reader.passes(image, form, regions, prompt_ids, **settings)

    def lay_out(self, passes: list[dict], question: str, sample: int) -> list[dict]:
        """Rows of an image's passes: their prompts beside what `region_passes` made of image and regions."""
        if not passes:
            return []
        before, after = self._region_prompt(question)
        rows = []
        for one in passes:
            head, _ = expand_images(before, one["grids"], self.config, self.tokenizer, "region prompt")
            sequence = region_row(head, after[0], one["numbers"].tolist(), self.config, self.tokenizer)
            rows.append({**one, "sample_id": sample, **sequence})
        return rows

    def _region_prompt(self, question: str) -> tuple:
        """Token ids and offsets before and after the RoI span of the single-region prompt."""
        place = ROI_TOKEN.format(0) + "\n"
        content = [{"type": "image"}, {"type": "text", "text": place + guarded(question, self.tokenizer)}]
        messages: list[dict] = [{"role": "user", "content": content}]
        if self.system_prompt:
            messages.insert(0, {"role": "system", "content": self.system_prompt})
        before, after = self.apply_chat_template(messages, add_generation_prompt=True).split(place)
        return encode(before, self.tokenizer), encode(after, self.tokenizer)

    def text_rows(self, images, text, rendered: bool | None = None, **image_settings: Any) -> list[dict]:
        """One row per text; each may have several images."""
        texts = checked_texts(text, 1)
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
        image_processor = self.image_processor.with_settings(**image_settings)
        rows = []
        for index, (prompt, group) in enumerate(zip(texts, images, strict=True)):
            names = [f"images[{index}][{place}]" for place in range(len(group))]
            read = [picture(image, image_processor, name) for image, name in zip(group, names, strict=True)]
            grids, tiles = [grid for _, grid, *_ in read], [tiles for tiles, *_ in read if tiles is not None]
            if not (is_rendered(prompt, self.tokenizer) if rendered is None else rendered):
                prompt = self._question(prompt, len(group))
            encoded = encode(prompt, self.tokenizer)
            ids, offsets = expand_images(encoded, grids, self.config, self.tokenizer, f"text[{index}]")
            row = {"sample_id": index, **shared_row(ids), "offsets": offsets, "grids": grids}
            row["tiles"] = np.concatenate(tiles) if tiles else None
            rows.append({**row, "sizes": [size for _, _, size, *_ in read]})
        return rows

    def _question(self, text: str, num_images: int) -> str:
        """A prompt that asks a question about images which stand before it."""
        content = [*[{"type": "image"}] * num_images, {"type": "text", "text": guarded(text, self.tokenizer)}]
        return self.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)

    # --- lengths --------------------------------------------------------------------------------------------------

    def region_text_length(self) -> int:
        """Tokens of the fixed text of a region prompt, its turns and the question."""
        (before, _), (after, _) = self._region_prompt(self.region_question)
        return len(before) - 1 + len(after)  # the image's placeholder is not text

    def prompt_length(self, size: tuple[int, int], num_regions: int, max_tiles: int | None = None) -> int:
        """Tokens that an image of (width, height) pixels with this many regions takes, the fixed text left out."""
        tiles = num_tiles(self.image_processor.with_settings(max_tiles=max_tiles).grid(size))
        regions = num_regions * (self.config.roi_size**2 + 1) * self.config.use_roi_replay
        return self.config.image_tokens(tiles) + regions

    # --- answers --------------------------------------------------------------------------------------------------

    def encode_answers(
        self, answers: Sequence[str], num_slots: int, max_slots: int | None = None, cut: bool = False
    ) -> torch.Tensor:
        """Answers as training targets (A, G): see `answers_perceptiondlm.encode_answers`."""
        return encode_answers(answers, self.tokenizer, num_slots, max_slots, cut)

    def decode_answers(self, output) -> list[dict[str, Any]]:
        """Text, score and sample of every answer: see `answers_perceptiondlm.decode_answers`."""
        return decode_answers(output, self.tokenizer, self.score_calibration)

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

    def post_process_image_text_to_text(
        self, generated_outputs, skip_special_tokens: bool = True, **decode_kwargs: Any
    ) -> list[str]:
        """The text of what `generate` returned.

        Args:
            generated_outputs: its output, which gives one answer per row; or token ids (A, L) or (L,), prompts
                included or not, which are decoded as they are.
            skip_special_tokens, decode_kwargs: of the tokenizer's `decode`, for token ids.
        """
        if hasattr(generated_outputs, "sample_ids"):
            return [answer["text"] for answer in self.decode_answers(generated_outputs)]
        ids = torch.atleast_2d(torch.as_tensor(generated_outputs))
        return self.tokenizer.batch_decode(ids, skip_special_tokens=skip_special_tokens, **decode_kwargs)


def find_config(path: Any, location: dict[str, Any]) -> PerceptionDLMConfig | None:
    """The model's config in a folder or Hub repository, None where there is none."""
    if os.path.isfile(path):
        return None
    if cached_file(path, "config.json", _raise_exceptions_for_missing_entries=False, **location) is None:
        return None
    content, _ = PerceptionDLMConfig.get_config_dict(path, **location)
    return PerceptionDLMConfig.from_dict(content) if content.get("model_type") == "perceptiondlm" else None


def config_of_switches(settings: dict[str, Any]) -> PerceptionDLMConfig:
    """A config with the sizes and switches among a processor's settings, otherwise the default one."""
    fields = {name: settings[name] for name in FORMER_SWITCHES if name in settings}
    config = PerceptionDLMConfig(**fields)
    vision = config.vision_config.to_dict()
    vision["image_size"] = settings.get("tile_size", vision["image_size"])
    vision["patch_size"] = settings.get("patch_size", vision["patch_size"])
    return PerceptionDLMConfig(**fields, vision_config=vision)


def switches_of(config: PerceptionDLMConfig) -> list[Any]:
    """What of a config a processor reads."""
    vision = config.vision_config
    return [*(getattr(config, name) for name in FORMER_SWITCHES), vision.image_size, vision.patch_size]


def checked_texts(text: Any, count: int) -> list[str]:
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


make_importable(__name__)

__all__ = ["CHAT_TEMPLATE", "PerceptionDLMProcessor"]
