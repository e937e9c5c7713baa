"""One table of what people have: the input, and what must come out of it or the key words of its refusal.

The picture is 40 x 60 (height x width); M1 and M2 are two blocks in it.
"""

import base64
import io
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from perceptiondlm.common.region_files import read_regions
from perceptiondlm.images_perceptiondlm import load_image
from perceptiondlm.regions_perceptiondlm import region_masks


SIZE = HEIGHT, WIDTH = 40, 60
PIXELS = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8)


def block(rows, columns):
    mask = np.zeros(SIZE, dtype=bool)
    mask[slice(*rows), slice(*columns)] = True
    return mask


M1, M2 = block((5, 20), (10, 30)), block((25, 38), (35, 58))
FULL, EMPTY = np.ones(SIZE, dtype=bool), np.zeros(SIZE, dtype=bool)
RING1, RING2 = [10, 5, 30, 5, 30, 20, 10, 20], [35, 25, 58, 25, 58, 38, 35, 38]
GREY = M1.astype(np.uint8) * 255


def rle(mask):
    encoded = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": list(SIZE), "counts": encoded["counts"].decode()}


def runs(counts, size=SIZE):
    return {"size": list(size), "counts": counts}


def stored(picture, kind="PNG", **options):
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def reopened(picture, kind="PNG", **options):
    return Image.open(io.BytesIO(stored(picture, kind, **options)))


def palette(mask, colours):
    """A palette picture in which False has the first colour."""
    picture = Image.fromarray(mask.astype(np.uint8), "P")
    picture.putpalette([level for colour in colours for level in colour])
    return picture


def voc_palette():
    def channel(index, shift):
        return sum((index >> (3 * bit + shift) & 1) << (7 - bit) for bit in range(8))

    return [(channel(i, 0), channel(i, 1), channel(i, 2)) for i in range(256)]


def with_alpha(colour, alpha):
    return Image.merge("RGBA", [Image.fromarray(colour)] * 3 + [Image.fromarray(alpha)])


def annotation(mask=None, **more):
    return {"segmentation": [] if mask is None else rle(mask), **more}


