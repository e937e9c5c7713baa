"""Conversation sets read from front to back: endless, dealt out by files, bad records skipped as they come.

A stream is for sets too large to look through before a run. What that costs: batches are of similar length only within
a small pool, how the records are dealt out depends on the number of processes and workers (the noise of a record does
not), and `samples` is a source's share of the mixture instead of an exact count.
"""

import json
import logging
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from perceptiondlm.training.data.batches import grouped_batches
from perceptiondlm.training.data.conversations import load_rows, measure_row, parquet_files, row_sample
from perceptiondlm.training.data.data_config import DataConfig, SourceConfig
from perceptiondlm.training.data.sources import MIN_RECORDS, AnswerFormat, BadRecord, check_bad_share


logger = logging.getLogger(__name__)

POOL = 256  # samples that are held back, their images encoded, to make batches of and shuffle these


@dataclass
class Waiting:
    """Sample `unit` of a row that was found good, its length in tokens and its seed."""

    length: int
    row: dict[str, Any]
    unit: int
    seed: str
    settings: SourceConfig


class StreamingDataset(IterableDataset):
    """Samples (see sources.py) without end, for a plain `DataLoader` on every process (RANK and WORLD_SIZE are read).

    Every reader (a worker of a process) gets its own files, or, when there are fewer files than readers, its own rows.
    Bad records are logged, appended to `bad_records.jsonl` in the cache directory, and skipped.

    Args:
        batch_size: runs of this many samples are of similar length; 1 gives a plain shuffle. To be set before reading.
    """

    def __init__(self, data: DataConfig, answers: AnswerFormat, cache_dir: Path):
        self.data, self.answers, self.batch_size = data, answers, 1
        self.log = cache_dir / "bad_records.jsonl"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.sets = [load_rows(source, parquet_files(source.path) if source.path else []) for source in data.sources]

    @property
    def samples_per_epoch(self) -> int:
        """Records of the mixture that count as one epoch."""
        return sum(source.samples or 0 for source in self.data.sources)

    @property
    def report(self) -> list[dict[str, Any]]:
        """Bad records so far, over all processes and restarts, for the run's summary."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [json.loads(line) for line in sorted(set(lines))]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        workers, number = (worker.num_workers, worker.id) if worker else (1, 0)
        readers = workers * int(os.environ.get("WORLD_SIZE", "1"))
        reader = workers * int(os.environ.get("RANK", "0")) + number
        dice = random.Random(f"mixture/{self.data.seed}/{reader}")
        streams = [self._waiting(place, reader, readers) for place in range(len(self.sets))]
        weights = [source.samples or 0 for source in self.data.sources]
        while True:
            batches = max(1, POOL // self.batch_size)
            pool = [next(dice.choices(streams, weights)[0]) for _ in range(batches * self.batch_size)]
            lengths = [waiting.length for waiting in pool]
            for batch in grouped_batches(lengths, self.batch_size, batches, dice.getrandbits(62)):
                yield from (self._sample(pool[index]) for index in batch)

    def _sample(self, waiting: "Waiting") -> dict[str, Any]:
        sample = row_sample(waiting.row, waiting.unit, waiting.seed, waiting.settings, self.answers)
        return sample | {"noise_seed": f"{waiting.seed}:{waiting.unit}", "coarse": False, "filler": False}

    def _waiting(self, place: int, reader: int, readers: int) -> Iterator["Waiting"]:
        """Samples of one source for one reader, epoch after epoch, not yet read."""
        settings = self.data.sources[place]
        read = bad = epoch = 0
        while True:
            found = 0
            for row_place, row in self._rows(place, epoch, reader, readers):
                seed = f"{epoch}/{self.data.seed}/{Path(settings.name).name}/{row_place}"
                read += 1
                try:
                    lengths = measure_row(row, settings, self.answers).lengths
                except BadRecord as error:
                    bad += 1
                    self._report(settings, row_place, error, bad, read)
                    continue
                found += len(lengths)
                yield from (Waiting(length, row, unit, seed, settings) for unit, length in enumerate(lengths))
            if not found:
                raise ValueError(f"{settings.name}: reader {reader} of {readers} found no sample in {read} records")
            epoch += 1

    def _rows(self, place: int, epoch: int, reader: int, readers: int) -> Iterator[tuple[str, dict[str, Any]]]:
        """Rows of a source for one reader, with their place: file number and row."""
        rows = self.sets[place]
        parts_per_file = -(-readers // rows.num_shards)
        parts = [(file, part) for file in range(rows.num_shards) for part in range(parts_per_file)]
        random.Random(f"files/{self.data.seed}/{epoch}").shuffle(parts)
        for file, part in parts[reader::readers]:
            batches = rows.shard(rows.num_shards, file).iter(batch_size=1)  # `iter` leaves torch's workers alone
            for number, batch in enumerate(batches):
                if number % parts_per_file == part:
                    yield f"file {file}, row {number}", {name: values[0] for name, values in batch.items()}

    def _report(self, settings: SourceConfig, place: str, error: BadRecord, bad: int, read: int) -> None:
        logger.warning("bad record skipped: %s, %s: %s", settings.name, place, error)
        with open(self.log, "a") as stream:
            stream.write(json.dumps({"name": settings.name, "place": place, "error": str(error)}) + "\n")
        if read >= MIN_RECORDS:
            check_bad_share(settings.name, bad, read, self.data.max_bad_share, f"{place}: {error}")
