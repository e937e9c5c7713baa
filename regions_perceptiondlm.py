"""Images and regions, as people have them, brought into one canonical form.

`load_image` gives an RGB picture, `region_masks` boolean masks; `mask_boxes`, `box_coverage` and `area_pool`
make of the masks the numbers a model sees. What can be read in more than one way, or not at all, is refused:
every message names the item, what was found and what is accepted.

Shape legend: N regions, H rows, W columns, K points of a polygon, B bins per side, R x C cells of a grid.
Sizes are (height, width) in pixels; boxes are x0, y0, x1, y1 in pixels, half-open (x1, y1 lie just outside).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from http.client import HTTPException
from io import BytesIO
from itertools import pairwise
from numbers import Real
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import numpy as np
import torch
from PIL import Image


try:
    from pycocotools import mask as coco_mask
except ImportError:
    coco_mask = None

CONVERTED_MODES = ("1", "L", "LA", "P", "RGBA")
LABEL_MODES = ("L", "P", "I;16", "I")
BOX_KEYS = ("xmin", "ymin", "xmax", "ymax")
URL_TIMEOUT_SECONDS = 60
LOSSY_TOLERANCE = 16  # grey levels a lossily compressed mask may stray from 0 or 255 ...
LOSSY_SHARE = 0.99  # ... in at least this share of its pixels
POLYGON_TOLERANCE = 1  # pixels a polygon may reach beyond the image
IMAGE_FORMS = "PIL image, path, URL, non-empty uint8 array (H, W, 3) or (H, W), uint8 tensor (3, H, W)"
MASK_FORMS = "array, tensor, PIL image, path, COCO RLE, annotation or polygon, pipeline output, list of these"
LABEL_FORMS = f"integer array or tensor (H, W), path or PIL image of mode {', '.join(LABEL_MODES)}"
UNREADABLE = (OSError, HTTPException, SyntaxError, EOFError, ValueError, Image.DecompressionBombError)


def is_encoded(image: Any) -> bool:
    """Whether an object stands for an image that a model has encoded (an `EncodedImage`)."""
    return hasattr(image, "tile_grids")


def load_image(image: Any, name: str = "image") -> Image.Image:
    """Return `image` as a PIL image of mode RGB: the stored pixels, in the stored orientation.

    Args:
        image: a PIL image, a path, an http(s) URL, a uint8 array (H, W, 3) or (H, W), or a uint8 tensor
            (3, H, W). Modes 1, L, LA, P and RGBA are converted, transparency over white. EXIF orientation is
            not applied, since masks refer to stored pixels. Of an MPO photo (a phone's JPEG that carries
            further pictures) the first picture is taken.
        name: what messages call the image.

    Raises:
        TypeError: for any other type.
        FileNotFoundError: if a path does not exist.
        ValueError: for other modes, dtypes and shapes, and animated, empty, truncated or unreadable images.
    """
    if isinstance(image, (str, os.PathLike)):
        image = _open_image(image, name)
    elif isinstance(image, (np.ndarray, torch.Tensor)):
        image = _image_from_array(image, name)
    if not isinstance(image, Image.Image):
        raise TypeError(f"{name} is a {type(image).__name__}; accepted: {IMAGE_FORMS}")
    image = _load_pixels(image, name)
    if image.mode == "RGB":
        return image
    if image.mode not in CONVERTED_MODES:
        raise ValueError(f"{name} has mode {image.mode}; accepted: RGB, {', '.join(CONVERTED_MODES)}")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def region_masks(
    image_size: tuple[int, int],
    masks: Any = None,
    boxes: Any = None,
    label_map: Any = None,
    name: str | None = None,
    threshold: int = 128,
) -> np.ndarray:
    """Return the regions of one image as bool masks (N, H, W), N >= 1, none empty, in the order given.

    Args:
        image_size: (height, width) of the image, in pixels.
        masks: one of
            - an array or tensor (N, H, W), (N, 1, H, W) or (H, W): bool, float with values {0, 1}, or integer
              with values {0, 1} or {0, 255} in each mask;
            - a PIL image of mode 1, L, P (read as indices) or grey RGB, or the path of one, with values
              {0, 1} or {0, 255}, from which lossy compression may have moved L and RGB by up to 16 levels;
            - COCO RLE, compressed (str, bytes) or not (list of int), or a COCO annotation ("segmentation");
            - a polygon, rasterised by pycocotools (nested lists are polygons, never bitmaps);
            - an item of `pipeline("image-segmentation")`, or all output of `pipeline("mask-generation")`;
            - a list or tuple of these, one entry per region.
            The depth of lists of numbers decides: [x0, y0, x1, y1, ...] is one ring, hence one region; a list
            of rings alone is one region, their union; a list of lists of rings is one region per entry. Among
            other forms, a ring is a region. An array (K, 2) is a ring, and in the outermost list a region;
            only where (K, 2) is the image's own size is it a mask.
        boxes: (N, 4) array, tensor or list of x0, y0, x1, y1, half-open; or a list of dicts with xmin, ymin,
            xmax and ymax, or with such a "box", as detection pipelines give. Fractions grow to whole pixels.
        label_map: integer (H, W) array or tensor, PIL image of mode L, P, I;16 or I, or the path of one. 0 is
            background, every other value one region, in ascending order.
        name: what messages call the regions; by default the name of the argument given.
        threshold: grey level from which a pixel of a lossily compressed mask picture belongs to the region.

    Raises:
        TypeError: for an object that is none of these forms.
        FileNotFoundError: if a path does not exist.
        ValueError: unless exactly one of masks, boxes and label_map is given, and for values, sizes and
            coordinates outside what is accepted, an empty mask or no region at all.
        ImportError: for a polygon without pycocotools installed.
    """
    arguments = {"masks": masks, "boxes": boxes, "label_map": label_map}
    given = [key for key, value in arguments.items() if value is not None]
    if len(given) != 1:
        raise ValueError(f"give exactly one of masks, boxes and label_map; got {' and '.join(given) or 'none'}")
    name = name or given[0]
    size_HW = (int(image_size[0]), int(image_size[1]))
    if label_map is not None:
        return _masks_from_label_map(label_map, size_HW, name)
    if boxes is not None:
        regions, to_mask = _split_boxes(boxes, name), _mask_from_box
    else:
        regions, to_mask = _split_masks(masks), partial(_mask_from_region, threshold=threshold)
    if len(regions) == 0:
        raise ValueError(f"{name} holds no region; accepted: at least 1")
    masks_NHW = np.empty((len(regions), *size_HW), dtype=bool)
    for index, region in enumerate(regions):
        masks_NHW[index] = to_mask(region, size_HW, f"{name}[{index}]")
        if not masks_NHW[index].any():
            raise ValueError(f"{name}[{index}] is empty (0 pixels set); accepted: at least 1 pixel")
    return masks_NHW


def mask_boxes(masks_NHW: np.ndarray) -> np.ndarray:
    """Return the tight half-open boxes x0, y0, x1, y1 of bool masks (N, H, W) as int64 (N, 4).

    Raises:
        ValueError: if the masks are not bool (N, H, W), or one has no pixel set.
    """
    if masks_NHW.ndim != 3 or masks_NHW.dtype != bool:
        raise ValueError(f"masks are {masks_NHW.dtype} {masks_NHW.shape}; accepted: bool (N, H, W)")
    columns_NW, rows_NH = np.any(masks_NHW, axis=1), np.any(masks_NHW, axis=2)
    empty = np.flatnonzero(~rows_NH.any(axis=1))
    if empty.size:
        raise ValueError(f"masks[{empty[0]}] is empty (0 pixels set) and has no box; accepted: at least 1 pixel")
    x0, y0 = columns_NW.argmax(axis=1), rows_NH.argmax(axis=1)
    x1 = columns_NW.shape[1] - columns_NW[:, ::-1].argmax(axis=1)
    y1 = rows_NH.shape[1] - rows_NH[:, ::-1].argmax(axis=1)
    return np.stack([x0, y0, x1, y1], axis=1).astype(np.int64)


def box_coverage(masks_NHW: np.ndarray, boxes_N4: np.ndarray, bins: int) -> np.ndarray:
    """Return the exact share of each of bins x bins parts of its box that a mask covers, however small.

    Args:
        masks_NHW: bool (N, H, W).
        boxes_N4: (N, 4) half-open boxes inside the image, in pixels, fractions allowed.
        bins: B, at least 1.

    Returns:
        float32 (N, B, B) in [0, 1], rows first.

    Raises:
        ValueError: if the counts of masks and boxes differ, bins < 1, or a box is empty or leaves the image.
    """
    if boxes_N4.shape != (len(masks_NHW), 4) or bins < 1:
        raise ValueError(f"{len(masks_NHW)} masks, boxes {boxes_N4.shape}, {bins} bins; accepted: (N, 4), >= 1")
    coverage_NBB = np.empty((len(masks_NHW), bins, bins), dtype=np.float32)
    for index, (x0, y0, x1, y1) in enumerate(boxes_N4.tolist()):
        x_edges, y_edges = np.linspace(x0, x1, bins + 1), np.linspace(y0, y1, bins + 1)
        coverage_NBB[index] = area_pool(masks_NHW[index : index + 1], x_edges, y_edges)[0]
    return coverage_NBB


def area_pool(masks_NHW: np.ndarray, x_edges: np.ndarray, y_edges: np.ndarray) -> np.ndarray:
    """Return the mean of each mask over each cell of a grid; a pixel cut by an edge counts in part.

    Args:
        masks_NHW: bool or float (N, H, W).
        x_edges: (C + 1,) increasing positions in [0, W], in pixels, fractions allowed.
        y_edges: (R + 1,) increasing positions in [0, H].

    Returns:
        float32 (N, R, C), summed in float64; of bool masks in [0, 1], above 0 where a cell meets the mask.

    Raises:
        ValueError: if the masks are not (N, H, W) or the edges not as described.
    """
    if masks_NHW.ndim != 3:
        raise ValueError(f"masks have shape {masks_NHW.shape}; accepted: (N, H, W)")
    x_edges = _checked_edges(x_edges, masks_NHW.shape[2], "x_edges")
    y_edges = _checked_edges(y_edges, masks_NHW.shape[1], "y_edges")
    pooled_NRC = np.empty((len(masks_NHW), len(y_edges) - 1, len(x_edges) - 1), dtype=np.float32)
    for index, mask_HW in enumerate(masks_NHW):
        pooled_RW = _pool_rows(mask_HW, y_edges)
        pooled_NRC[index] = _pool_rows(pooled_RW.T, x_edges).T
    return pooled_NRC


def _checked_edges(edges: np.ndarray, limit: int, name: str) -> np.ndarray:
    edges = np.asarray(edges, dtype=np.float64)
    inside = edges.ndim == 1 and edges.size > 1 and edges[0] >= 0 and edges[-1] <= limit
    if not (inside and (np.diff(edges) > 0).all()):
        raise ValueError(f"{name} is {edges.tolist()}; accepted: 2 or more increasing values in [0, {limit}]")
    return edges


def _pool_rows(values_HW: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Mean over the rows between neighbouring edges, float64 (R, W); one band of rows at a time."""
    pooled_RW = np.empty((len(edges) - 1, values_HW.shape[1]))
    for index, (low, high) in enumerate(pairwise(edges)):
        rows = np.arange(int(np.floor(low)), int(np.ceil(high)))
        lengths = np.minimum(rows + 1, high) - np.maximum(rows, low)
        pooled_RW[index] = lengths @ values_HW[rows[0] : rows[-1] + 1].astype(np.float64) / (high - low)
    return pooled_RW


