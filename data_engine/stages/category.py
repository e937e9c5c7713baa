"""What a caption says the region is: checked against the annotated category, or extracted where there is none."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

from perceptiondlm.data_engine.prompts import CORE_CATEGORY
from perceptiondlm.data_engine.record import Changes, Drop, Record
from perceptiondlm.data_engine.stages.base import HOW, Stage
from perceptiondlm.data_engine.stages.caption import region_key
from perceptiondlm.data_engine.stages.models import chat_model, check_model
from perceptiondlm.data_engine.stages.text_filters import words_of
from perceptiondlm.evaluation.judges.rules import SceneJudge, read_caption
from perceptiondlm.evaluation.photos.names import VACUOUS, NameTable
from perceptiondlm.evaluation.questions import match_answer, recognition_question
from perceptiondlm.evaluation.scoring import JudgeRequest


MOST_WORDS = 6  # of a name
NO_NAME = ("unclear", "none", "nothing")


@dataclass
class CategoryCheck(Stage):
    """Drops captions that speak of something else than the annotated category: ``other category``.

    The question is the recognition question of DLC-Bench ("could the described object be a …"), about the text alone.

    Attributes:
        model: ``rules`` reads captions of the drawn world, ``names`` finds the name that a caption gives and looks it
            up among the accepted words of COCO's categories; or a chat model, such as ``openai:Qwen3-8B``.
        accept_general: for ``names``, whether a truly more general name will do (an animal for a cat).
        options: of the chat model, see `make_judge`.
    """

    kind: ClassVar[str] = "category_check"
    model: str = "rules"
    accept_general: bool = True
    options: dict[str, Any] = field(default_factory=dict, metadata=HOW)

    def check(self) -> None:
        check_model(self.name, self.model, ("rules", "names"))

    def open(self) -> None:
        _ = self._judge

    def report(self) -> dict[str, Any]:
        report = getattr(self.__dict__.get("_judge"), "report", None)
        return {} if report is None else report()

    @cached_property
    def _judge(self) -> Any:
        if self.model == "names":
            return NameTable.coco()
        return SceneJudge() if self.model == "rules" else chat_model(self.model, self.options)

    def run(self, records: Sequence[Record]) -> list[Changes]:
        asked = [(record, region) for record in records for region in record.kept]
        for record, region in asked:
            if not region.category:
                raise ValueError(f"region {region_key(record, region.id)} has no category to check its caption against")
        verdicts = self._verdicts(asked)
        changes: list[Changes] = [{} for _ in records]
        places = {record.id: place for place, record in enumerate(records)}
        for (record, region), (accepted, said) in zip(asked, verdicts, strict=True):
            detail = f"annotated {region.category}, the caption: {said}"
            drop = {} if accepted else {"drop": Drop(self.name, "other category", detail)}
            changes[places[record.id]][region.id] = {"facts": {"checked": said}, **drop}
        return changes

    def _verdicts(self, asked: Sequence[tuple]) -> list[tuple[bool, str]]:
        """Per region whether its caption is accepted, and what the judge said."""
        if self.model == "names":
            verdicts = [self._judge.verdict(region.caption or "", region.category) for _, region in asked]
            good = ("right", "general") if self.accept_general else ("right",)
            return [(verdict in good, verdict) for verdict in verdicts]
        requests = [
            JudgeRequest(
                region_key(record, region.id), region.caption or "", recognition_question(region.category, "dlc")
            )
            for record, region in asked
        ]
        answers = self._judge(requests)
        verdicts = []
        for request, answer in zip(requests, answers, strict=True):
            choice = match_answer(answer, request.question["choices"])
            said = "no answer" if choice is None else str(request.question["choices"][choice][0])
            verdicts.append((choice == 0, said))
        return verdicts


@dataclass
class CoreCategory(Stage):
    """Extracts what a caption says the region is, into `Region.name`; drops those that say it of nothing: ``no name``.

    Attributes:
        model: ``rules`` reads captions of the drawn world, ``names`` those with names of COCO's categories; or a chat
            model, such as ``openai:Qwen3-8B``.
        options: of the chat model, see `make_judge`.
    """

    kind: ClassVar[str] = "core_category"
    model: str = "rules"
    options: dict[str, Any] = field(default_factory=dict, metadata=HOW)

    def check(self) -> None:
        check_model(self.name, self.model, ("rules", "names"))

    def open(self) -> None:
        _ = self._reader

    def report(self) -> dict[str, Any]:
        report = getattr(self.__dict__.get("_reader"), "report", None)
        return {} if report is None else report()

    @cached_property
    def _reader(self) -> Any:
        if self.model == "rules":
            return None
        return NameTable.coco() if self.model == "names" else chat_model(self.model, self.options)

    def run(self, records: Sequence[Record]) -> list[Changes]:
        keys = [region_key(record, region.id) for record in records for region in record.kept]
        captions = [region.caption or "" for record in records for region in record.kept]
        names = iter(self._names(captions, keys))
        return [{region.id: self._change(next(names)) for region in record.kept} for record in records]

    def _names(self, captions: Sequence[str], keys: Sequence[str]) -> list[str | None]:
        if self.model == "rules":
            return [read_caption(caption).subject for caption in captions]
        if self.model == "names":
            return [self._reader.said(caption) for caption in captions]
        texts = [CORE_CATEGORY.format(caption=caption) for caption in captions]
        return [answer.strip().strip(".\"'").lower() for answer in self._reader.answer_texts(texts, keys)]

    def _change(self, name: str | None) -> dict[str, Any]:
        if not name or name in NO_NAME or name in VACUOUS or not 0 < len(words_of(name)) <= MOST_WORDS:
            return {"drop": Drop(self.name, "no name", f"extracted: {name!r}"[:200])}
        return {"name": name}
