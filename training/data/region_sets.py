"""Region sets: JSON lists, or JSON lines, of images with masks and captions, as DAM, COCONut and SA-1B are published.

Either `{"image": PATH or "data:…;base64,…", "mask_rles": RLE or [RLE], "captions": [str]}`, where the image may also be
called `image_file` or `image_path`, or `{"image": …, "annotations": [{"segmentation": RLE, "caption": str}]}`. Files
are indexed by byte offset once; only the records asked for are read.
"""

import gzip
import hashlib
import json
import mmap
import random
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from perceptiondlm.regions_perceptiondlm import region_masks
from perceptiondlm.training.data.data_config import SourceConfig
from perceptiondlm.training.data.sources import (
    AnswerFormat,
    BadRecord,
    Measured,
    Source,
    file_state,
    image_root,
    open_image,
)


IMAGE_KEYS = ("image", "image_file", "image_path")
SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz")
STRINGS_AND_BRACES = re.compile(rb'"(?:[^"\\]+|\\.)*"|[{}]', re.DOTALL)


class RegionSource(Source):
    """Images with captioned masks in random access.

    An image with n masks gives ceil(n / ((1 + K) / 2)) samples, K the region prompts of a pass: per epoch its masks are
    shuffled and dealt into that many groups, so that every mask is seen once and groups of all sizes up to K occur.
    """

    def __init__(self, config: SourceConfig, answers: AnswerFormat, key: str, cache_dir: Path):
        self.config, self.answers, self.key = config, answers, key
        self.files = [unpacked(path, cache_dir) for path in json_files(str(config.path))]
        self.spans = [record_spans(path, cache_dir) for path in self.files]
        self.starts = np.cumsum([0, *(len(spans) for spans in self.spans)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def fingerprint(self) -> Sequence[Any]:
        return [self.key, *map(file_state, self.files)]

    def place(self, record: int) -> str:
        file, row = self._locate(record)
        return f"{self.files[file]}, record {row}"

    def measure(self, record: int) -> Measured:
        """Every dealing must fit: a group is measured with the longest captions it may hold."""
        image, masks, captions = self._read(record)
        try:
            region_masks((image.height, image.width), masks=masks)
        except (ValueError, TypeError) as error:
            raise BadRecord(str(error)) from error
        slots, cut = zip(*map(self.answers.slots, captions), strict=True)
        longest = sorted(slots, reverse=True)
        processor = self.answers.processor
        text = processor.region_text_length()
        lengths = []
        for size in map(len, deal(len(masks), processor.config.num_region_prompts, "")):
            answers = self.answers.copies * (sum(longest[:size]) + size)  # a marker each
            lengths.append(processor.prompt_length(image.size, size) + text + answers)
        if max(lengths) > self.answers.max_length:
            return Measured([], too_long=len(lengths))
        return Measured(lengths, cut=sum(cut))

    def sample(self, record: int, unit: int, seed: str) -> dict[str, Any]:
        image, masks, captions = self._read(record)
        group = deal(len(masks), self.answers.processor.config.num_region_prompts, seed)[unit]
        return {"image": image, "masks": [masks[i] for i in group], "captions": [captions[i] for i in group]}

    def _locate(self, record: int) -> tuple[int, int]:
        file = int(np.searchsorted(self.starts, record, side="right")) - 1
        return file, record - int(self.starts[file])

    def _read(self, record: int) -> tuple[Any, list, list[str]]:
        """Image, masks (RLE) and captions of a record; raises `BadRecord`."""
        file, row = self._locate(record)
        start, end = self.spans[file][row]
        with open(self.files[file], "rb") as stream:
            stream.seek(start)
            content = stream.read(end - start)
        try:
            entry = json.loads(content)
            image, masks, captions = read_entry(entry)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise BadRecord(f"no JSON object: {error}") from error
        for index, caption in enumerate(captions):
            self.answers.check_text(caption, f"caption {index}")
        return open_image(image, image_root(self.config), "image"), masks, captions


def deal(count: int, num_prompts: int, seed: str) -> list[list[int]]:
    """Indices of `count` masks, shuffled and dealt into ceil(count / ((1 + num_prompts) / 2)) groups, equal to 1."""
    order = list(range(count))
    random.Random(f"deal/{seed}").shuffle(order)
    groups = -(-2 * count // (1 + num_prompts))
    return [order[group::groups] for group in range(groups)]


def read_entry(entry: Any) -> tuple[Any, list, list[str]]:
    """Image, masks and captions of a record in either shape; raises `BadRecord`."""
    if not isinstance(entry, dict):
        raise BadRecord(f"a record is a {type(entry).__name__}; accepted: an object")
    image = next((entry[key] for key in IMAGE_KEYS if key in entry), None)
    masks, captions = entry.get("mask_rles"), entry.get("captions")
    masks = [masks] if isinstance(masks, dict) else masks
    if "annotations" in entry:
        items = [item for item in entry["annotations"] or [] if isinstance(item, dict)]
        masks, captions = [item.get("segmentation") for item in items], [item.get("caption") for item in items]
    if image is None or not masks or not (isinstance(masks, list) and isinstance(captions, list)):
        accepted = "image, image_file or image_path with mask_rles and captions, or with annotations"
        raise BadRecord(f"a record has the keys {sorted(entry)}, or no masks; accepted: {accepted}")
    if len(masks) != len(captions):
        raise BadRecord(f"{len(masks)} masks for {len(captions)} captions")
    if wrong := [caption for caption in captions if not isinstance(caption, str)]:
        raise BadRecord(f"a caption is {wrong[0]!r}; accepted: text")
    return image, masks, captions


def json_files(path: str) -> list[Path]:
    """The JSON files of a folder, a glob, or a file, in order of their names."""
    folder = Path(path)
    found = folder.iterdir() if folder.is_dir() else folder.parent.glob(folder.name)
    files = sorted(file for file in found if file.name.endswith(SUFFIXES))
    if not files:
        raise FileNotFoundError(f"no region set at {path}; accepted: {', '.join(SUFFIXES)}, a folder or glob of these")
    return files


def unpacked(path: Path, cache_dir: Path) -> Path:
    """The file itself, or, since .gz cannot be read from the middle, its contents in the cache."""
    if path.suffix != ".gz":
        return path
    target = _cached(path, cache_dir, "".join(path.suffixes[-2:-1]))
    if not target.exists():
        part = target.with_suffix(".part")
        with gzip.open(path) as source, open(part, "wb") as copy:
            shutil.copyfileobj(source, copy)
        part.rename(target)
    return target


def record_spans(path: Path, cache_dir: Path) -> np.ndarray:
    """Byte offsets (records, 2) int64 where records start and end: lines of .jsonl, elements of a .json list."""
    target = _cached(path, cache_dir, ".npy")
    if not target.exists():
        if path.stat().st_size == 0:
            raise ValueError(f"{path} is empty; accepted: a JSON list, or JSON lines")
        with open(path, "rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            spans = _lines(content) if path.suffix == ".jsonl" else _elements(content, path)
        part = target.with_name(f"part-{target.name}")
        np.save(part, np.array(spans, dtype=np.int64).reshape(-1, 2))
        part.rename(target)
    return np.load(target, mmap_mode="r")


def _cached(path: Path, cache_dir: Path, suffix: str) -> Path:
    cache_dir.mkdir(parents=True, exist_ok=True)
    state = hashlib.sha256(json.dumps(file_state(path)).encode()).hexdigest()[:16]
    return cache_dir / f"{path.name}-{state}{suffix}"


def _lines(content: mmap.mmap) -> list[tuple[int, int]]:
    spans: list[tuple[int, int]] = []
    start = 0
    while line := content.readline():
        if line.strip():
            spans.append((start, start + len(line)))
        start += len(line)
    return spans


def _elements(content: mmap.mmap, path: Path) -> list[tuple[int, int]]:
    """Outermost objects of a JSON list."""
    if not content[:64].lstrip().startswith(b"["):
        raise ValueError(f"{path} does not start with '['; accepted: a JSON list of records, or .jsonl")
    spans: list[tuple[int, int]] = []
    depth = start = end = 0
    for found in STRINGS_AND_BRACES.finditer(content):
        kind = content[found.start()]
        if kind == ord("{"):
            if depth == 0:
                start = found.start()
                _require_separator(content[end:start], path, len(spans))
            depth += 1
        elif kind == ord("}"):
            depth -= 1
            if depth == 0:
                end = found.end()
                spans.append((start, end))
    if depth:
        raise ValueError(f"{path} ends inside a record: the file is cut short")
    _require_separator(content[end:], path, len(spans))
    return spans


def _require_separator(text: bytes, path: Path, record: int) -> None:
    """Between the records of a list there are commas and white space."""
    if text.strip(b"[], \t\r\n"):
        raise ValueError(f"{path} holds {text[:40]!r} before record {record}; accepted: a list of objects alone")
