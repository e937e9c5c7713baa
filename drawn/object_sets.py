"""Conversation sets about single drawn objects, as parquet in the published format: data for `miniature`.

Every row is one question about an object with its answer, and what tells it: a picture cut around the object, or, in
sets that are text alone, what a picture would show, said in words.
"""

import json
import random
from collections.abc import Collection, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from perceptiondlm.drawn.objects import CATEGORIES
from perceptiondlm.drawn.scenes import Scene, SceneObject, draw_scene


KINDS = ("name", "detail", "color", "pattern", "part")
MARGIN = 0.12  # of an object's longer side, left around it


def phrases(item: SceneObject) -> list[str]:
    """What a picture of an object shows: the whole, then every visible part."""
    return [f"{item.pattern} {item.color} {item.category}", *(f"{p.color} {p.name}" for p in item.visible_parts)]


def in_words(item: SceneObject, seed: int, number: int) -> str:
    """What a picture of object `number` of world `seed` shows, in no order, some of it said twice:
    "blue wings, dotted red bird, blue wings".
    """
    dice = random.Random(f"words/{seed}/{number}")
    said = [phrase for phrase in phrases(item) for _ in range(dice.randint(1, 2))]
    dice.shuffle(said)
    return ", ".join(said)


def object_turns(item: SceneObject) -> dict[str, tuple[str, str]]:
    """A question and its answer for every kind; `part` asks for a part that is there or for one that is not.

    Answers are short: `detail` names one part. The size of an object cannot be seen in a picture cut around it, so no
    answer says it.
    """
    whole, *parts = phrases(item)
    drawn = [part.name for part in item.parts]
    absent = [part.name for part in CATEGORIES[item.category] if part.name not in drawn]
    asked = (absent or [part.name for part in item.visible_parts] or drawn)[-1]
    return {
        "name": ("What is it?", f"{item.color} {item.category}"),
        "detail": ("Describe it in detail.", " with ".join((whole, *parts[:1]))),
        "color": (f"What color is the {item.category}?", item.color),
        "pattern": (f"What pattern does the {item.category} have?", item.pattern),
        "part": (f"Does the {item.category} have the part {asked}?", "yes" if asked in drawn else "no"),
    }


def cut(scene: Scene, item: SceneObject) -> Image.Image:
    """The picture around an object, square where the scene has room."""
    x0, y0, x1, y1 = item.box
    half = (0.5 + MARGIN) * max(x1 - x0, y1 - y0)
    x, y = (x0 + x1) / 2, (y0 + y1) / 2
    width, height = scene.image.size
    left, top = round(max(0, x - half)), round(max(0, y - half))
    return scene.image.crop((left, top, round(min(width, x + half)), round(min(height, y + half))))


def drawn_objects(seed: int, count: int) -> Iterator[tuple[Scene, SceneObject]]:
    """The first objects of a world."""
    index = 0
    while count > 0:
        scene = draw_scene(seed, index)
        for item in scene.objects[:count]:
            yield scene, item
        count -= len(scene.objects[:count])
        index += 1


def write_set(path: Path, seed: int, rows: int, kinds: Collection[str] = KINDS, pictures: bool = True) -> None:
    """Write a parquet set of `rows` questions about objects of world `seed`, the kinds taking turns.

    Without `pictures` the set is text alone.
    """
    if unknown := sorted(set(kinds) - set(KINDS)):
        raise ValueError(f"unknown kinds of questions {unknown}, known are {KINDS}")
    order = list(kinds)
    records = []
    for number, (scene, item) in enumerate(drawn_objects(seed, rows)):
        question, answer = object_turns(item)[order[number % len(order)]]
        shown = "<image>" if pictures else in_words(item, seed, number)
        turns = [{"from": "human", "value": f"{shown}\n{question}"}, {"from": "gpt", "value": answer}]
        record: dict[str, Any] = {"id": f"{seed}-{number}", "conversations": json.dumps(turns)}
        if pictures:
            stream = BytesIO()
            cut(scene, item).save(stream, "PNG")
            record["images"] = [stream.getvalue()]
        records.append(record)
    path.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(records), path / "part-0.parquet")
