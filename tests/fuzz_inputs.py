"""Random and mutated inputs through every door; anything but our own refusal is a failure.

    python tests/fuzz_inputs.py --count 20000 --seed 0

An input is good (regions come out, at the image's size), or refused by a ValueError, TypeError or OSError whose message
names the input. A door is a function; which one, and what goes in, depends on the seed and the number alone, so a
failure is repeated with `--only NUMBER`.
"""

import argparse
import base64
import io
import json
import random
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from tqdm.auto import tqdm

from perceptiondlm.common.region_files import read_regions
from perceptiondlm.images_perceptiondlm import load_image, to_numpy
from perceptiondlm.pipeline_perceptiondlm import RegionCaptioningPipeline
from perceptiondlm.regions_perceptiondlm import region_masks
from perceptiondlm.training.data.collator import AnswerCollator
from perceptiondlm.training.data.data_config import DataConfig, LossConfig, SourceConfig
from perceptiondlm.training.data.mixture import build_dataset


SIZE = HEIGHT, WIDTH = 24, 32
NAMES = ("masks", "boxes", "label_map", "points", "image", "region", "sample")  # one of them stands in every message
NUMBERS = (
    0,
    1,
    -1,
    2,
    255,
    256,
    65535,
    2**31,
    2**63 - 1,
    2**63,
    -(2**63),
    10**400,
    0.5,
    -0.5,
    1e-9,
    1e308,
    float("nan"),
    float("inf"),
    True,
    HEIGHT,
    WIDTH,
    HEIGHT * WIDTH,
)
ODDITIES = (
    None,
    "",
    "x",
    b"",
    b"\x00",
    (),
    [],
    {},
    object,
    3 + 4j,
    "é\udcff",
    "[1, 2]",
    range(3),
    np.float32(1),
    np.datetime64("now"),
)


def pool(dice: random.Random) -> list[tuple[str, Any]]:
    """Good inputs of every kind, each with its form."""
    generator = np.random.default_rng(dice.randrange(2**32))
    mask = generator.random(SIZE) < 0.3
    encoded = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    text_rle = {"size": list(SIZE), "counts": encoded["counts"].decode()}
    ring = [3, 2, 20, 2, 20, 15.5, 3, 15]
    picture = Image.fromarray(mask.astype(np.uint8) * 255)
    labels = generator.integers(0, 5, SIZE)
    box = {"xmin": 1, "ymin": 2, "xmax": 9, "ymax": 12}
    return [
        ("masks", mask),
        ("masks", mask[None].astype(np.uint8) * 255),
        ("masks", torch.from_numpy(mask)[None, None]),
        ("masks", [mask, mask]),
        ("masks", [mask.astype(np.float32)]),
        ("masks", picture),
        ("masks", picture.convert("P")),
        ("masks", picture.convert("RGBA")),
        ("masks", picture.quantize(2)),
        ("masks", [encoded]),
        ("masks", [text_rle]),
        ("masks", [{"size": list(SIZE), "counts": [10, 20, HEIGHT * WIDTH - 30]}]),
        ("masks", [[ring]]),
        ("masks", ring),
        ("masks", [{"segmentation": [], "bbox": [1, 2, 8, 9]}]),
        ("masks", {"masks": [mask], "scores": [0.5]}),
        ("masks", [{"mask": picture, "label": "a", "score": 0.5}]),
        ("masks", [{"segmentation": [ring], "id": 3}]),
        ("masks", [stored(picture)]),
        ("boxes", [[1, 2, 9, 12]]),
        ("boxes", np.array([[1.5, 2, 9, 12]])),
        ("boxes", [box]),
        ("boxes", [{"box": box, "score": 0.9}]),
        ("boxes", torch.tensor([[1, 2, 9, 12]])),
        ("label_map", labels),
        ("label_map", torch.from_numpy(labels).float()),
        ("label_map", labels[None]),
        ("label_map", Image.fromarray(labels.astype(np.uint8))),
        ("points", [[3, 4, 1]]),
    ]


