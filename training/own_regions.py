"""Your images and masks as a region set that training reads: from COCO JSON, or from a folder of mask pictures.

A folder holds pictures, and for each a folder of the same name with a mask picture per region and its caption:

    kitchen.jpg    kitchen/kettle.png    kitchen/kettle.txt
"""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError
from pycocotools import mask as coco_mask
from tqdm.auto import tqdm

from perceptiondlm.common.json_files import read_json
from perceptiondlm.regions_perceptiondlm import region_masks


PICTURES = (".jpg", ".jpeg", ".png", ".webp")


@dataclass
class OwnImage:
    """A picture with its regions: name (for messages), mask in any form of `region_masks`, caption."""

    path: Path
    regions: list[tuple[str, Any, str]] = field(default_factory=list)


def import_regions(
    source: Path, out: Path, images: Path | None = None, held_out: float = 0.1, seed: int = 0, names: bool = False
) -> dict[str, int]:
    """Write `train.jsonl` and `held_out.jsonl` into `out`; every mask is checked, nothing is written before the end.

    Args:
        source: a COCO JSON file, or a folder (see above).
        images: folder of a COCO file's pictures; default: the file's own.
        held_out: share of the images that is kept apart, in [0, 1).
        seed: of the choice.
        names: whether an annotation without a caption is called by its category.

    Returns:
        images of each part.

    Raises:
        FileNotFoundError, ValueError: naming the picture, mask or annotation that is missing or wrong.
    """
    if not 0 <= held_out < 1:
        raise ValueError(f"held_out must be in [0, 1), got {held_out}")
    found = list(read_folder(source) if source.is_dir() else read_coco(source, images or source.parent, names))
    found = [image for image in found if image.regions]
    if len(found) < 2:
        raise ValueError(f"{source} has {len(found)} images with regions; at least 2 are needed")
    records = [record_of(image) for image in tqdm(found, desc="masks")]
    random.Random(seed).shuffle(records)
    apart = max(round(held_out * len(records)), 1 if held_out else 0)
    parts = {"held_out": records[:apart], "train": records[apart:]}
    out.mkdir(parents=True, exist_ok=True)
    for name, rows in parts.items():
        part = out / f"{name}.jsonl.part"
        part.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        part.replace(out / f"{name}.jsonl")
    return {name: len(rows) for name, rows in parts.items()}


def read_coco(path: Path, images: Path, names: bool) -> Iterator[OwnImage]:
    """The images of a COCO file; captions are under "caption" of their annotations."""
    try:
        content = read_json(path)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is neither COCO JSON nor a folder: {error}") from error
    if not isinstance(content, dict) or not {"images", "annotations"} <= set(content):
        raise ValueError(f"{path} is no COCO file: it needs images and annotations")
    categories = {item["id"]: item["name"] for item in content.get("categories", [])}
    by_id = {item["id"]: OwnImage(images / item["file_name"]) for item in content["images"]}
    for item in content["annotations"]:
        name = f"annotation {item.get('id')!r} of {path}"
        caption = item.get("caption") or (categories.get(item.get("category_id")) if names else None)
        if item.get("image_id") not in by_id:
            raise ValueError(f"{name} belongs to image {item.get('image_id')!r}, which the file does not list")
        if not isinstance(caption, str) or not caption.strip():
            raise ValueError(f"{name} has no caption: give one under 'caption', or accept names of categories, --names")
        by_id[item["image_id"]].regions.append((name, {"segmentation": item.get("segmentation")}, caption.strip()))
    yield from by_id.values()


def read_folder(folder: Path) -> Iterator[OwnImage]:
    """The pictures of a folder with their masks."""
    for path in sorted(folder.iterdir()):
        masks = sorted(path.with_suffix("").glob("*.png"))
        if path.suffix.lower() not in PICTURES or not masks:
            continue
        image = OwnImage(path)
        for mask in masks:
            text = mask.with_suffix(".txt")
            if not text.is_file() or not text.read_text(encoding="utf-8").strip():
                raise FileNotFoundError(f"{mask} has no caption: write it into {text}")
            image.regions.append((str(mask), mask, text.read_text(encoding="utf-8").strip()))
        yield image


def record_of(image: OwnImage) -> dict[str, Any]:
    """An image as the region sets have it, masks as compressed RLE."""
    try:
        with Image.open(image.path) as picture:
            size = (picture.height, picture.width)
    except (FileNotFoundError, UnidentifiedImageError) as error:
        raise ValueError(f"{image.path} is missing, or is no picture: {error}") from error
    masks = [region_masks(size, masks=[mask], name=name)[0] for name, mask, _ in image.regions]
    rles = coco_mask.encode(np.asfortranarray(np.stack(masks, axis=-1), dtype=np.uint8))
    rows = [{"size": list(rle["size"]), "counts": rle["counts"].decode()} for rle in rles]
    return {"image": str(image.path.resolve()), "mask_rles": rows, "captions": [text for _, _, text in image.regions]}
