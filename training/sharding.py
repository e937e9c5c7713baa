"""Weights that are spread over processes (FSDP2, ZeRO): what has to be different about them.

FSDP2   each process holds a slice of every parameter, a DTensor; layers are put together while they run
ZeRO-2  whole bf16 weights everywhere; gradients, fp32 weights and moments are spread
ZeRO-3  weights are spread, too
"""

import dataclasses
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy


def exact_policy(policy: MixedPrecisionPolicy | None) -> MixedPrecisionPolicy:
    """A mixed precision that leaves inputs and outputs of the model alone and adds gradients up in fp32.

    What accelerate asks for casts both: the loss would be rounded to bf16. Layers run in bf16 by autocast and because
    their weights are.
    """
    policy = policy or MixedPrecisionPolicy()
    reduced = torch.float32 if policy.reduce_dtype is not None else None
    return dataclasses.replace(policy, reduce_dtype=reduced, output_dtype=None, cast_forward_inputs=False)


def sharding_asked() -> str | None:
    """What the launcher asks accelerate for: "FSDP", "DEEPSPEED" or None."""
    names = ("FSDP", "DEEPSPEED")
    return next((name for name in names if os.environ.get(f"ACCELERATE_USE_{name}", "").lower() == "true"), None)


def refuse_sharding_on_cpu(use_cpu: bool) -> None:
    """Raise `ValueError` where FSDP or DeepSpeed is asked for and accelerate would silently train whole weights."""
    if use_cpu and (asked := sharding_asked()):
        raise ValueError(
            f"{asked} does not run with trainer.use_cpu=true: accelerate would train whole weights on every process. "
            "On CPUs, launch with training/accelerate/two_cpu_processes.yaml"
        )


@contextmanager
def whole_weights(model: nn.Module, reshard: bool = True) -> Iterator[None]:
    """Every process has an FSDP2 model's whole weights inside this context, so that any method of it may read them.

    ZeRO-3 fetches the weights of a layer whenever it is called, by whatever method.

    Args:
        reshard: whether layers of an FSDP2 model give up their weights after their forward pass in training.
    """
    shards = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in shards:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in shards:
            module.reshard()
            module.set_reshard_after_forward(reshard and module is not model, recurse=False)


@contextmanager
def own_class(model: nn.Module) -> Iterator[None]:
    """The model is of its own class inside this context: FSDP2's, made on the way, would be saved with torch's code."""
    kind = type(model)
    if isinstance(model, FSDPModule):
        model.__class__ = kind.__mro__[2]  # FSDP…, FSDPModule, the class itself
    try:
        yield
    finally:
        model.__class__ = kind


def checkpoint_bytes(
    parameters: Iterable[nn.Parameter], kind: str, only_model: bool, adapters: bool, average: bool
) -> int:
    """Size of a checkpoint as the HF Trainer writes it, AdamW's two fp32 moments included.

    Args:
        kind: `""` (whole weights), `"fsdp"`, which keeps full weights in a second file beside model.safetensors, or
            `"deepspeed"`, whose engine saves its own 16-bit weights beside them, and fp32 copies of what trains.
        only_model: `trainer.save_only_model`.
        adapters: of the weights, only what trains is saved.
        average: a moving average of what trains is kept in fp32.
    """
    sizes = [(getattr(p, "ds_numel", p.numel()), p.element_size(), p.requires_grad) for p in parameters]
    weights = sum(count * size for count, size, trained in sizes if trained or not adapters)
    trained = sum(count for count, _, trained in sizes if trained)
    copies = {"": 0, "fsdp": weights, "deepspeed": weights + 4 * trained}[kind]
    state = 0 if only_model else 8 * trained + copies
    return weights + state + (4 * trained if average else 0)


class GradientGuard:
    """Notices a gradient that is no number before DeepSpeed's engine steps, which it does inside `backward`.

    Args:
        engine: DeepSpeed's, whose `step` is guarded.
        complain: called with the name and the value of what is no number; must raise.
    """

    def __init__(self, engine: Any, complain: Any):
        self.step, self.complain = engine.step, complain
        self.trained = [parameter for parameter in engine.module.parameters() if parameter.requires_grad]
        self.wrong = torch.zeros((), device=next(engine.module.parameters()).device)
        for parameter in self.trained:
            parameter.register_hook(self._look)
        engine.step = self._step

    def _look(self, gradient: torch.Tensor) -> None:
        self.wrong += (~torch.isfinite(gradient)).any()

    def _step(self, *args: Any, **kwargs: Any) -> Any:
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(self.wrong)  # all processes stop, or none does
        if self.wrong.item():
            self.complain("gradient", float("nan"))
        return self.step(*args, **kwargs)
