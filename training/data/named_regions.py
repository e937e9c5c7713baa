"""Pictures with named regions as training data: every region gets a caption of what is true of it."""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from perceptiondlm.coverage_perceptiondlm import CroppedRegion
from perceptiondlm.evaluation.photos.annotations import NamedRegion, read_pictures
from perceptiondlm.evaluation.photos.names import CategoryNames, NameTable
from perceptiondlm.images_perceptiondlm import UNREADABLE
from perceptiondlm.training.data.bad_records import BadRecord
from perceptiondlm.training.data.columns import file_content
from perceptiondlm.training.data.data_config import SourceConfig
from perceptiondlm.training.data.region_sets import deal
from perceptiondlm.training.data.sources import AnswerFormat, Measured, Source, open_image
from perceptiondlm.training.data.true_captions import drawn_name, true_caption, with_article


SMALLEST_WINDOW = 0.5  # side of a random cut-out, as a share of the picture's
LEAST_SQUEEZE = 0.75  # of a side of the picture, which other proportions make
KEPT_SHARE = 0.7  # of a region's pixels that a cut-out must hold for the region to stay


class NamedRegionSource(Source):
    """Pictures in random access; an epoch deals a picture's regions into groups, as `RegionSource` does.

    Which word names a region, and how the picture is mirrored and cut, depends on the epoch.
    """

    def __init__(self, config: SourceConfig, answers: AnswerFormat, key: str):
        self.config, self.answers, self.key = config, answers, key
        self.pictures = read_pictures(str(config.path), config.image_root)
        self.table = NameTable.coco()
        self.namings = [[Naming.of(region, self.table) for region in picture.regions] for picture in self.pictures]

    def __len__(self) -> int:
        return len(self.pictures)

    @property
    def fingerprint(self) -> Sequence[Any]:
        return [self.key, file_content(str(self.config.path))]

    def place(self, record: int) -> str:
        return f"{self.config.path}, {self.pictures[record].path.name}"

    def measure(self, record: int) -> Measured:
        """Tokens of every group of the uncut picture, under its regions' own names."""
        image = self._open(record)
        faults = self._faults(record, image)
        good = [index for index in range(len(self.namings[record])) if index not in faults]
        if not good:
            raise BadRecord(f"no region is good; the first: {faults[0]}")
        captions = [
            self._caption(self.namings[record][index].entries[0], image, mask, 0.0, "", record)
            for index, mask in zip(good, self._masks(record, image, good), strict=True)
        ]
        slots, cut = zip(*map(self.answers.slots, captions), strict=True)
        longest = sorted(slots, reverse=True)
        processor, lengths = self.answers.processor, []
        for size in map(len, deal(len(good), processor.config.num_region_prompts, "")):
            answers = self.answers.copies * (sum(longest[:size]) + size)  # a marker each
            lengths.append(processor.prompt_length(image.size, size) + processor.region_text_length() + answers)
        if max(lengths) > self.answers.max_length:
            return Measured([], too_long=len(lengths), dropped=faults)
        return Measured(lengths, cut=sum(cut), dropped=faults)

    def sample(self, record: int, unit: int, seed: str) -> dict[str, Any]:
        image, left_out = self._open(record), self.dropped.get(record, ())
        good = [index for index in range(len(self.namings[record])) if index not in left_out]
        group = [good[i] for i in deal(len(good), self.answers.processor.config.num_region_prompts, seed)[unit]]
        names = [self.namings[record][i].drawn(random.Random(f"name/{seed}/{record}/{i}")) for i in group]
        masks = self._masks(record, image, group)
        if dice := self._dice(record, unit, seed):
            image, masks, kept = cut_out(image, masks, dice)
            names = [names[i] for i in kept]
        captions = [
            self._caption(entry, image, mask, self.config.general_share, seed, record)
            for entry, mask in zip(names, masks, strict=True)
        ]
        return {"image": image, "masks": list(masks), "captions": captions}

    def _dice(self, record: int, unit: int, seed: str) -> random.Random | None:
        """What decides how a sample's picture is mirrored and cut; None for the picture as it is."""
        if not self.config.augment:
            return None
        if self.config.variants is None:
            return random.Random(f"cut/{seed}/{unit}")
        variant = random.Random(f"variant/{seed}/{record}/{unit}").randrange(self.config.variants)
        return random.Random(f"cut/{record}/{variant}") if variant else None

    def _caption(self, names: CategoryNames, image, mask: np.ndarray, share: float, seed: str, record: int) -> str:
        region = CroppedRegion.of_mask(mask)
        dice = random.Random(f"caption/{seed}/{record}/{region.box if region else ()}")
        if mask.all():  # the picture as a whole has a name; which of its pixels belong to it is not known
            return with_article(drawn_name(names, share, dice))
        return true_caption(names, np.asarray(image), mask, share, dice)

    def _faults(self, record: int, image: Image.Image) -> dict[int, str]:
        """What is wrong with regions of a picture, by their place."""
        faults = {}
        for index, naming in enumerate(self.namings[record]):
            try:
                for word in naming.words:
                    self.answers.check_text(word, f"name of region {index}")
            except BadRecord as error:
                faults[index] = str(error)
        try:
            self._masks(record, image)
        except BadRecord:
            for index in range(len(self.namings[record])):
                try:
                    self._masks(record, image, [index])
                except BadRecord as error:
                    faults[index] = str(error)
        return faults

    def _open(self, record: int) -> Image.Image:
        picture = self.pictures[record]
        try:
            return picture.checked(open_image(str(picture.path), Path(), picture.path.name))
        except ValueError as error:
            raise BadRecord(str(error)) from error

    def _masks(self, record: int, image: Image.Image, chosen: Sequence[int] | None = None) -> np.ndarray:
        try:
            return self.pictures[record].masks((image.height, image.width), chosen)
        except UNREADABLE as error:
            raise BadRecord(str(error)) from error


