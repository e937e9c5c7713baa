"""Regions and images in every accepted form, every refusal, and exact area pooling."""

from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from perceptiondlm import images_perceptiondlm as images
from perceptiondlm import regions_perceptiondlm as regions
from perceptiondlm.coverage_perceptiondlm import CroppedRegion, StripedRegion
from perceptiondlm.images_perceptiondlm import load_image
from perceptiondlm.regions_perceptiondlm import region_masks, regions_of


HEIGHT, WIDTH = SIZE = (10, 16)
X0, Y0, X1, Y1 = 3, 2, 9, 6
RING = [X0, Y0, X1, Y0, X1, Y1, X0, Y1]
GREY = (np.arange(HEIGHT * WIDTH, dtype=np.uint8) + 40).reshape(SIZE)


def block(x0=X0, y0=Y0, x1=X1, y1=Y1, size=SIZE):
    mask = np.zeros(size, dtype=bool)
    mask[y0:y1, x0:x1] = True
    return mask


MASK = block()
OTHER = block(10, 1, 14, 9)


def rle(mask):
    """Compressed COCO RLE, counts as bytes."""
    return coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))


def rle_as_text(mask):
    encoded = rle(mask)
    return {"size": encoded["size"], "counts": encoded["counts"].decode()}


def rle_as_runs(mask):
    """Uncompressed COCO RLE: column by column, zeros first."""
    flat = mask.ravel(order="F").astype(int)
    changes = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff([0, *changes, flat.size]).tolist()
    return {"size": list(mask.shape), "counts": [0, *runs] if flat[0] else runs}


def grey_picture(mask, mode="L", high=255):
    return Image.fromarray(mask.astype(np.uint8) * high).convert(mode)


def palette_picture(mask, high):
    picture = Image.fromarray(mask.astype(np.uint8) * high)
    picture.putpalette([channel for level in range(256) for channel in (level, 255 - level, 7)])
    assert picture.mode == "P"
    return picture


def segment(mask, label="thing", score=0.9):
    """One item as the image-segmentation pipeline builds it from the panoptic map."""
    return {"score": score, "label": label, "mask": Image.fromarray(mask.astype(np.uint8) * 255)}


def generated(masks, stack=False):
    """What the mask-generation pipeline returns: a list of bool tensors, decoded from RLE and so transposed in
    memory, with its two optional keys; or the masks stacked, as (N, H, W)."""
    boxes = torch.tensor([CroppedRegion.of_mask(mask).box for mask in masks])
    found = [torch.from_numpy(mask.T.copy()).transpose(0, 1) for mask in masks]
    found = torch.stack(found) if stack else found
    rles = [rle_as_runs(mask) for mask in masks]
    return {"masks": found, "scores": torch.ones(len(masks)), "rle_mask": rles, "bounding_boxes": boxes}


def jpeg(mask):
    """A mask stored as JPEG: values near 0 and 255."""
    buffer = BytesIO()
    Image.fromarray(mask.astype(np.uint8) * 255).save(buffer, "JPEG", quality=95)
    return Image.open(buffer)


ONE_REGION = {
    "bool (H, W)": MASK,
    "bool (1, H, W)": MASK[None],
    "bool (N, 1, H, W)": MASK[None, None],
    "int64 01": MASK.astype(np.int64),
    "uint8 255": MASK.astype(np.uint8) * 255,
    "int32 255": MASK.astype(np.int32) * 255,
    "float32 01": MASK.astype(np.float32),
    "torch bool": torch.from_numpy(MASK),
    "torch uint8 255": torch.from_numpy(MASK.astype(np.uint8) * 255),
    "torch int64": torch.from_numpy(MASK.astype(np.int64))[None, None],
    "torch float": torch.from_numpy(MASK).float(),
    "torch bfloat16": torch.from_numpy(MASK).bfloat16(),
    "PIL 1": grey_picture(MASK, "1"),
    "PIL L 255": grey_picture(MASK),
    "PIL L 01": grey_picture(MASK, high=1),
    "PIL P 255": palette_picture(MASK, 255),
    "PIL P 01": palette_picture(MASK, 1),
    "PIL RGB": grey_picture(MASK, "RGB"),
    "RLE bytes": rle(MASK),
    "RLE str": rle_as_text(MASK),
    "RLE runs": rle_as_runs(MASK),
    "RLE runs in an array": {"size": np.array(SIZE), "counts": np.array(rle_as_runs(MASK)["counts"])},
    "annotation with RLE": {"id": 7, "iscrowd": 1, "bbox": [0, 0, 1, 1], "segmentation": rle_as_runs(MASK)},
    "annotation with polygons": {"category_id": 3, "segmentation": [RING]},
    "record with a bool array": {"segmentation": MASK, "area": 24},
    "flat ring": RING,
    "flat ring of floats": tuple(map(float, RING)),
    "flat ring in an array": np.array(RING),
    "rings": [RING],
    "regions of rings": [[RING]],
    "points (K, 2)": np.array(RING).reshape(-1, 2),
    "torch points (K, 2)": torch.tensor(RING, dtype=torch.float32).reshape(-1, 2),
    "two rings, one region": [[X0, Y0, 6, Y0, 6, Y1, X0, Y1], [6, Y0, X1, Y0, X1, Y1, 6, Y1]],
    "image-segmentation item": segment(MASK),
    "image-segmentation output": [segment(MASK)],
    "semantic image-segmentation output": [segment(MASK, score=None)],
    "mask-generation output": generated([MASK]),
    "mask-generation output, stacked": generated([MASK], stack=True),
    "mask-generation output, arrays": {"masks": [MASK], "scores": np.ones(1)},
}


