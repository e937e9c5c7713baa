"""Samples on their way to the model: one by one in their order, the next ones read ahead in threads."""

import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from torch.utils.data import Dataset, IterableDataset


BAD_SAMPLE = (ValueError, TypeError, OSError)  # what reading and preparing a bad sample raises


def checked_count(name: str, given: Any, default: Any, least: int) -> int:
    """The number given or the default, refused unless it is an integer of at least `least`."""
    value = next((value for value in (given, default) if value is not None), least)
    if type(value) is not int or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
    return value


def each(samples: Any, skip: bool) -> Iterator[Any]:
    """The samples, one by one. A sequence ends at its length; with `skip` a place that cannot be read is its error."""
    indexed = hasattr(samples, "__getitem__") and hasattr(samples, "__len__")
    if not indexed or isinstance(samples, IterableDataset):
        yield from samples
    elif isinstance(samples, (Sequence, Dataset)) or hasattr(samples, "column_names"):
        for index in range(len(samples)):
            try:
                sample = samples[index]
            except BAD_SAMPLE as error:
                if not skip:
                    raise
                sample = error
            yield sample
    else:
        yield from itertools.islice(iter(samples), len(samples))


def ahead_of(items: Iterable[Any], work: Any, workers: int, ahead: int) -> Iterator[Any]:
    """The results of `work` on every item, in order; with workers, those of the next items are made beside."""
    if not workers:
        yield from map(work, items)
        return
    waiting: deque = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def named(error: Exception, number: int | None) -> Exception:
    """The error with the number of its sample, counted from the start of the run."""
    if number is None:
        return error
    kinds = (FileNotFoundError, OSError, TypeError, ValueError)
    named = next(kind for kind in kinds if isinstance(error, kind))(f"sample {number}: {error}")
    named.__cause__ = error
    return named
