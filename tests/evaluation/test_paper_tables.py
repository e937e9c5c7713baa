"""The paper's numbers as data, against its text, and our rows beside them."""

import re
from pathlib import Path

import pytest

from perceptiondlm.evaluation.reports.paper_tables import beside_paper, cell_text, markdown_table, paper_table


PAPER = Path(__file__).parents[2].parent / "shared" / "paper.txt"
NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?![\w.])")


def numbers(line: str) -> list[float]:
    return [float(number) for number in NUMBER.findall(line)]


@pytest.mark.skipif(not PAPER.is_file(), reason="the paper's text is not beside the clone")
@pytest.mark.parametrize("number", [1, 2, *range(4, 13)])
def test_every_row_stands_in_the_paper_below_its_table(number):
    lines = PAPER.read_text(encoding="utf-8").splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith(f"Table {number}:"))
    below = [numbers(line) for line in lines[start + 1 : start + 31]]
    table = paper_table(number)
    for name, cells in table.rows.items():
        assert len(cells) == len(table.columns), name
        printed = [float(value) for value in cells if value is not None]
        assert any(line[-len(printed) :] == printed for line in below), name


def test_table_1_has_the_sixteen_benchmarks_and_the_claim_about_llada_v():
    rows = paper_table(1).rows.values()
    assert len(rows) == 16
    assert sum(ours > theirs for ours, theirs, *_ in rows) == 15  # "outperforms LLaDA-V on 15 of 16"


def test_training_parameters():
    table = paper_table(3)
    assert table.rows["Learning Rate"] == [1e-3, 4e-5, 4e-5, 4e-5]
    assert table.rows["Model Max Length"] == [2048, 4096, 4096, 4096]


def test_our_rows_stand_below_with_empty_cells_where_nothing_was_measured():
    text = beside_paper(2, {"mine": {"Pos": 50.04, "Time (s)": 12.0}})
    lines = text.splitlines()
    assert "| PerceptionDLM 8B | 42.3 | 82.4 | 62.4 | 2.9 | 276 | 33.4 | 72.8 | 53.1 |" in lines
    assert lines[-1] == "| mine (measured here) | 50.0 |  |  |  | 12.0 |  |  |  |"
    with pytest.raises(ValueError, match=r"Table 7 has no columns \['TPF'\]"):
        beside_paper(7, {"mine": {"TPF": 3.0}})
    with pytest.raises(ValueError, match="Tables 1 to 12, not 13"):
        paper_table(13)


def test_cells_as_printed():
    assert [cell_text(value) for value in (None, 1, 718, 62.0, -0.01, 4e-5, 0.0)] == [
        "", "1", "718", "62.0", "-0.01", "4e-05", "0.0",
    ]  # fmt: skip


def test_names_cannot_add_markup_or_cells():
    row = markdown_table(["a"], [["x|y\n| z `q` *b* <script> [link](http://e)"]]).splitlines()[-1]
    assert row == r"| x\|y \| z \`q\` \*b\* &lt;script&gt; [link]\(http://e) |"
