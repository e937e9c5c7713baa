"""Base models on regions they never learned, and all regions under one prompt id (Table 10)."""

import numpy as np
import pytest
import torch

from perceptiondlm.evaluation.runner import caption_image
from perceptiondlm.evaluation.zero_shot import box_of, grown, percent, zero_shot_inputs


SETTINGS = {"steps": 2, "max_new_tokens": 6}


def masks_of(scene) -> dict[str, np.ndarray]:
    return {region: item.mask for region, item in zip(scene.region_ids, scene.objects, strict=True)}


@pytest.fixture(scope="module")
def base(tiny_model, tiny_processor):
    model = tiny_model(region_conditioning="none")
    return model, tiny_processor(model)


@pytest.mark.parametrize("way", ["boxes", "crops"])
def test_a_base_model_captions_every_region(base, scene, way):
    model, processor = base
    found = caption_image(model, processor, "i", scene.image, masks_of(scene), zero_shot=way, **SETTINGS)
    assert list(found.captions) == list(scene.region_ids)
    assert all(isinstance(caption, str) for caption in found.captions.values())
    assert found.num_slots == 6 * len(scene.objects)


def test_regions_are_shown_by_their_boxes(base, scene):
    _, processor = base
    masks = list(masks_of(scene).values())
    said = processor.tokenizer.batch_decode(zero_shot_inputs(processor, scene.image, masks, "boxes")["input_ids"])
    assert len(said) == len(masks)
    for text, mask in zip(said, masks, strict=True):
        words = percent(box_of(mask), scene.image.size)
        digits = "".join(character for character in text if character.isdigit())
        assert "".join(str(words[name]) for name in ("x0", "y0", "x1", "y1")) in digits
    crops = zero_shot_inputs(processor, scene.image, masks, "crops")
    assert len(crops["input_ids"]) == len(masks)
    with pytest.raises(ValueError, match=r"zero_shot must be one of \('boxes', 'crops'\), got 'words'"):
        zero_shot_inputs(processor, scene.image, masks, "words")


def test_crops_keep_their_object_and_stay_inside():
    mask = np.zeros((50, 100), dtype=bool)
    mask[45:48, 96:99] = True
    x0, y0, x1, y1 = grown(box_of(mask), (100, 50))
    assert x0 <= 96
    assert y0 <= 45
    assert (x1, y1) == (100, 50)


@pytest.fixture(scope="module")
def vision(tiny_model, tiny_processor):
    model = tiny_model(region_conditioning="vision", num_region_prompts=2)
    return model, tiny_processor(model)


def test_regions_share_a_prompt_id_only_when_told_so(vision, scene):
    model, processor = vision
    masks = list(masks_of(scene).values())
    split = processor(images=scene.image, masks=masks)
    assert split["num_regions"].tolist() == [2, 1]
    shared = processor(images=scene.image, masks=masks, share_prompt_ids=True)
    assert shared["num_regions"].tolist() == [3]
    assert shared["prompt_ids"].tolist() == [0, 0, 0]
    together = split["prompt_coverage"][: len(shared["prompt_coverage"])].sum(1) + split["prompt_coverage"][
        len(shared["prompt_coverage"]) :
    ].sum(1)
    assert torch.allclose(shared["prompt_coverage"][:, 0], together.clamp(max=1), atol=1e-6)
    assert not shared["prompt_coverage"][:, 1].any()
    with pytest.raises(ValueError, match="different ones within a pass"):
        processor(images=scene.image, masks=masks[:2], prompt_ids=[0, 0])
    given = processor(images=scene.image, masks=masks, prompt_ids=[1, 0, 1], share_prompt_ids=True)
    assert given["prompt_ids"].tolist() == [1, 0, 1]
    found = caption_image(model, processor, "i", scene.image, masks_of(scene), share_prompt_ids=True, **SETTINGS)
    assert len(found.captions) == 3


def test_sharing_means_nothing_without_prompt_ids(tiny_model, tiny_processor, scene):
    processor = tiny_processor(tiny_model())
    with pytest.raises(ValueError, match="under 'vision'"):
        processor(images=scene.image, masks=list(masks_of(scene).values()), share_prompt_ids=True)
