"""Named regions as training data: captions say what is true, the same record and seed give the same sample."""

import json
import random
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from transformers import AutoTokenizer

from perceptiondlm.checkpoints.tokenizer import build_tokenizer, colour_texts
from perceptiondlm.evaluation.photos.annotations import read_pictures
from perceptiondlm.evaluation.photos.layout import place
from perceptiondlm.evaluation.photos.names import NameTable
from perceptiondlm.training.data.bad_records import BadRecord
from perceptiondlm.training.data.data_config import DataConfig, LossConfig, SourceConfig
from perceptiondlm.training.data.mixture import build_mixture
from perceptiondlm.training.data.named_regions import NamedRegionSource, caption_names, cut_out
from perceptiondlm.training.data.true_captions import true_caption, with_article


TABLE = NameTable.coco()


# What the source needs of an `AnswerFormat`: groups of at most three regions.
LEFT = {"size": [40, 60], "counts": [0, 1200, 1200]}
GUESSES = [
    {"category": "dog", "chance": 0.6},
    {"category": "cat", "chance": 0.3},
    {"names": ["agaric"], "hypernyms": ["mushroom", "fungus"], "chance": 0.1},
]


ANSWERS = SimpleNamespace(processor=SimpleNamespace(config=SimpleNamespace(num_region_prompts=3)))


@pytest.fixture
def annotated(tmp_path):
    pixels = np.zeros((60, 90, 3), np.uint8)
    pixels[:, :30], pixels[:, 30:60] = (200, 20, 30), (60, 130, 60)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    regions = []
    for index, name in enumerate(("cat", "grass-merged", "dog")):
        counts = [1800 * index, 1800, 3600 - 1800 * index]
        regions.append({"category": name, "segmentation": {"size": [60, 90], "counts": counts}})
    path = tmp_path / "train.json"
    path.write_text(json.dumps([{"image": "a.png", "width": 90, "height": 60, "regions": regions}]))
    return path


def source(path, **settings) -> NamedRegionSource:
    return NamedRegionSource(SourceConfig("named_regions", path=str(path), **settings), ANSWERS, "0/set")


def test_captions_say_name_colour_size_and_place(annotated):
    one = source(annotated, general_share=0.0, augment=False)
    captions = sorted(caption for unit in range(2) for caption in one.sample(0, unit, "0/set/0")["captions"])
    assert captions == [
        "a cat, red, large, at the left",
        "a dog, black, large, at the right",
        "grass, green, large, in the middle",
    ]


def test_a_share_of_captions_uses_a_general_word(annotated):
    one = source(annotated, general_share=0.4, augment=False)
    said = [caption.split(",")[0] for epoch in range(200) for caption in one.sample(0, 0, f"{epoch}/set/0")["captions"]]
    animals = [name for name in said if name in ("a cat", "a dog", "an animal")]
    assert animals.count("an animal") / len(animals) == pytest.approx(0.4, abs=0.08)


def test_the_same_seed_gives_the_same_sample_and_another_epoch_another(annotated):
    one = source(annotated)
    first, again = (one.sample(0, 0, "3/set/0") for _ in range(2))
    assert first["captions"] == again["captions"]
    assert np.array_equal(np.asarray(first["image"]), np.asarray(again["image"]))
    sizes = {one.sample(0, 0, f"{epoch}/set/0")["image"].size for epoch in range(10)}
    assert len(sizes) > 3


def test_few_variants_of_a_picture_come_again_the_picture_itself_among_them(annotated):
    """What a frozen tower has seen of a picture is found again in later epochs."""
    one = source(annotated, variants=3)

    def seen(epochs):
        return {one.sample(0, unit, f"{epoch}/set/0")["image"].tobytes() for epoch in epochs for unit in range(2)}

    first = seen(range(60))
    assert len(first) >= 3
    assert Image.open(annotated.parent / "a.png").tobytes() in first
    assert seen(range(60, 100)) <= first


def test_places_follow_the_mirrored_and_cut_picture(annotated):
    """The red cat stands where the caption says, however the picture was turned."""
    one = source(annotated, general_share=0.0)
    for epoch in range(30):
        sample = one.sample(0, 0, f"{epoch}/set/0")
        for mask, caption in zip(sample["masks"], sample["captions"], strict=True):
            assert caption.endswith(place(mask))
            inside = np.asarray(sample["image"])[mask]
            red = (inside[:, 0] > 150).mean()
            assert (red > 0.9) == caption.startswith("a cat"), caption


def test_a_cut_keeps_regions_whole_enough():
    masks = np.zeros((2, 50, 50), bool)
    masks[0, :25], masks[1, 25:] = True, True
    image = Image.new("RGB", (50, 50))
    for seed in range(50):
        cut, kept_masks, kept = cut_out(image, masks, random.Random(seed))
        assert kept_masks.shape == (len(kept), cut.height, cut.width)
        least = 0.7 * 0.74**2  # squeezed to three quarters of either side, three tenths cut away
        assert all(mask.sum() >= least * masks[i].sum() for mask, i in zip(kept_masks, kept, strict=True))


