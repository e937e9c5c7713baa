"""The order in which a run reads its samples: batches of similar length, the same for any number of processes."""

import random
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from torch.utils.data import Sampler


POOL = 50  # batches that are sorted together when they are grouped by length


class SizedSamples(Protocol):
    """A dataset in random access that knows its samples' lengths and its epoch, such as `MixtureDataset`."""

    epoch: int

    @property
    def lengths(self) -> Sequence[int] | np.ndarray: ...

    def set_epoch(self, epoch: int) -> None: ...


class LengthGroupedBatches(Sampler[int]):
    """Indices in an order whose consecutive batches hold samples of similar length, batches themselves shuffled.

    Batch k of an epoch is the same for any number of processes; process r of n takes batches r, r + n, ... (accelerate
    deals them out). So that every process takes equally many steps and yet no sample is lost or seen twice, the last
    batches are filled with `~index` instead of `index`: samples that the dataset gives without anything to learn.

    Args:
        dataset: whose `lengths` (in any unit) are grouped by, and whose `epoch` with the seed decides the order.
        batch_size: samples of a batch on one process.
        seed: of the order.
        world_size: number of processes that share the batches.
        pool: batches that are sorted together; 1 gives a plain shuffle.
    """

    def __init__(self, dataset: SizedSamples, batch_size: int, seed: int, world_size: int = 1, pool: int = POOL):
        self.dataset, self.batch_size, self.seed = dataset, batch_size, seed
        self.world_size, self.pool = world_size, pool

    def __len__(self) -> int:
        step = self.batch_size * self.world_size if self.world_size > 1 else 1
        return -(-len(self.dataset.lengths) // step) * step

    def set_epoch(self, epoch: int) -> None:
        """Called before every epoch. The dataset keeps it: after resuming, accelerate reaches the dataset alone."""
        self.dataset.set_epoch(epoch)

    def __iter__(self) -> Iterator[int]:
        dice = random.Random(f"{self.seed}/{self.dataset.epoch}").getrandbits(62)
        order = grouped_order(self.dataset.lengths, self.batch_size, self.pool, dice)
        yield from map(int, order)
        yield from (~int(order[k % len(order)]) for k in range(len(self) - len(order)))


def grouped_order(lengths: Sequence[int] | np.ndarray, batch_size: int, pool: int, seed: int) -> np.ndarray:
    """Indices of all samples, int64, every `batch_size` of them of similar length, batches in random order.

    A short batch comes last.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(lengths), generator=generator).numpy()
    size = pool * batch_size
    if pool > 1:
        lengths = np.asarray(lengths)
        for start in range(0, len(order), size):
            together = order[start : start + size]
            together[:] = together[np.argsort(lengths[together], kind="stable")]
    full = order[: len(order) // batch_size * batch_size].reshape(-1, batch_size)
    full[:] = full[torch.randperm(len(full), generator=generator).numpy()]
    return order


def padding_share(lengths: Sequence[int] | np.ndarray, order: np.ndarray, batch_size: int) -> float:
    """Share of a padded batch's tokens that are padding, over all batches of an order, in [0, 1)."""
    sorted_lengths = np.asarray(lengths)[order]
    starts = np.arange(0, len(order), batch_size)
    sizes = np.diff(np.append(starts, len(order)))
    return 1 - float(sorted_lengths.sum() / (np.maximum.reduceat(sorted_lengths, starts) * sizes).sum())


def padding_report(dataset: SizedSamples, batch_size: int, seed: int, pool: int = POOL) -> dict[str, float]:
    """Padding share of an epoch with and without length grouping, for a run's summary."""
    lengths = dataset.lengths
    return {
        name: padding_share(lengths, grouped_order(lengths, batch_size, size, seed), batch_size)
        for name, size in (("padding_share_grouped", pool), ("padding_share_shuffled", 1))
    }
