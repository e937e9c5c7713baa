"""Looking through a run's data before the run: without the model's weights, in shares, on any number of machines."""

from collections.abc import Iterator
from pathlib import Path

from perceptiondlm.training.config import RunConfig
from perceptiondlm.training.data.data_config import DataConfig
from perceptiondlm.training.data.mixture import Part, plan_source
from perceptiondlm.training.data.processes import local_cores
from perceptiondlm.training.data.sources import AnswerFormat
from perceptiondlm.training.data.survey import SourceReport, look, merge
from perceptiondlm.training.start import build_processor


def prepare(
    run: RunConfig, share: tuple[int, int] = (0, 1), workers: int | None = None
) -> Iterator[tuple[SourceReport, int]]:
    """Look at one share (i of n) of every set of a run; what was looked at before is passed over.

    Args:
        workers: processes that read; by default one for every core.

    Yields:
        Of every source its report, and how many parts of it are still to be looked at by other shares. The report holds
        numbers when there are none.

    Raises:
        FileNotFoundError, ValueError: for sets that are missing, unreadable or have too many bad records.
    """
    config, processor = build_processor(run)
    folder = Path(run.data.prepared or run.output_dir)
    for data in looked_at(run):
        answers = AnswerFormat.build(data, run.loss, processor, config)
        for number in range(len(data.sources)):
            source, work, rounds, extra = plan_source(number, data, answers, folder)
            look(work, share, local_cores() if workers is None else workers)
            if not merge(work):
                yield SourceReport(work.name), len(work.missing())
                continue
            yield Part(source, work, rounds, extra).report, 0


def looked_at(run: RunConfig) -> list[DataConfig]:
    """What a run trains on, and what it is evaluated on."""
    if not run.evaluation.steps:
        return [run.data]
    held_out = DataConfig([run.evaluation.source], seed=run.data.seed, max_length=run.data.max_length)
    return [run.data, held_out]
