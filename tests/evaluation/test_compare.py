"""Systems and judges side by side: differences, intervals, and what cannot be compared."""

import json
from dataclasses import replace

import numpy as np
import pytest

from perceptiondlm.evaluation.reports.compare import compare, comparison_markdown
from perceptiondlm.evaluation.reports.results import Results
from perceptiondlm.evaluation.scoring import score_answers
from perceptiondlm.scripts.cli import main


QUESTIONS = [
    {"question": "Which?", "choices": [["It is red.", 1], ["It is blue.", -1]], "type": "positive"},
    {"question": "Which?", "choices": [["A cup is named.", -1], ["No cup is named.", 1]], "type": "negative"},
]
IMAGES = 40


def results(system: str, seed: int, accuracy: float, judge: str = "judge one", regions=None) -> Results:
    """A system that answers a question right with the given probability, on images of two regions each."""
    dice = np.random.default_rng(seed)
    keys = [f"{image}_{index}" for image in range(IMAGES) for index in range(2)] if regions is None else regions

    def answer(right: str) -> str:
        return right if dice.random() < accuracy else "BA"["AB".index(right)]

    answers = {key: ["A", answer("A"), answer("B")] for key in keys}
    score = score_answers(answers, dict.fromkeys(keys, QUESTIONS), dict.fromkeys(keys, "cup"))
    return Results(system, judge, "paradlc", score)


def test_a_clear_difference_is_told_from_none():
    weak, strong, twin = results("weak", 0, 0.6), results("strong", 1, 0.95), results("twin", 0, 0.6)
    strong_row, twin_row = compare([weak, strong, twin]).differences
    gain = strong.score.average - weak.score.average
    assert strong_row["Avg"].value == pytest.approx(gain)
    low, high = strong_row["Avg"].interval
    assert 0 < low < gain < high
    assert strong_row["Avg"].clear
    assert twin_row["Avg"].value == 0
    assert twin_row["Avg"].interval == [0, 0]  # paired: the same answers on the same images
    assert not twin_row["Avg"].clear
    assert strong_row["Recognition"].value == 0


def test_pairing_narrows_the_interval():
    """Two systems that differ on one image only: images that both find hard do not blur the difference."""
    one = results("one", 0, 0.6)
    regions = [
        replace(region, positive=1.0 if region.image_id == "3" else region.positive) for region in one.score.regions
    ]
    other = replace(one, score=replace(one.score, regions=regions))
    difference = compare([one, other]).differences[0]["Pos"]
    width = difference.interval[1] - difference.interval[0]
    single = one.score.intervals["positive"]
    assert width < 0.5 * (single[1] - single[0])


def test_the_order_of_regions_does_not_matter():
    one = results("one", 0, 0.7)
    turned = replace(one, score=replace(one.score, regions=one.score.regions[::-1]))
    assert compare([one, turned]).differences[0]["Avg"].interval == [0, 0]


def test_judges_make_a_table_in_the_form_of_table_8():
    text = comparison_markdown(
        compare([results("ours", 0, 0.9), results("ours", 1, 0.8, "judge two"), results("theirs", 2, 0.5)])
    )
    table = text[text.index("Table 8") :].splitlines()
    assert table[2] == (
        "|  | judge one: Pos | judge one: Neg | judge one: Avg | judge two: Pos | judge two: Neg | judge two: Avg |"
    )
    assert table[4].startswith("| ours | ")
    assert table[5].startswith("| theirs | ")
    assert table[5].endswith(" |  |  |  |")  # not judged by the second
    assert "Table 8" not in comparison_markdown(compare([results("a", 0, 0.9), results("b", 1, 0.8)]))


def test_other_regions_need_the_flag_and_are_marked():
    whole = results("whole", 0, 0.9)
    part = results("part", 1, 0.9, regions=[region.region_id for region in whole.score.regions[2:]])
    with pytest.raises(ValueError, match=r"2 regions are not in all results: 0_0, 0_1; .*--allow-partial"):
        compare([whole, part])
    comparison = compare([whole, part], allow_partial=True)
    assert comparison.left_out == ["0_0", "0_1"]
    assert comparison.systems[0].score.num_regions == 2 * IMAGES - 2
    assert "whole (partial: 78 of 80 regions)" in comparison_markdown(comparison)
    assert comparison.to_dict()["left_out"] == ["0_0", "0_1"]


def test_what_cannot_be_compared_is_refused():
    one = results("one", 0, 0.9)
    with pytest.raises(ValueError, match="at least 2 results, got 1"):
        compare([one])
    with pytest.raises(ValueError, match="no region in common"):
        compare([one, results("two", 0, 0.9, regions=["x_0", "x_1"])], allow_partial=True)
    keys = [region.region_id for region in one.score.regions]
    other = score_answers(
        {key: ["A", "A"] for key in keys}, dict.fromkeys(keys, QUESTIONS[:1]), dict.fromkeys(keys, "cup")
    )
    with pytest.raises(ValueError, match="different questions about '0_0'"):
        compare([one, Results("two", "j", "paradlc", other)])


def test_the_command_prints_and_writes(tmp_path, capsys):
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path, one in zip(paths, (results("a", 0, 0.6), results("b|<i>", 1, 0.95)), strict=True):
        one.write(path)
    markdown, figures = tmp_path / "out" / "c.md", tmp_path / "out" / "c.json"
    arguments = ["compare", *map(str, paths), "--paper-table", "9"]
    assert main([*arguments, "--markdown", str(markdown), "--json", str(figures)]) == 0
    printed = capsys.readouterr().out
    assert printed.strip() == markdown.read_text().strip()
    assert r"b\|&lt;i&gt;" in printed
    assert "| 32 steps | 59.4 | 87.5 | 73.5 | 276 |" in printed
    record = json.loads(figures.read_text())
    assert record["differences"][0]["Avg"]["clear"] is True
    assert " ≠ 0 |" in printed
    assert main(["compare", str(paths[0]), str(figures)]) == 2
    assert "c.json is no results.json" in capsys.readouterr().err
    assert main(["compare", str(paths[0]), "absent.json"]) == 2
    assert "absent.json" in capsys.readouterr().err
