"""What a benchmark's questions are made of: one attribute, absent part or mislocalisation target per item."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


POSITIVE, NEGATIVE_PART, SALIENT = "positive", "negative part", "salient negative"
KINDS = (POSITIVE, NEGATIVE_PART, SALIENT)
FIELDS = ("object", "part", "property", "value", "other")  # what people may edit
# The fields of each kind that must hold something, and those that must be empty.
NEEDED = {POSITIVE: ("object", "property", "value"), NEGATIVE_PART: ("object", "part"), SALIENT: ("value",)}
EMPTY = {POSITIVE: ("other",), NEGATIVE_PART: ("property", "value", "other"), SALIENT: ("part", "property")}


@dataclass(frozen=True)
class Item:
    """One item.

    Attributes:
        id: unique; made of region, kind and content, so that the same extraction gives the same id.
        region_id: the region it is about.
        kind: one of `KINDS`.
        object: what the region shows.
        part: of a positive item, the part it speaks of, "" for the object as a whole; of a negative part, that part.
        property, value: of a positive item, such as color and dark red. The value of a salient negative is the phrase
            for something else, such as "the person in the blue shirt".
        other: id of the region that a salient negative speaks of; "" for the background.
        query: the item's meaning, for judges that read by rule.
        origin: "extracted", or the name of the annotator who added it.
    """

    id: str
    region_id: str
    kind: str
    object: str = ""
    part: str = ""
    property: str = ""
    value: str = ""
    other: str = ""
    query: Mapping[str, Any] | None = field(default=None, compare=False)
    origin: str = field(default="extracted", compare=False)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)

    def fields(self) -> dict[str, str]:
        """The fields that people may edit."""
        return {name: getattr(self, name) for name in FIELDS}


def new_item(
    region_id: str, kind: str, *, query: Mapping[str, Any] | None = None, origin: str = "extracted", **fields: str
) -> Item:
    """An item with an id of its own.

    Args:
        fields: of `FIELDS`; space at their ends is dropped.

    Raises:
        ValueError: see `problem_of`.
    """
    clean = {name: " ".join(str(value).split()) for name, value in fields.items()}
    content = json.dumps([region_id, kind, sorted(clean.items())], ensure_ascii=False)
    number = hashlib.sha256(content.encode()).hexdigest()[:10]
    item = Item(f"{region_id}/{number}", region_id, kind, **clean, query=query, origin=origin)
    if problem := problem_of(item):
        raise ValueError(f"item {clean} of region {region_id!r}: {problem}")
    return item


def problem_of(item: Item) -> str | None:
    """What is wrong with an item's shape, or None."""
    if item.kind not in KINDS:
        return f"kind {item.kind!r} is none of {KINDS}"
    if missing := [name for name in NEEDED[item.kind] if not getattr(item, name)]:
        return f"a {item.kind} needs {', '.join(missing)}"
    if extra := [name for name in EMPTY[item.kind] if getattr(item, name)]:
        return f"a {item.kind} has no {', '.join(extra)}"
    return None
