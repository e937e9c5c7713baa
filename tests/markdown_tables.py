"""Reads the tables of the pages, for tests that compare them with committed results."""

from pathlib import Path


ROOT = Path(__file__).parents[1]


def table_rows(document: str, after: str) -> list[list[str]]:
    """Cells of the first Markdown table behind a text."""
    text = (ROOT / document).read_text()
    lines = text[text.index(after) :].splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("| ---"))
    table = []
    for line in lines[start + 1 :]:
        if not line.startswith("|"):
            break
        table.append([cell.strip() for cell in line.strip("|").split("|")])
    return table
