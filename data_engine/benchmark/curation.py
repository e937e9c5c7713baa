"""People's decisions about items: logged one by one, by annotator, resumable; agreement, and what they settle on.

``decisions.jsonl`` in a work folder is only ever appended to. A line is ``{"annotator", "item", "action", "fields",
"note", "time"}``; of an annotator's lines about an item the last one counts.
"""

import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any

from perceptiondlm.data_engine.benchmark.items import FIELDS, POSITIVE, SALIENT, Item, new_item, problem_of
from perceptiondlm.data_engine.store import Lines


ACTIONS = ("accept", "edit", "drop", "add")


@dataclass(frozen=True)
class Decision:
    """What an annotator said about an item.

    Attributes:
        annotator: who.
        item: the item's id.
        action: one of `ACTIONS`; "add" is an item of the annotator's own.
        fields: all of `items.FIELDS` as edited or added; None otherwise.
        kind: of an added item; region_id: its region.
        note: free text.
        time: seconds since 1970.
    """

    annotator: str
    item: str
    action: str
    fields: Mapping[str, str] | None = None
    kind: str = ""
    region_id: str = ""
    note: str = ""
    time: float = field(default=0.0, compare=False)

    @property
    def keeps(self) -> bool:
        """Whether the item stays, as it is or edited."""
        return self.action != "drop"


class Curation:
    """The decisions about a set of items.

    Args:
        path: of ``decisions.jsonl``.
        items: as extracted, in the order in which people see them.

    Raises:
        ValueError: a line of the file is about an item that is not there.
    """

    def __init__(self, path: Path, items: Sequence[Item]) -> None:
        self.items = {item.id: item for item in items}
        self.regions = list(dict.fromkeys(item.region_id for item in items))
        self._lines = Lines(path)
        self._lines.repair()
        self.decisions: dict[str, dict[str, Decision]] = {}
        for row in self._lines.rows():
            self._take(Decision(**row))

    def _take(self, decision: Decision) -> None:
        if decision.action == "add" and decision.item not in self.items:
            self.items[decision.item] = added_item(decision)
        if decision.item not in self.items:
            raise ValueError(f"{self._lines.path} decides about {decision.item!r}, which was not extracted")
        self.decisions.setdefault(decision.annotator, {})[decision.item] = decision

    def decide(
        self,
        annotator: str,
        item_id: str,
        action: str,
        fields: Mapping[str, str] | None = None,
        note: str = "",
    ) -> Decision | None:
        """Log a decision; it is on disk when this returns. None, and no line, where it was decided so before.

        Args:
            fields: for "edit", those that change.

        Raises:
            ValueError: the item or action is not known; an edit changes nothing, or to no item.
        """
        decision = self.checked(annotator, item_id, action, fields, note)
        if self.decisions.get(annotator, {}).get(item_id) == decision:
            return None
        return self._log([decision])[0]

    def add(self, annotator: str, region_id: str, kind: str, fields: Mapping[str, str], note: str = "") -> Decision:
        """Log an item of the annotator's own; ValueError where it is no item, or is there already."""
        decision = self.checked_addition(annotator, region_id, kind, fields, note)
        return self._log([decision])[0]

    def checked(
        self, annotator: str, item_id: str, action: str, fields: Mapping[str, str] | None, note: str
    ) -> Decision:
        """A decision about an item that is there; see `decide`."""
        if not annotator.strip():
            raise ValueError("an annotator needs a name")
        if item_id not in self.items:
            raise ValueError(f"there is no item {item_id!r}")
        if action not in ("accept", "edit", "drop"):
            raise ValueError(f"action {action!r} is none of accept, edit, drop")
        item = self.items[item_id]
        given = {name: " ".join(str(value).split()) for name, value in (fields or {}).items()}
        if unknown := sorted(set(given) - set(FIELDS)):
            raise ValueError(f"fields {unknown} cannot be edited; accepted: {FIELDS}")
        edited: dict[str, Any] = {**item.fields(), **given}
        if action != "edit":
            return Decision(annotator, item_id, action, note=note)
        if edited == item.fields():
            raise ValueError(f"the edit of {item_id!r} changes nothing: accept it instead")
        if problem := problem_of(replace(item, **edited)):
            raise ValueError(f"the edit of {item_id!r}: {problem}")
        return Decision(annotator, item_id, action, edited, note=note)

    def checked_addition(
        self, annotator: str, region_id: str, kind: str, fields: Mapping[str, str], note: str
    ) -> Decision:
        """An item of an annotator's own; see `add`."""
        if not annotator.strip():
            raise ValueError("an annotator needs a name")
        if region_id not in self.regions:
            raise ValueError(f"there is no region {region_id!r}")
        plain: dict[str, Any] = dict(fields)
        item = new_item(region_id, kind, origin=annotator, **plain)
        if item.id in self.items:
            raise ValueError(f"region {region_id!r} has this item already: {item.id}")
        return Decision(annotator, item.id, "add", item.fields(), kind, region_id, note)

    def log(self, decisions: Iterable[Decision]) -> list[Decision]:
        """Log checked decisions that say something new, all at once; returns those."""
        new = [one for one in decisions if self.decisions.get(one.annotator, {}).get(one.item) != one]
        return self._log(new)

    def _log(self, decisions: Sequence[Decision]) -> list[Decision]:
        timed = [replace(one, time=round(time.time(), 3)) for one in decisions]
        if timed:
            self._lines.append(asdict(one) for one in timed)
        for one in timed:
            self._take(one)
        return timed

    def undecided(self, annotator: str) -> list[Item]:
        """Items that an annotator has said nothing about."""
        decided = self.decisions.get(annotator, {})
        return [item for item in self.items.values() if item.id not in decided]


