"""Where a stage runs over batches of records: in this process, or in a pool of Ray actors.

An executor takes a stage and batches and gives the outcomes in order; so a run is the same whichever it is.
"""

from collections.abc import Iterator
from typing import Any

from perceptiondlm.data_engine.record import Record
from perceptiondlm.data_engine.runner import Executor, Outcome, run_batch, run_here
from perceptiondlm.data_engine.stages.base import Stage


EXECUTORS = ("here", "ray")


def make_executor(name: str, workers: int) -> Executor:
    """An executor by name.

    Args:
        workers: actors of "ray", each with a copy of the stage (and its model).
    """
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    return run_here if name == "here" else RayExecutor(workers)


class RayExecutor:
    """Runs every stage in `workers` actors of the Ray cluster that this process is connected to (or a local one).

    Args:
        workers: actors per stage.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers

    def __call__(self, stage: Stage, batches: Iterator[list[Record]]) -> Iterator[list[Outcome]]:
        try:
            import ray
            from ray.util import ActorPool
        except ImportError as error:
            raise ImportError('executor ray needs Ray: pip install "perceptiondlm[ray]"') from error
        if not ray.is_initialized():
            ray.init(ignore_reinit_error=True, include_dashboard=False)
        actors: list[Any] = [ray.remote(StageActor).remote(stage) for _ in range(self.workers)]
        pool = ActorPool(actors)
        try:
            yield from _in_order(pool, batches, 2 * self.workers)
        finally:
            for actor in actors:
                ray.kill(actor)


class StageActor:
    """A stage in a process of its own."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        stage.open()

    def run(self, records: list[Record]) -> list[Outcome]:
        """Outcomes of a batch."""
        return run_batch(self.stage, records)


def _in_order(pool, batches: Iterator[list[Record]], most: int) -> Iterator[list[Outcome]]:
    """Outcomes in the order of the batches, at most `most` batches under way."""
    under_way = 0
    for batch in batches:
        if under_way >= most:
            yield pool.get_next()
            under_way -= 1
        pool.submit(lambda actor, records: actor.run.remote(records), batch)
        under_way += 1
    while pool.has_next():
        yield pool.get_next()
