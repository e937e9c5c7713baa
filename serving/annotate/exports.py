"""A finished run in the formats that people load next: COCO, FiftyOne, CVAT, Label Studio. Written image by image.

OUT/exports/coco.json                 COCO with a "caption" and a "score" in every annotation
OUT/exports/fiftyone/                 labels.json and data.json, a COCODetectionDataset
OUT/exports/cvat.xml                  "CVAT for images 1.1": masks with the attributes caption and score
OUT/exports/label_studio.json         tasks with pre-annotations: brushes, each with its caption
OUT/exports/spans.json                of videos: a list of {"video", "spans"}, as `perceptiondlm caption --json` has it
"""

import json
import os
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any
from xml.sax.saxutils import escape, quoteattr

import numpy as np
from pycocotools import mask as coco_mask

from perceptiondlm.common.region_files.label_studio import encode_brush
from perceptiondlm.serving.annotate.plan import Plan
from perceptiondlm.serving.annotate.results import image_rows, images_with_regions, region_rows
from perceptiondlm.serving.spans import merge_spans


UNNAMED = "region"  # category of a region without a label
DIGITS = 4  # of scores in text


def export(folder: Path, names: list[str]) -> list[Path]:
    """Write a finished run's exports; returns the files to load."""
    target = folder / "exports"
    target.mkdir(exist_ok=True)
    return [EXPORTS[name](folder, target) for name in names]


def written(path: Path, pieces: Iterator[str]) -> Path:
    """Write text piece by piece; the file is there when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    with part.open("w", encoding="utf-8") as stream:
        stream.writelines(pieces)
    os.replace(part, path)
    return path


def listed(entries: Iterator[Any]) -> Iterator[str]:
    """Entries as the inside of a JSON list."""
    before = "\n"
    for entry in entries:
        yield before + json.dumps(entry, ensure_ascii=False)
        before = ",\n"


def labels_of(folder: Path) -> list[str]:
    """Names of all categories."""
    return sorted({row["label"] or UNNAMED for row in region_rows(folder)})


# --- COCO -------------------------------------------------------------------------------------------------------------


def export_coco(folder: Path, target: Path) -> Path:
    """COCO JSON; images and annotations are numbered from 1, `region_id` and `image_key` are the records' ids."""
    return written(target / "coco.json", coco_pieces(folder, lambda image: image["image"]))


def coco_pieces(folder: Path, file_name: Callable[[dict[str, Any]], str]) -> Iterator[str]:
    """A COCO file in pieces."""
    labels = {label: number for number, label in enumerate(labels_of(folder), start=1)}
    categories = [{"id": number, "name": label} for label, number in labels.items()]
    yield '{"info": {"description": "perceptiondlm annotate"}, "categories": ' + json.dumps(categories)
    yield ', "images": ['
    yield from listed(
        {"id": number, "file_name": file_name(image), "width": image["width"], "height": image["height"],
         "image_key": image["id"]}
        for number, image in enumerate(image_rows(folder), start=1)
    )  # fmt: skip
    yield '], "annotations": ['
    yield from listed(coco_annotations(folder, labels))
    yield "]}\n"


def coco_annotations(folder: Path, labels: dict[str, int]) -> Iterator[dict[str, Any]]:
    """The annotations of a COCO file."""
    number = 0
    for image_number, (_, rows) in enumerate(images_with_regions(folder), start=1):
        for row in rows:
            number += 1
            x0, y0, x1, y1 = row["box"]
            extra = {} if row["attributes"] is None else {"attributes": json.loads(row["attributes"])}
            yield {
                "id": number,
                "image_id": image_number,
                "category_id": labels[row["label"] or UNNAMED],
                "segmentation": row["segmentation"],
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "area": int(coco_mask.area(row["segmentation"])),
                "iscrowd": 0,
                "caption": row["caption"],
                "score": round(row["score"], DIGITS),
                "region_id": row["id"],
            } | extra


# --- FiftyOne ---------------------------------------------------------------------------------------------------------


def export_fiftyone(folder: Path, target: Path) -> Path:
    """A COCODetectionDataset: labels, and where each picture lies. Load it with `extra_attrs=True` for the captions."""
    place = target / "fiftyone"
    names = {image["id"]: str(Path(image["image"]).absolute()) for image in image_rows(folder)}
    written(place / "data.json", iter([json.dumps(names, ensure_ascii=False, indent=1) + "\n"]))
    written(place / "labels.json", coco_pieces(folder, lambda image: image["id"]))
    return place


# --- CVAT -------------------------------------------------------------------------------------------------------------


def export_cvat(folder: Path, target: Path) -> Path:
    """'CVAT for images 1.1': masks as run lengths inside their boxes, row by row."""
    return written(target / "cvat.xml", cvat_pieces(folder))


