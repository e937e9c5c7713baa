"""Reports of a run for people: Markdown, and one self-contained HTML page with pictures, captions and every answer.

Captions, questions and answers are data: the template escapes all of it, and the page's content security policy runs no
script but its own and loads nothing from elsewhere.
"""

import base64
import hashlib
import io
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined
from PIL import Image, ImageOps

from perceptiondlm.common.drawing import draw_regions
from perceptiondlm.common.palette import color_of
from perceptiondlm.evaluation.benchmarks import Benchmark, BenchmarkImage
from perceptiondlm.evaluation.reports.paper_tables import cell_text, markdown_table, paper_table
from perceptiondlm.evaluation.reports.results import HEADLINE, TABLE_2, Results, beside_table_2
from perceptiondlm.evaluation.scoring import QuestionScore, RegionScore


TEMPLATE = Path(__file__).with_name("report.html.jinja")
PICTURE_SIDE = 800  # longest side of an embedded picture, in pixels
JPEG_QUALITY = 82


def write_markdown(results: Results, path: Path) -> None:
    """Write scores, intervals and what was amiss as Markdown."""
    score = results.score
    lines = [f"# {results.title} on {results.dataset}\n", f"Judge: {results.judge}\n"]
    if score.missing:
        lines.append(f"**Partial**: {len(score.missing)} of the benchmark's regions were not scored.\n")
    lines += [f"- {line}" for line in results.issues.lines()]
    lines += ["", beside_table_2(results), markdown_table(["", "score", "95 % interval"], _interval_rows(results))]
    lines.append(markdown_table(["questions", "mean score"], [[k, f"{v:.1f}"] for k, v in score.per_subtype.items()]))
    if results.speed:
        lines.append(markdown_table(["efficiency", ""], [[k, f"{v:.3g}"] for k, v in results.speed.items()]))
    for title, facts in (("judging", results.judging), ("measured on", results.environment)):
        if facts:
            lines.append(markdown_table([title, ""], [[key, str(value)] for key, value in facts.items()]))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines), encoding="utf-8")


def _interval_rows(results: Results) -> list[list[str]]:
    rows = []
    for name in (*HEADLINE.values(), "recognition"):
        value, bounds = getattr(results.score, name), results.score.intervals.get(name)
        span = f"{bounds[0]:.1f} to {bounds[1]:.1f}" if bounds else ""
        rows.append([name, "" if value is None else f"{value:.1f}", span])
    return rows


def write_html(results: Results, benchmark: Benchmark, path: Path) -> None:
    """Write the page; pictures are drawn and embedded one by one, so memory stays flat.

    Args:
        benchmark: where pictures and masks come from; an image whose file is missing is shown without picture.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"hash": _script_hash, "signed": _signed, "cell": cell_text}
    environment.tests["failed"] = failed
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    regions = {region.region_id: region for region in results.score.regions}
    path.parent.mkdir(parents=True, exist_ok=True)
    stream = template.stream(
        results=results,
        intervals=_interval_rows(results),
        table=_table(results),
        kinds=Counter(_kind(question) for region in regions.values() for question in region.questions),
        kind=_kind,
        counts={
            "failed": sum(any(map(failed, region.questions)) or not region.recognized for region in regions.values()),
            "unrecognized": sum(not region.recognized for region in regions.values()),
            "empty": sum(not region.caption.strip() for region in regions.values()),
        },
        images=_images(benchmark, regions),
    )
    stream.dump(str(path), encoding="utf-8")


def failed(question: QuestionScore) -> bool:
    """Whether a question brought nothing or cost something."""
    return question.score <= 0


def _kind(question: QuestionScore) -> str:
    return question.subtype or question.type


def _table(results: Results) -> dict[str, Any]:
    """Table 2 with our row, for the page."""
    table = paper_table(2)
    if results.dataset not in ("paradlc", "dlc"):
        return {"columns": TABLE_2, "rows": {}, "ours": list(results.cells().values())}
    prefix = "" if results.dataset == "paradlc" else "DLC "
    ours = {f"{prefix}{name}": value for name, value in results.cells().items() if f"{prefix}{name}" in table.columns}
    return {"columns": table.columns, "rows": table.rows, "ours": table.cells(ours)}


def _images(benchmark: Benchmark, regions: Mapping[str, RegionScore]) -> Iterator[dict[str, Any]]:
    """What the template shows of each image that has scored regions."""
    for image in benchmark.images:
        scored = [regions[region.region_id] for region in image.regions if region.region_id in regions]
        if scored:
            class_names = {region.region_id: region.class_name for region in image.regions}
            picture = embedded_picture(image, set(regions)) if image.path.is_file() else None
            yield {
                "image_id": image.image_id,
                "file": image.path.name,
                "picture": picture,
                "regions": [
                    {
                        "number": number,
                        "color": region_color(number),
                        "class_name": class_names[one.region_id],
                        "score": one,
                    }
                    for number, one in enumerate(scored, start=1)
                ],
            }


def embedded_picture(image: BenchmarkImage, shown: set[str]) -> str:
    """The image with its numbered regions as a data URL."""
    picture = ImageOps.contain(image.open(), (PICTURE_SIDE, PICTURE_SIDE))
    masks = [_resized(region.mask(), picture.size) for region in image.regions if region.region_id in shown]
    buffer = io.BytesIO()
    draw_regions(picture, masks).save(buffer, "JPEG", quality=JPEG_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _resized(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The mask at another size (width, height); a tiny one keeps at least a pixel."""
    share = np.asarray(Image.fromarray(mask.astype(np.float32)).resize(size, Image.Resampling.BOX))
    return share >= min(0.5, share.max())


def region_color(number: int) -> str:
    """The colour of a region's number, as it is drawn."""
    return f"#{bytes(color_of(number - 1)).hex()}"


def _signed(score: float) -> str:
    """A question's score as shown: +1, +½, 0, -1."""
    return "+½" if score == 0.5 else f"{score:+g}" if score else "0"


def _script_hash(script: str) -> str:
    """A script's source expression in a content security policy."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
