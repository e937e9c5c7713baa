"""More regions to learn from than were annotated: borrowed masks on pictures, named by a linear classifier.

A language model learns a thousand annotated regions by heart, a linear classifier on the same frozen tower does not
(docs/experiments.md, 2026-11-26). So the classifier is the teacher: it is fitted to the annotated regions and to
pictures that are named as a whole, and says of any further region what it may be, with the chance of each name. Regions
cost nothing: outlines of annotated ones, mirrored, scaled and put anywhere on a picture, which also parts what stands
somewhere from where it stands. The result is a file that a source of kind `named_regions` reads; names are drawn by
their chances, anew in every epoch (knowledge distillation, Hinton et al. 2015, by sampling).

    python -m perceptiondlm.training.pseudo_labels training/configs/default.yaml --regions data/photos/train.json \\
        --pictures data/photos/imagenet.json --out outputs/default/guessed.json

Legend: R regions, F features, K kinds, C classes of ImageNet.
"""

import argparse
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from perceptiondlm.checkpoints.vision_towers import ClassHead
from perceptiondlm.common.json_files import write_json
from perceptiondlm.evaluation.photos.annotations import NamedPicture, read_pictures
from perceptiondlm.evaluation.photos.benchmark import encoded
from perceptiondlm.evaluation.photos.linear import DROPOUT, descend, pooled
from perceptiondlm.evaluation.photos.names import CategoryNames, NameTable
from perceptiondlm.region_features_perceptiondlm import bin_shares, roi_align_each
from perceptiondlm.training.config import RunConfig, load_run_config
from perceptiondlm.training.data.named_regions import words_of
from perceptiondlm.training.modules import prepare_parts
from perceptiondlm.training.start import build_model
from perceptiondlm.training.tower_features import reuse_features


STEPS = 200  # of fitting the teacher
FOLDS = 4  # of the annotated pictures, to measure the teacher and bring its chances to the truth
WHOLE_WEIGHT = 0.3  # of a picture named as a whole beside an annotated region
PRIOR_WEIGHT = 0.4  # of the chances of ImageNet's classes, where it starts
PRIOR_FLOOR = 1e-4  # least chance of a class
SHARPNESS = torch.linspace(0.3, 1.2, 19)  # of the teacher's scores: those tried
LEAST_CHANCE, MOST_GUESSES = 0.02, 12  # what is written of a region's names
SCALES = (0.7, 1.5)  # of a borrowed outline, between pictures of one size
SMALLEST = 30  # pixels of a region


@dataclass
class Examples:
    """Regions as the teacher sees them.

    Args:
        features_RF: of the tower, see `pooled`; classes_RC: chances of ImageNet's classes in the region's crop.
        pictures_R: the number of each region's picture.
    """

    features_RF: torch.Tensor
    classes_RC: torch.Tensor
    pictures_R: torch.Tensor

    def chosen(self, which_R: torch.Tensor) -> "Examples":
        """Some of them."""
        return Examples(self.features_RF[which_R], self.classes_RC[which_R], self.pictures_R[which_R])


