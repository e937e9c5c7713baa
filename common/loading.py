"""What the subcommands share: which model, on which device, with which generate settings."""

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import Pipeline, TorchAoConfig, pipeline
from transformers.utils import is_torchao_available
from transformers.utils import logging as transformers_logging


REPOSITORY = Path(__file__).resolve().parents[1]
MODEL_FILES = (".safetensors", ".json", ".jinja", ".bin")
SETTINGS: dict[str, type] = {
    "preset": str, "steps": int, "max_new_tokens": int, "block_length": int, "sampler": str, "threshold": float,
    "entropy_bound": float, "temperature": float, "top_k": int, "top_p": float, "seed": int,
}  # fmt: skip

# Weights of linear layers in fewer bits (the head and the embeddings stay): names and torchao's configurations.
QUANTIZATIONS = {"int8": "Int8WeightOnlyConfig", "fp8": "Float8WeightOnlyConfig"}


def add_model_arguments(parser: argparse.ArgumentParser, seed: bool = True) -> None:
    """`--model`, `--device`, `--dtype` and the generate settings."""
    parser.add_argument("--model", help="directory or Hub id; by default the model embedded in the repository")
    parser.add_argument("--device", help="such as cuda:0; by default an accelerator if there is one")
    parser.add_argument("--dtype", default="auto", help="such as bfloat16; by default the checkpoint's")
    parser.add_argument("--quantize", choices=tuple(QUANTIZATIONS), help="weight-only quantisation; needs torchao")
    for name, kind in SETTINGS.items():
        if name == "seed" and not seed:
            continue
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, help="see PerceptionDLMGenerationConfig")


def generate_settings(options: argparse.Namespace, leave_out: tuple[str, ...] = ()) -> dict[str, Any]:
    """The generate settings that were given."""
    values = {name: getattr(options, name, None) for name in SETTINGS if name not in leave_out}
    return {name: value for name, value in values.items() if value is not None}


def model_path(model: str | None) -> str:
    """Folder or Hub id of the model that `--model` names, by default the one embedded in the repository.

    Raises:
        ValueError: for a folder that holds no model.
    """
    if model is None:
        if not (REPOSITORY / "config.json").is_file():
            raise ValueError(
                "the installed package carries no model (a clone of the repository does): name one, such as --model "
                "PATH/TO/CLONE, a folder made by perceptiondlm convert, or a Hub id"
            )
        return str(REPOSITORY)
    if Path(model).exists() and not (Path(model) / "config.json").is_file():
        raise ValueError(f"--model {model} is not a model directory: it has no config.json")
    return model


def model_state(model: str | None) -> list[Any]:
    """What identifies a model: its name, and of a folder also sizes and times of its files."""
    folder = Path(model) if model is not None else REPOSITORY
    if not folder.is_dir():
        return [model]
    files = sorted(path for path in folder.iterdir() if path.suffix in MODEL_FILES and path.is_file())
    return [str(folder.resolve()), *((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files)]


def load_pipeline(options: argparse.Namespace) -> Pipeline:
    """The region-captioning pipeline of the chosen model."""
    model = model_path(options.model)
    dtype = options.dtype if options.dtype == "auto" else torch_dtype(options.dtype)
    transformers_logging.disable_progress_bar()
    device = None if options.device is None else torch_device(options.device)
    kwargs: dict[str, Any] = {"trust_remote_code": True, "device": device, "dtype": dtype}
    if options.quantize:
        kwargs["model_kwargs"] = {"quantization_config": quantization(options.quantize)}
    return pipeline("region-captioning", model=model, **kwargs)


def quantization(name: str) -> TorchAoConfig:
    """What `from_pretrained(quantization_config=...)` takes, for one of `QUANTIZATIONS`."""
    if not is_torchao_available():
        raise ValueError(f"--quantize {name} needs torchao: pip install 'perceptiondlm[quantization]'")
    from torchao import quantization as torchao

    return TorchAoConfig(getattr(torchao, QUANTIZATIONS[name])())


def torch_dtype(name: str) -> torch.dtype:
    """The dtype of `--dtype`."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"--dtype must be a torch dtype such as float32 or bfloat16, got {name!r}")
    return dtype


def torch_device(name: str) -> torch.device:
    """A device of this machine by its name."""
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # an unknown name; a torch that was built without it
        raise ValueError(
            f"--device must be one of this machine such as cpu or cuda:0, got {name!r}: {error}"
        ) from error
