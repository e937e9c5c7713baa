"""Share of questions about drawn pictures, of whole scenes or single objects, that a model answers exactly."""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from PIL import Image
from tqdm.auto import tqdm

from perceptiondlm.drawn.object_sets import cut, drawn_objects, in_words, object_turns
from perceptiondlm.drawn.scenes import draw_scene, scene_conversation


# What a question about a whole scene asks for, by its first words.
SCENE_KINDS = {"How many": "count", "Is there": "presence", "What color": "color", "List": "list"}

Turns = list[tuple[str, str, str]]  # kind, question and answer


def scene_pictures(seed: int, count: int) -> Iterable[tuple[Image.Image, Turns]]:
    """The first scenes of a world with all questions about each."""
    for index in range(count):
        scene = draw_scene(seed, index)
        turns = scene_conversation(scene)
        yield (
            scene.image,
            [(kind, q, a) for q, a in turns for words, kind in SCENE_KINDS.items() if q.startswith(words)],
        )


def object_pictures(seed: int, count: int) -> Iterable[tuple[Image.Image, Turns]]:
    """Pictures cut around the first objects of a world, with a question of every kind about each."""
    for scene, item in drawn_objects(seed, count):
        yield cut(scene, item), [(kind, *turn) for kind, turn in object_turns(item).items()]


def objects_in_words(seed: int, count: int) -> Iterable[tuple[None, Turns]]:
    """The same questions with words in place of the pictures."""
    for number, (_, item) in enumerate(drawn_objects(seed, count)):
        shown = in_words(item, seed, number)
        yield None, [(kind, f"{shown}\n{q}", a) for kind, (q, a) in object_turns(item).items()]


DATASETS = {
    "scene_conversations": scene_pictures,
    "objects": object_pictures,
    "objects_in_words": objects_in_words,
}


def evaluate_conversations(
    model, processor, dataset: str, seed: int, num_images: int, progress: bool = False, **generate_kwargs: Any
) -> dict[str, Any]:
    """Ask all questions about the first `num_images` pictures of world `seed`.

    Args:
        dataset: one of `DATASETS`.
    Returns:
        a JSON-ready report: `exact` (share of answers equal to the reference) in percent, `per_kind` the same by kind
        of question, `num_questions`, and every answer.
    """
    if num_images < 1:
        raise ValueError(f"num_images must be at least 1, got {num_images}")
    was_training = model.training
    model.eval()
    answers = []
    with torch.inference_mode():
        pictures = DATASETS[dataset](seed, num_images)
        for image, turns in tqdm(pictures, total=num_images, desc="asking", disable=not progress):
            answers += ask(model, processor, image, turns, **generate_kwargs)
    model.train(was_training)
    right = defaultdict(list)
    for answer in answers:
        right[answer["kind"]].append(answer["answer"] == answer["reference"])
    return {
        "dataset": dataset,
        "seed": seed,
        "num_images": num_images,
        "num_questions": len(answers),
        "exact": 100 * sum(map(sum, right.values())) / len(answers),
        "per_kind": {kind: 100 * sum(values) / len(values) for kind, values in sorted(right.items())},
        "answers": answers,
    }


def ask(model, processor, image: Image.Image | None, turns: Turns, **generate_kwargs: Any) -> list[dict[str, str]]:
    """All questions about a picture in one batch, with the answers and the references."""
    questions = [question for _, question, _ in turns]
    images = [[] if image is None else [image]] * len(turns)
    inputs = processor(images=images, text=questions).to(model.device)
    texts = processor.post_process_image_text_to_text(model.generate(**inputs, **generate_kwargs))
    return [
        {"kind": kind, "question": question, "answer": text.strip(), "reference": reference}
        for (kind, question, reference), text in zip(turns, texts, strict=True)
    ]
