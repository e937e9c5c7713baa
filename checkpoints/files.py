"""Reading and writing sharded safetensors checkpoints, one shard in memory at a time."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm

from perceptiondlm.checkpoints.folder import require_space
from perceptiondlm.common.json_files import read_json


SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: the shard's file name, its shape and its safetensors dtype, such as "BF16"."""

    shard: str
    shape: tuple[int, ...]
    dtype: str


class Checkpoint:
    """A directory of safetensors shards, checked when it is opened: no tensor is read.

    Args:
        folder: holds `model.safetensors`, or an index and its shards.
    Raises:
        FileNotFoundError: without weights in safetensors, or with a shard missing.
        ValueError: for a damaged shard, or an index that disagrees with the shards.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.tensors: dict[str, StoredTensor] = {}
        index = self._index()
        for shard in sorted(set(index.values())) if index is not None else [SINGLE]:
            self.tensors |= self._read_header(shard)
        if index is not None:
            self._check_index(index)

    def _index(self) -> dict[str, str] | None:
        path = self.folder / INDEX
        if path.is_file():
            return read_json(path)["weight_map"]
        if (self.folder / SINGLE).is_file():
            return None
        others = sorted(p.name for p in self.folder.glob("*") if p.suffix in (".bin", ".pt", ".pth", ".safetensors"))
        raise FileNotFoundError(
            f"{self.folder} has neither {SINGLE} nor {INDEX} (found: {others or 'no weights'}); accepted: safetensors "
            "only, pickled weights are not read"
        )

    def _read_header(self, shard: str) -> dict[str, StoredTensor]:
        path = self.folder / shard
        if not path.is_file():
            raise FileNotFoundError(f"shard {shard}, named in {INDEX}, is missing from {self.folder}")
        try:
            with safe_open(path, framework="pt") as file:
                slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
                return {
                    name: StoredTensor(shard, tuple(part.get_shape()), part.get_dtype())
                    for name, part in slices.items()
                }
        except SafetensorError as error:
            raise ValueError(f"shard {path} is damaged: {error}") from error

    def _check_index(self, index: dict[str, str]) -> None:
        absent = [name for name, shard in index.items() if getattr(self.tensors.get(name), "shard", None) != shard]
        if absent:
            raise ValueError(f"{INDEX} places {name_some(absent)} in shards that do not hold it")
        unlisted = sorted(set(self.tensors) - set(index))
        if unlisted:
            raise ValueError(f"the shards hold {name_some(unlisted)}, which {INDEX} does not list")

    def read(self, shard: str, names: list[str]) -> dict[str, torch.Tensor]:
        """Tensors of one shard, mapped from the file."""
        try:
            with safe_open(self.folder / shard, framework="pt") as file:
                return {name: file.get_tensor(name) for name in names}
        except SafetensorError as error:
            raise ValueError(f"shard {self.folder / shard} is damaged: {error}") from error


@dataclass
class Part:
    """One shard to write: how to make its tensors, and how many bytes they take."""

    make: Callable[[], dict[str, torch.Tensor]]
    num_bytes: int


def write_shards(folder: Path, parts: list[Part]) -> None:
    """Write parts one by one as `model-0000i-of-0000n.safetensors` with an index, or one part as a single file."""
    weight_map: dict[str, str] = {}
    total = sum(part.num_bytes for part in parts)
    with tqdm(total=total, unit="B", unit_scale=True, desc="writing") as progress:
        for number, part in enumerate(parts, start=1):
            name = SINGLE if len(parts) == 1 else f"model-{number:05d}-of-{len(parts):05d}.safetensors"
            tensors = part.make()
            try:
                save_file(tensors, folder / name, metadata={"format": "pt"})
            except SafetensorError as error:
                raise OSError(f"could not write {name} ({part.num_bytes / 2**20:.0f} MiB): {error}") from error
            weight_map |= dict.fromkeys(tensors, name)
            del tensors  # before the next part is made: one shard in memory at a time
            progress.update(part.num_bytes)
    if len(parts) > 1:
        content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(folder / INDEX, content)


def refuse_existing(target: Path) -> None:
    """Raise `FileExistsError` if the target exists and is not an empty directory."""
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise FileExistsError(f"{target} exists already: choose another target or remove it")


@contextmanager
def new_folder(target: Path, num_bytes: int) -> Iterator[Path]:
    """A folder to fill that becomes `target` when all went well, and vanishes when anything went wrong.

    Raises:
        OSError: if the disk has no room for `num_bytes`.
    """
    partial = target.parent / f".{target.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    partial.mkdir(parents=True)
    try:
        require_space(target, num_bytes)
        yield partial
        partial.replace(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_json(path: Path, content: dict) -> None:
    """Write a JSON file for people to read, too."""
    path.write_text(json.dumps(content, indent=2) + "\n")


def name_some(names: list[str], limit: int = 5) -> str:
    """`3 tensors (a, b, c)`, shortened."""
    shown = ", ".join(names[:limit]) + (", …" if len(names) > limit else "")
    return f"{len(names)} tensor{'s' * (len(names) != 1)} ({shown})"