WHITE, BLACK = (255, 255, 255), (0, 0, 0)
SAM = torch.from_numpy(np.stack([M1, M2]))[:, None]
LABELS = M1 * 3 + M2 * 7
OUTPUT = {  # input: the masks that must come out
    # SAM, detectors, segmenters
    "SAM's list of one tensor": ({"masks": [SAM]}, [M1, M2]),
    "SAM's list of one tensor of one mask": ({"masks": [SAM[:1]]}, [M1]),
    "SAM's tensor as floats": ({"masks": [SAM.float()]}, [M1, M2]),
    "SAM's list as an array": ({"masks": [SAM.numpy()]}, [M1, M2]),
    "(1, 1, H, W) a region": ({"masks": [SAM[:1], SAM[1:]]}, [M1, M2]),
    "(1, 1, H, W) arrays in a tuple": ({"masks": (SAM[:1].numpy(), SAM[1:].numpy())}, [M1, M2]),
    "list of one mask-generation output": ({"masks": [{"masks": [M1, M2], "scores": [1, 1]}]}, [M1, M2]),
    "a detector's output": ({"boxes": {"boxes": torch.tensor([[10.0, 5, 30, 20]]), "scores": [1]}}, [M1]),
    "a detector's output in a list": ({"boxes": [{"boxes": [[10, 5, 30, 20]], "labels": ["a"]}]}, [M1]),
    # none at all
    "no mask": ({"masks": []}, []),
    "no mask in a tuple": ({"masks": ()}, []),
    "no mask in an array": ({"masks": np.zeros((0, *SIZE), bool)}, []),
    "no mask in SAM's tensor": ({"masks": torch.zeros(0, 1, *SIZE)}, []),
    "no mask in SAM's list": ({"masks": [torch.zeros(0, 1, *SIZE)]}, []),
    "no mask generated": ({"masks": {"masks": [], "scores": []}}, []),
    "no mask generated, as a tensor": ({"masks": {"masks": torch.zeros(0, *SIZE)}}, []),
    "no box": ({"boxes": []}, []),
    "no box in an array": ({"boxes": np.zeros((0, 4))}, []),
    "no box detected": ({"boxes": {"boxes": torch.zeros(0, 4)}}, []),
    "label map of zeros": ({"label_map": np.zeros(SIZE, np.int64)}, []),
    "picture of label zero": ({"label_map": Image.new("L", (WIDTH, HEIGHT))}, []),
    # COCO
    "annotation with a bbox alone": ({"masks": [annotation(bbox=[10, 5, 20, 15])]}, [M1]),
    "annotation with an empty ring": ({"masks": [{"segmentation": [[]], "bbox": [10, 5, 20, 15]}]}, [M1]),
    "annotation with no segmentation": ({"masks": [{"segmentation": None, "bbox": [10.0, 5.0, 20, 15]}]}, [M1]),
    "annotation without the key": ({"masks": [{"bbox": np.array([10, 5, 20, 15])}]}, [M1]),
    "annotations of both kinds": (
        {"masks": [annotation(M2, bbox=[0, 0, 1, 1]), annotation(bbox=[10, 5, 20, 15])]},
        [M2, M1],
    ),
    "boxes of annotations": ({"boxes": [annotation(M2, bbox=[10, 5, 20, 15])]}, [M1]),
    "RLE size as a tensor": ({"masks": [{**rle(M1), "size": torch.tensor(SIZE)}]}, [M1]),
    # pictures
    "palette of black and white": ({"masks": palette(M1, [BLACK, WHITE])}, [M1]),
    "palette of white and black": ({"masks": palette(~M1, [WHITE, BLACK])}, [M1]),
    "inverted palette, reopened PNG": ({"masks": reopened(palette(~M1, [WHITE, BLACK]))}, [M1]),
    "inverted palette, GIF": ({"masks": reopened(palette(~M1, [WHITE, BLACK]), "GIF")}, [M1]),
    "inverted palette, BMP": ({"masks": reopened(palette(~M1, [WHITE, BLACK]), "BMP")}, [M1]),
    "inverted palette, TIFF": ({"masks": reopened(palette(~M1, [WHITE, BLACK]), "TIFF")}, [M1]),
    "inverted palette, PCX": ({"masks": reopened(palette(~M1, [WHITE, BLACK]), "PCX")}, [M1]),
    "inverted palette, TGA": ({"masks": reopened(palette(~M1, [WHITE, BLACK]), "TGA")}, [M1]),
    "quantised": ({"masks": reopened(Image.fromarray(GREY).convert("RGB").quantize(2))}, [M1]),
    "quantised, inverse": ({"masks": reopened(Image.fromarray(255 - GREY).convert("RGB").quantize(2))}, [~M1]),
    "quantised to nearly white": ({"masks": palette(~M1, [(250, 252, 249), (3, 0, 2)])}, [M1]),
    "all white palette": ({"masks": palette(EMPTY, [WHITE])}, [FULL]),
    "VOC's palette": ({"masks": palette(M1, voc_palette())}, [M1]),
    "VOC's palette, reopened": ({"masks": reopened(palette(M1, voc_palette()), optimize=True)}, [M1]),
    "colour on white": ({"masks": palette(M1, [WHITE, (200, 0, 0)])}, [M1]),
    "lossy WebP": ({"masks": reopened(Image.fromarray(GREY).convert("RGB"), "WEBP", quality=60)}, [M1]),
    "lossy WebP in a file": ({"masks": [stored(Image.fromarray(GREY).convert("RGB"), "WEBP", quality=80)]}, [M1]),
    "JPEG in colour": ({"masks": reopened(Image.fromarray(GREY).convert("RGB"), "JPEG", quality=90)}, [M1]),
    "16 bit": ({"masks": reopened(Image.fromarray(M1.astype(np.uint16) * 65535))}, [M1]),
    "16 bit of ones": ({"masks": Image.fromarray(M1.astype(np.uint16))}, [M1]),
    "16 bit array": ({"masks": [M1.astype(np.uint16) * 65535]}, [M1]),
    "32 bit": ({"masks": Image.fromarray(M1.astype(np.int32) * 255)}, [M1]),
    "float picture": ({"masks": Image.fromarray(M1.astype(np.float32))}, [M1]),
    "RGBA, opaque": ({"masks": with_alpha(GREY, GREY * 0 + 255)}, [M1]),
    "RGBA, white cut out": ({"masks": with_alpha(GREY * 0 + 255, GREY)}, [M1]),
    "RGBA, black cut out": ({"masks": with_alpha(GREY * 0, GREY)}, [M1]),
    "RGBA, both the same": ({"masks": with_alpha(GREY, GREY)}, [M1]),
    "RGBA, photo cut out": (
        {"masks": Image.merge("RGBA", [*Image.fromarray(PIXELS).split(), Image.fromarray(GREY)])},
        [M1],
    ),
    "LA": ({"masks": with_alpha(GREY, GREY).convert("LA")}, [M1]),
    "L with a transparent level": ({"masks": reopened(Image.fromarray(GREY), transparency=0)}, [M1]),
    "bytes": ({"masks": [stored(Image.fromarray(GREY))]}, [M1]),
    "file object": ({"masks": [io.BytesIO(stored(Image.fromarray(GREY)))]}, [M1]),
    "datasets' bytes": ({"masks": [{"bytes": stored(Image.fromarray(GREY)), "path": None}]}, [M1]),
    "one of datasets' bytes": ({"masks": {"bytes": stored(Image.fromarray(GREY)), "path": "a.png"}}, [M1]),
    "mixed 0/1 and 0/255": ({"masks": np.stack([M1.astype(np.uint8), M2 * np.uint8(255)])}, [M1, M2]),
    # other sizes
    "resized array": ({"masks": [M1[::2, ::2]], "resize_masks": True}, [M1[::2, ::2].repeat(2, 0).repeat(2, 1)]),
    "resized RLE": (
        {
            "masks": [
                {
                    "size": [80, 120],
                    "counts": coco_mask.encode(np.asfortranarray(M1.repeat(2, 0).repeat(2, 1).astype(np.uint8)))[
                        "counts"
                    ],
                }
            ],
            "resize_masks": True,
        },
        [M1],
    ),
    "resized picture": ({"masks": Image.fromarray(GREY.repeat(3, 0).repeat(3, 1)), "resize_masks": True}, [M1]),
    "resized label map": ({"label_map": LABELS.repeat(2, 0).repeat(2, 1), "resize_masks": True}, [M1, M2]),
    # label maps
    "label map (1, H, W)": ({"label_map": torch.from_numpy(LABELS)[None]}, [M1, M2]),
    "label map (1, 1, H, W)": ({"label_map": LABELS[None, None]}, [M1, M2]),
    "label map of whole floats": ({"label_map": torch.from_numpy(LABELS).float()}, [M1, M2]),
    "label map of bfloat16": ({"label_map": torch.from_numpy(LABELS).bfloat16()}, [M1, M2]),
    "label map of half floats": ({"label_map": LABELS.astype(np.float16)}, [M1, M2]),
    "float picture of labels": ({"label_map": Image.fromarray(LABELS.astype(np.float32))}, [M1, M2]),
    "label map in a black and white palette": ({"label_map": palette(M1, [WHITE, BLACK])}, [M1]),
    "label map in bytes": ({"label_map": stored(Image.fromarray(LABELS.astype(np.uint8)))}, [M1, M2]),
    # boxes
    "box within rounding": ({"boxes": [[-1e-5, 0, 60.0001, 40.00001]]}, [FULL]),
    "tensor of a box within rounding": ({"boxes": torch.tensor([[-1e-3, -1e-3, 60.001, 40.001]])}, [FULL]),
    "box of one pixel": ({"boxes": [[0, 0, 1, 1]]}, [block((0, 1), (0, 1))]),
    # polygons
    "two regions of a ring": ({"masks": [[RING1], [RING2]]}, [M1, M2]),
    "rings as arrays": ({"masks": [np.array(RING1).reshape(-1, 2), np.array(RING2).reshape(-1, 2)]}, [M1, M2]),
}


