"""A contact sheet of a finished run: some of its images with their regions drawn and captioned, on one page."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from perceptiondlm.common.drawing import draw_regions
from perceptiondlm.images_perceptiondlm import load_image
from perceptiondlm.serving.annotate.job import AnnotationJob
from perceptiondlm.serving.annotate.plan import Plan
from perceptiondlm.serving.annotate.results import image_rows, images_with_regions
from perceptiondlm.serving.annotate.sources import load_part


COLUMNS = 3
SIDE = 640  # longest side of a picture on the sheet, before its captions, in pixels
GAP = 12
MOST_REGIONS = 8  # drawn of a picture


def contact_sheet(plan: Plan, job: AnnotationJob, count: int) -> Path | None:
    """Draw `count` images, spread evenly over those with regions, to `preview.jpg`; None where there is none."""
    filled = [image["id"] for image in image_rows(plan.folder) if image["regions"]]
    if not filled:
        return None
    count = min(count, len(filled))
    chosen = {filled[(2 * place + 1) * len(filled) // (2 * count)] for place in range(count)}
    pictures = []
    for image, rows in images_with_regions(plan.folder):
        if image["id"] in chosen:
            pictures.append(drawn(picture_of(plan, job, image), rows[:MOST_REGIONS]))
    target = plan.folder / "preview.jpg"
    sheet(pictures).save(target, quality=90)
    return target


def picture_of(plan: Plan, job: AnnotationJob, image: dict[str, Any]) -> Image.Image:
    """The picture of an image, read again from the source."""
    for loaded in load_part(plan.part(image["part"]), job):
        if loaded.id == image["id"]:
            return load_image(loaded.image, image["id"], job.exif)
    raise ValueError(f"{image['id']} is no longer in part {image['part']}: the source has changed")


def drawn(picture: Image.Image, rows: Sequence[dict[str, Any]]) -> Image.Image:
    """A picture with its regions and captions, captions included at most twice as wide as `SIDE`."""
    made = draw_regions(picture, [row["segmentation"] for row in rows], [row["caption"] for row in rows])
    made.thumbnail((2 * SIDE, 2 * SIDE), Image.Resampling.LANCZOS)
    return made


def sheet(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures in rows of a few, on white."""
    rows = [pictures[start : start + COLUMNS] for start in range(0, len(pictures), COLUMNS)]
    widths = [sum(picture.width + GAP for picture in row) + GAP for row in rows]
    heights = [max(picture.height for picture in row) + GAP for row in rows]
    page = Image.new("RGB", (max(widths), sum(heights) + GAP), "white")
    top = GAP
    for row, height in zip(rows, heights, strict=True):
        left = GAP
        for picture in row:
            page.paste(picture, (left, top))
            left += picture.width + GAP
        top += height
    return page
