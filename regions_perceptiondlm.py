"""Regions, as people have them in memory, brought into one canonical form, one by one.

`regions_of` yields a `Region` per region of an image. What can be read in more than one way, or not at all, is refused:
every message names the item, what was found and what is accepted. docs/inputs.md lists the forms, and the few readings
that are settled by convention. Files of other tools are read by common/region_files.py.

Shape legend: N regions, H rows, W columns, K points of a polygon. Sizes are (height, width) in pixels; boxes are
x0, y0, x1, y1 in pixels, half-open (x1, y1 lie just outside).
"""

from __future__ import annotations

import reprlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
import torch
from PIL import Image

from .coverage_perceptiondlm import CroppedRegion, Region, StripedRegion, decode_counts
from .images_perceptiondlm import is_picture_source, load_pixels, open_image, to_numpy
from .mask_pictures_perceptiondlm import values_of_picture


try:
    from pycocotools import mask as coco_mask
except ImportError:
    coco_mask = None

LABEL_MODES = ("L", "P", "I;16", "I", "F")
BOX_KEYS = ("xmin", "ymin", "xmax", "ymax")
WRAPPERS = ("mask", "segmentation", "mask_rle")  # keys under which a dict holds one region's mask
DEEPEST = 4  # dicts in dicts
HIGH_VALUES = (255, 65535)  # that integer masks use for 1
POLYGON_TOLERANCE = 1  # pixels a polygon may reach beyond the image, and a box must stay below
FRACTION_TOLERANCE = 1e-3  # distance from a whole number that still counts as one
MOST_PIXELS = 2**30  # of a mask that is resized
MASK_FORMS = "array, tensor, picture, path, COCO RLE, annotation or polygon, pipeline output, list of these"
LABEL_FORMS = f"array or tensor (H, W) of whole numbers, path or PIL image of mode {', '.join(LABEL_MODES)}"
POINTS_NEED_A_SEGMENTER = (
    "points show where a region is, not which pixels it has: turn them into masks with a segmenter such as SAM and "
    "give those as masks"
)


@dataclass(frozen=True)
class _Frame:
    """What the regions must fit: the image's size, and how masks are read."""

    size_HW: tuple[int, int]
    threshold: int
    resize: bool
    hint: str  # ends the message about a mask of another size