@pytest.mark.parametrize("case", OUTPUT)
def test_what_comes_out(case):
    arguments, expected = OUTPUT[case]
    found = region_masks(SIZE, **arguments)
    assert found.shape == (len(expected), *SIZE)
    for mask, wanted in zip(found, expected, strict=True):
        np.testing.assert_array_equal(mask, wanted)


BIG = 2**63 - 1
FRACTIONS = "fractions of the image it seems; accepted: pixels (x times 60 and y times 40)"
REFUSED = {  # input: key words of the message
    "counts that wrap": ({"masks": [runs([BIG, BIG, 2402])]}, "with sum 18446744073709554016"),
    "counts that wrap in an array": ({"masks": [runs(np.array([BIG, BIG, 2402]))]}, "RLE counts int64 (3,)"),
    "counts that wrap as uint64": ({"masks": [runs(np.array([2**64 - 1, 2401], np.uint64))]}, "RLE counts uint64"),
    "counts that wrap as int32": ({"masks": [runs(np.array([2**31 - 1, 2**31 - 1, 2402], np.int32))]}, "RLE counts"),
    "counts beyond any integer": ({"masks": [runs([2**64, 2**64])]}, "masks[0] has RLE counts"),
    "counts that wrap in a string": ({"masks": [runs("o" * 11 + "?" + "o" * 11 + "?")]}, "masks[0]"),
    "a number of many bytes": ({"masks": [runs("o" * 40 + "0")]}, "a number of 41 bytes in its RLE string"),
    "differences that wrap": ({"masks": [runs(("o" * 11 + "7") * 40)]}, "masks[0]"),
    "counts that wrap when resized": ({"masks": [runs([BIG, BIG, 2], (1, 1))], "resize_masks": True}, "masks[0]"),
    "huge size when resized": ({"masks": [runs([0, 10**18], (10**9, 10**9))], "resize_masks": True}, "RLE size"),
    "size of words": ({"masks": [runs([2400], ("a", "b"))]}, "(RLE size) is nothing"),
    "ragged size": ({"masks": [{"size": [[1, 2], [3]], "counts": [2400]}]}, "(RLE size) is nothing"),
    "background -1": ({"label_map": LABELS - 1}, "holds the negative label -1; accepted: 0 for background"),
    "background -1 in floats": ({"label_map": torch.from_numpy(LABELS - 1).float()}, "holds the negative label -1"),
    "label map with a fraction": ({"label_map": LABELS + 0.5}, "label_map (float64) holds the value 0.5"),
    "label map with NaN": ({"label_map": np.full(SIZE, np.nan)}, "holds the value nan"),
    "label map with infinity": ({"label_map": np.full(SIZE, np.inf)}, "holds the value inf"),
    "fractions": ({"boxes": [[0.1, 0.1, 0.5, 0.5]]}, FRACTIONS),
    "fractions beside a pixel box": ({"boxes": [[10, 5, 30, 20], [0.1, 0.1, 0.5, 1.0]]}, "boxes[1] is [0.1"),
    "fractions in a tensor": ({"boxes": torch.tensor([[0.1, 0.1, 0.5, 0.5]])}, FRACTIONS),
    "fractions by name": ({"boxes": [{"box": {"xmin": 0.1, "ymin": 0, "xmax": 0.5, "ymax": 1}}]}, FRACTIONS),
    "center and size in fractions": ({"boxes": [[0.5, 0.5, 0.2, 0.2]]}, FRACTIONS),
    "bbox in fractions": ({"masks": [annotation(bbox=[0.1, 0.2, 0.3, 0.4])]}, FRACTIONS),
    "polygon in fractions": ({"masks": [[0.1, 0.1, 0.5, 0.1, 0.5, 0.5]]}, FRACTIONS),
    "box a pixel beyond": ({"boxes": [[0, 0, 61, 5]]}, "boxes[0] is [0.0, 0.0, 61.0, 5.0]"),
    "number of 400 digits": ({"boxes": [[10**400, 0, 5, 5]]}, "boxes[0] is [inf"),
    "polygon of 400 digits": ({"masks": [[10**400, 0, 5, 5, 9, 9]]}, "masks[0], ring 0 has the point"),
    "two different masks in one picture": ({"masks": with_alpha(GREY, M2 * np.uint8(255))}, "tell two different masks"),
    "transparent everywhere": ({"masks": with_alpha(GREY * 0, GREY * 0)}, "tell no mask"),
    "coloured": ({"masks": Image.fromarray(PIXELS)}, "is an RGB image with colours"),
    "16 bit grey": ({"masks": Image.fromarray(M1.astype(np.uint16) * 300)}, "holds the value 300"),
    "another size": ({"masks": [M1[:30]]}, "others with resize_masks=True"),
    "three masks a prompt": ({"masks": [torch.zeros(1, 3, *SIZE)]}, "masks[0] is 1 x 3 x 40 x 60"),
    "points": ({"points": [[12, 7, 1]]}, "a segmenter such as SAM"),
    "points beside masks": ({"points": [[12, 7, 1]], "masks": [M1]}, "a segmenter such as SAM"),
    "annotation of nothing": ({"masks": [{"segmentation": [], "id": 3}]}, "masks[0] is a dict of"),
    "bbox below zero": ({"boxes": [{"bbox": [5, 5, -3, 4]}]}, "as x, y, width, height"),
    "dicts in dicts": ({"masks": [{"mask": {"mask": {"mask": {"mask": {"mask": M1}}}}}]}, "masks[0] is a dict"),
    "bytes of no picture": ({"masks": [b"abc"]}, "masks[0]: 3 bytes cannot be read"),
    "datasets' empty struct": ({"masks": [{"bytes": None, "path": None}]}, "masks[0] is a dict of"),
    "text mode file": ({"masks": [io.StringIO("abc")]}, "binary mode"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case):
    arguments, words = REFUSED[case]
    with pytest.raises((ValueError, TypeError)) as caught:
        region_masks(SIZE, **arguments)
    assert words in str(caught.value)


def test_flat_polygons_warn_that_they_are_one_region():
    with pytest.warns(UserWarning, match="list of 2 flat polygons, read as the rings of one region"):
        np.testing.assert_array_equal(region_masks(SIZE, masks=[RING1, RING2]), [M1 | M2])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        region_masks(SIZE, masks=[[RING1, RING2]])
        region_masks(SIZE, masks=[annotation(M1), {"segmentation": [RING1, RING2]}])


# --- images -----------------------------------------------------------------------------------------------------------

PNG = stored(Image.fromarray(PIXELS))
DATA_URL = "data:image/png;base64," + base64.b64encode(PNG).decode()
IMAGES = {
    "bytes": PNG,
    "bytearray": bytearray(PNG),
    "memoryview": memoryview(PNG),
    "file object": io.BytesIO(PNG),
    "datasets' bytes": {"bytes": PNG, "path": None},
    "datasets' bytes with a path": {"bytes": PNG, "path": "lost.png"},
    "data: URL": DATA_URL,
    "data: URL in capitals": DATA_URL.replace("data:image/png;base64", "DATA:image/png;BASE64"),
    "data: URL with line breaks": DATA_URL[:200] + "\n" + DATA_URL[200:],
    "data: URL without a type": "data:;base64," + base64.b64encode(PNG).decode(),
    "data: URL in percent": "data:image/png," + "".join(f"%{byte:02x}" for byte in PNG),
    "RGBX": Image.fromarray(PIXELS).convert("RGBX"),
}


@pytest.mark.parametrize("case", IMAGES)
def test_images_from_anywhere(case):
    np.testing.assert_array_equal(np.asarray(load_image(IMAGES[case])), PIXELS)


def test_a_file_object_may_have_been_read_before(tmp_path):
    (tmp_path / "A.PNG").write_bytes(PNG)
    with open(tmp_path / "A.PNG", "rb") as file:
        file.read()
        np.testing.assert_array_equal(np.asarray(load_image(file)), PIXELS)
    np.testing.assert_array_equal(np.asarray(load_image({"bytes": None, "path": str(tmp_path / "A.PNG")})), PIXELS)


def transparent(kind):
    colour = Image.new("RGB", (WIDTH, HEIGHT), (200, 30, 30))
    colour.paste((7, 7, 7), (10, 5, 30, 20))
    if kind == "RGB":
        return reopened(colour, transparency=(7, 7, 7)), (200, 30, 30)
    if kind == "L":
        return reopened(colour.convert("L"), transparency=7), (81, 81, 81)
    if kind == "1":
        return reopened(Image.fromarray(M1), transparency=1), (0, 0, 0)
    if kind in ("RGBA", "RGBa", "LA", "La"):
        clear = with_alpha(np.full(SIZE, 90, np.uint8), 255 - GREY)
        return {
            "RGBA": clear,
            "RGBa": clear.convert("RGBa"),
            "LA": clear.convert("LA"),
            "La": clear.convert("LA").convert("La"),
        }[kind], (90, 90, 90)
    picture = palette(M1, [(200, 30, 30), (7, 7, 7)])
    return reopened(picture, "GIF" if kind == "GIF" else "PNG", transparency=1), (200, 30, 30)


@pytest.mark.parametrize("kind", ["RGB", "L", "1", "P", "GIF", "RGBA", "RGBa", "LA", "La"])
def test_transparency_of_every_kind_is_laid_over_white(kind):
    picture, colour = transparent(kind)
    assert picture.has_transparency_data
    found = np.asarray(load_image(picture))
    assert (found[M1] == 255).all()
    assert (found[~M1] == colour).all()


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (DATA_URL[:-400], "truncated or damaged"),
        ("data:image/png;base64,%%%" + "A" * 5000, "data:image/png;base64,…"),
        ("data:" + "x" * 5000, "cannot be read"),
        (base64.b64encode(PNG).decode(), "characters"),
        ("x\0y", "cannot be read"),
        ({"bytes": None, "path": None}, "bytes of an image file, or a path"),
        (io.StringIO("text"), "binary mode"),
        (b"", "0 bytes"),
    ],
)
def test_messages_never_print_contents(source, words):
    with pytest.raises((ValueError, TypeError, OSError)) as caught:
        load_image(source, name="image[3]")
    assert words in str(caught.value)
    assert str(caught.value).startswith("image[3]")
    assert len(str(caught.value)) < 600


