"""What a run is asked to do, as one object that travels to every worker."""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


FORMS = ("masks", "boxes", "label_map")
BOX_FORMATS = ("xyxy", "xywh")
HOW = ("out", "device", "regions_per_batch", "images_per_part", "retry")  # fields that say how it is done, not what
WITHOUT_MODEL = (None, "none", "classical")  # segmenters that readers run; others need a device


@dataclass(frozen=True)
class RegionChoice:
    """Where the regions come from.

    Args:
        form: "masks", "boxes" or "label_map".
        where: "source" (a COCO file's own), "column", "file" (about many images), "folder", or "segmenter".
        name: of the column, file or folder.
        text: what a segmenter looks for; None: everything.
        segmenter: its name; it finds the regions, or makes masks of boxes.
        box_format: "xyxy" or "xywh", of boxes in columns.
    """

    form: str = "masks"
    where: str = "source"
    name: str | None = None
    text: str | None = None
    segmenter: str | None = None
    box_format: str = "xyxy"

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise ValueError(f"regions come as one of {FORMS}, got {self.form!r}")
        if self.box_format not in BOX_FORMATS:
            raise ValueError(f"--box-format must be one of {BOX_FORMATS}, got {self.box_format!r}")
        if self.where == "segmenter" and self.segmenter in (None, "none"):
            raise ValueError(
                "regions are to be found, and no segmenter is named: --segmenter classical, or a model's id"
            )
        if self.text is not None and self.where != "segmenter":
            raise ValueError("--text finds regions by itself: leave out --masks, --boxes and --label-maps")

    @property
    def needs_model(self) -> bool:
        """Whether a segmenter with weights runs, which belongs beside the captioning model."""
        return self.segmenter not in WITHOUT_MODEL


@dataclass(frozen=True)
class AnnotationJob:
    """A run: source, regions, model and settings.

    Args:
        source: folder, glob, file, or data set on the Hub.
        out: folder of the results, on storage that all workers share.
        regions: where the regions come from.
        images: folder of a COCO file's pictures.
        columns: "image", "id" and "label" to the name of a table's column or a shard's extension.
        dataset: `name` (configuration), `split` and `revision` of a data set on the Hub.
        exif, resize_masks, question: as for `perceptiondlm caption`.
        attributes: questions' names, asked about every region.
        tokens: keep the confidence of every token.
        model: folder or Hub id; device, dtype, quantize: as the pipeline's.
        model_state: what identifies the model's weights.
        generate: settings of `generate`.
        regions_per_batch: most regions in a pass of the model.
        images_per_part: most images of a part.
        retry: a name of its own for another try at what failed in a run whose model has worked; None for a run.
    """

    source: str
    out: str
    regions: RegionChoice
    images: str | None = None
    columns: dict[str, str] = field(default_factory=dict)
    dataset: dict[str, Any] = field(default_factory=dict)
    exif: str | None = None
    resize_masks: bool = False
    question: str | None = None
    attributes: tuple[str, ...] = ()
    tokens: bool = False
    model: str | None = None
    model_state: Any = None
    device: str | None = None
    dtype: str = "auto"
    quantize: str | None = None
    generate: dict[str, Any] = field(default_factory=dict)
    regions_per_batch: int = 32
    images_per_part: int = 32
    retry: str | None = None

    def __post_init__(self) -> None:
        for name in ("regions_per_batch", "images_per_part"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")

    @property
    def folder(self) -> Path:
        """The folder of the results."""
        return Path(self.out)

    @property
    def model_name(self) -> str:
        """What records call the model."""
        return self.model or "embedded"

    @property
    def shown_settings(self) -> str:
        """What records say of the settings, as JSON."""
        shown = {**self.generate, "question": self.question, "dtype": self.dtype, "quantize": self.quantize}
        shown |= {"segmenter": self.regions.segmenter, "exif": self.exif}
        return json.dumps({name: value for name, value in shown.items() if value is not None}, ensure_ascii=False)

    def identity(self) -> dict[str, Any]:
        """Everything that decides what comes out, as JSON keeps it."""
        kept = {name: value for name, value in asdict(self).items() if name not in HOW}
        return json.loads(json.dumps(kept))

    def fingerprint(self) -> str:
        """A hash of `identity`."""
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()
