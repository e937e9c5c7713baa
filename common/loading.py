"""What the subcommands share: which model, on which device, with which generate settings."""

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, Pipeline, TorchAoConfig, pipeline
from transformers.utils import is_torchao_available
from transformers.utils import logging as transformers_logging


REPOSITORY = Path(__file__).resolve().parents[1]
MODEL_FILES = (".safetensors", ".json", ".jinja", ".bin")
DRAWN_MODEL = REPOSITORY / "drawn" / "model"  # the second embedded model, which speaks of the drawn world alone
CODE = "modeling_perceptiondlm.py"  # where it lies, a folder is a repository
SETTINGS: dict[str, type] = {
    "preset": str, "steps": int, "max_new_tokens": int, "block_length": int, "sampler": str, "threshold": float,
    "entropy_bound": float, "naming_threshold": float, "temperature": float, "top_k": int, "top_p": float, "seed": int,
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


def model_path(model: str | None, default: Path = REPOSITORY) -> str:
    """Folder or Hub id of the model that `--model` names, `default` without one.

    Raises:
        ValueError: for a folder that holds no model.
    """
    if model is None:
        if not (default / "config.json").is_file():
            raise ValueError(
                "the installed package carries no model (a clone of the repository does): name one, such as --model "
                "PATH/TO/CLONE, a folder made by perceptiondlm convert, or a Hub id"
            )
        return str(default)
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


def load_pipeline(options: argparse.Namespace, default: Path | None = None) -> Pipeline:
    """The region-captioning pipeline of the chosen model; without one of `default`, or of the repository's own."""
    model = model_path(options.model, default or REPOSITORY)
    dtype = options.dtype if options.dtype == "auto" else torch_dtype(options.dtype)
    transformers_logging.disable_progress_bar()
    device = None if options.device is None else torch_device(options.device)
    kwargs = {"quantization_config": quantization(options.quantize)} if options.quantize else {}
    loaded = from_checkpoint(AutoModelForImageTextToText, model, dtype=dtype, **kwargs)
    processor = from_checkpoint(AutoProcessor, model)
    return pipeline("region-captioning", model=loaded, processor=processor, trust_remote_code=True, device=device)


def from_checkpoint(auto_class: Any, model: str | Path, **kwargs: Any) -> Any:
    """`auto_class.from_pretrained` with its code trusted, for a checkpoint that need not hold the code.

    Args:
        model: directory or Hub id. A directory without code inside a repository that has it, such as `drawn/model`, is
            read as that repository's subfolder, as on the Hub.
    """
    folder = Path(model).resolve()
    if (folder / "config.json").is_file() and not (folder / CODE).is_file():
        for parent in folder.parents:
            if (parent / CODE).is_file():
                model, kwargs = parent, {**kwargs, "subfolder": str(folder.relative_to(parent))}
                break
    return auto_class.from_pretrained(str(model), trust_remote_code=True, **kwargs)


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
