"""Extraction of attributes: what is there, what is commonly there and is not, and what only other regions show.

By an endpoint that is shown pictures, or by rule in the drawn world. It is a stage of the data engine: its items stand
in the region's facts, under "items".
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

from perceptiondlm.data_engine.benchmark.items import NEGATIVE_PART, POSITIVE, SALIENT, Item, new_item
from perceptiondlm.data_engine.prompts import NEGATIVE_PARTS, REPAIR, SALIENT_NEGATIVES
from perceptiondlm.data_engine.prompts import POSITIVE as POSITIVE_PROMPT
from perceptiondlm.data_engine.record import Changes, Record, Region
from perceptiondlm.data_engine.sources.drawn import scene_of
from perceptiondlm.data_engine.stages.base import HOW, Stage
from perceptiondlm.data_engine.stages.caption import region_key
from perceptiondlm.data_engine.stages.models import chat_model, check_model
from perceptiondlm.data_engine.views import extraction_pictures
from perceptiondlm.drawn.objects import CATEGORIES, Dice
from perceptiondlm.drawn.scenes import SceneObject


ATTRIBUTES = ("size", "color", "pattern")


@dataclass
class Attributes(Stage):
    """Extracts items for every region of an image; the region's category is its name.

    Attributes:
        model: ``rules`` for drawn scenes; or a chat model that sees, such as ``openai:gpt-5.2``.
        most_positive, most_parts, most_salient: items of each kind per region.
        repairs: how often a model whose answer has not the form asked for is told so and asked again.
        options: of the chat model, see `make_judge`.
        seed: of the choice of salient negatives, for ``rules``.
    """

    kind: ClassVar[str] = "attributes"
    model: str = "rules"
    most_positive: int = 8
    most_parts: int = 3
    most_salient: int = 3
    repairs: int = 2
    options: dict[str, Any] = field(default_factory=dict, metadata=HOW)
    seed: int = 0

    def check(self) -> None:
        check_model(self.name, self.model, ("rules",))
        if min(self.most_positive, self.most_parts, self.most_salient, self.repairs) < 0:
            raise ValueError(f"{self.name}: most_positive, most_parts, most_salient and repairs must not be negative")

    def open(self) -> None:
        if self.model != "rules":
            _ = self._chat

    def report(self) -> dict[str, Any]:
        return self._chat.report() if "_chat" in self.__dict__ else {}

    @cached_property
    def _chat(self) -> Any:
        return chat_model(self.model, self.options)

    def run(self, records: Sequence[Record]) -> list[Changes]:
        for record in records:
            if unnamed := [region.id for region in record.kept if not region.category]:
                raise ValueError(f"the regions {unnamed} of {record.id} have no category to be called by")
        extract = self._by_rule if self.model == "rules" else self._by_model
        return [
            {name: {"facts": {"items": [item.to_dict() for item in items]}} for name, items in found.items()}
            for found in map(extract, records)
        ]

    def _by_rule(self, record: Record) -> dict[str, list[Item]]:
        scene = scene_of(record)
        found = {}
        for region in record.kept:
            number = region.facts["object"]
            others = {region_key(record, str(k)): one for k, one in enumerate(scene.objects) if k != number}
            key = region_key(record, region.id)
            dice = Dice(f"{self.seed}/{key}/salient")
            item = scene.objects[number]
            salient = salient_items(key, item, others, dice)[: self.most_salient]
            found[region.id] = [
                *positive_items(key, item)[: self.most_positive],
                *part_items(key, item)[: self.most_parts],
                *salient,
            ]
        return found

    def _by_model(self, record: Record) -> dict[str, list[Item]]:
        """Three questions about every region, all regions of an image at once."""
        regions = record.kept
        image = record.open()
        masks = [region.pixels() for region in regions]
        keys = [region_key(record, region.id) for region in regions]
        pictures = [extraction_pictures(image, masks, number) for number in range(len(regions))]
        prompts, readers, owners = [], [], []
        for number, region in enumerate(regions):
            for prompt, reader in self._questions(number, region, regions, keys):
                prompts.append(prompt)
                readers.append(reader)
                owners.append(number)
        found = self._asked(prompts, readers, [keys[n] for n in owners], [pictures[n] for n in owners])
        items: dict[str, list[Item]] = {region.id: [] for region in regions}
        for owner, part in zip(owners, found, strict=True):
            items[regions[owner].id] += part
        return items

    def _questions(
        self, number: int, region: Region, regions: Sequence[Region], keys: Sequence[str]
    ) -> list[tuple[str, Callable[[Any], list[Item]]]]:
        """Prompts about a region, each with what makes items of its answer."""
        name, key = str(region.category), keys[number]
        others = (
            ", ".join(f"{k + 1}: {one.category}" for k, one in enumerate(regions) if k != number) or "there are none"
        )

        def positive(rows: Any) -> list[Item]:
            return [
                new_item(key, POSITIVE, object=kind or name, part=part, property=prop, value=value)
                for kind, part, prop, value in rows[: self.most_positive]
            ]

        def parts(rows: Any) -> list[Item]:
            return [new_item(key, NEGATIVE_PART, object=name, part=_text(part)) for part in rows[: self.most_parts]]

        def salient(rows: Any) -> list[Item]:
            return [
                new_item(key, SALIENT, object=name, value=_text(phrase), other=_other(place, number, keys))
                for phrase, place in rows[: self.most_salient]
            ]

        asked = [
            (self.most_positive, POSITIVE_PROMPT.format(name=name, most=self.most_positive), positive),
            (self.most_parts, NEGATIVE_PARTS.format(name=name, most=self.most_parts), parts),
            (
                self.most_salient,
                SALIENT_NEGATIVES.format(number=number + 1, name=name, others=others, most=self.most_salient),
                salient,
            ),
        ]
        return [(prompt, reader) for most, prompt, reader in asked if most]

    def _asked(self, prompts, readers, keys, pictures) -> list[list[Item]]:
        """Items of all answers; an answer without the form asked for is told so and asked for again.

        Raises:
            ValueError: an answer still has not that form.
        """
        found: list[list[Item] | None] = [None] * len(prompts)
        now = list(prompts)
        for attempt in range(self.repairs + 1):
            open_ones = [place for place, items in enumerate(found) if items is None]
            answers = self._chat.answer_texts(
                [now[p] for p in open_ones], [keys[p] for p in open_ones], [pictures[p] for p in open_ones]
            )
            for place, answer in zip(open_ones, answers, strict=True):
                try:
                    found[place] = readers[place](read_list(answer))
                except (ValueError, TypeError) as error:
                    if attempt == self.repairs:
                        raise ValueError(f"{keys[place]}: {error}; the answer began {answer[:80]!r}") from error
                    now[place] = REPAIR.format(prompt=prompts[place], problem=error, answer=answer[:200])
            if all(items is not None for items in found):
                break
        return [items or [] for items in found]


def read_list(answer: str) -> list[Any]:
    """The JSON list in an answer, with or without a code fence around it.

    Raises:
        ValueError: there is none.
    """
    start, end = answer.find("["), answer.rfind("]")
    if start < 0 or end < start:
        raise ValueError("no JSON list")
    try:
        return json.loads(answer[start : end + 1])
    except ValueError as error:
        raise ValueError(f"no valid JSON: {error}") from error


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{value!r} is no text")
    return value


def _other(place: Any, number: int, keys: Sequence[str]) -> str:
    """Id of the region that a model's number means; "" for the background."""
    if not isinstance(place, int) or not 0 <= place <= len(keys) or place == number + 1:
        raise ValueError(f"{place!r} is the number of no other object; accepted: 0 to {len(keys)} without {number + 1}")
    return keys[place - 1] if place else ""


