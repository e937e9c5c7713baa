"""Captions of a benchmark: files in the published form, checked by region, and the log a run grows image by image.

The published form is one JSON object, `{"IMAGEID_ANNINDEX": caption}`. What a file lacks, or has too much, is named by
region; only `allow_partial` lets the rest be scored.
"""

import json
import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from perceptiondlm.common.json_files import read_json, write_json


MAX_NAMED = 300  # keys listed in one message


@dataclass(frozen=True)
class CaptionIssues:
    """What is unusual about a set of captions, by region id.

    Attributes:
        missing: regions of the benchmark without a caption.
        unknown: keys that are no region of the benchmark.
        repeated: keys that occur more than once in the file.
        not_text: regions whose caption is no string.
        empty: regions whose caption is blank. They are scored as they are: nothing is mentioned in them.
    """

    missing: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    repeated: list[str] = field(default_factory=list)
    not_text: list[str] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)

    @property
    def partial(self) -> bool:
        """Whether anything but an empty caption is amiss, so that the captions are not the benchmark's."""
        return bool(self.missing or self.unknown or self.repeated or self.not_text)

    def lines(self) -> list[str]:
        """One line per kind of issue, naming the keys."""
        kinds = {
            "regions without a caption": self.missing,
            "keys that are no region of the benchmark": self.unknown,
            "keys given more than once": self.repeated,
            "captions that are not a string": self.not_text,
            "empty captions": self.empty,
        }
        return [f"{kind} ({len(keys)}): {_listed(keys)}" for kind, keys in kinds.items() if keys]

    def to_dict(self) -> dict[str, list[str]]:
        """The keys of each kind, ready for `json.dump`."""
        return asdict(self)


def read_captions(
    path: Path, region_ids: Collection[str], allow_partial: bool = False
) -> tuple[dict[str, str], CaptionIssues]:
    """Read and check a captions file.

    Args:
        path: JSON file in the published form.
        region_ids: regions of the benchmark.
        allow_partial: score what can be scored; otherwise every region needs a caption and every key a region.
    Returns:
        captions by region id, in the benchmark's order, and what was amiss.
    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no JSON object, holds no caption of the benchmark, or is partial without `allow_partial`.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no captions file at {path}")
    repeated: list[str] = []
    try:
        content = json.loads(
            path.read_text(encoding="utf-8"), object_pairs_hook=partial(_noting_repeated, repeated=repeated)
        )
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(
            f'{path} holds a {type(content).__name__}; accepted: one object {{"IMAGEID_ANNINDEX": caption}}'
        )
    captions, issues = check_captions(content, region_ids, repeated)
    report = f"{path} does not fit the benchmark's {len(region_ids)} regions:\n  " + "\n  ".join(issues.lines())
    if not captions:
        raise ValueError(f"{report}\nno caption is left to score")
    if issues.partial and not allow_partial:
        raise ValueError(f"{report}\nscore the rest with --allow-partial")
    return captions, issues


def check_captions(
    captions: Mapping[str, Any], region_ids: Collection[str], repeated: Iterable[str] = ()
) -> tuple[dict[str, str], CaptionIssues]:
    """The captions that can be scored, in the benchmark's order, and what is amiss; a repeated key is left out."""
    known = dict.fromkeys(region_ids)
    repeated = sorted(set(repeated))
    issues = CaptionIssues(
        missing=[key for key in known if key not in captions],
        unknown=[key for key in captions if key not in known],
        repeated=repeated,
        not_text=[key for key in known if key in captions and not isinstance(captions[key], str)],
        empty=[key for key in known if isinstance(captions.get(key), str) and not captions[key].strip()],
    )
    kept = {key: captions[key] for key in known if isinstance(captions.get(key), str) and key not in repeated}
    return kept, issues


def write_captions(captions: Mapping[str, str], path: Path) -> None:
    """Write captions in the published form."""
    write_json(path, dict(captions))


def _noting_repeated(pairs: list[tuple[str, Any]], repeated: list[str]) -> dict[str, Any]:
    """A JSON object's pairs as a dict; keys that occur more than once are added to `repeated`."""
    repeated += [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
    return dict(pairs)


def _listed(keys: list[str]) -> str:
    more = len(keys) - MAX_NAMED
    return ", ".join(map(repr, keys[:MAX_NAMED])) + (f" and {more} more" if more > 0 else "")


# --- the log of a run -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CaptionedImage:
    """One image's captions and what they took.

    Attributes:
        image_id: the image.
        captions: caption per region id.
        num_slots: caption slots that were decoded (not filled by an early exit).
        num_forward_passes: denoising passes of the language model.
        generate_seconds: time in `generate`.
        seconds: time from the image to the captions: processing, generation and decoding.
        scores: the model's confidence per region id, in [0, 1].
    """

    image_id: str
    captions: dict[str, str]
    num_slots: int
    num_forward_passes: int
    generate_seconds: float
    seconds: float
    scores: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of_output(
        cls,
        image_id: str,
        captions: dict[str, str],
        output: Any,
        generate_seconds: float,
        seconds: float,
        scores: dict[str, float] | None = None,
    ) -> "CaptionedImage":
        """The record of what `generate` returned for an image."""
        slots = round(output.tokens_per_forward * output.num_forward_passes)
        return cls(image_id, captions, slots, output.num_forward_passes, generate_seconds, seconds, scores or {})


class CaptionLog:
    """An append-only log of captioned images in a folder; each process of a run grows a file of its own.

    A line is written whole and reaches the disk before the next image starts, so a killed run loses one image at most.
    A last line cut short is dropped; any other broken line is an error.

    Args:
        folder: holds the files `captions.PROCESS.jsonl` and `run.json`, the settings the captions were made with.
        process: index of this process.
    """

    def __init__(self, folder: Path, process: int = 0):
        self.folder = folder
        self.path = folder / f"captions.{process}.jsonl"

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """Record what a new run is made with; refuse to continue one that was made with anything else.

        Raises:
            ValueError: naming the settings that differ.
        """
        path = self.folder / "run.json"
        given = json.loads(json.dumps(settings))
        if not path.exists():
            write_json(path, given)
            return
        before = read_json(path)
        changed = [key for key in {**before, **given} if before.get(key) != given.get(key)]
        if changed:
            differences = ", ".join(f"{key} was {before.get(key)!r}, is {given.get(key)!r}" for key in changed)
            raise ValueError(f"{self.folder} holds captions of another run ({differences}): choose another --out")

    def images(self) -> dict[str, CaptionedImage]:
        """All images captioned so far, by any process."""
        found = {}
        for path in sorted(self.folder.glob("captions.*.jsonl")):
            for image in self._read(path):
                found[image.image_id] = image
        return found

    @staticmethod
    def _read(path: Path) -> Iterator[CaptionedImage]:
        lines = path.read_bytes().split(b"\n")
        for number, line in enumerate(lines[:-1], start=1):  # behind the last newline is nothing, or a torn line
            try:
                yield CaptionedImage(**json.loads(line))
            except (ValueError, TypeError) as error:
                raise ValueError(
                    f"{path}, line {number} is damaged ({error}): delete the line to caption it anew"
                ) from error

    def append(self, image: CaptionedImage) -> None:
        """Add an image; returns when it is on the disk."""
        line = json.dumps(asdict(image), ensure_ascii=False) + "\n"
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())

    def drop_torn_line(self) -> None:
        """Cut a line that an earlier run of this process did not finish."""
        if self.path.exists():
            content = self.path.read_bytes()
            whole = content[: content.rfind(b"\n") + 1]
            if whole != content:
                with self.path.open("r+b") as file:
                    file.truncate(len(whole))