def _open_image(source: str | os.PathLike, name: str) -> Image.Image:
    try:
        if isinstance(source, str) and source.startswith(("http://", "https://")):
            request = Request(source, headers={"User-Agent": "perceptiondlm"})
            with urlopen(request, timeout=URL_TIMEOUT_SECONDS) as reply:
                return Image.open(BytesIO(reply.read()))
        return Image.open(BytesIO(Path(source).read_bytes()))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{name}: there is no file {source}") from error
    except UNREADABLE as error:
        raise ValueError(f"{name}: {source} cannot be read ({error}); accepted: image files") from error


def _load_pixels(image: Image.Image, name: str) -> Image.Image:
    try:
        image.load()
        frames = getattr(image, "n_frames", 1)
    except UNREADABLE as error:
        raise ValueError(f"{name} is truncated or damaged ({error}); accepted: complete images") from error
    if frames > 1 and image.format != "MPO":
        raise ValueError(f"{name} is animated or has several pages ({frames} frames); accepted: one frame")
    if 0 in image.size:
        raise ValueError(f"{name} is {image.height} x {image.width} (height x width); accepted: at least 1 x 1")
    return image


def _image_from_array(image: np.ndarray | torch.Tensor, name: str) -> Image.Image:
    array = _to_numpy(image)
    found = f"{name} is a {type(image).__name__} of {image.dtype} {tuple(image.shape)}"
    if isinstance(image, torch.Tensor):
        valid = array.ndim == 3 and array.shape[0] == 3
        array = np.moveaxis(array, 0, -1) if valid else array
    else:
        valid = array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3)
    if not valid or array.size == 0 or array.dtype != np.uint8:
        raise ValueError(f"{found}; accepted: {IMAGE_FORMS}")
    return Image.fromarray(np.ascontiguousarray(array))


