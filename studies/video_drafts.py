"""Does a caption come faster from the draft of the previous key frame? Measured on drawn scenes that move.

    python -m perceptiondlm.studies.video_drafts --scenes 40 --json studies/results/video_drafts.json

Every scene is a pair of key frames: the whole picture, and one that shows it shifted. The second is captioned from
masks alone, and from the first one's captions (`draft` of `generate`), with `preset="fast"`. Both are scored against
the scene's own captions. The last line is JSON.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from perceptiondlm.common.environment import environment
from perceptiondlm.common.json_files import report_json
from perceptiondlm.common.loading import DRAWN_MODEL, load_pipeline
from perceptiondlm.drawn.scenes import draw_scene


SHIFT = 0.06  # of the picture's sides, between the key frames
LEAST_VISIBLE = 0.5  # of an object, to be captioned in both


def key_frames(seed: int, index: int) -> tuple[list[Image.Image], list[np.ndarray], list[str]]:
    """Two pictures, the masks (N, H, W) of the objects in each, and their captions."""
    scene = draw_scene(seed, index)
    width, height = scene.image.size
    dx, dy = round(SHIFT * width), round(SHIFT * height)
    moved = scene.image.transform(scene.image.size, Image.Transform.AFFINE, (1, 0, dx, 0, 1, dy), fillcolor="white")
    masks = np.stack([item.mask for item in scene.objects])
    shifted = np.zeros_like(masks)
    shifted[:, : height - dy, : width - dx] = masks[:, dy:, dx:]
    seen = shifted.sum(axis=(1, 2)) >= LEAST_VISIBLE * masks.sum(axis=(1, 2))
    captions = [item.caption for item, shown in zip(scene.objects, seen, strict=True) if shown]
    return [scene.image, moved], [masks[seen], shifted[seen]], captions


def decode(pipe: Any, image: Image.Image, masks: np.ndarray, draft: torch.Tensor | None, threshold: float):
    """Ids (A, G), passes and seconds behind the encoded image, from masks alone or from a draft's ids."""
    encoded = pipe.encode_image(image)
    batch = pipe.processor(images=encoded, masks=list(masks))
    settings = {"preset": "fast", "threshold": threshold, "encoded_image": encoded, "draft": draft}
    start = time.perf_counter()
    output = pipe.model.generate(**batch, **settings)
    return output.sequences, output.num_forward_passes, time.perf_counter() - start


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=40)
    parser.add_argument("--seed", type=int, default=500)
    parser.add_argument("--threshold", type=float, default=0.9, help="probability from which a draft's token stays")
    parser.add_argument("--model", default=str(DRAWN_MODEL), help="directory or Hub id")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    pipe = load_pipeline(argparse.Namespace(model=options.model, device=None, dtype="auto", quantize=None))
    found: dict[str, dict[str, list[float]]] = {
        way: {"passes": [], "seconds": [], "right": []} for way in ("masks", "draft")
    }
    for index in tqdm(range(options.scenes), desc="scenes"):
        (first, second), (masks, shifted), captions = key_frames(options.seed, index)
        draft, *_ = decode(pipe, first, masks, None, options.threshold)
        ways = {"masks": None, "draft": draft}
        for way in sorted(ways, reverse=index % 2 == 0):  # in turns
            ids, passes, seconds = decode(pipe, second, shifted, ways[way], options.threshold)
            texts = pipe.processor.tokenizer.batch_decode(ids, skip_special_tokens=True)
            found[way]["passes"].append(passes)
            found[way]["seconds"].append(seconds)
            found[way]["right"] += [text.strip() == caption for text, caption in zip(texts, captions, strict=True)]
    means = {
        way: {name: round(float(np.mean(values)), 3) for name, values in columns.items()}
        for way, columns in found.items()
    }
    result = {
        **vars(options),
        "json": None,
        "regions": len(found["masks"]["right"]),
        **means,
        "environment": environment(),
    }
    report_json(result, options.json)
    return result


if __name__ == "__main__":
    main()
