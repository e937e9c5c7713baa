"""Region sets: JSON lists, or JSON lines, of images with masks and captions, as DAM, COCONut and SA-1B are published.

Either `{"image": PATH or "data:…;base64,…", "mask_rles": RLE or [RLE], "captions": [str]}`, where the image may also be
called `image_file` or `image_path`, or `{"image": …, "annotations": [{"segmentation": RLE, "caption": str}]}`. Files
are indexed by byte offset once; only the records asked for are read.
"""

import gzip
import hashlib
import json
import mmap
import os
import random
import re
import shutil
import zlib
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from perceptiondlm.regions_perceptiondlm import region_masks
from perceptiondlm.training.data.bad_records import BadRecord, retried
from perceptiondlm.training.data.columns import file_content, file_state
from perceptiondlm.training.data.data_config import SourceConfig
from perceptiondlm.training.data.sources import AnswerFormat, Measured, Source, image_root, open_image


IMAGE_KEYS = ("image", "image_file", "image_path")
SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz")
# A string ends at its quote or with the file, so that every quote is looked at once.
STRINGS_AND_BRACES = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*(?:"|\\?\Z)|[{}]', re.DOTALL)
EMPTY_ARRAY = 128  # bytes of a .npy file without entries, which cannot be mapped
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


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
        return [self.key, *map(file_content, self.files)]

    def place(self, record: int) -> str:
        file, row = self._locate(record)
        return f"{self.files[file]}, record {row}"

    def measure(self, record: int) -> Measured:
        """Every dealing must fit: a group is measured with the longest captions it may hold."""
        image, regions = self._read(record)
        wrong = {
            index: error for index, region in enumerate(regions) if (error := self._fault(index, region, image.size))
        }
        captions = [caption for index, (_, caption) in enumerate(regions) if index not in wrong]
        if not captions:
            raise BadRecord(wrong[0] if len(wrong) == 1 else f"no region is good; the first: {wrong[0]}")
        slots, cut = zip(*map(self.answers.slots, captions), strict=True)
        longest = sorted(slots, reverse=True)
        processor = self.answers.processor
        text = processor.region_text_length()
        lengths = []
        for size in map(len, deal(len(captions), processor.config.num_region_prompts, "")):
            answers = self.answers.copies * (sum(longest[:size]) + size)  # a marker each
            lengths.append(processor.prompt_length(image.size, size) + text + answers)
        if max(lengths) > self.answers.max_length:
            return Measured([], too_long=len(lengths), dropped=wrong)
        return Measured(lengths, cut=sum(cut), dropped=wrong)

    def sample(self, record: int, unit: int, seed: str) -> dict[str, Any]:
        image, regions = self._read(record)
        left_out = self.dropped.get(record, ())
        good = [region for index, region in enumerate(regions) if index not in left_out]
        masks, captions = zip(*good, strict=True)
        group = deal(len(good), self.answers.processor.config.num_region_prompts, seed)[unit]
        return {"image": image, "masks": [masks[i] for i in group], "captions": [captions[i] for i in group]}

    def _fault(self, index: int, region: tuple[Any, Any], size: tuple[int, int]) -> str | None:
        """What is wrong with a region (mask and caption) of an image of a size (width, height)."""
        mask, caption = region
        try:
            self.answers.check_text(caption, f"caption {index}")
            if not isinstance(mask, (dict, list)):
                raise BadRecord(f"mask {index} is {mask!r:.60}; accepted: RLE or polygons")
            found = region_masks(size[::-1], masks=[mask])
        except (ValueError, TypeError, OverflowError, OSError) as error:
            return str(BadRecord(str(error)))
        return None if len(found) == 1 else f"mask {index} holds {len(found)} regions; accepted: one"

    def _locate(self, record: int) -> tuple[int, int]:
        file = int(np.searchsorted(self.starts, record, side="right")) - 1
        return file, record - int(self.starts[file])

    def _read(self, record: int) -> tuple[Image.Image, list[tuple[Any, Any]]]:
        """Image of a record, and its regions, each a mask and a caption not yet looked at; raises `BadRecord`."""
        file, row = self._locate(record)
        start, end = self.spans[file][row].tolist()
        try:
            content = retried(lambda: read_bytes(self.files[file], start, end))
            image, regions = read_entry(json.loads(content))
        except (OSError, json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise BadRecord(f"no JSON object: {error}") from error
        return open_image(image, image_root(self.config), "image"), regions


def read_bytes(path: Path, start: int, end: int) -> bytes:
    """A part of a file."""
    with open(path, "rb") as stream:
        stream.seek(start)
        return stream.read(end - start)


def deal(count: int, num_prompts: int, seed: str) -> list[list[int]]:
    """Indices of `count` masks, shuffled and dealt into ceil(count / ((1 + num_prompts) / 2)) groups, equal to 1."""
    order = list(range(count))
    random.Random(f"deal/{seed}").shuffle(order)
    groups = -(-2 * count // (1 + num_prompts))
    return [order[group::groups] for group in range(groups)]


def read_entry(entry: Any) -> tuple[Any, list[tuple[Any, Any]]]:
    """Image of a record in either shape, and its regions: mask and caption; raises `BadRecord`."""
    if not isinstance(entry, dict):
        raise BadRecord(f"a record is a {type(entry).__name__}; accepted: an object")
    image = next((entry[key] for key in IMAGE_KEYS if key in entry), None)
    masks, captions = entry.get("mask_rles"), entry.get("captions")
    masks = [masks] if isinstance(masks, dict) else masks
    if isinstance(items := entry.get("annotations"), list):
        items = [item if isinstance(item, dict) else {} for item in items]
        masks, captions = [item.get("segmentation") for item in items], [item.get("caption") for item in items]
    if image is None or not masks or not (isinstance(masks, list) and isinstance(captions, list)):
        accepted = "image, image_file or image_path with mask_rles and captions, or with annotations"
        raise BadRecord(f"a record has the keys {sorted(entry)}, or no masks; accepted: {accepted}")
    if len(masks) != len(captions):
        raise BadRecord(f"{len(masks)} masks for {len(captions)} captions")
    return image, list(zip(masks, captions, strict=True))


def json_files(path: str) -> list[Path]:
    """The JSON files of a folder, a glob, or a file, in order of their names."""
    folder = Path(path)
    found = folder.iterdir() if folder.is_dir() else folder.parent.glob(folder.name)
    files = sorted(file for file in found if file.name.lower().endswith(SUFFIXES))
    if not files:
        raise FileNotFoundError(f"no region set at {path}; accepted: {', '.join(SUFFIXES)}, a folder or glob of these")
    return files


def unpacked(path: Path, cache_dir: Path) -> Path:
    """The file itself, or, since .gz cannot be read from the middle, its contents in the cache.

    Raises:
        ValueError: when the file is cut short or no gzip file.
    """
    if path.suffix.lower() != ".gz":
        return path

    def unpack(part: Path) -> None:
        try:
            with gzip.open(path) as source, open(part, "wb") as copy:
                shutil.copyfileobj(source, copy)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path} cannot be unpacked: {error}") from error

    return _made_once(_cached(path, cache_dir, "".join(path.suffixes[-2:-1])), unpack)


def record_spans(path: Path, cache_dir: Path) -> np.ndarray:
    """Byte offsets (records, 2) int64 where records start and end: lines of .jsonl, elements of a .json list."""

    def index(part: Path) -> None:
        if path.stat().st_size == 0:
            raise ValueError(f"{path} is empty; accepted: a JSON list, or JSON lines")
        with open(path, "rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            spans = _lines(content) if path.suffix.lower() == ".jsonl" else _elements(content, path)
        with open(part, "wb") as target:
            np.save(target, np.frombuffer(spans, dtype=np.int64).reshape(-1, 2))

    spans = _made_once(_cached(path, cache_dir, ".npy"), index)
    return np.load(spans, mmap_mode="r" if spans.stat().st_size > EMPTY_ARRAY else None)


def _cached(path: Path, cache_dir: Path, suffix: str) -> Path:
    state = hashlib.sha256(json.dumps(file_state(path)).encode()).hexdigest()[:16]
    return cache_dir / f"{path.name}-{state}{suffix}"


def _made_once(target: Path, make: Callable[[Path], None]) -> Path:
    """A file of the cache, made at once when it is missing: others see all of it or nothing."""
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f".{os.getpid()}-{target.name}")
        try:
            make(part)
            os.replace(part, target)
        finally:
            part.unlink(missing_ok=True)
    return target


def _lines(content: mmap.mmap) -> array:
    """Starts and ends of lines that are not blank."""
    spans = array("q")
    start = 0
    while line := content.readline():
        if line.strip():
            spans.extend((start, start + len(line)))
        start += len(line)
    return spans


def _elements(content: mmap.mmap, path: Path) -> array:
    """Starts and ends of the objects of a JSON list."""
    spans = array("q")
    depth = start = 0
    end = len(BYTE_ORDER_MARK) if content[:3] == BYTE_ORDER_MARK else 0
    if not content[end : end + 64].lstrip().startswith(b"["):
        raise ValueError(f"{path} does not start with '['; accepted: a JSON list of records, or .jsonl")
    for found in STRINGS_AND_BRACES.finditer(content):
        kind = content[found.start()]
        if kind == ord("{"):
            if depth == 0:
                start = found.start()
                _require_between(content[end:start], b"," if spans else b"[", path, len(spans) // 2)
            depth += 1
        elif kind == ord("}"):
            depth -= 1
            if depth == 0:
                end = found.end()
                spans.extend((start, end))
            elif depth < 0:
                break
    rest = content[end:].strip()
    if depth > 0 or (spans and rest in (b"", b",")):
        raise ValueError(f"{path} ends inside a record or its list: the file is cut short")
    _require_between(rest, b"]" if spans else b"[]", path, len(spans) // 2)
    return spans


def _require_between(text: bytes, expected: bytes, path: Path, record: int) -> None:
    """Refuse what does not stand between the objects of a list."""
    if b"".join(text.split()) != expected:
        raise ValueError(f"{path} holds {text[:40]!r} before record {record}; accepted: a list of objects alone")