def files(dice: random.Random) -> list[tuple[str, bytes]]:
    """Good region files, by suffix."""
    _, rle = pool(dice)[10]
    (rle,) = rle
    ring = [[3, 2], [20, 2], [20, 15], [3, 15]]
    annotations = [{"image_id": i, "segmentation": rle, "bbox": [1, 2, 8, 9]} for i in (1, 2)]
    images = [{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "b.png"}]
    result = {"type": "polygonlabels", "value": {"points": ring}, "original_width": WIDTH, "original_height": HEIGHT}
    brush = {"type": "brushlabels", "value": {"format": "rle", "rle": [0, 0, 12, 0, 58, 1, 255, 255, 254, 1]}}
    shape = {"label": "x", "points": ring, "shape_type": "polygon"}
    contents = [
        {"images": images, "annotations": annotations},
        [rle, rle],
        [[1, 2, 9, 12]],
        {"annotations": annotations[:1]},
        {
            "imageHeight": HEIGHT,
            "imageWidth": WIDTH,
            "shapes": [shape, {**shape, "shape_type": "circle", "points": ring[:2]}],
        },
        [{"data": {"image": "u-a.png"}, "annotations": [{"result": [result, brush]}]}],
    ]
    xml = f"""<annotations><image name="a.png" width="{WIDTH}" height="{HEIGHT}"><polygon points="3,2;20,2;20,15"/>
    <mask rle="0,12" left="3" top="2" width="4" height="3"/>
    <ellipse cx="9" cy="9" rx="3" ry="2" rotation="20"/></image></annotations>"""
    array, arrays = io.BytesIO(), io.BytesIO()
    np.save(array, np.ones((1, *SIZE), bool))
    np.savez(arrays, masks=np.ones((1, *SIZE), bool))
    texts = [(".json", json.dumps(content).encode()) for content in contents]
    binary = [(".npy", array.getvalue()), (".npz", arrays.getvalue())]
    picture = Image.fromarray(np.ones(SIZE, np.uint8) * 255)
    kinds = {
        ".png": "PNG",
        ".gif": "GIF",
        ".tif": "TIFF",
        ".bmp": "BMP",
        ".webp": "WEBP",
        ".jpg": "JPEG",
        ".tga": "TGA",
    }
    pictures = [(suffix, stored(picture, kind)) for suffix, kind in kinds.items()]
    return [
        *texts,
        (".xml", xml.encode()),
        (".txt", b"0 0.1 0.1 0.5 0.1 0.5 0.5\n1 0.5 0.5 0.2 0.2\n"),
        *binary,
        *pictures,
    ]


def stored(picture: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind)
    return buffer.getvalue()


def mutated(value: Any, dice: random.Random, depth: int = 0) -> Any:
    """The value with something of it changed."""
    if dice.random() < 0.06 or depth > 6:
        return dice.choice((*NUMBERS, *ODDITIES))
    if isinstance(value, dict) and value:
        key = dice.choice(list(value))
        kind = dice.randrange(5)
        if kind == 0:
            return {k: v for k, v in value.items() if k != key}
        if kind == 1:
            return {
                **value,
                dice.choice(("masks", "mask", "segmentation", "bbox", "box", "counts", "size", "x")): value[key],
            }
        return {**value, key: mutated(value[key], dice, depth + 1)}
    if isinstance(value, (list, tuple)) and value:
        index, kind = dice.randrange(len(value)), dice.randrange(7)
        items = list(value)
        if kind == 0:
            del items[index]
        elif kind == 1:
            items *= dice.randrange(0, 4)
        elif kind == 2:
            return [items]
        elif kind == 3:
            return items[index]
        elif kind == 4:
            items = tuple(items)
        else:
            items[index] = mutated(items[index], dice, depth + 1)
        return items
    if isinstance(value, (np.ndarray, torch.Tensor)):
        return mutated_array(value, dice)
    if isinstance(value, Image.Image):
        return mutated_picture(value, dice)
    if isinstance(value, (str, bytes)) and value:
        return mutated_text(value, dice)
    return dice.choice(NUMBERS)