def _to_numpy(value: np.ndarray | torch.Tensor) -> np.ndarray:
    if isinstance(value, np.ndarray):
        return value
    value = value.detach().cpu()
    return (value.float() if value.dtype == torch.bfloat16 else value).numpy()


def _as_array(value: Any) -> np.ndarray | None:
    """The numpy form of an array or tensor, None for anything else."""
    return _to_numpy(value) if isinstance(value, (np.ndarray, torch.Tensor)) else None


def _is_numbers(value: Any) -> bool:
    """Whether `value` is a flat sequence of numbers."""
    if isinstance(value, (list, tuple)):
        return all(isinstance(item, Real) and not isinstance(item, bool) for item in value)
    array = _as_array(value)
    return array is not None and array.ndim == 1 and array.dtype.kind in "iuf"


def _check_size(found: Sequence[int], size_HW: tuple[int, int], name: str) -> None:
    if tuple(found) != size_HW:
        size = " x ".join(map(str, found)) or "nothing"
        raise ValueError(f"{name} is {size}; accepted: the image's {size_HW[0]} x {size_HW[1]} (height x width)")


def _split_masks(masks: Any) -> Sequence[Any] | np.ndarray:
    """One entry per region; what is no collection of regions is one region."""
    if isinstance(masks, Mapping):
        return _split_masks(masks["masks"]) if "masks" in masks else [masks]
    array = _as_array(masks)
    if array is not None and array.dtype == object:  # datasets in numpy format
        return _split_masks(array.tolist())
    if array is not None:
        array = array[:, 0] if array.ndim == 4 and array.shape[1] == 1 else array
        return array if array.ndim == 3 else [array]
    if not isinstance(masks, (list, tuple)):
        return [masks]
    is_polygon = len(masks) > 0 and (_is_numbers(masks) or all(_is_numbers(item) for item in masks))
    return [masks] if is_polygon else masks


