"""Captions of several systems side by side, right and wrong marked by the judge's answers (the paper's figure 6)."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from perceptiondlm.evaluation.benchmarks import Benchmark
from perceptiondlm.evaluation.reports.compare import Comparison
from perceptiondlm.evaluation.reports.marks import marked
from perceptiondlm.evaluation.reports.report import embedded_picture, region_color
from perceptiondlm.evaluation.reports.statements import statement
from perceptiondlm.evaluation.scoring import RegionScore


TEMPLATE = Path(__file__).with_name("side_by_side.html.jinja")


def write_side_by_side(comparison: Comparison, benchmark: Benchmark, path: Path) -> None:
    """Write the page; pictures are embedded, one by one. An image whose file is missing is shown without picture.

    Args:
        comparison: systems scored on the same regions, see `compare.compare`.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    systems = [{region.region_id: region for region in one.score.regions} for one in comparison.systems]
    titles = [f"{one.title} (judge {one.judge})" for one in comparison.systems]
    path.parent.mkdir(parents=True, exist_ok=True)
    stream = template.stream(
        titles=titles,
        averages=[one.cells()["Avg"] for one in comparison.systems],
        dataset=comparison.systems[0].dataset,
        left_out=len(comparison.left_out),
        images=_images(benchmark, systems),
    )
    stream.dump(str(path), encoding="utf-8")


def _images(benchmark: Benchmark, systems: Sequence[Mapping[str, RegionScore]]) -> Iterator[dict[str, Any]]:
    """What the template shows of every image with compared regions."""
    for image in benchmark.images:
        shown = [region for region in image.regions if region.region_id in systems[0]]
        if shown:
            picture = embedded_picture(image, {region.region_id for region in shown}) if image.path.is_file() else None
            yield {
                "image_id": image.image_id,
                "picture": picture,
                "regions": [
                    {
                        "number": number,
                        "color": region_color(number),
                        "class_name": region.class_name,
                        "region_id": region.region_id,
                        "systems": [_system(regions[region.region_id]) for regions in systems],
                    }
                    for number, region in enumerate(shown, start=1)
                ],
            }


def _system(region: RegionScore) -> dict[str, Any]:
    """A system's caption of a region, marked, and what the judge found in it."""
    statements = [statement(row) for row in region.questions]
    return {
        "pieces": marked(region.caption, statements),
        "recognized": region.recognized,
        "score": round(100 * region.score),
        "wrong": [one.text for one in statements if one.verdict == "wrong"],
        "right": sum(one.verdict == "right" for one in statements),
        "avoided": sum(one.verdict == "avoided" for one in statements),
    }