def test_no_region_vanishes_in_a_squeeze():
    masks = np.zeros((1, 40, 40), bool)
    masks[0, 1, 1] = True
    for seed in range(50):
        _, kept_masks, kept = cut_out(Image.new("RGB", (40, 40)), masks, random.Random(seed))
        assert kept == [0]
        assert kept_masks.any()


def test_a_picture_named_as_a_whole_says_no_more_than_its_name():
    pixels, mask = np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8), bool)
    mask[0, 0] = True
    assert true_caption(TABLE["umbrella"], pixels, mask, 0.9, random.Random(0)).startswith("an umbrella, black, small")
    assert with_article("grass") == "grass"
    assert with_article("orange") == "an orange"


def test_a_missing_picture_is_a_bad_record(annotated):
    one = source(annotated)
    (annotated.parent / "a.png").unlink()
    with pytest.raises(BadRecord, match=r"a\.png"):
        one.sample(0, 0, "0/set/0")


@pytest.mark.parametrize("wrong", [{"segmentation": {"size": [9, 9], "counts": [81]}}, {"names": ["<img>"]}])
def test_a_wrong_region_costs_that_region_alone(annotated, tiny_model, tiny_processor, tmp_path, wrong):
    records = json.loads(annotated.read_text())
    records[0]["regions"][1].update(wrong)
    annotated.write_text(json.dumps([*records, {**records[0], "image": "missing.png"}]))
    model = tiny_model(text_config={"max_position_embeddings": 4096})
    data = DataConfig([SourceConfig("named_regions", path=str(annotated))], max_bad_share=0.6, max_length=4096)
    dataset = build_mixture(data, LossConfig(num_slots=24), tiny_processor(model), model.config, tmp_path / "cache")
    (report,) = dataset.report
    assert (report["records"], report["bad"], report["bad_regions"]) == (2, 1, 1)
    assert "region 1" in report["bad_region_records"][0]
    said = " ".join(caption for index in range(len(dataset)) for caption in dataset[index]["captions"])
    assert "grass" not in said


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_a_share_outside_its_range_is_refused(share):
    with pytest.raises(ValueError, match="general_share"):
        SourceConfig("named_regions", path="x", general_share=share)


@pytest.mark.parametrize("wrong", [{"variants": 0}, {"variants": 4, "augment": False}])
def test_variants_need_a_number_and_augmentation(wrong):
    with pytest.raises(ValueError, match="variants"):
        SourceConfig("named_regions", path="x", **wrong)


def test_a_path_is_needed():
    with pytest.raises(ValueError, match="needs path"):
        SourceConfig("named_regions")


def test_every_name_of_a_run_is_one_token_with_its_article(annotated, tmp_path):
    lemmas = {"image": "whole.png", "names": ["axolotl", "mud puppy"], "hypernyms": ["salamander", "animal"]}
    Image.new("RGB", (64, 64)).save(tmp_path / "whole.png")
    (tmp_path / "whole.json").write_text(json.dumps([lemmas]))
    sources = [SourceConfig("named_regions", path=str(path)) for path in (annotated, tmp_path / "whole.json")]
    names = caption_names([*sources, SourceConfig("scenes", samples=1)])
    assert {"an axolotl", "an animal", "grass", "a traffic light"} < set(names)
    tokenizer = build_tokenizer(colour_texts(), 512, 4096, names)
    captions = [f"{name}, red and white, tiny, at the top left" for name in names]
    ids = tokenizer(captions, add_special_tokens=False)["input_ids"]
    assert {len(row) for row in ids} == {len(ids[0])}
    assert len({row[0] for row in ids}) == len(names)  # the first token tells the names apart
    assert tokenizer.batch_decode(ids) == captions
    loaded = AutoTokenizer.from_pretrained(tokenizer.save_pretrained(tmp_path / "saved") and tmp_path / "saved")
    assert loaded(captions, add_special_tokens=False)["input_ids"] == ids
    assert len(tokenizer("a category", add_special_tokens=False)["input_ids"]) > 1  # no "a cat" inside a word


@pytest.fixture
def guessed(tmp_path):
    Image.new("RGB", (60, 40), (200, 20, 30)).save(tmp_path / "a.png")
    path = tmp_path / "guessed.json"
    regions = [{"segmentation": LEFT, "guesses": GUESSES}]
    path.write_text(json.dumps([{"image": "a.png", "width": 60, "height": 40, "regions": regions}]))
    return path


def test_names_are_drawn_by_their_chances_and_general_words_as_often_as_asked(guessed):
    one = source(guessed, general_share=0.2, augment=False)
    said = Counter(one.sample(0, 0, f"{epoch}/set/0")["captions"][0].split(",")[0] for epoch in range(1500))
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
