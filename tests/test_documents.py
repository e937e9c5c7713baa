"""The documents say what was measured: figures in their tables are those of the committed results."""

import json
import re
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_tables import table_rows

from perceptiondlm.evaluation.reports.paper_tables import paper_table
from perceptiondlm.studies.miniature import table


ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "studies" / "results"
DOCUMENTS = ["README.md", "CONTRIBUTING.md", *(f"docs/{page.name}" for page in sorted((ROOT / "docs").glob("*.md")))]
SYSTEMS = {
    "as released": "full",
    "cached prefix, 32 passes": "cached",
    "cached prefix, 6 passes": "fast",
    "on an image encoded before": "fast_on_cached_image",
    "region by region, image encoded anew": "ar_one_by_one",
    "region by region, shared prefix": "ar_shared_prefix",
    "all regions in one batch": "ar_batch",
}


def test_speed_table_is_the_committed_measurement():
    result = json.loads((RESULTS / "efficiency_small_cpu.json").read_text())
    seconds = {(row["system"], row["regions"]): row["seconds"] for row in result["rows"]}
    rows = table_rows("docs/efficiency.md", "seconds per image")
    assert len(rows) == len(SYSTEMS)
    for name, *cells in rows:
        (system,) = (system for words, system in SYSTEMS.items() if words in name)
        for regions, cell in zip((1, 4, 6), cells, strict=True):
            assert float(cell) == pytest.approx(seconds[system, regions], rel=0.006), (name, regions)


def words_of(document: str) -> str:
    """A document as one line."""
    return " ".join((ROOT / document).read_text().split())


def test_readme_states_the_committed_speed():
    result = json.loads((RESULTS / "efficiency_small_cpu.json").read_text())
    seconds = {row["system"]: row["seconds"] for row in result["rows"] if row["regions"] == 4}
    stated = re.search(
        r"(\S+) s the way the released code decodes, (\S+) s with the prompt computed once, (\S+) s with "
        r"`preset=\"fast\"`, (\S+) s when the image was encoded before, and (\S+) s with an autoregressive model",
        words_of("README.md"),
    )
    assert stated
    systems = ("full", "cached", "fast", "fast_on_cached_image", "ar_batch")
    for system, value in zip(systems, stated.groups(), strict=True):
        assert float(value) == pytest.approx(seconds[system], rel=0.006), system
    assert result["parameters"] == pytest.approx(66e6, rel=0.01)


@pytest.mark.parametrize("document", ["README.md", "docs/efficiency.md"])
def test_passes_of_the_fast_preset_are_the_committed_measurement(document):
    result = json.loads((RESULTS / "decoding_curves.json").read_text())
    (fast,) = [point for point in result["curves"]["threshold"] if point["settings"]["threshold"] == 0.9]
    stated = re.search(
        r"needs (\S+) passes per picture instead of (\d+), at (\S+) % of the score, on (\d+) drawn scenes",
        words_of(document),
    )
    assert stated
    assert float(stated[1]) == pytest.approx(fast["num_forward_passes"], abs=0.0051)
    assert int(stated[2]) == result["reference"]["num_forward_passes"]
    assert float(stated[3]) == pytest.approx(100 * fast["share_of_reference"], abs=0.051)
    assert int(stated[4]) == result["num_images"]


def test_readme_states_the_committed_scores_of_the_embedded_model():
    result = json.loads((RESULTS / "scenes_seed1000.json").read_text())
    stated = re.search(r"scores Avg (\S+) on (\d+) pictures of a world .* chance is (\S+)\.", words_of("README.md"))
    assert stated
    assert float(stated[1]) == pytest.approx(result["average"], abs=0.051)
    assert int(stated[2]) == result["num_images"]
    assert float(stated[3]) == pytest.approx(result["baselines"]["chance"]["average"], abs=0.051)


def test_scores_of_the_embedded_model_are_the_committed_report():
    result = json.loads((RESULTS / "scenes_seed1000.json").read_text())
    scores = [result, result["baselines"]["chance"], result["baselines"]["constant"]]
    rows = table_rows("docs/embedded.md", "## Scores")
    for (name, *cells), row in zip(rows, scores, strict=True):
        for cell, kind in zip(cells, ("positive", "negative", "average", "recognition"), strict=True):
            assert float(cell.removesuffix(" %")) == pytest.approx(row[kind], abs=0.051), (name, kind)


def test_scores_of_the_default_on_drawn_scenes_are_the_committed_report():
    result = json.loads((RESULTS / "scenes_default.json").read_text())
    told = re.search(
        r"Avg (\S+), recognition (\S+) %, color (\S+) %, part color (\S+) %, pattern (\S+) %, size (\S+) % \(\[report\]"
        r"\(\.\./studies/results/scenes_default",
        words_of("docs/embedded.md"),
    )
    assert told
    attributes = result["per_attribute"]
    expected = [result["average"], result["recognition"]]
    expected += [attributes[name] for name in ("color", "part color", "pattern", "size")]
    for stated, value in zip(told.groups(), expected, strict=True):
        assert float(stated) == pytest.approx(value, abs=0.051)