# --- EXIF -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def turned():
    """A photo stored as 40 x 60 that viewers show as 60 x 40."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return stored(Image.fromarray(PIXELS), exif=exif)


def test_regions_of_the_turned_picture_are_taken_when_said_so(processor, turned):
    shown = np.asarray(load_image(turned, exif="applied"))
    np.testing.assert_array_equal(shown, np.rot90(PIXELS, -1))
    mask = np.rot90(M1, -1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        applied = processor(images=turned, masks=[mask], exif="applied")
        by_hand = processor(images=Image.fromarray(shown), masks=[mask])
        processor(images=turned, boxes=[[10, 5, 30, 20]], exif="stored")
        processor(images=turned, masks=[M1])  # the size of the mask tells
    for key in by_hand:
        assert torch.equal(applied[key], by_hand[key]), key


@pytest.mark.parametrize("regions", [{"boxes": [[10, 5, 30, 20]]}, {"masks": [[RING1]]}])
def test_an_orientation_that_nobody_decided_about_is_said(processor, turned, regions):
    with pytest.warns(UserWarning, match="image carries EXIF orientation 6.*exif='applied'"):
        processor(images=turned, **regions)


def test_a_mask_of_the_turned_size_names_the_switch(processor, turned):
    with pytest.raises(ValueError, match=r"masks\[0\] is 60 x 40.*EXIF orientation 6, see exif"):
        processor(images=turned, masks=[np.rot90(M1, -1)])
    with pytest.raises(ValueError, match="exif must be one of"):
        processor(images=turned, masks=[M1], exif="turned")


# --- files ------------------------------------------------------------------------------------------------------------


def labelme(**changes):
    shapes = [
        {"label": "a", "shape_type": "polygon", "points": np.array(RING1).reshape(-1, 2).tolist()},
        {"label": "b", "shape_type": "rectangle", "points": [[58, 38], [35, 25]]},
    ]
    return {"version": "5", "imagePath": "a.png", "imageHeight": 40, "imageWidth": 60, "shapes": shapes, **changes}


def percent(ring):
    return [[x / WIDTH * 100, y / HEIGHT * 100] for x, y in zip(ring[::2], ring[1::2], strict=True)]


def brush(mask):
    """Label Studio's run lengths: one run or list after another, lengths in 1, 4, 8 or 16 bits."""
    values = np.repeat(mask.astype(int).ravel() * 255, 4)
    bits = f"{values.size:032b}{7:05b}" + "".join(f"{n - 1:04b}" for n in (1, 4, 8, 16))
    place = 0
    while place < values.size:
        length = 1
        while place + length < values.size and values[place + length] == values[place]:
            length += 1
        bits += f"1{3:02b}{length - 1:016b}{values[place]:08b}"
        place += length
    bits += "0" * (-len(bits) % 8)
    return [int(bits[i : i + 8], 2) for i in range(0, len(bits), 8)]


