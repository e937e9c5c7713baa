"""How well a segmenter finds regions that are known: at their boxes, at a point in them, and among everything.

    python -m perceptiondlm.studies.segmenters --segmenter classical --images 40 --json studies/results/segmenters.json
    python -m perceptiondlm.studies.segmenters --photos ../shared/data/photos/val.json --images 50

Drawn scenes, or the things of photos that cover 0.2 % of them at least, from a JSON list of
`{"image", "regions": [{"segmentation", "isthing", "area"}]}` with COCO RLEs. The last line is JSON.
"""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from perceptiondlm.common.environment import environment
from perceptiondlm.common.json_files import read_json, report_json
from perceptiondlm.drawn.scenes import draw_scene
from perceptiondlm.regions_perceptiondlm import region_masks
from perceptiondlm.serving.found import FoundRegion
from perceptiondlm.serving.segmenters import Segmenter, load_segmenter


LEAST_SHARE = 0.002  # of the image, for a region of a photo


def scenes(count: int, seed: int) -> Iterator[tuple[Image.Image, np.ndarray]]:
    """Drawn scenes with their masks (N, H, W)."""
    for index in range(count):
        scene = draw_scene(seed, index)
        yield scene.image, np.stack([item.mask for item in scene.objects])


def photos(path: Path, count: int) -> Iterator[tuple[Image.Image, np.ndarray]]:
    """Photos with the masks (N, H, W) of their things."""
    for record in read_json(path)[:count]:
        with Image.open(path.parent / record["image"]) as picture:
            image = picture.convert("RGB")
        least = LEAST_SHARE * image.width * image.height
        kept = [r["segmentation"] for r in record["regions"] if r["isthing"] and r["area"] >= least]
        if kept:
            yield image, region_masks((image.height, image.width), masks=kept)


def measure(segmenter: Segmenter, image: Image.Image, masks_NHW: np.ndarray) -> dict[str, list[float]]:
    """Overlaps (IoU) of the known regions with what is found for each, and seconds of CPU time of "everything"."""
    known = [FoundRegion.of_mask(mask) for mask in masks_NHW]
    boxes = [region.box for region in known if region is not None]
    start = time.process_time()
    everything = np.stack([np.zeros_like(masks_NHW[0]), *(r.pixels() for r in segmenter.everything(image))])
    seconds = time.process_time() - start
    at_boxes = [region.pixels() for region in segmenter.at_boxes(image, boxes)]
    at_points = [region.pixels() for region in segmenter.at_points(image, [middle(mask) for mask in masks_NHW])]
    filled = [region.pixels() for region in load_segmenter("none").at_boxes(image, boxes)]
    return {
        "box": [overlap(a, b) for a, b in zip(at_boxes, masks_NHW, strict=True)],
        "box as it is": [overlap(a, b) for a, b in zip(filled, masks_NHW, strict=True)],
        "point": [overlap(a, b) for a, b in zip(at_points, masks_NHW, strict=True)],
        "everything": [max(overlap(found, mask) for found in everything) for mask in masks_NHW],
        "seconds": [seconds],
        "regions": [len(everything) - 1],
    }


def overlap(one_HW: np.ndarray, other_HW: np.ndarray) -> float:
    """Intersection over union of two masks, one of them not empty."""
    return float((one_HW & other_HW).sum() / (one_HW | other_HW).sum())


def middle(mask_HW: np.ndarray) -> tuple[int, int]:
    """The pixel of a mask nearest to its centroid, (x, y)."""
    places = np.argwhere(mask_HW)
    y, x = places[((places - places.mean(axis=0)) ** 2).sum(axis=1).argmin()]
    return int(x), int(y)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--segmenter", default="classical", help="a name of load_segmenter")
    parser.add_argument("--photos", type=Path, help="JSON file of photos with regions, instead of drawn scenes")
    parser.add_argument("--images", type=int, default=40)
    parser.add_argument("--seed", type=int, default=11, help="of the drawn scenes")
    parser.add_argument("--json", type=Path, help="where the result goes")
    options = parser.parse_args(arguments)
    segmenter = load_segmenter(options.segmenter)
    samples = photos(options.photos, options.images) if options.photos else scenes(options.images, options.seed)
    found: dict[str, list[float]] = {}
    for image, masks in tqdm(samples, total=options.images, desc="images"):
        for name, values in measure(segmenter, image, masks).items():
            found.setdefault(name, []).extend(values)
    result: dict[str, Any] = {
        "segmenter": options.segmenter, "source": "photos" if options.photos else "drawn scenes",
        "images": len(found["seconds"]), "known regions": len(found["box"]), "environment": environment(),
        "mean": {name: round(float(np.mean(values)), 3) for name, values in found.items()},
        "half or more": round(float(np.mean(np.array(found["everything"]) >= 0.5)), 3),
    }  # fmt: skip
    report_json(result, options.json)
    return result


if __name__ == "__main__":
    main()
