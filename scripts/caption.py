"""`perceptiondlm caption`: caption regions of image files, print them, write JSON and annotated pictures."""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from perceptiondlm.common.drawing import annotate
from perceptiondlm.common.json_files import read_json, write_json
from perceptiondlm.common.loading import add_model_arguments, generate_settings, load_pipeline
from perceptiondlm.regions_perceptiondlm import load_image, region_masks


MASK_PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".gif")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the subcommand."""
    parser.add_argument("images", nargs="+", type=Path, help="image files")
    regions = parser.add_mutually_exclusive_group(required=True)
    regions.add_argument(
        "--masks",
        nargs="+",
        type=Path,
        help="one image: mask pictures, an array (.npy, .npz), or a .json with RLEs, polygons or COCO annotations; "
        "several images: one such file for each",
    )
    regions.add_argument("--boxes", nargs="+", help="x0,y0,x1,y1 in pixels; for several images one .json file for each")
    regions.add_argument("--label-map", nargs="+", type=Path, help="one integer label map per image (.png or .npy)")
    parser.add_argument("--question", help="asked instead of 'Describe each masked region in detail.'")
    parser.add_argument("--out", type=Path, help="annotated picture; for several images a directory")
    parser.add_argument(
        "--json", type=Path, help="results; a .jsonl file grows image by image and a second run continues it"
    )
    parser.add_argument("--max-regions-per-pass", type=int, help="split the regions of an image into passes")
    add_model_arguments(parser)


def run(options: argparse.Namespace) -> None:
    """Caption all images, one by one, in the order given."""
    regions = list(region_arguments(options))
    if options.out and len(options.images) > 1 and options.out.suffix:
        raise ValueError(f"--out must be a directory for several images, got {options.out}")
    done = finished_images(options.json)
    pipe = load_pipeline(options)
    keywords = generate_settings(options)
    if options.max_regions_per_pass is not None:
        keywords["max_regions_per_pass"] = options.max_regions_per_pass
    results = []
    todo = [pair for pair in zip(options.images, regions, strict=True) if str(pair[0]) not in done]
    for path, (form, value) in tqdm(todo, desc="images", disable=len(todo) < 2):
        image = load_image(path, name=str(path))
        captions = pipe(image, text=options.question, **{form: value}, **keywords)
        result = {"image": str(path), "width": image.width, "height": image.height, "regions": captions}
        results.append(result)
        write_result(result, options.json)
        print_result(result)
        if options.out:
            masks = region_masks((image.height, image.width), **{form: value})
            draw(options, path, image, masks, captions)
    if options.json and options.json.suffix != ".jsonl":
        write_json(options.json, results)


def region_arguments(options: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """The processor's keyword and value of every image's regions."""
    count = len(options.images)
    form, values = next(
        (name, getattr(options, name)) for name in ("masks", "boxes", "label_map") if getattr(options, name)
    )
    if count == 1 and form != "label_map":
        yield form, (read_masks(values) if form == "masks" else read_boxes(values))
        return
    if len(values) != count:
        raise ValueError(f"{count} images need {count} entries of --{form.replace('_', '-')}, got {len(values)}")
    for value in values:
        if form == "masks":
            yield form, read_masks([value])
        elif form == "boxes":
            yield form, read_boxes([value])
        else:
            yield form, np.load(value) if value.suffix == ".npy" else load_label_map(value)


def load_label_map(path: Path) -> Image.Image:
    """A label map as a picture; refuses a missing file by name."""
    if not path.is_file():
        raise FileNotFoundError(f"no label map at {path}")
    return Image.open(path)


def read_masks(paths: list[Path]) -> Any:
    """Masks of one image from pictures, or from one array or JSON file."""
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"no mask file at {path}")
    if all(path.suffix.lower() in MASK_PICTURES for path in paths):
        return list(paths)
    if len(paths) > 1:
        raise ValueError(f"give several mask pictures or one .json, .npy or .npz file, got {[str(p) for p in paths]}")
    (path,) = paths
    if path.suffix == ".npy":
        return np.load(path)
    if path.suffix == ".npz":
        arrays = np.load(path)
        return arrays[arrays.files[0]]
    if path.suffix == ".json":
        return masks_of_json(read_json(path))
    raise ValueError(f"{path}: masks may be {', '.join(MASK_PICTURES)}, .json, .npy or .npz")


def masks_of_json(content: Any) -> Any:
    """The list of masks in a JSON document: a list, or a COCO-like mapping with "annotations"."""
    if isinstance(content, dict) and "annotations" in content:
        content = content["annotations"]
    if isinstance(content, list):
        return [item["mask_rle"] if isinstance(item, dict) and "mask_rle" in item else item for item in content]
    return content


def read_boxes(values: list[str]) -> list:
    """Boxes from `x0,y0,x1,y1` arguments or a JSON file."""
    if len(values) == 1 and str(values[0]).endswith(".json"):
        return read_json(Path(values[0]))
    try:
        return [[float(number) for number in value.split(",")] for value in values]
    except ValueError as error:
        raise ValueError(f"--boxes takes x0,y0,x1,y1 or a .json file, got {values}") from error


def finished_images(path: Path | None) -> set[str]:
    """Images an earlier run already wrote to a .jsonl file; a last line cut short by an interruption is dropped."""
    if path is None or path.suffix != ".jsonl" or not path.exists():
        return set()
    text = path.read_text()
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole)
    return {json.loads(line)["image"] for line in whole.splitlines()}


def write_result(result: dict[str, Any], path: Path | None) -> None:
    """Append a result to a .jsonl file."""
    if path is not None and path.suffix == ".jsonl":
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(json.dumps(result) + "\n")


def print_result(result: dict[str, Any]) -> None:
    """One line per region."""
    lines = [f"{result['image']} ({result['width']} x {result['height']})"]
    for number, region in enumerate(result["regions"], start=1):
        lines.append(f"  {number:3d}  {region['score']:.2f}  {region['caption']}")
    tqdm.write("\n".join(lines))


def draw(options: argparse.Namespace, path: Path, image: Image.Image, masks: np.ndarray, captions: list[dict]) -> None:
    """Write an image's annotated picture."""
    target = options.out if options.out.suffix else options.out / f"{path.stem}.png"
    target.parent.mkdir(parents=True, exist_ok=True)
    annotate(image, masks, [region["caption"] for region in captions]).save(target)
    tqdm.write(f"  picture: {target}")
