"""Region files of other tools, read into the forms the processor takes: one function from (file, image) to regions.

==============  ========================================================================================================
pictures        masks or, as `label_map`, label maps; any format Pillow reads
.npy, .npz      an array of masks, boxes or labels; of several arrays in a .npz the one named like the form
.json           RLEs, polygons or boxes; COCO of one image or many; LabelMe; Label Studio
.xml            CVAT for images, of one image or many
.txt            YOLO: one line per object, segmentation polygons or boxes, in fractions of the image
==============  ========================================================================================================

Files about many images are searched for the image by its file name. What does not tell which regions belong to the
image is refused, and so is what is no region (points, lines).
"""

import struct
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from perceptiondlm.common.json_files import read_json
from perceptiondlm.common.region_files.coco import of_coco
from perceptiondlm.common.region_files.cvat import of_cvat, read_xml
from perceptiondlm.common.region_files.entry import ImageEntry
from perceptiondlm.common.region_files.label_studio import of_label_studio
from perceptiondlm.common.region_files.labelme import of_labelme
from perceptiondlm.common.region_files.yolo import of_yolo


FORMS = ("masks", "boxes", "label_map")
MASK_PICTURES = (
    ".png", ".jpg", ".jpeg", ".jpe", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".tga", ".pcx", ".jp2", ".avif",
)  # fmt: skip
BAD_ARRAY = (  # what numpy raises at broken files
    ValueError, EOFError, OSError, zipfile.BadZipFile, zlib.error, SyntaxError, tokenize.TokenError, TypeError,
    MemoryError, KeyError, OverflowError, NotImplementedError, struct.error,
)  # fmt: skip


def read_regions(path: Path, image: Path, size: tuple[int, int], form: str = "masks") -> Any:
    """Regions of an image from a file, as the processor's `form` takes them; an empty list where there is none.

    Args:
        path: the file; its suffix says what it is, in any case.
        image: the image's file, by whose name files about many images are searched.
        size: (height, width) of the image in pixels.
        form: "masks", "boxes" or "label_map".

    Raises:
        FileNotFoundError: if there is no file at `path`.
        ValueError: naming the file, if it cannot be read, holds other than regions, or does not tell which of them
            belong to the image.
    """
    if form not in FORMS:
        raise ValueError(f"form must be one of {FORMS}, got {form!r}")
    if not path.is_file():
        raise FileNotFoundError(f"no {form.replace('_', ' ')} file at {path}")
    entry, suffix = ImageEntry(Path(image), size), path.suffix.lower()
    if suffix in (".npy", ".npz"):
        return _array(path, form)
    if suffix in MASK_PICTURES and form != "boxes":
        return path if form == "label_map" else [path]
    readers: dict[str, Callable] = {".json": of_json, ".xml": of_cvat, ".txt": of_yolo}
    if form == "label_map" or suffix not in readers:
        accepted = {"masks": "a picture, .npy, .npz, .json, .xml or .txt", "boxes": ".npy, .npz, .json, .xml or .txt"}
        raise ValueError(f"{path}: {form} may be {accepted.get(form, 'a picture, .npy or .npz')}")
    try:
        regions = readers[suffix](path, entry)
        if form == "boxes" and isinstance(regions, list):
            return [_as_box(region, path, index) for index, region in enumerate(regions)]
        return regions
    except ValueError as error:  # a number that is none
        if str(path) in str(error):
            raise
        raise ValueError(f"{path}: {error}") from error
    except (KeyError, TypeError, AttributeError, IndexError, OverflowError) as error:
        raise ValueError(f"{path} is not laid out as its kind of file is: {type(error).__name__}: {error}") from error


def is_about_many(path: Path) -> bool:
    """Whether a file holds the regions of several images, each under its name."""
    suffix = path.suffix.lower()
    if suffix == ".xml":
        return len(read_xml(path).findall("image")) > 1
    if suffix != ".json":
        return False
    content = read_json(path)
    if isinstance(content, Mapping):
        return isinstance(content.get("images"), list) and len(content["images"]) > 1
    tasks = isinstance(content, list) and len(content) > 1
    return tasks and all(isinstance(task, Mapping) and ("data" in task or "image" in task) for task in content)


def _array(path: Path, form: str) -> np.ndarray:
    try:
        if path.suffix.lower() == ".npy":
            return np.load(path, mmap_mode="r")
        with np.load(path) as arrays:
            names = arrays.files
            if len(names) != 1 and form not in names:
                raise ValueError(f"it holds the arrays {names}; accepted: one, or one named {form}")
            return arrays[form if form in names else names[0]]
    except BAD_ARRAY as error:
        raise ValueError(f"{path} cannot be read as an array: {error}") from error


def _as_box(region: Any, path: Path, index: int) -> Any:
    """A region of a file as a box: boxes, and what carries one, as they are; polygons by their corners."""
    if isinstance(region, Mapping) and (region.get("bbox") is not None or "box" in region or "xmin" in region):
        return region
    if isinstance(region, Mapping):
        raise ValueError(f"{path}: region {index} has no box (keys {sorted(map(str, region))}); give it as masks")
    if isinstance(region, np.ndarray):
        ys, xs = np.nonzero(region)
        if not xs.size:
            raise ValueError(f"{path}: region {index} is empty (0 pixels set); accepted: at least 1 pixel")
        return [int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1]
    if isinstance(region, list) and region and isinstance(region[0], list):
        across, down = ([n for ring in region for n in ring[start::2]] for start in (0, 1))
        return [min(across), min(down), max(across), max(down)]
    return region


@lru_cache(maxsize=2)
def _json_of(path: Path, _changed: int) -> Any:
    """A file's content, kept for the next image that is looked for in it."""
    return read_json(path)


def of_json(path: Path, image: ImageEntry) -> Any:
    content = _json_of(path, path.stat().st_mtime_ns)
    if isinstance(content, Mapping):
        if "shapes" in content:
            return of_labelme(content, path, image)
        if "annotations" in content and "data" not in content:
            return of_coco(content, path, image)
        if "data" in content:
            content = [content]
    if isinstance(content, list) and content and all(isinstance(item, Mapping) for item in content):
        if any("data" in item or ("image" in item and "annotations" not in item) for item in content):
            return of_label_studio(content, path, image)
        if any("image_id" in item for item in content):
            return of_coco({"annotations": content}, path, image)
    return content
