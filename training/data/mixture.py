"""A run's training data in random access: sources mixed by sample counts, looked through once before the run.

The look (survey.py) finds the length of every sample, and the records that cannot be used: these are named with file
and row, counted and left out, and too many stop the run before it starts. Its result is kept on disk, so a resumed run
starts at once. A record that turns unreadable later stops the run; nothing is ever replaced by another record.
"""

import hashlib
import random
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
from torch.utils.data import Dataset

from perceptiondlm.configuration_perceptiondlm import PerceptionDLMConfig
from perceptiondlm.processing_perceptiondlm import PerceptionDLMProcessor
from perceptiondlm.training.data.bad_records import COUNTS, BadRecord
from perceptiondlm.training.data.conversations import ConversationSource
from perceptiondlm.training.data.data_config import DataConfig, LossConfig, SourceConfig
from perceptiondlm.training.data.named_regions import NamedRegionSource
from perceptiondlm.training.data.processes import Peers, local_cores, of_everyone
from perceptiondlm.training.data.region_sets import RegionSource
from perceptiondlm.training.data.scene_sources import SceneSource
from perceptiondlm.training.data.sources import AnswerFormat, Source
from perceptiondlm.training.data.streaming import StreamedRows, StreamingDataset
from perceptiondlm.training.data.survey import SourceReport, Work, load_survey, look, merge, plan_work, warn


class Part:
    """The samples that an epoch takes of a source, by number: of all its records, or of a fixed random subset.

    Args:
        source: of the records.
        work: the survey of those that are taken, which is done.
        rounds: how often they are all taken, with a repeat number each.
        extra: places among them that are taken once more.

    Raises:
        ValueError: when too many records are bad.
    """

    def __init__(self, source: Source, work: Work, rounds: int, extra: np.ndarray):
        self.source, self.records, self.rounds, self.extra = source, work.records, rounds, extra
        self.survey = survey = load_survey(work)
        source.dropped = survey.dropped
        self.extra_ends = np.cumsum(survey.ends[extra] - self._starts(extra))

    def _starts(self, places: np.ndarray) -> np.ndarray:
        """Samples before those of the records at some places."""
        return np.where(places > 0, self.survey.ends[places - 1], 0)

    def __len__(self) -> int:
        return self.rounds * len(self.survey.lengths) + (int(self.extra_ends[-1]) if len(self.extra) else 0)

    @property
    def report(self) -> SourceReport:
        """What was found, with the samples of an epoch."""
        return replace(self.survey.report, samples=len(self))

    def lengths(self) -> np.ndarray:
        """Tokens of every sample."""
        whole = self.survey.lengths
        if self.rounds == 1 and not len(self.extra):
            return whole
        runs = zip(self._starts(self.extra), self.survey.ends[self.extra], strict=True)
        return np.concatenate([*[whole] * self.rounds, *(whole[start:end] for start, end in runs)])

    def locate(self, index: int) -> tuple[int, int, int]:
        """Record, repeat and unit of a sample."""
        repeat, index = divmod(index, len(self.survey.lengths))
        if repeat < self.rounds:
            place = int(np.searchsorted(self.survey.ends, index, side="right"))
        else:
            index += (repeat - self.rounds) * len(self.survey.lengths)
            number = int(np.searchsorted(self.extra_ends, index, side="right"))
            place, repeat = int(self.extra[number]), self.rounds
            index += int(self.survey.ends[place]) - int(self.extra_ends[number])
        unit = index - (int(self.survey.ends[place - 1]) if place else 0)
        return int(self.records[place]), repeat, unit


class MixtureDataset(Dataset):
    """Samples of all sources by number; what a sample holds depends on seed, source, record and epoch alone.

    `dataset[~index]` is the sample `index` as a filler, without anything to learn.

    Args:
        parts: of the sources, in their order.
        coarse_epochs: epochs at the start whose samples are marked `coarse`.

    Attributes:
        lengths: (n,) int32: tokens of every sample.
    """

    def __init__(self, parts: Sequence[Part], coarse_epochs: int = 0):
        self.parts, self.coarse_epochs, self.epoch = parts, coarse_epochs, 0
        self.ends = np.cumsum([len(part) for part in parts])
        lengths = [part.lengths() for part in parts]
        self.lengths = lengths[0] if len(parts) == 1 else np.concatenate(lengths)

    @property
    def sources(self) -> list[Source]:
        """The sources."""
        return [part.source for part in self.parts]

    def set_epoch(self, epoch: int) -> None:
        """The epoch is part of every sample's seed."""
        self.epoch = epoch

    def __len__(self) -> int:
        return int(self.ends[-1])

    def locate(self, index: int) -> tuple[int, int, int, int]:
        """Source, record, repeat and unit of a sample."""
        number = int(np.searchsorted(self.ends, index, side="right"))
        before = int(self.ends[number - 1]) if number else 0
        return (number, *self.parts[number].locate(index - before))

    def __getitem__(self, index: int) -> dict[str, Any]:
        """A sample (see sources.py), with `noise_seed`, `coarse` and `filler`."""
        filler = index < 0
        index = ~index if filler else index
        if index >= len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        number, record, repeat, unit = self.locate(index)
        source = self.parts[number].source
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
        return [asdict(part.report) for part in self.parts]


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
    cache_dir = Path(data.prepared or cache_dir)
    if not data.streaming:
        return build_mixture(data, loss, processor, config, cache_dir)
    check_turns(data, config)
    peers = Peers.find(cache_dir)
    run_id = of_everyone(uuid4().hex)[0]
    with peers.leader_first():
        if peers.rank == 0:
            shutil.rmtree(cache_dir / COUNTS, ignore_errors=True)
        return StreamingDataset(data, AnswerFormat.build(data, loss, processor, config), cache_dir, run_id)


