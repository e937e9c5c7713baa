"""A model with a namer: regions are called by it, alone as among others, and the language model writes the rest."""

import copy

import pytest
import torch
from accelerate import disk_offload

from perceptiondlm.checkpoints.folder import export
from perceptiondlm.generation_config_perceptiondlm import PerceptionDLMGenerationConfig
from perceptiondlm.inputs_perceptiondlm import PromptInputs
from perceptiondlm.modeling_perceptiondlm import PerceptionDLMForConditionalGeneration, pixel_unshuffle
from perceptiondlm.naming_perceptiondlm import RegionNamer, patches_of
from perceptiondlm.training.fit_namer import looks


NAMER = {"kinds": 5, "words": 7, "detector_width": 4, "detector_classes": 6}
WORDS = torch.tensor([[1, 0, 0, 0, 0], [0, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 0, 1]])
GENERAL = torch.tensor([[0.4, 0.4, 0, 0, 0], [0, 0, 0.4, 0.4, 0.4]])


@pytest.fixture(scope="module", params=[32, 0], ids=["crops", "image_alone"])
def named(request, tiny_model):
    model = tiny_model(namer=NAMER, region_crop_size=request.param)
    namer = model.region_namer
    namer.word_ids.copy_(torch.arange(100, 107))
    namer.word_shares.copy_(torch.cat((WORDS, GENERAL)))
    return model


def masks_of(scene):
    return [item.mask for item in scene.objects]


@torch.no_grad()
def names_of(model, inputs):
    keys = {key: value for key, value in inputs.items() if key not in ("sample_ids", "region_order")}
    return model.embed_prompt(PromptInputs(**keys).checked(model)).names


def generate(model, inputs, **settings):
    return model.generate(**inputs, max_new_tokens=8, steps=8, **settings)


def test_answers_begin_with_the_namers_words(named, tiny_processor, scene):
    inputs = tiny_processor(named)(images=scene.image, masks=masks_of(scene))
    names = names_of(named, inputs)
    output = generate(named, inputs, naming_threshold=0.0)
    assert output.sequences[:, 0].tolist() == names.ids.tolist()
    torch.testing.assert_close(output.confidences[:, 0], names.chances)
    assert output.sequences[:, 1:].lt(named.config.text_config.vocab_size).all()
    assert not output.sequences.eq(named.config.mask_token_id).any()


def test_below_the_threshold_the_language_model_names(named, tiny_processor, scene):
    inputs = tiny_processor(named)(images=scene.image, masks=masks_of(scene))
    chances = names_of(named, inputs).chances
    between = chances.sort().values[-2:].mean().item()  # above all but one
    without, one = generate(named, inputs), generate(named, inputs, naming_threshold=between)
    sure = chances >= between
    assert sure.sum() == 1
    assert torch.equal(one.sequences[~sure], without.sequences[~sure])
    assert one.sequences[sure, 0] == names_of(named, inputs).ids[sure]
    assert torch.equal(generate(named, inputs, naming_threshold=1.0).sequences, without.sequences)


@pytest.mark.parametrize("settings", [{}, {"preset": "fast"}, {"block_length": 4}, {"sampler": "left_to_right"}])
def test_every_way_of_decoding_begins_with_the_word(named, tiny_processor, scene, settings):
    inputs = tiny_processor(named)(images=scene.image, masks=masks_of(scene))
    output = generate(named, inputs, naming_threshold=0.0, **settings)
    assert output.sequences[:, 0].tolist() == names_of(named, inputs).ids.tolist()


def test_a_region_is_named_alone_as_among_others(named, tiny_processor, scene):
    processor = tiny_processor(named)
    together = names_of(named, processor(images=scene.image, masks=masks_of(scene)))
    for index, mask in enumerate(masks_of(scene)):
        alone = names_of(named, processor(images=scene.image, masks=[mask]))
        assert alone.ids[0] == together.ids[index]
        torch.testing.assert_close(alone.chances[0], together.chances[index], atol=1e-5, rtol=1e-4)


def test_an_encoded_image_names_its_regions_the_same(named, tiny_processor, scene):
    processor = tiny_processor(named)
    inputs = processor(images=scene.image, masks=masks_of(scene))
    encoded = named.encode_image(**inputs, picture=scene.image)
    later = processor(images=encoded, masks=masks_of(scene))
    plain = generate(named, inputs, naming_threshold=0.0)
    again = generate(named, later, encoded_image=encoded, naming_threshold=0.0)
    assert torch.equal(plain.sequences, again.sequences)


def test_rows_without_regions_are_left_alone(named, tiny_processor, scene):
    processor = tiny_processor(named)
    question = processor(images=scene.image, text="What is it?")
    output = generate(named, question, naming_threshold=0.0)
    assert torch.equal(output.sequences, generate(named, question).sequences)


def test_what_tiles_hold_is_the_layers_on_what_is_seen(named, tiny_processor, scene):
    """The layers commute with averaging: a tile's share of the evidence is computed when the image is encoded."""
    inputs = tiny_processor(named)(images=scene.image, masks=masks_of(scene))
    with torch.no_grad():
        image_RF, crop_RF, box_R6 = looks(named, inputs)
        namer = named.region_namer
        scores_RK = namer.image(image_RF) + namer.box(box_R6)
        scores_RK = scores_RK if namer.crop is None else scores_RK + namer.crop(crop_RF)
        expected = namer.choose(scores_RK)
    found = names_of(named, inputs)
    assert found.ids.tolist() == expected.ids.tolist()
    torch.testing.assert_close(found.chances, expected.chances, atol=1e-4, rtol=1e-3)