def mutated_array(array: Any, dice: random.Random) -> Any:
    array = to_numpy(array)
    array = np.array(array)
    kind = dice.randrange(8)
    if array.dtype.kind not in "biuf":
        return array[:1] if array.ndim else array
    if kind == 0:
        return array.T
    if kind == 1:
        return array[..., : dice.randrange(array.shape[-1] + 1)] if array.ndim else array
    if kind == 2:
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return array.astype(
                dice.choice(
                    (
                        "bool",
                        "int8",
                        "uint16",
                        "int64",
                        "float16",
                        "float64",
                        "complex64",
                        "object",
                        "U8",
                        "datetime64[s]",
                    )
                )
            )
    if kind == 3:
        return array[(None,) * dice.randrange(1, 4)]
    if kind == 4:
        return array.tolist()
    if kind == 5 and array.dtype not in (np.uint16, np.uint32, np.uint64):
        return torch.from_numpy(np.ascontiguousarray(array)).to(
            dice.choice((torch.bfloat16, torch.half, torch.int32, torch.bool, torch.uint8))
        )
    if kind == 6:
        return array * 0
    array = array.astype(dice.choice((np.float64, np.int64)))
    if array.size:
        array.flat[dice.randrange(array.size)] = dice.choice((-1, 2, 7, np.nan if array.dtype == np.float64 else 99))
    return array


def mutated_picture(picture: Image.Image, dice: random.Random) -> Any:
    kind = dice.randrange(4)
    if kind == 0:
        return picture.resize((dice.randrange(1, 40), dice.randrange(1, 40)))
    if kind == 1:
        mode = dice.choice(("1", "L", "P", "RGB", "RGBA", "LA", "I", "F", "CMYK", "YCbCr", "HSV"))
        return picture.convert("L").convert(mode)
    if kind == 2:
        return picture.rotate(dice.randrange(360))
    return mutated_text(stored(picture.convert("RGB")), dice)


def mutated_text(text: Any, dice: random.Random) -> Any:
    start, end = sorted((dice.randrange(len(text) + 1), dice.randrange(len(text) + 1)))
    kind = dice.randrange(4)
    if kind == 0:
        return text[:start]
    if kind == 1:
        return text[:start] + text[end:]
    if kind == 2:
        return text[:end] + text[start:]
    odd = "".join(dice.choice('0123456789eE.-+[]{}",:;<>/\\ \nné') for _ in range(dice.randrange(1, 6)))
    return text[:start] + (odd if isinstance(text, str) else odd.encode()) + text[start + 1 :]


