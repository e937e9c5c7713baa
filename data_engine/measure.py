"""Precision and recall of every filter on records with planted faults (`sources.drawn`, `drawn_stand_ins`)."""

from collections.abc import Iterable, Sequence
from typing import Any

from perceptiondlm.data_engine.record import Record, Region


# The planted faults that a filter is there for, by the kind of stage; it may well find others.
TARGETS: dict[str, tuple[str, ...]] = {
    "mask_filter": ("part", "copy", "merged"),
    "category_check": ("wrong category", "another thing"),
    "core_category": (),
    "segment_check": ("part without its whole", "merged", "another thing"),
    "length": ("too short", "too long"),
    "repetition": ("repetition",),
    "near_duplicates": ("copied caption",),
}


def planted(region: Region) -> set[str]:
    """The faults planted in a region, by name."""
    return set(region.facts.get("planted", ()))


def measure_filters(records: Iterable[Record], stages: Sequence[str]) -> dict[str, Any]:
    """What each filter did to faulty and faultless regions.

    Args:
        records: behind the last stage.
        stages: names of the stages in order; those named as in `TARGETS` are measured.

    Returns:
        `filters`: stage -> `seen` regions, `dropped`, `faultless_dropped`; `precision`: share of the dropped regions
        with any planted fault; `recall`: share of the regions with one of the filter's own faults that it dropped, and
        per fault `[dropped, seen]`. Both are None where there was nothing to count. `before` and `after` all stages:
        `regions`, `faultless` (share in [0, 1]) and counts by fault.
    """
    regions = [region for record in records for region in record.regions]
    place = {name: number for number, name in enumerate(stages)}
    end = [len(stages) if region.dropped is None else place[region.dropped.stage] for region in regions]
    filters = {}
    for name in stages:
        if name in TARGETS:
            seen = [region for region, last in zip(regions, end, strict=True) if last >= place[name]]
            filters[name] = _of_filter(name, seen)
    kept = [region for region in regions if region.dropped is None]
    return {"filters": filters, "before": _faults(regions), "after": _faults(kept)}


def _of_filter(name: str, seen: Sequence[Region]) -> dict[str, Any]:
    dropped = [region for region in seen if region.dropped is not None and region.dropped.stage == name]
    faulty = [region for region in dropped if planted(region)]
    by_fault, found, there = {}, 0, 0
    for fault in TARGETS[name]:
        counts = [sum(fault in planted(region) for region in group) for group in (dropped, seen)]
        by_fault[fault] = counts
    aimed = [region for region in seen if planted(region) & set(TARGETS[name])]
    there, found = len(aimed), sum(region in dropped for region in aimed)
    return {
        "seen": len(seen),
        "dropped": len(dropped),
        "faultless_dropped": len(dropped) - len(faulty),
        "precision": len(faulty) / len(dropped) if dropped else None,
        "recall": found / there if there else None,
        "by_fault": by_fault,
    }


def _faults(regions: Sequence[Region]) -> dict[str, Any]:
    counts: dict[str, int] = {}
    for region in regions:
        for fault in planted(region):
            counts[fault] = counts.get(fault, 0) + 1
    faultless = sum(not planted(region) for region in regions)
    return {
        "regions": len(regions),
        "faultless": faultless / len(regions) if regions else None,
        "faults": dict(sorted(counts.items())),
    }