def cvat_pieces(folder: Path) -> Iterator[str]:
    attributes = "".join(
        f"<attribute><name>{name}</name><mutable>False</mutable><input_type>text</input_type><default_value/><values/>"
        "</attribute>"
        for name in ("caption", "score")
    )
    labels = "".join(
        f"<label><name>{escape(label)}</name><type>mask</type><attributes>{attributes}</attributes></label>"
        for label in labels_of(folder)
    )
    yield f'<?xml version="1.0" encoding="utf-8"?>\n<annotations>\n<version>1.1</version>\n<meta><job><labels>{labels}'
    yield "</labels></job></meta>\n"
    for number, (image, rows) in enumerate(images_with_regions(folder)):
        name = quoteattr(clean(image["id"]))
        yield f'<image id="{number}" name={name} width="{image["width"]}" height="{image["height"]}">\n'
        yield from map(cvat_mask, rows)
        yield "</image>\n"
    yield "</annotations>\n"


def cvat_mask(row: dict[str, Any]) -> str:
    """A mask element: runs of its box, background first."""
    x0, y0, x1, y1 = row["box"]
    crop = coco_mask.decode(row["segmentation"])[y0:y1, x0:x1].astype(bool).ravel()
    turns = np.flatnonzero(np.diff(crop)) + 1
    runs = np.diff(turns, prepend=0, append=crop.size).tolist()
    runs = [0, *runs] if crop[0] else runs
    place = f'left="{x0}" top="{y0}" width="{x1 - x0}" height="{y1 - y0}"'
    label = quoteattr(clean(row["label"] or UNNAMED))
    return (
        f'<mask label={label} source="auto" occluded="0" z_order="0" rle="{", ".join(map(str, runs))}" {place}>'
        f'<attribute name="caption">{escape(clean(row["caption"]))}</attribute>'
        f'<attribute name="score">{row["score"]:.{DIGITS}f}</attribute></mask>\n'
    )


def clean(text: str) -> str:
    """Text without the control characters that XML has no form for."""
    return "".join(letter for letter in text if letter >= " " or letter in "\t\n")


# --- Label Studio -----------------------------------------------------------------------------------------------------


def export_label_studio(folder: Path, target: Path) -> Path:
    """Tasks with pre-annotations. The labelling configuration that fits stands beside them."""
    labels = "".join(f"\n    <Label value={quoteattr(clean(label))}/>" for label in labels_of(folder))
    config = (
        f'<View>\n  <Image name="image" value="$image"/>\n  <BrushLabels name="tag" toName="image">{labels}\n'
        '  </BrushLabels>\n  <TextArea name="caption" toName="image" perRegion="true" editable="true"/>\n</View>\n'
    )
    written(target / "label_studio.xml", iter([config]))
    return written(target / "label_studio.json", label_studio_pieces(folder))


def label_studio_pieces(folder: Path) -> Iterator[str]:
    yield "["
    yield from listed(label_studio_task(image, rows) for image, rows in images_with_regions(folder))
    yield "]\n"


def label_studio_task(image: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A task: the picture, and a prediction of brushes with their captions."""
    results: list[dict[str, Any]] = []
    size = {"original_width": image["width"], "original_height": image["height"], "image_rotation": 0}
    for row in rows:
        shared = {"id": row["id"], "to_name": "image", "score": round(row["score"], DIGITS), **size}
        mask = coco_mask.decode(row["segmentation"]).astype(bool)
        brush = {"format": "rle", "rle": encode_brush(mask), "brushlabels": [row["label"] or UNNAMED]}
        results.append({**shared, "from_name": "tag", "type": "brushlabels", "value": brush})
        results.append({**shared, "from_name": "caption", "type": "textarea", "value": {"text": [row["caption"]]}})
    mean = sum(row["score"] for row in rows) / max(len(rows), 1)
    prediction = {"model_version": rows[0]["model"] if rows else "", "score": round(mean, DIGITS), "result": results}
    name = image["image"] if "://" in image["image"] else PurePosixPath(image["image"]).as_posix()
    return {"data": {"image": name, "id": image["id"]}, "predictions": [prediction] if rows else []}


# --- time spans -------------------------------------------------------------------------------------------------------


def export_spans(folder: Path, target: Path) -> Path:
    """Videos with the spans of their objects; consecutive key frames with one caption are one span."""
    return written(target / "spans.json", span_pieces(folder))


def span_pieces(folder: Path) -> Iterator[str]:
    yield "["
    videos = groupby(looks_of(folder), key=lambda look: look[0])
    yield from listed({"video": video, "spans": merge_spans(look for _, look in looks)} for video, looks in videos)
    yield "]\n"


def looks_of(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every record of a run on videos with its video's path, as an entry of `merge_spans`."""
    plan = Plan.open(folder)
    for number, images in groupby(images_with_regions(folder), key=lambda pair: pair[0]["part"]):
        shots = {f"frame{entry['frame']:06d}": entry for entry in plan.part(number)["frames"]}
        for image, rows in images:
            entry = shots[image["id"].rpartition("/")[2]]
            shared = {"frame": entry["frame"], "shot": entry["shot"], "frames": [entry["frame"]]}
            for row in rows:
                name = row["id"].removeprefix(f"{image['id']}/")
                kept = {key: row[key] for key in ("start", "end", "caption", "score", "box")}
                yield image["image"], {"object": name, **kept, **shared}


SPANS = "spans"  # name of the export that videos alone have
EXPORTS: dict[str, Callable[[Path, Path], Path]] = {
    "coco": export_coco,
    "fiftyone": export_fiftyone,
    "cvat": export_cvat,
    "label-studio": export_label_studio,
    SPANS: export_spans,
}