def task(name, *results):
    return {"id": 1, "data": {"image": f"/data/upload/1/0a1b2c3d-{name}"}, "annotations": [{"result": list(results)}]}


SIZES = {"original_width": WIDTH, "original_height": HEIGHT}
POLYGON = {"type": "polygonlabels", **SIZES, "value": {"points": percent(RING1), "polygonlabels": ["a"]}}
RECTANGLE = {
    "type": "rectanglelabels",
    **SIZES,
    "value": {"x": 35 / 0.6, "y": 25 / 0.4, "width": 23 / 0.6, "height": 13 / 0.4, "rotation": 0},
}
BRUSH = {"type": "brushlabels", **SIZES, "value": {"format": "rle", "rle": brush(M2)}}
CVAT = """<?xml version="1.0"?><annotations>
<image id="0" name="folder/b.png" width="60" height="40"><box label="x" xtl="1" ytl="1" xbr="3" ybr="4"/></image>
<image id="1" name="folder/a.png" width="60" height="40">
<polygon label="x" points="10.0,5.0;30.0,5.0;30.0,20.0;10.0,20.0"/>
<mask label="y" rle="0, 299" left="35" top="25" width="23" height="13"/></image></annotations>"""
TWO_IMAGES = {
    "images": [{"id": 7, "file_name": "x/b.png"}, {"id": 8, "file_name": "x/a.png"}],
    "annotations": [annotation(FULL, image_id=7), annotation(M1, image_id=8), annotation(M2, image_id=8)],
}
YOLO = "0 " + " ".join(f"{n / (HEIGHT if i % 2 else WIDTH):.6f}" for i, n in enumerate(RING1)) + "\r\n"
FILES = {  # file name, contents, form: masks that must come out
    "COCO of two images": ("c.json", TWO_IMAGES, "masks", [M1, M2]),
    "COCO of one image": ("c.JSON", {"annotations": [annotation(M1, image_id=3)]}, "masks", [M1]),
    "COCO with a bbox alone": ("c.json", {"annotations": [annotation(bbox=[10, 5, 20, 15])]}, "masks", [M1]),
    "COCO for boxes": ("c.json", {"annotations": [annotation(M2, bbox=[10, 5, 20, 15])]}, "boxes", [M1]),
    "annotations by image id": ("c.json", [annotation(M1, image_id="a"), annotation(M2, image_id="b")], "masks", [M1]),
    "list of RLEs": ("c.json", [rle(M1), rle(M2)], "masks", [M1, M2]),
    "list of boxes": ("c.json", [[10, 5, 30, 20]], "boxes", [M1]),
    "no annotation": ("c.json", {"annotations": []}, "masks", []),
    "LabelMe": ("a.json", labelme(), "masks", [M1, M2]),
    "LabelMe for boxes": ("a.json", labelme(), "boxes", [M1, M2]),
    "Label Studio": ("s.json", [task("b.png"), task("a.png", POLYGON, RECTANGLE)], "masks", [M1, M2]),
    "Label Studio, brush": ("s.json", [task("other.png", BRUSH)], "masks", [M2]),
    "Label Studio, short export": (
        "s.json",
        [{"image": "/data/a.png", "label": [{**POLYGON["value"], **SIZES}]}],
        "masks",
        [M1],
    ),
    "Label Studio, nothing drawn": ("s.json", [task("a.png")], "masks", []),
    "CVAT": ("c.xml", CVAT, "masks", [M1, M2]),
    "YOLO segmentation": ("a.TXT", YOLO, "masks", [M1]),
    "YOLO boxes": ("a.txt", f"3 {20 / 60} {12.5 / 40} {20 / 60} {15 / 40}\n", "masks", [M1]),
    "YOLO for boxes": ("a.txt", YOLO, "boxes", [M1]),
    "YOLO, empty": ("a.txt", "", "masks", []),
}


