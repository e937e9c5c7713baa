"""Many regions: what the study measures, by this checkout's code and by another's."""

import json
import shutil
from pathlib import Path

import pytest

from perceptiondlm.common.loading import DRAWN_MODEL, REPOSITORY
from perceptiondlm.studies import regions_at_scale
from perceptiondlm.studies.efficiency import SHAPES


FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "processor_config.json", "chat_template.jinja")
TINY = {
    "vision_config": {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
        "image_size": 64, "patch_size": 16, "vision_use_head": False,
    },
    "text_config": {
        "vocab_size": 4096, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 1024, "pad_token_id": None,
    },
}  # fmt: skip


@pytest.fixture
def study(monkeypatch, capsys):
    """The command on a tiny shape; returns what it printed."""
    monkeypatch.setitem(SHAPES, "small", TINY)

    def run(*arguments: str) -> str:
        monkeypatch.setattr("sys.argv", ["regions_at_scale", *map(str, arguments)])
        regions_at_scale.main()
        return capsys.readouterr().out

    return run


def test_a_pass_and_a_run_of_each_case_are_reported(study, tmp_path):
    path = tmp_path / "after.json"
    study("--json", path, "--shapes", "small", "--regions", "2", "30", "--group", "10", "--steps", "3")
    result = json.loads(path.read_text())
    rows = {(row["regions"], row["group"]): row for row in result["rows"]}
    assert set(rows) == {(2, None), (30, None), (30, 10)}
    few, many, grouped = rows[2, None], rows[30, None], rows[30, 10]
    assert many["flops_per_pass"] == pytest.approx(15 * few["flops_per_pass"], rel=0.02)
    assert grouped["flops_per_pass"] == pytest.approx(many["flops_per_pass"], rel=0.02)
    assert grouped["peak_bytes"] < 0.7 * many["peak_bytes"]
    assert all(row["flops"] > row["steps"] * row["flops_per_pass"] for row in result["rows"])
    shown = study("--show", path, "--before", path)
    assert "| small | 1 x 30 | 10 |" in shown
    assert shown.count("→") == 3 * 5


def test_code_of_another_checkout_is_measured(study, tmp_path):
    """A copy of the model's files whose passes say that they ran."""
    other = tmp_path / "other"
    other.mkdir()
    for path in [*REPOSITORY.glob("*_perceptiondlm.py"), *(DRAWN_MODEL / name for name in FILES)]:
        shutil.copy(path, other)
    code = other / "generation_perceptiondlm.py"
    marker = tmp_path / "ran"
    code.write_text(code.read_text() + f"\nimport pathlib\npathlib.Path({str(marker)!r}).touch()\n")
    study("--json", tmp_path / "r.json", "--code", other, "--shapes", "small", "--regions", "1", "--steps", "2")
    assert marker.exists()
    assert len(json.loads((tmp_path / "r.json").read_text())["rows"]) == 1


def test_answers_leave_in_a_batch_of_images(monkeypatch):
    monkeypatch.setattr(regions_at_scale, "BATCH_IMAGES", 2)
    row = regions_at_scale.many_images(*regions_at_scale.load("embedded", REPOSITORY), rounds=1)
    assert (row["images"], row["regions"]) == (2, 4)
    assert 1 < row["steps"] < 32  # the fast preset ends early
    assert min(row["seconds"], row["flops"], row["peak_bytes"]) > 0


def test_boxes_lie_in_the_picture():
    width, height = regions_at_scale.picture().size
    found = regions_at_scale.boxes(200)
    assert len({tuple(box) for box in found}) == 200
    assert all(0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height for x0, y0, x1, y1 in found)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --json to measure, or --show"),
        (["--json", "r.json", "--steps", "1"], "--steps at least 2"),
        (["--json", "r.json", "--regions", "0"], "must be at least 1"),
        (["--json", "r.json", "--code", "nowhere"], "--code nowhere has no config.json"),
    ],
)
def test_wrong_arguments_are_refused(study, arguments, message, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        study(*arguments)
    assert message in capsys.readouterr().err
    assert not list(Path(tmp_path).iterdir())
