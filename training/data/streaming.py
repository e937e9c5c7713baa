"""Conversation sets read from front to back, for sets too large to look through before a run.

A *pass* is all rows of a set once: its row groups in random order, one behind the other. The samples of an epoch are
cut out of the endless sequence of passes and dealt to *lanes*, equal runs that are read side by side: batch k of an
epoch comes from lane k modulo their number, and holds samples of similar length of a few neighbouring rows. So what a
batch holds is a function of seed, epoch and k alone. It does not matter which process or worker asks for it, an epoch
holds every row once, and a run goes on from any batch by asking for the next one: nothing is read again.

A row is one sample. One that is bad, or too long, leaves its place empty, as does the rest of a lane's last batch:
an empty place holds a filler, a sample without anything to learn.
"""

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from torch.utils.data import Dataset, Sampler, get_worker_info

from perceptiondlm.training.data.bad_records import BadRecord, Tally, logged
from perceptiondlm.training.data.batches import grouped_order
from perceptiondlm.training.data.columns import file_content
from perceptiondlm.training.data.conversations import filler, measure_row, row_sample
from perceptiondlm.training.data.data_config import DataConfig, SourceConfig
from perceptiondlm.training.data.parquet_rows import RowGroups, RowReader, parquet_files, row_groups
from perceptiondlm.training.data.sources import AnswerFormat, Measured, Source


LANES = 64  # a power of two: the order is the same for every number of readers that divides it
POOL = 64  # rows of a lane that are held, images encoded, to make batches of similar length of them


@dataclass
class Waiting:
    """A row that was found good: its length in tokens and the seed of its sample."""

    length: int
    row: dict[str, Any]
    seed: str
    settings: SourceConfig


