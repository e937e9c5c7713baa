"""Rows of parquet files by number, without reading what lies before them: row groups, and passes in random order.

Files may lie on this machine or wherever `fsspec` reads (`hf://` for the Hub).
"""

import glob
import hashlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm.auto import tqdm

from perceptiondlm.training.data.bad_records import BadRecord, retried
from perceptiondlm.training.data.columns import file_state, save_columns


COLUMNS = ("conversations", "images")
FOOTER_THREADS = 16
BUFFER = 1 << 20  # bytes of a column read ahead: row groups of images are too large to hold
BATCH = 32  # rows decoded at a time


@dataclass
class RowGroups:
    """The row groups of a set, in the order of its files.

    Args:
        files: paths or URLs.
        file, number: of every row group, the index of its file and its number there.
        rows: of every row group, int64.
    """

    files: list[str]
    file: np.ndarray
    number: np.ndarray
    rows: np.ndarray

    def __post_init__(self):
        starts = np.cumsum(self.rows) - self.rows
        first = np.searchsorted(self.file, self.file, side="left")  # the first row group of the same file
        self.before = starts - starts[first]  # rows of the same file before the row group

    def __len__(self) -> int:
        return int(self.rows.sum())

    def locate(self, row: int) -> tuple[int, int]:
        """File of a row of the set, counted in the order of its files, and its row there."""
        group = int(np.searchsorted(np.cumsum(self.rows), row, side="right"))
        return int(self.file[group]), row - int(self.rows[:group].sum()) + int(self.before[group])

    def shuffled(self, generator: np.random.Generator) -> np.ndarray:
        """Row groups with rows in them, in random order."""
        return generator.permutation(np.flatnonzero(self.rows))


def parquet_files(path: str) -> list[str]:
    """The parquet files of a folder (in its subfolders, too), a glob, or a file, in order of their names."""
    pattern = str(Path(path) / "**" / "*.parquet") if Path(path).is_dir() else path
    files = sorted(glob.glob(pattern, recursive=True))
    if not files:
        raise FileNotFoundError(f"no parquet files at {path}; accepted: a folder, a glob or a file")
    return files


def row_groups(files: Sequence[str], cache_dir: Path) -> RowGroups:
    """Row groups of files by their footers, kept in `cache_dir`; refuses files that are cut short.

    Raises:
        ValueError: naming the file.
    """
    state = [file_state(file) if Path(file).exists() else [file] for file in files]  # an URL names its revision
    kept = cache_dir / f"rows-{hashlib.sha256(json.dumps(state).encode()).hexdigest()[:16]}.npz"
    if kept.exists():
        with np.load(kept) as columns:
            return RowGroups(list(files), columns["files"], columns["numbers"], columns["rows"])
    with ThreadPoolExecutor(FOOTER_THREADS) as pool:
        footers = tqdm(pool.map(_rows_of, files), "reading footers", len(files), disable=None)
        counts = list(footers)
    sizes = [len(rows) for rows in counts]
    numbers = np.concatenate([np.arange(size) for size in sizes])
    found = RowGroups(list(files), np.repeat(np.arange(len(files)), sizes), numbers, np.concatenate(counts))
    if not len(found):
        raise ValueError(f"{files[0]} and {len(files) - 1} other files hold no row")
    save_columns(kept, files=found.file, numbers=found.number, rows=found.rows)
    return found


def _rows_of(file: str) -> np.ndarray:
    """Rows of a file's row groups."""

    def read() -> pq.FileMetaData:
        with fsspec.open(file, "rb") as stream:
            return pq.ParquetFile(stream).metadata

    try:
        footer = retried(read)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{file} is no parquet file, or was cut short: {error}") from error
    columns = footer.schema.to_arrow_schema().names
    if COLUMNS[0] not in columns:
        raise ValueError(f"{file} has the columns {columns}; accepted: conversations and, if any, images")
    return np.array([footer.row_group(i).num_rows for i in range(footer.num_row_groups)], dtype=np.int64)


class RowReader:
    """Reads runs of rows of row groups laid one behind the other, best forwards: it keeps its place in an open group.

    Args:
        groups: of the set.
        order: row groups; row numbers count along them.
    """

    def __init__(self, groups: RowGroups, order: np.ndarray):
        self.groups, self.order = groups, order
        self.ends = np.cumsum(groups.rows[order])
        self.group, self.row = -1, 0  # the open row group and its next row
        self.batches: Iterator[pa.RecordBatch] = iter(())
        self.waiting: pa.Table | None = None  # rows that were read ahead

    def read(self, start: int, stop: int) -> Iterator[tuple[int, int, dict[str, Any] | BadRecord]]:
        """File, row in that file and content of the rows from `start` to before `stop`.

        A row that cannot be read comes as what is wrong with it.
        """
        while start < stop:
            index = int(np.searchsorted(self.ends, start, side="right"))
            group = int(self.order[index])
            first, end = int(self.ends[index] - self.groups.rows[group]), min(stop, int(self.ends[index]))
            file, before = int(self.groups.file[group]), int(self.groups.before[group])
            try:
                rows = self._take(group, start - first, end - first).to_pylist()
            except (pa.ArrowException, OSError) as error:
                rows = [BadRecord(f"row group {self.groups.number[group]} cannot be read: {error}")] * (end - start)
            for row, content in enumerate(rows, before + start - first):
                yield file, row, content
            start = end

    def _take(self, group: int, start: int, stop: int) -> pa.Table:
        """Rows of a row group, counted within it; a passing error is tried again from the group's beginning."""

        def read() -> pa.Table:
            try:
                if group != self.group or start < self.row:
                    self._open(group)
                self._advance(start - self.row)
                return self._advance(stop - start)
            except (pa.ArrowException, OSError):
                self.group = -1
                raise

        return retried(read)

    def _open(self, group: int) -> None:
        file = self.groups.files[int(self.groups.file[group])]
        parquet = pq.ParquetFile(fsspec.open(file, "rb").open(), pre_buffer=False, buffer_size=BUFFER)
        columns = [name for name in COLUMNS if name in parquet.schema_arrow.names]
        number = int(self.groups.number[group])
        self.batches = parquet.iter_batches(BATCH, row_groups=[number], columns=columns, use_threads=False)
        self.waiting = parquet.schema_arrow.empty_table().select(columns)
        self.group, self.row = group, 0

    def _advance(self, count: int) -> pa.Table:
        """The next rows of the open row group."""
        assert self.waiting is not None  # a group is open
        parts, missing = [self.waiting.slice(0, count)], count - len(self.waiting)
        self.waiting = self.waiting.slice(count)
        while missing > 0:
            batch = pa.Table.from_batches([next(self.batches)])
            parts.append(batch.slice(0, missing))
            self.waiting, missing = batch.slice(missing), missing - len(batch)
        self.row += count
        return pa.concat_tables(parts)
