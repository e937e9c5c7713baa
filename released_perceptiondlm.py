"""Everything that exists for the published weights alone: rules that are baked into them, and wrong elsewhere.

Nothing but configuration_perceptiondlm, which gives each rule its switch, imports this file. Legend: see
sequence_perceptiondlm.
"""

from collections.abc import Callable

import numpy as np
import torch
from PIL import Image

from .coverage_perceptiondlm import Region
from .region_features_perceptiondlm import AlignedRois, merge_tiles
from .sequence_perceptiondlm import FullLayout, Relations


class ReleasedLayout(FullLayout):
    """Paper, section 3.2: an answer sees the shared tokens, its RoI span and itself; every other row sees everything.

    Newlines between RoI spans are hidden from answers (the last one is shared). Markers follow a region's place.
    """

    name = "released"
    numbered_by_place = True

    def _sees(self, relations: Relations) -> torch.Tensor:
        caption_sees = relations.shared_key | relations.own_roi | relations.own_answer
        return torch.where(relations.caption_query, caption_sees, relations.real_key)


class ReleasedRois(AlignedRois):
    """RoIs as the published weights know them: a shifted map, boxes that end at the last pixel and are scaled twice.

    The map starts at the second tile and so ends with the thumbnail. Boxes, in cells already, are scaled again, by 1/28
    in training and 1/32 in generation: all RoIs lie in the map's top left corner.
    """

    def feature_map(self, tiles_TnnD: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        return merge_tiles(tiles_TnnD[len(tiles_TnnD) > 1 :], grid)

    def boxes(self, boxes_R4: torch.Tensor, sizes_R2: torch.Tensor, training: bool) -> torch.Tensor:
        last_R4 = torch.cat((boxes_R4[:, :2], boxes_R4[:, 2:] - 1), dim=1)
        return super().boxes(last_R4, sizes_R2, training) * (1 / 28 if training else 1 / 32)


def released_schedule(num_slots: int, steps: int) -> list[int]:
    """Slots decided after each step: `int(n (S - 1 - s) / S)` of n are still masked after step s of S.

    Ends where none is masked any more, which is before the last step when there are more steps than slots.
    """
    decided = [num_slots - int(num_slots * (steps - 1 - step) / steps) for step in range(steps)]
    return decided[: decided.index(num_slots) + 1]


def nearest_coverage(
    region: Region, prompt_id: int, cut: Callable[[Image.Image], np.ndarray], patch_size: int
) -> np.ndarray:
    """Whether one pixel of every patch belongs to a region: float32 (T, P, P), 0 or 1; small regions can vanish.

    A picture of the prompt id on 255 is resized like the image; every level below 255 counts as region.

    Args:
        cut: a grey picture to tiles (T, s, s, 1), as the image is cut.
        patch_size: side of a patch in pixels.
    """
    picture = Image.fromarray(np.where(region.mask(), prompt_id, 255).astype(np.uint8))
    return (cut(picture)[:, ::patch_size, ::patch_size, 0] != 255).astype(np.float32)
