"""Items to multiple-choice questions in the published JSON, mutually exclusive, with the published scores.

============================  ==========================================================================================
positive                      1 described rightly; 0.5 described, but not this property; 0 not described; -1 described
                              wrongly
negative part                 -1 mentioned; 0 the object is not mentioned; 1 the object is, the part is not
salient negative              -1 mentioned; 1 not mentioned
============================  ==========================================================================================

Choices are put in an order in which the best one stands at every place equally often.
"""

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from perceptiondlm.data_engine.benchmark.items import NEGATIVE_PART, POSITIVE, Item
from perceptiondlm.evaluation.questions import is_plural


QUESTION = "Which of the following is applicable to the description?"


def question_of(item: Item) -> dict[str, Any]:
    """The question of an item; the choices stand in the published order."""
    if item.kind == POSITIVE:
        question = {"question": QUESTION, "choices": _positive(item), "type": "positive"}
    elif item.kind == NEGATIVE_PART:
        question = {"question": QUESTION, "choices": _part(item), "type": "negative", "subtype": item.kind}
    else:
        question = {"question": QUESTION, "choices": _salient(item), "type": "negative", "subtype": item.kind}
    return {**question, **({} if item.query is None else {"query": dict(item.query)})}


def _is(name: str) -> str:
    return "are" if is_plural(name) else "is"


def _positive(item: Item) -> list[list[Any]]:
    holder = f"{item.part} of the {item.object}" if item.part else item.object
    named = item.part or item.object
    nothing = f"The {item.object} or its {item.part}" if item.part else f"The {item.object}"
    return [
        [f"The {item.property} of the {holder} is mentioned in the description and is {item.value}.", 1],
        [f"{nothing} {_is(named)} not mentioned in the description.", 0],
        [f"The {item.property} of the {holder} is mentioned in the description, but is not {item.value}.", -1],
        [f"The {item.property} of the {named} is not mentioned, but the {holder} {_is(named)}.", 0.5],
    ]


def _part(item: Item) -> list[list[Any]]:
    verb, owner = _is(item.part), _is(item.object)
    return [
        [f"The {item.part} of the {item.object} {verb} mentioned in the description.", -1],
        [f"The {item.object} {owner} not mentioned in the description at all.", 0],
        [f"The {item.object} {owner} mentioned in the description, but no {item.part}.", 1],
    ]


def _salient(item: Item) -> list[list[Any]]:
    phrase = item.value[0].upper() + item.value[1:]
    verb = _is(item.value)
    return [
        [f"{phrase} {verb} mentioned in the description.", -1],
        [f"{phrase} {verb} not mentioned in the description.", 1],
    ]


def questions_of(items: Sequence[Item], seed: int = 0) -> dict[str, list[dict[str, Any]]]:
    """Region id -> its questions, in the order of the items, choices in balanced order.

    Args:
        seed: of the order of choices.
    """
    balanced = balance([question_of(item) for item in items], seed)
    questions: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for item, question in zip(items, balanced, strict=True):
        questions[item.region_id].append(question)
    return dict(questions)


def balance(questions: Sequence[Mapping[str, Any]], seed: int = 0) -> list[dict[str, Any]]:
    """The questions with their choices in another order: of all questions of a type with as many choices, the best
    choice stands at each place equally often, to one."""
    draw = random.Random(f"choices/{seed}")
    groups: dict[tuple, list[int]] = defaultdict(list)
    for number, question in enumerate(questions):
        groups[question["type"], question.get("subtype"), len(question["choices"])].append(number)
    balanced: list[dict[str, Any]] = [dict(question) for question in questions]
    for (*_, count), members in sorted(groups.items(), key=str):
        draw.shuffle(members)
        for turn, number in enumerate(members):
            best, *others = sorted(questions[number]["choices"], key=lambda choice: -choice[1])
            draw.shuffle(others)
            others.insert(turn % count, best)
            balanced[number]["choices"] = [list(choice) for choice in others]
    return balanced
