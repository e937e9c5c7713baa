"""Pictures with named regions as a benchmark that `runner.caption_benchmark` captions."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from pycocotools import mask as coco_mask
from tqdm.auto import tqdm

from perceptiondlm.evaluation.benchmarks import Benchmark, BenchmarkImage, BenchmarkRegion
from perceptiondlm.evaluation.photos.annotations import NamedPicture, read_pictures
from perceptiondlm.evaluation.photos.names import CategoryNames, NameTable


VALIDATION_FILE, TRAINING_FILE = "val.json", "train.json"


def annotation_file(path: Path) -> Path:
    """The annotation file of a set given by file or folder; a folder holds `val.json`.

    Raises:
        FileNotFoundError: naming what was looked for.
    """
    file = path / VALIDATION_FILE if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"no named regions at {file}; accepted: an annotation file, or a folder with val.json")
    return file


def load_named_regions(file: Path, name: str, limit: int | None = None) -> tuple[Benchmark, list[NamedPicture]]:
    """A benchmark without questions and its pictures, in the file's order; at most `limit` of them.

    Raises:
        FileNotFoundError, ValueError: for pictures and annotations that are missing or do not fit together.
    """
    pictures = read_pictures(file)[:limit]
    stems = Counter(picture.path.stem for picture in pictures)
    images = []
    for number, picture in enumerate(tqdm(pictures, desc="reading regions", disable=None)):
        image_id = picture.path.stem if stems[picture.path.stem] == 1 else f"{number}-{picture.path.stem}"
        height, width = picture.size or picture.open().size[::-1]
        masks = picture.masks((height, width))
        regions = [
            BenchmarkRegion(f"{image_id}_{index}", region.category, (), encoded(mask))
            for index, (region, mask) in enumerate(zip(picture.regions, masks, strict=True))
        ]
        images.append(BenchmarkImage(image_id, picture.path, height, width, regions))
    return Benchmark(name, "names", images), pictures


def name_table(pictures: Sequence[NamedPicture]) -> NameTable:
    """COCO's words and those that the annotations bring themselves.

    Raises:
        ValueError: for a category of which no words are known.
    """
    coco = NameTable.coco()
    own = {region.category: region.lemmas for picture in pictures for region in picture.regions if region.lemmas}
    table = NameTable([*coco.entries.values(), *(joined(coco, lemmas) for lemmas in own.values())])
    known = {region.category for picture in pictures for region in picture.regions}
    if unknown := sorted(known - set(table.entries)):
        raise ValueError(
            f"no accepted words for {len(unknown)} categories, such as {unknown[0]!r}: COCO's are known, others need "
            "`names` (and `hypernyms`) beside their regions, or `synonyms` as LVIS has them"
        )
    return table


def joined(coco: NameTable, lemmas: CategoryNames) -> CategoryNames:
    """The words annotations bring, with COCO's for the same name."""
    if lemmas.category not in coco.entries:
        return lemmas
    known = coco[lemmas.category]
    right = tuple(dict.fromkeys((*known.right, *lemmas.right)))
    general = tuple(word for word in dict.fromkeys((*known.general, *lemmas.general)) if word not in right)
    return replace(known, right=right, general=general)


def encoded(mask_HW: np.ndarray) -> dict:
    """A mask as compressed COCO run lengths."""
    rle = coco_mask.encode(np.asfortranarray(mask_HW.astype(np.uint8)))
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode()}