def regions_of(
    image_size: tuple[int, int],
    masks: Any = None,
    boxes: Any = None,
    label_map: Any = None,
    points: Any = None,
    name: str | None = None,
    threshold: int = 128,
    resize_masks: bool = False,
    size_hint: str = "",
) -> Iterator[Region]:
    """Yield the regions of one image in the order given; none where there is none.

    Args:
        image_size: (height, width) of the image, in pixels.
        masks: one of
            - an array or tensor (N, H, W), (N, 1, H, W) or (H, W): bool, float with values {0, 1}, or integer
              with values {0, 1}, {0, 255} or {0, 65535} in each mask; SAM's list of one such tensor (N, 1, H, W);
            - a picture (PIL, path, bytes, file object, dict of bytes and path) in grey, with values {0, 1},
              {0, 255} or {0, 65535}, from which lossy compression may have moved 99 % of the pixels by up to 16
              levels. Of a palette the colours count if black and white are what it uses, otherwise the indices. Of a
              picture with transparency either the colours or the alpha may hold a mask, or both the same;
            - COCO RLE, compressed (str, bytes) or not (list of int), or a COCO annotation ("segmentation"; where it
              is empty, "bbox" as x, y, width, height);
            - a polygon, rasterised by pycocotools (nested lists are polygons, never bitmaps);
            - an item of `pipeline("image-segmentation")`, or all output of `pipeline("mask-generation")`;
            - a list or tuple of these, one entry per region.
            The depth of lists of numbers decides: [x0, y0, x1, y1, ...] is one ring, hence one region; a list
            of rings alone is one region, their union (with a warning, since one per ring may have been meant); a
            list of lists of rings is one region per entry. Among other forms, a ring is a region. An array (K, 2)
            is a ring, and in the outermost list a region; only where (K, 2) is the image's own size is it a mask.
        boxes: (N, 4) array, tensor or list of x0, y0, x1, y1, half-open, in pixels; a list of dicts with xmin, ymin,
            xmax and ymax, or with such a "box", as detection pipelines give, or of COCO annotations with a "bbox";
            or a detector's dict with "boxes". Fractions of a pixel grow to whole pixels; less than a pixel beyond
            the image is cut off.
        label_map: (H, W) or (1, H, W) array or tensor of whole numbers, or a picture of mode L, P (its indices), I;16,
            I or F. 0 is background, every other value one region, in ascending order. No value may be negative.
        points: refused, since a point is no region.
        name: what messages call the regions; by default the name of the argument given.
        threshold: grey level from which a pixel of a lossily compressed mask picture belongs to the region.
        resize_masks: fit masks and label maps of other sizes to the image, by nearest neighbour.
        size_hint: what a message about a mask of another size adds.

    Raises:
        TypeError: for an object that is none of these forms.
        FileNotFoundError: if a path does not exist.
        ValueError: unless exactly one of masks, boxes and label_map is given, and for values, sizes and
            coordinates outside what is accepted, and a mask without a pixel.
        ImportError: for a polygon without pycocotools installed.
    """
    if points is not None:
        raise ValueError(f"{POINTS_NEED_A_SEGMENTER}; accepted: masks, boxes or label_map")
    arguments = {"masks": masks, "boxes": boxes, "label_map": label_map}
    given = [key for key, value in arguments.items() if value is not None]
    if len(given) != 1:
        raise ValueError(f"give exactly one of masks, boxes and label_map; got {' and '.join(given) or 'none'}")
    frame = _Frame((int(image_size[0]), int(image_size[1])), threshold, resize_masks, size_hint)
    name = name or given[0]
    if label_map is not None:
        yield from _regions_of_labels(label_map, frame, name)
        return
    items, read = (_split_masks(masks), _region) if boxes is None else (_split_boxes(boxes, name), _region_of_box)
    for index, item in enumerate(items):
        region = read(item, frame, f"{name}[{index}]")
        if region is None:
            raise ValueError(f"{name}[{index}] is empty (0 pixels set); accepted: at least 1 pixel")
        yield region


def region_masks(image_size: tuple[int, int], **arguments: Any) -> np.ndarray:
    """All regions of an image as bool masks (N, H, W), N >= 0; the arguments are those of `regions_of`."""
    masks = [region.mask() for region in regions_of(image_size, **arguments)]
    return np.stack(masks) if masks else np.zeros((0, int(image_size[0]), int(image_size[1])), dtype=bool)


# --- masks ------------------------------------------------------------------------------------------------------------


def _split_masks(masks: Any) -> Sequence[Any] | np.ndarray:
    """One entry per region; what is no collection of regions is one region."""
    for _ in range(DEEPEST):
        single = masks[0] if isinstance(masks, (list, tuple)) and len(masks) == 1 else None
        array = as_array(single)
        if isinstance(single, Mapping) and "masks" in single:  # a list of one image's output
            masks = single
        elif array is not None and array.ndim == 4:  # SAM's list of one image's masks
            masks = array
        if isinstance(masks, Mapping) and masks.get("masks") is not None:
            masks = masks["masks"]
        elif (array := as_array(masks)) is not None and array.dtype == object:  # datasets in numpy format
            masks = array.tolist()
        else:
            break
    array = as_array(masks)
    if array is not None:
        if array.ndim and len(array) == 0:
            return []
        array = array[:, 0] if array.ndim == 4 and array.shape[1] == 1 else array
        return array if array.ndim == 3 else [array]
    if not isinstance(masks, (list, tuple)):
        return [masks]
    if len(masks) > 0 and (_is_numbers(masks) or all(_is_numbers(item) for item in masks)):
        if len(masks) > 1 and not _is_numbers(masks):
            warnings.warn(
                f"masks is a list of {len(masks)} flat polygons, read as the rings of one region; for one region per "
                "polygon write [[ring], [ring], ...], and for one region of several rings [[ring, ring, ...]]",
                stacklevel=4,
            )
        return [masks]
    return masks


