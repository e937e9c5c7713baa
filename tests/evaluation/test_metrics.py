"""`evaluate.load("evaluation/paradlc")` and `evaluation/dlc`, as a user calls them."""

import json
from pathlib import Path

import evaluate
import pytest

from perceptiondlm.drawn.scenes import draw_scene, write_scenes
from perceptiondlm.evaluation.benchmarks import load_benchmark


ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", autouse=True)
def _folders(tmp_path_factory):
    """`evaluate` copies scripts and keeps inputs in folders of its own; here they last one test file."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_METRICS_CACHE", "HF_EVALUATE_CACHE"):
            patch.setattr(evaluate.config, name, str(tmp_path_factory.mktemp("evaluate")))
        yield


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmark") / "scenes"
    write_scenes(0, 4, folder)
    return load_benchmark(folder)


@pytest.fixture(scope="module")
def captions():
    """What the drawn pictures show, in the order of the regions."""
    return [item.caption for index in range(4) for item in draw_scene(0, index).objects]


@pytest.fixture(params=["paradlc", "dlc"])
def metric(request):
    return evaluate.load(str(ROOT / "evaluation" / request.param), keep_in_memory=True)


def scripted(requests):
    """A judge that always says A to the first region and B to others."""
    return ["A" if request.region_id.endswith("_0") else "B" for request in requests]


def test_scores_equal_the_scoring_underneath(metric, benchmark, captions):
    result = metric.compute(predictions=captions, references=benchmark.references(), judge=scripted)
    score = benchmark.score(dict(zip(benchmark.questions, captions, strict=True)), scripted, show_image=False)
    assert (result["pos"], result["neg"], result["avg"]) == (score.positive, score.negative, score.average)
    assert result["recognition"] == score.recognition
    assert result["per_subtype"] == score.per_subtype
    assert result["intervals"]["pos"] == score.intervals["positive"]
    assert set(result["intervals"]) == {"pos", "neg", "avg", "recognition"}
    assert (result["num_images"], result["num_regions"]) == (4, len(captions))
    assert json.loads(json.dumps(result)) == result
    rows = score.to_dict()["regions"]
    assert [row["positive"] for row in result["regions"]] == [row["positive"] for row in rows]
    assert [row["questions"] for row in result["regions"]] == [row["questions"] for row in rows]


@pytest.mark.parametrize("name", ["paradlc", "dlc"])
def test_as_the_readme_has_it(name, benchmark, captions, monkeypatch):
    monkeypatch.chdir(ROOT)
    metric = evaluate.load(f"evaluation/{name}")
    assert metric.compute(predictions=captions, references=benchmark.references(), judge="rules")["avg"] == 100


def test_the_protocols_ask_for_recognition_in_their_own_words(metric, benchmark, captions):
    result = metric.compute(predictions=captions, references=benchmark.references(), judge=scripted)
    asked = result["regions"][0]["recognition"]["question"]
    assert ("image" in asked) == (metric.name == "para_dlc")


def test_judges_by_name(metric, benchmark, captions, tmp_path):
    result = metric.compute(predictions=captions, references=benchmark.references(), judge="rules")
    assert (result["pos"], result["neg"], result["judge"]) == (100, 100, {"judge": "SceneJudge"})
    recorded = tmp_path / "answers.json"
    recorded.write_text(json.dumps({"regions": result["regions"]}))
    replayed = metric.compute(
        predictions=captions, references=benchmark.references(), judge=f"replay:{recorded}", judge_options={}
    )
    assert replayed["regions"] == result["regions"]
    with pytest.raises(TypeError, match="judge_options are for a judge given by name"):
        metric.compute(
            predictions=captions, references=benchmark.references(), judge=scripted, judge_options={"cache": "x"}
        )


def test_captions_one_by_one_and_crops(metric, benchmark, captions):
    seen = []

    def judge(requests):
        seen.extend(requests)
        return ["A"] * len(requests)

    for caption, reference in zip(captions, benchmark.references(), strict=True):
        metric.add(prediction=caption, reference=reference)
    metric.compute(judge=judge, crops=benchmark.crops())
    assert {request.caption for request in seen} == set(captions)
    assert all(request.image.size == request.mask.shape[::-1] for request in seen)


def test_references_without_image_subtype_and_query(metric):
    question = {"question": "Which?", "choices": [["red", 1], ["blue", 0.5]], "type": "positive"}
    reference = {"region_id": "7_0", "class_name": "cup", "questions": [question]}
    result = metric.compute(predictions=["a cup"], references=[reference], judge=lambda requests: ["A", "blue"])
    assert (result["pos"], result["neg"], result["avg"]) == (50, None, None)
    (region,) = result["regions"]
    assert (region["image_id"], region["questions"][0]["subtype"], region["questions"][0]["query"]) == ("7", None, None)


@pytest.mark.parametrize(
    ("predictions", "change", "error", "message"),
    [
        (["x"], {}, ValueError, "1 predictions for 2 references"),
        (["x", None], {}, TypeError, "prediction 1 is a NoneType, not a string"),
        (["x", "y"], {"region_id": "7_0"}, ValueError, "region ids that occur twice in the references: 7_0"),
        (["x", "y"], {"questions": [{"question": "Which?"}]}, ValueError, r"question 0 of region '7_1': type None"),
        (["x", "y"], {"class_name": " "}, ValueError, "region '7_1' has 1 questions but no class name"),
        (["x", "y"], None, ValueError, "reference 1 is no mapping with 'region_id', 'class_name' and 'questions'"),
    ],
)
def test_what_does_not_fit_is_named(metric, predictions, change, error, message):
    question = {"question": "Which?", "choices": [["red", 1], ["blue", 0.5]], "type": "positive"}
    first = {"region_id": "7_0", "class_name": "cup", "questions": [question]}
    second = ["Which?"] if change is None else {**first, "region_id": "7_1", **change}
    with pytest.raises(error, match=message):
        metric.compute(predictions=predictions, references=[first, second], judge=scripted)
