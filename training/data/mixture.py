"""A run's training data in random access: sources mixed by sample counts, looked through once before the run.

The look (`survey`) reads every record that the run will see just as training does. It finds the length of every
sample, and the records that cannot be used: these are logged with file and row, counted and left out, and too many stop
the run before it starts. Its result is kept on disk, so a resumed run starts at once. A record that turns unreadable
later stops the run; nothing is ever replaced by another record.
"""

import hashlib
import json
import logging
import os
import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from perceptiondlm.configuration_perceptiondlm import PerceptionDLMConfig
from perceptiondlm.processing_perceptiondlm import PerceptionDLMProcessor
from perceptiondlm.training.data.conversations import ConversationSource
from perceptiondlm.training.data.data_config import DataConfig, LossConfig, SourceConfig
from perceptiondlm.training.data.named_regions import NamedRegionSource
from perceptiondlm.training.data.region_sets import RegionSource
from perceptiondlm.training.data.scene_sources import SceneSource
from perceptiondlm.training.data.sources import MIN_RECORDS, AnswerFormat, BadRecord, Measured, Source, check_bad_share
from perceptiondlm.training.data.streaming import StreamingDataset


logger = logging.getLogger(__name__)

_source: Source  # of a survey's worker process


@dataclass
class SourceReport:
    """What became of a source's records in the survey, for the run's summary.

    Args:
        records: read; samples: of an epoch.
        bad: records left out because they cannot be read, by file and row (`bad_records`).
        too_long: samples left out because no answer fits behind their prompt; cut: answers that are shortened.
    """

    name: str
    records: int = 0
    samples: int = 0
    bad: int = 0
    too_long: int = 0
    cut: int = 0
    bad_records: list[str] = field(default_factory=list)

    def add(self, place: str, measured: Measured, error: str | None) -> None:
        """Count one record."""
        self.records += 1
        self.too_long += measured.too_long
        self.cut += measured.cut
        if error is not None:
            self.bad += 1
            self.bad_records.append(f"{place}: {error}")
            logger.warning("bad record skipped: %s: %s", place, error)

    def check(self, limit: float) -> None:
        """Stop when too large a share of the records is bad."""
        check_bad_share(self.name, self.bad, self.records, limit, "".join(self.bad_records[-1:]))


class MixtureDataset(Dataset):
    """Samples of all sources by number; what a sample holds depends on seed, source, record and epoch alone.

    `dataset[~index]` is the sample `index` as a filler, without anything to learn.

    Args:
        sources: the parts.
        lengths: of every sample, in tokens.
        samples: (n, 4) int64: source, record, repeat and unit of every sample.
        reports: of the sources.
        coarse_epochs: epochs at the start whose samples are marked `coarse`.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        lengths: Sequence[int],
        samples: np.ndarray,
        reports: Sequence[SourceReport],
        coarse_epochs: int = 0,
    ):
        self.sources, self.lengths, self.samples, self.reports = sources, lengths, samples, reports
        self.coarse_epochs, self.epoch = coarse_epochs, 0

    def set_epoch(self, epoch: int) -> None:
        """The epoch is part of every sample's seed."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """A sample (see sources.py), with `noise_seed`, `coarse` and `filler`."""
        filler = index < 0
        number, record, repeat, unit = self.samples[~index if filler else index].tolist()
        source = self.sources[number]
        seed = f"{self.epoch}/{source.key}/{record}" + f"+{repeat}" * (repeat > 0)
        try:
            sample = source.sample(record, unit, seed)
        except BadRecord as error:
            raise OSError(f"{source.place(record)} was fine before the run and is not now: {error}") from error
        sample["noise_seed"] = seed + f":{unit}" * (unit > 0)
        return sample | {"coarse": self.epoch < self.coarse_epochs, "filler": filler}

    @property
    def report(self) -> list[dict[str, Any]]:
        """What was found in every source, for the run's summary."""
        return [asdict(report) for report in self.reports]


def build_dataset(
    data: DataConfig,
    loss: LossConfig,
    processor: PerceptionDLMProcessor,
    config: PerceptionDLMConfig,
    cache_dir: str | Path,
) -> MixtureDataset | StreamingDataset:
    """The training data of a run: `build_mixture`, or, when its sources stream, a stream.

    Args:
        cache_dir: where indices, surveys and logs of bad records are kept.
    Raises:
        FileNotFoundError, ValueError: for sets that are missing, have other columns or too many bad records.
    """
    if not data.streaming:
        return build_mixture(data, loss, processor, config, cache_dir)
    with main_process_first():
        return StreamingDataset(data, AnswerFormat.build(data, loss, processor, config), Path(cache_dir))