def _region(region: Any, frame: _Frame, name: str) -> Region | None:
    """One region in any form of a mask; None where no pixel is set."""
    for _ in range(DEEPEST):
        if not isinstance(region, Mapping) or is_picture_source(region):
            break
        if (key := next((key for key in WRAPPERS if key in region), None)) is None or _is_nothing(region[key]):
            return _region_of_dict(region, frame, name)
        region = region[key]
    if isinstance(region, (list, tuple)):
        return _region_of_polygon([region] if region and _is_numbers(region) else region, frame, name)
    if is_picture_source(region):
        region = open_image(region, name)
    if isinstance(region, Image.Image):
        return _region_of_values(values_of_picture(region, name, frame.threshold), frame, name)
    array = as_array(region)
    if array is None:
        raise TypeError(f"{name} is a {type(region).__name__}; accepted: {MASK_FORMS}")
    is_points = array.ndim == 2 and array.shape[1] == 2 and array.shape != frame.size_HW and array.dtype != bool
    if is_points or array.ndim == 1:
        return _region_of_polygon([array], frame, name)
    return _region_of_values(array, frame, name)


def _is_nothing(value: Any) -> bool:
    """Whether a COCO segmentation is empty: none, no ring, or rings without a number."""
    if isinstance(value, (list, tuple)):
        return all(isinstance(ring, (list, tuple)) and not ring for ring in value)
    return value is None or (isinstance(value, (str, Mapping)) and not value)


def _region_of_dict(region: Mapping, frame: _Frame, name: str) -> Region | None:
    if "counts" in region:
        return _region_of_rle(region, frame, name)
    if region.get("bbox") is not None:
        return _region_of_box(region, frame, name)
    accepted = "size and counts, segmentation or bbox, or mask (masks: only as one image's whole input)"
    raise ValueError(f"{name} is a dict of {short(list(region))}; accepted: {accepted}")


def _region_of_values(array: np.ndarray, frame: _Frame, name: str) -> Region | None:
    given = array.shape
    while array.ndim > 2 and len(array) == 1:
        array = array[0]
    if array.shape == (*frame.size_HW, 1):
        array = array[..., 0]
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{name} has dtype {array.dtype}; accepted: bool, integer, float")
    array = _fitted(array, frame, name, given)
    if array.dtype == bool:
        return CroppedRegion.of_mask(array)
    largest = array.max() if array.dtype.kind in "iu" else 1
    mask_HW = array == (largest if largest in HIGH_VALUES else 1)
    stray = ~(mask_HW | (array == 0))
    if stray.any():
        accepted = "bool, integers {0, 1}, {0, 255} or {0, 65535}, floats {0, 1}"
        raise ValueError(f"{name} holds the value {array[stray][0]} ({array.dtype}); accepted: {accepted}")
    return CroppedRegion.of_mask(mask_HW)


