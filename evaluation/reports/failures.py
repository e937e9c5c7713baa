"""Failures by class, as the paper's figure 7 shows them, counted from judged answers.

a. Entanglement: a salient negative is asserted that speaks of another evaluated region of the image (its wording has
   that region's class; in the drawn world all are made of other regions). Those of the background are counted apart.
b. Tiny: it covers less than `tiny` of the image, and is not recognised or something wrong is said of it.
c. Absent parts: a negative part is asserted.
d. Text: something wrong is said about what is written on it.

A region may fail in several ways. Scores count as they were before unrecognised regions are capped.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from perceptiondlm.evaluation.benchmark_stats import area_share
from perceptiondlm.evaluation.benchmarks import Benchmark
from perceptiondlm.evaluation.reports.paper_tables import markdown_table
from perceptiondlm.evaluation.reports.statements import content_words, is_about_text, statement, worst_choice
from perceptiondlm.evaluation.scoring import QuestionScore, RegionScore


TINY = 0.003  # share of the image
CLASSES = {
    "a": "cross-region attribute entanglement",
    "b": "tiny regions",
    "c": "typical but absent parts",
    "d": "fine-grained text",
}


@dataclass(frozen=True)
class Failure:
    """A failure: its class, region, caption, and the statement that the judge found in it."""

    kind: str
    region_id: str
    caption: str
    statement: str


def count_failures(regions: Sequence[RegionScore], benchmark: Benchmark, tiny: float = TINY) -> dict[str, Any]:
    """Failures of a system.

    Args:
        regions: judged, see `scoring.BenchmarkScore.regions`.
        benchmark: what was asked; pictures are not needed.
        tiny: share of the image below which a region is tiny.

    Returns:
        `regions`; per class `regions` that fail so, `share` of all in percent, `asked` (regions that could: with such
        questions, or tiny) and `share_of_asked`; `background`: regions that assert a salient negative of no other
        evaluated region; `failing`: regions with any failure of the kinds counted for b; `failures`: every one.

    Raises:
        ValueError: a region is not in the benchmark, or `tiny` no share.
    """
    if not 0 < tiny <= 1:
        raise ValueError(f"tiny must be a share in (0, 1], got {tiny}")
    shares = {region.region_id: area_share(region) for region in benchmark.regions}
    if unknown := sorted(region.region_id for region in regions if region.region_id not in shares):
        raise ValueError(f"{len(unknown)} judged regions are not in the benchmark, such as {unknown[0]}")
    others = _other_classes(benchmark)
    failures: list[Failure] = []
    asked: dict[str, set[str]] = {kind: set() for kind in CLASSES}
    background, failing = set(), set()
    for region in regions:
        name, wrong = region.region_id, []
        for row in region.questions:
            kind = _kind_of(row, others[name])
            if kind in asked:
                asked[kind].add(name)
            if row.raw_score < 0:
                wrong.append((kind, statement(row).text))
                background |= {name} if kind == "background" else set()
        failures += [Failure(kind, name, region.caption, text) for kind, text in wrong if kind in CLASSES]
        failing |= {name} if wrong or not region.recognized else set()
        if shares[name] < tiny:
            asked["b"].add(name)
            if name in failing:
                text = wrong[0][1] if wrong else "the object is not recognised"
                failures.append(Failure("b", name, region.caption, text))
    return {
        "regions": len(regions),
        "failing": len(failing),
        "background": len(background),
        "tiny": tiny,
        "classes": {kind: _counts(kind, failures, asked[kind], len(regions)) for kind in CLASSES},
        "failures": [vars(failure) for failure in failures],
    }


def _counts(kind: str, failures: Sequence[Failure], asked: set[str], total: int) -> dict[str, Any]:
    found = {failure.region_id for failure in failures if failure.kind == kind}
    return {
        "name": CLASSES[kind],
        "regions": len(found),
        "share": 100 * len(found) / total if total else None,
        "asked": len(asked),
        "share_of_asked": 100 * len(found) / len(asked) if asked else None,
    }


def _other_classes(benchmark: Benchmark) -> dict[str, list[frozenset[str]]]:
    """Per region the words of the class names of the other regions of its image."""
    return {
        region.region_id: [content_words(other.class_name) for other in image.regions if other is not region]
        for image in benchmark.images
        for region in image.regions
    }


def _kind_of(row: QuestionScore, others: Sequence[frozenset[str]]) -> str | None:
    """The class of a failure of a question: a, c, d, "background" for a salient negative of no region, or None."""
    if row.subtype == "salient negative":
        return "a" if _speaks_of(row, others) else "background"
    if is_about_text(row):
        return "d"
    return "c" if row.subtype == "negative part" else None


def _speaks_of(row: QuestionScore, others: Sequence[frozenset[str]]) -> bool:
    """Whether a salient negative is about another evaluated region: by its class in the wording, all words of it.

    In the drawn world all salient negatives are made of the other regions.
    """
    if row.query:
        return True
    words = {word.removesuffix("s") for word in content_words(worst_choice(row))}
    return any(name and {word.removesuffix("s") for word in name} <= words for name in others)


def failures_markdown(systems: Mapping[str, Mapping[str, Any]], examples: int = 3) -> str:
    """Failures of systems side by side, with a few examples of each class.

    Args:
        systems: name -> `count_failures`.
    """
    head = ["class", *(f"{name}: {column}" for name in systems for column in ("regions", "of those asked"))]
    rows = []
    for kind, title in CLASSES.items():
        cells = [f"{kind}) {title}"]
        for found in systems.values():
            one = found["classes"][kind]
            share = "" if one["share_of_asked"] is None else f"{one['share_of_asked']:.1f} % of {one['asked']}"
            cells += [str(one["regions"]), share]
        rows.append(cells)
    parts = [markdown_table(head, rows)]
    for name, found in systems.items():
        lines = [
            f"{name}: {found['failing']} of {found['regions']} regions fail; tiny is below {100 * found['tiny']:g} %"
        ]
        lines.append(f"salient negatives of the background are asserted for {found['background']} regions")
        for kind in CLASSES:
            shown = [failure for failure in found["failures"] if failure["kind"] == kind][:examples]
            lines += [f"  {kind}) {one['region_id']}: {one['caption']!r}: {one['statement']}" for one in shown]
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)
