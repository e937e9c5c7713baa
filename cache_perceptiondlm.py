"""Keys and values that are computed once: prefixes that never change, images encoded for later, packed rows.

Legend: see sequence_perceptiondlm.
"""

import hashlib
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

import torch


MAX_PREFIXES = 8  # questions that an encoded image remembers
FINGERPRINT_SAMPLES = 8  # numbers that are looked at in every weight


class KeyValues:
    """Keys and values (sequences, h, length, d) of some tokens in every layer, each where its layer is."""

    def __init__(self, num_layers: int):
        self.layers: list[tuple[torch.Tensor, torch.Tensor]] = [()] * num_layers  # type: ignore[list-item]

    def put(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Keep what a layer computed."""
        self.layers[layer] = (key, value)

    @property
    def num_bytes(self) -> int:
        """Memory of all tensors."""
        return sum(tensor.nbytes for pair in self.layers for tensor in pair)


class PackedCache:
    """Keys and values of packed rows, in place: a pass writes its own behind them, `keep` makes those part of them.

    Args:
        num_layers: of the language model.
        capacity: tokens of the prompt and of the longest pass after it.
    """

    def __init__(self, num_layers: int, capacity: int):
        self.capacity, self.length = capacity, 0
        self.buffers: list[tuple[torch.Tensor, torch.Tensor] | None] = [None] * num_layers

    def update(self, key: torch.Tensor, value: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Store (B, h, X, d) keys and values of a layer and return all it may attend to."""
        pair = self.buffers[layer]
        if pair is None:
            shape = (*key.shape[:2], self.capacity, key.shape[3])
            pair = self.buffers[layer] = (key.new_empty(shape), value.new_empty(shape))
        end = self.length + key.shape[2]
        for buffer, new in zip(pair, (key, value), strict=True):
            buffer[:, :, self.length : end] = new
        return pair[0][:, :, :end], pair[1][:, :, :end]

    def keep(self, num_tokens: int) -> None:
        """Add the first tokens of the last pass to what is kept."""
        self.length += num_tokens


@dataclass
class EncodedImage:
    """An image encoded once, to be captioned as often as wanted (made by `encode_image`).

    It stands for the image in the processor and in the pipeline. What was computed for a question's shared tokens
    (system turn, image, question) is kept, too, so that further regions cost only their own tokens. The weights that
    made it are remembered, and other ones refused.

    Args:
        tiles: (T, n, n, D) image tokens.
        tile_grids: (1, 2) columns and rows; image_sizes: (1, 2) height and width in pixels.
        made_by: fingerprint of the weights, see `weights_fingerprint`; None where nobody is to check them.
        picture: the PIL image, for regions whose crops or colours enter the model.
        max_prefixes: questions that are remembered; the one that was not asked for longest leaves first.
        prefixes: keys and values of the shared tokens, by those tokens' ids.
    """

    tiles: torch.Tensor
    tile_grids: torch.Tensor
    image_sizes: torch.Tensor
    made_by: str | None = None
    picture: Any = None
    max_prefixes: int = MAX_PREFIXES
    prefixes: OrderedDict[tuple[int, ...], KeyValues] = field(default_factory=OrderedDict)

    def prefix(self, ids: tuple[int, ...]) -> KeyValues | None:
        """The keys and values of these shared tokens, if they are remembered."""
        if ids in self.prefixes:
            self.prefixes.move_to_end(ids)
        return self.prefixes.get(ids)

    def remember(self, ids: tuple[int, ...], prefix: KeyValues) -> None:
        """Keep the keys and values of shared tokens within the bound."""
        self.prefixes[ids] = prefix
        while len(self.prefixes) > self.max_prefixes:
            self.prefixes.popitem(last=False)

    @property
    def num_bytes(self) -> int:
        """Memory held: `tiles`, and 2 * layers * shared tokens * width for every question remembered."""
        return self.tiles.nbytes + sum(prefix.num_bytes for prefix in self.prefixes.values())


def weights_fingerprint(model: torch.nn.Module) -> str:
    """Tells weights apart: dtype, device and a few numbers of every weight, hashed. Offloaded weights count by name."""
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype} {weight.device}".encode())
        if weight.device.type != "meta" and weight.numel():
            places = torch.arange(FINGERPRINT_SAMPLES) * (weight.numel() - 1) // (FINGERPRINT_SAMPLES - 1)
            places = places.to(weight.device)
            samples = weight.detach().reshape(-1)[places]
            digest.update(samples.float().cpu().numpy().tobytes())
    return digest.hexdigest()
