"""An image of a source with what the source says of its regions, before anything is read."""

from dataclasses import dataclass, field
from typing import Any

from perceptiondlm.common.region_files.entry import few
from perceptiondlm.serving.annotate.job import AnnotationJob


PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif")


@dataclass
class LoadedImage:
    """An image on its way through a run.

    Attributes:
        id: unique within the run; survives every step.
        name: where it is, for people: path, URL, or place in a table or shard.
        image: what `load_image` takes.
        regions: in a form that `regions_of` takes; None where a segmenter finds them.
        files: files that hold the regions instead.
        keys, labels: names of the regions, where the source has them.
        spans: seconds of a video that the regions speak for.
        error: what was wrong with its entry, where it could not even be looked up.
    """

    id: str
    name: str
    image: Any = None
    regions: Any = None
    files: list[str] = field(default_factory=list)
    keys: list[str] | None = None
    labels: list[str | None] | None = None
    spans: list[tuple[float, float]] | None = None
    error: str | None = None


def from_row(row: dict[str, Any], place: str, job: AnnotationJob, folder: str = "") -> LoadedImage:
    """The image of a table's row or a shard's sample.

    Args:
        row: columns, or extensions, to values.
        place: the row's name, unique within the source; its id unless a column holds one.
        folder: stands before relative paths.
    """
    identity = pick(row, job.columns["id"]) if "id" in job.columns else place
    loaded = LoadedImage(str(identity), place)
    try:
        image = pick(row, job.columns["image"])
        if isinstance(image, dict) and image.get("bytes") is None and isinstance(image.get("path"), str):
            image = image["path"]
        if isinstance(image, str) and "://" not in image and not image.startswith(("/", "data:")):
            image = f"{folder}{image}"
        loaded.image = image
        loaded.name = image if isinstance(image, str) and not image.startswith("data:") else place
        if job.regions.where == "column":
            assert job.regions.name is not None  # a column was named
            loaded.regions = as_boxes(pick(row, job.regions.name), job)
            if loaded.regions is None:
                loaded.regions = []
        if "label" in job.columns:
            labels = pick(row, job.columns["label"])
            loaded.labels = [None if label is None else str(label) for label in labels]
    except (KeyError, TypeError, ValueError) as error:
        loaded.error = f"{place}: {error.args[0] if error.args else error}"
    return loaded


def pick(row: Any, name: str) -> Any:
    """The value of a column; dots lead into its fields, as in `objects.bbox`."""
    value = row
    for part in [name] if isinstance(row, dict) and name in row else name.split("."):
        if not isinstance(value, dict) or part not in value:
            known = few(sorted(map(str, value))) if isinstance(value, dict) else type(value).__name__
            raise KeyError(f"there is no column {name} (found: {known})")
        value = value[part]
    return value


def as_boxes(value: Any, job: AnnotationJob) -> Any:
    """Boxes of a column with corners instead of sizes; everything else as it is."""
    if job.regions.form != "boxes" or job.regions.box_format != "xywh" or value is None:
        return value
    return [[x, y, x + width, y + height] for x, y, width, height in value]
