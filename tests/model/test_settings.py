"""The generation config: ranges, presets, names of other libraries, saving."""

import itertools

import pytest
import torch
from model_batches import (
    SLOTS,
    generate,
    region_batch,
)
from transformers import GenerationConfig

from perceptiondlm.generation_config_perceptiondlm import (
    ADAPTIVE_SAMPLERS,
    PerceptionDLMGenerationConfig,
)
from perceptiondlm.modeling_perceptiondlm import PerceptionDLMForConditionalGeneration


def test_fast_preset_is_a_set_of_keywords(replay, batch):
    fast = PerceptionDLMGenerationConfig(preset="fast", max_new_tokens=SLOTS, steps=SLOTS)
    assert fast.sampler in ADAPTIVE_SAMPLERS
    assert PerceptionDLMGenerationConfig(preset="fast", sampler="random").sampler == "random"
    output = generate(replay, batch, preset="fast")
    assert torch.equal(output.sequences, replay.generate(**batch, generation_config=fast).sequences)
    with pytest.raises(ValueError, match=r"preset must be one of.*fast.*'faster'"):
        generate(replay, batch, preset="faster")


@pytest.mark.parametrize("settings", [{"remasking": True}, {"shared_schedule": True}])
def test_adaptive_samplers_refuse_released_rules(settings):
    with pytest.raises(ValueError, match="sampler='threshold' goes with neither"):
        PerceptionDLMGenerationConfig(sampler="threshold", **settings)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *itertools.product(("max_new_tokens", "steps"), (0, -1, 2.0, "8", None, True)),
        *itertools.product(("block_length", "top_k"), (0, -1, 2.0, "8", True)),
        ("block_length", 5),
        ("block_length", 64),
        ("sampler", "entropy"),
        ("sampler", None),
        ("shared_schedule", 1),
        ("early_exit", None),
        *(("threshold", value) for value in (0, 1.1, "high", None)),
        *(("entropy_bound", value) for value in (-0.1, float("inf"), None)),
        ("remasking", "yes"),
        *(("temperature", value) for value in (-0.1, float("nan"), float("inf"), "1", None)),
        *(("top_p", value) for value in (0, 0.0, -0.5, 1.01, float("nan"), "0.9")),
        *(("seed", value) for value in (1.5, "1", True)),
        *(("suppress_tokens", value) for value in (5, [-1], ["a"], [1.0])),
        *(
            ("sequence_bias", value)
            for value in (5, {5: 1.0}, {(5, 6): 1.0}, [[[5], float("inf")]], [[[5]]], {(5,): "1"})
        ),
    ],
)
def test_settings_out_of_range_are_named(replay, batch, name, value):
    with pytest.raises(ValueError, match=name):
        PerceptionDLMGenerationConfig(**{name: value})
    with pytest.raises(ValueError, match=name):
        replay.generate(**batch, **{name: value})


def test_fewer_steps_than_blocks_are_refused():
    with pytest.raises(ValueError, match=r"steps=3.*number of blocks, 4"):
        PerceptionDLMGenerationConfig(max_new_tokens=8, block_length=2, steps=3)


@pytest.mark.parametrize(("name", "value"), [("num_beams", 4), ("do_sample", True), ("max_length", 64)])
def test_what_diffusion_does_not_do_is_refused_by_name_and_what_asks_for_nothing_accepted(replay, batch, name, value):
    neutral = {"num_beams": 1, "do_sample": False, "max_length": None}[name]
    assert torch.equal(generate(replay, batch, **{name: neutral}).sequences, generate(replay, batch).sequences)
    message = rf"{name}={value} belongs to autoregressive generation; accepted: {neutral}"
    with pytest.raises(ValueError, match=message):
        replay.generate(**batch, **{name: value})
    with pytest.raises(ValueError, match=message):
        PerceptionDLMGenerationConfig(**{name: value})