def _mask_from_region(region: Any, size_HW: tuple[int, int], name: str, threshold: int) -> np.ndarray:
    """The bool mask (H, W) of one region in any form but a box."""
    if isinstance(region, Mapping):
        return _mask_from_dict(region, size_HW, name, threshold)
    if isinstance(region, (list, tuple)):
        return _mask_from_polygon([region] if region and _is_numbers(region) else region, size_HW, name)
    if isinstance(region, (str, os.PathLike)):
        region = _open_image(region, name)
    if isinstance(region, Image.Image):
        return _mask_from_array(_values_from_picture(region, name, threshold), size_HW, name)
    array = _as_array(region)
    if array is None:
        raise TypeError(f"{name} is a {type(region).__name__}; accepted: {MASK_FORMS}")
    is_points = array.ndim == 2 and array.shape[1] == 2 and array.shape != size_HW and array.dtype != bool
    if is_points or array.ndim == 1:
        return _mask_from_polygon([array], size_HW, name)
    return _mask_from_array(array, size_HW, name)


def _mask_from_dict(region: Mapping, size_HW: tuple[int, int], name: str, threshold: int) -> np.ndarray:
    for key in ("mask", "segmentation"):
        if key in region:
            return _mask_from_region(region[key], size_HW, name, threshold)
    if "counts" in region:
        return _mask_from_rle(region, size_HW, name)
    accepted = "size and counts, segmentation, or mask (masks: only as one image's whole input)"
    raise ValueError(f"{name} is a dict of {list(region)}; accepted: {accepted}")


def _mask_from_array(array: np.ndarray, size_HW: tuple[int, int], name: str) -> np.ndarray:
    array = array[0] if array.ndim == 3 and len(array) == 1 else array
    _check_size(array.shape, size_HW, name)
    if array.dtype == bool:
        return array
    if array.dtype.kind not in "iuf":
        raise ValueError(f"{name} has dtype {array.dtype}; accepted: bool, integer, float")
    high = 255 if array.dtype.kind in "iu" and array.max() == 255 else 1
    mask_HW = array == high
    stray = ~(mask_HW | (array == 0))
    if stray.any():
        accepted = "bool, integers {0, 1} or {0, 255}, floats {0, 1}"
        raise ValueError(f"{name} holds the value {array[stray][0]} ({array.dtype}); accepted: {accepted}")
    return mask_HW


