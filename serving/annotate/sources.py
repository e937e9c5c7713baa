"""What a source is, the columns it has, and how it is cut into parts."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from perceptiondlm.serving.annotate.coco import items_of_coco
from perceptiondlm.serving.annotate.files import items_of_files, loaded_item
from perceptiondlm.serving.annotate.job import AnnotationJob
from perceptiondlm.serving.annotate.loaded import LoadedImage
from perceptiondlm.serving.annotate.shards import read_shard, renewed_shard, shard_columns, shard_parts
from perceptiondlm.serving.annotate.tables import (
    HUB,
    chosen_columns,
    hub_parts,
    parquet_columns,
    parquet_parts,
    read_hub,
    read_parquet,
    rows_of_job,
)
from perceptiondlm.serving.annotate.videos import VIDEOS, read_video, video_parts


ACCEPTED = (
    "a folder or glob of pictures, a COCO or LVIS .json, .parquet files, WebDataset .tar shards (a file, folder or "
    "glob each), videos with masklets, or a data set on the Hub (org/name)"
)
Items = Callable[[AnnotationJob], Iterator[dict[str, Any]]]
ITEMS: dict[str, Items] = {"files": items_of_files, "coco": items_of_coco}
TABLES: dict[str, tuple[Callable[[AnnotationJob], list[str]], Items]] = {
    "parquet": (parquet_columns, parquet_parts),
    "shard": (shard_columns, shard_parts),
    "hub": (lambda job: rows_of_job(job).column_names, hub_parts),
}
READERS: dict[str, Callable[[dict[str, Any], AnnotationJob], Iterator[LoadedImage]]] = {
    "parquet": read_parquet,
    "shard": read_shard,
    "hub": read_hub,
    "video": read_video,
}


def kind_of(source: str) -> str:
    """What a source is, by its name and by what lies there.

    Raises:
        FileNotFoundError, ValueError: if it is nothing that is accepted.
    """
    if source.startswith(HUB):
        return "hub"
    suffix = Path(source.split("?")[0]).suffix.lower()
    if suffix in (".parquet", ".tar"):
        return {".parquet": "parquet", ".tar": "shard"}[suffix]
    path = Path(source)
    if path.is_dir():
        return kind_of_folder(path)
    if suffix in VIDEOS:
        return "video"
    if suffix == ".json" and path.is_file():
        return "coco"
    if path.is_file() or any(mark in source for mark in "*?["):
        return "files"
    if re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        return "hub"
    raise FileNotFoundError(f"there is nothing at {source}; accepted: {ACCEPTED}")


def kind_of_folder(folder: Path) -> str:
    """Tables, shards and videos by the files that lie in a folder; pictures otherwise."""
    kinds = {".parquet": "parquet", ".tar": "shard", **dict.fromkeys(VIDEOS, "video")}
    return next((kinds[one.suffix.lower()] for one in folder.rglob("*") if one.suffix.lower() in kinds), "files")


def settled(job: AnnotationJob) -> AnnotationJob:
    """The job with everything named that its source leaves open, and local places written out in full.

    Raises:
        FileNotFoundError, ValueError: naming what is missing and what is accepted.
    """
    regions = (
        replace(job.regions, name=in_full(job.regions.name)) if job.regions.where in ("file", "folder") else job.regions
    )
    places = {"source": job.source, "images": job.images, "model": job.model}
    job = replace(job, regions=regions, out=str(job.folder.absolute()), **{k: in_full(v) for k, v in places.items()})
    kind = kind_of(job.source)
    if job.folder.is_relative_to(Path(job.source)):
        raise ValueError(f"--out {job.folder} lies in the source {job.source}: name a folder outside of it")
    if kind not in TABLES:
        if job.regions.where == "column" or job.columns:
            raise ValueError(f"{job.source} is no table: columns are those of parquet files, shards and Hub data sets")
        return job
    chosen = chosen_columns(TABLES[kind][0](job), job, job.source)
    column = chosen.pop("regions", None)
    regions = job.regions if column is None else replace(job.regions, where="column", name=column)
    return replace(job, columns=chosen, regions=regions)


def in_full(place: Any) -> Any:
    """A local place that is there, or a glob, by its absolute path: workers may run elsewhere. Others as they are."""
    if place is None or "://" in place:
        return place
    mark = HUB if place.startswith(HUB) else ""
    path = Path(place.removeprefix(mark)).absolute()
    is_here = path.exists() or (not mark and any(sign in place for sign in "*?["))
    return f"{mark}{path}" if is_here else place


def parts_of(job: AnnotationJob) -> Iterator[dict[str, Any]]:
    """The parts of a settled job's source, in its order; `count` says how many images each has."""
    kind = kind_of(job.source)
    if kind in TABLES or kind == "video":
        yield from video_parts(job) if kind == "video" else TABLES[kind][1](job)
        return
    items = ITEMS[kind](job)
    while part := list(islice(items, job.images_per_part)):
        yield {"kind": "files", "items": part, "count": len(part)}


def renewed(specs: Sequence[dict[str, Any]], job: AnnotationJob) -> Iterator[dict[str, Any]]:
    """Planned parts with what the source says of the same images today; images keep their places.

    Regions of files and COCO entries are found anew by the images' ids, members of shards by the samples' keys; rows of
    tables and frames of videos are read by their numbers in any case.
    """
    if any(spec["kind"] == "files" for spec in specs):
        ids = {item["id"] for spec in specs for item in spec["items"]}
        kind = kind_of(job.source)
        if kind not in ITEMS:
            raise ValueError(f"{job.source} was a collection of pictures and is now of the kind {kind!r}")
        now = {item["id"]: item for item in ITEMS[kind](job) if item["id"] in ids}
        yield from ({**spec, "items": [now.get(item["id"], item) for item in spec["items"]]} for spec in specs)
        return
    yield from (renewed_shard(spec) if spec["kind"] == "shard" else spec for spec in specs)


def load_part(spec: dict[str, Any], job: AnnotationJob) -> Iterator[LoadedImage]:
    """The images of a part."""
    if spec["kind"] == "files":
        yield from map(loaded_item, spec["items"])
    else:
        yield from READERS[spec["kind"]](spec, job)
