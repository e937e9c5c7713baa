"""Curation as a spreadsheet round trip: a CSV per annotator, filled in anywhere, read back and checked as a whole.

Columns: ``item``, ``region``, ``kind``, then the fields ``object``, ``part``, ``property``, ``value``, ``other``, then
``decision`` and ``note``. In ``decision`` stand accept, edit (with the fields changed in place), drop, or nothing yet.
A row without ``item`` adds one; its decision is add.
"""

import csv
from collections.abc import Mapping
from pathlib import Path

from perceptiondlm.data_engine.benchmark.curation import Curation, Decision
from perceptiondlm.data_engine.benchmark.items import FIELDS


COLUMNS = ("item", "region", "kind", *FIELDS, "decision", "note")


def write_sheet(curation: Curation, annotator: str, path: Path) -> int:
    """Write all items with what the annotator has decided so far; returns the number still to be decided."""
    decided = curation.decisions.get(annotator, {})
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8-sig") as file:  # the mark tells spreadsheets the encoding
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for item in sorted(curation.items.values(), key=lambda one: curation.regions.index(one.region_id)):
            decision = decided.get(item.id)
            fields = item.fields() if decision is None or decision.fields is None else dict(decision.fields)
            said = {"decision": "" if decision is None else decision.action, "note": decision.note if decision else ""}
            writer.writerow({"item": item.id, "region": item.region_id, "kind": item.kind, **fields, **said})
    return len(curation.undecided(annotator))


def read_sheet(curation: Curation, annotator: str, path: Path) -> list[Decision]:
    """Log what is new in a filled-in sheet; returns it. Nothing is logged where any row is wrong.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: naming every row that is wrong, and why (the first twenty).
    """
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        if missing := [column for column in COLUMNS if column not in (reader.fieldnames or ())]:
            raise ValueError(f"{path} lacks the columns {missing}; accepted: the sheet as it was written")
        rows = list(enumerate(reader, start=2))
    decisions, wrong = [], []
    for number, row in rows:
        try:
            decision = _decision(curation, annotator, row)
        except ValueError as error:
            wrong.append(f"row {number}: {error}")
        else:
            decisions += [] if decision is None else [decision]
    if wrong:
        raise ValueError(f"{path}: {'; '.join(wrong[:20])}")
    return curation.log(decisions)


def _decision(curation: Curation, annotator: str, row: Mapping[str, str | None]) -> Decision | None:
    """A row's decision; None where it has none yet."""
    cell = {name: " ".join((row[name] or "").split()) for name in COLUMNS}
    action, fields = cell["decision"].lower(), {name: cell[name] for name in FIELDS}
    if not cell["item"]:
        if action not in ("add", ""):
            raise ValueError(f"it names no item, and its decision is {action!r}; accepted: add")
        if not any(fields.values()):
            return None
        if action != "add":
            raise ValueError("it names no item; write add as its decision")
        return curation.checked_addition(annotator, cell["region"], cell["kind"], fields, cell["note"])
    item = curation.items.get(cell["item"])
    if item is None:
        raise ValueError(f"there is no item {cell['item']!r}")
    before = curation.decisions.get(annotator, {}).get(item.id)
    if action == "add" and before is not None and before.action == "add" and fields == item.fields():
        return None
    if not action:
        if fields != item.fields():
            raise ValueError("its fields were changed without a decision; write edit")
        return None
    if action != "edit" and fields != item.fields() and action != "drop":
        raise ValueError(f"its fields were changed, and its decision is {action!r}; write edit")
    return curation.checked(annotator, item.id, action, fields if action == "edit" else None, cell["note"])