@pytest.mark.parametrize("form", ONE_REGION)
def test_every_form_of_one_region_gives_the_same_mask(form):
    masks = region_masks(SIZE, masks=ONE_REGION[form])
    assert masks.dtype == bool
    np.testing.assert_array_equal(masks, MASK[None])


TWO_REGIONS = {
    "bool (N, H, W)": np.stack([MASK, OTHER]),
    "torch (N, 1, H, W)": torch.from_numpy(np.stack([MASK, OTHER]))[:, None],
    "each mask with its own high value": np.stack([MASK.astype(np.uint8), OTHER.astype(np.uint8) * 255]),
    "tuple of tensors": (torch.from_numpy(MASK), torch.from_numpy(OTHER)),
    "list of bool arrays": [MASK, OTHER],
    "RLEs": [rle(MASK), rle_as_text(OTHER)],
    "regions of rings": [[RING], [[10, 1, 14, 1, 14, 9, 10, 9]]],
    "points (K, 2)": [np.array(RING).reshape(-1, 2), np.array([[10, 1], [14, 1], [14, 9], [10, 9]])],
    "image-segmentation": [segment(MASK), segment(OTHER)],
    "mask-generation": generated([MASK, OTHER]),
    "ring beside RLE": [RING, rle(OTHER)],
    "everything mixed": [segment(MASK), torch.from_numpy(OTHER).float()],
}


@pytest.mark.parametrize("form", TWO_REGIONS)
def test_order_of_several_regions_is_kept(form):
    np.testing.assert_array_equal(region_masks(SIZE, masks=TWO_REGIONS[form]), np.stack([MASK, OTHER]))


def test_rings_of_one_region_are_united():
    rings = [RING, [10, 1, 14, 1, 14, 9, 10, 9]]
    np.testing.assert_array_equal(region_masks(SIZE, masks=rings), (MASK | OTHER)[None])
    points = [[np.array(ring).reshape(-1, 2) for ring in rings]]
    np.testing.assert_array_equal(region_masks(SIZE, masks=points), (MASK | OTHER)[None])


def test_polygon_of_an_l_shape_and_one_reaching_over_the_border_within_tolerance():
    ring = [2, 1, 12, 1, 12, 4, 6, 4, 6, 8, 2, 8]
    np.testing.assert_array_equal(region_masks(SIZE, masks=ring)[0], block(2, 1, 12, 4) | block(2, 4, 6, 8))
    ring = [-0.5, -1, 16.5, -1, 16.5, 11, -0.5, 11]
    assert region_masks(SIZE, masks=ring).all()


def test_array_of_the_size_of_a_two_pixel_wide_image_is_a_mask_not_a_polygon():
    array = np.array([[0, 1], [1, 1], [0, 0], [0, 1]])
    np.testing.assert_array_equal(region_masks((4, 2), masks=array), array[None] == 1)


@pytest.mark.parametrize("seed", range(4))
def test_rle_of_random_masks(seed):
    generator = np.random.default_rng(seed)
    mask = generator.random((37, 23)) < generator.random()
    mask[0, 0] = seed % 2  # also masks that start with a run of 0 zeros
    mask[5, 5] = True
    for encoded in (rle(mask), rle_as_text(mask), rle_as_runs(mask)):
        np.testing.assert_array_equal(region_masks(mask.shape, masks=encoded)[0], mask)


