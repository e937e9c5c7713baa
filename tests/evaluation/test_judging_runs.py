"""`perceptiondlm evaluate` with a judge behind HTTP: stopped and continued, its costs, and a hostile caption."""

import json
import shutil
from pathlib import Path

import pytest
from judge_server import JudgeServer
from test_report import HOSTILE, Page

from perceptiondlm.drawn.scenes import draw_scene, write_scenes
from perceptiondlm.evaluation.benchmarks import load_benchmark
from perceptiondlm.evaluation.judges.cache import AnswerCache
from perceptiondlm.evaluation.reports.results import read_results
from perceptiondlm.scripts.cli import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A benchmark of three drawn pictures, and `captions.json` with a hostile and a blank one among them."""
    folder = tmp_path_factory.mktemp("benchmark") / "ours"
    write_scenes(77, 3, folder)
    regions = [region.region_id for region in load_benchmark(folder).regions]
    texts = [item.caption for index in range(3) for item in draw_scene(77, index).objects]
    captions = {**dict(zip(regions, texts, strict=True)), regions[0]: HOSTILE, regions[1]: " "}
    (folder / "captions.json").write_text(json.dumps(captions))
    return folder


def _evaluate(server: JudgeServer, folder: Path, out: Path, *arguments: str) -> int:
    command = ["evaluate", "--dataset", str(folder), "--captions", str(folder / "captions.json"), "--out", str(out)]
    judge = ["--judge", "openai:fake", "--base-url", server.base_url, "--judge-cache", str(out / "answers.jsonl")]
    return main([*command, *judge, *arguments])


@pytest.fixture(scope="module")
def clean(folder, tmp_path_factory):
    """The folder of a run in which nothing went wrong."""
    out = tmp_path_factory.mktemp("clean")
    with JudgeServer() as server:
        assert _evaluate(server, folder, out, "--prices", "2", "10") == 0
        assert all(isinstance(body["messages"][0]["content"], list) for body in server.bodies)  # image and mask, too
    return out


@pytest.mark.parametrize(
    ("status", "error", "message"),
    [
        (401, {"message": "Incorrect API key provided"}, "refuses the key in OPENAI_API_KEY"),
        (429, {"message": "You exceeded your quota", "code": "insufficient_quota"}, "OPENAI_API_KEY is used up"),
    ],
)
def test_a_refused_key_or_a_used_up_quota_costs_no_answer(
    folder, clean, tmp_path, monkeypatch, capsys, status, error, message
):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with JudgeServer(latency=0.002, stop_after=30, stop_reply=(status, {"error": error})) as server:
        assert _evaluate(server, folder, tmp_path, "--concurrency", "4") == 2
        kept = len(AnswerCache(tmp_path / "answers.jsonl"))
        assert kept == server.answered.total() >= 30
        said = capsys.readouterr().err.splitlines()[-1]
        assert message in said
        assert f"{kept} answers are kept in {tmp_path / 'answers.jsonl'}; the same command goes on from there" in said
        assert "secret" not in said
        assert not (tmp_path / "results.json").exists()
        server.stop_after = None
        assert _evaluate(server, folder, tmp_path, "--concurrency", "16") == 0
    assert set(server.answered.values()) == {1}
    continued, whole = (read_results(path / "results.json") for path in (tmp_path, clean))
    assert continued.score == whole.score
    assert continued.judging["new_answers"] == whole.judging["answers"] - kept


def test_a_wrong_key_is_noticed_before_anything_is_captioned(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    monkeypatch.setattr("perceptiondlm.scripts.evaluate.caption", None)  # would fail if called
    with JudgeServer(stop_after=0, stop_reply=(401, {"error": {"message": "no"}})) as server:
        judge = ["--judge", "openai:fake", "--base-url", server.base_url, "--judge-cache", str(tmp_path / "a.jsonl")]
        assert main(["evaluate", "--dataset", str(folder), "--out", str(tmp_path), *judge]) == 2
    assert "refuses the key in OPENAI_API_KEY" in capsys.readouterr().err


def test_given_captions_and_cached_answers_need_no_endpoint(folder, clean, tmp_path):
    shutil.copy(clean / "answers.jsonl", tmp_path / "answers.jsonl")
    with JudgeServer() as server:
        assert _evaluate(server, folder, tmp_path) == 0
    assert not server.bodies
    assert read_results(tmp_path / "results.json").score == read_results(clean / "results.json").score


def test_the_report_tells_what_judging_took(clean):
    record = json.loads((clean / "results.json").read_text())
    questions = record["score"]["num_questions"] + record["score"]["num_regions"]
    judging = record["judging"]
    assert (judging["model"], judging["temperature"], judging["sees image and mask"]) == ("fake", 0.0, True)
    assert (judging["answers"], judging["prompt_tokens"]) == (questions, 10 * questions)
    assert judging["cost"] == judging["new_cost"] == pytest.approx(questions * (10 * 2 + 2 * 10) / 1e6)
    for name in ("report.md", "report.html"):
        assert str(10 * questions) in (clean / name).read_text().replace(",", "")


def test_a_caption_can_neither_choose_its_answers_nor_add_markup(folder, clean):
    first = next(iter(json.loads((folder / "captions.json").read_text())))
    (region,) = (one for one in read_results(clean / "results.json").score.regions if one.region_id == first)
    assert region.caption == HOSTILE
    assert {row.answer for row in region.questions} == {"A", "B"}
    for row in (region.recognition, *region.questions):
        assert row.choice == "AB".index(row.answer)  # by the judge's letter alone, whatever the caption says
    page = Page((clean / "report.html").read_text(encoding="utf-8"))
    assert HOSTILE in page.texts
    assert len(page.all("script")) == 1
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
