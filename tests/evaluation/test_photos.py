"""Named regions: what captions call them, colours, annotation files of every form, scores and the command."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from perceptiondlm.answers_perceptiondlm import calibrated
from perceptiondlm.evaluation.photos.annotations import read_pictures
from perceptiondlm.evaluation.photos.benchmark import load_named_regions, name_table
from perceptiondlm.evaluation.photos.colours import colour_shares, named_colours
from perceptiondlm.evaluation.photos.names import CategoryNames, NameTable
from perceptiondlm.evaluation.photos.scoring import (
    RegionResult,
    calibration,
    colours_right,
    fit_scores,
    score_picture,
    summarize,
)


PHOTOS = Path(__file__).parents[3] / "shared" / "data" / "photos"
TABLE = NameTable.coco()


@pytest.mark.parametrize(
    ("caption", "category", "verdict"),
    [
        ("an orange cat on a chair", "cat", "right"),
        ("an orange cat on a chair", "chair", "wrong"),
        ("A close-up of a small dog.", "dog", "right"),
        ("two people", "person", "right"),
        ("a woman holding an umbrella", "person", "right"),
        ("an animal, brown", "dog", "general"),
        ("a vehicle", "dog", "wrong"),
        ("a glass of wine", "wine glass", "general"),
        ("a purse", "handbag", "right"),
        ("a bag", "handbag", "general"),
        ("a thing", "dog", "wrong"),
        ("an object in the middle", "dog", "wrong"),
        ("brown and soft", "dog", "wrong"),
        ("", "dog", "wrong"),
        ("a hot dog", "dog", "wrong"),
        ("a hot dog", "hot dog", "right"),
        ("a teddy bear", "bear", "wrong"),
        ("a brick wall", "wall-brick", "right"),
        ("a wall", "wall-brick", "general"),
        ("a brick wall", "wall-other-merged", "wrong"),
        ("knives", "knife", "right"),
        ("trees", "tree-merged", "right"),
    ],
)
def test_the_name_of_a_caption_is_judged(caption, category, verdict):
    assert TABLE.verdict(caption, category) == verdict


def test_all_133_categories_have_words_that_fit_their_own_name():
    assert len(TABLE.entries) == 133
    for category, entry in TABLE.entries.items():
        assert TABLE.verdict(f"a {entry.name}, brown, at the left", category) == "right"
        for word in entry.broader:
            assert TABLE.verdict(f"a {word}, brown", category) == "general", (category, word)


def test_lemmas_of_wordnet_find_their_category():
    tabby = CategoryNames.of_lemmas(["tabby", "tabby cat"], ["domestic cat", "cat", "feline", "animal", "object"])
    assert TABLE.canonical(tabby).category == "cat"
    bird = CategoryNames.of_lemmas(["kite"], ["hawk", "bird of prey", "bird", "animal", "object"])
    assert TABLE.canonical(bird).category == "bird"  # the toy has nothing to do with animals
    tench = CategoryNames.of_lemmas(["tench", "Tinca tinca"], ["cyprinid", "fish", "animal", "entity"])
    assert TABLE.canonical(tench) == tench
    assert "entity" not in tench.general


@pytest.mark.parametrize(
    ("shade", "word"),
    [
        ((250, 250, 250), "white"),
        ((5, 5, 8), "black"),
        ((200, 20, 30), "red"),
        ((60, 130, 60), "green"),
        ((40, 80, 190), "blue"),
        ((120, 75, 45), "brown"),
        ((130, 130, 130), "grey"),
        ((245, 215, 60), "yellow"),
    ],
)
def test_colours_are_measured_under_the_mask(shade, word):
    pixels = np.zeros((20, 20, 3), np.uint8)
    pixels[...] = (255, 0, 255)
    mask = np.zeros((20, 20), bool)
    mask[5:15, 5:15] = True
    pixels[mask] = shade
    shares = colour_shares(pixels, mask)
    assert shares == {word: 1.0}
    assert named_colours(shares) == [word]


def test_two_colours_are_named_and_a_wrong_one_is_found():
    pixels = np.zeros((10, 10, 3), np.uint8)
    pixels[:6] = 255
    shares = colour_shares(pixels, np.ones((10, 10), bool))
    assert named_colours(shares) == ["white", "black"]
    assert colours_right("a dog, black and white", shares)
    assert not colours_right("a dog, red and white", shares)
    assert colours_right("a dog", shares) is None
    assert colours_right("an orange, white, small", shares)  # a fruit is no colour


def picture(folder: Path, name: str = "a.png") -> np.ndarray:
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[:, :30] = (200, 20, 30)
    Image.fromarray(pixels).save(folder / name)
    return pixels


def polygon(x0, y0, x1, y1):
    return [[x0, y0, x1, y0, x1, y1, x0, y1]]


def instances(folder: Path, **category) -> Path:
    picture(folder)
    content = {
        "images": [{"id": 7, "file_name": "a.png", "height": 40, "width": 60}],
        "categories": [{"id": 3, "name": "cat", **category}, {"id": 4, "name": "dog"}],
        "annotations": [
            {"image_id": 7, "category_id": 3, "segmentation": polygon(0, 0, 30, 40), "iscrowd": 0},
            {"image_id": 7, "category_id": 4, "segmentation": polygon(30, 0, 60, 40)},
            {"image_id": 7, "category_id": 4, "segmentation": {"size": [40, 60], "counts": [2400]}, "iscrowd": 1},
        ],
    }
    path = folder / "instances.json"
    path.write_text(json.dumps(content))
    return path


def panoptic(folder: Path) -> Path:
    picture(folder, "a.jpg")
    ids = np.full((40, 60), 5)
    ids[:, 30:] = 70000
    (folder / "val").mkdir()
    channels = np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=-1).astype(np.uint8)
    Image.fromarray(channels).save(folder / "val" / "a.png")
    content = {
        "images": [{"id": 1, "file_name": "a.jpg", "height": 40, "width": 60}],
        "categories": [{"id": 3, "name": "cat", "isthing": 1}, {"id": 9, "name": "grass-merged", "isthing": 0}],
        "annotations": [
            {
                "image_id": 1,
                "file_name": "a.png",
                "segments_info": [{"id": 5, "category_id": 3}, {"id": 70000, "category_id": 9}],
            }
        ],
    }
    path = folder / "val.json"
    path.write_text(json.dumps(content))
    return path


def own(folder: Path) -> Path:
    picture(folder)
    regions = [{"category": name, "segmentation": {"size": [40, 60], "counts": counts}} for name, counts in (
        ("cat", [0, 1200, 1200]), ("dog", [1200, 1200]))]  # fmt: skip
    path = folder / "val.json"
    path.write_text(json.dumps([{"image": "a.png", "width": 60, "height": 40, "regions": regions}]))
    return path


@pytest.mark.parametrize("form", [instances, panoptic, own])
def test_every_form_gives_the_same_regions(form, tmp_path):
    (read,) = read_pictures(form(tmp_path))
    assert read.regions[0].category == "cat"
    assert len(read.regions) == 2  # the crowd is left out
    masks = read.masks((40, 60))
    assert masks[0, :, :30].all()
    assert not masks[0, :, 30:].any()
    assert masks[1, :, 30:].all()


def test_synonyms_of_lvis_are_accepted(tmp_path):
    pictures = read_pictures(instances(tmp_path, synonyms=["cat", "house_cat"], synset="cat.n.01"))
    table = name_table(pictures)
    assert table.verdict("a house cat", "cat") == "right"
    assert table.verdict("an animal", "cat") == "general"


def test_a_picture_that_is_named_as_a_whole(tmp_path):
    picture(tmp_path)
    record = {"image": "a.png", "names": ["tench"], "hypernyms": ["fish", "animal"]}
    path = tmp_path / "imagenet.json"
    path.write_text(json.dumps([record]))
    benchmark, pictures = load_named_regions(path, "whole")
    assert benchmark.images[0].regions[0].mask().all()
    assert name_table(pictures).verdict("a fish", "tench") == "general"


def test_categories_without_words_are_named_before_any_work(tmp_path):
    path = own(tmp_path)
    path.write_text(path.read_text().replace('"dog"', '"quokka"'))
    with pytest.raises(ValueError, match="quokka"):
        name_table(read_pictures(path))


@pytest.mark.parametrize(
    ("content", "message"),
    [({"a": 1}, "accepted: a list of records"), ([{"regions": []}], "record 0"), ([], "names no region")],
)
def test_other_files_are_refused(content, message, tmp_path):
    path = tmp_path / "x.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        read_pictures(path)


def test_scores_by_size_kind_and_colour(tmp_path):
    (read,) = read_pictures(own(tmp_path))
    captions = {"a_0": "a cat, red, large, at the left", "a_1": "an animal, green, tiny, somewhere"}
    results = score_picture(read, ["a_0", "a_1"], captions, {"a_0": 0.9, "a_1": 0.3}, TABLE)
    report = summarize(results)
    assert report["shares"]["all"] == {
        "regions": 2, "right": 50.0, "general": 50.0, "wrong": 0.0, "right_or_general": 100.0,
    }  # fmt: skip
    assert report["shares"]["above 10 %"]["regions"] == 2
    assert report["shares"]["below 0.3 %"]["right"] is None
    assert report["colours_right"] == 50.0  # the dog's half is black
    assert (report["sizes_right"], report["captions_with_sizes"]) == (50.0, 100.0)
    assert (report["places_right"], report["captions_with_places"]) == (100.0, 50.0)


def test_calibration_compares_confidence_with_truth():
    def result(score, verdict):
        return RegionResult("a_0", "cat", True, 0.5, "", score, None, verdict, None)

    honest = [result(0.8, "right")] * 8 + [result(0.8, "wrong")] * 2
    assert calibration(honest)["expected_error"] == pytest.approx(0)
    boasting = [result(0.95, "wrong")] * 4
    assert calibration(boasting)["expected_error"] == pytest.approx(0.95)
    assert calibration([result(None, "right")]) is None


def test_a_fitted_calibration_makes_scores_honest():
    dice = random.Random(0)
    told = [0.5 + 0.5 * dice.random() for _ in range(4000)]
    scored = [(score, dice.random() < score**4) for score in told]  # far too sure of itself
    line = fit_scores(scored)
    for low in (0.5, 0.7, 0.9):
        inside = [(calibrated(score, line), true) for score, true in scored if low <= score < low + 0.1]
        mean, share = (sum(values) / len(inside) for values in zip(*inside, strict=True))
        assert mean == pytest.approx(share, abs=0.08)
    assert all(0 <= calibrated(score, line) <= 1 for score in (0.0, 0.5, 1.0))
    assert fit_scores([(0.9, True)])[0] == pytest.approx(1, abs=0.2)  # one region says next to nothing


@pytest.mark.skipif(not PHOTOS.is_dir(), reason="the shared photos are not there")
def test_the_shared_photos_have_words_and_masks():
    _, pictures = load_named_regions(PHOTOS / "val.json", "val", limit=3)
    name_table(read_pictures(PHOTOS / "val.json"))
    assert all(picture.masks(picture.size).any(axis=(1, 2)).all() for picture in pictures)
