"""A moving average of the weights, kept beside them and saved with every checkpoint."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback


FILE = "moving_average.safetensors"


class MovingAverage(TrainerCallback):
    """Exponential moving average of the trained weights in fp32, updated after every optimizer step.

    Args:
        model: whose trained parameters are followed.
        decay: per step, in (0, 1); the first steps use less, (1 + step) / (10 + step), to forget the start.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.average = {name: weight.detach().float().clone() for name, weight in self.weights.items()}

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

    def save(self, folder: str | Path) -> None:
        """Write the averages into a checkpoint."""
        save_file(self.average, Path(folder) / FILE)

    def load(self, folder: str | Path) -> None:
        """Read them back; raises `FileNotFoundError` if the checkpoint has none."""
        path = Path(folder) / FILE
        if not path.is_file():
            raise FileNotFoundError(f"{folder} has no moving average ({FILE}): it was trained without train.ema_decay")
        for name, value in load_file(path).items():
            self.average[name].copy_(value)