def _values_from_picture(image: Image.Image, name: str, threshold: int) -> np.ndarray:
    """The values (H, W) of a mask that is a picture; those near 0 and 255 as bool."""
    image = _load_pixels(image, name)
    if image.mode == "RGB":
        channels = [np.asarray(channel) for channel in image.split()]
        if not all(np.array_equal(channels[0], other) for other in channels[1:]):
            raise ValueError(f"{name} is an RGB image with colours; accepted: modes 1, L, P, grey RGB")
        image = image.getchannel(0)
    if image.mode not in ("1", "L", "P"):
        raise ValueError(f"{name} is an image of mode {image.mode}; accepted: modes 1, L, P, grey RGB")
    values_HW, levels = np.asarray(image), np.array(image.histogram())
    if image.mode != "L" or not levels[2:].any():
        return values_HW
    near = (levels[: LOSSY_TOLERANCE + 1].sum() + levels[255 - LOSSY_TOLERANCE :].sum()) / values_HW.size
    if near < LOSSY_SHARE:
        accepted = f"{{0, 1}}, {{0, 255}}, or {LOSSY_SHARE:.0%} within {LOSSY_TOLERANCE} of 0 or 255"
        raise ValueError(f"{name} has {near:.1%} of its grey values near 0 or 255; accepted: {accepted}")
    return values_HW >= threshold


def _mask_from_rle(region: Mapping, size_HW: tuple[int, int], name: str) -> np.ndarray:
    height, width = size_HW
    _check_size(np.ravel(region.get("size", ())).tolist(), size_HW, f"{name} (RLE size)")
    counts = region["counts"]
    counts = _decode_counts(counts, name) if isinstance(counts, (str, bytes)) else counts
    runs = np.asarray(counts) if _is_numbers(counts) else np.asarray(counts, dtype=object)
    if runs.ndim != 1 or runs.dtype.kind not in "iu" or (runs < 0).any() or runs.sum() != height * width:
        total = runs.sum() if runs.dtype.kind in "iu" else "none"
        accepted = f"str, bytes or integers >= 0 with sum {height} x {width} = {height * width}"
        raise ValueError(f"{name} has RLE counts {runs.dtype} {runs.shape} with sum {total}; accepted: {accepted}")
    mask_WH = torch.from_numpy(np.repeat(np.arange(runs.size) % 2 == 1, runs).reshape(width, height))
    return mask_WH.T.contiguous().numpy()  # torch transposes three times as fast as numpy


def _decode_counts(counts: str | bytes, name: str) -> list[int]:
    """Runs of a compressed COCO RLE: 5 bits a byte, from the fourth run on as difference to two runs before.

    Read here because pycocotools decodes a string cut short into uninitialised memory; runs can be checked.
    """
    runs: list[int] = []
    value = shift = 0
    for byte in counts.encode() if isinstance(counts, str) else counts:
        bits = byte - 48
        if not 0 <= bits < 64:
            raise ValueError(f"{name} has byte {byte} in its RLE string; accepted: 48 to 111")
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:  # the last byte of a number, which carries its sign
            value -= (bits >> 4 & 1) << shift
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    if shift:
        raise ValueError(f"{name} has an RLE string that ends inside a number; accepted: complete strings")
    return runs


def _mask_from_polygon(rings: Sequence, size_HW: tuple[int, int], name: str) -> np.ndarray:
    if coco_mask is None:
        raise ImportError(f"{name} is a polygon, which pycocotools draws: pip install pycocotools")
    if not rings:
        raise ValueError(f"{name} is a polygon of 0 rings; accepted: at least 1")
    flat = [_flat_ring(ring, size_HW, f"{name}, ring {index}") for index, ring in enumerate(rings)]
    if len(flat) == size_HW[0] and all(len(ring) == size_HW[1] for ring in flat):
        raise ValueError(f"{name} looks like a bitmap in nested lists; accepted: numpy.array of it, or polygons")
    return _mask_from_rle(coco_mask.merge(coco_mask.frPyObjects(flat, *size_HW)), size_HW, name)


