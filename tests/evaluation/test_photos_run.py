"""`perceptiondlm evaluate` on pictures with named regions: the report, and the yardsticks beside the model."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from perceptiondlm.evaluation.photos.annotations import read_pictures
from perceptiondlm.evaluation.photos.linear import linear_names
from perceptiondlm.scripts.cli import main


SHADES = {"apple": (200, 30, 30), "car": (40, 60, 200), "grass-merged": (40, 160, 50)}


def named_pictures(folder, name, count, seed):
    """An annotation file of pictures with three coloured boxes each, whose colours tell their names."""
    dice, records = np.random.default_rng(seed), []
    for number in range(count):
        pixels, regions = np.full((60, 90, 3), 240, np.uint8), []
        for column, category in enumerate(dice.permutation(list(SHADES))):
            x, y, side = 30 * column + dice.integers(0, 8), dice.integers(0, 30), dice.integers(12, 22)
            mask = np.zeros((60, 90), np.uint8, order="F")
            mask[y : y + side, x : x + side] = 1
            pixels[mask > 0] = np.clip(np.array(SHADES[category]) + dice.integers(-20, 20, 3), 0, 255)
            rle = coco_mask.encode(mask)
            rle = {"size": rle["size"], "counts": rle["counts"].decode()}
            regions.append({"category": str(category), "segmentation": rle, "isthing": category != "grass-merged"})
        file = f"{name}{number}.png"
        Image.fromarray(pixels).save(folder / file)
        records.append({"image": file, "width": 90, "height": 60, "regions": regions})
    (folder / f"{name}.json").write_text(json.dumps(records))
    return folder / f"{name}.json"


@pytest.mark.parametrize("switches", [{}, {"region_crop_size": 32}])
def test_a_linear_classifier_names_what_features_tell(switches, tiny_model, tiny_processor, tmp_path):
    model = tiny_model(**switches)
    training, asked = (read_pictures(named_pictures(tmp_path, *part)) for part in (("train", 12, 1), ("val", 4, 2)))
    state = torch.random.get_rng_state()
    found = linear_names(model, tiny_processor(model), training, asked)
    truth = [region.category for picture in asked for region in picture.regions]
    assert sum(a == b for a, b in zip(found, truth, strict=True)) >= 10  # of 12; 4 by chance
    assert torch.equal(torch.random.get_rng_state(), state)


def test_photos_are_scored_with_yardsticks_beside_them(tmp_path, capsys):
    named_pictures(tmp_path, "train", 4, 1)
    named_pictures(tmp_path, "val", 2, 2)
    out = tmp_path / "out"
    arguments = ["evaluate", "--dataset", "photos", "--data", str(tmp_path), "--out", str(out), "--preset", "fast"]
    assert main([*arguments, "--linear"]) == 0
    printed = capsys.readouterr().out
    report = json.loads((out / "results.json").read_text())
    assert report["num_regions"] == 6
    assert set(report["baselines"]) == {"always 'apple'", "a linear classifier on the vision tower"}
    assert report["baselines"]["a linear classifier on the vision tower"]["right"] >= 50
    assert "a linear classifier on the vision tower" in printed
    assert (out / "report.html").read_text().count("data:image/jpeg") == 2


def test_without_pictures_to_learn_from_nothing_is_captioned(tmp_path, capsys):
    file = named_pictures(tmp_path, "only", 1, 1)
    assert main(["evaluate", "--dataset", str(file), "--linear", "--out", str(tmp_path / "out")]) == 2
    assert "train.json" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
