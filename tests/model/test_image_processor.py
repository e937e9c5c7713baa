"""The image processor: tiling as `AutoImageProcessor` gives it, and its settings in one place."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoProcessor

from perceptiondlm.checkpoints.folder import register_auto_classes
from perceptiondlm.image_processing_perceptiondlm import PerceptionDLMImageProcessor
from perceptiondlm.processing_perceptiondlm import PerceptionDLMProcessor, switches_of


ROOT = Path(__file__).parents[2]  # the embedded default
BOX = [[3, 4, 30, 40]]


def noise_image(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def settings_of(processor):
    """What a processor saves, but for the code that reads it."""
    content = processor.to_dict()
    for part in (content, content["image_processor"]):
        part.pop("auto_map", None)
    return content


def test_it_loads_from_the_repository_and_agrees_with_the_processor():
    found = AutoImageProcessor.from_pretrained(ROOT, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(ROOT, trust_remote_code=True)
    assert type(found).__name__ == type(processor.image_processor).__name__ == "PerceptionDLMImageProcessor"
    images = [noise_image(500, 240), noise_image(60, 62, seed=1)]
    tiles = found(images, return_tensors="pt")
    batch = processor(images=images, boxes=[BOX, BOX])
    assert tiles["tile_grids"].tolist() == [[2, 1], [1, 1]]
    for name in ("pixel_values", "tile_grids", "image_sizes"):
        assert torch.equal(tiles[name], batch[name]), name
    assert found(images[0])["pixel_values"].dtype == np.uint8


def test_settings_stand_in_one_place():
    saved = json.loads((ROOT / "processor_config.json").read_text())
    assert saved["image_processor"]["max_tiles"] == 6
    config = json.loads((ROOT / "config.json").read_text())
    assert not set(saved) & set(config) - {"auto_map"}
    assert not {"max_tiles", "tile_size", "image_mean"} & set(saved)


def test_settings_of_a_call_replace_its_own():
    processor = PerceptionDLMImageProcessor(tile_size=32, max_tiles=6)
    image = noise_image(96, 32)
    assert processor(image)["tile_grids"].tolist() == [[3, 1]]
    assert processor(image, max_tiles=1, return_tensors="pt")["pixel_values"].shape == (1, 3, 32, 32)
    scaled = processor(image, do_rescale=True)["pixel_values"]
    assert scaled.dtype == np.float32
    np.testing.assert_allclose(scaled, processor(image)["pixel_values"] / 255, rtol=1e-6)
    normalised = processor(image, do_rescale=True, do_normalize=True)["pixel_values"]
    np.testing.assert_allclose(normalised, (scaled - 0.5) / 0.5, rtol=1e-6)
    with pytest.raises(TypeError, match=r"unknown image processor keywords \['size'\]"):
        processor(image, size=224)


def test_every_form_of_an_image_is_taken(tmp_path):
    processor = PerceptionDLMImageProcessor(tile_size=32)
    image = noise_image(32, 32)
    image.save(tmp_path / "image.png")
    nested = processor(
        [[image, np.asarray(image)], [str(tmp_path / "image.png"), (tmp_path / "image.png").read_bytes()]]
    )
    assert nested["pixel_values"].shape == (4, 3, 32, 32)
    assert (nested["pixel_values"] == nested["pixel_values"][0]).all()
    with pytest.raises(ValueError, match="empty list"):
        processor([])


def test_saved_alone_it_loads_again(tmp_path):
    register_auto_classes()
    PerceptionDLMImageProcessor(tile_size=64, max_tiles=3, exif="applied").save_pretrained(tmp_path)
    loaded = AutoImageProcessor.from_pretrained(tmp_path, trust_remote_code=True)
    assert (loaded.tile_size, loaded.max_tiles, loaded.exif) == (64, 3, "applied")
    assert PerceptionDLMImageProcessor.from_pretrained(tmp_path, max_tiles=5).max_tiles == 5


# --- where the processor's switches come from -------------------------------------------------------------------------

SWITCHES = {"roi_size": 3, "num_region_prompts": 2, "region_conditioning": "vision", "attention_layout": "full"}


def test_a_processor_saved_alone_keeps_the_models_config(tmp_path, tiny_model, tiny_processor):
    processor = tiny_processor(tiny_model(**SWITCHES))
    processor.save_pretrained(tmp_path)
    assert "roi_size" not in json.loads((tmp_path / "processor_config.json").read_text())
    loaded = PerceptionDLMProcessor.from_pretrained(tmp_path)
    assert switches_of(loaded.config) == switches_of(processor.config)
    assert settings_of(loaded) == settings_of(processor)


def test_a_processor_beside_a_model_reads_its_config(tmp_path, caplog, monkeypatch, tiny_model, tiny_processor):
    first, second = tiny_model(), tiny_model(**SWITCHES)
    first.config.save_pretrained(tmp_path)
    before = (tmp_path / "config.json").read_text()
    tiny_processor(first).save_pretrained(tmp_path)
    assert (tmp_path / "config.json").read_text() == before
    second.config.save_pretrained(tmp_path)
    assert PerceptionDLMProcessor.from_pretrained(tmp_path).config.roi_size == 3
    monkeypatch.setattr("perceptiondlm.processing_perceptiondlm.logger.propagate", True, raising=False)
    said = []
    monkeypatch.setattr("perceptiondlm.processing_perceptiondlm.logger.warning", lambda *words: said.append(words))
    tiny_processor(first).save_pretrained(tmp_path)  # the model that stands there decides, and that is said
    assert "other switches" in said[0][0]


@pytest.mark.parametrize("beside_a_model", [True, False])
def test_processors_saved_in_the_former_form_load(beside_a_model, tmp_path, tiny_model, tiny_processor):
    """Every setting lay flat in processor_config.json, the switches of the model's config among them."""
    model = tiny_model(**SWITCHES)
    processor = tiny_processor(model, max_tiles=3, image_mean=[0.1, 0.2, 0.3], region_question="What?")
    processor.save_pretrained(tmp_path)
    tiling = processor.image_processor
    former = {
        **SWITCHES, "processor_class": "PerceptionDLMProcessor", "tile_size": 64, "patch_size": 8, "pixel_unshuffle": 2,
        "max_tiles": 3, "image_mean": tiling.image_mean, "image_std": tiling.image_std, "use_roi_replay": True,
        "coverage_subsamples": 2, "max_regions_per_pass": None, "region_question": "What?",
        "system_prompt": "You are a helpful assistant.",
    }  # fmt: skip
    (tmp_path / "processor_config.json").write_text(json.dumps(former))
    if not beside_a_model:
        (tmp_path / "config.json").unlink()
    loaded = PerceptionDLMProcessor.from_pretrained(tmp_path)
    assert settings_of(loaded) == settings_of(processor)
    image = noise_image(200, 130)
    before, after = (p(images=image, boxes=[*BOX, [50, 20, 120, 90]]) for p in (processor, loaded))
    assert set(before) == set(after)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_tiles_that_are_not_the_models_are_refused(tiny_model, tokenizer):
    with pytest.raises(ValueError, match=r"tiles of 32 px.*64"):
        PerceptionDLMProcessor(PerceptionDLMImageProcessor(tile_size=32), tokenizer, config=tiny_model().config)
    assert PerceptionDLMProcessor(PerceptionDLMImageProcessor(tile_size=256), tokenizer).config.patches_per_side == 16
