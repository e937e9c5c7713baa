"""What the metrics ``evaluation/paradlc`` and ``evaluation/dlc`` share: their inputs, and the way to the scoring.

`evaluate.load` copies a script away from this package, and takes the first metric class that it finds in it: so the
scripts are short, and the class here is not a metric by itself.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import evaluate

from perceptiondlm.evaluation.judges.registry import judge_report, make_judge
from perceptiondlm.evaluation.questions import question_problem
from perceptiondlm.evaluation.scoring import Crop, Judge, image_of, score_captions


INPUTS = """
Args:
    predictions: captions, one string per region.
    references: one mapping per region, such as `Benchmark.references()` gives: "region_id", "image_id", "class_name",
        and "questions" as in the published qa.json.
    judge: a callable (see `perceptiondlm.evaluation.scoring.Judge`), or a name such as "rules", "openai:MODEL",
        "transformers:PATH" or "replay:FILE".
    crops: image crop and mask per region id, for a judge that looks; `Benchmark.crops()` gives them.
    judge_options: options of a judge given by name, see `perceptiondlm.evaluation.judges.registry.make_judge`.

Returns:
    "pos", "neg", "avg", "recognition" in percent, "intervals" (95 % bootstrap intervals over images of these four),
    "per_subtype", "regions" (one row per region, with every question's answer and score), "num_images", "num_regions",
    "num_questions", and "judge" (its settings, counts and costs).
"""

CITATION = """@article{perceptiondlm2026,
  title   = {PerceptionDLM: Parallel Region Perception with Multimodal Diffusion Language Models},
  author  = {{Peking University MSALab and ByteDance}},
  journal = {arXiv preprint arXiv:2606.19534},
  year    = {2026}
}"""

_TEXT = datasets.Value("string")
_QUESTION = {
    "question": _TEXT,
    "choices": datasets.List({"text": _TEXT, "score": datasets.Value("float64")}),
    "type": _TEXT,
    "subtype": _TEXT,
    "query": _TEXT,  # as JSON: its fields differ from question to question
}
FEATURES = datasets.Features(
    {
        "predictions": _TEXT,
        "references": {
            "region_id": _TEXT,
            "image_id": _TEXT,
            "class_name": _TEXT,
            "questions": datasets.List(_QUESTION),
        },
    }
)


class CaptionQuestions:
    """All of a metric but its name: a subclass derives from `evaluate.Metric`, too, and sets `protocol`."""

    protocol: str

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.__doc__ or "", citation=CITATION, inputs_description=INPUTS, features=FEATURES
        )

    def add(self, *, prediction: str, reference: Mapping[str, Any]) -> None:
        """Add one caption and its reference."""
        self.add_batch(predictions=[prediction], references=[reference])

    def add_batch(self, *, predictions: Sequence[str], references: Sequence[Mapping[str, Any]]) -> None:
        """Add captions and their references.

        Raises:
            ValueError: their numbers differ, or a reference is malformed.
            TypeError: a caption is not a string.
        """
        if len(predictions) != len(references):
            raise ValueError(f"{len(predictions)} predictions for {len(references)} references")
        for position, caption in enumerate(predictions):
            if not isinstance(caption, str):
                raise TypeError(f"prediction {position} is a {type(caption).__name__}, not a string")
        rows = [_row(reference, position) for position, reference in enumerate(references)]
        super().add_batch(predictions=predictions, references=rows)  # type: ignore[misc]

    def _compute(
        self,
        predictions: Sequence[str],
        references: Sequence[Mapping[str, Any]],
        judge: Judge | str,
        crops: Mapping[str, Crop] | None = None,
        judge_options: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        if isinstance(judge, str):
            judge = make_judge(judge, **(judge_options or {}))
        elif judge_options:
            raise TypeError("judge_options are for a judge given by name, not for a callable")
        region_ids = [reference["region_id"] for reference in references]
        twice = sorted(region_id for region_id, count in Counter(region_ids).items() if count > 1)
        if twice:
            raise ValueError(f"region ids that occur twice in the references: {', '.join(twice)}")
        score = score_captions(
            dict(zip(region_ids, predictions, strict=True)),
            {reference["region_id"]: list(map(_question, reference["questions"])) for reference in references},
            {reference["region_id"]: reference["class_name"] for reference in references},
            judge,
            protocol=self.protocol,
            crops=crops,
            image_ids={reference["region_id"]: reference["image_id"] for reference in references},
        )
        return _result(score.to_dict(), judge)


def _row(reference: Mapping[str, Any], position: int) -> dict[str, Any]:
    """A reference in the form of `FEATURES`."""
    if not isinstance(reference, Mapping) or not {"region_id", "class_name", "questions"} <= reference.keys():
        raise ValueError(f"reference {position} is no mapping with 'region_id', 'class_name' and 'questions'")
    region_id = str(reference["region_id"])
    for place, question in enumerate(reference["questions"]):
        problem = question_problem(question)
        if problem:
            raise ValueError(f"question {place} of region {region_id!r}: {problem}")
    return {
        "region_id": region_id,
        "image_id": str(reference.get("image_id") or image_of(region_id)),
        "class_name": reference["class_name"],
        "questions": [
            {
                "question": question["question"],
                "choices": [{"text": text, "score": score} for text, score in question["choices"]],
                "type": question["type"],
                "subtype": question.get("subtype"),
                "query": json.dumps(question["query"]) if "query" in question else None,
            }
            for question in reference["questions"]
        ],
    }


def _question(row: Mapping[str, Any]) -> dict[str, Any]:
    """A question as it was before `_row`."""
    question = {**row, "choices": [[choice["text"], choice["score"]] for choice in row["choices"]]}
    query = question.pop("query")
    return question if query is None else {**question, "query": json.loads(query)}


def _result(score: Mapping[str, Any], judge: Judge) -> dict[str, Any]:
    """The metric's result, under its short names."""
    short = {"positive": "pos", "negative": "neg", "average": "avg", "recognition": "recognition"}
    kept = ("per_subtype", "regions", "num_images", "num_regions", "num_questions")
    return {
        **{name: score[long] for long, name in short.items()},
        **{name: score[name] for name in kept},
        "intervals": {short[long]: bounds for long, bounds in score["intervals"].items()},
        "judge": judge_report(judge),
    }
