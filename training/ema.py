"""A moving average of the weights, kept beside them and saved with every checkpoint."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import TrainerCallback


FILE = "moving_average.safetensors"
WRAPPER = "_checkpoint_wrapped_module."  # in names of layers that FSDP checkpoints


class MovingAverage(TrainerCallback):
    """Exponential moving average of the trained weights in fp32, updated after every optimizer step.

    Under FSDP2 a process averages its own slices; the file holds whole weights, for any number of processes.

    Args:
        model: whose trained parameters are followed, from `start` on.
        decay: per step, in (0, 1); the first steps use less, (1 + step) / (10 + step), to forget the start.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model, self.decay = model, decay
        self.weights: dict[str, nn.Parameter] = {}
        self.average: dict[str, torch.Tensor] = {}

    def start(self) -> None:
        """Begin with the weights of now: those that the optimizer changes, which FSDP2 has put in place by then."""
        if not self.weights:
            named = self.model.named_parameters()
            self.weights = {name.replace(WRAPPER, ""): p for name, p in named if p.requires_grad}
            self.average = {name: weight.detach().float().clone() for name, weight in self.weights.items()}

    def on_train_begin(self, args, state, control, **kwargs):
        """Begin, unless a checkpoint has been read."""
        self.start()

    @torch.no_grad()
    def on_optimizer_step(self, args, state, control, **kwargs):
        """Move towards the new weights."""
        decay = min(self.decay, (1 + state.global_step) / (10 + state.global_step))
        for name, weight in self.weights.items():
            self.average[name].lerp_(weight.float(), 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model has the averaged weights inside this context."""
        own = {name: weight.detach().clone() for name, weight in self.weights.items()}
        self._set(self.average)
        try:
            yield
        finally:
            self._set(own)

    def use(self) -> None:
        """Give the model the averaged weights for good."""
        self._set(self.average)

    @torch.no_grad()
    def _set(self, values: dict[str, torch.Tensor]) -> None:
        for name, weight in self.weights.items():
            weight.copy_(values[name])

    def save(self, folder: str | Path, write: bool = True) -> None:
        """Write the averages into a checkpoint; all processes must call this, and one writes."""
        whole = {}
        for name, value in self.average.items():
            full = value.full_tensor() if isinstance(value, DTensor) else value
            if write:
                whole[name] = full.cpu()
        if write:
            save_file(whole, Path(folder) / FILE)

    def load(self, folder: str | Path) -> None:
        """Read them back; raises `FileNotFoundError` if the checkpoint has none."""
        path = Path(folder) / FILE
        if not path.is_file():
            raise FileNotFoundError(f"{folder} has no moving average ({FILE}): it was trained without train.ema_decay")
        self.start()
        for name, value in load_file(path).items():
            average = self.average[name]
            if isinstance(average, DTensor):
                value = distribute_tensor(value.to(average.device), average.device_mesh, average.placements)
            average.copy_(value)
