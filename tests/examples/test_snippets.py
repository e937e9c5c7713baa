"""What the pages tell people to type: Python snippets run, commands are understood by what they call.

The README's first snippet runs in tests/model/test_remote_code.py, in a process that knows nothing of this repository.
"""

import importlib.util
import json
import re
import shlex
from pathlib import Path

import pytest
from PIL import Image
from transformers import pipeline

from perceptiondlm.drawn.scenes import write_scenes
from perceptiondlm.evaluation.benchmarks import load_benchmark
from perceptiondlm.scripts import cli
from perceptiondlm.training.config import load_run_config


ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    """Fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def commands(start: str) -> list:
    """Command lines of all pages that begin so, comments left out, continued lines joined."""
    found = []
    for page in PAGES:
        for block in blocks(page, "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                if line.startswith(start) and "…" not in line:
                    found.append(pytest.param(shlex.split(line, comments=True), id=f"{page.stem}: {line[:60]}"))
    return found


# --- Python -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", ["README.md", "docs/metrics.md"])
def test_the_metric_scores_captions_from_anywhere(page, tmp_path, monkeypatch):
    """The benchmark is a drawn one and the judge reads by rule; everything else is what the page says."""
    (snippet,) = [block for block in blocks(ROOT / page, "python") if "import evaluate" in block]
    write_scenes(77, 3, tmp_path / "drawn")
    for said, here in (('"paradlc"', repr(str(tmp_path / "drawn"))), ('"openai:gpt-5.2"', '"rules"')):
        assert snippet.count(said) == 1
        snippet = snippet.replace(said, here)
    regions = load_benchmark(tmp_path / "drawn").regions
    found = {"captions": {region.region_id: "a small plain red boat" for region in regions}}
    monkeypatch.chdir(ROOT)
    exec(snippet, found)
    assert -100 <= found["result"]["avg"] < 60
    low, high = found["result"]["intervals"]["avg"]
    assert low <= found["result"]["avg"] <= high


def test_captioning_page_runs_from_top_to_bottom(monkeypatch):
    monkeypatch.chdir(ROOT)
    image = Image.open("examples/scene.png")
    masks = [region["mask_rle"] for region in json.loads(Path("examples/scene_masks.json").read_text())["annotations"]]
    samples = [{"image": image, "boxes": [[10, 20, 80, 90]]}] * 3
    found = {"image_a": image, "image_b": image, "masks_a": masks, "masks_b": masks[:1], "masks": masks}
    found["dataset"] = (sample for sample in samples)
    for snippet in blocks(ROOT / "docs" / "captioning.md", "python"):
        exec(snippet, found)
    assert [len(regions) for regions in found["pipe"]([image] * 2, masks=[masks, masks[:1]])] == [6, 1]
    assert next(found["dataset"], None) is None  # the loop over the data set has read it to its end
    assert found["encoded"].num_bytes > 0


def test_prompts_page_runs_with_the_classical_segmenter(monkeypatch):
    """All but the lines that name published weights, and the video, which tests/serving/test_video.py covers."""
    pytest.importorskip("skimage", reason="the classical segmenter needs scikit-image")
    monkeypatch.chdir(ROOT)
    masks = [region["mask_rle"] for region in json.loads(Path("examples/scene_masks.json").read_text())["annotations"]]
    found = {"image": Image.open("examples/scene.png"), "masks": masks}
    found["pipe"] = pipeline("region-captioning", model=".", trust_remote_code=True)
    for snippet in blocks(ROOT / "docs" / "prompts.md", "python"):
        if "clip.mp4" not in snippet:
            exec("\n".join(line for line in snippet.splitlines() if "facebook/" not in line), found)
    assert len(found["captions"]) == len(found["regions"]) == 2


# --- commands ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", commands("perceptiondlm "))
def test_the_command_takes_these_arguments(command, monkeypatch):
    module = importlib.import_module(f"perceptiondlm.scripts.{cli.COMMANDS[command[1]][0]}")
    asked = []
    monkeypatch.setattr(module, "run", asked.append)
    assert cli.main(command[1:]) == 0
    assert len(asked) == 1


@pytest.mark.parametrize("command", commands("python -m perceptiondlm."))
def test_the_module_exists(command):
    assert importlib.util.find_spec(command[2]) is not None


TRAININGS = [
    command for command in commands("accelerate launch ") if any("configs/" in word for word in command.values[0])
]


@pytest.mark.parametrize("command", TRAININGS)
def test_training_takes_these_settings(command):
    if "--config_file" in command:
        assert (ROOT / command[command.index("--config_file") + 1]).is_file()
    script = command.index("training/train.py")
    config, *overrides = [word for word in command[script + 1 :] if word not in ("--resume", "--dry-run")]
    load_run_config(ROOT / config, overrides)


@pytest.mark.parametrize("command", commands("make "))
def test_make_knows_the_target(command):
    assert re.search(rf"^{command[1]}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)


def test_commands_are_found():
    assert len(commands("perceptiondlm ")) > 15
    assert len(TRAININGS) > 4
