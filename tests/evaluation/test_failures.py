"""What judged answers show beyond scores: failure classes, marks in captions, systems side by side."""

import json
import re
from dataclasses import replace

import pytest

from perceptiondlm.drawn.scenes import draw_scene, write_scenes
from perceptiondlm.evaluation.benchmarks import Benchmark, BenchmarkImage, BenchmarkRegion, load_benchmark
from perceptiondlm.evaluation.judges.rules import SceneJudge
from perceptiondlm.evaluation.reports.failures import count_failures
from perceptiondlm.evaluation.reports.marks import marked
from perceptiondlm.evaluation.reports.results import Results
from perceptiondlm.evaluation.reports.statements import statement
from perceptiondlm.evaluation.scoring import score_answers
from perceptiondlm.scripts.cli import main


QUESTION = "Which of the following is applicable to the description?"


def question(kind: str, *choices: tuple[str, float], subtype: str | None = None) -> dict:
    plain = {"question": QUESTION, "choices": [list(choice) for choice in choices], "type": kind}
    return plain if subtype is None else {**plain, "subtype": subtype}


def claim(prop: str, thing: str, value: str) -> dict:
    return question(
        "positive",
        (f"The {prop} of the {thing} is mentioned in the description and is {value}.", 1),
        (f"The {thing} is not mentioned.", 0),
        (f"The {prop} of the {thing} is mentioned in the description but is not {value}.", -1),
    )


def trap(what: str, subtype: str) -> dict:
    return question(
        "negative", (f"{what} is mentioned in the description.", -1), (f"{what} is not mentioned.", 1), subtype=subtype
    )


def rle(pixels: int) -> dict:
    """A mask of an image of 100 x 100."""
    return {"size": [100, 100], "counts": [0, pixels, 10000 - pixels]}


ASKED = {
    "i_0": [
        claim("color", "dog", "dark brown"),
        trap("The red leash", "negative part"),
        trap("The man", "salient negative"),
    ],
    "i_1": [claim("text", "plate", "267-JAN"), trap("The brown dog on the left", "salient negative")],
    "i_2": [claim("color", "cup", "white"), trap("The wooden table", "salient negative")],
}
NAMES = {"i_0": "dog", "i_1": "license plate", "i_2": "cup"}


@pytest.fixture
def benchmark(tmp_path) -> Benchmark:
    areas = {"i_0": 2000, "i_1": 500, "i_2": 20}
    regions = [BenchmarkRegion(key, NAMES[key], ASKED[key], rle(areas[key])) for key in ASKED]
    return Benchmark("ours", "paradlc", [BenchmarkImage("i", tmp_path / "i.png", 100, 100, regions)])


def judged(answers: dict[str, list[str]]):
    """Regions judged so: recognition, then a letter per question."""
    return score_answers(answers, ASKED, NAMES).regions


def test_failures_are_counted_by_class(benchmark):
    clean = {"i_0": ["Yes", "A", "B", "B"], "i_1": ["Yes", "A", "B"], "i_2": ["Yes", "A", "B"]}
    found = count_failures(judged(clean), benchmark)
    assert [row["regions"] for row in found["classes"].values()] == [0, 0, 0, 0]
    assert found["failing"] == found["background"] == 0
    wrong = {"i_0": ["Yes", "C", "A", "B"], "i_1": ["Yes", "C", "A"], "i_2": ["No", "B", "A"]}
    found = count_failures(judged(wrong), benchmark)
    rows = found["classes"]
    assert {kind: row["regions"] for kind, row in rows.items()} == {"a": 1, "b": 1, "c": 1, "d": 1}
    # "The man" is no region of the image and "the brown dog" is one; one region is tiny; one question is about text
    assert {kind: row["asked"] for kind, row in rows.items()} == {"a": 1, "b": 1, "c": 1, "d": 1}
    assert (found["failing"], found["background"]) == (3, 1)
    where = {failure["kind"]: failure["region_id"] for failure in found["failures"]}
    assert where == {"a": "i_1", "b": "i_2", "c": "i_0", "d": "i_1"}
    with pytest.raises(ValueError, match=r"tiny must be a share in \(0, 1\], got 0"):
        count_failures(judged(clean), benchmark, tiny=0)


def test_right_and_wrong_words_are_marked(benchmark):
    (dog, *_) = judged({"i_0": ["Yes", "A", "A", "B"], "i_1": ["Yes", "A", "B"], "i_2": ["Yes", "A", "B"]})
    caption = "A dark brown dog with a red leash."
    pieces = marked(caption, [statement(row) for row in dog.questions])
    assert "".join(text for text, _ in pieces) == caption
    assert [piece for piece in pieces if piece[1]] == [("dark brown", "right"), ("red leash", "wrong")]
    (cup,) = judged({"i_0": ["Yes", "A", "B", "B"], "i_1": ["Yes", "A", "B"], "i_2": ["Yes", "C", "B"]})[2:]
    pieces = marked("It is a big blue cup on a table.", [statement(row) for row in cup.questions])
    assert "".join(text for text, mark in pieces if mark == "wrong") == "big blue cup"
    assert marked("", []) == []


def test_systems_stand_side_by_side(tmp_path, capsys):
    write_scenes(77, 2, tmp_path / "ours")
    ours = load_benchmark(tmp_path / "ours")
    true = {f"77-{k}_{n}": o.caption for k in range(2) for n, o in enumerate(draw_scene(77, k).objects)}
    classes = {image.image_id: [region.class_name for region in image.regions] for image in ours.images}
    hostile = {}
    for key, text in true.items():
        other = next(name for name in classes[key.rpartition("_")[0]] if name not in text)
        hostile[key] = f"<script>alert(1)</script> {text} next to a {other}"
    for name, captions in (("true", true), ("other", hostile)):
        score = ours.score(captions, SceneJudge())
        Results(name, "rules", ours.name, score).write(tmp_path / f"{name}.json")
    both = [str(tmp_path / "true.json"), str(tmp_path / "other.json")]
    page = tmp_path / "page.html"
    assert main(["compare", *both, "--page", str(page), "--data", str(tmp_path / "ours")]) == 0
    text = page.read_text()
    assert text.count("data:image/jpeg") == 2
    assert "<script>" not in text
    assert "&lt;script&gt;" in text
    first = text[text.index('class="region"') :]
    assert re.search(r'true \(judge rules\): 100</h3>\s*<p>.*?class="right"', first)
    assert 'class="wrong"' in first
    assert main(["compare", *both, "--page", str(page)]) == 2
    assert "name it with --data" in capsys.readouterr().err
    assert main(["failures", *both, "--data", str(tmp_path / "ours"), "--json", str(tmp_path / "f.json")]) == 0
    found = json.loads((tmp_path / "f.json").read_text())
    assert found["true (judge rules)"]["failing"] == 0
    assert found["other (judge rules)"]["classes"]["a"]["regions"] > 0


def test_judged_regions_must_be_the_benchmarks(benchmark):
    regions = judged({"i_0": ["Yes", "A", "B", "B"], "i_1": ["Yes", "A", "B"], "i_2": ["Yes", "A", "B"]})
    with pytest.raises(ValueError, match="1 judged regions are not in the benchmark, such as j_9"):
        count_failures([replace(regions[0], region_id="j_9")], benchmark)
