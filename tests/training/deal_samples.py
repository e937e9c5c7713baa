"""Run under `accelerate launch`: which samples every process sees, as the Trainer's data loader deals them out.

    accelerate launch --multi_gpu --num_processes 2 tests/training/deal_samples.py FOLDER

Writes `FOLDER/RANK.json`: per epoch the batches of this process, the last epoch continued after two skipped batches.
"""

import json
import sys
from pathlib import Path

from accelerate import Accelerator, skip_first_batches
from torch.utils.data import DataLoader, Dataset

from perceptiondlm.training.data.batches import LengthGroupedBatches


class Numbers(Dataset):
    """Samples that are their own number, of lengths 1 to 10."""

    def __init__(self, count: int):
        self.lengths, self.epoch = [1 + i % 10 for i in range(count)], 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> tuple[int, int]:
        return self.epoch, index


def main(folder: Path) -> None:
    accelerator = Accelerator(cpu=True)
    dataset = Numbers(23)
    order = LengthGroupedBatches(dataset, 4, seed=0, world_size=accelerator.num_processes, pool=2)
    loader = accelerator.prepare(DataLoader(dataset, 4, sampler=order, collate_fn=list, num_workers=1))
    seen = []
    for epoch in range(3):
        part = skip_first_batches(loader, 2) if epoch == 2 else loader
        part.set_epoch(epoch)
        seen.append(list(part))
    Path(folder, f"{accelerator.process_index}.json").write_text(json.dumps([accelerator.num_processes, seen]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