@pytest.mark.parametrize("name", ["num_inference_steps", "max_denoising_steps"])
def test_steps_answer_to_the_names_of_other_libraries(replay, batch, name):
    assert generate(replay, batch, steps=None, **{name: 3}).num_forward_passes == 3
    assert PerceptionDLMGenerationConfig(**{name: 5, "steps": 5}).steps == 5
    with pytest.raises(ValueError, match=rf"{name}=4 and steps=3 are one setting"):
        replay.generate(**batch, steps=3, **{name: 4})


@pytest.mark.parametrize("name", ["cfg_scale", "block_size", "labels"])
def test_unknown_keywords_are_refused(replay, batch, name):
    with pytest.raises(ValueError, match=rf"\['{name}'\].*block_length"):
        replay.generate(**batch, **{name: 1})
    with pytest.raises(ValueError, match=rf"\['{name}'\].*block_length"):
        PerceptionDLMGenerationConfig(**{name: 1})


def test_a_plain_generation_config_is_refused(replay, batch):
    with pytest.raises((TypeError, ValueError), match="PerceptionDLMGenerationConfig"):
        replay.generate(**batch, generation_config=GenerationConfig())


def test_keywords_override_the_config_given_and_that_the_model_s(tiny_model, tiny_processor, scene):
    model = tiny_model()
    inputs = region_batch(tiny_processor(model), scene)
    model.generation_config = PerceptionDLMGenerationConfig(max_new_tokens=4, steps=2)
    given = PerceptionDLMGenerationConfig(max_new_tokens=6, steps=3)
    outputs = (
        model.generate(**inputs),
        model.generate(**inputs, generation_config=given),
        model.generate(**inputs, generation_config=given, steps=6),
    )
    found = [(output.sequences.shape[1], output.num_forward_passes) for output in outputs]
    assert found == [(4, 2), (6, 3), (6, 6)]
    assert (given.steps, model.generation_config.steps) == (3, 2)  # a call changes no setting


def test_a_saved_generation_config_comes_back_the_same(tmp_path):
    settings = {
        "max_new_tokens": 12, "steps": 9, "block_length": 4, "sampler": "random", "temperature": 0.7, "top_k": 20,
        "top_p": 0.9, "suppress_tokens": [3, 5], "seed": 11, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
            "shared_schedule": True, "remasking": False, "threshold": 0.8, "entropy_bound": 0.3, "early_exit": False,
        "refresh_interval": 4, "compile": True, "sequence_bias": [[[3], 0.5]],
        "naming_threshold": 0.4,
    }  # fmt: skip
    assert set(settings) == set(PerceptionDLMGenerationConfig.fields())
    PerceptionDLMGenerationConfig(**settings).save_pretrained(tmp_path)
    loaded = PerceptionDLMGenerationConfig.from_pretrained(tmp_path)
    assert {name: getattr(loaded, name) for name in settings} == settings
    PerceptionDLMGenerationConfig().save_pretrained(tmp_path)
    defaults = PerceptionDLMGenerationConfig.from_pretrained(tmp_path)
    assert all(getattr(defaults, n) == getattr(PerceptionDLMGenerationConfig(), n) for n in settings)


def test_a_loaded_model_decodes_as_the_saved_one(tiny_model, tiny_processor, scene, tmp_path):
    model = tiny_model()
    inputs = region_batch(tiny_processor(model), scene)
    model.generation_config = PerceptionDLMGenerationConfig(
        max_new_tokens=6, steps=4, block_length=3, temperature=1.0, top_p=0.9, seed=7
    )
    model.save_pretrained(tmp_path)
    loaded = PerceptionDLMForConditionalGeneration.from_pretrained(tmp_path)
    assert type(loaded.generation_config) is PerceptionDLMGenerationConfig
    assert torch.equal(loaded.generate(**inputs).sequences, model.generate(**inputs).sequences)
    (tmp_path / "generation_config.json").unlink()
    fresh = PerceptionDLMForConditionalGeneration.from_pretrained(tmp_path)
    assert fresh.generation_config.max_new_tokens == PerceptionDLMGenerationConfig().max_new_tokens