def build_mixture(
    data: DataConfig,
    loss: LossConfig,
    processor: PerceptionDLMProcessor,
    config: PerceptionDLMConfig,
    cache_dir: str | Path,
) -> MixtureDataset:
    """The samples of all sources in random access, in the order of the sources. Raises as `build_dataset` does.

    What was not looked at before (`prepare`) is looked at now, by all processes together.
    """
    cache_dir = Path(data.prepared or cache_dir)
    if not data.sources:
        raise ValueError("data.sources is empty; accepted: at least one source")
    check_turns(data, config)
    answers = AnswerFormat.build(data, loss, processor, config)
    peers = Peers.find(cache_dir)
    parts = [survey_source(number, data, answers, cache_dir, peers) for number in range(len(data.sources))]
    if not sum(map(len, parts)):
        raise ValueError(f"no sample is left: {[asdict(part.report) for part in parts]}")
    dataset = MixtureDataset([part for part in parts if len(part)], data.coarse_epochs)
    found = of_everyone(hashlib.sha256(np.ascontiguousarray(dataset.lengths).data).hexdigest())
    if len(set(found)) > 1:
        raise ValueError(
            f"processes {[rank for rank, digest in enumerate(found) if digest != found[0]]} found other data than "
            "process 0: the machines hold different copies of the sets"
        )
    return dataset


def check_turns(data: DataConfig, config: PerceptionDLMConfig) -> None:
    """Refuse several turns in one sequence where the model's attention cannot keep them apart."""
    fits = config.attention_layout == "isolated" and not config.supervise_markers
    if not fits and any(source.turns == "all_in_one" for source in data.sources):
        raise ValueError(
            "sources.turns 'all_in_one' needs attention_layout 'isolated' without supervise_markers, this model has "
            f"{config.attention_layout!r} and supervise_markers={config.supervise_markers}: use 'one' or 'all'"
        )


def survey_source(number: int, data: DataConfig, answers: AnswerFormat, cache_dir: Path, peers: Peers) -> Part:
    """A source with its survey, made by all peers together where it is missing."""
    with peers.leader_first():  # indices are made by one
        source, work, rounds, extra = plan_source(number, data, answers, cache_dir)
    look(work, (peers.rank, peers.count), local_cores())
    of_everyone(None)
    with peers.leader_first():
        merge(work)
    part = Part(source, work, rounds, extra)
    if peers.rank == 0:
        warn(part.survey.report)
    return part


def plan_source(
    number: int, data: DataConfig, answers: AnswerFormat, cache_dir: Path
) -> tuple[Source, Work, int, np.ndarray]:
    """A source, what is to be looked at, and how often an epoch takes it: rounds, and places taken once more."""
    settings = data.sources[number]
    source = build_source(settings, data, answers, cache_dir)
    count = len(source)
    if count == 0:
        raise ValueError(f"{settings.name} holds no record")
    rounds, rest = divmod(count if settings.samples is None else settings.samples, count)
    subset = np.array(sorted(random.Random(f"subset/{source.key}").sample(range(count), rest)), dtype=np.int64)
    records, extra = (range(count), subset) if rounds else (subset, np.empty(0, dtype=np.int64))
    work = plan_work(source, settings, records, data.max_bad_share, answers, cache_dir)
    return source, work, max(rounds, 1), extra


def build_source(settings: SourceConfig, data: DataConfig, answers: AnswerFormat, cache_dir: Path) -> Source:
    """A source by its kind."""
    if settings.is_drawn:
        return SceneSource(settings, answers)
    key = f"{data.seed}/{Path(settings.name).name}"  # the same wherever the set lies
    if settings.streaming:
        return StreamedRows(settings, answers, key, cache_dir)
    if settings.kind == "regions":
        return RegionSource(settings, answers, key, cache_dir)
    if settings.kind == "named_regions":
        return NamedRegionSource(settings, answers, key)
    return ConversationSource(settings, answers, key, cache_dir)
