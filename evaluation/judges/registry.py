"""Judges by name: what answers the questions of ``scoring.score_captions``.

======================  ======================================================================================
``rules``               reads captions of the drawn world by rule, without a model (``rules.py``)
``openai:MODEL``        any OpenAI-compatible endpoint, vLLM included (``openai.py``)
``azure:DEPLOYMENT``    a deployment on Azure (``openai.py``)
``litellm:MODEL``       a model of any provider that LiteLLM knows (``litellm.py``)
``transformers:PATH``   a local chat model (``local.py``)
``replay:FILE``         answers given before
======================  ======================================================================================

Any callable that follows `scoring.Judge` is a judge, too.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from perceptiondlm.evaluation.judges.errors import JudgeError
from perceptiondlm.evaluation.judges.rules import SceneJudge
from perceptiondlm.evaluation.scoring import Judge, JudgeRequest


__all__ = ["JudgeError", "ReplayJudge", "judge_report", "make_judge"]


class ReplayJudge:
    """Gives the answers of a file again.

    The file is JSON in one of three forms: region id -> answers, the recognition question's first; the record that the
    published scorers write (region id -> ``{"response": answers, …}``); our own results
    (``{"regions": [{"region_id", "recognition", "questions"}, …]}``).

    Raises:
        FileNotFoundError, ValueError: the file is missing, or in none of these forms.
    """

    sees_image = False

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self._answers = _recorded_answers(json.loads(self.path.read_text(encoding="utf-8")))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} holds no recorded answers: {type(error).__name__}: {error}") from error

    def __call__(self, requests: Sequence[JudgeRequest]) -> list[str]:
        """The recorded answers.

        Raises:
            ValueError: the file has no answer to a question, naming the region.
        """
        return [self._answer(request) for request in requests]

    def report(self) -> dict[str, Any]:
        """Where the answers come from."""
        return {"file": str(self.path)}

    def _answer(self, request: JudgeRequest) -> str:
        recorded = self._answers.get(request.region_id, ())
        if request.index >= len(recorded):
            raise ValueError(
                f"{self.path} has {len(recorded)} answers about region {request.region_id!r}, "
                f"none to question {request.index} (0 is recognition)"
            )
        return recorded[request.index]


def make_judge(spec: str, **options: Any) -> Judge:
    """A judge by name; see the module's table.

    Args:
        spec: ``"rules"``, ``"openai:MODEL"``, ``"azure:DEPLOYMENT"``, ``"litellm:MODEL"``, ``"transformers:PATH"`` or
            ``"replay:FILE"``.
        options: keyword arguments of the judge: ``base_url`` for an endpoint, ``api_version`` for Azure; for both and
            for ``transformers``, those of `OpenAIJudge` and `TransformersJudge`, such as ``cache``, ``prices``,
            ``max_tokens``, ``concurrency``, ``requests_per_minute``, ``batch_size``.

    Raises:
        ValueError: the name is unknown or incomplete; a value is out of range; a key is missing.
        TypeError: an option that this judge does not have.
    """
    kind, _, what = spec.partition(":")
    makers: dict[str, Callable[..., Judge]] = {
        "rules": SceneJudge,
        "openai": _openai,
        "azure": _azure,
        "litellm": _litellm,
        "transformers": _transformers,
        "replay": ReplayJudge,
    }
    if kind not in makers:
        raise ValueError(
            f"judge {spec!r} is none of rules, openai:MODEL, azure:DEPLOYMENT, litellm:MODEL, transformers:PATH, "
            "replay:FILE"
        )
    if bool(what) != (kind != "rules"):
        raise ValueError(f"judge {spec!r}: {'nothing follows rules' if what else f'what follows {kind}: is missing'}")
    try:
        return makers[kind](*([what] if what else []), **options)
    except TypeError as error:
        raise TypeError(f"judge {spec!r}: {error}") from error


def judge_report(judge: Judge) -> dict[str, Any]:
    """What is known about a judge for a report: its settings, counts of questions and tokens, and costs."""
    report = getattr(judge, "report", None)
    return {"judge": type(judge).__name__, **(report() if report is not None else {})}


def _openai(model: str, *, base_url: str | None = None, **options: Any) -> Judge:
    from perceptiondlm.evaluation.judges.openai import OpenAIJudge, openai_endpoint

    return OpenAIJudge(model, openai_endpoint(base_url), **options)


def _azure(model: str, *, base_url: str | None = None, api_version: str | None = None, **options: Any) -> Judge:
    from perceptiondlm.evaluation.judges.openai import OpenAIJudge, azure_endpoint

    return OpenAIJudge(model, azure_endpoint(model, base_url, api_version), **options)


def _litellm(model: str, **options: Any) -> Judge:
    from perceptiondlm.evaluation.judges.litellm import LiteLLMJudge

    return LiteLLMJudge(model, **options)


def _transformers(path: str, **options: Any) -> Judge:
    from perceptiondlm.evaluation.judges.local import TransformersJudge

    return TransformersJudge(path, **options)


def _recorded_answers(record: Mapping[str, Any]) -> dict[str, list[str]]:
    """Answers per region id, recognition first, in any of the forms of `ReplayJudge`."""
    if isinstance(record.get("regions"), list):
        answers = {
            region["region_id"]: [row["answer"] for row in (region["recognition"], *region["questions"])]
            for region in record["regions"]
        }
    else:
        answers = {
            region_id: value["response"] if isinstance(value, Mapping) else value
            for region_id, value in record.items()
            if isinstance(value, Mapping | list)  # the published record ends with two averages
        }
    for region_id, given in answers.items():
        if not isinstance(given, list) or not all(isinstance(answer, str) for answer in given):
            raise ValueError(f"the answers about region {region_id!r} are not a list of strings")
    if not answers:
        raise ValueError("it holds no region")
    return answers