def _fitted(array: np.ndarray, frame: _Frame, name: str, given: Sequence[int] | None = None) -> np.ndarray:
    """The array if it has the image's size, its nearest neighbours at that size if masks may be resized."""
    if array.shape == frame.size_HW:
        return array
    if not frame.resize or array.ndim != 2 or array.size == 0:
        raise _wrong_size(given or array.shape, frame, name)
    rows, columns = (np.arange(n) * m // n for n, m in zip(frame.size_HW, array.shape, strict=True))
    return array[rows[:, None], columns]


def _wrong_size(found: Sequence[Any], frame: _Frame, name: str) -> ValueError:
    size = " x ".join(map(str, found)) or "nothing"
    height, width = frame.size_HW
    accepted = f"the image's {height} x {width} (height x width), others with resize_masks=True"
    return ValueError(f"{name} is {size}; accepted: {accepted}{frame.hint}")


def _region_of_rle(region: Mapping, frame: _Frame, name: str) -> Region | None:
    size = _plain_numbers(region.get("size"))
    resized = frame.resize and all(0 < number <= MOST_PIXELS and number % 1 == 0 for number in size)
    if len(size) != 2 or (size != frame.size_HW and not (resized and size[0] * size[1] <= MOST_PIXELS)):
        raise _wrong_size([short(number) for number in size], frame, f"{name} (RLE size)")
    height, width = (int(number) for number in size)
    counts = region["counts"]
    counts = decode_counts(counts, name) if isinstance(counts, (str, bytes)) else counts
    runs = np.asarray(counts) if _is_numbers(counts) else np.asarray(counts, dtype=object)
    whole = runs.ndim == 1 and runs.dtype.kind in "iu"
    # Summed in float64, which no run can wrap round; it is exact below 2**53.
    if not whole or (runs < 0).any() or runs.sum(dtype=np.float64) != height * width:
        total = sum(runs.tolist()) if whole else "none"
        accepted = f"str, bytes or integers >= 0 with sum {height} x {width} = {height * width}"
        raise ValueError(
            f"{name} has RLE counts {runs.dtype} {runs.shape} with sum {short(total)}; accepted: {accepted}"
        )
    found = StripedRegion.of_runs(runs, (height, width))
    if found is None or found.image_size == frame.size_HW:
        return found
    return CroppedRegion.of_mask(_fitted(found.mask(), frame, name))


def _region_of_polygon(rings: Sequence, frame: _Frame, name: str) -> Region | None:
    if coco_mask is None:
        raise ImportError(f"{name} is a polygon, which pycocotools draws: pip install pycocotools")
    if not rings:
        raise ValueError(f"{name} is a polygon of 0 rings; accepted: at least 1")
    height, width = frame.size_HW
    if len(rings) == height and all(_is_numbers(ring) and len(ring) == width for ring in rings):
        raise ValueError(f"{name} looks like a bitmap in nested lists; accepted: numpy.array of it, or polygons")
    flat = [_flat_ring(ring, frame.size_HW, f"{name}, ring {index}") for index, ring in enumerate(rings)]
    runs = decode_counts(coco_mask.merge(coco_mask.frPyObjects(flat, height, width))["counts"], name)
    drawn = StripedRegion.of_runs(runs, frame.size_HW)
    if drawn is None:
        return None
    return StripedRegion.of_strips(drawn.columns, drawn.tops, drawn.bottoms, frame.size_HW, tells_size=False)


def _flat_ring(ring: Any, size_HW: tuple[int, int], name: str) -> list[float]:
    """One ring as x0, y0, x1, y1, ... in pixels, checked."""
    array = as_array(ring)
    if array is None and not _is_numbers(ring):
        raise TypeError(f"{name} is {short(ring)}; accepted: numbers x0, y0, x1, y1, ... or an array (K, 2)")
    values = np.array(_floats(ring)) if array is None else array
    if values.dtype.kind not in "iuf" or not (values.ndim == 1 or (values.ndim == 2 and values.shape[1] == 2)):
        raise ValueError(f"{name} is {values.dtype} {values.shape}; accepted: numbers (2K,) or (K, 2)")
    if values.size < 6 or values.size % 2:
        accepted = "x and y of at least 3 points, flat or as an array (K, 2); boxes are an argument of their own"
        raise ValueError(f"{name} has {values.size} numbers; accepted: {accepted}")
    points_K2 = values.reshape(-1, 2).astype(np.float64)
    _refuse_fractions(points_K2.ravel().tolist(), size_HW, name)
    limits = np.array(size_HW[::-1]) + POLYGON_TOLERANCE
    inside_K = ((points_K2 >= -POLYGON_TOLERANCE) & (points_K2 <= limits)).all(axis=1)
    if not inside_K.all():
        accepted = f"finite, at most {POLYGON_TOLERANCE} px outside the {size_HW[0]} x {size_HW[1]} image"
        raise ValueError(f"{name} has the point x, y = {points_K2[~inside_K][0].tolist()}; accepted: {accepted}")
    return points_K2.ravel().tolist()


# --- boxes ------------------------------------------------------------------------------------------------------------


def _split_boxes(boxes: Any, name: str) -> Sequence[Any] | np.ndarray:
    if isinstance(boxes, (list, tuple)) and len(boxes) == 1 and isinstance(boxes[0], Mapping) and "boxes" in boxes[0]:
        boxes = boxes[0]
    if isinstance(boxes, Mapping) and "boxes" in boxes:  # a detector's output
        boxes = boxes["boxes"]
    array = as_array(boxes)
    if array is not None and array.dtype == object:  # datasets in numpy format
        boxes, array = array.tolist(), None
    if array is None and not isinstance(boxes, (list, tuple)):
        raise TypeError(f"{name} is a {type(boxes).__name__}; accepted: (N, 4) or a list, one box per region")
    if array is not None and array.shape[:1] == (0,):
        return []
    if array is not None and (array.ndim != 2 or array.shape[1] != 4):
        raise ValueError(f"{name} has shape {array.shape}; accepted: (N, 4)")
    return boxes if array is None else array


def _region_of_box(region: Any, frame: _Frame, name: str) -> Region | None:
    box, height, width = region, *frame.size_HW
    is_coco = isinstance(region, Mapping) and "box" not in region and "bbox" in region
    if isinstance(region, Mapping):
        box = region["bbox"] if is_coco else region.get("box", region)
    if isinstance(box, Mapping):
        if not all(key in box for key in BOX_KEYS):
            raise ValueError(f"{name} is a dict of {short(list(box))}; accepted: {', '.join(BOX_KEYS)}, box or bbox")
        box = [box[key] for key in BOX_KEYS]
    if not _is_numbers(box):
        raise TypeError(f"{name} is {short(box)}; accepted: numbers x0, y0, x1, y1 or {', '.join(BOX_KEYS)}")
    if len(box) != 4:
        raise ValueError(f"{name} has {len(box)} numbers; accepted: x0, y0, x1, y1")
    edges = _floats(box)
    _refuse_fractions(edges, frame.size_HW, name)
    x0, y0, x1, y1 = edges if not is_coco else (*edges[:2], edges[0] + edges[2], edges[1] + edges[3])
    tolerated = all(low > -POLYGON_TOLERANCE for low in (x0, y0))
    tolerated = tolerated and x1 < width + POLYGON_TOLERANCE and y1 < height + POLYGON_TOLERANCE
    low_x, low_y, high_x, high_y = max(x0, 0), max(y0, 0), min(x1, width), min(y1, height)
    if not (tolerated and low_x < high_x and low_y < high_y):
        accepted = f"finite 0 <= x0 < x1 <= {width}, 0 <= y0 < y1 <= {height}"
        accepted += ", as x, y, width, height" if is_coco else ""
        raise ValueError(f"{name} is {edges}; accepted: {accepted}")
    whole = (int(np.floor(low_x)), int(np.floor(low_y)), int(np.ceil(high_x)), int(np.ceil(high_y)))
    return StripedRegion.of_box(whole, frame.size_HW)


def _refuse_fractions(numbers: list[float], size_HW: tuple[int, int], name: str) -> None:
    """Refuse coordinates that are shares of the image: all in [0, 1], and not all of them whole."""
    close = all(-FRACTION_TOLERANCE <= number <= 1 + FRACTION_TOLERANCE for number in numbers)
    if close and any(abs(number - round(number)) > FRACTION_TOLERANCE for number in numbers):
        pixels = f"x times {size_HW[1]} and y times {size_HW[0]}"
        raise ValueError(f"{name} is {short(numbers)}, fractions of the image it seems; accepted: pixels ({pixels})")


# --- label maps -------------------------------------------------------------------------------------------------------


def _regions_of_labels(label_map: Any, frame: _Frame, name: str) -> Iterator[Region]:
    if is_picture_source(label_map):
        label_map = open_image(label_map, name)
    if isinstance(label_map, Image.Image):
        if label_map.mode not in LABEL_MODES and not label_map.mode.startswith("I;16"):
            raise ValueError(f"{name} is an image of mode {label_map.mode}; accepted: {LABEL_FORMS}")
        label_map = np.asarray(load_pixels(label_map, name))
    labels_HW = as_array(label_map)
    if labels_HW is None:
        raise TypeError(f"{name} is a {type(label_map).__name__}; accepted: {LABEL_FORMS}")
    while labels_HW.ndim > 2 and len(labels_HW) == 1:
        labels_HW = labels_HW[0]
    if labels_HW.dtype.kind not in "iuf":
        hint = " (a bool mask is no label map: give it as masks)" if labels_HW.dtype == bool else ""
        raise ValueError(f"{name} has dtype {labels_HW.dtype}{hint}; accepted: {LABEL_FORMS}")
    labels_HW = _fitted(labels_HW, frame, name)
    labels = np.unique(labels_HW)
    if not np.isfinite(labels).all() or (labels != np.round(labels)).any():
        odd = labels[~np.isfinite(labels) | (labels != np.round(labels))][0]
        raise ValueError(f"{name} ({labels_HW.dtype}) holds the value {odd}; accepted: {LABEL_FORMS}")
    if labels[0] < 0:
        accepted = "0 for background, ids above (add 1 to a map whose background is -1 and whose ids start at 0)"
        raise ValueError(f"{name} holds the negative label {labels[0]:.0f}; accepted: {accepted}")
    for label in labels[labels != 0]:
        region = CroppedRegion.of_mask(labels_HW == label)
        assert region is not None  # the label was found
        yield region


# --- numbers ----------------------------------------------------------------------------------------------------------


def as_array(value: Any) -> np.ndarray | None:
    """The numpy form of an array or tensor, None for anything else."""
    return to_numpy(value) if isinstance(value, (np.ndarray, torch.Tensor)) else None


def _is_numbers(value: Any) -> bool:
    """Whether `value` is a flat sequence of numbers."""
    if isinstance(value, (list, tuple)):
        kinds = set(map(type, value))
        return all(issubclass(kind, Real) and not issubclass(kind, bool) for kind in kinds)
    array = as_array(value)
    return array is not None and array.ndim == 1 and array.dtype.kind in "iuf"


def _plain_numbers(value: Any) -> tuple:
    """A size as a tuple of numbers; () for anything else."""
    array = as_array(value)
    values = array.ravel().tolist() if array is not None else value
    if not isinstance(values, (list, tuple)):
        return ()
    arrays = [as_array(item) for item in values]
    values = [v if array is None else array.tolist() for v, array in zip(values, arrays, strict=True)]
    return tuple(values) if _is_numbers(values) else ()


def _floats(numbers: Any) -> list[float]:
    """Numbers as floats; what is too large for one is infinite."""
    found = []
    for number in numbers:
        try:
            found.append(float(number))
        except OverflowError:
            found.append(float("inf"))
    return found


def short(value: Any) -> str:
    """The beginning of an object's repr, whatever its size and depth."""
    printer = reprlib.Repr()
    printer.maxlist = printer.maxtuple = 12
    printer.maxdict = 8
    printer.maxstring = printer.maxother = printer.maxlong = 60
    return printer.repr(value)
