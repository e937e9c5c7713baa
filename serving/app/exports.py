"""What a visitor takes home: the picture with its captions, COCO JSON, and Python that does the same."""

import pprint
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from perceptiondlm.common.drawing import draw_regions
from perceptiondlm.common.json_files import write_json
from perceptiondlm.serving.app.session import MarkedRegion, Session


SCRIPT = '''\
"""Captions of {image_name}, as on the page."""

from PIL import Image
{imports}


image = Image.open({image_name!r})
masks = {masks}

{loading}
for region in pipe(image, masks=masks, exif="applied", {settings}):
    print(f"{{region['score']:.2f}}  {{region['caption']}}")
'''
REPOSITORY = """\
pipe = pipeline("region-captioning", model={model!r}, trust_remote_code=True)"""
SUBFOLDER = """\
where = {{"subfolder": {subfolder!r}, "trust_remote_code": True}}
model = AutoModelForImageTextToText.from_pretrained({model!r}, **where)
processor = AutoProcessor.from_pretrained({model!r}, **where)
pipe = pipeline("region-captioning", model=model, processor=processor, trust_remote_code=True)"""


def export_png(session: Session) -> Path:
    """The picture with numbered regions and their captions."""
    regions = captioned(session)
    assert session.image is not None  # there are captions
    picture = draw_regions(
        session.image,
        [region.found.mask for region in regions],
        [caption_of(region) for region in regions],
        numbers=[region.number for region in regions],
    )
    path = named(session, "-captions.png")
    picture.save(path)
    return path


def export_coco(session: Session) -> Path:
    """COCO JSON: one image, an annotation per region with `caption`, `score` and `token_confidences` beside COCO's."""
    regions = captioned(session)
    assert session.image is not None and session.captioner is not None  # noqa: PT018 - there are captions
    width, height = session.image.size
    names = sorted({region.found.label or "region" for region in regions})
    content = {
        "info": {
            "description": "Regions and captions of PerceptionDLM",
            "model": session.captioner.name,
            "settings": session.settings,
            "date_created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        },
        "images": [{"id": 1, "file_name": session.image_name, "width": width, "height": height}],
        "categories": [{"id": place, "name": name} for place, name in enumerate(names, start=1)],
        "annotations": [annotation(region, names.index(region.found.label or "region") + 1) for region in regions],
    }
    path = named(session, "-captions.json")
    write_json(path, content)
    return path


def annotation(region: MarkedRegion, category: int) -> dict[str, Any]:
    """A region as a COCO annotation; `bbox` is x, y, width, height."""
    assert region.caption is not None  # captioned
    x0, y0, x1, y1 = (int(edge) for edge in region.found.box)
    return {
        "id": region.number,
        "image_id": 1,
        "category_id": category,
        "segmentation": region.found.mask,
        "area": region.found.area,
        "bbox": [x0, y0, x1 - x0, y1 - y0],
        "iscrowd": 0,
        "caption": region.caption.text,
        "score": region.caption.score,
        "token_confidences": [round(value, 4) for value in region.caption.tokens],
    }


def python_code(session: Session) -> str:
    """A script that captions the same regions with the same model and settings; the image lies beside it."""
    assert session.captioner is not None  # there are captions
    model, subfolder = session.captioner.place
    names = ["pipeline"] if subfolder is None else ["AutoModelForImageTextToText", "AutoProcessor", "pipeline"]
    loading = (REPOSITORY if subfolder is None else SUBFOLDER).format(model=model, subfolder=subfolder)
    return SCRIPT.format(
        image_name=session.image_name,
        imports=f"from transformers import {', '.join(names)}",
        masks=pprint.pformat([region.found.mask for region in session.regions], width=118, sort_dicts=False),
        loading=loading,
        settings=", ".join(f"{name}={value!r}" for name, value in session.settings.items()),
    )


def captioned(session: Session) -> list[MarkedRegion]:
    """The regions with captions; refused where there is none."""
    if not session.captioned:
        raise ValueError("there is no caption to export yet: mark regions and caption them")
    return session.captioned


def caption_of(region: MarkedRegion) -> str:
    """The text of a finished caption."""
    assert region.caption is not None and region.caption.text is not None  # noqa: PT018 - captioned
    return region.caption.text


def named(session: Session, ending: str) -> Path:
    """A file of the session, named after its picture."""
    return session.folder / f"{Path(session.image_name).stem}{ending}"
