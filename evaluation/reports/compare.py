"""Systems (or judges) side by side: scores, and paired bootstrap differences over images."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from perceptiondlm.evaluation.reports.paper_tables import beside_paper, cell_text, markdown_table, paper_table
from perceptiondlm.evaluation.reports.results import HEADLINE, TABLE_2, Results
from perceptiondlm.evaluation.scoring import RegionScore, bootstrap_samples, interval, summarize


DIFFERENCES = {**HEADLINE, "Recognition": "recognition"}


@dataclass(frozen=True)
class Difference:
    """A score of one system minus the first system's, in percentage points.

    Attributes:
        value: the difference; None where either has no such score.
        interval: 95 % paired bootstrap interval over images; None for fewer than two images.
    """

    value: float | None
    interval: list[float] | None

    @property
    def clear(self) -> bool:
        """Whether the interval excludes zero."""
        return self.interval is not None and not self.interval[0] <= 0 <= self.interval[1]

    def __str__(self) -> str:
        if self.value is None:
            return ""
        if self.interval is None:
            return f"{self.value:+.1f}"
        return f"{self.value:+.1f} [{self.interval[0]:+.1f}, {self.interval[1]:+.1f}]{' ≠ 0' if self.clear else ''}"


@dataclass(frozen=True)
class Comparison:
    """Systems scored on the same regions.

    Attributes:
        systems: as given, their scores over the common regions.
        differences: per further system, its `Difference` to the first by column.
        left_out: regions that not all systems have; the comparison is partial where there are any.
    """

    systems: list[Results]
    differences: list[dict[str, Difference]]
    left_out: list[str]

    def to_dict(self) -> dict[str, Any]:
        """The figures, ready for `json.dump`; captions and questions stay in the systems' own files."""
        return {
            "systems": [
                {"system": one.title, "judge": one.judge, "dataset": one.dataset, **one.cells()} for one in self.systems
            ],
            "differences": [
                {column: {**asdict(one), "clear": one.clear} for column, one in row.items()} for row in self.differences
            ],
            "num_images": self.systems[0].score.num_images,
            "num_regions": self.systems[0].score.num_regions,
            "left_out": self.left_out,
        }


def compare(systems: Sequence[Results], allow_partial: bool = False) -> Comparison:
    """Put systems side by side, the first being what the others are compared to.

    Args:
        allow_partial: compare on the regions that all systems have, if these are not all.
    Raises:
        ValueError: fewer than two systems; they were asked different questions; they have no region in common; or not
            the same regions, without `allow_partial`.
    """
    if len(systems) < 2:
        raise ValueError(f"a comparison needs at least 2 results, got {len(systems)}")
    regions = [{region.region_id: region for region in one.score.regions} for one in systems]
    common = [key for key in regions[0] if all(key in other for other in regions)]
    left_out = sorted({key for one in regions for key in one} - set(common))
    if not common:
        raise ValueError("the results have no region in common")
    if left_out and not allow_partial:
        raise ValueError(
            f"{len(left_out)} regions are not in all results: {', '.join(left_out[:20])}"
            f"{' …' if len(left_out) > 20 else ''}; compare the {len(common)} others with --allow-partial"
        )
    for one, found in zip(systems[1:], regions[1:], strict=True):
        changed = [key for key in common if _asked(found[key]) != _asked(regions[0][key])]
        if changed:
            raise ValueError(
                f"{one.system} and {systems[0].system} were asked different questions about {changed[0]!r}"
            )
    scored = [[found[key] for key in common] for found in regions]
    restricted = [
        replace(one, score=summarize(kept, sorted({*one.score.missing, *left_out})))
        for one, kept in zip(systems, scored, strict=True)
    ]
    return Comparison(restricted, _differences(restricted), left_out)


def _asked(region: RegionScore) -> list[tuple[str, list]]:
    """What was asked about a region, recognition left out, as its wording is the protocol's."""
    return [(row.question, row.choices) for row in region.questions]


def _differences(systems: Sequence[Results]) -> list[dict[str, Difference]]:
    """Every further system minus the first; the same images are drawn for all, which pairs the samples."""
    first, *others = systems
    first_samples = bootstrap_samples(first.score.regions)
    rows = []
    for one in others:
        samples = bootstrap_samples(one.score.regions)
        row = {}
        for column, name in DIFFERENCES.items():
            ours, theirs = getattr(one.score, name), getattr(first.score, name)
            bounds = interval(samples[name] - first_samples[name]) if first.score.num_images > 1 else None
            row[column] = Difference(None if ours is None or theirs is None else ours - theirs, bounds)
        rows.append(row)
    return rows


def comparison_markdown(comparison: Comparison, number: int | None = None) -> str:
    """The comparison as Markdown: scores, differences, a table by judges where there are several, and ours beside the
    paper's Table `number`."""
    systems = comparison.systems
    size = f"{systems[0].score.num_images} images, {systems[0].score.num_regions} regions"
    parts = [f"# Comparison on {systems[0].dataset} ({size})\n"]
    if comparison.left_out:
        parts.append(f"**Partial**: {len(comparison.left_out)} regions are not in all results and were left out.\n")
    rows = [[one.title, one.judge, *(cell_text(one.cells()[column]) for column in TABLE_2)] for one in systems]
    parts.append(markdown_table(["system", "judge", *TABLE_2], rows))
    first = f"{systems[0].title} (judge {systems[0].judge})"
    parts.append(f"Differences to {first}, with 95 % paired bootstrap intervals over images:\n")
    rows = [
        [one.title, one.judge, *(str(row[column]) for column in DIFFERENCES)]
        for one, row in zip(systems[1:], comparison.differences, strict=True)
    ]
    parts.append(markdown_table(["system", "judge", *DIFFERENCES], rows))
    if len({one.judge for one in systems}) > 1:
        parts.append("By judge, in the form of Table 8 of the paper:\n\n" + _by_judge(systems))
    if number is not None:
        columns = paper_table(number).columns
        ours = {
            f"{one.title}, judge {one.judge}": {name: value for name, value in one.cells().items() if name in columns}
            for one in systems
        }
        parts.append(beside_paper(number, ours))
    return "\n".join(parts)


def _by_judge(systems: Sequence[Results]) -> str:
    """Systems in rows, judges in columns; an empty cell where a system was not judged by a judge."""
    judges = list(dict.fromkeys(one.judge for one in systems))
    found = {(one.title, one.judge): one.cells() for one in systems}
    head = ["", *(f"{judge}: {column}" for judge in judges for column in HEADLINE)]
    rows = [
        [title, *(cell_text(found.get((title, judge), {}).get(column)) for judge in judges for column in HEADLINE)]
        for title in dict.fromkeys(one.title for one in systems)
    ]
    return markdown_table(head, rows)
