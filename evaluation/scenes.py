"""Scores of a model on drawn scenes: captions all regions of held-out pictures and lets the rule judge read them."""

import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from tqdm.auto import tqdm

from perceptiondlm.evaluation.judges_rules import SceneJudge
from perceptiondlm.evaluation.scoring import BenchmarkScore, constant_captions, score_captions, shuffled_captions
from perceptiondlm.training.scenes import Scene, draw_scene, scene_class_names, scene_questions


def caption_scenes(
    model, processor, scenes: Sequence[Scene], progress: bool = False, **generate_kwargs: Any
) -> tuple[dict[str, str], dict[str, float]]:
    """Caption every object of every scene, one picture at a time.

    Returns:
        captions by region id, and means over pictures: `tokens_per_forward`, `num_forward_passes`, and
        `seconds_per_image` (processing, generation and decoding).
    """
    captions: dict[str, str] = {}
    totals = {"tokens_per_forward": 0.0, "num_forward_passes": 0.0, "seconds_per_image": 0.0}
    for scene in tqdm(scenes, desc="captioning", disable=not progress):
        start = time.perf_counter()
        masks = [item.mask for item in scene.objects]
        inputs = processor(images=scene.image, masks=masks).to(model.device)
        output = model.generate(**inputs, **generate_kwargs)
        texts = processor.post_process_region_captions(output)[0]
        totals["seconds_per_image"] += time.perf_counter() - start
        totals["tokens_per_forward"] += output.tokens_per_forward
        totals["num_forward_passes"] += output.num_forward_passes
        captions.update(zip(scene.region_ids, texts, strict=True))
    return captions, {name: value / len(scenes) for name, value in totals.items()}


def evaluate_scenes(
    model, processor, seed: int, num_images: int, progress: bool = False, **generate_kwargs: Any
) -> dict[str, Any]:
    """Score a model on scenes 0 to `num_images` - 1 of world `seed` by the protocol of ParaDLC-Bench.

    Returns:
        a JSON-ready report: `positive`, `negative`, `average`, `recognition` and `exact` (share of captions equal to
        the reference) in percent, `per_attribute`, `per_subtype`, speed, two baselines, and every region's caption.
    """
    if num_images < 1:
        raise ValueError(f"num_images must be at least 1, got {num_images}")
    scenes = [draw_scene(seed, index) for index in range(num_images)]
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        captions, speed = caption_scenes(model, processor, scenes, progress, **generate_kwargs)
    model.train(was_training)
    references = {
        region: item.caption for scene in scenes for region, item in zip(scene.region_ids, scene.objects, strict=True)
    }

    questions = {k: v for scene in scenes for k, v in scene_questions(scene).items()}
    class_names = {k: v for scene in scenes for k, v in scene_class_names(scene).items()}

    def score(texts: dict[str, str]) -> BenchmarkScore:
        return score_captions(texts, questions, class_names, SceneJudge())

    result = score(captions)
    ((most_common, _),) = Counter(references.values()).most_common(1)
    constant = score(constant_captions(references, most_common))
    return {
        "dataset": "scenes",
        "seed": seed,
        "num_images": num_images,
        "num_regions": result.num_regions,
        "num_questions": result.num_questions,
        **headline(result),
        "exact": 100 * sum(captions[k] == v for k, v in references.items()) / len(references),
        "per_attribute": result.per_attribute,
        "per_subtype": result.per_subtype,
        **speed,
        "baselines": {
            "chance": headline(score(shuffled_captions(references, seed=0))),
            "constant": headline(constant),
        },
        "captions": [{"region": k, "caption": captions[k], "reference": references[k]} for k in references],
    }


def headline(score: BenchmarkScore) -> dict[str, float]:
    """The four numbers of a row of the paper's Table 2, in percent."""
    return {
        "positive": score.positive or 0.0,
        "negative": score.negative or 0.0,
        "average": score.average or 0.0,
        "recognition": score.recognition,
    }