def test_long_runs_of_compressed_rle():
    mask = np.zeros((900, 700), dtype=bool)
    mask[:, 10:400] = True
    mask[3, 500] = True
    np.testing.assert_array_equal(region_masks(mask.shape, masks=rle_as_text(mask))[0], mask)


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_jpeg_mask_is_thresholded(mode):
    mask = block(13, 7, 42, 31, size=(48, 64))
    picture = jpeg(mask)
    assert len(np.unique(np.asarray(picture))) > 2
    np.testing.assert_array_equal(region_masks(mask.shape, masks=picture.convert(mode))[0], mask)


def test_a_hundredth_of_the_grey_values_may_be_far_from_the_ends():
    values = np.zeros((20, 20), dtype=np.uint8)
    values[10:] = 239
    values[0, :2], values[0, 2:4] = 128, 127
    expected = values > 127
    np.testing.assert_array_equal(region_masks((20, 20), masks=Image.fromarray(values))[0], expected)
    values[0, 4] = 127
    with pytest.raises(ValueError, match=r"masks\[0\] has 98\.8% of its grey values near 0 or 255"):
        region_masks((20, 20), masks=Image.fromarray(values))


def test_masks_and_label_map_from_files(tmp_path):
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    grey_picture(MASK).save(paths[0])
    grey_picture(OTHER, "1").save(paths[1])
    np.testing.assert_array_equal(region_masks(SIZE, masks=paths), np.stack([MASK, OTHER]))
    np.testing.assert_array_equal(region_masks(SIZE, masks=str(paths[0])), MASK[None])
    labels = tmp_path / "labels.png"
    Image.fromarray(MASK.astype(np.uint8) * 5).save(labels)
    np.testing.assert_array_equal(region_masks(SIZE, label_map=labels), MASK[None])


def test_result_does_not_share_memory_with_the_input():
    source = MASK[None].copy()
    region_masks(SIZE, masks=source)[:] = True
    np.testing.assert_array_equal(source, MASK[None])


BOX = dict(zip(("xmin", "ymin", "xmax", "ymax"), (X0, Y0, X1, Y1), strict=True))
BOXES = {
    "list": [[X0, Y0, X1, Y1]],
    "tuple of tuples": ((X0, Y0, X1, Y1),),
    "array": np.array([[X0, Y0, X1, Y1]]),
    "list of arrays": [np.array([X0, Y0, X1, Y1])],
    "tensor": torch.tensor([[X0, Y0, X1, Y1]]),
    "fractions grow outwards": [[X0 + 0.9, Y0 + 0.1, X1 - 0.9, Y1 - 0.1]],
    "dict": [BOX],
    "detection": [{"score": 0.98, "label": "cat", "box": BOX}],
    "dict with a list": [{"box": [X0, Y0, X1, Y1]}],
}


@pytest.mark.parametrize("form", BOXES)
def test_boxes_are_half_open_and_become_filled_masks(form):
    masks = region_masks(SIZE, boxes=BOXES[form])
    np.testing.assert_array_equal(masks, MASK[None])
    assert [region.box for region in regions_of(SIZE, boxes=BOXES[form])] == [(X0, Y0, X1, Y1)]


def test_box_of_the_whole_image():
    assert region_masks(SIZE, boxes=[[0, 0, WIDTH, HEIGHT]]).all()


LABELS = MASK * 7 + OTHER * 3
LABEL_MAPS = {
    "int64": LABELS,
    "uint8": LABELS.astype(np.uint8),
    "tensor": torch.from_numpy(LABELS),
    "PIL L": Image.fromarray(LABELS.astype(np.uint8)),
    "PIL P": palette_picture(LABELS, 1),
    "PIL I;16": Image.fromarray(LABELS.astype(np.uint16)),
    "PIL I": Image.fromarray(LABELS.astype(np.int32)),
}


@pytest.mark.parametrize("form", LABEL_MAPS)
def test_label_map_gives_one_region_per_label_in_ascending_order(form):
    np.testing.assert_array_equal(region_masks(SIZE, label_map=LABEL_MAPS[form]), np.stack([OTHER, MASK]))


def with_value(value, dtype, index=1):
    masks = np.stack([MASK] * (index + 1)).astype(dtype)
    masks[index, 0, 0] = value
    return masks


def counts(values, size=SIZE):
    return {"size": list(size), "counts": values}


