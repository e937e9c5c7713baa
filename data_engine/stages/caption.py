"""Captions for regions: from our pipeline, from a file, or from an endpoint that is shown image and region."""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from perceptiondlm.common.json_files import read_json
from perceptiondlm.data_engine.drawn_stand_ins import planted_captions
from perceptiondlm.data_engine.prompts import CAPTION
from perceptiondlm.data_engine.record import Changes, Drop, Record
from perceptiondlm.data_engine.stages.base import HOW, Stage
from perceptiondlm.data_engine.stages.models import chat_model, check_model
from perceptiondlm.data_engine.views import region_pictures


def region_key(record: Record, region_id: str) -> str:
    """A region's key in caption files and in messages: the record's id, "_", the region's."""
    return f"{record.id}_{region_id}"


@dataclass
class Caption(Stage):
    """Writes captions. Of the captioners

    ==================  ========================================================================================
    ``model``           the embedded model; ``model:PATH`` any checkpoint of this project, by its pipeline
    ``file:PATH``       a JSON object ``{"RECORD_REGION": caption}``; or ``id`` and ``caption`` in JSON lines, in a
                        parquet file, or in the folder that ``perceptiondlm annotate`` wrote, where ids are
                        RECORD/REGION or RECORD_REGION
    ``openai:MODEL``    (or ``azure``, ``litellm``) a model behind an endpoint, shown the image with the region
                        outlined, its surroundings, and it alone: GAR, DAM or a general model, served by themselves
    ``drawn``           the stand-in for drawn scenes: true captions with planted faults
    ==================  ========================================================================================

    A region for which there is no caption, or an empty one, is dropped: ``no caption``.

    Attributes:
        captioner: see above.
        question: asked instead of the model's own, or of `prompts.CAPTION`.
        generate: settings of `generate`, for ``model``.
        options: of the endpoint, see `make_judge`.
        device, dtype: for ``model``.
        seed: of the planted faults, for ``drawn``.
    """

    kind: ClassVar[str] = "caption"
    captioner: str = "model"
    question: str | None = None
    generate: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict, metadata=HOW)
    device: str | None = field(default=None, metadata=HOW)
    dtype: str = "auto"
    seed: int = 0

    def check(self) -> None:
        self._what, _, self._path = self.captioner.partition(":")
        if self._what == "model" and self._path and not Path(self._path).exists() and self._path.count("/") != 1:
            raise ValueError(f"{self.name}: no model at {self._path!r}; accepted: a folder, or a Hub id OWNER/NAME")
        if self._what == "file" and not Path(self._path).exists():
            raise FileNotFoundError(f"{self.name}: no captions file at {self._path!r}")
        if self._what not in ("model", "file"):
            check_model(self.name, self.captioner, ("model", "model:PATH", "file:PATH", "drawn"))
            if self._what == "transformers":
                raise ValueError(f"{self.name}: transformers:PATH reads text alone and cannot look at regions")

    def open(self) -> None:
        """Load the model, the file, or find the endpoint."""
        if self._what == "model":
            _ = self._model
        elif self._what == "file":
            _ = self._file
        elif self._what != "drawn":
            _ = self._chat

    def finish(self) -> None:
        self.__dict__.pop("_model", None)

    def report(self) -> dict[str, Any]:
        return self._chat.report() if "_chat" in self.__dict__ else {}

    def run(self, records: Sequence[Record]) -> list[Changes]:
        if self._what == "drawn":
            return [planted_captions(record, self.seed) for record in records]
        captions = {"model": self._by_model, "file": self._by_file}.get(self._what, self._by_chat)(records)
        return [
            {region.id: self._change(captions.get(region_key(record, region.id))) for region in record.kept}
            for record in records
        ]

    def _change(self, given: tuple[str, float | None] | None) -> dict[str, Any]:
        caption, score = given or ("", None)
        caption = " ".join(caption.split())
        facts = {} if score is None else {"facts": {"score": round(score, 4)}}
        if not caption:
            return {**facts, "drop": Drop(self.name, "no caption")}
        return {"caption": caption, **facts}

    # By our pipeline.

    @cached_property
    def _model(self) -> Any:
        from perceptiondlm.common.loading import load_pipeline

        named = argparse.Namespace(model=self._path or None, device=self.device, dtype=self.dtype, quantize=None)
        return load_pipeline(named)

    def _by_model(self, records: Sequence[Record]) -> dict[str, tuple[str, float | None]]:
        """Image by image: so a region's caption depends on nothing but its image."""
        asked = {} if self.question is None else {"text": self.question}
        captions: dict[str, tuple[str, float | None]] = {}
        for record in records:
            if record.kept:
                masks = [dict(region.mask) for region in record.kept]
                answers = self._model(record.open(), masks=masks, **asked, **self.generate)
                for region, answer in zip(record.kept, answers, strict=True):
                    captions[region_key(record, region.id)] = (answer["caption"], float(answer["score"]))
        return captions

    # From a file.

    @cached_property
    def _file(self) -> dict[str, str]:
        return read_captions_by_key(Path(self._path))

    def _by_file(self, records: Sequence[Record]) -> dict[str, tuple[str, float | None]]:
        keys = [region_key(record, region.id) for record in records for region in record.kept]
        return {key: (self._file[key], None) for key in keys if key in self._file}

    # By an endpoint.

    @cached_property
    def _chat(self) -> Any:
        return chat_model(self.captioner, self.options)

    def _by_chat(self, records: Sequence[Record]) -> dict[str, tuple[str, float | None]]:
        keys, pictures = [], []
        for record in records:
            if not record.kept:
                continue
            image = record.open()
            for region in record.kept:
                keys.append(region_key(record, region.id))
                pictures.append(region_pictures(image, region.pixels()))
        texts = [self.question or CAPTION] * len(keys)
        answers = self._chat.answer_texts(texts, keys, pictures)
        return {key: (answer, None) for key, answer in zip(keys, answers, strict=True)}


def read_captions_by_key(path: Path) -> dict[str, str]:
    """Captions by RECORD_REGION, from a file or folder in one of the forms of `Caption`.

    Raises:
        ValueError: naming what the file holds instead.
    """
    if path.is_dir() or path.suffix == ".parquet":
        import pyarrow.parquet as pq

        files = sorted((path / "data").glob("*.parquet")) if path.is_dir() else [path]
        if not files:
            raise ValueError(f"{path} holds no data/*.parquet; accepted: a finished output of perceptiondlm annotate")
        tables = [pq.read_table(file, columns=["id", "caption"]) for file in files]
        rows = [row for table in tables for row in table.to_pylist()]
        content = {"_".join(row["id"].rsplit("/", 1)): row["caption"] for row in rows if row["caption"]}
    elif path.suffix == ".jsonl":
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        if any(not isinstance(row, Mapping) or not {"id", "caption"} <= set(row) for row in rows):
            raise ValueError(f"{path} has lines that are no objects with id and caption")
        content = {"_".join(str(row["id"]).rsplit("/", 1)): row["caption"] for row in rows}
    else:
        content = read_json(path)
    if not isinstance(content, Mapping) or any(not isinstance(caption, str) for caption in content.values()):
        raise ValueError(f"{path} is no JSON object of captions by RECORD_REGION")
    return dict(content)