def build_mixture(
    data: DataConfig,
    loss: LossConfig,
    processor: PerceptionDLMProcessor,
    config: PerceptionDLMConfig,
    cache_dir: str | Path,
) -> MixtureDataset:
    """The samples of all sources in random access, in the order of the sources. Raises as `build_dataset` does.

    Of several processes the main one goes first; the others then find its surveys in `cache_dir`.
    """
    if not data.sources:
        raise ValueError("data.sources is empty; accepted: at least one source")
    answers = AnswerFormat.build(data, loss, processor, config)
    lengths: list[int] = []
    sources, rows, reports = [], [], []
    for number, settings in enumerate(data.sources):
        with main_process_first():
            source = build_source(settings, data, answers, Path(cache_dir))
            taken = chosen_records(source, settings)
            found, report = survey(source, settings, taken, data.max_bad_share, answers, Path(cache_dir))
        for record, repeat in taken:
            lengths += found[record]
            rows += [(number, record, repeat, unit) for unit in range(len(found[record]))]
            report.samples += len(found[record])
        sources.append(source)
        reports.append(report)
    if not rows:
        raise ValueError(f"no sample is left: {[asdict(report) for report in reports]}")
    return MixtureDataset(sources, lengths, np.array(rows, dtype=np.int64), reports, data.coarse_epochs)


@contextmanager
def main_process_first() -> Iterator[None]:
    """Where several processes train, the first one does the block before the others."""
    distributed = dist.is_available() and dist.is_initialized()
    first = not distributed or dist.get_rank() == 0
    if not first:
        dist.barrier()
    yield
    if distributed and first:
        dist.barrier()


def build_source(settings: SourceConfig, data: DataConfig, answers: AnswerFormat, cache_dir: Path) -> Source:
    """A source by its kind."""
    if settings.is_drawn:
        return SceneSource(settings, answers)
    key = f"{data.seed}/{Path(settings.name).name}"  # the same wherever the set lies
    if settings.kind == "regions":
        return RegionSource(settings, answers, key, cache_dir)
    if settings.kind == "named_regions":
        return NamedRegionSource(settings, answers, key)
    return ConversationSource(settings, answers, key)


def chosen_records(source: Source, settings: SourceConfig) -> list[tuple[int, int]]:
    """Records of an epoch with the number of their repeat: all, a fixed random subset, or all several times over."""
    count = len(source)
    if count == 0:
        raise ValueError(f"{settings.name} holds no record")
    rounds, rest = divmod(count if settings.samples is None else settings.samples, count)
    subset = sorted(random.Random(f"subset/{source.key}").sample(range(count), rest))
    return [(record, repeat) for repeat in range(rounds) for record in range(count)] + [(r, rounds) for r in subset]


def survey(
    source: Source,
    settings: SourceConfig,
    taken: list[tuple[int, int]],
    max_bad_share: float,
    answers: AnswerFormat,
    cache_dir: Path,
) -> tuple[dict[int, list[int]], SourceReport]:
    """Lengths of every sample of the records taken, by record, and the report; kept in `cache_dir`."""
    records = sorted({record for record, _ in taken})
    path = cache_dir / f"survey-{_survey_key(source, settings, records, answers)}.json"
    if path.exists():
        kept = json.loads(path.read_text())
        report, lengths = SourceReport(**kept["report"]), kept["lengths"]
    else:
        report, lengths = _look(source, settings, records, max_bad_share)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(json.dumps({"report": asdict(report), "lengths": lengths}))
        part.rename(path)
    report.check(max_bad_share)
    return dict(zip(records, lengths, strict=True)), report


def _look(
    source: Source, settings: SourceConfig, records: list[int], max_bad_share: float
) -> tuple[SourceReport, list[list[int]]]:
    """Read every record; stops early when too many are bad."""
    report, lengths = SourceReport(settings.name), []
    for record, (measured, error) in zip(records, _measure_all(source, records), strict=True):
        report.add(source.place(record), measured, error)
        lengths.append(measured.lengths)
        if report.records >= MIN_RECORDS:
            report.check(max_bad_share)
    return report, lengths


def _survey_key(source: Source, settings: SourceConfig, records: list[int], answers: AnswerFormat) -> str:
    """A name that changes with everything that a survey depends on."""
    numbers = hashlib.sha256(np.array(records, dtype=np.int64).tobytes()).hexdigest()
    limits = (answers.num_slots, answers.slot_limit, answers.copies, answers.max_length)
    processor = {name: value for name, value in answers.processor.to_dict().items() if name != "tokenizer"}
    vocabulary = len(answers.processor.tokenizer)
    content = [source.fingerprint, asdict(settings), numbers, limits, processor, vocabulary]
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _measure_all(source: Source, records: list[int]) -> Iterator[tuple[Measured, str | None]]:
    """`measure` of every record in order, worked on by all cores a little ahead."""
    workers = min(os.cpu_count() or 1, -(-len(records) // 16))
    progress = tqdm(total=len(records), desc=f"reading {source.key}", disable=None)
    pool = ProcessPoolExecutor(workers, get_context("fork"), _start_worker, (source,))  # fork: nothing is pickled
    with pool, progress:
        waiting = iter(records)
        while chunk := list(islice(waiting, 256 * workers)):
            for result in pool.map(_measure, chunk, chunksize=16):
                progress.update()
                yield result


def _start_worker(source: Source) -> None:
    global _source
    _source = source
    torch.set_num_threads(1)


def _measure(record: int) -> tuple[Measured, str | None]:
    try:
        return _source.measure(record), None
    except BadRecord as error:
        return Measured([]), str(error)