EMPTY = np.zeros(SIZE, dtype=bool)
TOTAL = HEIGHT * WIDTH
BAD_INPUTS = {
    "nothing": ({}, ValueError, "exactly one of masks, boxes and label_map; got none"),
    "two arguments": ({"masks": MASK, "boxes": [[0, 0, 1, 1]]}, ValueError, "got masks and boxes"),
    "empty mask": ({"masks": [MASK, EMPTY]}, ValueError, "masks[1] is empty (0 pixels set)"),
    "empty segment": ({"masks": [segment(EMPTY)]}, ValueError, "masks[0] is empty"),
    "transposed mask": ({"masks": [MASK, MASK.T]}, ValueError, "masks[1] is 16 x 10; accepted: the image's 10 x 16"),
    "transposed picture": ({"masks": grey_picture(MASK.T)}, ValueError, "masks[0] is 16 x 10"),
    "two masks in one entry": ({"masks": [np.stack([MASK, MASK])]}, ValueError, "masks[0] is 2 x 10 x 16"),
    "two channels": ({"masks": np.zeros((1, 2, *SIZE))}, ValueError, "masks[0] is 1 x 2 x 10 x 16"),
    "integer 2": ({"masks": with_value(2, np.int64)}, ValueError, "masks[1] holds the value 2 (int64)"),
    "negative integer": ({"masks": with_value(-1, np.int8)}, ValueError, "masks[1] holds the value -1 (int8)"),
    "1 beside 255": (
        {"masks": [MASK, with_value(255, np.uint8, 0)[0]]},
        ValueError,
        "masks[1] holds the value 1 (uint8)",
    ),
    "float 0.5": ({"masks": with_value(0.5, np.float32)}, ValueError, "masks[1] holds the value 0.5 (float32)"),
    "float 255": ({"masks": MASK * 255.0}, ValueError, "masks[0] holds the value 255.0 (float64)"),
    "NaN": ({"masks": with_value(np.nan, np.float64)}, ValueError, "masks[1] holds the value nan (float64)"),
    "NaN tensor": (
        {"masks": torch.from_numpy(with_value(np.nan, np.float32))},
        ValueError,
        "accepted: bool, integers {0, 1}, {0, 255} or {0, 65535}, floats {0, 1}",
    ),
    "complex": ({"masks": MASK.astype(complex)}, ValueError, "masks[0] has dtype complex128"),
    "number": ({"masks": [MASK, 3]}, TypeError, "masks[1] is a int"),
    "None": ({"masks": [None]}, TypeError, "masks[0] is a NoneType"),
    "grey picture": ({"masks": Image.fromarray(GREY)}, ValueError, "of its grey values near 0 or 255"),
    "coloured picture": (
        {"masks": Image.new("RGB", (WIDTH, HEIGHT), (255, 0, 0))},
        ValueError,
        "masks[0] is an RGB image with colours",
    ),
    "picture with alpha": ({"masks": Image.new("RGBA", (WIDTH, HEIGHT))}, ValueError, "an image of mode RGBA"),
    "palette with a stray index": ({"masks": palette_picture(MASK, 2)}, ValueError, "masks[0] holds the value 2"),
    "missing file": ({"masks": [MASK, "no/such.png"]}, FileNotFoundError, "masks[1]: there is no file no/such.png"),
    "unknown dict": ({"masks": [{"bitmap": MASK}]}, ValueError, "masks[0] is a dict of ['bitmap']"),
    "two images generated": (
        {"masks": [generated([MASK]), generated([MASK])]},
        ValueError,
        "(masks: only as one image's whole input)",
    ),
    "RLE of another size": ({"masks": rle(MASK.T)}, ValueError, "masks[0] (RLE size) is 16 x 10"),
    "RLE without size": ({"masks": {"counts": [TOTAL]}}, ValueError, "masks[0] (RLE size) is nothing"),
    "RLE too short": ({"masks": counts([1, 2, 3])}, ValueError, "masks[0] has RLE counts int64 (3,) with sum 6"),
    "RLE too long": ({"masks": counts([0, TOTAL + 1])}, ValueError, "with sum 10 x 16 = 160"),
    "RLE with a negative run": ({"masks": counts([-1, TOTAL + 1])}, ValueError, "integers >= 0"),
    "RLE of floats": ({"masks": counts([0.5, TOTAL - 0.5])}, ValueError, "RLE counts float64 (2,)"),
    "RLE of None": ({"masks": counts(None)}, ValueError, "RLE counts object ()"),
    "RLE cut short": ({"masks": counts(rle(MASK)["counts"][:-2])}, ValueError, "masks[0] has RLE counts"),
    "RLE cut inside a number": ({"masks": counts("Q")}, ValueError, "ends inside a number"),
    "RLE with a foreign byte": ({"masks": counts("0 1")}, ValueError, "masks[0] has byte 32"),
    "RLE not in ASCII": ({"masks": counts("0é")}, ValueError, "masks[0] has byte 195"),
    "box among masks": ({"masks": [[0, 0, 5, 5]]}, ValueError, "masks[0], ring 0 has 4 numbers"),
    "odd polygon": ({"masks": [RING, [*RING, 1]]}, ValueError, "masks[0], ring 1 has 9 numbers"),
    "polygon of pairs": ({"masks": [[0, 0], [5, 0], [5, 5]]}, ValueError, "or as an array (K, 2)"),
    "polygon outside": ({"masks": [0, 0, WIDTH + 1.5, 0, 5, 5]}, ValueError, "x, y = [17.5, 0.0]"),
    "polygon above": ({"masks": [[RING], [[0, -2, 5, 0, 5, 5]]]}, ValueError, "masks[1], ring 0 has the point"),
    "polygon with NaN": ({"masks": [0, 0, float("nan"), 0, 5, 5]}, ValueError, "x, y = [nan, 0.0]"),
    "polygon with infinity": ({"masks": [0, 0, 5, float("inf"), 5, 5]}, ValueError, "x, y = [5.0, inf]"),
    "polygon without rings": ({"masks": [MASK, []]}, ValueError, "masks[1] is a polygon of 0 rings"),
    "points of 3": ({"masks": [[np.ones((4, 3))]]}, ValueError, "masks[0], ring 0 is float64 (4, 3)"),
    "flat bools": ({"masks": np.ones(8, dtype=bool)}, ValueError, "masks[0], ring 0 is bool (8,)"),
    "polygon with a string": ({"masks": [[RING, "x"]]}, TypeError, "masks[0], ring 1 is 'x'"),
    "polygon too deep": ({"masks": [[[RING]]]}, TypeError, "masks[0], ring 0 is"),
    "polygon without area": ({"masks": [2, 2, 5, 2, 2, 2]}, ValueError, "masks[0] is empty"),
    "bitmap of lists": ({"masks": MASK.astype(int).tolist()}, ValueError, "looks like a bitmap in nested lists"),
    "boxes as a number": ({"boxes": 3}, TypeError, "boxes is a int"),
    "boxes (N, 5)": ({"boxes": np.zeros((2, 5))}, ValueError, "boxes has shape (2, 5); accepted: (N, 4)"),
    "box of 3": ({"boxes": [[0, 0, 1, 1], [0, 0, 1]]}, ValueError, "boxes[1] has 3 numbers"),
    "box of strings": ({"boxes": [["0", "0", "1", "1"]]}, TypeError, "boxes[0] is ['0', '0', '1', '1']"),
    "box dict": ({"boxes": [{"x": 1}]}, ValueError, "boxes[0] is a dict of ['x']; accepted: xmin, ymin"),
    "box NaN": ({"boxes": [[0, 0, float("nan"), 1]]}, ValueError, "boxes[0] is [0.0, 0.0, nan, 1.0]"),
    "box infinite": ({"boxes": [[0, 0, float("inf"), 1]]}, ValueError, "boxes[0] is [0.0, 0.0, inf, 1.0]"),
    "box empty": ({"boxes": [[2, 2, 2, 5]]}, ValueError, "0 <= x0 < x1 <= 16, 0 <= y0 < y1 <= 10"),
    "box reversed": ({"boxes": [[0, 0, 1, 1], [2, 5, 4, 2]]}, ValueError, "boxes[1] is [2.0, 5.0, 4.0, 2.0]"),
    "box outside": ({"boxes": [[0, 0, 17, 5]]}, ValueError, "boxes[0] is [0.0, 0.0, 17.0, 5.0]"),
    "box below 0": ({"boxes": [[0, -1.1, 5, 5]]}, ValueError, "boxes[0] is [0.0, -1.1, 5.0, 5.0]"),
    "label map of bools": ({"label_map": MASK}, ValueError, "a bool mask is no label map"),
    "label map of fractions": ({"label_map": LABELS * 0.5}, ValueError, "label_map (float64) holds the value 1.5"),
    "label map of another size": ({"label_map": LABELS.T}, ValueError, "label_map is 16 x 10"),
    "label map in colour": ({"label_map": Image.new("RGB", (16, 10))}, ValueError, "an image of mode RGB"),
    "label map of 1 bit": ({"label_map": Image.new("1", (16, 10))}, ValueError, "an image of mode 1"),
    "label map as lists": ({"label_map": LABELS.tolist()}, TypeError, "label_map is a list"),
    "own name": ({"masks": [MASK, EMPTY], "name": "masks[4]"}, ValueError, "masks[4][1] is empty"),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_regions_are_refused_by_name(case):
    arguments, error, fragment = BAD_INPUTS[case]
    with pytest.raises(error) as caught:
        region_masks(SIZE, **arguments)
    assert fragment in str(caught.value)


def test_polygon_without_pycocotools_names_the_remedy(monkeypatch):
    monkeypatch.setattr(regions, "coco_mask", None)
    np.testing.assert_array_equal(region_masks(SIZE, masks=rle_as_text(MASK)), MASK[None])
    with pytest.raises(ImportError, match=r"masks\[0\] is a polygon.*pip install pycocotools"):
        region_masks(SIZE, masks=RING)


RGB = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8)


