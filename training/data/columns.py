"""Columns of numbers on disk, written at once, and what tells whether the files they were taken from have changed."""

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np


BLOCKS, BLOCK = 16, 4096  # of a file, whose bytes stand for its contents


def save_columns(path: Path, **columns: Any) -> None:
    """Write arrays as `.npz` at once: a reader sees all of them or none. Makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{os.getpid()}-{path.name}")
    with open(part, "wb") as stream:
        np.savez(stream, **columns)
    os.replace(part, path)


def file_state(path: str | Path) -> list[Any]:
    """Name, size and time of a file: what must change for its contents to change."""
    state = Path(path).stat()
    return [str(path), state.st_size, state.st_mtime_ns]


def file_content(path: str | Path) -> list[Any]:
    """Name, size and a digest of evenly spread blocks of a file: the same for copies of it on any machine."""
    size = Path(path).stat().st_size
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        for block in range(BLOCKS):
            stream.seek(max(0, size - BLOCK) * block // (BLOCKS - 1))
            digest.update(stream.read(BLOCK))
    return [Path(path).name, size, digest.hexdigest()[:16]]
