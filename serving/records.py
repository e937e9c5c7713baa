"""The record of a captioned region, in one schema for every door, and of the image it lies in.

`REGION_SCHEMA` is what `perceptiondlm annotate` writes as parquet, a row per region:

    id                 string       the image's id, "/", the region's number or its id in the source; unique
    image_id           string       the image's id: its path below the source, or the row's place or id
    image              string       where the image is: path, URL, or place in a table or shard
    width, height      int32        of the image in pixels
    segmentation       {size: [int32], counts: string}   COCO RLE, compressed; size is height, width
    box                [int32]      x0, y0, x1, y1 in pixels, half-open, tight around the mask
    caption            string
    score              float32      mean probability of the caption's tokens when they were committed, in [0, 1]
    tokens             [{token: string, confidence: float32}]   on demand, null otherwise; the last one ends the caption
    label              string       the region's name in the source or by its finder, null where there is none
    attributes         string       JSON object of answers, on demand, null otherwise
    start, end         float64      seconds of a video between which the caption holds, null for images
    model              string       name of the model
    settings           string       JSON object of the settings that were given

`IMAGE_SCHEMA` has a row per image that was read, also of those without regions, with the part of the run it was in.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from perceptiondlm.prompting_perceptiondlm import END_OF_TEXT, END_OF_TURN
from perceptiondlm.serving.found import FoundRegion


SEGMENTATION = pa.struct([("size", pa.list_(pa.int32())), ("counts", pa.string())])
TOKENS = pa.list_(pa.struct([("token", pa.string()), ("confidence", pa.float32())]))
REGION_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("image_id", pa.string(), nullable=False),
        ("image", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("segmentation", SEGMENTATION),
        ("box", pa.list_(pa.int32())),
        ("caption", pa.string()),
        ("score", pa.float32()),
        ("tokens", TOKENS),
        ("label", pa.string()),
        ("attributes", pa.string()),
        ("start", pa.float64()),
        ("end", pa.float64()),
        ("model", pa.string()),
        ("settings", pa.string()),
    ]
)
IMAGE_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        ("image", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("regions", pa.int32()),
        ("part", pa.int32()),
    ]
)


def region_record(
    image: Mapping[str, Any],
    key: str,
    region: FoundRegion,
    answer: Mapping[str, Any],
    model: str,
    settings: str,
    span: tuple[float, float] | None = None,
) -> dict[str, Any]:
    """The row of a captioned region.

    Args:
        image: `id`, `image`, `width` and `height` of its image.
        key: the region's number or id within its image.
        answer: `caption`, `score`, and where wanted `tokens` (see `caption_tokens`) and `attributes` (a dict).
        settings: JSON.
        span: seconds of a video.
    """
    attributes = answer.get("attributes")
    start, end = span or (None, None)
    return {
        "id": f"{image['id']}/{key}",
        "image_id": image["id"],
        "image": image["image"],
        "width": image["width"],
        "height": image["height"],
        "segmentation": region.mask,
        "box": list(region.box),
        "caption": answer["caption"],
        "score": answer["score"],
        "tokens": answer.get("tokens"),
        "label": region.label,
        "attributes": None if attributes is None else json.dumps(attributes, ensure_ascii=False),
        "start": start,
        "end": end,
        "model": model,
        "settings": settings,
    }


def caption_tokens(ids: Sequence[int], confidences: Sequence[float], tokenizer: Any) -> list[dict[str, Any]]:
    """The tokens of one answer up to the one that ends it, as text, each with its probability when it was committed.

    Args:
        ids, confidences: a row of `sequences` and of `confidences` of `generate`'s output.
    """
    ends = set(tokenizer.convert_tokens_to_ids([END_OF_TURN, END_OF_TEXT]))
    length = next((place for place, token in enumerate(ids) if token in ends), len(ids) - 1)
    return [
        {"token": tokenizer.decode([token]), "confidence": confidence}
        for token, confidence in zip(ids[: length + 1], confidences[: length + 1], strict=True)
    ]


def region_table(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Rows of `region_record` as a table."""
    return pa.Table.from_pylist(list(rows), schema=REGION_SCHEMA)


def read_records(path: Path) -> list[dict[str, Any]]:
    """All records of a parquet file, or of a folder that `perceptiondlm annotate` wrote."""
    files = sorted((path / "data").glob("*.parquet")) if path.is_dir() else [path]
    if not files:
        raise FileNotFoundError(
            f"{path} holds no data/*.parquet; accepted: a finished output of perceptiondlm annotate"
        )
    return [row for file in files for row in pq.read_table(file, schema=REGION_SCHEMA).to_pylist()]
