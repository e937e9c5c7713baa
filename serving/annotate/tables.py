"""Tables as sources: parquet files and data sets on the Hub, cut into runs of rows, each read when its turn comes."""

import os
from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise
from typing import Any

import datasets
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from perceptiondlm.common.region_files.entry import few
from perceptiondlm.serving.annotate.job import AnnotationJob
from perceptiondlm.serving.annotate.loaded import LoadedImage, from_row


IMAGE_COLUMNS = ("image", "img", "jpg", "png", "image_path", "path")  # tried in this order where none is named
REGION_COLUMNS = {
    "masks": ("masks", "mask_rles", "segmentation"),
    "boxes": ("boxes", "bboxes"),
    "label_map": ("label_map",),
}
HUB = "hub:"


def files_at(source: str, suffix: str) -> list[str]:
    """Files of a kind: one by name, all of a folder, or those of a glob; paths and fsspec addresses."""
    system, path = fsspec.core.url_to_fs(source)
    if system.isdir(path):
        found = system.glob(f"{path.rstrip('/')}/**/*{suffix}")
    else:
        found = [name for name in system.glob(path) if name.endswith(suffix)]
    found = sorted(found)
    if not found:
        raise FileNotFoundError(f"no {suffix} files at {source}; accepted: a folder, a glob or a file")
    return [system.unstrip_protocol(name) if "://" in source else name for name in found]


def chosen_columns(columns: list[str], job: AnnotationJob, where: str) -> dict[str, str]:
    """The columns of a job as far as they are named, and the image's and the regions' by their usual names otherwise.

    Returns:
        "image", "regions" (unless a segmenter finds them), "id" and "label" to columns.
    Raises:
        ValueError: naming the columns that are there.
    """
    chosen = dict(job.columns)
    candidates: dict[str, tuple[str, ...]] = {"image": IMAGE_COLUMNS}
    if job.regions.where == "column" and job.regions.name:
        chosen["regions"] = job.regions.name
    elif job.regions.where in ("source", "column"):
        candidates["regions"] = REGION_COLUMNS[job.regions.form]
    elif job.regions.where != "segmenter":
        raise ValueError(f"the regions of {where} come from a column or a segmenter: --masks column:NAME")
    for kind, names in candidates.items():
        if kind not in chosen:
            found = [name for name in names if name in columns]
            if not found:
                accepted = "--image-column NAME" if kind == "image" else "--masks column:NAME, or --segmenter"
                raise ValueError(f"{where} has the columns {few(columns)}; name the one of the {kind}: {accepted}")
            chosen[kind] = found[0]
    for kind, name in chosen.items():
        if name.split(".")[0] not in columns and name not in columns:
            raise ValueError(f"{where} has no column {name} for the {kind}; it has {', '.join(columns)}")
    return chosen


def parquet_files(job: AnnotationJob) -> list[str]:
    return files_at(job.source, ".parquet")


def parquet_columns(job: AnnotationJob) -> list[str]:
    """Names of the columns of the first file."""
    with fsspec.open(parquet_files(job)[0], "rb") as stream:
        return footer(stream, job.source).schema_arrow.names


def footer(stream: Any, name: str) -> pq.ParquetFile:
    """An opened parquet file; refuses what is none by name."""
    try:
        return pq.ParquetFile(stream)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{name} is no parquet file, or was cut short: {error}") from error


def parquet_parts(job: AnnotationJob) -> Iterator[dict[str, Any]]:
    """Runs of rows within row groups, as even as they come."""
    files = parquet_files(job)
    refuse_same_ids(job, files)
    for file in files:
        with fsspec.open(file, "rb") as stream:
            metadata = footer(stream, file).metadata
            sizes = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
        start = 0
        for group, size in enumerate(sizes):
            for low, high in even_runs(size, job.images_per_part):
                yield {
                    "kind": "parquet",
                    "file": file,
                    "group": group,
                    "skip": low,
                    "start": start + low,
                    "count": high - low,
                }
            start += size


