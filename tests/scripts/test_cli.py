"""The `perceptiondlm` command, on the embedded models."""

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModel, AutoProcessor

from perceptiondlm.common.drawing import draw_regions
from perceptiondlm.common.loading import DRAWN_MODEL, from_checkpoint
from perceptiondlm.drawn.scenes import draw_scene
from perceptiondlm.scripts.cli import main


ROOT = Path(__file__).parents[2]
SCENE, MASKS = str(ROOT / "examples" / "scene.png"), str(ROOT / "examples" / "scene_masks.json")


def test_captions_a_picture_with_masks_from_json(tmp_path, capsys):
    out, result = tmp_path / "picture.png", tmp_path / "result.json"
    arguments = ["--masks", MASKS, "--model", str(DRAWN_MODEL), "--out", str(out), "--json", str(result)]
    assert main(["caption", SCENE, *arguments]) == 0
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


FAST = ["--steps", "1", "--max-new-tokens", "2"]


def coco_of_two(folder):
    """A file about the sample scene and a second image, and that image."""
    scene = json.loads(Path(MASKS).read_text())["annotations"]
    second = folder / "second.png"
    Image.open(SCENE).save(second)
    images = [{"id": 1, "file_name": "scene.png"}, {"id": 2, "file_name": "second.png"}]
    annotations = [{"image_id": 1 + (i > 0), "segmentation": a["mask_rle"]} for i, a in enumerate(scene)]
    (folder / "coco.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    return folder / "coco.json", second


def test_a_coco_file_gives_each_image_its_own_regions(tmp_path):
    coco, second = coco_of_two(tmp_path)
    count = len(json.loads(coco.read_text())["annotations"])
    result = tmp_path / "r.json"
    assert main(["caption", SCENE, str(second), "--masks", str(coco), "--json", str(result), *FAST]) == 0
    assert [len(image["regions"]) for image in json.loads(result.read_text())] == [1, count - 1]


def test_what_is_done_is_what_was_asked(tmp_path, capsys):
    """Other regions, questions or settings are new work; the same again is none."""
    result = tmp_path / "r.jsonl"
    base = ["caption", SCENE, "--json", str(result), *FAST]
    for count, more in enumerate(
        [["--boxes", "10,10,100,90"], ["--boxes", "20,20,100,90"], ["--boxes", "20,20,100,90", "--question", "What?"]],
        start=1,
    ):
        for _ in range(2):
            assert main([*base, *more]) == 0
            assert len(result.read_text().splitlines()) == count
    assert len({json.loads(line)["request"] for line in result.read_text().splitlines()}) == 3


def test_outputs_overwrite_nothing_unasked(tmp_path, capsys):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        Image.open(SCENE).save(tmp_path / folder / "x.png")
    images = [str(tmp_path / folder / "x.png") for folder in ("a", "b")]
    out, result = tmp_path / "out", tmp_path / "r.json"
    arguments = ["caption", *images, "--boxes", "10,10,100,90", "20,20,90,90", "--out", str(out), "--json", str(result)]
    assert main([*arguments, *FAST]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["x-2.png", "x.png"]
    assert main([*arguments, *FAST]) == 0  # the same again may replace itself
    arguments[4] = "12,12,100,90"
    before = {path: path.read_bytes() for path in (*out.iterdir(), result)}
    assert main([*arguments, *FAST]) == 2
    assert "--overwrite replaces it" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in before}
    assert main([*arguments, "--overwrite", *FAST]) == 0
    assert before[result] != result.read_bytes()


def test_a_bad_image_is_named_and_the_others_are_captioned(tmp_path, capsys):
    bad = tmp_path / "bad.png"
    bad.write_bytes(Path(SCENE).read_bytes()[:500])
    result = tmp_path / "r.jsonl"
    boxes = ["--boxes", "10,10,100,90", "10,10,100,90", "10,10,99999,90"]
    assert main(["caption", str(bad), SCENE, SCENE, *boxes, "--json", str(result), *FAST]) == 2
    error = capsys.readouterr().err
    assert "2 of 3 images failed" in error
    assert "bad.png is truncated or damaged" in error
    assert "boxes[0] is [10.0, 10.0, 99999.0, 90.0]" in error
    assert [json.loads(line)["image"] for line in result.read_text().splitlines()] == [SCENE]


def test_region_files_are_opened_one_by_one(tmp_path, monkeypatch):
    from perceptiondlm.scripts import caption_jobs

    opened = []
    monkeypatch.setattr(caption_jobs, "read_regions", lambda path, *_: opened.append(path) or [])
    files = [tmp_path / f"{number}.png" for number in range(300)]
    for path in files:
        path.write_bytes(b"")
    options = argparse.Namespace(
        images=[Path(SCENE)] * 300, label_map=list(map(str, files)), masks=None, boxes=None, exif=None, question=None
    )
    jobs = caption_jobs.plan_jobs(options)
    assert opened == []
    jobs[7].sample()
    assert opened == [files[7]]


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
        (["caption", SCENE, "--boxes", "1" * 400 + ",0,5,5"], "boxes[0] is [inf"),
        (["caption", SCENE, "--boxes", "0.1,0.1,0.5,0.5"], "fractions of the image"),
        (["caption", SCENE, "absent.png", "--boxes", "0,0,5,5", "0,0,5,5"], "no image file at absent.png"),
        (["caption", SCENE, "--boxes", "0,0,5,5", "--json", "examples"], "examples is a directory"),
        (["caption", SCENE, "--boxes", "0,0,5,5", "--json", "README.md/r.json"], "cannot be written"),
        (["caption", SCENE, "--boxes", "0,0,5,5", "--out", "x.xyz"], "no picture format has the suffix .xyz"),
        (["caption", SCENE, "--boxes", "0,0,5,5", "--out", SCENE], "is read by this run"),
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
    picture = np.asarray(draw_regions(Image.new("RGB", (480, 480), "white"), mask, ["a square"]))
    changed = (picture[:, :480] != 255).any(-1)
    assert changed[100:200, 100:200].mean() > 0.9
    assert not changed[:90].any()
    assert (picture[:, 480:] != 255).any()  # the legend
    with pytest.raises(ValueError, match="1 masks need 1 captions, got 2"):
        draw_regions(Image.new("RGB", (480, 480)), mask, ["a", "b"])


def test_a_checkpoint_in_a_subfolder_is_read_with_the_code_above_it(tmp_path):
    drawn = from_checkpoint(AutoModel, DRAWN_MODEL)
    expected = load_file(DRAWN_MODEL / "model.safetensors")["lm_head.weight"].float()
    assert torch.equal(drawn.lm_head.weight, expected)
    assert drawn.generation_config.suppress_tokens == [drawn.config.mask_token_id]
    saved = from_checkpoint(AutoProcessor, str(DRAWN_MODEL))
    assert len(saved.tokenizer) == drawn.config.text_config.vocab_size
    with pytest.raises(OSError, match="nowhere"):
        from_checkpoint(AutoModel, tmp_path / "nowhere")
