"""Reports of captions of named regions for people: a table for the terminal and one self-contained HTML page."""

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined
from PIL import Image, ImageOps

from perceptiondlm.common.drawing import draw_regions
from perceptiondlm.evaluation.photos.annotations import NamedPicture
from perceptiondlm.evaluation.photos.scoring import RegionResult
from perceptiondlm.evaluation.reports.report import region_color


TEMPLATE = Path(__file__).with_name("report.html.jinja")
PICTURE_SIDE = 800  # longest side of an embedded picture, in pixels
COLUMNS = {"regions": "regions", "right": "right", "general": "general", "wrong": "wrong"}
EITHER = "right_or_general"


def table_lines(report: Mapping[str, Any]) -> list[str]:
    """The report's numbers for a terminal: verdicts in percent of regions, baselines below, then calibration."""
    width = max(map(len, (*report["shares"], *report["baselines"], ""))) + 2
    lines = [f"{report['dataset']}: {report['num_pictures']} pictures, {report['num_regions']} regions"]
    head = (*COLUMNS.values(), "right or general")
    lines.append(" " * width + "".join(f"{name:>{max(10, len(name) + 2)}s}" for name in head))
    for name, row in (*report["shares"].items(), *report["baselines"].items()):
        cells = [f"{row['regions']:>10d}"] + [_percent(row[key]).rjust(10) for key in ("right", "general", "wrong")]
        lines.append(name.ljust(width) + "".join(cells) + _percent(row[EITHER]).rjust(18))
    for what in ("colours", "sizes", "places"):
        if report[f"{what}_right"] is not None:
            naming = f"{report[f'captions_with_{what}']:.1f} % of captions that name any"
            lines.append(f"{what} right: {report[f'{what}_right']:.1f} % of the {naming}")
    if calibration := report["calibration"]:
        lines.append(f"confidence: expected calibration error {calibration['expected_error']:.3f}; mean score: true")
        lines += [f"  {one['score']:.2f}: {one['true']:.2f} ({one['regions']} regions)" for one in calibration["bins"]]
        slope, intercept = calibration["fit"]
        lines.append(f"a processor's score_calibration to these regions: [{slope:.3f}, {intercept:.3f}]")
        if (error := calibration["error_when_fitted"]) is not None:
            lines.append(f"error where every second picture is calibrated on the others: {error:.3f}")
    return lines


def write_page(
    report: Mapping[str, Any], results: Sequence[RegionResult], pictures: Sequence[NamedPicture], path: Path
) -> None:
    """Write the page; pictures are drawn and embedded one by one, so memory stays flat.

    Args:
        results: of all pictures' regions, in their order.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["percent"] = _percent
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    path.parent.mkdir(parents=True, exist_ok=True)
    template.stream(report=report, images=_images(results, pictures)).dump(str(path), encoding="utf-8")


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _images(results: Sequence[RegionResult], pictures: Sequence[NamedPicture]) -> Iterator[dict[str, Any]]:
    start = 0
    for picture in pictures:
        regions = results[start : start + len(picture.regions)]
        start += len(picture.regions)
        yield {
            "file": picture.path.name,
            "credit": picture.credit,
            "picture": _data_url(picture),
            "regions": [
                {"number": number, "color": region_color(number), "result": one}
                for number, one in enumerate(regions, start=1)
            ],
        }


def _data_url(picture: NamedPicture) -> str:
    """The picture with its numbered regions."""
    image, masks = picture.read()
    small = ImageOps.contain(image, (PICTURE_SIDE, PICTURE_SIDE))
    shares = [np.asarray(Image.fromarray(m.astype(np.float32)).resize(small.size, Image.Resampling.BOX)) for m in masks]
    buffer = io.BytesIO()
    draw_regions(small, [share >= min(0.5, share.max()) for share in shares]).save(buffer, "JPEG", quality=82)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
