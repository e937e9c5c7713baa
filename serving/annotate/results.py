"""Finished parts become the results: parquet that `datasets` loads, the list of failures, a card that says what it is.

    OUT/data/train-00000-of-00002.parquet     a row per region, see serving/records.py
    OUT/images/train-00000-of-00001.parquet   a row per image that was read
    OUT/failures.jsonl                        images and regions that were not, and why
    OUT/README.md                             the card of the data set

Parts are merged one by one, so memory does not grow with the run. What is written stands aside until it is whole.
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from perceptiondlm.common.json_files import read_json, write_json
from perceptiondlm.serving.annotate.plan import Plan, read_part
from perceptiondlm.serving.records import IMAGE_SCHEMA, REGION_SCHEMA


ROWS_OF_A_FILE = 200_000
ROWS_OF_A_GROUP = 10_000
ROWS_AT_ONCE = 1_000
FILES = ("data", "images", "failures.jsonl")  # that parts become


@dataclass
class Totals:
    """What a finished run holds; `turned`: pictures with an EXIF orientation of which `exif` says nothing."""

    images: int
    regions: int
    failed_images: int
    failed_regions: int
    turned: int = 0

    def sentence(self) -> str:
        """For people."""
        text = f"{self.regions} regions of {self.images} images"
        if self.failed_images + self.failed_regions:
            text += f"; failed: {self.failed_images} images, {self.failed_regions} regions (failures.jsonl)"
        if self.turned:
            text += (
                f"; {self.turned} pictures carry an EXIF orientation, and their regions were taken to refer to the "
                "pixels as stored: --exif stored says so, --exif applied the contrary"
            )
        return text


class ParquetWriter:
    """Rows into files of a bounded size in a folder; their number is in their names, so they are named at the end."""

    def __init__(self, folder: Path, schema: pa.Schema):
        self.folder, self.schema = folder, schema
        self.rows = self.files = 0
        self.writer: pq.ParquetWriter | None = None
        self.waiting: list[pa.Table] = []
        folder.mkdir(parents=True)

    def add(self, table: pa.Table) -> None:
        """Append rows."""
        self.waiting.append(table.cast(self.schema))
        if sum(map(len, self.waiting)) >= ROWS_OF_A_GROUP:
            self._flush()

    def close(self) -> None:
        """Write what waits; there is one file at least. Give the files their names."""
        if self.waiting or not self.files:
            self.waiting = self.waiting or [self.schema.empty_table()]
            self._flush()
        if self.writer is not None:
            self.writer.close()
        for number in range(self.files):
            self._path(number).rename(self.folder / f"train-{number:05d}-of-{self.files:05d}.parquet")

    def _flush(self) -> None:
        if self.writer is None:
            self.writer = pq.ParquetWriter(self._path(self.files), self.schema)
            self.files, self.rows = self.files + 1, 0
        table = pa.concat_tables(self.waiting)
        self.writer.write_table(table)
        self.rows, self.waiting = self.rows + len(table), []
        if self.rows >= ROWS_OF_A_FILE:
            self.writer.close()
            self.writer = None

    def _path(self, number: int) -> Path:
        return self.folder / f"{number}.part"


def finish(plan: Plan) -> Totals:
    """Merge the parts of a run whose parts are all done; a run that was merged before is left as it is.

    Raises:
        ValueError: if a part is missing, or an image's id occurs twice.
    """
    folder = plan.folder
    run = read_json(folder / "run.json")
    if not run["complete"]:
        missing = len(plan) - len(plan.finished())
        if missing:
            raise ValueError(f"{missing} of {len(plan)} parts are not done")
        aside = folder / "parts" / ".results"
        totals = write_results(aside, ((number, *read_part(folder, number)) for number in range(len(plan))))
        take_place(folder, aside)
        run |= {"totals": totals, "complete": True}
        write_json(folder / "run.json", run)
    shutil.rmtree(folder / "parts", ignore_errors=True)
    return Totals(**run["totals"])


def write_results(aside: Path, parts: Iterable[tuple[int, pa.Table, dict[str, Any]]]) -> dict[str, int]:
    """Write the results of parts into a folder, whatever it held before.

    Args:
        aside: the folder; gets `FILES`.
        parts: number, records, and images and failures of each, as `read_part` gives them.

    Returns:
        the fields of `Totals`.
    Raises:
        ValueError: if an image's id occurs twice.
    """
    shutil.rmtree(aside, ignore_errors=True)
    regions, images = ParquetWriter(aside / "data", REGION_SCHEMA), ParquetWriter(aside / "images", IMAGE_SCHEMA)
    seen: set[str] = set()
    totals = asdict(Totals(0, 0, 0, 0))
    with (aside / "failures.jsonl").open("w", encoding="utf-8") as stream:
        for number, table, said in parts:
            regions.add(table.replace_schema_metadata(None))
            images.add(pa.Table.from_pylist(said["images"], schema=IMAGE_SCHEMA))
            for identity in [entry["id"] for entry in said["images"]]:
                if identity in seen:
                    raise ValueError(f"two images have the id {identity}: name a column of ids by --id-column")
                seen.add(identity)
            for entry in said["failures"]:
                totals[f"failed_{entry['kind']}s"] += 1
                stream.write(json.dumps(entry | {"part": number}, ensure_ascii=False) + "\n")
            totals["images"] += len(said["images"])
            totals["regions"] += len(table)
            totals["turned"] += sum("turned" in entry for entry in said["images"])
    regions.close()
    images.close()
    return totals


def take_place(folder: Path, aside: Path) -> None:
    """Move the `FILES` that `aside` holds to where results are; called again after a kill, it moves what is left."""
    before = aside / "before"
    before.mkdir(exist_ok=True)
    for name in FILES:
        if not (aside / name).exists():
            continue
        if (folder / name).exists():
            os.replace(folder / name, before / name)
        os.replace(aside / name, folder / name)


def failures_of(folder: Path) -> list[dict[str, Any]]:
    """The failure list of a finished run, in the source's order; see `PartResult`, and `part` is the number of one."""
    with (folder / "failures.jsonl").open(encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


def region_rows(folder: Path) -> Iterator[dict[str, Any]]:
    """The records of a finished run, one by one, in the source's order."""
    yield from _rows(folder / "data")


def image_rows(folder: Path) -> Iterator[dict[str, Any]]:
    """The images of a finished run, one by one, in the source's order."""
    yield from _rows(folder / "images")


def images_with_regions(folder: Path) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Every image with its records, in the source's order."""
    rows = region_rows(folder)
    for image in image_rows(folder):
        own = [next(rows) for _ in range(image["regions"])]
        if any(row["image_id"] != image["id"] for row in own):
            raise ValueError(f"{folder}: the records of {image['id']} are not where they belong")
        yield image, own


def _rows(folder: Path) -> Iterator[dict[str, Any]]:
    for file in sorted(folder.glob("*.parquet")):
        for batch in pq.ParquetFile(file).iter_batches(ROWS_AT_ONCE):
            yield from batch.to_pylist()


def write_card(folder: Path, totals: Totals, job: dict[str, Any]) -> None:
    """The data set's card: what `datasets` has to load, and where it comes from."""
    fields = "\n".join(f"| `{field.name}` | {field.type} |" for field in REGION_SCHEMA)
    settings = json.dumps(job["generate"], ensure_ascii=False)
    text = f"""---
configs:
- config_name: regions
  data_files: data/*.parquet
  default: true
- config_name: images
  data_files: images/*.parquet
task_categories:
- image-to-text
tags:
- region-captioning
- perceptiondlm
---
# Region captions

{totals.sentence()}, of `{Path(job["source"]).name}`, by perceptiondlm annotate with the model
`{job["model"] or "embedded"}` and the settings `{settings}`. A model wrote the captions; nobody has checked them.

```python
from datasets import load_dataset

regions = load_dataset("PATH_OR_NAME", "regions", split="train")
```
| column | type |
| --- | --- |
{fields}

Masks are COCO run lengths (`pycocotools.mask.decode`), boxes x0, y0, x1, y1 in pixels, half-open.
"""
    (folder / "README.md").write_text(text, encoding="utf-8")
