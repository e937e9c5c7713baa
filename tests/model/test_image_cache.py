"""An image encoded once gives what it gives when encoded every time, and costs only the new regions' tokens."""

import pytest
import torch
from model_batches import masks_of

from perceptiondlm.cache_perceptiondlm import weights_fingerprint
from perceptiondlm.pipeline_perceptiondlm import RegionCaptioningPipeline


SETTINGS = {"max_new_tokens": 6, "steps": 6}
QUESTION = "What is in each masked region?"


@pytest.fixture
def encoded(model, processor, scene):
    return model.encode_image(**processor(images=scene.image, masks=masks_of(scene)))


class Counter:
    """Tokens that a module was run on, call by call."""

    def __init__(self, module, read):
        self.calls: list[int] = []
        self.hook = module.register_forward_hook(
            lambda _module, inputs, _output: self.calls.append(read(inputs)), always_call=False
        )


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("text", [None, QUESTION])
@pytest.mark.parametrize("settings", [{}, {"sampler": "threshold", "threshold": 0.1}, {"block_length": 3}])
def test_captions_are_those_of_the_image(model, processor, scene, encoded, settings, text, use_cache):
    """Any regions in any call, with any question and settings."""
    for masks in (masks_of(scene), masks_of(scene)[1:2], masks_of(scene)[::-1]):
        plain = model.generate(**processor(images=scene.image, masks=masks, text=text), **SETTINGS, **settings)
        inputs = processor(images=encoded, masks=masks, text=text)
        assert "pixel_values" not in inputs
        found = model.generate(**inputs, encoded_image=encoded, use_cache=use_cache, **SETTINGS, **settings)
        assert torch.equal(found.sequences, plain.sequences)
        torch.testing.assert_close(found.confidences, plain.confidences, atol=1e-4, rtol=0)


def test_regions_in_several_passes_share_the_image(model, processor, scene, encoded):
    masks = masks_of(scene) * 2
    plain = model.generate(**processor(images=scene.image, masks=masks), **SETTINGS)
    inputs = processor(images=encoded, masks=masks, max_regions_per_pass=4)
    assert inputs["num_regions"].tolist() == [4, 2]
    found = model.generate(**inputs, encoded_image=encoded, **SETTINGS)
    assert torch.equal(found.sequences, plain.sequences)


def test_a_further_region_costs_its_own_tokens(model, processor, scene, encoded):
    """No tile is encoded again, and the language model reads only the region's tokens before the first step."""
    vision = Counter(model.vision_tower, lambda inputs: len(inputs[0]))
    language = Counter(model.language_model.layers[0], lambda inputs: inputs[0].shape[1])
    first = processor(images=encoded, masks=masks_of(scene)[:1])
    model.generate(**first, encoded_image=encoded, **SETTINGS)
    before = list(language.calls)
    language.calls.clear()
    model.generate(**processor(images=encoded, masks=masks_of(scene)[1:2]), encoded_image=encoded, **SETTINGS)
    region, answer = model.config.roi_size**2 + 1, 1 + SETTINGS["max_new_tokens"]
    assert language.calls == [region] + [answer] * SETTINGS["steps"]
    assert before == [first["input_ids"].shape[1] - region, region] + [answer] * SETTINGS["steps"]
    assert vision.calls == []
    for counter in (vision, language):
        counter.hook.remove()


def test_each_question_is_kept_with_its_size(model, processor, scene, encoded):
    """2 * layers * shared tokens * width numbers per question, beside the tiles."""
    tiles = encoded.num_bytes
    assert tiles == encoded.tiles.numel() * 4
    for count, text in enumerate((None, None, QUESTION)):
        inputs = processor(images=encoded, masks=masks_of(scene), text=text)
        model.generate(**inputs, encoded_image=encoded, **SETTINGS)
        assert len(encoded.prefixes) == max(1, count)
    shared = sum(len(key) for key in encoded.prefixes)
    text = model.config.text_config
    assert encoded.num_bytes - tiles == 4 * 2 * text.num_hidden_layers * shared * text.hidden_size


