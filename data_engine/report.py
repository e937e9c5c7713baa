"""A page of what was kept and what was dropped, with pictures and reasons: self-contained, without scripts."""

import base64
import io
import random
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined
from PIL import Image

from perceptiondlm.common.drawing import draw_regions
from perceptiondlm.data_engine.record import Record, Region
from perceptiondlm.evaluation.benchmarks import crop


TEMPLATE = Path(__file__).with_name("report.html.jinja")
PICTURE_SIDE = 260  # pixels
KEPT = ("kept", "")


def write_page(records: Callable[[], Iterable[Record]], counts: dict[str, Any], path: Path, samples: int = 8) -> None:
    """Write the page.

    Args:
        records: gives the records anew.
        counts: see `output.statistics`.
        samples: shown of what is kept, and of every reason of every stage; drawn with a fixed seed.
    """
    chosen = _sample(records(), samples)
    groups = []
    for (stage, reason), places in sorted(chosen.items(), key=lambda item: item[0] != KEPT):
        number = counts["kept_regions"] if (stage, reason) == KEPT else counts["dropped"][stage][reason]
        groups.append({"stage": stage, "reason": reason, "number": number, "regions": [_shown(*p) for p in places]})
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    text = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(counts=counts, groups=groups)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _sample(records: Iterable[Record], most: int) -> dict[tuple[str, str], list[tuple[Record, Region]]]:
    """Up to `most` regions of every fate, each with the same chance (reservoir sampling)."""
    draw = random.Random(0)
    seen: dict[tuple[str, str], int] = defaultdict(int)
    chosen: dict[tuple[str, str], list[tuple[Record, Region]]] = defaultdict(list)
    for record in records:
        for region in record.regions:
            fate = KEPT if region.dropped is None else (region.dropped.stage, region.dropped.reason)
            seen[fate] += 1
            if len(chosen[fate]) < most:
                chosen[fate].append((record, region))
            elif (place := draw.randrange(seen[fate])) < most:
                chosen[fate][place] = (record, region)
    return dict(chosen)


def _shown(record: Record, region: Region) -> dict[str, Any]:
    """What the template shows of a region."""
    return {
        "id": f"{record.id} / {region.id}",
        "picture": _picture(record, region),
        "category": region.category,
        "caption": region.caption,
        "name": region.name,
        "detail": "" if region.dropped is None else region.dropped.detail,
        "facts": ", ".join(f"{name} {value}" for name, value in region.facts.items()),
    }


def _picture(record: Record, region: Region) -> str | None:
    """The region in its surroundings as a data URL; None where the image cannot be opened."""
    try:
        around, inside = crop(record.open(), region.pixels())
    except (OSError, ValueError):  # shown without; the stages have said so
        return None
    scale = PICTURE_SIDE / max(around.size)
    size = (max(1, round(around.width * scale)), max(1, round(around.height * scale)))
    mask = np.asarray(Image.fromarray(inside).resize(size, Image.Resampling.NEAREST))
    picture = around.resize(size, Image.Resampling.BILINEAR)
    if mask.any():
        picture = draw_regions(picture, [mask])
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
