"""Processes that prepare data together: who sees the same folder, and waiting without a deadline."""

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch.distributed as dist


PATIENCE = timedelta(days=30)  # a process that dies is noticed at once all the same


@functools.cache
def _patient_group() -> dist.ProcessGroup:
    """All processes, in a group whose collectives may take as long as a look through the data does."""
    return dist.new_group(backend="gloo", timeout=PATIENCE)


def of_everyone(value: Any) -> list[Any]:
    """A small object of every process, in the order of ranks. All processes must call this."""
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=_patient_group())
    return values


@dataclass
class Peers:
    """The processes of a run that see the same folder: this one's number among them, and how many they are."""

    rank: int = 0
    count: int = 1

    @classmethod
    def find(cls, folder: Path) -> "Peers":
        """The peers of this process. Machines that share no folder form groups of their own."""
        folder.mkdir(parents=True, exist_ok=True)
        token = folder / f".here-{uuid4().hex}"
        token.touch()
        try:
            names = of_everyone(token.name)
            visible = [name for name in names if (folder / name).exists()]
            of_everyone(None)
        finally:
            token.unlink(missing_ok=True)
        return cls(visible.index(token.name), len(visible))

    @contextmanager
    def leader_first(self) -> Iterator[None]:
        """The first of the peers does the block before the others. All processes of the run must come here."""
        if self.rank > 0:
            of_everyone(None)
        yield
        if self.rank == 0:
            of_everyone(None)


def local_cores() -> int:
    """Cores for each of the processes that run on this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