def written(folder, name, content, bom=b""):
    path = folder / name
    text = content if isinstance(content, str) else json.dumps(content)
    path.write_bytes(bom + text.encode())
    return path


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"], ids=["plain", "byte order mark"])
@pytest.mark.parametrize("case", FILES)
def test_files_of_other_tools(case, bom, tmp_path):
    name, content, form, expected = FILES[case]
    path = written(tmp_path, name, content, bom)
    found = region_masks(SIZE, **{form: read_regions(path, Path("data/x/a.png"), SIZE, form)})
    assert len(found) == len(expected)
    for mask, wanted in zip(found, expected, strict=True):
        np.testing.assert_array_equal(mask, wanted)


BAD_FILES = {
    "COCO that lacks the image": (
        "c.json",
        {**TWO_IMAGES, "images": [{"id": 7, "file_name": "b.png"}, {"id": 8, "file_name": "c.png"}]},
        "is about 2 images",
    ),
    "COCO that has the name twice": (
        "c.json",
        {**TWO_IMAGES, "images": [{"id": 7, "file_name": "p/a.png"}, {"id": 8, "file_name": "q/a.png"}]},
        "2 of them is named a.png",
    ),
    "COCO without images": ("c.json", {"annotations": TWO_IMAGES["annotations"]}, "none of them is named a.png"),
    "JSON of 100,000 brackets": ("c.json", "[" * 100_000, "c.json is JSON nested too deeply"),
    "cut JSON": ("c.json", '{"annotations": [{"segm', "c.json is not JSON"),
    "JSON in another encoding": ("c.json", "\udcff", "c.json is not JSON"),
    "JSON with 5,000 digits": ("c.json", "[" + "9" * 5000 + "]", "c.json is not JSON"),
    "LabelMe of another size": ("a.json", labelme(imageHeight=80), "was drawn on an image of 80 x 60"),
    "LabelMe with a line": (
        "a.json",
        labelme(shapes=[{"shape_type": "line", "points": [[1, 2], [3, 4]]}]),
        "a line, which is no region",
    ),
    "LabelMe without points": ("a.json", labelme(shapes=[{"label": "x"}]), "not laid out as its kind of file"),
    "Label Studio by two people": (
        "s.json",
        [{**task("a.png"), "annotations": [{"result": [POLYGON]}] * 2}],
        "by several people",
    ),
    "Label Studio, cut brush": (
        "s.json",
        [task("a.png", {**BRUSH, "value": {"rle": brush(M2)[:20]}})],
        "its rle ends early",
    ),
    "CVAT without the image": ("c.xml", CVAT.replace("a.png", "c.png"), "is about 2 images"),
    "cut CVAT": ("c.xml", CVAT[:300], "c.xml is no XML"),
    "CVAT mask of another size": ("c.xml", CVAT.replace("0, 299", "0, 300"), "a mask of 300 pixels"),
    "YOLO of words": ("a.txt", "cat 0.1 x\n", "a.txt, line 1"),
    "YOLO in pixels": ("a.txt", "0 10 5 30 5 30 20\n", "a.txt, line 1 leaves [0, 1]"),
    "YOLO of three numbers": ("a.txt", "0 0.1 0.2 0.3\n", "has 3 coordinates"),
    "another suffix": ("a.csv", "", "masks may be"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_files_that_are_refused(case, tmp_path):
    name, content, words = BAD_FILES[case]
    path = tmp_path / name
    path.write_bytes((content if isinstance(content, str) else json.dumps(content)).encode(errors="surrogateescape"))
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the words are checked below
        read_regions(path, Path("data/a.png"), SIZE)
    assert words in str(caught.value)


def test_arrays_in_files(tmp_path):
    np.save(tmp_path / "m.npy", np.stack([M1, M2]))
    np.savez(tmp_path / "one.npz", np.stack([M1, M2]))
    np.savez(tmp_path / "named.npz", scores=np.ones(2), masks=np.stack([M1, M2]))
    np.savez(tmp_path / "two.npz", a=M1, b=M2)
    for name in ("m.npy", "one.npz", "named.npz"):
        masks = read_regions(tmp_path / name, Path("a.png"), SIZE)
        np.testing.assert_array_equal(region_masks(SIZE, masks=masks), [M1, M2])
    with pytest.raises(ValueError, match=r"two\.npz.*holds the arrays \['a', 'b'\]; accepted: one, or one named masks"):
        read_regions(tmp_path / "two.npz", Path("a.png"), SIZE)
    (tmp_path / "cut.npy").write_bytes((tmp_path / "m.npy").read_bytes()[:200])
    (tmp_path / "cut.npz").write_bytes((tmp_path / "one.npz").read_bytes()[:200])
    for name in ("cut.npy", "cut.npz"):
        with pytest.raises(ValueError, match=f"{name} cannot be read as an array"):
            read_regions(tmp_path / name, Path("a.png"), SIZE)
