"""The regions of an image, measured for the passes of the model: tiles, boxes, coverage and prompt ids.

Keys and shapes are documented in processing_perceptiondlm.
"""

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np

from .configuration_perceptiondlm import PerceptionDLMConfig, nearest_sampling
from .coverage_perceptiondlm import Region, patch_coverage
from .focal_perceptiondlm import OwnPixels
from .image_processing_perceptiondlm import PerceptionDLMImageProcessor, check_count
from .images_perceptiondlm import is_encoded, read_image
from .regions_perceptiondlm import regions_of


@dataclass(frozen=True)
class RegionReader:
    """How a processor reads regions; see its settings."""

    config: PerceptionDLMConfig
    image_processor: PerceptionDLMImageProcessor
    mask_sampling: str
    mask_threshold: int
    sort_regions: bool
    own_pixels: OwnPixels

    def passes(
        self, image, form: str, regions, prompt_ids=None, max_regions_per_pass=None, resize_masks=False,
        share_prompt_ids=False, suffix: str = "",
    ) -> list[dict]:  # fmt: skip
        """Everything of an image's rows but the prompt: tiles, boxes and coverage, a dict per pass.

        Regions are read and measured one by one; none is kept but under `mask_sampling="nearest"`.

        Args:
            share_prompt_ids: let regions of a pass have the same prompt id, by default 0 (the paper's Table 10).
            suffix: stands behind the names of image and regions in messages.
        """
        if self.config.region_conditioning == "none":
            raise ValueError(f"{form} were given to a base model, which knows no regions: ask it with text alone")
        tiles, grid, size, turned, whole = picture(image, self.image_processor, f"image{suffix}")
        whole = self.own_pixels.checked(whole, size, f"image{suffix}")
        found = regions_of(
            size, **{form: regions}, name=f"{form}{suffix}", threshold=self.mask_threshold, resize_masks=resize_masks,
            size_hint=f"; the picture carries EXIF orientation {turned}, see exif" if turned != 1 else "",
        )  # fmt: skip
        nearest = self.config.region_conditioning == "vision" and self.mask_sampling == "nearest"
        kept, boxes, areas, own, told = [], [], [], [], True
        for region in found:
            boxes.append(region.box)
            areas.append(region.area)
            own.append(self.own_pixels.measure(whole, region) if self.own_pixels.wanted else {})
            told = told and region.tells_size
            kept.append(region if nearest else self._coverage(region, grid))
        if turned != 1 and boxes and not (told and turned >= 5 and size[0] != size[1]):
            warn_of_orientation(f"image{suffix}", turned)
        order = np.array(areas).argsort()[::-1] if self.sort_regions else np.arange(len(boxes))
        passes = []
        if share_prompt_ids and prompt_ids is None:
            prompt_ids = [0] * len(boxes)
        for group in self._groups(len(boxes), max_regions_per_pass, share_prompt_ids):
            chosen = order[group]
            numbers = self._prompt_ids(prompt_ids, chosen, len(boxes), f"prompt_ids{suffix}", share_prompt_ids)
            row = {"tiles": tiles, "grids": [grid], "sizes": [size], "numbers": numbers}
            row["boxes"] = np.array([boxes[index] for index in chosen], dtype=np.int64)
            row |= {"order": chosen} if self.sort_regions else {}
            measured = [kept[index] for index in chosen]
            if nearest:
                cut, step = lambda mask: self.image_processor.cut(mask, grid), self.config.vision_config.patch_size
                measured = [nearest_sampling(one, k, cut, step) for one, k in zip(measured, numbers, strict=True)]
            row |= self.own_pixels.of_pass([own[index] for index in chosen], self.image_processor.as_tiles)
            passes.append(row | self._coverage_of_pass(measured, numbers))
        return passes

    def _coverage(self, region: Region, grid: tuple[int, int]) -> np.ndarray:
        """Share that a region covers of the cells of its box, (c, c), or under `vision` of every patch, (T, P, P)."""
        if self.config.region_conditioning == "replay":
            return region.coverage(self.config.roi_size * self.config.coverage_subsamples)
        return patch_coverage(region, grid, self.config.patches_per_side)

    def _coverage_of_pass(self, measured: list[np.ndarray], numbers: np.ndarray) -> dict:
        """The coverage of a pass's regions, under `vision` each at its prompt id."""
        if self.config.region_conditioning == "replay":
            return {"coverage": np.stack(measured)}
        tiles, patches = measured[0].shape[0], self.config.patches_per_side
        coverage = np.zeros((tiles, self.config.num_region_prompts, patches, patches), np.float32)
        for number, covered in zip(numbers, measured, strict=True):  # regions that share an id cover together
            coverage[:, number] = np.minimum(coverage[:, number] + covered, 1)
        return {"prompt_coverage": coverage, "prompt_ids": numbers}

    def _prompt_ids(self, given, chosen: np.ndarray, count: int, name: str, shared: bool = False) -> np.ndarray:
        """Prompt ids of the regions `chosen` for a pass, out of those given for all regions of an image."""
        if given is None:
            return np.arange(len(chosen))
        most, ids = self.config.num_region_prompts, np.asarray(given)
        different = "" if shared else " different ones within a pass,"
        accepted = f"one id below {most} per region,{different} under 'vision'"
        if self.config.region_conditioning != "vision" or ids.shape != (count,) or ids.dtype.kind not in "iu":
            raise ValueError(f"{name} is {given!r} for {count} regions; accepted: {accepted}")
        ids = ids[chosen].astype(np.int64)
        if (not shared and len(set(ids.tolist())) < len(ids)) or ids.min() < 0 or ids.max() >= most:
            raise ValueError(f"{name} gives a pass the ids {ids.tolist()}; accepted: {accepted}")
        return ids

    def _groups(self, count: int, limit: int | None, shared: bool = False) -> list[slice]:
        """Split `count` regions into passes, in order; those that share prompt ids need no id each."""
        if limit is not None:
            check_count("max_regions_per_pass", limit)
        if self.config.region_conditioning == "vision" and not (shared and not self.config.layout.numbered_by_place):
            limit = min(limit or self.config.num_region_prompts, self.config.num_region_prompts)
        step = limit or max(count, 1)
        return [slice(start, min(start + step, count)) for start in range(0, count, step)]


def picture(image: Any, image_processor: PerceptionDLMImageProcessor, name: str):
    """Tiles, grid, (height, width), undecided EXIF orientation and the picture itself, as it was tiled.

    An `EncodedImage` has no tiles any more, and its picture only where the model needs it.
    """
    if is_encoded(image):
        grid, size = image.tile_grids[0].tolist(), image.image_sizes[0].tolist()
        return None, tuple(grid), tuple(size), 1, image.picture
    image, turned = read_image(image, name, image_processor.exif)
    tiles, grid = image_processor.tile(image)
    return tiles, grid, (image.height, image.width), turned, image


def warn_of_orientation(name: str, orientation: int) -> None:
    """Warn that a picture carries an EXIF orientation, and the regions do not tell whether it is meant."""
    warnings.warn(
        f"{name} carries EXIF orientation {orientation}; its regions are taken to refer to the pixels as stored. Say "
        "exif='stored' if that is so, exif='applied' if they refer to the picture as viewers, transformers and OpenCV "
        "show it",
        stacklevel=4,
    )