def test_scores_on_photographs_are_the_committed_report():
    result = json.loads((RESULTS / "photos_val.json").read_text())
    baselines = [result["baselines"][name] for name in ("always 'person'", "a linear classifier on the vision tower")]
    rows = table_rows("docs/embedded.md", "## The default")
    for (name, number, *cells), row in zip(rows, [*result["shares"].values(), *baselines], strict=True):
        assert int(number) == row["regions"], name
        for cell, kind in zip(cells, ("right", "general", "wrong", "right_or_general"), strict=True):
            assert float(cell) == pytest.approx(row[kind], abs=0.051), (name, kind)
    stated = re.search(r"\((\d+) % of unseen regions, (\d+) % with truly more general words\)", words_of("README.md"))
    assert stated
    shares = result["shares"]["all"]
    assert (int(stated[1]), int(stated[2])) == (round(shares["right"]), round(shares["right_or_general"]))
    told = re.search(
        r"Colours are right in (\S+) % .*, the word for the size in (\S+) %, the place in (\S+) %",
        words_of("docs/embedded.md"),
    )
    assert told
    for number, what in enumerate(("colours", "sizes", "places"), start=1):
        assert float(told[number]) == pytest.approx(result[f"{what}_right"], abs=0.051), what


def test_runs_with_guessed_regions_are_the_committed_figures():
    runs = json.loads((RESULTS / "photos_runs.json").read_text())["runs"]
    results = {run["run"]: run for run in runs}
    rows = table_rows("docs/experiments.md", "**Whole runs**, on the validation photographs")
    names = (
        "guessed regions",
        "guessed regions, region_norm",
        "guessed regions, region_norm, general words suppressed",
        "guessed regions, region_norm, 400 steps more on annotated regions",
    )
    for (_, _, _, both, small, *told), name in zip(rows[1:], names, strict=True):
        run = results[name]
        found = [*both.split(" / "), small, *filter(None, told)]
        every = run["shares"]["all"]
        stated = [every["right"], every["right_or_general"], run["shares"]["things below 0.3 %"]["right"]]
        stated += [run[f"{what}_right"] for what in ("colours", "sizes", "places")]
        for cell, value in zip(found, stated, strict=False):
            assert float(cell) == pytest.approx(value, abs=0.051), name


NAMER_RUNS = {
    "the default of before": "committed default of before the namer",
    "the language model alone": "region_gain from the start, eight variants",
    "... with a namer": "region_gain from the start, eight variants, namer",
    "... and 600 steps more, seven of eight pictures drawn scenes: the committed default": (
        "both worlds, 600 steps, namer"
    ),
    "... with a namer that has no crops, nor the language model": (
        "region_gain from the start, eight variants, namer without crops"
    ),
}
LOUD_RUNS = {
    "the default of that day": "committed default of before the namer",
    "from the start, `region_norm` and variants, 1,400 steps": "region_norm, eight variants",
    "... 500 steps more": "region_norm, eight variants, 500 steps more",
    "the committed default, box 20, mask and colours 10 times as loud, 260 steps": (
        "committed default, louder, 260 steps"
    ),
    "the committed default, `region_gain: 20`, 800 steps": "committed default, region_gain, 800 steps",
}


@pytest.mark.parametrize(
    ("heading", "named", "skipped"),
    [
        ("**Whole runs** on the validation photographs", NAMER_RUNS, ()),
        ("## 2026-11-26: boxes that are heard", LOUD_RUNS, (0, 2)),
    ],
)
def test_runs_on_photographs_are_the_committed_figures(heading, named, skipped):
    results = {run["run"]: run for run in json.loads((RESULTS / "photos_runs.json").read_text())["runs"]}
    rows = {name: cells for name, *cells in table_rows("docs/experiments.md", heading)}
    assert set(named) <= set(rows)
    for name, run in ((name, results[run]) for name, run in named.items()):
        both, small, *told = [cell for place, cell in enumerate(rows[name]) if place not in skipped]
        every = run["shares"]["all"]
        expected = [every["right"], every["right_or_general"], run["shares"]["things below 0.3 %"]["right"]]
        expected += [run[f"{what}_right"] for what in ("colours", "sizes", "places")]
        for cell, value in zip([*both.split(" / "), small, *told], expected, strict=True):
            assert float(cell) == pytest.approx(value, abs=0.051), name


