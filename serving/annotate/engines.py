"""The two ways to run a plan: in this process with threads that read ahead, or on Ray Data; one reader and captioner.

On Ray Data, reading and measuring are CPU tasks, and captioning is a class on a pool of actors, each with its own model
and, where there are any, its own GPU. Rows of the data set are parts: their numbers go in, their counts come out, and
the actors write the parts' files. So a part is finished when its file is there, whatever becomes of Ray.
"""

import importlib.util
import logging
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from perceptiondlm.samples_perceptiondlm import ahead_of
from perceptiondlm.serving.annotate.captioner import Captioner
from perceptiondlm.serving.annotate.job import AnnotationJob
from perceptiondlm.serving.annotate.progress import Progress
from perceptiondlm.serving.annotate.reading import PartReader


ENGINES = ("auto", "local", "ray")
INSTALL = 'annotating on Ray needs ray: pip install "perceptiondlm[ray]"'
READING_CPUS = 0.25  # slots of a reading task; as many run as whole CPUs are left, since each is a process
MOST_BLOCKS = 2000  # of the list of parts


@dataclass(frozen=True)
class Engine:
    """Where a run happens.

    Args:
        name: "local", "ray", or "auto": Ray where an address, several actors or several GPUs ask for it.
        workers: threads that read ahead, in the local engine.
        actors: models at work at the same time; by default one per GPU, or one.
        gpus_per_actor: by default 1 where there are GPUs; below 1 several share one.
        cpus_per_actor: slots that an actor takes. Some must be left for reading: with all taken, Ray waits for ever.
        address: of a running cluster, or "auto"; None starts one on this machine.
    """

    name: str = "auto"
    workers: int = 1
    actors: int | None = None
    gpus_per_actor: float | None = None
    cpus_per_actor: float = 0.5
    address: str | None = None

    def __post_init__(self) -> None:
        if self.name not in ENGINES:
            raise ValueError(f"--engine must be one of {ENGINES}, got {self.name!r}")
        for name, value in (("actors", self.actors), ("workers", self.workers)):
            if value is not None and value < 1:
                raise ValueError(f"--{name} must be at least 1, got {value}")
        if self.cpus_per_actor <= READING_CPUS or (self.gpus_per_actor or 0) < 0:
            raise ValueError(f"--cpus-per-actor must be above {READING_CPUS}, and --gpus-per-actor not negative")
        if self.name == "local" and (self.address or (self.actors or 1) > 1):
            raise ValueError("--address and several --actors need --engine ray")
        if self.wants_ray and importlib.util.find_spec("ray") is None:
            raise ValueError(INSTALL)

    @property
    def wants_ray(self) -> bool:
        """Whether the run goes to Ray."""
        if self.name != "auto":
            return self.name == "ray"
        if self.address or (self.actors or 1) > 1:
            return True
        return torch.cuda.device_count() > 1 and importlib.util.find_spec("ray") is not None

    def run(self, job: AnnotationJob, numbers: Sequence[int], progress: Progress) -> None:
        """Do the parts of these numbers."""
        if self.wants_ray:
            run_on_ray(job, numbers, progress, self)
        else:
            run_locally(job, numbers, progress, self.workers)


def run_locally(job: AnnotationJob, numbers: Sequence[int], progress: Progress, workers: int = 1) -> None:
    """One model in this process; threads read the next parts meanwhile."""
    captioner = Captioner(job)
    reader = PartReader(job, captioner.processor)
    for part in ahead_of(numbers, reader, workers, workers):
        progress.add(captioner(part))


# --- Ray Data ---------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _reader(job: bytes) -> PartReader:
    """The reader of a job, once a worker process."""
    return PartReader(pickle.loads(job))


def read_row(row: dict[str, Any], job: bytes) -> dict[str, Any]:
    """A Ray Data task: a part's number to its images, packed."""
    return {"part": row["part"], "packed": _reader(job)(int(row["part"])).packed()}


class CaptioningActor:
    """A Ray Data actor: packed parts to what was done with them."""

    def __init__(self, job: bytes, cpus: float):
        if not torch.cuda.is_available():
            torch.set_num_threads(max(1, int(cpus)))
        self.captioner = Captioner(pickle.loads(job))

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        summaries = [self.captioner(pickle.loads(packed)) for packed in batch["packed"]]
        return {name: [summary[name] for summary in summaries] for name in summaries[0]}


def run_on_ray(job: AnnotationJob, numbers: Sequence[int], progress: Progress, engine: Engine) -> None:
    """Parts through Ray Data: reading tasks, then a pool of actors."""
    import ray

    started = not ray.is_initialized()
    if started:
        ray.init(engine.address or "local", log_to_driver=False, include_dashboard=False, logging_level=logging.WARNING)
    try:
        _run_on_cluster(job, numbers, progress, engine, ray)
    finally:
        if started:
            ray.shutdown()


def _run_on_cluster(job: AnnotationJob, numbers: Sequence[int], progress: Progress, engine: Engine, ray: Any) -> None:
    resources = ray.cluster_resources()
    gpus = engine.gpus_per_actor
    if gpus is None:
        gpus = 1.0 if resources.get("GPU", 0) >= 1 else 0.0
    actors = engine.actors or (max(1, int(resources.get("GPU", 0) / gpus)) if gpus else 1)
    free = resources.get("CPU", 0) - actors * engine.cpus_per_actor
    if free < READING_CPUS:
        raise ValueError(
            f"{actors} actors of {engine.cpus_per_actor} CPUs leave {free:g} of {resources.get('CPU', 0):g} for "
            "reading: lower --actors or --cpus-per-actor"
        )
    if actors * gpus > resources.get("GPU", 0):
        raise ValueError(f"{actors} actors of {gpus:g} GPUs need more than the cluster's {resources.get('GPU', 0):g}")
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    packed = pickle.dumps(job)
    blocks = min(len(numbers), MOST_BLOCKS)
    parts = ray.data.from_items([{"part": number} for number in numbers], override_num_blocks=blocks)
    readers = ray.data.TaskPoolStrategy(size=max(1, int(free)))
    read = parts.map(read_row, fn_kwargs={"job": packed}, num_cpus=READING_CPUS, compute=readers)
    done = read.map_batches(
        CaptioningActor,
        batch_size=1,
        zero_copy_batch=True,
        compute=ray.data.ActorPoolStrategy(size=actors),
        fn_constructor_kwargs={"job": packed, "cpus": engine.cpus_per_actor},
        num_cpus=engine.cpus_per_actor,
        num_gpus=gpus or None,
    )
    for row in done.iter_rows():
        progress.add({name: int(value) for name, value in row.items()})
