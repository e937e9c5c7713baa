"""The numbers of the paper's Tables 1-12 (`paper_tables.yaml`), and our own rows beside them."""

import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml


FILE = Path(__file__).with_name("paper_tables.yaml")
Cell = float | int | str | None


@dataclass(frozen=True)
class PaperTable:
    """A table of the paper.

    Attributes:
        number: 1 to 12.
        title: what it shows, in our words.
        columns: names of the columns.
        rows: cells by row name, None where the paper prints a dash.
    """

    number: int
    title: str
    columns: list[str]
    rows: dict[str, list[Cell]]

    def cells(self, values: Mapping[str, Cell]) -> list[Cell]:
        """A row of our own: the values in the order of the columns, None (an empty cell) where nothing was measured.

        Raises:
            ValueError: a value for a column that the table does not have.
        """
        unknown = sorted(set(values) - set(self.columns))
        if unknown:
            raise ValueError(f"Table {self.number} has no columns {unknown}; it has {self.columns}")
        return [values.get(column) for column in self.columns]


def paper_table(number: int) -> PaperTable:
    """Table `number` of the paper; ValueError for any but 1 to 12."""
    tables = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    if number not in tables:
        raise ValueError(f"the paper has Tables {min(tables)} to {max(tables)}, not {number}")
    return PaperTable(number=number, **tables[number])


def cell_text(value: Cell) -> str:
    """A cell as printed: one decimal (more where that would be zero), whole numbers and text as they are."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.2g}" if 0 < abs(value) < 0.05 else f"{value:.1f}"
    return str(value)


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, the first column to the left, the others to the right; names are data and cannot add markup."""
    lines = [list(head), ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(_escaped(cell) for cell in line) + " |" for line in lines) + "\n"


def _escaped(cell: str) -> str:
    """A cell that is shown as it is: no markup, no link, no end of the cell."""
    text = re.sub(r"([\\|`*])", r"\\\1", html.escape(cell, quote=False)).replace("](", "]\\(")
    return " ".join(text.split())


def beside_paper(number: int, ours: Mapping[str, Mapping[str, Cell]]) -> str:
    """Table `number` as Markdown, the paper's rows first, and below them what was measured here.

    Args:
        ours: values by column for every row of ours.
    """
    table = paper_table(number)
    rows = [[name, *map(cell_text, cells)] for name, cells in table.rows.items()]
    rows += [[f"{name} (measured here)", *map(cell_text, table.cells(values))] for name, values in ours.items()]
    return f"Table {number} of the paper: {table.title}\n\n" + markdown_table(["", *table.columns], rows)
