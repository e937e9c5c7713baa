"""What a run keeps on disk: one file per stage, one line per record, all files in the same order.

========================  ==================================================================================
``run.json``              settings of the source and of every stage, in order
``stages/00_NAME.jsonl``  the source's records
``stages/NN_NAME.jsonl``  per record what stage NN changes: ``{"changes": {region: {…}}, "faults": [[stage, message]]}``
========================  ==================================================================================

Lines are only ever appended, whole, and in the order of the source; so the number of lines says where to go on, and
reading all files side by side gives the records without holding more than one. A line without its end, as a killed
process leaves it, is cut off.
"""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from perceptiondlm.common.json_files import read_json, write_json
from perceptiondlm.data_engine.record import Changes, Record, changes_from_dict, changes_to_dict


Faults = tuple[tuple[str, str], ...]


class Lines:
    """An append-only file of JSON lines that survives being killed.

    Args:
        path: the file; it and its folder are made when needed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def repair(self) -> int:
        """Cut off a last line without its end; returns the number of lines."""
        if not self.path.exists():
            return 0
        count, end = 0, 0
        with self.path.open("rb+") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    file.truncate(end)
                    break
                count, end = count + 1, end + len(line)
        return count

    def append(self, rows: Iterable[Any]) -> None:
        """Add rows; they are on disk when this returns."""
        data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    def rows(self, start: int = 0) -> Iterator[Any]:
        """The rows from the given one on; a file that is not there has none."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            for number, line in enumerate(islice(file, start, None), start + 1):
                try:
                    yield json.loads(line)
                except ValueError as error:
                    raise ValueError(f"line {number} of {self.path} is no JSON: {error}") from error


class Store:
    """The folder of a run.

    Args:
        folder: see the module's table.
        names: of the source and the stages, in order.
    """

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self.folder, self.names = folder, list(names)
        self.files = [Lines(folder / "stages" / f"{index:02d}_{name}.jsonl") for index, name in enumerate(names)]

    def check_settings(self, settings: Sequence[dict[str, Any]], restart_from: str | None = None) -> None:
        """Take up a run only with the settings that it was begun with; further stages may be added at the end.

        Args:
            settings: of the source and of every stage, JSON-ready.
            restart_from: name of the stage from which on everything is done anew.

        Raises:
            ValueError: naming the first setting that differs, or a stage that is not there.
        """
        given = json.loads(json.dumps(settings))
        path = self.folder / "run.json"
        begun = read_json(path) if path.exists() else []
        if restart_from is not None:
            if restart_from not in self.names:
                raise ValueError(f"there is no stage {restart_from!r} to restart from; accepted: {self.names}")
            begun = begun[: self.names.index(restart_from)]
        for name, before, now in zip(self.names, begun, given, strict=False):
            changed = [key for key in {**before, **now} if before.get(key) != now.get(key)]
            if changed:
                key = changed[0]
                raise ValueError(
                    f"{self.folder} was begun with {name}.{key} = {before.get(key)!r}, now it is {now.get(key)!r}: "
                    f"choose another folder, or --restart-from {name}"
                )
        for stale in sorted((self.folder / "stages").glob("*.jsonl*")):
            if int(stale.name[:2]) >= len(begun):
                stale.unlink()
        write_json(path, given)

    def records(self, stages: int, start: int = 0) -> Iterator[Record]:
        """The records as they are behind the first `stages` stages (0: as the source gave them), in order."""
        rows = [file.rows(start) for file in self.files[: stages + 1]]
        for source, *later in zip(*rows, strict=False):
            record = Record.from_dict(source)
            for row in later:
                record = record.with_changes(*changes_of(row))
            yield record


def row_of(changes: Changes, faults: Faults = ()) -> dict[str, Any]:
    """A stage's line about a record."""
    return {"changes": changes_to_dict(changes), "faults": [list(fault) for fault in faults]}


def changes_of(row: dict[str, Any]) -> tuple[Changes, Faults]:
    """Changes and faults of a stage's line."""
    return changes_from_dict(row["changes"]), tuple((stage, message) for stage, message in row["faults"])
