"""Scores of a model on drawn scenes: captions all regions of held-out pictures and lets the rule judge read them."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tqdm.auto import tqdm

from perceptiondlm.drawn.scenes import Scene, draw_scene, scene_class_names, scene_questions
from perceptiondlm.evaluation.captions import CaptionedImage
from perceptiondlm.evaluation.judges.rules import SceneJudge
from perceptiondlm.evaluation.runner import all_captions, caption_image, speed
from perceptiondlm.evaluation.scoring import BenchmarkScore, constant_captions, score_captions, shuffled_captions


def caption_scenes(
    model, processor, scenes: Sequence[Scene], progress: bool = False, **settings: Any
) -> dict[str, CaptionedImage]:
    """Caption every object of every scene, one picture at a time; results by image id."""
    images = {}
    for scene in tqdm(scenes, desc="captioning", disable=not progress):
        masks = {region: item.mask for region, item in zip(scene.region_ids, scene.objects, strict=True)}
        images[scene.image_id] = caption_image(model, processor, scene.image_id, scene.image, masks, **settings)
    return images


def evaluate_scenes(
    model, processor, seed: int, num_images: int, progress: bool = False, **settings: Any
) -> dict[str, Any]:
    """Score a model on scenes 0 to `num_images` - 1 of world `seed` by the protocol of ParaDLC-Bench.

    Args:
        settings: see `runner.caption_image`.
    Returns:
        see `scenes_report`.
    """
    if num_images < 1:
        raise ValueError(f"num_images must be at least 1, got {num_images}")
    scenes = [draw_scene(seed, index) for index in range(num_images)]
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        images = caption_scenes(model, processor, scenes, progress, **settings)
    model.train(was_training)
    return scenes_report(scenes, images)


def scenes_report(scenes: Sequence[Scene], images: Mapping[str, CaptionedImage]) -> dict[str, Any]:
    """Score the captions of scenes of one world.

    Returns:
        a JSON-ready report: `positive`, `negative`, `average`, `recognition` and `exact` (share of captions equal to
        the reference) in percent, `per_attribute`, `per_subtype`, speed, two baselines, and every region's caption.
    """
    captions = all_captions(images)
    references = {
        region: item.caption for scene in scenes for region, item in zip(scene.region_ids, scene.objects, strict=True)
    }

    questions, class_names = asked_of(scenes)

    def score(texts: dict[str, str]) -> BenchmarkScore:
        return score_captions(texts, questions, class_names, SceneJudge())

    result = score(captions)
    ((most_common, _),) = Counter(references.values()).most_common(1)
    constant = score(constant_captions(references, most_common))
    return {
        "dataset": "scenes",
        "seed": scenes[0].seed,
        "num_images": len(scenes),
        "num_regions": result.num_regions,
        "num_questions": result.num_questions,
        **headline(result),
        "exact": 100 * sum(captions[k] == v for k, v in references.items()) / len(references),
        "per_attribute": result.per_attribute,
        "per_subtype": result.per_subtype,
        **speed(list(images.values())),
        "baselines": {
            "chance": headline(score(shuffled_captions(references, seed=0))),
            "constant": headline(constant),
        },
        "captions": [{"region": k, "caption": captions[k], "reference": references[k]} for k in references],
    }


def asked_of(scenes: Sequence[Scene]) -> tuple[dict[str, list[dict[str, Any]]], dict[str, str]]:
    """The questions and the class name of every region of scenes, by region id."""
    questions = {region: asked for scene in scenes for region, asked in scene_questions(scene).items()}
    class_names = {region: name for scene in scenes for region, name in scene_class_names(scene).items()}
    return questions, class_names


def headline(score: BenchmarkScore) -> dict[str, float]:
    """The four numbers of a row of the paper's Table 2, in percent."""
    return {
        "positive": score.positive or 0.0,
        "negative": score.negative or 0.0,
        "average": score.average or 0.0,
        "recognition": score.recognition,
    }
