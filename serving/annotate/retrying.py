"""Another try at what failed in a finished run: a run of its own in a folder of its own, merged into the results.

    OUT/retry/plan.jsonl, run.json, parts/   the retry: parts of the run, cut down to the images and regions that failed
    OUT/retry/results/                       the results as they will be
    OUT/retry/merged.json                    written when those are whole; from then on they take the results' place

Until `merged.json` is there, the results are those of before. A retry that was killed is settled by the next call:
what it had finished is merged, so that nothing is captioned twice, and what was merged is moved to its place.
"""

import shutil
import uuid
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from perceptiondlm.common.json_files import read_json, write_json
from perceptiondlm.common.region_files.entry import few
from perceptiondlm.serving.annotate.job import AnnotationJob
from perceptiondlm.serving.annotate.plan import Plan, read_part, write_specs
from perceptiondlm.serving.annotate.results import failures_of, images_with_regions, take_place, write_results
from perceptiondlm.serving.annotate.sources import renewed
from perceptiondlm.serving.records import region_table


RETRY, RESULTS, MERGED = "retry", "results", "merged.json"
STALE = ("README.md", "preview.jpg", "exports")  # made of the results before


@dataclass(frozen=True)
class Retried:
    """What another try came to: failures on the list before it, and those of them that are off it now."""

    tried: int
    mended: int

    def sentence(self) -> str:
        """For people."""
        if not self.tried:
            return "nothing to try again: the list of failures is empty"
        return f"tried {self.tried} failures again: {self.mended} mended, {self.tried - self.mended} still failing"


def retry_job(job: AnnotationJob) -> AnnotationJob:
    """The job of the retry of a settled job."""
    return replace(job, out=str(job.folder / RETRY), retry=uuid.uuid4().hex)


def plan_retry(job: AnnotationJob, plan: Plan, failures: list[dict[str, Any]]) -> Plan:
    """Plan another try at the failures of a finished run, with what the source says of them today.

    A part's `only` names the places of its images that failed, each with the keys of its regions that did, or None
    where the image did; `part` is its number in the run.
    """
    wanted: dict[int, dict[str, list[str] | None]] = defaultdict(dict)
    for entry in failures:
        only, place = wanted[entry["part"]], str(entry["place"])
        keys = only.setdefault(place, [])
        if entry["kind"] == "image":
            only[place] = None
        elif keys is not None:
            keys.append(entry["region"])
    cut = [
        {**plan.part(number), "part": number, "only": only, "count": len(only)}
        for number, only in sorted(wanted.items())
    ]
    folder = plan.folder / RETRY
    images, parts = write_specs(folder, renewed(cut, job))
    write_json(folder / "run.json", {"complete": False, "parts": parts, "images": images})
    return Plan.open(folder)


def settle(plan: Plan) -> None:
    """Take over what a retry has finished, whether it came to its end or was killed; its folder goes.

    Raises:
        ValueError: if what was mended does not fit the run, such as an id that another image has. The results and the
            list of failures are those of before, then.
    """
    folder = plan.folder / RETRY
    if not (folder / MERGED).is_file() and (folder / "run.json").is_file():
        try:
            merge(plan, Plan.open(folder))
        except ValueError:
            (folder / "run.json").unlink()
            shutil.rmtree(folder)
            raise
    if (folder / MERGED).is_file():
        move_in(plan.folder, read_json(folder / MERGED))
        (folder / "run.json").unlink(missing_ok=True)  # before the rest: what is merged is not merged again
    shutil.rmtree(folder, ignore_errors=True)


def merge(plan: Plan, again: Plan) -> None:
    """Write the results with what the finished parts of a retry found, beside those that are there."""
    numbers = {again.part(number)["part"]: number for number in again.finished()}
    if not numbers:
        return
    parts = {part: read_part(again.folder, number) for part, number in numbers.items()}
    results = again.folder / RESULTS
    totals = write_results(results, merged_parts(plan, parts))
    totals["turned"] += read_json(plan.folder / "run.json")["totals"]["turned"]
    found = [image for _, said in parts.values() for image in said["images"]]
    changed = any(image["regions"] or "items" not in image for image in found)
    if not changed:  # the list of failures alone has other words
        shutil.rmtree(results / "data")
        shutil.rmtree(results / "images")
    write_json(again.folder / MERGED, {"totals": totals, "changed": changed})


