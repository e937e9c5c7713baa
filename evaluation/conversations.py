"""Share of questions about whole drawn scenes that a model answers exactly."""

from collections import defaultdict
from typing import Any

import torch
from tqdm.auto import tqdm

from perceptiondlm.training.scenes import draw_scene, scene_conversation


# What a question asks for, by its first words.
KINDS = {"How many": "count", "Is there": "presence", "What color": "color", "List": "list"}


def question_kind(question: str) -> str:
    """What a question of `scene_conversation` asks for, one of the values of `KINDS`."""
    return next(kind for words, kind in KINDS.items() if question.startswith(words))


def evaluate_conversations(
    model, processor, seed: int, num_images: int, progress: bool = False, **generate_kwargs: Any
) -> dict[str, Any]:
    """Ask all questions about scenes 0 to `num_images` - 1 of world `seed`.

    Returns:
        a JSON-ready report: `exact` (share of answers equal to the reference) in percent, `per_kind` the same for
        count, presence, color and list, `num_questions`, and every answer.
    """
    if num_images < 1:
        raise ValueError(f"num_images must be at least 1, got {num_images}")
    was_training = model.training
    model.eval()
    answers = []
    with torch.inference_mode():
        for index in tqdm(range(num_images), desc="asking", disable=not progress):
            answers += ask_scene(model, processor, draw_scene(seed, index), **generate_kwargs)
    model.train(was_training)
    right = defaultdict(list)
    for answer in answers:
        right[question_kind(answer["question"])].append(answer["answer"] == answer["reference"])
    exact = sum(map(sum, right.values())) / len(answers)
    return {
        "dataset": "scene_conversations",
        "seed": seed,
        "num_images": num_images,
        "num_questions": len(answers),
        "exact": 100 * exact,
        "per_kind": {kind: 100 * sum(values) / len(values) for kind, values in sorted(right.items())},
        "answers": answers,
    }


def ask_scene(model, processor, scene, **generate_kwargs: Any) -> list[dict[str, str]]:
    """All questions about a scene in one batch, with the answers and the references."""
    turns = scene_conversation(scene)
    questions = [question for question, _ in turns]
    inputs = processor(images=[[scene.image]] * len(turns), text=questions).to(model.device)
    texts = processor.post_process_image_text_to_text(model.generate(**inputs, **generate_kwargs))
    return [
        {"question": question, "answer": text.strip(), "reference": reference}
        for (question, reference), text in zip(turns, texts, strict=True)
    ]