def stored(array, file_format, **options):
    buffer = BytesIO()
    Image.fromarray(array).save(buffer, file_format, **options)
    return buffer.getvalue()


def animation():
    buffer = BytesIO()
    frames = [Image.new("L", (4, 4), level) for level in (0, 200)]
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    return Image.open(buffer)


IMAGES = {
    "PIL RGB": (Image.fromarray(RGB), RGB),
    "array (H, W, 3)": (RGB, RGB),
    "array (H, W)": (GREY, np.stack([GREY] * 3, axis=-1)),
    "tensor (3, H, W)": (torch.from_numpy(RGB).permute(2, 0, 1), RGB),
    "PIL L": (Image.fromarray(GREY), np.stack([GREY] * 3, axis=-1)),
    "PIL 1": (Image.fromarray(MASK), np.stack([MASK * np.uint8(255)] * 3, axis=-1)),
    "PIL P": (palette_picture(MASK, 9), np.where(MASK[..., None], [9, 246, 7], [0, 255, 7])),
}


@pytest.mark.parametrize("form", IMAGES)
def test_images_become_rgb(form):
    source, expected = IMAGES[form]
    image = load_image(source)
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image), expected)


def transparent_palette():
    picture = palette_picture(MASK, 9)
    picture.info["transparency"] = 0
    return picture


