"""COCO files: annotations, and which of them belong to an image."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from perceptiondlm.common.region_files.entry import ImageEntry, few, is_end_of, is_number_of


def of_coco(content: Mapping, path: Path, image: ImageEntry) -> list[Any]:
    """Annotations of one image: by `images[].file_name`, or by an image id that is the image's name."""
    annotations, images = content["annotations"] or [], content.get("images") or []
    if not isinstance(annotations, list) or not all(isinstance(item, Mapping) for item in annotations):
        raise ValueError(f"{path}: annotations must be a list of objects")
    ids = list(dict.fromkeys(str(item["image_id"]) for item in annotations if "image_id" in item))
    if len(images) <= 1 and len(ids) <= 1:
        return annotations
    if images:
        found = [entry for entry in images if image.is_named(entry.get("file_name"))]
        exact = [entry for entry in found if is_end_of(entry["file_name"], image.path)]
        found = exact if len(exact) == 1 else found
        names = [entry.get("file_name") for entry in images]
        wanted = [str(entry["id"]) for entry in found]
    else:
        names = ids
        wanted = [number for number in ids if is_number_of(number, image.path.stem)]
    if len(wanted) != 1:
        what = f"{len(wanted)} of them" if wanted else "none of them"
        raise ValueError(
            f"{path} is about {len(names)} images ({few(names)}); {what} is named {image.path.name}: accepted is one"
        )
    if any("image_id" not in item for item in annotations):
        raise ValueError(f"{path} is about {len(names)} images, and some annotations have no image_id")
    return [item for item in annotations if str(item["image_id"]) == wanted[0]]
