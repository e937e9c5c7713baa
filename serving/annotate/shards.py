"""WebDataset shards as sources: tar files whose members share a name up to the first dot, one name a sample.

Members are found once, by the headers, and read later by their place, so that any part of a shard can be read alone.
"""

import os
import tarfile
from collections.abc import Iterator
from io import BytesIO
from itertools import groupby
from pathlib import PurePosixPath
from typing import Any

import fsspec
import numpy as np

from perceptiondlm.common.json_files import parsed_json
from perceptiondlm.serving.annotate.job import AnnotationJob
from perceptiondlm.serving.annotate.loaded import PICTURES, LoadedImage, from_row
from perceptiondlm.serving.annotate.tables import even_runs, files_at


WRAPPERS = ("masks", "mask_rles", "annotations", "boxes", "regions")  # keys of a JSON member that hold its regions


def shard_files(job: AnnotationJob) -> list[str]:
    return files_at(job.source, ".tar")


def samples_of(file: str) -> list[dict[str, Any]]:
    """The samples of a shard: key, and of every extension where its member begins and how long it is."""
    members: list[tuple[str, str, int, int]] = []
    try:
        with fsspec.open(file, "rb") as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
            for member in tar:
                if member.isfile():
                    path = PurePosixPath(member.name)
                    stem, _, extension = path.name.partition(".")
                    members.append((str(path.with_name(stem)), extension.lower(), member.offset_data, member.size))
    except tarfile.TarError as error:
        raise ValueError(f"{file} is no uncompressed tar file, or was cut short: {error}") from error
    return [
        {"key": key, "members": {extension: [start, size] for _, extension, start, size in group}}
        for key, group in groupby(members, key=lambda member: member[0])
    ]


def shard_columns(job: AnnotationJob) -> list[str]:
    """Extensions of the samples of the first shard; the picture's is called `image`."""
    samples = samples_of(shard_files(job)[0])
    extensions = sorted({extension for sample in samples for extension in sample["members"]})
    return ["image", *extensions] if any(is_picture(extension) for extension in extensions) else extensions


def is_picture(extension: str) -> bool:
    return f".{extension}" in PICTURES


def shard_parts(job: AnnotationJob) -> Iterator[dict[str, Any]]:
    """Runs of samples within shards."""
    for file in shard_files(job):
        samples = samples_of(file)
        for low, high in even_runs(len(samples), job.images_per_part):
            yield {"kind": "shard", "file": file, "samples": samples[low:high], "count": high - low}


def renewed_shard(spec: dict[str, Any]) -> dict[str, Any]:
    """A part with the members of its samples where they lie today; a sample that is gone stays as it was."""
    now = {sample["key"]: sample for sample in samples_of(spec["file"])}
    return {**spec, "samples": [now.get(sample["key"], sample) for sample in spec["samples"]]}


def read_shard(spec: dict[str, Any], job: AnnotationJob) -> Iterator[LoadedImage]:
    """The samples of a part."""
    file = spec["file"]
    with fsspec.open(file, "rb") as stream:
        for sample in spec["samples"]:
            place = f"{os.path.basename(file)}/{sample['key']}"
            try:
                row = row_of(sample["members"], stream, job)
            except (OSError, ValueError) as error:
                yield LoadedImage(place, place, error=f"{place}: {error}")
            else:
                yield from_row(row, place, job)


def row_of(members: dict[str, list[int]], stream: Any, job: AnnotationJob) -> dict[str, Any]:
    """A sample as a row: the picture as bytes, JSON as what it holds, arrays as arrays."""
    wanted = {job.regions.name or "", *job.columns.values()}
    wanted |= {name.split(".")[0] for name in wanted}
    row: dict[str, Any] = {}
    for extension, (start, size) in members.items():
        pictured = is_picture(extension) and "image" not in row and extension not in wanted
        if not pictured and extension not in wanted:
            continue
        stream.seek(start)
        content = stream.read(size)
        if len(content) < size:
            raise ValueError(f"member .{extension} is cut short")
        row["image" if pictured else extension] = decoded(content, extension, job)
    return row


def decoded(content: bytes, extension: str, job: AnnotationJob) -> Any:
    """What a member holds."""
    kind = extension.rpartition(".")[2]
    if kind == "json":
        value = parsed_json(content, f"member .{extension}")
        if extension == job.regions.name and isinstance(value, dict):
            value = next((value[key] for key in WRAPPERS if key in value), value)
        return value
    if kind in ("npy", "npz"):
        array = np.load(BytesIO(content))
        return array[array.files[0]] if kind == "npz" else array
    return content.decode() if kind in ("txt", "cls", "id") else content