TRANSPARENT = {
    "RGBA": Image.merge("RGBA", [*Image.new("RGB", (16, 10), (9, 246, 7)).split(), grey_picture(MASK)]),
    "LA": Image.merge("LA", [Image.new("L", (16, 10), 9), grey_picture(MASK)]),
    "P": transparent_palette(),
}


@pytest.mark.parametrize("mode", TRANSPARENT)
def test_transparency_is_composited_over_white(mode):
    assert TRANSPARENT[mode].mode == mode
    colour = [9, 9, 9] if mode == "LA" else [9, 246, 7]
    expected = np.where(MASK[..., None], colour, 255)
    np.testing.assert_array_equal(np.asarray(load_image(TRANSPARENT[mode])), expected)


def test_image_files_and_addresses(tmp_path, monkeypatch):
    data = stored(RGB, "PNG")
    (tmp_path / "a.png").write_bytes(data)
    asked = []

    def reply(request, timeout):
        asked.append((request.full_url, timeout))
        return BytesIO(data)

    monkeypatch.setattr(images, "urlopen", reply)
    for source in (tmp_path / "a.png", str(tmp_path / "a.png"), "https://example.org/a.png"):
        np.testing.assert_array_equal(np.asarray(load_image(source)), RGB)
    assert asked == [("https://example.org/a.png", images.URL_TIMEOUT_SECONDS)]


def test_exif_orientation_is_not_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    (tmp_path / "a.png").write_bytes(stored(RGB, "PNG", exif=exif))
    image = load_image(tmp_path / "a.png")
    assert image.getexif()[0x0112] == 6
    np.testing.assert_array_equal(np.asarray(image), RGB)


def test_first_picture_of_a_phone_photo_is_taken():
    buffer = BytesIO()
    first, second = Image.new("RGB", (16, 16), (250, 0, 0)), Image.new("RGB", (16, 16), (0, 0, 250))
    first.save(buffer, "MPO", save_all=True, append_images=[second])
    photo = Image.open(buffer)
    assert photo.n_frames == 2
    assert np.asarray(load_image(photo))[..., 0].min() > 240