class StreamingDataset(Dataset):
    """Samples (see sources.py) by their place in an epoch; to be read in the order of `StreamOrder`, which sets it up.

    Bad records are logged and appended to `bad_records.jsonl` in the cache directory.

    Args:
        run_id: of this start of the run, the same in all its processes; bad records are counted under it.
    """

    def __init__(self, data: DataConfig, answers: AnswerFormat, cache_dir: Path, run_id: str):
        self.data, self.answers, self.cache_dir, self.run_id = data, answers, cache_dir, run_id
        self.groups = [stream_groups(source, cache_dir) for source in data.sources]
        counts = zip(data.sources, self.groups, strict=True)
        self.counts = [source.samples or len(groups) for source, groups in counts]
        self.epoch, self.batch_size, self.lanes = 0, 1, 1
        self._forget()

    def __len__(self) -> int:
        return sum(self.counts)

    def __getstate__(self) -> dict[str, Any]:
        self._forget()
        return self.__dict__

    @property
    def report(self) -> list[dict[str, Any]]:
        """Bad records so far, over all processes and restarts, for the run's summary."""
        return logged(self.cache_dir / "bad_records.jsonl")

    # --- places ---------------------------------------------------------------------------------------------------

    def deal(self, batch_size: int, readers: int) -> None:
        """Set the samples of a batch and choose the number of lanes.

        Each reader (a worker of a process) gets lanes of its own where their number allows it; where it does not, a
        lane is read by several.
        """
        most = max(1, len(self) // (4 * POOL))
        lanes = 1 << min(LANES, most).bit_length() - 1
        together = math.lcm(lanes, readers)
        self.batch_size, self.lanes = batch_size, together if together <= most else lanes
        self._forget()

    @property
    def batches(self) -> int:
        """Batches of an epoch."""
        longest = sum(-(-count // self.lanes) for count in self.counts)
        return self.lanes * -(-longest // self.batch_size)

    def set_epoch(self, epoch: int) -> None:
        """The epoch is part of every sample's seed."""
        self.epoch = epoch
        self._forget()

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The sample at a place of the epoch, batch by batch; a negative index is a filler."""
        if index < 0:
            return filler()
        batch, place = divmod(index, self.batch_size)
        number, lane = divmod(batch, self.lanes)
        waiting = self._at(lane, number * self.batch_size + place)
        if waiting is None:
            return filler()
        sample = row_sample(waiting.row, 0, waiting.seed, waiting.settings, self.answers)
        return sample | {"noise_seed": waiting.seed, "coarse": False, "filler": False}

    # --- lanes ----------------------------------------------------------------------------------------------------

    def _forget(self) -> None:
        """Close files and drop what was read; a forked worker must not share its parent's open files."""
        self._owner = os.getpid()
        self._pools: dict[int, tuple[int, list[Waiting | None]]] = {}
        self._readers: dict[tuple[int, int], tuple[int, RowReader]] = {}
        self._tally: Tally | None = None

    def _at(self, lane: int, place: int) -> Waiting | None:
        """What stands at a place of a lane; the pool around it is kept."""
        if self._owner != os.getpid():
            self._forget()
        pool, offset = divmod(place, self._pool_size)
        if self._pools.get(lane, (None,))[0] != pool:
            self._pools[lane] = (pool, self._read_pool(lane, pool))
        waiting = self._pools[lane][1]
        return waiting[offset] if offset < len(waiting) else None

    @property
    def _pool_size(self) -> int:
        return max(1, POOL // self.batch_size) * self.batch_size

    def _read_pool(self, lane: int, pool: int) -> list[Waiting | None]:
        """The good samples of a pool of a lane, in batches of similar length; None where a place stays empty."""
        size = self._pool_size
        runs = [self._run(number, lane) for number in range(len(self.groups))]
        dice = np.random.default_rng([self.data.seed, self.epoch, lane])
        sources = dice.permutation(np.repeat(np.arange(len(runs)), [stop - start for start, stop in runs]))
        before = np.bincount(sources[: pool * size], minlength=len(runs)).tolist()
        taken = np.bincount(sources[pool * size : (pool + 1) * size], minlength=len(runs)).tolist()
        found: list[Waiting] = []
        for number, ((start, _), skip, count) in enumerate(zip(runs, before, taken, strict=True)):
            if count:
                found += self._measured(number, lane, start + skip, start + skip + count)
        lengths = [waiting.length for waiting in found]
        batches = size // self.batch_size if self.data.group_by_length else 1
        seed = int(np.random.default_rng([self.data.seed, self.epoch, lane, pool]).integers(2**62))
        return [found[index] for index in grouped_order(lengths, self.batch_size, batches, seed).tolist()]

    def _run(self, number: int, lane: int) -> tuple[int, int]:
        """Where the lane's part of this epoch starts and stops in the endless sequence of a source's passes."""
        count, start = self.counts[number], self.epoch * self.counts[number]
        return start + lane * count // self.lanes, start + (lane + 1) * count // self.lanes

    def _measured(self, number: int, lane: int, start: int, stop: int) -> list[Waiting]:
        """The good ones of a run of a source's rows; the bad ones are counted."""
        settings, files = self.data.sources[number], self.groups[number].files
        name = Path(settings.name).name
        found, bad = [], {}
        for passed, file, row, content in self._rows(number, lane, start, stop):
            seed = f"{passed}/{self.data.seed}/{name}/file {file}, row {row}"
            try:
                if isinstance(content, BadRecord):
                    raise content
                lengths = measure_row(content, settings, self.answers).lengths
            except BadRecord as error:
                bad[f"{files[file]}, row {row}"] = str(error)
            else:
                found += [Waiting(length, content, seed, settings) for length in lengths]
        self._count(number, stop - start, bad, judge=stop == self._run(number, lane)[1])
        return found

    def _count(self, number: int, read: int, bad: dict[str, str], judge: bool) -> None:
        if self._tally is None:
            worker = get_worker_info()
            reader = f"{os.environ.get('RANK', '0')}-{worker.id if worker else 'main'}"
            self._tally = Tally(self.cache_dir, self.run_id, reader)
        name, total = self.data.sources[number].name, len(self.groups[number])
        self._tally.add(name, read, bad, total, self.data.max_bad_share, judge)

    def _rows(self, number: int, lane: int, start: int, stop: int) -> Iterator[tuple[int, int, int, Any]]:
        """Pass, file, row and content of a run of the endless sequence of a source's passes."""
        groups = self.groups[number]
        while start < stop:
            passed, place = divmod(start, len(groups))
            end = min(len(groups), place + stop - start)
            if self._readers.get((number, lane), (None,))[0] != passed:
                order = groups.shuffled(np.random.default_rng([self.data.seed, passed, number]))
                self._readers[number, lane] = (passed, RowReader(groups, order))
            for file, row, content in self._readers[number, lane][1].read(place, end):
                yield passed, file, row, content
            start += end - place


class StreamedRows(Source):
    """The rows of a streamed set in the order of its files, to be looked through before a run."""

    def __init__(self, config: SourceConfig, answers: AnswerFormat, key: str, cache_dir: Path):
        self.config, self.answers, self.key = config, answers, key
        self.groups = stream_groups(config, cache_dir)
        self._owner = -1

    def __len__(self) -> int:
        return len(self.groups)

    @property
    def fingerprint(self) -> Sequence[Any]:
        files = [file_content(file) if Path(file).exists() else [file] for file in self.groups.files]
        return [self.key, len(self), *files]

    def place(self, record: int) -> str:
        file, row = self.groups.locate(record)
        return f"{self.groups.files[file]}, row {row}"

    def measure(self, record: int) -> Measured:
        if self._owner != os.getpid():  # a forked worker must not share its parent's open files
            self._owner, self._reader = os.getpid(), RowReader(self.groups, np.arange(len(self.groups.rows)))
        ((_, _, content),) = self._reader.read(record, record + 1)
        if isinstance(content, BadRecord):
            raise content
        return measure_row(content, self.config, self.answers)

    def sample(self, record: int, unit: int, seed: str) -> dict[str, Any]:
        raise NotImplementedError("a stream is read by StreamingDataset")


class StreamOrder(Sampler[int]):
    """The places of an epoch of a stream, batch by batch; accelerate deals the batches out to processes.

    So that every process takes equally many, the last ones are filled with -1.

    Args:
        dataset: the stream.
        batch_size: samples of a batch on one process.
        world_size: number of processes.
        workers: of a process that read (0: the process itself).
    """

    def __init__(self, dataset: StreamingDataset, batch_size: int, world_size: int = 1, workers: int = 0):
        self.dataset, self.world_size = dataset, world_size
        dataset.deal(batch_size, world_size * max(1, workers))

    def __len__(self) -> int:
        return -(-self.dataset.batches // self.world_size) * self.world_size * self.dataset.batch_size

    def set_epoch(self, epoch: int) -> None:
        """Called before every epoch."""
        self.dataset.set_epoch(epoch)

    def __iter__(self) -> Iterator[int]:
        places = self.dataset.batches * self.dataset.batch_size
        return (place if place < places else -1 for place in range(len(self)))


def stream_groups(source: SourceConfig, cache_dir: Path) -> RowGroups:
    """Row groups of a set on disk or on the Hub."""
    return row_groups(parquet_files(source.path) if source.path else hub_files(source), cache_dir)


def hub_files(source: SourceConfig) -> list[str]:
    """The parquet files of a split of a set on the Hub, as URLs that name its revision."""
    found = datasets.load_dataset_builder(str(source.hub), source.subset).config.data_files or {}
    files = {str(split): names for split, names in found.items()}
    if source.split not in files:
        raise ValueError(f"{source.hub} has the splits {sorted(files)}; sources.split is {source.split!r}")
    names = [str(file) for file in files[source.split]]
    if other := [name for name in names if not name.endswith(".parquet")]:
        raise ValueError(
            f"{source.hub} holds {other[0]}; accepted with streaming: parquet files. Others: streaming: false"
        )
    return names