def move_in(folder: Path, merged: Mapping[str, Any]) -> None:
    """Put merged results where results are; exports, contact sheet and card of those before go with them."""
    take_place(folder, folder / RETRY / RESULTS)
    write_json(folder / "run.json", {**read_json(folder / "run.json"), "totals": merged["totals"]})
    for name in STALE if merged["changed"] else STALE[:1]:
        if (folder / name).is_dir():
            shutil.rmtree(folder / name)
        else:
            (folder / name).unlink(missing_ok=True)


def merged_parts(
    plan: Plan, again: Mapping[int, tuple[pa.Table, dict[str, Any]]]
) -> Iterator[tuple[int, pa.Table, dict[str, Any]]]:
    """All parts of a run, those of `again` with what another try found, as `write_results` takes them."""
    for part in parts_before(plan):
        if part.number in again:
            part = part.with_retried(int(plan.counts[part.number]), *again[part.number])
        rows = [row for _, own in part.images for row in own]
        yield (
            part.number,
            region_table(rows),
            {"images": [image for image, _ in part.images], "failures": part.failures},
        )


@dataclass
class DonePart:
    """A part of a finished run: its images that were read with their records, and its failures."""

    number: int
    images: list[tuple[dict[str, Any], list[dict[str, Any]]]]
    failures: list[dict[str, Any]]

    def with_retried(self, count: int, table: pa.Table, said: dict[str, Any]) -> "DonePart":
        """The part of `count` images with the records, images and failures of another try, all in the source's order.

        An image that was read keeps the regions it has, whatever becomes of the others.
        """
        unread = {entry["place"] for entry in self.failures if entry["kind"] == "image"}
        images = dict(zip((place for place in range(count) if place not in unread), self.images, strict=True))
        failures, today, rows = by_place(self.failures), by_place(said["failures"]), iter(table.to_pylist())
        for image in said["images"]:
            place, own = image["place"], list(islice(rows, image["regions"]))
            before, others = images.get(place, (image, []))
            if error := misfit(image, own, before, others):
                failures[place] = [entry | {"error": error} for entry in failures[place]]
                continue
            together = in_order([*others, *own], image["id"], image["items"]) if others else own
            images[place] = ({**image, "part": self.number, "regions": len(together)}, together)
            failures[place] = today[place]
        for place in today.keys() - {image["place"] for image in said["images"]}:  # these could not be read
            error = today[place][-1]["error"]
            regions = [entry | {"error": error} for entry in failures[place]]
            failures[place] = today[place] if place in unread else regions
        left = [entry for place in sorted(failures) for entry in failures[place]]
        return DonePart(self.number, [images[place] for place in sorted(images)], left)


def misfit(image: dict[str, Any], own: list[dict], before: dict[str, Any], others: list[dict]) -> str | None:
    """Why an image's records of today cannot join those it has, None where they can."""
    if image["id"] != before["id"]:
        return f"the image's id is now {image['id']}, and it was {before['id']}"
    twice = {row["id"] for row in own} & {row["id"] for row in others}
    return f"the image has regions of these ids already: {few(sorted(twice))}" if twice else None


def by_place(failures: list[dict[str, Any]]) -> dict[int, list[dict[str, Any]]]:
    """Failures by the place of their image within the part."""
    places: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for entry in failures:
        places[entry["place"]].append(entry)
    return places


def in_order(rows: list[dict[str, Any]], image: str, keys: list[str]) -> list[dict[str, Any]]:
    """Records of an image in the order in which its source names their keys; an unknown one stays behind the one
    before it.
    """
    ranks, last = {key: rank for rank, key in enumerate(keys)}, -1
    places = []
    for row in rows:
        last = ranks.get(row["id"].removeprefix(f"{image}/"), last)
        places.append(last)
    return [rows[number] for number in sorted(range(len(rows)), key=places.__getitem__)]


def parts_before(plan: Plan) -> Iterator[DonePart]:
    """The parts of a finished run, read from its results one by one."""
    failures: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for entry in failures_of(plan.folder):
        failures[entry["part"]].append(entry)
    groups = groupby(images_with_regions(plan.folder), key=lambda pair: pair[0]["part"])
    group = next(groups, None)
    for number in range(len(plan)):
        images = []
        if group is not None and group[0] == number:
            images, group = list(group[1]), next(groups, None)
        yield DonePart(number, images, failures[number])