@dataclass(frozen=True)
class Naming:
    """What a region may be called: one entry, or several with their chances, likeliest first."""

    entries: Sequence[CategoryNames]
    chances: Sequence[float]

    @classmethod
    def of(cls, region: NamedRegion, table: NameTable) -> "Naming":
        guesses = sorted(region.guesses or [(region, 1.0)], key=lambda guess: -guess[1])
        return cls([words_of(guess, table) for guess, _ in guesses], [chance for _, chance in guesses])

    @property
    def words(self) -> list[str]:
        """Every name that captions may use."""
        return list(dict.fromkeys(word for entry in self.entries for word in (entry.name, *entry.broader)))

    def drawn(self, dice: random.Random) -> CategoryNames:
        """One of the entries, by their chances."""
        return dice.choices(self.entries, self.chances)[0]


def words_of(region: NamedRegion, table: NameTable) -> CategoryNames:
    """The accepted words of a region: those of COCO's categories where its name falls under one."""
    if region.lemmas is not None:
        return table.canonical(region.lemmas)
    if region.category not in table.entries:
        return CategoryNames.of_lemmas([region.category])
    return table[region.category]


def caption_names(sources: Iterable[SourceConfig]) -> list[str]:
    """Every name that captions of these sources may begin with, article included, and those of COCO's categories."""
    table = NameTable.coco()
    names = [word for entry in table.entries.values() for word in (entry.name, *entry.broader)]
    for source in sources:
        if source.kind == "named_regions":
            pictures = read_pictures(str(source.path), source.image_root)
            regions = (region for picture in pictures for region in picture.regions)
            names += [word for region in regions for word in Naming.of(region, table).words]
    return list(dict.fromkeys(map(with_article, names)))


def cut_out(
    image: Image.Image, masks_NHW: np.ndarray, dice: random.Random
) -> tuple[Image.Image, np.ndarray, list[int]]:
    """A picture mirrored in half of the cases, squeezed and cut at random, with the masks that stay whole enough.

    Returns:
        the picture, bool masks (K, h, w) and the indices of the K >= 1 regions kept. Where a cut would lose every
        region the picture stays whole.
    """
    if dice.random() < 0.5:
        image, masks_NHW = ImageOps.mirror(image), masks_NHW[:, :, ::-1]
    image, masks_NHW = squeezed(image, masks_NHW, dice)
    (width, height), side = image.size, dice.uniform(SMALLEST_WINDOW, 1.0)
    w, h = max(1, round(side * width)), max(1, round(side * height))
    x, y = dice.randint(0, width - w), dice.randint(0, height - h)
    inside_NHW = masks_NHW[:, y : y + h, x : x + w]
    areas = inside_NHW.sum(axis=(1, 2))
    kept = np.flatnonzero((areas > 0) & (areas >= KEPT_SHARE * masks_NHW.sum(axis=(1, 2)))).tolist()
    if not kept:
        return image, np.ascontiguousarray(masks_NHW), list(range(len(masks_NHW)))
    return image.crop((x, y, x + w, y + h)), np.ascontiguousarray(inside_NHW[kept]), kept


def squeezed(image: Image.Image, masks_NHW: np.ndarray, dice: random.Random) -> tuple[Image.Image, np.ndarray]:
    """A picture with its masks in other proportions and a little smaller; as it is where a region would vanish."""
    width, height = (max(1, round(dice.uniform(LEAST_SQUEEZE, 1.0) * side)) for side in image.size)
    rows, columns = (np.arange(new) * old // new for new, old in zip((height, width), masks_NHW.shape[1:], strict=True))
    smaller_NHW = masks_NHW[:, rows][:, :, columns]
    if not smaller_NHW.any(axis=(1, 2)).all():
        return image, masks_NHW
    return image.resize((width, height), Image.Resampling.BICUBIC), smaller_NHW
