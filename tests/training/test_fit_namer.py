"""A namer fitted to a handful of pictures names regions of others, and says so in a checkpoint's captions."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from perceptiondlm.checkpoints.detectors import COCO_CLASSES
from perceptiondlm.checkpoints.folder import export
from perceptiondlm.checkpoints.tokenizer import build_tokenizer, scene_texts
from perceptiondlm.evaluation.photos.annotations import read_pictures
from perceptiondlm.evaluation.photos.benchmark import encoded
from perceptiondlm.evaluation.photos.names import NameTable
from perceptiondlm.modeling_perceptiondlm import PerceptionDLMForConditionalGeneration
from perceptiondlm.nanodet_perceptiondlm import NanoDet
from perceptiondlm.processing_perceptiondlm import PerceptionDLMProcessor
from perceptiondlm.training import fit_namer
from perceptiondlm.training.config import RunConfig
from perceptiondlm.training.data.named_regions import caption_names
from perceptiondlm.training.fit_namer import GENERAL_WEIGHT, Vocabulary, Weighing, Witnessed, fit, main
from perceptiondlm.training.start import build_config, build_model


COLOURS = {"stop sign": (200, 20, 30), "broccoli": (20, 160, 40), "sky-other-merged": (60, 110, 230)}


def write_pictures(folder, count: int, seed: int):
    """Pictures of grey noise with a coloured rectangle for each category, and their annotations."""
    draw, records = np.random.default_rng(seed), []
    folder.mkdir()
    for number in range(count):
        pixels = draw.integers(90, 130, (64, 96, 3), dtype=np.uint8)
        regions = []
        for place, category in enumerate(draw.permutation(list(COLOURS))):
            y, x = draw.integers(0, 30), 32 * place + draw.integers(0, 8)
            mask = np.zeros((64, 96), bool)
            mask[y : y + 30, x : x + 22] = True
            pixels[mask] = np.clip(np.array(COLOURS[category]) + draw.integers(-20, 20, (mask.sum(), 3)), 0, 255)
            regions.append({"category": category, "isthing": 1, "segmentation": encoded(mask)})
        Image.fromarray(pixels).save(folder / f"{number}.png")
        records.append({"image": f"{number}.png", "width": 96, "height": 64, "regions": regions})
    (folder / "regions.json").write_text(json.dumps(records))
    return folder / "regions.json"


@pytest.fixture(scope="module")
def naming_parts(tiny_conv):
    """A tiny model with a convolutional tower, whose tokenizer has a token for every name, and its processor."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer(scene_texts(seed=0, num_images=20), 768, 4096, phrases=caption_names([]))
    config = build_config(tiny_conv(region_crop_size=32), tokenizer)
    model = PerceptionDLMForConditionalGeneration(config).eval()
    return model, PerceptionDLMProcessor.from_config(config, tokenizer)


@pytest.fixture
def detector():
    torch.manual_seed(1)
    return NanoDet(4, len(COCO_CLASSES)).eval()


def test_regions_of_unseen_pictures_are_named(naming_parts, detector, tmp_path, capsys):
    model, processor = naming_parts
    known = read_pictures(write_pictures(tmp_path / "known", 12, 0))
    unseen = read_pictures(write_pictures(tmp_path / "unseen", 6, 1))
    named = fit(model, processor, known, detector)
    assert "with the detector" in capsys.readouterr().out
    right = []
    for picture in unseen:
        image, masks = picture.read()
        output = named.generate(**processor(images=image, masks=masks), max_new_tokens=2, steps=2)
        said = processor.tokenizer.batch_decode(output.sequences[:, :1])
        right += [
            NameTable.coco().verdict(*pair) for pair in zip(said, [r.category for r in picture.regions], strict=True)
        ]
    assert right.count("right") >= 0.8 * len(right)
    assert not hasattr(model, "region_namer")  # the model that was given stays as it was


