"""Checkpoints beside each other by size of region: ranges hold every region once, scores are those of the report."""

import json

import pytest

from perceptiondlm.common.loading import DRAWN_MODEL
from perceptiondlm.drawn.scenes import draw_scene
from perceptiondlm.scripts.cli import main as shell
from perceptiondlm.studies import focal_replay


def test_ranges_of_sizes_hold_every_region_once():
    scenes = [draw_scene(5, index) for index in range(6)]
    every, *parts = focal_replay.ranges(scenes).values()
    assert len(parts) > 1
    assert sorted(region for part in parts for region in part) == sorted(every)
    small = set(focal_replay.ranges(scenes)["2 to 5 %"])
    areas = {r: o.mask.mean() for scene in scenes for r, o in zip(scene.region_ids, scene.objects, strict=True)}
    assert all((0.02 <= area < 0.05) == (region in small) for region, area in areas.items())


def test_scores_of_all_regions_are_those_of_evaluate(tmp_path):
    report = tmp_path / "r.json"
    found = focal_replay.main([f"--model=one={DRAWN_MODEL}", "--seed=1000", "--images=2", f"--json={report}"])
    assert json.loads(report.read_text()) == found
    asked = ["evaluate", "--dataset", "scenes", "--seed", "1000", "--images", "2", "--out", str(tmp_path / "whole")]
    assert shell(asked) == 0
    whole = json.loads((tmp_path / "whole" / "results.json").read_text())["score"]
    every = found["systems"]["one"]["sizes"]["all"]
    assert every["average"] == pytest.approx(whole["average"])
    assert every["pattern"] == pytest.approx(whole["per_attribute"]["pattern"])
    assert sum(part["regions"] for part in found["systems"]["one"]["sizes"].values()) == 2 * every["regions"]


def test_a_checkpoint_without_a_name_is_refused(capsys):
    with pytest.raises(SystemExit):
        focal_replay.main(["--model", "drawn/model"])
    assert "NAME=" in capsys.readouterr().err