def test_judging_times_are_the_slowest_of_the_committed_rounds():
    result = json.loads((RESULTS / "judging_cpu.json").read_text())
    text = words_of("docs/metrics.md")
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


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_between_documents_lead_somewhere(document):
    path = ROOT / document
    for target, section in re.findall(r"\]\((?!https?://)([^)#\s]*)(#[^)\s]+)?\)", path.read_text()):
        linked = path.parent / target if target else path
        assert linked.exists(), f"{document} links to {target}"
        assert not section or section[1:] in sections(linked), f"{document} links to {target}{section}"


def sections(document: Path) -> set[str]:
    """Names by which the headings of a document can be linked to."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_readme_is_short_and_leads_to_every_page():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 180
    for page in [*(ROOT / "docs").glob("*.md"), *(ROOT / "examples").glob("*.py")]:
        assert f"({page.relative_to(ROOT)})" in text, f"README.md does not lead to {page.name}"


def test_front_matter_is_read_by_the_hubs_own_library():
    data = ModelCard.load(ROOT / "README.md").data
    assert data.to_dict()["arxiv"] == "2606.19534"  # a number would lose the trailing zeros of other papers
    assert (data.license, data.library_name, data.pipeline_tag) == ("apache-2.0", "transformers", "image-text-to-text")
    # The Hub links a paper by its address in the text.
    assert "https://arxiv.org/abs/2606.19534" in (ROOT / "README.md").read_text()


def test_pictures_are_small():
    for picture in [*(ROOT / "docs").rglob("*.png"), *(ROOT / "examples").glob("*.png")]:
        assert picture.stat().st_size < 500_000, picture.name


def test_efficiency_page_names_the_judge_of_the_papers_scores():
    lines = (ROOT / "docs" / "efficiency.md").read_text().splitlines()
    rows = [line for line in lines if line.startswith("| paper: Avg")]
    assert len(rows) == 2
    steps = [paper_table(9).rows[f"{steps} steps"][2] for steps in (16, 32, 48, 64)]
    slots = [paper_table(11).rows[f"{slots} tokens"][2] for slots in (32, 64)]
    for row, number, scores in zip(rows, (9, 11), (steps, slots), strict=True):
        judge = paper_table(number).title.rsplit("judge ", 1)[1]
        name, *cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert name == f"paper: Avg, judge {judge}"
        assert [float(cell) for cell in cells if cell] == scores


@pytest.mark.parametrize("workflow", sorted((ROOT / ".github" / "workflows").glob("*.yml")), ids=lambda path: path.name)
def test_workflow_runs_what_developers_run(workflow):
    content = yaml.safe_load(workflow.read_text())
    jobs = list(content["jobs"].values())
    steps = [step for job in jobs for step in job["steps"]]
    assert ".ci/run" in [step.get("run") for step in steps]
    versions = [version for job in jobs for version in job["strategy"]["matrix"]["python"]]
    assert all(isinstance(version, str) for version in versions)  # 3.10 would be read as 3.1
    required = requires_python()
    assert required == f">={versions[0]}"


def requires_python() -> str:
    return re.search(r'^requires-python = "(.+)"$', (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)[1]


def test_annotation_speeds_are_the_committed_measurement():
    result = json.loads((RESULTS / "annotation_cpu.json").read_text())
    for (name, *cells), row in zip(table_rows("docs/annotate.md", "## What it costs"), result["speed"], strict=True):
        told = (row["seconds"], row["regions_per_second"], row["times_one_at_a_time"])
        for cell, value, digits in zip(cells, told, (0.051, 0.051, 0.0051), strict=True):
            assert float(cell) == pytest.approx(value, abs=digits), name
    for (size, *cells, speed), row in zip(
        table_rows("docs/annotate.md", "seconds of a run by regions a batch"), result["bounds"], strict=True
    ):
        steps = ("reading and measuring", "vision tower", "prompts of images", "prompts of regions", "denoising passes")
        assert int(size) == row["regions_per_batch"]
        for cell, step in zip(cells, steps, strict=True):
            assert float(cell) == pytest.approx(row["seconds"][step], abs=0.051), step
        assert float(speed) == pytest.approx(row["gflop_per_second"], abs=0.51)
    for row in result["kills"]:
        assert (row["missing"], row["duplicates"], row["equal_captions"]) == (0, 0, row["regions"]), row["way"]


def test_serving_load_is_the_committed_measurement():
    result = json.loads((RESULTS / "serving_load.json").read_text())
    phases = ("one_at_a_time", "many_clients", "stopped_under_load")
    keys = ("answers_per_second", "p50_seconds", "p95_seconds")
    for (name, requests, answered, wrong, *cells), phase in zip(
        table_rows("docs/serving.md", "## Measured"), phases, strict=True
    ):
        row = result[phase]
        assert (int(requests), int(answered), int(wrong)) == (row["requests"], row["answered"], len(row["wrong"])), name
        for cell, key in zip(cells, keys, strict=True):
            assert float(cell) == pytest.approx(row[key], abs=0.0051), (name, key)
