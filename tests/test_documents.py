"""The documents say what was measured: figures in their tables are those of the committed results."""

import json
import re
from pathlib import Path

import pytest

from perceptiondlm.studies.miniature import table


ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "studies" / "results"
SYSTEMS = {
    "as released": "full",
    "cached prefix, 32 passes": "cached",
    "cached prefix, 6 passes": "fast",
    "on an image encoded before": "fast_on_cached_image",
    "region by region, image encoded anew": "ar_one_by_one",
    "region by region, shared prefix": "ar_shared_prefix",
    "all regions in one batch": "ar_batch",
}


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


@pytest.mark.parametrize("document", ["README.md", "docs/efficiency.md"])
def test_speed_table_is_the_committed_measurement(document):
    result = json.loads((RESULTS / "efficiency_small_cpu.json").read_text())
    seconds = {(row["system"], row["regions"]): row["seconds"] for row in result["rows"]}
    rows = table_rows(document, "seconds per image")
    assert len(rows) == len(SYSTEMS)
    for name, *cells in rows:
        (system,) = (system for words, system in SYSTEMS.items() if words in name)
        for regions, cell in zip((1, 4, 6), cells, strict=True):
            assert float(cell) == pytest.approx(seconds[system, regions], rel=0.006), (name, regions)


def test_judging_times_are_the_slowest_of_the_committed_rounds():
    result = json.loads((RESULTS / "judging_cpu.json").read_text())
    text = " ".join((ROOT / "README.md").read_text().split())
    stated = re.search(r"([\d,]+) questions \((\d+) regions\) .* (\S+) s as text and (\S+) s with image and mask", text)
    assert stated
    assert {row["requests"] for row in result["rows"]} == {int(stated[1].replace(",", ""))}
    assert (result["regions"], result["latency"], result["concurrency"]) == (int(stated[2]), 0.05, 32)
    for sees, seconds in (("text", stated[3]), ("image and mask", stated[4])):
        slowest = max(row["seconds"] for row in result["rows"] if row["judge_sees"] == sees)
        assert float(seconds) == pytest.approx(slowest, abs=0.051)
    (megabytes,) = re.findall(r"memory grows by (\d+) MB at most", text)
    assert float(megabytes) == pytest.approx(
        max(row["peak_memory_growth_bytes"] for row in result["rows"]) / 1e6, abs=1
    )


def test_miniature_tables_are_the_committed_run():
    result = json.loads((RESULTS / "miniature.json").read_text())
    lines = (ROOT / "docs" / "training.md").read_text().splitlines()
    for row in table(result["stages"]).splitlines():
        assert not row or row in lines


def test_links_between_documents_lead_somewhere():
    for document in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\((?!https?://|#)([^)#\s]+)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"