def _flat_ring(ring: Any, size_HW: tuple[int, int], name: str) -> list[float]:
    """One ring as x0, y0, x1, y1, ... in pixels, checked."""
    array = _as_array(ring)
    if array is None and not _is_numbers(ring):
        raise TypeError(f"{name} is {ring!r:.60}; accepted: numbers x0, y0, x1, y1, ... or an array (K, 2)")
    values = np.asarray(ring if array is None else array)
    if values.dtype.kind not in "iuf" or not (values.ndim == 1 or (values.ndim == 2 and values.shape[1] == 2)):
        raise ValueError(f"{name} is {values.dtype} {values.shape}; accepted: numbers (2K,) or (K, 2)")
    if values.size < 6 or values.size % 2:
        accepted = "x and y of at least 3 points, flat or as an array (K, 2); boxes are an argument of their own"
        raise ValueError(f"{name} has {values.size} numbers; accepted: {accepted}")
    points_K2 = values.reshape(-1, 2).astype(np.float64)
    limits = np.array(size_HW[::-1]) + POLYGON_TOLERANCE
    inside_K = ((points_K2 >= -POLYGON_TOLERANCE) & (points_K2 <= limits)).all(axis=1)
    if not inside_K.all():
        accepted = f"finite, at most {POLYGON_TOLERANCE} px outside the {size_HW[0]} x {size_HW[1]} image"
        raise ValueError(f"{name} has the point x, y = {points_K2[~inside_K][0].tolist()}; accepted: {accepted}")
    return points_K2.ravel().tolist()


def _split_boxes(boxes: Any, name: str) -> Sequence[Any] | np.ndarray:
    array = _as_array(boxes)
    if array is None and not isinstance(boxes, (list, tuple)):
        raise TypeError(f"{name} is a {type(boxes).__name__}; accepted: (N, 4) or a list, one box per region")
    if array is not None and (array.ndim != 2 or array.shape[1] != 4):
        raise ValueError(f"{name} has shape {array.shape}; accepted: (N, 4)")
    return boxes if array is None else array


def _mask_from_box(region: Any, size_HW: tuple[int, int], name: str) -> np.ndarray:
    box = region.get("box", region) if isinstance(region, Mapping) else region
    if isinstance(box, Mapping):
        if not all(key in box for key in BOX_KEYS):
            raise ValueError(f"{name} is a dict of {list(box)}; accepted: {', '.join(BOX_KEYS)}, or box")
        box = [box[key] for key in BOX_KEYS]
    if not _is_numbers(box):
        raise TypeError(f"{name} is {box!r:.60}; accepted: numbers x0, y0, x1, y1 or {', '.join(BOX_KEYS)}")
    if len(box) != 4:
        raise ValueError(f"{name} has {len(box)} numbers; accepted: x0, y0, x1, y1")
    x0, y0, x1, y1 = (float(edge) for edge in box)
    if not (0 <= x0 < x1 <= size_HW[1] and 0 <= y0 < y1 <= size_HW[0]):
        accepted = f"finite 0 <= x0 < x1 <= {size_HW[1]}, 0 <= y0 < y1 <= {size_HW[0]}"
        raise ValueError(f"{name} is {[x0, y0, x1, y1]}; accepted: {accepted}")
    mask_HW = np.zeros(size_HW, dtype=bool)
    mask_HW[int(np.floor(y0)) : int(np.ceil(y1)), int(np.floor(x0)) : int(np.ceil(x1))] = True
    return mask_HW


def _masks_from_label_map(label_map: Any, size_HW: tuple[int, int], name: str) -> np.ndarray:
    if isinstance(label_map, (str, os.PathLike)):
        label_map = _open_image(label_map, name)
    if isinstance(label_map, Image.Image):
        if label_map.mode not in LABEL_MODES:
            raise ValueError(f"{name} is an image of mode {label_map.mode}; accepted: {LABEL_FORMS}")
        label_map = np.asarray(_load_pixels(label_map, name))
    labels_HW = _as_array(label_map)
    if labels_HW is None:
        raise TypeError(f"{name} is a {type(label_map).__name__}; accepted: {LABEL_FORMS}")
    if labels_HW.dtype.kind not in "iu":
        hint = " (a bool mask is no label map: give it as masks)" if labels_HW.dtype == bool else ""
        raise ValueError(f"{name} has dtype {labels_HW.dtype}{hint}; accepted: {LABEL_FORMS}")
    _check_size(labels_HW.shape, size_HW, name)
    labels = np.unique(labels_HW)
    labels = labels[labels != 0]
    if labels.size == 0:
        raise ValueError(f"{name} is 0 everywhere; accepted: at least one other label")
    return labels_HW == labels[:, None, None]
