"""The `perceptiondlm` command, on the embedded default."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from perceptiondlm.common.drawing import annotate
from perceptiondlm.drawn.scenes import draw_scene
from perceptiondlm.scripts.cli import main


ROOT = Path(__file__).parents[2]
SCENE, MASKS = str(ROOT / "examples" / "scene.png"), str(ROOT / "examples" / "scene_masks.json")


def test_captions_a_picture_with_masks_from_json(tmp_path, capsys):
    out, result = tmp_path / "picture.png", tmp_path / "result.json"
    assert main(["caption", SCENE, "--masks", MASKS, "--out", str(out), "--json", str(result)]) == 0
    (image,) = json.loads(result.read_text())
    names = [a["category_name"] for a in json.loads(Path(MASKS).read_text())["annotations"]]
    named = [name in region["caption"] for name, region in zip(names, image["regions"], strict=True)]
    assert all(named)
    printed = capsys.readouterr().out
    assert all(region["caption"] in printed for region in image["regions"])
    with Image.open(out) as picture, Image.open(SCENE) as scene:
        assert picture.width > scene.width


def test_boxes_label_map_and_mask_pictures_are_read(tmp_path):
    scene = draw_scene(5, 1)
    labels = np.zeros(scene.image.size[::-1], np.uint8)
    files = []
    for index, item in enumerate(scene.objects):
        labels[item.mask] = index + 1
        files.append(tmp_path / f"mask{index}.png")
        Image.fromarray(item.mask).save(files[-1])
    scene.image.save(tmp_path / "scene.png")
    Image.fromarray(labels).save(tmp_path / "labels.png")
    np.save(tmp_path / "masks.npy", np.stack([item.mask for item in scene.objects]))
    forms = {
        "pictures": ["--masks", *map(str, files)],
        "array": ["--masks", str(tmp_path / "masks.npy")],
        "labels": ["--label-map", str(tmp_path / "labels.png")],
        "boxes": ["--boxes", "10,10,100,90", "20,30,64,64"],
    }
    results = {}
    for name, arguments in forms.items():
        target = tmp_path / f"{name}.json"
        assert main(["caption", str(tmp_path / "scene.png"), *arguments, "--json", str(target)]) == 0
        results[name] = json.loads(target.read_text())[0]["regions"]
    assert results["pictures"] == results["array"] == results["labels"]
    assert [region["box"] for region in results["boxes"]] == [
        {"xmin": 10, "ymin": 10, "xmax": 100, "ymax": 90},
        {"xmin": 20, "ymin": 30, "xmax": 64, "ymax": 64},
    ]


def test_several_images_go_to_a_folder_and_an_interrupted_jsonl_continues(tmp_path, capsys):
    second = tmp_path / "second.png"
    Image.open(SCENE).save(second)
    result, out = tmp_path / "result.jsonl", tmp_path / "pictures"
    arguments = ["caption", SCENE, str(second), "--masks", MASKS, MASKS, "--json", str(result), "--out", str(out)]
    assert main([*arguments, "--steps", "4"]) == 0
    lines = result.read_text().splitlines()
    assert [json.loads(line)["image"] for line in lines] == [SCENE, str(second)]
    assert sorted(path.name for path in out.iterdir()) == ["scene.png", "second.png"]
    result.write_text(lines[0] + "\n" + lines[1][:40])  # killed while writing the second image
    capsys.readouterr()
    assert main([*arguments, "--steps", "4"]) == 0
    assert result.read_text().splitlines() == lines
    assert SCENE not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["caption", "absent.png", "--boxes", "0,0,5,5"], "absent.png"),
        (["caption", SCENE, "--boxes", "0,0,5"], "boxes"),
        (["caption", SCENE, "--boxes", "a,b"], "x0,y0,x1,y1"),
        (["caption", SCENE, "--masks", "absent.json"], "absent.json"),
        (["caption", SCENE, SCENE, "--masks", MASKS], "2 images need 2 entries of --masks, got 1"),
        (["caption", SCENE, SCENE, "--masks", MASKS, MASKS, "--out", "x.png"], "--out must be a directory"),
        (["caption", SCENE, "--masks", MASKS, "--steps", "0"], "steps"),
        (["caption", SCENE, "--masks", MASKS, "--sampler", "best"], "sampler"),
        (["caption", SCENE, "--masks", MASKS, "--model", "examples"], "config.json"),
        (["caption", SCENE, "--masks", MASKS, "--dtype", "float99"], "float99"),
        (["caption", SCENE, "--masks", MASKS, "--device", "abacus"], "abacus"),
        (["evaluate", "--images", "0"], "num_images"),
    ],
)
def test_wrong_input_is_one_line_and_status_two(arguments, message, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert main(arguments) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "Traceback" not in error


def test_evaluate_prints_and_writes_the_same_scores(tmp_path, capsys):
    target = tmp_path / "report.json"
    assert main(["evaluate", "--dataset", "scenes", "--seed", "77", "--images", "3", "--json", str(target)]) == 0
    report, printed = json.loads(target.read_text()), capsys.readouterr().out
    assert report["num_images"] == 3
    assert len(report["captions"]) == report["num_regions"]
    assert f"{report['average']:8.1f}" in printed
    assert report["average"] > report["baselines"]["chance"]["average"]
    assert {"color", "pattern", "size", "part color"} <= set(report["per_attribute"])
    for key in ("tokens_per_forward", "seconds_per_image", "recognition", "environment"):
        assert key in report


def test_annotated_picture_marks_the_region_and_nothing_else():
    mask = np.zeros((1, 480, 480), bool)
    mask[0, 100:200, 100:200] = True
    picture = np.asarray(annotate(Image.new("RGB", (480, 480), "white"), mask, ["a square"]))
    changed = (picture[:, :480] != 255).any(-1)
    assert changed[100:200, 100:200].mean() > 0.9
    assert not changed[:90].any()
    assert (picture[:, 480:] != 255).any()  # the legend
    with pytest.raises(ValueError, match="1 masks need 1 captions, got 2"):
        annotate(Image.new("RGB", (480, 480)), mask, ["a", "b"])