class Eyes:
    """What a model's tower shows of regions, and which of ImageNet's classes the classifier it came with sees in them.

    Args:
        run: the model's tower, an EfficientNet-Lite0, and the crops of its regions; what is seen is kept where the run
            keeps the features of its tower.
    Raises:
        ValueError: for a run with another tower, or without crops.
    """

    def __init__(self, run: RunConfig):
        model, self.processor = build_model(run)
        config = model.config
        if config.vision_config.model_type != "efficientnet_lite" or not config.region_crop_size:
            raise ValueError(
                "pseudo-labels need vision_config.model_type 'efficientnet_lite' and a region_crop_size, got "
                f"{config.vision_config.model_type!r} and {config.region_crop_size}"
            )
        self.model: Any = prepare_parts(model, run.train).eval()
        self.head = ClassHead()
        self.compute, self.bf16 = model.vision_tower.forward, bool(run.trainer.get("bf16"))
        reuse_features(model, run.train.tower_features, run.train.tower_features_gib, 0.0)

    @torch.no_grad()
    def look(self, image: Image.Image, masks_RHW: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Features (R, F) and chances of classes (R, C) of a picture's regions."""
        inputs = self.processor(images=image, masks=masks_RHW).to(self.model.device)
        with torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.bf16):
            maps_RhwC = self.last_maps(inputs["region_crops"])
            features_RF = pooled(self.model, inputs)
        config = self.model.config
        covered_Rb = bin_shares(inputs["region_coverage"], config.coverage_subsamples).cpu()
        own_RbC = roi_align_each(maps_RhwC, inputs["crop_boxes"], config.roi_size, config.roi_sampling_ratio).cpu()
        scores_RC = self.head(own_RbC.transpose(1, 2)[..., None], covered_Rb[..., None])
        return features_RF, scores_RC.softmax(dim=1)

    def last_maps(self, crops_R3cc: torch.Tensor) -> torch.Tensor:
        """Maps (R, h, w, channels), fp32, of the tower's last stage for pictures of regions."""
        found: list[torch.Tensor] = []
        tower = self.model.vision_tower
        kept = tower.forward
        hook = tower.stages[-1].register_forward_hook(lambda *call: found.append(call[-1]))
        try:
            self.model.tile_features(crops_R3cc)
            if sum(map(len, found)) != len(crops_R3cc):  # some were seen before: of those features are kept, not maps
                found.clear()
                tower.forward = self.compute
                self.model.tile_features(crops_R3cc)
        finally:
            tower.forward = kept
            hook.remove()
        return torch.cat(found).permute(0, 2, 3, 1).float().contiguous()

    def examples(self, pictures: Sequence[NamedPicture], said: str) -> Examples:
        """The regions of pictures."""
        features, classes, numbers = [], [], []
        for number, picture in enumerate(tqdm(pictures, desc=said, disable=None)):
            found_RF, found_RC = self.look(*picture.read())
            features.append(found_RF)
            classes.append(found_RC)
            numbers += [number] * len(found_RF)
        return Examples(torch.cat(features), torch.cat(classes), torch.tensor(numbers))


class Teacher(nn.Module):
    """A linear classifier of features, beside which the chances of ImageNet's classes count as a prior on their kinds.

    Args:
        num_kinds: K.
        kind_of_class: (C,) int64, the kind that each of ImageNet's classes falls under.
        mean_F, spread_F: of the features.
    """

    def __init__(self, num_kinds: int, kind_of_class: torch.Tensor, mean_F: torch.Tensor, spread_F: torch.Tensor):
        super().__init__()
        self.linear = nn.Linear(len(mean_F), num_kinds)
        nn.init.zeros_(self.linear.weight)
        self.prior_weight = nn.Parameter(torch.full((num_kinds,), PRIOR_WEIGHT))
        self.kind_of_class, self.mean_F, self.spread_F = kind_of_class, mean_F, spread_F
        self.sharpness = 1.0

    def forward(self, examples: Examples) -> torch.Tensor:
        """Scores (R, K)."""
        features_RF = (examples.features_RF - self.mean_F) / self.spread_F
        prior_RK = torch.zeros(len(features_RF), self.linear.out_features)
        prior_RK.index_add_(1, self.kind_of_class, examples.classes_RC)
        prior_RK = ((prior_RK + PRIOR_FLOOR) / PRIOR_FLOOR).log()
        return self.linear(F.dropout(features_RF, DROPOUT, self.training)) + self.prior_weight * prior_RK

    @torch.no_grad()
    def chances(self, examples: Examples) -> torch.Tensor:
        """Chances (R, K) of the kinds."""
        return (self.eval()(examples) * self.sharpness).softmax(dim=1)