def test_questions_about_the_whole_image(model, processor, scene, encoded):
    plain = model.generate(**processor(images=scene.image, text="How many objects?"), **SETTINGS)
    for _ in range(2):
        inputs = processor(images=encoded, text="How many objects?")
        assert torch.equal(model.generate(**inputs, encoded_image=encoded, **SETTINGS).sequences, plain.sequences)


def test_pipeline_takes_an_encoded_image(model, processor, scene):
    pipe = RegionCaptioningPipeline(model=model, processor=processor, **SETTINGS)
    image = pipe.encode_image(scene.image)
    masks = masks_of(scene)
    plain = pipe(scene.image, masks=masks)
    for found in (pipe(image, masks=masks), pipe([image, image], masks=[masks[:1], masks])[1]):
        assert [(r["caption"], r["box"]) for r in found] == [(r["caption"], r["box"]) for r in plain]
    with pytest.raises(ValueError, match="batch_size=1"):
        pipe([image, image], masks=[masks, masks], batch_size=2)


def test_what_cannot_be_kept_is_refused(model, processor, scene, encoded, tiny_model, tiny_processor):
    prompted = tiny_model(region_conditioning="vision")
    with pytest.raises(ValueError, match="together with its regions"):
        prompted.encode_image(**tiny_processor(prompted)(images=scene.image, masks=masks_of(scene)))
    two = processor(images=[scene.image] * 2, masks=[masks_of(scene)] * 2)
    with pytest.raises(ValueError, match="one image, got 2"):
        model.encode_image(**two)
    whole = processor(images=scene.image, masks=masks_of(scene))
    with pytest.raises(ValueError, match="not both"):
        model.generate(**whole, encoded_image=encoded)
    wider = tiny_model(text_config={"hidden_size": 64})
    with pytest.raises(ValueError, match="encode it with this model"):
        wider.generate(**processor(images=encoded, masks=masks_of(scene)), encoded_image=encoded)


def test_several_questions_in_one_call(model, processor, scene, encoded):
    mixed = processor(images=[encoded] * 2, masks=[masks_of(scene)] * 2, text=[QUESTION, "And here?"])
    found = model.generate(**mixed, encoded_image=encoded, **SETTINGS).sequences.split(3)
    for sequences, text in zip(found, (QUESTION, "And here?"), strict=True):
        plain = model.generate(**processor(images=scene.image, masks=masks_of(scene), text=text), **SETTINGS)
        assert torch.equal(sequences, plain.sequences)


def test_the_question_not_asked_for_longest_is_forgotten_first(model, processor, scene):
    image = model.encode_image(**processor(images=scene.image, masks=masks_of(scene)))
    image.max_prefixes = 2

    def ask(text):
        inputs = processor(images=image, masks=masks_of(scene)[:1], text=text)
        model.generate(**inputs, encoded_image=image, **SETTINGS)
        return set(image.prefixes)

    first, both = ask("First?"), ask("Second?")
    assert ask("First?") == both
    assert ask("Third?") >= first
    assert len(image.prefixes) == 2


def test_weights_of_any_size_are_told_apart():
    """A layer of the 8B shape has more numbers than single precision counts."""
    layer = torch.nn.Linear(4096, 12288, bias=False, dtype=torch.bfloat16)
    before = weights_fingerprint(layer)
    with torch.no_grad():
        layer.weight[-1, -1] += 1
    assert weights_fingerprint(layer) != before


def test_other_weights_are_refused(tiny_model, tiny_processor, scene):
    """Also of the same shape, of the same model trained further, and in another number format."""
    model, other = tiny_model(seed=1), tiny_model(seed=2)
    processor = tiny_processor(model)
    image = model.encode_image(**processor(images=scene.image, masks=masks_of(scene)))
    inputs = processor(images=image, masks=masks_of(scene))
    model.generate(**inputs, encoded_image=image, **SETTINGS)
    with pytest.raises(ValueError, match="made by other weights"):
        other.generate(**inputs, encoded_image=image, **SETTINGS)
    with torch.no_grad():
        model.projector.linear_1.weight += 0.01
    with pytest.raises(ValueError, match="made by other weights"):
        model.generate(**inputs, encoded_image=image, **SETTINGS)
    with pytest.raises(ValueError, match="made by other weights"):
        tiny_model(seed=1).bfloat16().generate(**inputs, encoded_image=image, **SETTINGS)
