"""The parts of a run in a file, and which of them are finished: how a run goes on after it was stopped at any moment.

    OUT/run.json           what was asked, how many parts and images there are, whether all is done
    OUT/plan.jsonl         a line per part, written once, before any work
    OUT/parts/*.parquet    finished parts; each appears whole, by renaming, or not at all
    OUT/.lock              held while a run writes here

A part's file is named by its number, so that whoever does it a second time writes the same file again. The folder may
lie on storage that many machines share.
"""

import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from perceptiondlm.common.json_files import read_json, write_json
from perceptiondlm.serving.annotate.job import AnnotationJob
from perceptiondlm.serving.annotate.sources import parts_of
from perceptiondlm.serving.records import region_table


METADATA = b"perceptiondlm"  # key under which a part's file says what was done
FORMAT = 2  # of the folder's layout
WRITTEN = ("run.json", "plan.jsonl", "parts", "retry")  # what a run keeps for itself
RESULTS = ("data", "images", "failures.jsonl", "README.md", "exports", "preview.jpg")
BEGUN = (".lock", "parts", "plan.jsonl", "plan.jsonl.part")  # what a run leaves that was killed while planning


@dataclass
class Plan:
    """The parts of a run.

    Args:
        folder: the run's.
        offsets: where each part's line begins in the plan.
        counts: images of each part.
    """

    folder: Path
    offsets: np.ndarray
    counts: np.ndarray

    @classmethod
    def open(cls, folder: Path) -> "Plan":
        """Read where the parts are."""
        offsets, counts, place = [], [], 0
        with (folder / "plan.jsonl").open("rb") as stream:
            for line in stream:
                offsets.append(place)
                counts.append(json.loads(line)["count"])
                place += len(line)
        return cls(folder, np.array(offsets, dtype=np.int64), np.array(counts, dtype=np.int64))

    def __len__(self) -> int:
        return len(self.offsets)

    def part(self, number: int) -> dict[str, Any]:
        """What a part holds; see `sources.parts_of`."""
        with (self.folder / "plan.jsonl").open("rb") as stream:
            stream.seek(int(self.offsets[number]))
            return json.loads(stream.readline())

    def finished(self) -> list[int]:
        """Numbers of the parts that are done."""
        names = [path.name for path in (self.folder / "parts").glob("part-*.parquet")]
        return sorted(int(name.removeprefix("part-").removesuffix(".parquet")) for name in names)


@dataclass
class PartResult:
    """What became of a part.

    Attributes:
        number: of the part.
        records: of its regions, in the source's order.
        images: `{"id", "image", "width", "height", "place", "regions", "part"}` of its images that were read; `place`
            is the number of the image within the part.
        failures: `{"id", "image", "kind", "error", "place"}` of images and regions that could not be read or
            captioned, and the key of a region as `region`.
    """

    number: int
    records: list[dict[str, Any]]
    images: list[dict[str, Any]]
    failures: list[dict[str, Any]]

    def summary(self) -> dict[str, int]:
        """Numbers for progress."""
        counts = {"images": self.count, "regions": len(self.records), "failures": len(self.failures)}
        return {"part": self.number, **counts}

    @property
    def count(self) -> int:
        """Images of the part, read or not."""
        known = {image["id"] for image in self.images}
        return len(known | {failure["id"] for failure in self.failures if failure["kind"] == "image"})


def prepare_folder(job: AnnotationJob, overwrite: bool = False) -> Plan:
    """Make or continue a run's folder; call under `locked`.

    Raises:
        ValueError: if the folder holds another run, or files that are none of a run.
    """
    folder = job.folder
    run_file = folder / "run.json"
    if overwrite and run_file.is_file():
        clear(folder)
    if run_file.is_file():
        refuse_other(read_json(run_file), job)
    elif strange := sorted(path.name for path in folder.iterdir() if path.name not in BEGUN):
        raise ValueError(
            f"{folder} holds other files ({', '.join(strange[:4])}): name an empty or new folder for --out"
        )
    if not run_file.is_file():
        write_plan(job, folder)
    for stale in (folder / "parts").glob(".part-*"):
        stale.unlink()
    return Plan.open(folder)


def write_plan(job: AnnotationJob, folder: Path) -> None:
    """Write the plan and, when it is complete, `run.json`."""
    images, parts = write_specs(folder, parts_of(job))
    if not images:
        (folder / "plan.jsonl").unlink()
        raise ValueError(f"{job.source} holds no image")
    run = {"format": FORMAT, "complete": False, "parts": parts, "images": images}
    write_json(folder / "run.json", {**run, "fingerprint": job.fingerprint(), "job": job.identity()})


def write_specs(folder: Path, specs: Iterable[dict[str, Any]]) -> tuple[int, int]:
    """Write parts as `plan.jsonl`, at once; returns how many images and parts there are."""
    (folder / "parts").mkdir(parents=True, exist_ok=True)
    part, images, parts = folder / "plan.jsonl.part", 0, 0
    with part.open("w", encoding="utf-8") as stream, tqdm(desc="plan", unit=" images", disable=None) as progress:
        for spec in specs:
            stream.write(json.dumps(spec, ensure_ascii=False) + "\n")
            images, parts = images + spec["count"], parts + 1
            progress.update(spec["count"])
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(part, folder / "plan.jsonl")
    return images, parts


def refuse_other(run: Any, job: AnnotationJob) -> None:
    """Refuse a folder whose run was asked something else; says what differs."""
    if not isinstance(run, dict) or run.get("format") != FORMAT or not isinstance(run.get("job"), dict):
        raise ValueError(f"{job.folder}/run.json is not of this version: name a new folder for --out, or --overwrite")
    if run.get("fingerprint") == job.fingerprint():
        return
    now, before = job.identity(), run["job"]
    other = [f"{name}: {before.get(name)!r} then, {now[name]!r} now" for name in now if before.get(name) != now[name]]
    raise ValueError(
        f"{job.folder} holds a run that was asked something else ({'; '.join(other)[:600]}): ask the same to continue "
        "it, name a new folder, or --overwrite to begin anew"
    )


def clear(folder: Path) -> None:
    """Remove what a run has written."""
    for name in WRITTEN + RESULTS:
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        elif path.exists():
            path.unlink()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a run's folder, made where it is not there; refuses one that another run writes to.

    The lock goes with the process that holds it, however that ends.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out {folder} is a file; accepted: a folder")
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ValueError(f"another run writes to {folder}: wait for it, or name another folder") from error
    try:
        yield
    finally:
        lock.release()


def part_file(folder: Path, number: int) -> Path:
    return folder / "parts" / f"part-{number:07d}.parquet"


def write_part(folder: Path, result: PartResult) -> None:
    """Write a part's file, at once."""
    parts = folder / "parts"
    if not (folder / "run.json").is_file():
        raise FileNotFoundError(
            f"there is no {folder}/run.json here: --out must lie on storage that all machines share"
        )
    table = region_table(result.records)
    said = json.dumps({"images": result.images, "failures": result.failures}, ensure_ascii=False)
    table = table.replace_schema_metadata({METADATA: said.encode()})
    hidden = parts / f".part-{result.number}-{uuid.uuid4().hex}"
    with hidden.open("wb") as stream:
        pq.write_table(table, stream)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(hidden, part_file(folder, result.number))


def read_part(folder: Path, number: int) -> tuple[pa.Table, dict[str, Any]]:
    """A finished part's records, and its images and failures."""
    table = pq.read_table(part_file(folder, number))
    return table, json.loads(table.schema.metadata[METADATA])
