"""One system's captions, judged by one judge: the record that `evaluate` writes and `compare` reads."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from perceptiondlm.common.json_files import write_json
from perceptiondlm.evaluation.captions import CaptionIssues
from perceptiondlm.evaluation.reports.paper_tables import Cell, beside_paper, cell_text, markdown_table
from perceptiondlm.evaluation.scoring import BenchmarkScore


HEADLINE = {"Pos": "positive", "Neg": "negative", "Avg": "average"}
TABLE_2 = ("Pos", "Neg", "Avg", "TPF", "Time (s)")  # the paper's Table 2, ParaDLC-Bench


@dataclass(frozen=True)
class Results:
    """A run of `perceptiondlm evaluate`.

    Attributes:
        system: name of what wrote the captions.
        judge: name of the judge.
        dataset: name of the benchmark.
        score: all scores, down to every question.
        issues: what was amiss with the captions.
        speed: see `runner.speed`; None for captions from a file.
        settings: what the captions were made with; empty for captions from a file.
        judging: the judge's calls, tokens and cost, where it tells.
        environment: hardware and versions; empty for captions from a file.
    """

    system: str
    judge: str
    dataset: str
    score: BenchmarkScore
    issues: CaptionIssues = field(default_factory=CaptionIssues)
    speed: dict[str, float] | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    judging: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """The system's name, marked where not all regions were scored."""
        left_out = len(self.score.missing)
        if not left_out:
            return self.system
        return f"{self.system} (partial: {self.score.num_regions} of {self.score.num_regions + left_out} regions)"

    def cells(self) -> dict[str, Cell]:
        """Columns of the paper's Table 2, None where nothing was measured."""
        scores = {column: getattr(self.score, name) for column, name in HEADLINE.items()}
        speed = self.speed or {}
        times = {"TPF": speed.get("tokens_per_forward"), "Time (s)": speed.get("generate_seconds")}
        return {column: value if value is None else round(value, 2) for column, value in {**scores, **times}.items()}

    def write(self, path: Path) -> None:
        """Write the record as JSON."""
        write_json(path, asdict(self))


def read_results(path: Path) -> Results:
    """Read a record; ValueError or FileNotFoundError by name where it is none."""
    if not path.is_file():
        raise FileNotFoundError(f"no results at {path}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        score, issues = BenchmarkScore.from_dict(content["score"]), CaptionIssues(**content["issues"])
        return Results(**{**content, "score": score, "issues": issues})
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is no results.json of `perceptiondlm evaluate`: {error!r}") from error


def beside_table_2(results: Results) -> str:
    """Our row in the form of the paper's Table 2, as Markdown; beside the paper's rows on its two benchmarks."""
    cells = results.cells()
    if results.dataset == "paradlc":
        return beside_paper(2, {results.title: cells})
    if results.dataset == "dlc":
        return beside_paper(2, {results.title: {f"DLC {column}": cells[column] for column in HEADLINE}})
    row = [results.title, *(cell_text(cells[column]) for column in TABLE_2)]
    return f"In the form of Table 2 of the paper, on {results.dataset}\n\n" + markdown_table(["", *TABLE_2], [row])