# By rule, in the drawn world.


def positive_items(key: str, item: SceneObject) -> list[Item]:
    """Size, colour and pattern of a drawn object, and the colours of its visible parts."""
    named = [("", name, getattr(item, name)) for name in ATTRIBUTES]
    named += [(part.name, "color", part.color) for part in item.visible_parts]
    return [
        new_item(
            key, POSITIVE, object=item.category, part=part, property=attribute, value=value,
            query={"kind": "attribute", "attribute": attribute, "category": item.category, "part": part or None,
                   "value": value},
        )
        for part, attribute, value in named
    ]  # fmt: skip


def part_items(key: str, item: SceneObject) -> list[Item]:
    """Parts that such objects often have and this one has not; one that is merely hidden is none of them."""
    drawn = {part.name for part in item.parts}
    return [
        new_item(
            key, NEGATIVE_PART, object=item.category, part=part.name,
            query={"kind": "part", "category": item.category, "part": part.name},
        )
        for part in CATEGORIES[item.category]
        if part.name not in drawn
    ]  # fmt: skip


def salient_items(key: str, item: SceneObject, others: dict[str, SceneObject], dice: Dice) -> list[Item]:
    """What only other objects of the picture show, one of each kind first: a category, a twin's look, a part."""
    own = item.category
    own_parts = {part.name for part in CATEGORIES[own]}
    categories, looks, parts = [], [], []
    for other, one in others.items():
        if one.category != own:
            query: dict[str, Any] = {"kind": "category", "category": one.category}
            categories.append(_salient(key, own, f"the {one.category}", other, query))
        else:
            for name in ATTRIBUTES:
                value = getattr(one, name)
                if value != getattr(item, name):
                    query = {"kind": "value", "attribute": name, "category": own, "part": None, "value": value}
                    looks.append(_salient(key, own, f"a {value} {own}", other, query))
        for part in one.visible_parts:
            if part.name not in own_parts:
                query = {"kind": "part", "category": own, "part": part.name}
                parts.append(_salient(key, own, f"the {part.name}", other, query))
    groups = [dice.shuffled(_once(group)) for group in (categories, looks, parts)]
    return [group[place] for place in range(max(map(len, groups))) for group in groups if place < len(group)]


def _salient(key: str, own: str, phrase: str, other: str, query: dict[str, Any]) -> Item:
    return new_item(key, SALIENT, object=own, value=phrase, other=other, query=query)


def _once(items: Sequence[Item]) -> list[Item]:
    """The items without those that say what another says."""
    return list({item.value: item for item in reversed(items)}.values())[::-1]
