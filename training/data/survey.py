"""A look at all records of a source before a run: lengths of its samples, and what cannot be used.

Records are read just as training reads them, in chunks. Every chunk is a file of its own, so that any number of
processes and machines share the work without waiting for each other, and work that was killed goes on where it
stopped. When all chunks are there they are made into columns on disk, which every process maps into its memory::

    survey-KEY/chunks/000012.npz     while the survey is being made
    survey-KEY/ends.npy              (n,) int64: samples of all records up to this one
    survey-KEY/lengths.npy           int32: tokens of every sample
    survey-KEY/report.json           written last
"""

import hashlib
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from perceptiondlm.common.json_files import read_json, write_json
from perceptiondlm.training.data.bad_records import BadRecord, require_good
from perceptiondlm.training.data.columns import save_columns
from perceptiondlm.training.data.data_config import SourceConfig
from perceptiondlm.training.data.sources import AnswerFormat, Measured, Source


logger = logging.getLogger(__name__)

MIN_CHUNK, MAX_CHUNK, CHUNKS = 16, 512, 1024  # records of a chunk, and how many chunks a survey has if it can

_work: "Work"  # of a worker process


@dataclass
class SourceReport:
    """What became of a source's records in the survey, for the run's summary.

    Args:
        records: read; samples: of an epoch.
        bad: records left out because they cannot be read, by file and row (`bad_records`).
        bad_regions: masks or captions left out of records whose others are good (`bad_region_records`).
        too_long: samples left out because no answer fits behind their prompt; cut: answers that are shortened.
    """

    name: str
    records: int = 0
    samples: int = 0
    bad: int = 0
    bad_regions: int = 0
    too_long: int = 0
    cut: int = 0
    bad_records: list[str] = field(default_factory=list)
    bad_region_records: list[str] = field(default_factory=list)


@dataclass
class Survey:
    """What a survey found.

    Args:
        ends: (n,) int64: number of samples of the records up to each one.
        lengths: int32: tokens of every sample.
        dropped: by record, the regions that are left out.
    """

    ends: np.ndarray
    lengths: np.ndarray
    report: SourceReport
    dropped: dict[int, list[int]]