BAD_IMAGES = {
    "CMYK": (Image.new("CMYK", (4, 4)), ValueError, "image has mode CMYK; accepted: RGB, 1, L, LA, La, P"),
    "YCbCr": (Image.new("YCbCr", (4, 4)), ValueError, "mode YCbCr"),
    "LAB": (Image.new("LAB", (4, 4)), ValueError, "mode LAB"),
    "HSV": (Image.new("HSV", (4, 4)), ValueError, "mode HSV"),
    "I;16": (Image.fromarray(LABELS.astype(np.uint16)), ValueError, "mode I;16"),
    "I": (Image.new("I", (4, 4)), ValueError, "mode I;"),
    "F": (Image.new("F", (4, 4)), ValueError, "mode F"),
    "animated": (animation(), ValueError, "image is animated or has several pages (2 frames)"),
    "no width": (Image.new("RGB", (0, 5)), ValueError, "image is 5 x 0 (height x width)"),
    "empty array": (np.zeros((0, 4, 3), dtype=np.uint8), ValueError, "ndarray of uint8 (0, 4, 3)"),
    "truncated object": (Image.open(BytesIO(stored(RGB, "PNG")[:200])), ValueError, "truncated or damaged"),
    "missing path": ("no/such.png", FileNotFoundError, "image: there is no file no/such.png"),
    "folder": (".", ValueError, "image: . cannot be read"),
    "float array": (RGB / 255, ValueError, "ndarray of float64 (10, 16, 3); accepted: PIL image, path"),
    "bool array": (MASK, ValueError, "ndarray of bool (10, 16)"),
    "channels first": (RGB.transpose(2, 0, 1), ValueError, "ndarray of uint8 (3, 10, 16)"),
    "four channels": (np.zeros((4, 4, 4), dtype=np.uint8), ValueError, "(4, 4, 4)"),
    "tensor channels last": (torch.from_numpy(RGB), ValueError, "Tensor of torch.uint8 (10, 16, 3)"),
    "grey tensor": (torch.from_numpy(GREY), ValueError, "Tensor of torch.uint8 (10, 16)"),
    "float tensor": (torch.zeros(3, 4, 4), ValueError, "Tensor of torch.float32 (3, 4, 4)"),
    "bfloat16 tensor": (torch.zeros(3, 4, 4).bfloat16(), ValueError, "Tensor of torch.bfloat16"),
    "bytes": (b"...", ValueError, "image: 3 bytes cannot be read (no image format fits)"),
    "None": (None, TypeError, "image is a NoneType"),
}


@pytest.mark.parametrize("case", BAD_IMAGES)
def test_bad_images_are_refused(case):
    source, error, fragment = BAD_IMAGES[case]
    with pytest.raises(error) as caught:
        load_image(source)
    assert fragment in str(caught.value)


@pytest.mark.parametrize("file_format", ["PNG", "JPEG"])
def test_truncated_and_foreign_files(tmp_path, file_format):
    path = tmp_path / "image"
    data = stored(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8), file_format)
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"images\[3\] is truncated or damaged") as caught:
        load_image(path, name="images[3]")
    assert caught.value.__cause__ is not None
    path.write_text("no image")
    with pytest.raises(ValueError, match=r"images\[3\]: .*image cannot be read"):
        load_image(path, name="images[3]")


def test_unreachable_address_is_refused(monkeypatch):
    def refuse(request, timeout):
        raise OSError("no route")

    monkeypatch.setattr(images, "urlopen", refuse)
    with pytest.raises(ValueError, match=r"image: http://example\.org/a\.png cannot be read \(no route\)"):
        load_image("http://example.org/a.png")


def random_masks(seed, count=20, size=SIZE, share=0.03):
    masks = np.random.default_rng(seed).random((count, *size)) < share
    masks[:, 4, 7] = True
    return masks


def test_boxes_and_areas_of_regions_are_those_of_their_masks():
    masks = random_masks(1)
    masks[0] = True
    masks[1] = block(15, 9, 16, 10)
    for given in (list(masks), [rle(mask) for mask in masks]):
        for mask, region in zip(masks, regions_of(SIZE, masks=given), strict=True):
            rows, columns = np.nonzero(mask)
            assert region.box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            assert region.area == mask.sum()
            np.testing.assert_array_equal(region.mask(), mask)


def test_regions_are_read_one_by_one():
    found = regions_of(SIZE, masks=[MASK, EMPTY])
    assert next(found).area == MASK.sum()
    with pytest.raises(ValueError, match="empty"):
        next(found)