def test_the_detector_sees_tiles_of_an_image_as_one_picture(named):
    namer, side = named.region_namer, 8
    picture = torch.rand(3, 128, 192, generator=torch.Generator().manual_seed(0))
    tiles = picture.unflatten(1, (2, 64)).unflatten(3, (3, 64)).permute(1, 3, 0, 2, 4).flatten(0, 1)
    thumbnail = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        found = namer.scores_of_images(torch.cat((tiles, thumbnail, tiles[:1])), side, [(3, 2), (1, 1)])
        whole, alone = namer.scores(picture[None], 2 * side, 3 * side)[0], namer.scores(tiles[:1], side)
    torch.testing.assert_close(found[1], whole[:side, side : 2 * side])
    torch.testing.assert_close(found[5], whole[side:, 2 * side :])
    torch.testing.assert_close(found[7:], alone)
    assert not found[6].any()
    assert not torch.allclose(found[0], found[7], atol=1e-3)


def test_squares_hold_their_patches():
    patches = torch.rand(2, 6, 6, 5)
    squares = pixel_unshuffle(patches.flatten(1, 2), 2)
    assert squares.shape == (2, 3, 3, 20)
    assert torch.equal(squares[0, 1, 2], patches[0, 2:4, 4:6].flatten())
    assert torch.equal(patches_of(squares, 2), patches)


def test_a_general_word_stands_for_all_its_kinds(named):
    namer = named.region_namer
    sure, between, both = torch.tensor([[9.0, 0, 0, 0, 0], [2, 2, -9, -9, -9], [-9, -9, 2, 2, 2]])
    names = namer.choose(torch.stack((sure, between, both)))
    # 0.4 of all chances is less than one of two names', and more than one of three
    assert names.ids.tolist() == [100, 100, 106]
    torch.testing.assert_close(names.chances, torch.tensor([1.0, 0.5, 1.0]), atol=2e-3, rtol=0)


def test_a_checkpoint_keeps_words_exactly_and_the_threshold(named, tiny_processor, scene, tmp_path):
    model = copy.deepcopy(named)
    model.region_namer.word_ids.copy_(torch.arange(521, 528))  # no bfloat16 holds all of these
    model.generation_config.naming_threshold = 0.0
    processor = tiny_processor(model)
    export(model, processor, tmp_path, torch.bfloat16)
    loaded = PerceptionDLMForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.region_namer.word_ids.tolist() == list(range(521, 528))
    assert loaded.generation_config.naming_threshold == 0.0
    output = loaded.generate(**processor(images=scene.image, masks=masks_of(scene)), max_new_tokens=4, steps=4)
    assert set(output.sequences[:, 0].tolist()) <= set(range(521, 528))


def test_it_runs_with_weights_on_disk(named, tiny_processor, scene, tmp_path):
    inputs = tiny_processor(named)(images=scene.image, masks=masks_of(scene))
    plain = generate(named, inputs, naming_threshold=0.0)
    offloaded = disk_offload(copy.deepcopy(named), str(tmp_path), execution_device=torch.device("cpu"))
    assert torch.equal(generate(offloaded, inputs, naming_threshold=0.0).sequences, plain.sequences)


def test_training_neither_runs_nor_changes_it(named, tiny_processor, scene, monkeypatch):
    model = copy.deepcopy(named).train()
    monkeypatch.setattr(RegionNamer, "look", lambda *given: pytest.fail("the namer ran"))
    inputs = tiny_processor(model)(images=scene.image, masks=masks_of(scene))
    model(**inputs, labels=torch.ones(len(scene.objects), 4, dtype=torch.int64)).loss.backward()
    assert all(weight.grad is None and not weight.requires_grad for weight in model.region_namer.parameters())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"kinds": 5}, "words"),
        ({**NAMER, "kinds": 0}, "namer.kinds must be an integer of at least 1, got 0"),
        ({**NAMER, "detector_width": 3}, "even"),
        ({**NAMER, "size": 3}, "size"),
    ],
)
def test_a_wrong_shape_is_named(tiny_model, wrong, message):
    with pytest.raises(ValueError, match=message):
        tiny_model(namer=wrong)


def test_it_needs_regions_in_the_prompt(tiny_model):
    with pytest.raises(ValueError, match="namer needs region_conditioning='replay'"):
        tiny_model(namer=NAMER, region_conditioning="vision")


@pytest.mark.parametrize("wrong", [-0.1, 1.5, "half", True])
def test_a_wrong_threshold_is_refused(wrong):
    with pytest.raises(ValueError, match=r"naming_threshold must be in \[0, 1\]"):
        PerceptionDLMGenerationConfig(naming_threshold=wrong)


def test_a_given_word_does_not_go_with_remasking():
    with pytest.raises(ValueError, match="naming_threshold does not go with remasking"):
        PerceptionDLMGenerationConfig(naming_threshold=0.5, remasking=True)
