"""Runs a source and its stages over a folder, and goes on where a killed run stopped.

A stage runs over all records before the next begins. A record on which a stage fails loses the regions that were still
kept, for the reason "failed", with the error's message as detail; the run goes on and says how many there were, and
`retry_faults` does them again, and nothing else. What stops a run are errors that the next record would meet as well: a
judge that cannot go on (`JudgeError`: its answers are kept), a disk that is full, or `MOST_FAULTS` failures in a row.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from perceptiondlm.common.json_files import read_json, write_json
from perceptiondlm.data_engine.record import Changes, Drop, Record
from perceptiondlm.data_engine.sources.base import Source
from perceptiondlm.data_engine.stages.base import Stage
from perceptiondlm.data_engine.store import Faults, Lines, Store, row_of
from perceptiondlm.evaluation.judges.errors import JudgeError


# What a stage may raise on a record that it cannot deal with; anything else is a mistake of ours and stops the run.
RECORD_ERRORS = (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, OSError, RuntimeError)
FAILED = "failed"  # the reason of a drop
MOST_FAULTS = 50  # in a row, before a run gives up

Outcome = tuple[Changes, Faults]
# A stage and batches of records -> per record its outcome, in order. The place where other machines come in.
Executor = Callable[[Stage, Iterator[list[Record]]], Iterator[list[Outcome]]]

logger = logging.getLogger(__name__)


def run_batch(stage: Stage, records: Sequence[Record]) -> list[Outcome]:
    """Outcomes of a batch; where the stage fails on it, record by record.

    Raises:
        JudgeError: the stage's language model cannot go on.
        ValueError: the stage returned more or fewer changes than there were records, or changes of other regions.
    """
    try:
        changes = stage.run(records)
    except JudgeError:
        raise
    except RECORD_ERRORS as error:
        if len(records) > 1:
            return [outcome for record in records for outcome in run_batch(stage, [record])]
        message = f"{type(error).__name__}: {error}"
        logger.warning("%s failed on %s: %s", stage.name, records[0].id, message)
        drop = Drop(stage.name, FAILED, message)
        return [({region.id: {"drop": drop} for region in records[0].kept}, ((stage.name, message),))]
    if len(changes) != len(records):
        raise ValueError(f"stage {stage.name} returned {len(changes)} changes for {len(records)} records")
    for record, change in zip(records, changes, strict=True):
        record.with_changes(change)  # raises where the stage speaks of regions that are not its business
    return [(change, ()) for change in changes]


def run_here(stage: Stage, batches: Iterator[list[Record]]) -> Iterator[list[Outcome]]:
    """The executor that runs a stage in this process."""
    stage.open()
    for batch in batches:
        yield run_batch(stage, batch)


@dataclass
class Engine:
    """A run.

    Attributes:
        folder: see `store.py`; a second run with the same settings goes on in it.
        source, stages: their names must differ.
        batch_size: records that a stage gets at once, and that are lost at most when the run is killed.
        executor: runs a stage over batches.
        progress: show a progress bar per stage.
    """

    folder: Path
    source: Source
    stages: Sequence[Stage]
    batch_size: int = 16
    executor: Executor = run_here
    progress: bool = False

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")
        names = [self.source.kind, *(stage.name for stage in self.stages)]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"the stages {twice} occur more than once; give each a name of its own")
        self.store = Store(self.folder, names)

    def run(self, restart_from: str | None = None, retry_faults: bool = False) -> int:
        """Do what is not done yet.

        Args:
            restart_from: do this stage and all later ones anew (answers of language models are kept).
            retry_faults: do the records again on which a stage has failed.

        Returns:
            records on which a stage has failed.

        Raises:
            ValueError: the folder holds a run with other settings; `MOST_FAULTS` records in a row have failed.
            JudgeError: a language model cannot go on.
        """
        settings = [self.source.settings(), *(stage.settings() for stage in self.stages)]
        self.store.check_settings(settings, restart_from)
        self._read_source()
        redo = self._retried(retry_faults)
        for number, stage in enumerate(self.stages, start=1):
            self._run_stage(number, stage, redo)
        for old in (self.folder / "stages").glob("*.jsonl.old"):
            old.unlink()
        (self.folder / "retry.json").unlink(missing_ok=True)
        return sum(bool(record.faults) for record in self.records())

    def records(self) -> Iterator[Record]:
        """The records behind the last stage, in order."""
        return self.store.records(len(self.stages))

    def _read_source(self) -> None:
        file = self.store.files[0]
        done = file.repair()
        complete = self.folder / "stages" / "00_complete.jsonl"  # so that a finished source is not read again
        if complete.exists():
            return
        rest = self.source.records(skip=done)
        bar = tqdm(rest, desc=self.source.kind, unit="image", initial=done, disable=not self.progress)
        for batch in batched(iter(bar), self.batch_size):
            file.append(record.to_dict() for record in batch)
        if not file.path.exists():
            raise ValueError(f"the source {self.source.kind} has no image")
        complete.touch()

    def _run_stage(self, number: int, stage: Stage, redo: Mapping[int, int]) -> None:
        """One stage over the records that it has not seen."""
        file, total = self.store.files[number], self.store.files[number - 1].repair()
        done = file.repair()
        if done >= total:
            return
        old, todo = aside(file), self.store.records(number - 1, done)
        with tqdm(total=total, initial=done, desc=stage.name, unit="image", disable=not self.progress) as bar:
            for place, (row, record) in enumerate(zip(old.rows(done), todo, strict=False), start=done):
                again = redo.get(place, number + 1) <= number
                outcomes = next(self.executor(stage, iter([[record]]))) if again else None
                file.append([row if outcomes is None else row_of(*outcomes[0])])
                bar.update()
            self._append(stage, file, batched(todo, self.batch_size), bar)
        stage.finish()

    def _append(self, stage: Stage, file: Lines, batches: Iterator[list[Record]], bar: tqdm) -> None:
        in_a_row = 0
        for outcomes in self.executor(stage, batches):
            file.append(row_of(*outcome) for outcome in outcomes)
            bar.update(len(outcomes))
            for _, faults in outcomes:
                in_a_row = in_a_row + 1 if faults else 0
            if in_a_row >= MOST_FAULTS:
                raise ValueError(
                    f"{stage.name} has failed on {in_a_row} records in a row, the last time with {faults[0][1]!r}; "
                    "once that is mended, go on with --retry-faults"
                )

    def _retried(self, wanted: bool) -> dict[int, int]:
        """Place of every record to be done again -> the first stage that failed on it, by a retry that begins now or
        was killed; moves the lines of that stage and all later ones aside."""
        path = self.folder / "retry.json"
        if not path.exists():
            faulty = self._faulty() if wanted else {}
            if not faulty:
                return {}
            files = [file for file in self.store.files[min(faulty.values()) :] if file.repair()]
            write_json(path, {"places": list(faulty.items()), "aside": [file.path.name for file in files]})
        retry = read_json(path)
        for file in self.store.files:
            if file.path.name in retry["aside"] and file.path.exists():
                file.path.replace(aside(file).path)
        write_json(path, {**retry, "aside": []})
        return dict(retry["places"])

    def _faulty(self) -> dict[int, int]:
        """Place of every record on which a stage has failed -> the first such stage."""
        faulty: dict[int, int] = {}
        for number, file in enumerate(self.store.files[1:], start=1):
            file.repair()
            for place, row in enumerate(file.rows()):
                if row["faults"]:
                    faulty.setdefault(place, number)
        return faulty


def aside(file: Lines) -> Lines:
    """Where the lines of a stage lie while some of them are made anew."""
    return Lines(file.path.with_name(f"{file.path.name}.old"))


def batched(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Lists of at most `size` items."""
    items = iter(items)
    while batch := list(islice(items, size)):
        yield batch
