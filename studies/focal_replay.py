"""What focal replay brings, by size of region: checkpoints of the drawn world on the same unseen scenes.

    python -m perceptiondlm.studies.focal_replay --model focal=drawn/model --model plain=outputs/plain/final \\
        --seed 1000 --images 100 --json studies/results/focal_replay.json

Every checkpoint captions every region; captions are scored by the protocol of ParaDLC-Bench, read by rule, for all
regions and for those of each range of sizes. The last line is JSON.
"""

import argparse
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, AutoProcessor

from perceptiondlm.common.environment import environment
from perceptiondlm.common.json_files import report_json
from perceptiondlm.common.loading import DRAWN_MODEL, from_checkpoint
from perceptiondlm.drawn.scenes import Scene, draw_scene
from perceptiondlm.evaluation.drawn_scenes import asked_of, caption_scenes, headline
from perceptiondlm.evaluation.judges.rules import SceneJudge
from perceptiondlm.evaluation.runner import all_captions, speed
from perceptiondlm.evaluation.scoring import score_captions


BOUNDS = (0.02, 0.05, 0.1)  # of sizes, as shares of the picture


def ranges(scenes: Sequence[Scene]) -> dict[str, list[str]]:
    """The regions of scenes: all of them, and those of each range of sizes that holds any."""
    found: dict[str, list[str]] = {"all": []}
    edges = (0.0, *BOUNDS, 1.0)
    names = [f"{100 * low:g} to {100 * high:g} %" for low, high in pairwise(edges)]
    for scene in scenes:
        for region, item in zip(scene.region_ids, scene.objects, strict=True):
            found["all"].append(region)
            found.setdefault(names[sum(item.mask.mean() >= bound for bound in BOUNDS)], []).append(region)
    return {name: found[name] for name in ("all", *names) if name in found}


def scored(model: Any, processor: Any, scenes: Sequence[Scene], progress: bool = False) -> dict[str, Any]:
    """Seconds per picture and, by range of sizes, the scores of a checkpoint's captions, in percent."""
    with torch.inference_mode():
        images = caption_scenes(model.eval(), processor, scenes, progress)
    captions = all_captions(images)
    questions, class_names = asked_of(scenes)
    sizes = {}
    for name, regions in ranges(scenes).items():
        score = score_captions(
            {region: captions[region] for region in regions},
            {region: questions[region] for region in regions},
            {region: class_names[region] for region in regions},
            SceneJudge(),
        )
        sizes[name] = {"regions": len(regions), **headline(score), **score.per_attribute}
    return {"seconds_per_image": speed(list(images.values()))["seconds_per_image"], "sizes": sizes}


def named_model(text: str) -> tuple[str, str]:
    """NAME=PLACE in two."""
    name, _, place = text.partition("=")
    if not name or not place:
        raise argparse.ArgumentTypeError(f"NAME=DIRECTORY or NAME=HUB_ID is needed, got {text!r}")
    return name, place


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", type=named_model, help="NAME=DIRECTORY or NAME=HUB_ID, repeatable")
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    scenes = [draw_scene(options.seed, index) for index in range(options.images)]
    result: dict[str, Any] = {"seed": options.seed, "num_images": options.images, "systems": {}}
    for name, place in options.model or [("embedded", str(DRAWN_MODEL))]:
        model, processor = from_checkpoint(AutoModel, place), from_checkpoint(AutoProcessor, place)
        result["systems"][name] = scored(model, processor, scenes, progress=True)
    result["environment"] = environment()
    report_json(result, options.json)
    return result


if __name__ == "__main__":
    main()
