"""The embedded checkpoints, as users meet them: the default in the repository's root, and that of the drawn world."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from perceptiondlm.drawn.scenes import draw_scene
from perceptiondlm.modeling_perceptiondlm import PerceptionDLMForConditionalGeneration
from perceptiondlm.pipeline_perceptiondlm import RegionCaptioningPipeline
from perceptiondlm.processing_perceptiondlm import PerceptionDLMProcessor, switches_of


ROOT = Path(__file__).parents[2]
DRAWN = ROOT / "drawn" / "model"
DEMO = Path(__file__).parents[3] / "shared" / "data" / "demo"
HELD_OUT_SEED = 12345


@pytest.fixture(scope="module", params=[ROOT, DRAWN], ids=["default", "drawn"])
def checkpoint(request):
    return request.param


@pytest.fixture(scope="module")
def model(checkpoint):
    return PerceptionDLMForConditionalGeneration.from_pretrained(checkpoint)


@pytest.fixture(scope="module")
def processor(checkpoint):
    return PerceptionDLMProcessor.from_pretrained(checkpoint)


@pytest.fixture(scope="module")
def held_out():
    return [draw_scene(HELD_OUT_SEED, index) for index in range(6)]


@pytest.fixture(scope="module")
def captioned(model, processor, held_out):
    """The output for all held-out scenes, decoded as one batch."""
    masks = [[item.mask for item in scene.objects] for scene in held_out]
    return model.generate(**processor(images=[scene.image for scene in held_out], masks=masks))


def grid_boxes(size, columns, rows):
    """Boxes that tile an image of (width, height) pixels."""
    x, y = (np.linspace(0, side, parts + 1).astype(int) for side, parts in zip(size, (columns, rows), strict=True))
    return [[x[c], y[r], x[c + 1], y[r + 1]] for r in range(rows) for c in range(columns)]


def test_embedded_weights_are_small_and_load_in_full_precision(model, checkpoint):
    assert (checkpoint / "model.safetensors").stat().st_size < 25e6
    assert model.dtype == torch.float32
    assert not model.training
    assert all(torch.isfinite(weight).all() for weight in model.parameters())


def test_embedded_processor_and_settings_belong_to_the_model(model, processor):
    config = model.config
    most = processor.image_processor.max_tiles
    own = {name: getattr(processor, name) for name in ("crop_context", "crop_max_share", "score_calibration")}
    fitting = PerceptionDLMProcessor.from_config(config, processor.tokenizer, max_tiles=most, **own).to_dict()
    found = processor.to_dict()
    found["image_processor"].pop("auto_map")
    assert fitting == found
    assert switches_of(processor.config) == switches_of(config)
    assert len(processor.tokenizer) == config.text_config.vocab_size
    names = {
        "<IMG_CONTEXT>": config.image_token_id,
        "<|mdm_mask|>": config.mask_token_id,
        "<|eot_id|>": config.end_of_turn_token_id,
        "<|endoftext|>": config.end_of_text_token_id,
        "<|reserved_token_0|>": config.roi_token_ids[0],
        "<|Mask_Cap_0|>": config.caption_token_ids[0],
    }
    assert {name: processor.tokenizer.convert_tokens_to_ids(name) for name in names} == names
    assert config.mask_token_id in model.generation_config.suppress_tokens


@pytest.mark.parametrize(("columns", "rows"), [(1, 1), (7, 1), (10, 6)])
def test_embedded_captions_any_number_of_regions(columns, rows, model, processor, held_out):
    image = held_out[0].image
    boxes = grid_boxes(image.size, columns, rows)
    output = model.generate(**processor(images=image, boxes=boxes), max_new_tokens=8, steps=8)
    assert output.sequences.shape == (columns * rows, 8)
    assert output.num_forward_passes <= 8  # not one more for sixty regions than for one
    (captions,) = processor.post_process_region_captions(output)
    assert len(captions) == columns * rows
    assert all(captions)


def test_drawn_captions_of_held_out_scenes_name_the_objects(captioned, processor, held_out, checkpoint):
    if checkpoint != DRAWN:
        pytest.skip("the default speaks of photographs first")
    found = processor.post_process_region_captions(captioned)
    assert [len(captions) for captions in found] == [len(scene.objects) for scene in held_out]
    items = [item for scene in held_out for item in scene.objects]
    words = [caption.split(" with ")[0].split() for caption in itertools.chain(*found)]
    assert len(items) > 12
    for attribute in ("category", "size", "color"):
        named = [getattr(item, attribute) in head for item, head in zip(items, words, strict=True)]
        assert sum(named) / len(items) > 0.85, attribute
    exact = [text == item.caption for text, item in zip(itertools.chain(*found), items, strict=True)]
    assert sum(exact) / len(items) > 0.3


def test_embedded_regions_together_equal_regions_one_by_one(captioned, model, processor, held_out):
    index = min(range(len(held_out)), key=lambda i: len(held_out[i].objects))
    together = captioned.sample_ids == index
    assert together.sum() > 1
    for place, item in zip(together.nonzero()[:, 0].tolist(), held_out[index].objects, strict=True):
        alone = model.generate(**processor(images=held_out[index].image, masks=item.mask))
        assert torch.equal(alone.sequences[0], captioned.sequences[place])
        torch.testing.assert_close(alone.confidences[0], captioned.confidences[place], atol=1e-4, rtol=1e-4)
    assert len(set(map(tuple, captioned.sequences[together].tolist()))) > 1


def test_embedded_answers_a_question_about_the_image(model, processor, held_out):
    image, question = held_out[0].image, "How many objects are in the image?"
    inputs = processor(images=image, text=question)
    if not model.config.image_in_prompt:
        with pytest.raises(ValueError, match="sees regions alone"):
            model.generate(**inputs)
        inputs = processor(images=image, text=question, masks=np.ones((1, image.height, image.width), bool))
    (answer,) = processor.post_process_image_text_to_text(model.generate(**inputs, max_new_tokens=4, steps=4))
    assert answer


@pytest.fixture(scope="module")
def demo():
    """The photo and its three masks; the files are white on black, blurred a few grey levels by JPEG."""
    if not DEMO.is_dir():
        pytest.skip("the demo photo does not lie beside this repository")
    files = [DEMO / f"demo_mask_{index}.jpg" for index in range(3)]
    return Image.open(DEMO / "demo.jpg"), [np.asarray(Image.open(file)) > 127 for file in files], files


def test_embedded_captions_a_photo(demo, model, processor):
    image, masks, files = demo
    inputs = processor(images=image, masks=masks)
    assert inputs["region_boxes"].tolist() == [[154, 29, 456, 475], [346, 34, 372, 62], [67, 324, 175, 466]]
    assert torch.equal(inputs["region_coverage"], processor(images=image, masks=files)["region_coverage"])
    output = model.generate(**inputs)
    (captions,) = processor.post_process_region_captions(output)
    assert len(captions) == 3
    assert all(captions)
    results = RegionCaptioningPipeline(model=model, processor=processor)(image, masks=masks)
    assert [result["caption"] for result in results] == captions
    assert all(0 < result["score"] <= 1 for result in results)
    assert [list(result["box"].values()) for result in results] == inputs["region_boxes"].tolist()