def fit(
    regions: Examples, kinds_R: torch.Tensor, whole: Examples, kind_of_class: torch.Tensor, num_kinds: int
) -> Teacher:
    """A teacher from annotated regions and pictures that are named as a whole, whose kinds are those of the classes."""
    mean_F, spread_F = regions.features_RF.mean(dim=0), regions.features_RF.std(dim=0).clamp(min=1e-6)
    teacher = Teacher(num_kinds, kind_of_class, mean_F, spread_F).train()
    groups = [
        {"params": teacher.linear.parameters()},
        {"params": [teacher.prior_weight], "weight_decay": 0.0},
    ]

    def loss() -> torch.Tensor:
        own = F.cross_entropy(teacher(regions), kinds_R, reduction="sum")
        others = F.cross_entropy(teacher(whole), kind_of_class, reduction="sum")
        return (own + WHOLE_WEIGHT * others) / (len(kinds_R) + WHOLE_WEIGHT * len(kind_of_class))

    descend(groups, loss, STEPS)
    return teacher


def cross_fitted(
    regions: Examples, kinds_R: torch.Tensor, whole: Examples, kind_of_class: torch.Tensor, num_kinds: int
) -> tuple[float, float]:
    """Share of regions named right by teachers without their pictures, and the sharpness that fits those best."""
    scores_RK = torch.zeros(len(kinds_R), num_kinds)
    for fold in range(FOLDS):
        held_R = regions.pictures_R % FOLDS == fold
        teacher = fit(regions.chosen(~held_R), kinds_R[~held_R], whole, kind_of_class, num_kinds)
        with torch.no_grad():
            scores_RK[held_R] = teacher.eval()(regions.chosen(held_R))
    losses = [F.cross_entropy(scores_RK * value, kinds_R).item() for value in SHARPNESS]
    return (scores_RK.argmax(dim=1) == kinds_R).float().mean().item(), SHARPNESS[int(np.argmin(losses))].item()


class Outlines:
    """Outlines of annotated regions, to be put anywhere.

    Args:
        masks: (H, W) bool each, not empty.
    """

    def __init__(self, masks: Sequence[np.ndarray]):
        self.cut: list[tuple[np.ndarray, tuple[int, int]]] = []
        for mask in masks:
            rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
            self.cut.append((mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1], mask.shape))

    def place(self, size: tuple[int, int], dice: random.Random) -> np.ndarray:
        """One of them in a picture of `size` (height, width): bool (H, W), of at least `SMALLEST` pixels."""
        while True:
            outline, (height, width) = dice.choice(self.cut)
            scale = dice.uniform(*SCALES) * min(size[0] / height, size[1] / width)
            h, w = (max(1, round(side * scale)) for side in outline.shape)
            if h > size[0] or w > size[1]:
                continue
            scaled = np.asarray(Image.fromarray(outline).resize((w, h), Image.Resampling.NEAREST))
            scaled = scaled[:, ::-1] if dice.random() < 0.5 else scaled
            y, x = dice.randint(0, size[0] - h), dice.randint(0, size[1] - w)
            if scaled.sum() >= SMALLEST:
                mask = np.zeros(size, bool)
                mask[y : y + h, x : x + w] = scaled
                return mask


def guesses_of(chances_K: torch.Tensor, kinds: Sequence[CategoryNames], table: NameTable) -> list[dict[str, Any]]:
    """The likeliest kinds of a region as a region JSON has them; what those left out have is shared among these."""
    best = chances_K.topk(min(MOST_GUESSES, len(chances_K)))
    kept = [
        (kind, chance) for chance, kind in zip(*map(torch.Tensor.tolist, best), strict=True) if chance >= LEAST_CHANCE
    ]
    kept = kept or [(int(best.indices[0]), float(best.values[0]))]
    total = sum(chance for _, chance in kept)
    return [{**described(kinds[kind], table), "chance": round(chance / total, 4)} for kind, chance in kept]


def described(entry: CategoryNames, table: NameTable) -> dict[str, Any]:
    """A kind as a region JSON names it."""
    if entry.category in table.entries:
        return {"category": entry.category}
    return {"names": [*entry.right], "hypernyms": [*entry.general]}


@dataclass
class Settings:
    """What regions are guessed on.

    Args:
        regions: annotation file with regions; pictures: of ImageNet's classes, a picture each, in their order.
        per_region_picture, per_picture: regions guessed on a picture of either file.
        seed: of the outlines, their places and the teacher.
    """

    regions: Path
    pictures: Path
    per_region_picture: int = 40
    per_picture: int = 10
    seed: int = 0