def added_item(decision: Decision) -> Item:
    """The item of an "add"."""
    fields: dict[str, Any] = dict(decision.fields or {})
    return Item(decision.item, decision.region_id, decision.kind, **fields, origin=decision.annotator)


def agreement(curation: Curation) -> list[dict[str, Any]]:
    """How far every two annotators agree on keeping or dropping.

    Returns:
        per pair: `annotators`, `items` (that both have decided; an added item counts for those who decided on it),
        `agreed` (share in [0, 1]), `kappa` (Cohen's; None where chance alone explains everything), `same_wording`
        (share of the items kept by both that they left or edited alike), and `conflicts` (ids).
    """
    pairs = []
    for one, two in combinations(sorted(curation.decisions), 2):
        ours, theirs = curation.decisions[one], curation.decisions[two]
        both = [item for item in curation.items if item in ours and item in theirs]
        if not both:
            continue
        votes = [(ours[item].keeps, theirs[item].keeps) for item in both]
        agreed = sum(a == b for a, b in votes) / len(both)
        kept = [sum(vote[k] for vote in votes) / len(both) for k in (0, 1)]
        chance = kept[0] * kept[1] + (1 - kept[0]) * (1 - kept[1])
        common = [item for item in both if ours[item].keeps and theirs[item].keeps]
        alike = sum(ours[item].fields == theirs[item].fields for item in common)
        pairs.append(
            {
                "annotators": [one, two],
                "items": len(both),
                "agreed": agreed,
                "kappa": None if chance == 1 else (agreed - chance) / (1 - chance),
                "same_wording": alike / len(common) if common else None,
                "conflicts": [item for item, (a, b) in zip(both, votes, strict=True) if a != b],
            }
        )
    return pairs


def settle(curation: Curation, settled_by: str | None = None, undecided: str | None = None) -> list[Item]:
    """The items that go into the benchmark, edited as decided.

    Where annotators are at odds (one keeps what another drops, or they edit differently), the decision of `settled_by`
    counts.

    Args:
        settled_by: name of an annotator.
        undecided: "keep" or "drop" what nobody has decided on.

    Raises:
        ValueError: naming items that nobody has decided on, or that are at odds.
    """
    if undecided not in (None, "keep", "drop"):
        raise ValueError(f"undecided must be keep or drop, got {undecided!r}")
    if settled_by is not None and settled_by not in curation.decisions:
        raise ValueError(f"{settled_by!r} has decided on nothing; annotators: {sorted(curation.decisions)}")
    items, silent, at_odds = [], [], []
    for item in curation.items.values():
        said = [decisions[item.id] for decisions in curation.decisions.values() if item.id in decisions]
        if settled_by is not None and item.id in curation.decisions[settled_by]:
            said = [curation.decisions[settled_by][item.id]]
        outcomes = Counter(_outcome(item, decision) for decision in said)
        if not said:
            silent.append(item)
            items += [item] if undecided == "keep" else []
        elif len(outcomes) > 1:
            at_odds.append(item.id)
        elif (fields := next(iter(outcomes))) is not None:
            changed = dict(fields)
            items.append(item if changed == item.fields() else edited(item, changed))
    if silent and undecided is None:
        raise ValueError(
            f"nobody has decided on {len(silent)} items, such as {silent[0].id}: decide, or --undecided keep or drop"
        )
    if at_odds:
        raise ValueError(
            f"annotators are at odds about {len(at_odds)} items: {', '.join(at_odds[:10])}; settle them with "
            "--settled-by NAME"
        )
    return items


def edited(item: Item, fields: Mapping[str, Any]) -> Item:
    """An item with other fields; its query follows, but for salient negatives, whose phrases say more than a query."""
    new = replace(item, **fields, query=None)
    if item.query is None or item.kind == SALIENT:
        return new
    query = {**item.query, "category": new.object, "part": new.part or None}
    if item.kind == POSITIVE:
        query |= {"attribute": new.property, "value": new.value}
    return replace(new, query=query)


def _outcome(item: Item, decision: Decision) -> tuple | None:
    """The item's fields after a decision; None where it drops the item."""
    if not decision.keeps:
        return None
    return tuple(sorted((decision.fields or item.fields()).items()))
