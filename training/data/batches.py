"""The order in which a run reads its samples: batches of similar length, the same for any number of processes."""

import random
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch.utils.data import Sampler


POOL = 50  # batches that are sorted together when they are grouped by length


class SizedSamples(Protocol):
    """A dataset in random access that knows its samples' lengths and its epoch, such as `MixtureDataset`."""

    lengths: Sequence[int]
    epoch: int

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
        batches = grouped_batches(self.dataset.lengths, self.batch_size, self.pool, dice)
        order = [index for batch in batches for index in batch]
        return iter(order + [~order[k % len(order)] for k in range(len(self) - len(order))])


def grouped_batches(lengths: Sequence[int], batch_size: int, pool: int, seed: int) -> list[list[int]]:
    """Indices of all samples in batches of similar length, in random order; a short batch comes last."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(lengths), generator=generator).tolist()
    size = pool * batch_size
    batches = []
    for start in range(0, len(order), size):
        together = order[start : start + size]
        if pool > 1:
            together.sort(key=lambda index: lengths[index])
        batches += [together[i : i + batch_size] for i in range(0, len(together), batch_size)]
    full = [batch for batch in batches if len(batch) == batch_size]
    short = [batch for batch in batches if len(batch) < batch_size]
    return [full[i] for i in torch.randperm(len(full), generator=generator).tolist()] + short


def padding_share(lengths: Sequence[int], batches: Sequence[Sequence[int]]) -> float:
    """Share of a padded batch's tokens that are padding, over all batches, in [0, 1)."""
    used = sum(lengths[index] for batch in batches for index in batch)
    taken = sum(len(batch) * max(lengths[index] for index in batch) for batch in batches)
    return 1 - used / taken


def padding_report(dataset: SizedSamples, batch_size: int, seed: int, pool: int = POOL) -> dict[str, float]:
    """Padding share of an epoch with and without length grouping, for a run's summary."""
    return {
        name: padding_share(dataset.lengths, grouped_batches(dataset.lengths, batch_size, size, seed))
        for name, size in (("padding_share_grouped", pool), ("padding_share_shuffled", 1))
    }