def taught(
    eyes: Eyes, annotated: Sequence[NamedPicture], named: Sequence[NamedPicture], table: NameTable
) -> tuple[Teacher, list[CategoryNames]]:
    """A teacher and the kinds that it tells apart; says how good it is."""
    entries = [words_of(region, table) for picture in (*annotated, *named) for region in picture.regions]
    by_name = {entry.name: entry for entry in entries[::-1]}
    places = {name: place for place, name in enumerate(by_name)}
    numbers = torch.tensor([places[entry.name] for entry in entries])
    kinds_R, kind_of_class = numbers[: -len(named)], numbers[-len(named) :]
    regions = eyes.examples(annotated, "looking at regions")
    whole = eyes.examples(named, "looking at named pictures")
    share, sharpness = cross_fitted(regions, kinds_R, whole, kind_of_class, len(by_name))
    print(
        f"the teacher names {100 * share:.1f} % of regions right in pictures it has not seen; sharpness {sharpness:.2f}"
    )
    teacher = fit(regions, kinds_R, whole, kind_of_class, len(by_name))
    teacher.sharpness = sharpness
    return teacher, list(by_name.values())


def guessed_records(eyes: Eyes, settings: Settings, out: Path) -> Iterator[dict[str, Any]]:
    """Records of a region JSON at `out`, a picture each.

    Raises:
        ValueError: where the named pictures are not one for each of ImageNet's classes.
    """
    annotated, named = read_pictures(settings.regions), read_pictures(settings.pictures)
    if len(named) != len(eyes.head.class_bias) or any(picture.regions[0].mask is not None for picture in named):
        raise ValueError(
            f"{settings.pictures} holds {len(named)} pictures; needed: {len(eyes.head.class_bias)}, one named as a "
            "whole for each of ImageNet's classes, in their order"
        )
    table = NameTable.coco()
    torch.manual_seed(settings.seed)
    teacher, kinds = taught(eyes, annotated, named, table)
    outlines = Outlines([mask for picture in annotated for mask in picture.read()[1]])
    dice = random.Random(settings.seed)
    counts = [settings.per_region_picture] * len(annotated) + [settings.per_picture] * len(named)
    pairs = list(zip((*annotated, *named), counts, strict=True))
    for picture, count in tqdm(pairs, desc="guessing regions", disable=None):
        if not count:
            continue
        image = picture.open()
        masks = np.stack([outlines.place((image.height, image.width), dice) for _ in range(count)])
        features_RF, classes_RC = eyes.look(image, masks)
        chances_RK = teacher.chances(Examples(features_RF, classes_RC, torch.zeros(count)))
        yield {
            "image": os.path.relpath(picture.path.resolve(), out.resolve().parent),
            "width": image.width,
            "height": image.height,
            "regions": [
                {"segmentation": encoded(mask), "guesses": guesses_of(chances_K, kinds, table)}
                for mask, chances_K in zip(masks, chances_RK, strict=True)
            ],
        }


def main(arguments: Sequence[str] | None = None) -> None:
    """See the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="a run's configuration, for its tower, tiles and crops")
    parser.add_argument("--regions", type=Path, required=True, help="annotation file, in any form of named_regions")
    parser.add_argument("--pictures", type=Path, required=True, help="one picture for each of ImageNet's classes")
    parser.add_argument("--out", type=Path, required=True, help="region JSON to write")
    for name in ("per_region_picture", "per_picture", "seed"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(Settings, name))
    options = vars(parser.parse_args(arguments))
    out, run = options.pop("out"), load_run_config(options.pop("config"))
    run.tokenizer.names = False  # what this writes may be among the sources
    records = list(guessed_records(Eyes(run), Settings(**options), out))
    write_json(out, records)
    count = sum(len(record["regions"]) for record in records)
    print(f"{out}: {count} regions on {len(records)} pictures")


if __name__ == "__main__":
    main()
