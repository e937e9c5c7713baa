"""What a linear classifier makes of the same eyes: a yardstick for the names that captions give.

Features of a model's vision tower, as it stands, are averaged under each mask, out of the whole picture and (with
`region_crop_size`) out of the region's crop, with the region's box beside them; a linear classifier learns their
categories from annotated pictures and names the regions of others. Dropout on the features keeps few pictures from
being learned by heart.

Legend: R regions, C channels of the tower, F features of a region, K categories.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from perceptiondlm.evaluation.photos.annotations import NamedPicture
from perceptiondlm.naming_perceptiondlm import mean_under_mask
from perceptiondlm.region_features_perceptiondlm import bin_shares, box_geometry, roi_align, roi_align_each


STEPS, RATE, WEIGHT_DECAY, DROPOUT = 300, 3e-3, 0.05, 0.5


def linear_names(
    model: Any, processor: Any, training: Sequence[NamedPicture], pictures: Sequence[NamedPicture], seed: int = 0
) -> list[str]:
    """The category a linear classifier gives every region of `pictures`, in order.

    Args:
        model, processor: whose tower and regions' crops are used; `region_conditioning` must be `"replay"`.
        training: pictures to learn from.
        seed: of weights and dropout; the random state outside is left alone.
    Raises:
        ValueError: for another conditioning, under which regions enter the tower.
    """
    if model.config.region_conditioning != "replay":
        raise ValueError(
            f"the linear classifier needs region_conditioning='replay', got {model.config.region_conditioning!r}"
        )
    known_RF, asked_RF = (region_features(model, processor, part) for part in (training, pictures))
    categories = [region.category for picture in training for region in picture.regions]
    kinds = sorted(set(categories))
    targets_R = torch.tensor([kinds.index(category) for category in categories])
    mean, spread = known_RF.mean(dim=0), known_RF.std(dim=0).clamp(min=1e-6)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layer = fit((known_RF - mean) / spread, targets_R, len(kinds))
    with torch.no_grad():
        return [kinds[index] for index in layer((asked_RF - mean) / spread).argmax(dim=1).tolist()]


@torch.enable_grad()
def fit(features_RF: torch.Tensor, targets_R: torch.Tensor, num_kinds: int) -> nn.Linear:
    """The classifier: AdamW on all regions at once, `STEPS` steps, the rate falling to zero."""
    layer = nn.Linear(features_RF.shape[1], num_kinds)
    nn.init.zeros_(layer.weight)
    descend(layer.parameters(), lambda: F.cross_entropy(layer(F.dropout(features_RF, DROPOUT)), targets_R), STEPS)
    return layer


def descend(parameters: Any, loss: Callable[[], torch.Tensor], steps: int) -> None:
    """Bring a loss down: AdamW on parameters, or groups of them, the rate falling to zero."""
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for _ in tqdm(range(steps), desc="fitting the classifier", leave=False, disable=None):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def region_features(model: Any, processor: Any, pictures: Sequence[NamedPicture]) -> torch.Tensor:
    """Features (R, F) of all regions, fp32 on the CPU."""
    found = []
    for picture in tqdm(pictures, desc="features of regions", disable=None):
        image, masks = picture.read()
        inputs = processor(images=image, masks=masks).to(model.device)
        found.append(pooled(model, inputs))
    return torch.cat(found)


def pooled(model: Any, inputs: Any) -> torch.Tensor:
    """Features (R, F) of one picture's regions: averages under the masks, and the boxes."""
    tiles = square(model.tile_features(inputs["pixel_values"]))
    crops = square(model.tile_features(inputs["region_crops"])) if model.config.region_crop_size else None
    parts = [part for part in under_masks(model.config, inputs, tiles, crops) if part is not None]
    return torch.cat([part.cpu() for part in parts], dim=1)


def under_masks(
    config: Any, inputs: Any, tiles_TPPX: torch.Tensor, crops_RccX: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """What maps show of one picture's regions, fp32.

    Args:
        tiles_TPPX: maps of the picture's tiles; crops_RccX: of its regions' crops, if there are any.
    Returns:
        averages (R, X) under the masks in the picture, and in the crops, 0 for a region without one; boxes (R, 6).
    """
    bins, samples = config.roi_size, config.roi_sampling_ratio
    covered_Rb = bin_shares(inputs["region_coverage"], config.coverage_subsamples)
    sizes_R2 = inputs["image_sizes"].expand(len(covered_Rb), 2)
    boxes_R4 = config.rois.boxes(inputs["region_boxes"], sizes_R2, False)
    feature_map = config.rois.feature_map(tiles_TPPX, tuple(inputs["tile_grids"][0].tolist()))
    image_RX, crop_RX = mean_under_mask(roi_align(feature_map, boxes_R4, bins, samples), covered_Rb), None
    if crops_RccX is not None:
        own_RbX = roi_align_each(crops_RccX, inputs["crop_boxes"], bins, samples)
        has_crop_R1 = (inputs["crop_boxes"] != 0).any(dim=1)[:, None]
        crop_RX = mean_under_mask(own_RbX, covered_Rb) * has_crop_R1
    return image_RX, crop_RX, box_geometry(boxes_R4.float(), sizes_R2)


def square(features_TPC: torch.Tensor) -> torch.Tensor:
    """Patch features (T, P * P, C) as maps (T, P, P, C)."""
    side = int(features_TPC.shape[1] ** 0.5)
    return features_TPC.view(len(features_TPC), side, side, -1)