def refuse_same_ids(job: AnnotationJob, files: list[str]) -> None:
    """Refuse a column of ids that does not tell the rows apart."""
    if (name := job.columns.get("id")) is None:
        return
    seen: set[Any] = set()
    for file in files:
        with fsspec.open(file, "rb") as stream:
            values = footer(stream, file).read(columns=[name]).column(0).to_pylist()
        refuse_twice(values, seen, f"the column {name} of {file}")


def refuse_twice(values: list[Any], seen: set[Any], where: str) -> None:
    """Add ids to those seen; refuses one that is there already, or is none."""
    for value in values:
        if value is None or value in seen:
            raise ValueError(f"{where} holds {value!r} twice, or no id: ids must tell the rows apart")
        seen.add(value)


def even_runs(size: int, most: int) -> list[tuple[int, int]]:
    """Half-open runs that make up `size`, none longer than `most`, as equal as they can be."""
    count = -(-size // most)
    edges = [size * number // count for number in range(count + 1)] if count else [0]
    return list(pairwise(edges))


def read_parquet(spec: dict[str, Any], job: AnnotationJob) -> Iterator[LoadedImage]:
    """The rows of a part; the columns that are used, alone."""
    wanted = {*job.columns.values(), *([job.regions.name] if job.regions.name else [])}
    top = sorted({name.split(".")[0] for name in wanted})
    file, number, left = spec["file"], spec["start"], spec["count"]
    folder = "" if "://" in file else f"{os.path.dirname(file)}/"
    with fsspec.open(file, "rb") as stream:
        table = footer(stream, file)
        names = [name for name in table.schema_arrow.names if name in wanted or name in top]
        skip = spec["skip"]
        for batch in table.iter_batches(max(1, job.images_per_part), row_groups=[spec["group"]], columns=names):
            for row in batch.slice(skip).to_pylist()[:left]:
                yield from_row(row, f"{os.path.basename(file)}/{number}", job, folder)
                number, left = number + 1, left - 1
            skip = max(0, skip - len(batch))
            if not left:
                return


def hub_name(source: str) -> str:
    return source.removeprefix(HUB)


@lru_cache(maxsize=1)
def hub_rows(name: str, configuration: str | None, split: str, revision: str | None) -> datasets.Dataset:
    """A split of a data set on the Hub (or of one that `datasets` knows otherwise), pictures not decoded."""
    try:
        rows = datasets.load_dataset(name, configuration, split=split, revision=revision)
    except FileNotFoundError as error:  # datasets' own error for a name it does not know is one, too
        raise FileNotFoundError(f"{name} is no file or folder here, and no data set on the Hub: {error}") from error
    for column, feature in rows.features.items():
        rows = rows.cast_column(column, undecoded(feature)) if undecoded(feature) != feature else rows
    return rows


def undecoded(feature: Any) -> Any:
    """A feature whose pictures stay files."""
    if isinstance(feature, datasets.Image):
        return datasets.Image(decode=False)
    if isinstance(feature, (datasets.List, datasets.LargeList)) and isinstance(feature.feature, datasets.Image):
        return type(feature)(datasets.Image(decode=False))
    return feature


def rows_of_job(job: AnnotationJob) -> datasets.Dataset:
    """The data set that a job names."""
    chosen = job.dataset
    return hub_rows(hub_name(job.source), chosen.get("name"), chosen.get("split", "train"), chosen.get("revision"))


def hub_parts(job: AnnotationJob) -> Iterator[dict[str, Any]]:
    """Runs of rows of a data set on the Hub."""
    rows = rows_of_job(job)
    if (name := job.columns.get("id")) is not None:
        refuse_twice(list(rows[name]), set(), f"the column {name} of {job.source}")
    for low, high in even_runs(len(rows), job.images_per_part):
        yield {"kind": "hub", "start": low, "count": high - low}


def read_hub(spec: dict[str, Any], job: AnnotationJob) -> Iterator[LoadedImage]:
    """The rows of a part; a row that cannot be read is one with an error."""
    rows = rows_of_job(job)
    for number in range(spec["start"], spec["start"] + spec["count"]):
        yield from_row(rows[number], f"{job.dataset.get('split', 'train')}/{number}", job)