class Doors:
    """The doors, and what they need: a processor and a pipeline of a small model, and a folder for files."""

    def __init__(self, pipe: RegionCaptioningPipeline, folder: Path):
        self.pipe, self.folder = pipe, folder
        self.image = Image.new("RGB", (WIDTH, HEIGHT))
        self.all: tuple[Callable[[random.Random], str], ...] = (
            self.regions,
            self.regions,
            self.regions,
            self.picture,
            self.processor,
            self.pipeline,
            self.file,
            self.file,
            self.record,
        )

    @staticmethod
    def chosen(dice: random.Random) -> tuple[str, Any]:
        form, value = dice.choice(pool(dice))
        for _ in range(dice.randrange(4)):
            value = mutated(value, dice)
        return (form if dice.random() < 0.9 else dice.choice(("masks", "boxes", "label_map"))), value

    def regions(self, dice: random.Random) -> str:
        form, value = self.chosen(dice)
        found = region_masks(SIZE, **{form: value}, resize_masks=dice.random() < 0.2)
        assert found.dtype == bool
        assert found.shape[1:] == SIZE
        return "regions"

    def picture(self, dice: random.Random) -> str:
        source = dice.choice(
            (
                stored(self.image),
                stored(self.image, "JPEG"),
                stored(self.image, "GIF"),
                self.image,
                np.asarray(self.image),
                {"bytes": stored(self.image), "path": None},
                "data:image/png;base64,AAAA",
            )
        )
        for _ in range(dice.randrange(1, 4)):
            source = mutated(source, dice)
        assert load_image(source, exif=dice.choice((None, "applied"))).mode == "RGB"
        return "image"

    def processor(self, dice: random.Random) -> str:
        form, value = self.chosen(dice)
        images, value = ([self.image] * 2, [value, value]) if dice.random() < 0.3 else (self.image, value)
        self.pipe.processor(images=images, **{form: value})
        return "processor"

    def pipeline(self, dice: random.Random) -> str:
        """Samples beside good ones, whose results must survive; the model is asked for one step."""
        form, value = self.chosen(dice)
        good = {"image": self.image, "boxes": []}
        sample: Any = {"image": self.image, form: value, "text": None}
        sample = mutated(sample, dice) if dice.random() < 0.5 else sample
        results = self.pipe([good, sample, good], on_error="skip", max_new_tokens=1, steps=1)
        assert (len(results), results[0], results[2]) == (3, [], [])
        assert (results[1] is None) == (len(self.pipe.failures) == 1)
        if self.pipe.failures:
            raise ValueError(self.pipe.failures[0]["error"])
        return "pipeline"

    def file(self, dice: random.Random) -> str:
        suffix, content = dice.choice(files(dice))
        for _ in range(dice.randrange(4)):
            content = mutated_text(content, dice) if content else content
        path = self.folder / f"region{suffix}"
        path.write_bytes(content)
        form = dice.choice(("masks", "masks", "boxes", "label_map"))
        region_masks(SIZE, **{form: read_regions(path, Path("a.png"), SIZE, form)})
        return "file"

    def record(self, dice: random.Random) -> str:
        """A record of a region set between two good ones: these are trained on whatever it holds."""
        good = {
            "image": "data:image/png;base64," + base64.b64encode(stored(self.image)).decode(),
            "annotations": [{"segmentation": [[1, 1, 9, 1, 9, 9]], "caption": "a red cup"} for _ in range(2)],
        }
        odd = json.loads(json.dumps(good))
        for _ in range(dice.randrange(1, 4)):
            odd = mutated(odd, dice)
        lines = "\n".join(json.dumps(each, default=repr) for each in (good, odd, good))
        path = self.folder / "set.jsonl"
        path.write_bytes(lines.encode(errors="surrogatepass"))
        data = DataConfig([SourceConfig("regions", path=str(path))], max_bad_share=1.0)
        with tempfile.TemporaryDirectory(dir=self.folder) as cache:
            loss = LossConfig(num_slots=8, noise_copies=1)
            dataset = build_dataset(data, loss, self.pipe.processor, self.pipe.model.config, Path(cache))
        report = dataset.report[0]
        assert (report["records"], report["bad"] <= 1) == (3, True)
        collator = AnswerCollator.build(data, loss, self.pipe.processor, self.pipe.model.config)
        collator([dataset[index] for index in range(len(dataset))])
        return "record"


def try_one(doors: Doors, seed: int, number: int) -> str:
    """What became of an input: the door it went through, or "refused". Anything else is raised."""
    dice = random.Random(f"{seed}/{number}")
    door = dice.choice(doors.all)
    try:
        return door(dice)
    except (ValueError, TypeError, OSError) as error:
        if not any(name in str(error) for name in NAMES):
            raise
        last = traceback.extract_tb(error.__traceback__)[-1].filename
        if "site-packages" in last or last.startswith("<"):
            raise
        return "refused"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="repeat one input and show its error")
    options = parser.parse_args()
    from transformers import pipeline

    from perceptiondlm.common.loading import REPOSITORY

    warnings.simplefilter("ignore")
    pipe = pipeline("region-captioning", model=str(REPOSITORY), trust_remote_code=True, device="cpu")
    outcomes: Counter = Counter()
    with tempfile.TemporaryDirectory() as folder:
        doors = Doors(pipe, Path(folder))
        numbers = range(options.count) if options.only is None else [options.only]
        for number in tqdm(numbers):
            try:
                outcomes[try_one(doors, options.seed, number)] += 1
            except Exception:  # noqa: BLE001 - finding these is the purpose
                outcomes["FAILED"] += 1
                print(f"\ninput {number} of seed {options.seed}:\n{traceback.format_exc()}", file=sys.stderr)
    print(dict(outcomes))
    return 1 if outcomes["FAILED"] else 0


if __name__ == "__main__":
    sys.exit(main())
