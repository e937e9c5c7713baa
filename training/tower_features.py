"""Features of a frozen vision tower: computed once per picture, kept on disk, thinned at random while training.

A tower that does not train gives the same features for the same tile in every epoch. `reuse_features` puts a store in
front of it, so that an epoch after the first costs no vision pass. Tiles are known by their content, so that nothing
else of a run needs to know: the same tile of another run, source or place in the mixture is found as well.

A store is two files per side of tile in a folder named by the tower's weights: features one after the other, and their
keys, written after them. What a killed run leaves half written is not counted, and written over.
"""

import os
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import nn
from torch.nn import functional as F


KEY_BYTES = 16
STORED = torch.float16


class FeatureStore:
    """Features (P, C) in fp16 by the content of their tile, appended to and read from disk.

    Args:
        path: of the two files, without suffix.
        shape: (P, C).
        limit: bytes of features from which on nothing is added.
    """

    def __init__(self, path: Path, shape: tuple[int, int], limit: int):
        self.shape, self.size = shape, shape[0] * shape[1] * STORED.itemsize
        self.limit = limit
        path.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT
        self.features, self.index = (os.open(path.with_suffix(s), flags, 0o644) for s in (".features", ".keys"))
        keys = os.pread(self.index, os.fstat(self.index).st_size, 0)
        whole = min(len(keys) // KEY_BYTES, os.fstat(self.features).st_size // self.size)
        self.places = {keys[i * KEY_BYTES : (i + 1) * KEY_BYTES]: i for i in range(whole)}
        self.count = whole

    def get(self, key: bytes) -> torch.Tensor | None:
        """Features (P, C) of a tile in fp32, or None for one never seen."""
        place = self.places.get(key)
        if place is None:
            return None
        content = os.pread(self.features, self.size, place * self.size)
        return torch.frombuffer(bytearray(content), dtype=STORED).view(self.shape).float()

    def put(self, key: bytes, features_PC: torch.Tensor) -> None:
        """Add a tile's features, while there is room."""
        if key in self.places or (self.count + 1) * self.size > self.limit:
            return
        os.pwrite(self.features, features_PC.contiguous().numpy().tobytes(), self.count * self.size)
        os.pwrite(self.index, key, self.count * KEY_BYTES)
        self.places[key] = self.count
        self.count += 1


class FrozenTower:
    """Stands in for the `forward` of a frozen tower.

    Args:
        tower: any of vision_perceptiondlm's.
        folder: of the stores, or None to compute every time.
        limit: bytes of each store.
        dropout: share in [0, 1) of the channels of a tile's features dropped in training mode, the same ones at
            every patch, so that no single feature is leant on.
    """

    def __init__(self, tower: nn.Module, folder: Path | None, limit: int, dropout: float):
        self.tower, self.compute, self.limit, self.dropout = tower, tower.forward, limit, dropout
        self.folder = None if folder is None else folder / fingerprint(tower)
        self.stores: dict[int, FeatureStore] = {}

    def __call__(
        self, pixel_values: torch.Tensor, feature_layer: int = -1, patch_addend: torch.Tensor | None = None
    ) -> torch.Tensor:
        """As the tower's forward: (T, 3, H, W) in [-1, 1] to (T, P * P, C)."""
        if self.folder is None or patch_addend is not None or not len(pixel_values):
            features_TPC = self.compute(pixel_values, feature_layer, patch_addend)
        else:
            features_TPC = self.stored(pixel_values, feature_layer)
        if self.dropout and self.tower.training:
            kept = F.dropout(torch.ones_like(features_TPC[:, :1]), self.dropout)
            features_TPC = features_TPC * kept
        return features_TPC

    @torch.no_grad()
    def stored(self, tiles_T3HW: torch.Tensor, feature_layer: int) -> torch.Tensor:
        """Features (T, P, C) of tiles, as they are stored; those never seen are computed in one pass."""
        store, keys = self._store(tiles_T3HW.shape[-1], feature_layer), [content_key(t) for t in tiles_T3HW.cpu()]
        known = {key: store.get(key) for key in set(keys)}
        found = {key: features_PC for key, features_PC in known.items() if features_PC is not None}
        missing = {key: place for place, key in enumerate(keys) if key not in found}
        if missing:
            fresh = self.compute(tiles_T3HW[list(missing.values())], feature_layer).to("cpu", STORED)
            for key, features_PC in zip(missing, fresh, strict=True):
                store.put(key, features_PC)
                found[key] = features_PC.float()  # as it would be read
        return torch.stack([found[key] for key in keys]).to(tiles_T3HW.device)

    def _store(self, side: int, feature_layer: int) -> FeatureStore:
        """The store for tiles of a side in pixels; every process has files of its own."""
        if side not in self.stores:
            assert self.folder is not None  # asked for where there is one
            config: Any = self.tower.config
            rank = os.environ.get("RANK", "0")
            shape = ((side // config.patch_size) ** 2, config.hidden_size)
            self.stores[side] = FeatureStore(self.folder / f"{side}px-layer{feature_layer}-{rank}", shape, self.limit)
        return self.stores[side]


def reuse_features(model: Any, folder: str | None, gib: float, dropout: float) -> None:
    """Let a model's frozen tower keep its features, or thin them, or both; the state dict stays as it is.

    Raises:
        ValueError: if the tower trains, or regions enter it (`region_conditioning="vision"`).
    """
    if folder is None and not dropout:
        return
    if any(parameter.requires_grad for parameter in model.vision_tower.parameters()):
        raise ValueError(
            "train.tower_features and tower_dropout are for a frozen tower: take 'vision_tower' out of train.parts"
        )
    if folder is not None and model.config.region_conditioning == "vision":
        raise ValueError("train.tower_features: under region_conditioning='vision' features depend on the regions")
    place = None if folder is None else Path(folder)
    model.vision_tower.forward = FrozenTower(model.vision_tower, place, int(gib * 2**30), dropout)


def content_key(tile: torch.Tensor) -> bytes:
    """What a tile is known by: a hash of its content."""
    return xxhash.xxh3_128_digest(bytes_of(tile))


def fingerprint(tower: nn.Module) -> str:
    """What a tower's weights are known by, as a folder's name."""
    digest = xxhash.xxh3_128()
    for name, tensor in sorted(tower.state_dict().items()):
        digest.update(name.encode())
        digest.update(bytes_of(tensor.detach().cpu().float()))
    return digest.hexdigest()[:16]


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """A CPU tensor's content in order, uncopied where it is contiguous."""
    return tensor.contiguous().numpy().data
