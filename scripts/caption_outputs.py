"""What `perceptiondlm caption` writes: results and pictures, never over one another, nor over others unasked."""

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from perceptiondlm.common.drawing import draw_regions
from perceptiondlm.common.json_files import read_json
from perceptiondlm.regions_perceptiondlm import region_masks
from perceptiondlm.scripts.caption_jobs import Job


REQUEST = "perceptiondlm.request"  # under which a picture remembers what was asked


def check_outputs(options: argparse.Namespace, jobs: Sequence[Job]) -> None:
    """Give every job its picture's place, and refuse outputs that cannot be written or would replace others.

    Raises:
        ValueError: naming the output.
    """
    inputs = {path.resolve() for job in jobs for path in (job.path, *job.files)}
    if options.json:
        check_place(options.json, inputs)
        if options.json.suffix.lower() != ".jsonl":
            check_results(options, jobs)
    if not options.out:
        return
    if len(jobs) > 1 and options.out.suffix and not options.out.is_dir():
        raise ValueError(f"--out must be a directory for several images, got {options.out}")
    place_pictures(options.out, jobs)
    for job in jobs:
        assert job.target is not None  # placed above
        check_place(job.target, inputs | ({options.json.resolve()} if options.json else set()))
        if job.target.exists() and not options.overwrite and request_of_picture(job.target) != job.request:
            raise ValueError(f"{job.target} exists and shows something else: --overwrite replaces it")


def place_pictures(out: Path, jobs: Sequence[Job]) -> None:
    """Give every job a picture of its own; images of one name get numbers."""
    if len(jobs) == 1 and out.suffix and not out.is_dir():
        if out.suffix.lower() not in Image.registered_extensions():
            raise ValueError(f"--out {out}: no picture format has the suffix {out.suffix}")
        jobs[0].target = out
        return
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; accepted: a directory, or a picture's name for one image")
    taken: set[str] = set()
    for job in jobs:
        names = (f"{job.path.stem}{number}.png" for number in ("", *(f"-{n}" for n in range(2, len(jobs) + 2))))
        name = next(name for name in names if name.casefold() not in taken)
        taken.add(name.casefold())
        job.target = out / name


def check_place(path: Path, inputs: set[Path]) -> None:
    """Refuse a file that cannot be written, or that the run reads."""
    if path.resolve() in inputs:
        raise ValueError(f"{path} is read by this run and cannot be its output")
    if path.is_dir():
        raise ValueError(f"{path} is a directory; accepted: a file's name")
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ValueError(f"{path} cannot be written: {parent} is no folder to write to")


def check_results(options: argparse.Namespace, jobs: Sequence[Job]) -> None:
    """Refuse to replace a .json file unless it answers the same."""
    if not options.json.exists() or options.overwrite:
        return
    content = read_json(options.json)
    entries = content if isinstance(content, list) else [content]
    asked = {job.request for job in jobs}
    if not all(isinstance(entry, dict) and entry.get("request") in asked for entry in entries):
        raise ValueError(f"{options.json} exists and answers something else: --overwrite replaces it")


def finished_requests(path: Path | None) -> set[str]:
    """Requests that a .jsonl file answers already; a last line cut short by an interruption is dropped."""
    if path is None or path.suffix.lower() != ".jsonl" or not path.exists():
        return set()
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        with path.open("r+b") as file:
            file.truncate(len(whole))
    requests = set()
    for row, line in enumerate(whole.removeprefix(b"\xef\xbb\xbf").splitlines(), start=1):
        try:
            entry = json.loads(line) if line.strip() else {}
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {row} is no JSON ({error}): delete it, or choose another file") from error
        if not isinstance(entry, dict):
            raise ValueError(f"{path}, line {row} is no result of captioning: choose another file")
        requests.add(str(entry.get("request")))
    return requests


def append_result(result: dict[str, Any], path: Path | None) -> None:
    """Append a result to a .jsonl file."""
    if path is not None and path.suffix.lower() == ".jsonl":
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")


def draw(job: Job, captions: list[dict]) -> None:
    """Write a job's annotated picture at once; a PNG remembers what was asked."""
    assert job.target is not None and job.image is not None  # noqa: PT018 - placed, and read before it was captioned
    size, texts = (job.image.height, job.image.width), [region["caption"] for region in captions]
    regions = {job.form: job.regions, "resize_masks": job.options.resize_masks}
    picture = draw_regions(job.image, region_masks(size, **regions), texts)
    job.target.parent.mkdir(parents=True, exist_ok=True)
    notes = PngInfo()
    notes.add_text(REQUEST, job.request)
    part = job.target.with_name(f".{job.target.name}.part")
    kind = Image.registered_extensions()[job.target.suffix.lower()]
    picture.save(part, kind, **({"pnginfo": notes} if kind == "PNG" else {}))
    os.replace(part, job.target)


def request_of_picture(path: Path) -> str | None:
    """What a picture of an earlier run was asked for, None for any other file."""
    try:
        with Image.open(path) as picture:
            return picture.info.get(REQUEST)
    except (OSError, SyntaxError, ValueError):
        return None
