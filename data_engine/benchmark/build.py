"""The work folder of a benchmark, and the benchmark folder that is made of it."""

import shutil
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perceptiondlm.common.json_files import read_json, write_json
from perceptiondlm.data_engine.benchmark.curation import Curation
from perceptiondlm.data_engine.benchmark.items import Item
from perceptiondlm.data_engine.benchmark.questions import questions_of
from perceptiondlm.data_engine.record import Record, Region
from perceptiondlm.data_engine.stages.caption import region_key
from perceptiondlm.data_engine.store import Store


ATTRIBUTES = "attributes"  # name of the stage whose facts hold the items


@dataclass(frozen=True)
class Work:
    """A work folder: a run of the data engine with a stage `attributes`, and people's decisions.

    Attributes:
        folder: of the run.
        min_regions: images with fewer regions that have items are left out; 2, as the benchmark asks about several.
    """

    folder: Path
    min_regions: int = 2

    def records(self) -> list[Record]:
        """The images with at least `min_regions` regions that have items.

        Raises:
            FileNotFoundError: the extraction has not run here.
            ValueError: it is not finished.
        """
        run = read_json(self.folder / "run.json")
        names = [part.get("name") or part["kind"] for part in run]
        store = Store(self.folder, names)
        counts = [file.repair() for file in store.files]
        if counts[-1] < counts[0]:
            raise ValueError(f"{self.folder}: {counts[-1]} of {counts[0]} images are done; run the extraction again")
        records = [record for record in store.records(len(names) - 1) if len(with_items(record)) >= self.min_regions]
        if not records:
            raise ValueError(f"{self.folder} has no image with {self.min_regions} regions with items")
        return records

    def items(self, records: Sequence[Record]) -> list[Item]:
        """All items as extracted, region by region."""
        return [Item(**item) for record in records for region in with_items(record) for item in region.facts["items"]]

    def curation(self, records: Sequence[Record]) -> Curation:
        """The decisions so far."""
        return Curation(self.folder / "decisions.jsonl", self.items(records))


def with_items(record: Record) -> list[Region]:
    """The kept regions with items."""
    return [region for region in record.kept if region.facts.get("items")]


def build_benchmark(records: Sequence[Record], items: Sequence[Item], out: Path, seed: int = 0) -> dict[str, int]:
    """Write a benchmark folder in the published layout: annotations.json, class_names.json, qa.json, images/.

    Args:
        items: as settled, see `curation.settle`.
        seed: of the order of choices.

    Returns:
        counts of images, regions and questions.

    Raises:
        FileExistsError: the folder holds a benchmark already.
        ValueError: no image has two regions with items.
    """
    if (out / "qa.json").exists():
        raise FileExistsError(f"{out} holds a benchmark already; name another folder")
    by_region: dict[str, list[Item]] = defaultdict(list)
    for item in items:
        by_region[item.region_id].append(item)
    chosen = []
    for record in records:
        regions = [region for region in record.kept if by_region.get(region_key(record, region.id))]
        chosen += [(record, regions)] if len(regions) > 1 else []
    if not chosen:
        raise ValueError("no image has two regions with questions")
    asked = {region_key(record, region.id) for record, regions in chosen for region in regions}
    questions = questions_of([item for item in items if item.region_id in asked], seed)
    (out / "images").mkdir(parents=True, exist_ok=True)
    for record, _ in chosen:
        shutil.copyfile(record.image, out / "images" / file_name(record))
    write_json(out / "annotations.json", [annotation(record, regions) for record, regions in chosen])
    names = {region_key(record, one.id): one.category for record, regions in chosen for one in regions}
    write_json(out / "class_names.json", names)
    write_json(out / "qa.json", {key: questions[key] for key in names})  # last: it says that the folder is whole
    return {"images": len(chosen), "regions": len(names), "questions": sum(map(len, questions.values()))}


def file_name(record: Record) -> str:
    """The image's file in the benchmark, named by its id so that none covers another."""
    return f"{record.id.replace('/', '-')}{Path(record.image).suffix.lower()}"


def annotation(record: Record, regions: Sequence[Region]) -> dict[str, Any]:
    """One entry of annotations.json."""
    return {
        "file_name": file_name(record),
        "height": record.height,
        "width": record.width,
        "image_id": record.id,
        "annotations": [
            {"index": region.id, "category_name": region.category, "mask_rle": dict(region.mask)} for region in regions
        ],
    }
