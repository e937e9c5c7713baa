"""A page for annotators: every image with its regions numbered, and the items about each, to lie beside the sheet."""

import base64
import io
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from PIL import ImageOps

from perceptiondlm.data_engine.benchmark.build import with_items
from perceptiondlm.data_engine.benchmark.curation import Curation
from perceptiondlm.data_engine.record import Record
from perceptiondlm.data_engine.stages.caption import region_key
from perceptiondlm.data_engine.views import outlined
from perceptiondlm.evaluation.reports.report import region_color


TEMPLATE = Path(__file__).with_name("items.html.jinja")
PICTURE_SIDE = 900  # pixels


def write_items_page(records: Sequence[Record], curation: Curation, path: Path) -> None:
    """Write the page; images that cannot be opened raise OSError or ValueError."""
    by_region: dict[str, list] = defaultdict(list)
    for item in curation.items.values():
        by_region[item.region_id].append(item)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    path.parent.mkdir(parents=True, exist_ok=True)
    template.stream(images=(_image(record, by_region) for record in records)).dump(str(path), encoding="utf-8")


def _image(record: Record, by_region: dict[str, list]) -> dict[str, Any]:
    """What the template shows of an image."""
    regions = with_items(record)
    picture = outlined(record.open(), [region.pixels() for region in regions])
    buffer = io.BytesIO()
    ImageOps.contain(picture, (PICTURE_SIDE, PICTURE_SIDE)).save(buffer, "JPEG", quality=85)
    return {
        "id": record.id,
        "picture": f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}",
        "regions": [
            {
                "number": number,
                "color": region_color(number),
                "key": region_key(record, region.id),
                "name": region.category,
                "asked": by_region[region_key(record, region.id)],
            }
            for number, region in enumerate(regions, start=1)
        ],
    }
