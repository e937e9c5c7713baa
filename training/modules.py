"""What trains: frozen and trained parts, a learning rate for each, low-rank adapters on the language model."""

from collections.abc import Collection
from typing import Any

from torch import nn

from perceptiondlm.modeling_perceptiondlm import PerceptionDLMForConditionalGeneration
from perceptiondlm.training.config import FITTED, PARTS, LoraConfig, TrainConfig
from perceptiondlm.training.recomputation import peft_asking


ADAPTER_PREFIX = "base_model.model."  # of every parameter of a model with adapters


def part_of(name: str) -> str:
    """The part of `PARTS`, or `"namer"`, that a parameter belongs to, whether the model has adapters or not."""
    name = name.removeprefix(ADAPTER_PREFIX)
    if name.startswith(FITTED):
        return "namer"
    return next(part for part, prefixes in PARTS.items() if name.startswith(prefixes))


def prepare_parts(model: PerceptionDLMForConditionalGeneration, config: TrainConfig) -> nn.Module:
    """Freeze what `config.parts` leaves out, and put adapters on the language model if wanted.

    Parameters that the model never uses stay frozen in any case. What trains is held in fp32.

    Returns:
        the model, or the `peft.PeftModel` around it.
    """
    missing = sorted(set(config.parts) - {part_of(name) for name, _ in model.named_parameters()} - {"regions"})
    if missing:
        raise ValueError(f"train.parts names {missing}, which this model does not have")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and part_of(name) in config.parts)
    adapted = PARTS["language_model"] if config.lora else ()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not name.startswith(adapted):
            parameter.data = parameter.data.float()
    return model if config.lora is None else add_adapters(model, config.lora)


def add_adapters(model: PerceptionDLMForConditionalGeneration, config: LoraConfig) -> nn.Module:
    """Low-rank adapters on the language model; other parts that train are trained whole and saved with the adapters."""
    import peft  # of the extra `training`, which planning without adapters does not need

    language = PARTS["language_model"]
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    whole = {name.split(".")[0] for name in trained if not name.startswith(language)}
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=config.target_modules,
        modules_to_save=sorted(whole) or None,
    )
    with peft_asking():
        return peft.get_peft_model(model, settings)


def plain_model(model: Any) -> PerceptionDLMForConditionalGeneration:
    """The model itself, adapters in place."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def parameter_groups(
    model: nn.Module, decayed: Collection[str], weight_decay: float, rates: dict[str, float], rate: float
) -> list[dict[str, Any]]:
    """Groups for the optimizer: every trained parameter once, with its part's learning rate and its weight decay.

    Args:
        decayed: names of the parameters that decay (not biases, not norms).
        rates: learning rates of single parts; `rate` is that of the others.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = (rates.get(part_of(name), rate), weight_decay if name in decayed else 0.0)
            groups.setdefault(key, []).append(parameter)
    return [{"params": params, "lr": lr, "weight_decay": decay} for (lr, decay), params in groups.items()]


def count_parameters(model: nn.Module) -> dict[str, dict[str, int]]:
    """Parameters of every part: `{"projector": {"total": …, "trained": …}, …}`."""
    counts = {part: {"total": 0, "trained": 0} for part in PARTS}
    for name, parameter in model.named_parameters():
        if ".original_module." in name:  # the state before training, which adapters keep beside a part trained whole
            continue
        counts.setdefault(part_of(name), {"total": 0, "trained": 0})
        counts[part_of(name)]["total"] += num_weights(parameter)
        counts[part_of(name)]["trained"] += num_weights(parameter) * parameter.requires_grad
    return counts


def num_weights(parameter: nn.Parameter) -> int:
    """Weights in a parameter: bitsandbytes packs two of 4 bits into a byte, ZeRO-3 leaves its share alone in place."""
    state = getattr(parameter, "quant_state", None)
    return getattr(parameter, "ds_numel", None) or (parameter.numel() if state is None else state.shape.numel())
