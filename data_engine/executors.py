"""Where a stage runs over batches of records: in this process, or on Ray Data, as `perceptiondlm annotate` does.

An executor takes a stage and batches and gives the outcomes in order; so a run is the same whichever it is.
"""

import logging
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from perceptiondlm.data_engine.record import Record
from perceptiondlm.data_engine.runner import Executor, Outcome, run_batch, run_here
from perceptiondlm.data_engine.stages.base import Stage


EXECUTORS = ("here", "ray")
MOST_BATCHES = 2000  # that are handed to Ray Data at once; a pool of actors is started for each such share
CPUS_PER_ACTOR = 0.5  # slots of a stage; some must be left on a cluster, or Ray Data waits for ever


def make_executor(name: str, workers: int, gpus_per_worker: float = 0.0) -> Executor:
    """An executor by name.

    Args:
        workers: actors of "ray", each with a copy of the stage (and its model).
        gpus_per_worker: GPUs that each of them takes; below 1 several share one.
    """
    if workers < 1 or gpus_per_worker < 0:
        raise ValueError(
            f"workers must be at least 1 and gpus_per_worker not negative, got {workers}, {gpus_per_worker}"
        )
    return run_here if name == "here" else RayExecutor(workers, gpus_per_worker)


@dataclass(frozen=True)
class RayExecutor:
    """Runs every stage on a pool of Ray Data actors, on the cluster that this process is connected to or a local one.

    Args:
        workers: actors per stage.
        gpus: of each.
    """

    workers: int
    gpus: float = 0.0

    def __call__(self, stage: Stage, batches: Iterator[list[Record]]) -> Iterator[list[Outcome]]:
        try:
            import ray
        except ImportError as error:
            raise ImportError('executor ray needs Ray: pip install "perceptiondlm[ray]"') from error
        if not ray.is_initialized():
            ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING)
        self._check_room(ray.cluster_resources())
        while share := list(islice(batches, MOST_BATCHES)):
            yield from self._outcomes(ray, ray.cloudpickle.dumps(stage), share)

    def _check_room(self, resources: dict[str, float]) -> None:
        """Refuse a pool that the cluster has no room for: Ray would wait for ever."""
        for name, each in (("CPU", CPUS_PER_ACTOR), ("GPU", self.gpus)):
            if self.workers * each > resources.get(name, 0):
                raise ValueError(
                    f"{self.workers} workers of {each:g} {name} need more than the cluster's "
                    f"{resources.get(name, 0):g}: lower workers"
                )

    def _outcomes(self, ray: Any, stage: bytes, batches: list[list[Record]]) -> Iterator[list[Outcome]]:
        """Outcomes of batches, in their order."""
        context = ray.data.DataContext.get_current().copy()
        context.enable_progress_bars = False
        context.execution_options.preserve_order = True
        logging.getLogger("ray.data").setLevel(logging.WARNING)
        rows = [{"packed": pickle.dumps(batch)} for batch in batches]
        with ray.data.DataContext.current(context):
            done = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
                StageActor,
                batch_size=1,
                compute=ray.data.ActorPoolStrategy(size=min(self.workers, len(rows))),
                fn_constructor_kwargs={"stage": stage},
                num_cpus=CPUS_PER_ACTOR,
                num_gpus=self.gpus or None,
            )
            for row in done.iter_rows():
                outcomes = pickle.loads(row["packed"])
                if isinstance(outcomes, Exception):
                    raise outcomes
                yield outcomes


class StageActor:
    """A stage in a process of its own."""

    def __init__(self, stage: bytes) -> None:
        self.stage: Stage = pickle.loads(stage)
        self.stage.open()

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[bytes]]:
        """Packed batches to their packed outcomes, or to what stops the run, which the caller raises as it is."""
        return {"packed": [self._outcomes(packed) for packed in batch["packed"]]}

    def _outcomes(self, packed: bytes) -> bytes:
        try:
            return pickle.dumps(run_batch(self.stage, pickle.loads(packed)))
        except Exception as error:  # noqa: BLE001 - raised again by the caller
            return pickle.dumps(error)