@dataclass
class Work:
    """A source to be looked through, and the folder of its survey.

    Args:
        records: numbers of the records, ascending.
        limit: share of bad records above which the look ends.
    """

    source: Source
    name: str
    records: Sequence[int] | np.ndarray
    folder: Path
    limit: float

    @property
    def chunk_size(self) -> int:
        """Records of a chunk."""
        return min(MAX_CHUNK, max(MIN_CHUNK, len(self.records) // CHUNKS))

    @property
    def num_chunks(self) -> int:
        """Chunks of all records."""
        return -(-len(self.records) // self.chunk_size)

    def chunk(self, number: int) -> Path:
        """File of a chunk."""
        return self.folder / "chunks" / f"{number:06d}.npz"

    @property
    def is_done(self) -> bool:
        """Whether the columns are there."""
        return (self.folder / "report.json").exists()

    def missing(self) -> list[int]:
        """Chunks that nobody has looked at yet."""
        kept = {path.name for path in (self.folder / "chunks").glob("[0-9]*.npz")}
        return [number for number in range(self.num_chunks) if self.chunk(number).name not in kept]


def plan_work(
    source: Source,
    settings: SourceConfig,
    records: Sequence[int] | np.ndarray,
    limit: float,
    answers: AnswerFormat,
    cache_dir: Path,
) -> Work:
    """The survey of some records of a source, in a folder whose name changes with everything that it depends on.

    Where the set lies is no part of that: a survey made on one machine serves copies of the set on others.
    """
    chosen: Any = len(records)
    if isinstance(records, np.ndarray):
        chosen = hashlib.sha256(records.tobytes()).hexdigest()
    limits = (answers.num_slots, answers.slot_limit, answers.copies, answers.max_length)
    processor = {name: value for name, value in answers.processor.to_dict().items() if name != "tokenizer"}
    own = {**asdict(settings), "path": None, "image_root": None, "samples": None}
    content = [source.fingerprint, own, chosen, limits, processor, len(answers.processor.tokenizer)]
    key = hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]
    return Work(source, settings.name, records, cache_dir / f"survey-{key}", limit)


def look(work: Work, share: tuple[int, int], workers: int) -> None:
    """Look at one share (i of n) of the chunks that are missing, with some worker processes; shows what is left.

    Raises:
        ValueError: when too many records are bad.
    """
    if work.is_done:
        return
    index, count = share
    own = [number for number in range(work.num_chunks) if number % count == index]
    missing = set(work.missing())
    todo = [number for number in own if number in missing]
    (work.folder / "chunks").mkdir(parents=True, exist_ok=True)
    read = bad = 0
    size, total = work.chunk_size, min(len(own) * work.chunk_size, len(work.records))
    done = total - min(len(todo) * size, total)
    with tqdm(total=total, initial=done, desc=f"reading {Path(work.name).name}", unit="record", disable=None) as bar:
        for chunk_read, chunk_bad, last in _looked_at(work, todo, workers):
            read, bad = read + chunk_read, bad + chunk_bad
            bar.update(chunk_read)
            if chunk_bad:
                require_good(work.name, bad, read, len(work.records), work.limit, last)


def _looked_at(work: Work, chunks: list[int], workers: int) -> Iterator[tuple[int, int, str]]:
    """Look at chunks, in worker processes if that pays."""
    workers = min(workers, len(chunks))
    if workers <= 1:
        _start_worker(work, None)
        yield from map(_look_at_chunk, chunks)
        return
    context = get_context("fork")  # nothing is pickled
    with ProcessPoolExecutor(workers, context, _start_worker, (work, os.getpid())) as pool:
        futures = [pool.submit(_look_at_chunk, chunk) for chunk in chunks]
        try:
            for future in futures:
                yield future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _start_worker(work: Work, parent: int | None) -> None:
    global _work
    _work = work
    if parent is not None:
        torch.set_num_threads(1)
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """End this process when its parent was killed: nobody would tell it."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _look_at_chunk(number: int) -> tuple[int, int, str]:
    """Measure the records of a chunk and keep what was found; how many were read and bad, and the last bad one."""
    work, size = _work, _work.chunk_size
    counts: list[int] = []
    lengths: list[int] = []
    found: dict[str, Any] = {"bad": [], "regions": [], "too_long": 0, "cut": 0}
    for record in work.records[number * size : (number + 1) * size]:
        try:
            measured = work.source.measure(int(record))
        except BadRecord as error:
            measured = Measured([])
            found["bad"].append(f"{work.source.place(int(record))}: {error}")
        counts.append(len(measured.lengths))
        lengths += measured.lengths
        found["too_long"] += measured.too_long
        found["cut"] += measured.cut
        for region, fault in measured.dropped.items():
            place = work.source.place(int(record))
            found["regions"].append([int(record), region, f"{place}, region {region}: {fault}"])
    columns = {"counts": np.array(counts, np.int64), "lengths": np.array(lengths, np.int32)}
    save_columns(work.chunk(number), **columns, found=np.array(json.dumps(found)))
    return len(counts), len(found["bad"]), "".join(found["bad"][-1:])


def merge(work: Work) -> bool:
    """Make the columns out of all chunks; False when chunks are missing."""
    if not work.is_done:
        if work.missing():
            return work.is_done
        try:
            _merge(work, [work.chunk(number) for number in range(work.num_chunks)])
        except FileNotFoundError:
            if not work.is_done:  # by another process, which then took the chunks away
                raise
        shutil.rmtree(work.folder / "chunks", ignore_errors=True)
    return True


def _merge(work: Work, files: list[Path]) -> None:
    dropped: dict[int, list[int]] = {}
    report, total = SourceReport(work.name), 0
    part = work.folder / f".{os.getpid()}.npy"
    ends = np.lib.format.open_memmap(part, "w+", np.int64, (len(work.records),))
    for file in files:
        with np.load(file) as chunk:
            counts, found = chunk["counts"], json.loads(str(chunk["found"]))
        ends[report.records : report.records + len(counts)] = total + np.cumsum(counts)
        total += int(counts.sum())
        report.records += len(counts)
        report.too_long, report.cut = report.too_long + found["too_long"], report.cut + found["cut"]
        report.bad_records += found["bad"]
        for record, region, error in found["regions"]:
            dropped.setdefault(record, []).append(region)
            report.bad_region_records.append(error)
    ends.flush()
    os.replace(part, work.folder / "ends.npy")
    lengths = np.lib.format.open_memmap(part, "w+", np.int32, (max(total, 1),))
    place = 0
    for file in files:
        with np.load(file) as chunk:
            lengths[place : place + len(chunk["lengths"])] = chunk["lengths"]
            place += len(chunk["lengths"])
    lengths.flush()
    os.replace(part, work.folder / "lengths.npy")
    report.bad, report.bad_regions = len(report.bad_records), len(report.bad_region_records)
    write_json(work.folder / "report.json", {"report": asdict(report), "dropped": dropped})


def load_survey(work: Work) -> Survey:
    """The columns of a survey that is done, mapped into memory.

    Raises:
        ValueError: when too many records are bad.
    """
    kept = read_json(work.folder / "report.json")
    report = SourceReport(**{**kept["report"], "name": work.name})
    dropped = {int(record): regions for record, regions in kept["dropped"].items()}
    last = "".join(report.bad_records[-1:])
    require_good(work.name, report.bad, report.records, report.records, work.limit, last)
    ends, lengths = (np.load(work.folder / f"{name}.npy", mmap_mode="r") for name in ("ends", "lengths"))
    return Survey(ends, lengths[: int(ends[-1])], report, dropped)


def warn(report: SourceReport) -> None:
    """Name what was left out of a source, in the log."""
    for text in (*report.bad_records, *report.bad_region_records):
        logger.warning("left out: %s", text)
