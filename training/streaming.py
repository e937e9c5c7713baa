"""Conversation sets read from front to back: endless, dealt out by files, bad records skipped as they come.

A stream is for sets too large to look through before a run. What that costs: batches are not grouped by length, how the
records are dealt out depends on the number of processes and workers (the noise of a record does not), and `samples` is
a source's share of the mixture instead of an exact count.
"""

import json
import logging
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from perceptiondlm.training.conversations import load_rows, measure_row, parquet_files, row_sample
from perceptiondlm.training.data_config import DataConfig, SourceConfig
from perceptiondlm.training.sources import MIN_RECORDS, AnswerFormat, BadRecord, check_bad_share


logger = logging.getLogger(__name__)

SHUFFLE_BUFFER = 256  # rows held back, encoded, to draw the next one from


class StreamingDataset(IterableDataset):
    """Samples (see sources.py) without end, for a plain `DataLoader` on every process (RANK and WORLD_SIZE are read).

    Every reader (a worker of a process) gets its own files, or, when there are fewer files than readers, its own rows.
    Bad records are logged, appended to `bad_records.jsonl` in the cache directory, and skipped.
    """

    def __init__(self, data: DataConfig, answers: AnswerFormat, cache_dir: Path):
        self.data, self.answers = data, answers
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
        streams = [self._samples(place, reader, readers) for place in range(len(self.sets))]
        weights = [source.samples or 0 for source in self.data.sources]
        while True:
            yield next(dice.choices(streams, weights)[0])

    def _samples(self, place: int, reader: int, readers: int) -> Iterator[dict[str, Any]]:
        """Samples of one source for one reader, epoch after epoch."""
        settings = self.data.sources[place]
        read = bad = epoch = 0
        while True:
            found = 0
            for row_place, row in shuffled(self._rows(place, epoch, reader, readers), f"{epoch}/{reader}"):
                seed = f"{epoch}/{self.data.seed}/{settings.name}/{row_place}"
                read += 1
                try:
                    for unit in range(len(measure_row(row, settings, self.answers).lengths)):
                        found += 1
                        sample = row_sample(row, unit, seed, settings, self.answers)
                        yield sample | {"noise_seed": f"{seed}:{unit}", "coarse": False, "filler": False}
                except BadRecord as error:
                    bad += 1
                    self._report(settings, row_place, error, bad, read)
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


def shuffled(rows: Iterator[Any], seed: str) -> Iterator[Any]:
    """The rows in an order drawn by the seed out of a buffer."""
    dice = random.Random(f"shuffle/{seed}")
    buffer: list[Any] = []
    for row in rows:
        buffer.append(row)
        if len(buffer) == SHUFFLE_BUFFER:
            yield buffer.pop(dice.randrange(SHUFFLE_BUFFER))
    dice.shuffle(buffer)
    yield from buffer