def test_the_command_writes_a_model_that_loads(naming_parts, detector, tmp_path, monkeypatch):
    model, processor = naming_parts
    model.save_pretrained(tmp_path / "plain")
    processor.save_pretrained(tmp_path / "plain")
    path = write_pictures(tmp_path / "known", 4, 0)
    monkeypatch.setattr(fit_namer, "load_detector", lambda given: detector)
    main(
        [str(tmp_path / "plain"), "--regions", str(path), "--detector", "nanodet.json", "--out", str(tmp_path / "out")]
    )
    loaded = PerceptionDLMForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert loaded.generation_config.naming_threshold == 0.0
    kept = dict(model.named_parameters())
    for name, weight in loaded.named_parameters():
        if name in kept:
            torch.testing.assert_close(weight, kept[name], atol=1e-6, rtol=2**-10)  # stored in float16
    texts = processor.tokenizer.batch_decode(loaded.region_namer.word_ids[:, None])
    assert {"a stop sign", "an animal", "sky"} <= {text.strip() for text in texts}


def test_a_run_that_starts_from_it_leaves_the_namer_behind(naming_parts, detector, tmp_path):
    """A language model that is taught other captions begins them with its own words."""
    model, processor = naming_parts
    named = fit(model, processor, read_pictures(write_pictures(tmp_path / "known", 4, 0)), detector)
    export(named, processor, tmp_path / "named", torch.float32)
    started, _ = build_model(
        RunConfig(str(tmp_path / "out"), {"output_dir": str(tmp_path)}, init_from=str(tmp_path / "named"))
    )
    assert started.generation_config.naming_threshold is None
    assert dict(started.named_parameters()).keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(weight, model.state_dict()[name]) for name, weight in started.state_dict().items())


def test_words_that_are_no_tokens_are_named(tiny_model, tiny_processor, detector, tmp_path):
    model = tiny_model(region_crop_size=32)
    pictures = read_pictures(write_pictures(tmp_path / "known", 4, 0))
    with pytest.raises(ValueError, match=r"no single token for .*tokenizer\.names"):
        fit(model, tiny_processor(model), pictures, detector)


def test_too_few_pictures_are_refused(naming_parts, detector, tmp_path):
    pictures = read_pictures(write_pictures(tmp_path / "known", 3, 0))
    with pytest.raises(ValueError, match="4 parts of the pictures, got 3"):
        fit(*naming_parts, pictures, detector)


def test_a_general_word_counts_a_share_of_its_kinds():
    vocabulary = Vocabulary.of([], GENERAL_WEIGHT)
    kinds = [kind.category for kind in vocabulary.kinds]
    animal = vocabulary.shares_WK[vocabulary.words.index("an animal")]
    assert animal[kinds.index("dog")] == animal[kinds.index("zebra")] == pytest.approx(GENERAL_WEIGHT)
    assert animal[kinds.index("car")] == 0
    dog = vocabulary.shares_WK[vocabulary.words.index("a dog")]
    assert dog[kinds.index("dog")] == 1
    assert dog.sum() == 1
    assert [kinds[index] for index in vocabulary.classes] == list(COCO_CLASSES)


def test_the_better_witness_counts_more():
    """A classifier that guesses and a detector that is right, then the other way round."""
    draw = torch.Generator().manual_seed(0)
    kinds_R = torch.randint(0, 4, (200,), generator=draw)
    true, noise = 3.0 * torch.eye(4)[kinds_R], torch.randn(200, 4, generator=draw)
    for good in ("detector", "classifier"):
        scores, classes = (noise, true) if good == "detector" else (true, noise)
        seen = Witnessed(torch.zeros(200, 1), classes, kinds_R, torch.arange(200))
        weighing = Weighing.fitted(scores, seen, torch.arange(4))
        assert abs(weighing.detector) * 3 > 1 if good == "detector" else abs(weighing.detector) < 0.3
        assert (weighing(scores, classes, torch.arange(4)).argmax(dim=1) == kinds_R).float().mean() > 0.95