def slow_pool(values, x_edges, y_edges):
    """Area pooling pixel by pixel: overlap of every pixel with every cell."""
    pooled = np.zeros((len(y_edges) - 1, len(x_edges) - 1))
    for (row, column), value in np.ndenumerate(values):
        for i in range(len(y_edges) - 1):
            for j in range(len(x_edges) - 1):
                height = min(row + 1, y_edges[i + 1]) - max(row, y_edges[i])
                width = min(column + 1, x_edges[j + 1]) - max(column, x_edges[j])
                pooled[i, j] += value * max(height, 0) * max(width, 0)
    return pooled / np.outer(np.diff(y_edges), np.diff(x_edges))


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 5), (10, 16), (23, 37)])
def test_pooling_equals_a_loop_over_pixels_for_masks_and_run_lengths(rows, columns):
    generator = np.random.default_rng(rows)
    masks = random_masks(rows, count=2, share=0.4)
    grids = [
        (np.linspace(0, WIDTH, columns + 1), np.linspace(0, HEIGHT, rows + 1)),
        (np.sort(generator.random(columns + 1)) * WIDTH, np.sort(generator.random(rows + 1)) * HEIGHT),
    ]
    for mask in masks:
        for region in (CroppedRegion.of_mask(mask), *regions_of(SIZE, masks=rle(mask))):
            for x_edges, y_edges in grids:
                pooled = region.pool(x_edges, y_edges)
                assert pooled.dtype == np.float32
                np.testing.assert_allclose(pooled, slow_pool(mask, x_edges, y_edges), atol=1e-6)


def test_run_lengths_are_an_own_form_and_boxes_are_filled():
    (region,) = regions_of(SIZE, masks=rle(MASK))
    assert isinstance(region, StripedRegion)
    (box,) = regions_of(SIZE, boxes=[[X0, Y0, X1, Y1]])
    np.testing.assert_array_equal(box.crop(), np.ones((Y1 - Y0, X1 - X0)))


def test_pooling_over_the_pixels_themselves_changes_nothing():
    for region in (CroppedRegion.of_mask(MASK), *regions_of(SIZE, masks=rle(MASK))):
        np.testing.assert_array_equal(region.pool(np.arange(WIDTH + 1), np.arange(HEIGHT + 1)), MASK)


def test_no_single_pixel_vanishes_from_a_coarse_grid():
    size = (97, 131)
    edges = np.linspace(0, size[1], 8), np.linspace(0, size[0], 6)
    for row, column in [(0, 0), (96, 130), (48, 65), (19, 18)]:
        mask = block(column, row, column + 1, row + 1, size=size)
        pooled = CroppedRegion.of_mask(mask).pool(*edges)
        assert pooled.max() > 0
        area = np.diff(edges[1])[:, None] * np.diff(edges[0])
        assert (pooled * area).sum() == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("bins", [1, 4, 7, 32])
def test_box_coverage_equals_pooling_the_crop(bins):
    for mask in random_masks(bins, count=3, share=0.1):
        for region in (CroppedRegion.of_mask(mask), *regions_of(SIZE, masks=rle(mask))):
            x0, y0, x1, y1 = region.box
            found = region.coverage(bins)
            assert found.dtype == np.float32
            assert 0 <= found.min() <= found.max() <= 1
            edges = np.linspace(0, x1 - x0, bins + 1), np.linspace(0, y1 - y0, bins + 1)
            np.testing.assert_allclose(found, slow_pool(mask[y0:y1, x0:x1], *edges), atol=1e-6)


@pytest.mark.parametrize("bins", [1, 3, 14])
def test_a_mask_that_fills_its_box_is_covered_exactly(bins):
    for mask in (block(5, 5, 6, 6), block(0, 0, 7, 3), block(0, 0, 16, 10), block(13, 2, 16, 9)):
        for region in (CroppedRegion.of_mask(mask), *regions_of(SIZE, masks=rle(mask))):
            np.testing.assert_array_equal(region.coverage(bins), np.ones((bins, bins), dtype=np.float32))


BAD_POOLING = {
    "edges beyond": (lambda region: region.pool(np.array([0, 17]), np.array([0, 10])), "x_edges is [0.0, 17.0]"),
    "edges below": (lambda region: region.pool(np.array([0, 16]), np.array([-1, 10])), "y_edges is [-1.0, 10.0]"),
    "edges repeat": (lambda region: region.pool(np.array([0, 3, 3]), np.array([0, 10])), "increasing values"),
    "one edge": (lambda region: region.pool(np.array([0]), np.array([0, 10])), "2 or more"),
    "NaN edge": (lambda region: region.pool(np.array([0, np.nan, 3]), np.array([0, 10])), "x_edges is [0.0, nan"),
    "no bins": (lambda region: region.coverage(0), "0 bins"),
}


@pytest.mark.parametrize("case", BAD_POOLING)
def test_bad_pooling_arguments_are_refused(case):
    call, fragment = BAD_POOLING[case]
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the fragment is checked below
        call(CroppedRegion.of_mask(MASK))
    assert fragment in str(caught.value)
