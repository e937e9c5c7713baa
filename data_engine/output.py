"""What a run gives: region sets as training reads them, statistics, and a table of them for people."""

import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import mean, median
from typing import Any

from perceptiondlm.common.json_files import write_json
from perceptiondlm.data_engine.record import Record
from perceptiondlm.data_engine.stages.text_filters import words_of


REGION_SET = "regions.jsonl"


def region_set_row(record: Record) -> dict[str, Any]:
    """An image as `training.data.region_sets` reads it; its path is absolute, so that the set may lie anywhere."""
    return {
        "image": os.path.abspath(record.image),
        "mask_rles": [dict(region.mask) for region in record.kept],
        "captions": [region.caption for region in record.kept],
        "region_ids": [region.id for region in record.kept],
    }


def write_region_set(records: Iterable[Record], path: Path, min_regions: int = 1) -> int:
    """Write the images with at least `min_regions` kept regions at once; returns how many they are.

    Raises:
        ValueError: a kept region has no caption.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part, count = path.with_name(f".{path.name}.part"), 0
    with part.open("w", encoding="utf-8") as file:
        for record in records:
            if bare := [region.id for region in record.kept if not region.caption]:
                raise ValueError(f"regions {bare} of {record.id} are kept and have no caption: no stage wrote any")
            if len(record.kept) >= max(min_regions, 1):
                file.write(json.dumps(region_set_row(record), ensure_ascii=False) + "\n")
                count += 1
    part.replace(path)
    return count


def statistics(records: Iterable[Record]) -> dict[str, Any]:
    """Counts of a run, JSON-ready.

    Returns:
        `images`, `regions`, `kept_images` (with a kept region), `kept_regions`; `dropped`: stage -> reason -> regions;
        `faults`: stage -> images on which it failed; `regions_per_image`, `words` and `area_share` (means, medians and
        extremes over what is kept), and `histogram` of kept regions per image.
    """
    images = regions = 0
    per_image: list[int] = []
    words: list[int] = []
    shares: list[float] = []
    dropped: dict[str, Counter[str]] = defaultdict(Counter)
    faults: Counter[str] = Counter()
    for record in records:
        images, regions = images + 1, regions + len(record.regions)
        faults.update({stage for stage, _ in record.faults})
        for region in record.regions:
            if region.dropped is not None:
                dropped[region.dropped.stage][region.dropped.reason] += 1
        if record.kept:
            per_image.append(len(record.kept))
            words += [len(words_of(region.caption or "")) for region in record.kept]
            shares += [region.area / (record.width * record.height) for region in record.kept]
    return {
        "images": images,
        "regions": regions,
        "kept_images": len(per_image),
        "kept_regions": sum(per_image),
        "dropped": {stage: dict(reasons.most_common()) for stage, reasons in dropped.items()},
        "faults": dict(faults),
        "regions_per_image": _summary(per_image),
        "words": _summary(words),
        "area_share": _summary(shares),
        "histogram": {str(count): number for count, number in sorted(Counter(per_image).items())},
    }


def _summary(values: list) -> dict[str, float] | None:
    if not values:
        return None
    return {
        "mean": round(mean(values), 4),
        "median": round(median(values), 4),
        "min": round(min(values), 4),
        "max": round(max(values), 4),
    }


def statistics_text(counts: dict[str, Any]) -> str:
    """The counts for a terminal."""
    kept, regions = counts["kept_regions"], counts["regions"]
    share = f" ({100 * kept / regions:.1f} %)" if regions else ""
    lines = [
        f"{counts['images']} images, {regions} regions; kept {counts['kept_images']} images, {kept} regions{share}",
        *(
            f"  {stage}: {', '.join(f'{number} {reason}' for reason, number in reasons.items())}"
            for stage, reasons in counts["dropped"].items()
        ),
    ]
    if counts["faults"]:
        failed = ", ".join(f"{stage} on {number} images" for stage, number in counts["faults"].items())
        lines.append(f"failed: {failed}; do these again with --retry-faults (a source's with --restart-from SOURCE)")
    return "\n".join(lines)


def write_outputs(
    folder: Path, records: Any, min_regions: int, reports: dict[str, Any], samples: int
) -> dict[str, Any]:
    """Write `regions.jsonl`, `statistics.json` and `report.html` into a run's folder.

    Args:
        records: a callable that gives the records anew, since they are gone through three times.
        reports: what the stages know of their work, by name.
        samples: of every reason, shown on the page.

    Returns:
        the statistics.
    """
    from perceptiondlm.data_engine.report import write_page

    rows: Iterator[Record] = records()
    write_region_set(rows, folder / REGION_SET, min_regions)
    counts = {**statistics(records()), "stages": {name: report for name, report in reports.items() if report}}
    write_json(folder / "statistics.json", counts)
    write_page(records, counts, folder / "report.html", samples)
    return counts
