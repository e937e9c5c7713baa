"""docs/data-engine.md: its commands run from top to bottom, and its figures are the committed ones."""

import csv
import json
import re
import shlex
from pathlib import Path

import pytest
from markdown_tables import table_rows

from perceptiondlm.data_engine.benchmark.sheet import COLUMNS
from perceptiondlm.scripts.cli import main


ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "data-engine.md").read_text()
RESULTS = ROOT / "studies" / "results"


def commands() -> list[list[str]]:
    blocks = re.findall(r"^```bash\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)
    return [shlex.split(line) for block in blocks for line in block.splitlines()]


def accept_all(sheet: Path) -> None:
    """What a person does between the commands."""
    with sheet.open(newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    with sheet.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows({**row, "decision": "accept"} for row in rows)


def test_commands_run_from_top_to_bottom(tmp_path, monkeypatch, capsys):
    for name in ("data_engine", "drawn"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    told = {}
    for command in commands():
        if command[1:3] == ["make-benchmark", "import"]:
            accept_all(Path(command[4]))
        fewer = ["source.limit=4"] if command[1] == "data" or command[2] == "extract" else []
        assert main([*command[1:], *fewer]) == 0, (command, capsys.readouterr().err)
        told[tuple(command[1:3])] = capsys.readouterr().out
    assert len(told) == 11
    assert "0 items to be decided" in told["make-benchmark", "import"]
    assert "no exceptions" in told["make-benchmark", "check"]
    assert "4 images" in told["benchmark-stats", "outputs/data_engine/drawn_made"]
    assert "entanglement" in told["failures", "outputs/data_engine/scores/results.json"]
    score = json.loads(Path("outputs/data_engine/scores/results.json").read_text())["score"]
    assert score["average"] > 60


def test_figures_of_filters_are_the_committed_ones():
    measured = json.loads((RESULTS / "data_engine_drawn.json").read_text())
    assert f"in {measured['images']} drawn scenes" in " ".join(PAGE.split())
    table = table_rows("docs/data-engine.md", "### What the filters find")
    assert len(table) >= 8
    names = {"COCONut": "coconut", "SA-1B": "sa1b", "SA-1B, `merged_iou: 0.9`": "sa1b_merged_rule"}
    for branch, stage, dropped, precision, recall in table:
        row = measured["branches"][names[branch]]["filters"][stage.strip("`")]
        assert int(dropped) == row["dropped"]
        for cell, value in ((precision, row["precision"]), (recall, row["recall"])):
            assert cell == ("" if value is None else f"{100 * value:.0f} %"), (branch, stage)


def test_figures_of_the_made_benchmark_are_the_committed_ones():
    result = json.loads((RESULTS / "data_engine_benchmark.json").read_text())
    text = " ".join(PAGE.split())
    for name, count in (("made", "questions made by this path"), ("built_in", "built-in ones")):
        row = result[name]
        low, high = row["intervals"]["average"]
        stated = re.search(rf"(\S+) \[(\S+), (\S+)\] on (?:the )?(\S+) {count}", text)
        assert stated
        assert [float(stated[k]) for k in (1, 2, 3)] == pytest.approx([row["average"], low, high], abs=0.051)
        assert int(stated[4].replace(",", "")) == row["questions"]


def test_shares_of_faultless_pairs_are_the_committed_ones():
    branches = json.loads((RESULTS / "data_engine_drawn.json").read_text())["branches"]
    text = " ".join(PAGE.split())
    stated = re.search(r"(\d+) % before and (\d+) % after on the COCONut branch \((\d+) of (\d+)", text)
    found = branches["coconut"]
    shares = [round(100 * found[when]["faultless"]) for when in ("before", "after")]
    assert [int(number) for number in stated.groups()] == [
        *shares,
        found["after"]["regions"],
        found["before"]["regions"],
    ]


def test_figures_of_the_published_files_are_the_committed_ones():
    checks = json.loads((RESULTS / "paradlc_checks.json").read_text())
    found = {check: int(number) for check, number, _ in table_rows("docs/data-engine.md", "### The published files")}
    assert found == checks["exceptions"]
    assert checks["statistics"]["area"]["mean"] == pytest.approx(0.071, abs=0.0005)
