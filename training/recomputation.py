"""Activations computed again in the backward pass, under the names of the installed transformers.

Releases before 5.24 call this gradient checkpointing, later ones activation checkpointing; version 6 drops the former
name. A run's settings may use either, and hold the former.
"""

import contextlib
import dataclasses
import warnings
from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedModel, TrainingArguments


NEWER_NAMES = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}


def settled(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of the trainer with the former names; both names with different values are a `ValueError`."""
    found = dict(settings)
    for former, newer in NEWER_NAMES.items():
        if newer in found:
            value = found.pop(newer)
            if found.setdefault(former, value) != value:
                raise ValueError(
                    f"trainer.{former}={found[former]} and trainer.{newer}={value} are one setting: give one of them"
                )
    return found


def declared(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of the trainer with the names that the installed `TrainingArguments` prefers."""
    known = {item.name for item in dataclasses.fields(TrainingArguments)}
    names = {former: newer for former, newer in NEWER_NAMES.items() if newer in known}
    return {names.get(name, name): value for name, value in settings.items()}


@contextlib.contextmanager
def peft_asking() -> Iterator[None]:
    """Where peft wraps a model: it asks for a property by the former name, which is no fault of the caller's."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


def recompute_activations(model: PreTrainedModel) -> None:
    """Keep only the inputs of layers for the backward pass."""
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable()
    else:
        model.gradient_checkpointing_enable()


def recomputation_kwargs(arguments: TrainingArguments) -> dict[str, Any]:
    """Keyword arguments of `torch.utils.checkpoint.checkpoint` that a run sets."""
    name = "activation_checkpointing_kwargs"
    return getattr(arguments, name if hasattr(arguments, name) else "gradient_checkpointing_kwargs") or {}
