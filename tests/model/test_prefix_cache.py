"""Decoding behind a cached prefix is decoding without one."""

import pytest
import torch
from model_batches import (
    CONDITIONINGS,
    LAYOUTS,
    SLOTS,
    generate,
    half_masked,
    masks_of,
    region_batch,
)
from model_passes import passes

from perceptiondlm.generation_config_perceptiondlm import (
    SAMPLERS,
)


@pytest.mark.parametrize("block_length", [None, 3, 2])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_cached_decoding_is_uncached_decoding(replay, batch, sampler, block_length):
    settings = {"sampler": sampler, "block_length": block_length, "seed": 5}
    cached, uncached = (generate(replay, batch, use_cache=use, **settings) for use in (True, False))
    assert torch.equal(cached.sequences, uncached.sequences)
    torch.testing.assert_close(cached.confidences, uncached.confidences, atol=1e-4, rtol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("use_cache", [True, False])
def test_a_cached_step_runs_the_answers_alone(tiny_model, tiny_processor, scene, layout, use_cache):
    """Only the isolated layout caches: there, and only there, no prompt token depends on a caption."""
    model = tiny_model(attention_layout=layout)
    inputs = region_batch(tiny_processor(model), scene)
    lengths = []
    hook = model.language_model.layers[0].register_forward_hook(
        lambda _module, x, _output: lengths.append(x[0].shape[0] * x[0].shape[1])
    )
    output = generate(model, inputs, use_cache=use_cache, steps=3)
    hook.remove()
    prompt, answers = inputs["input_ids"].shape[1], 3 * (1 + SLOTS + (layout != "isolated"))
    spans = 3 * (model.config.roi_size**2 + 1)
    cached = use_cache and layout == "isolated"
    assert lengths == ([prompt - spans, spans] + [answers] * 3 if cached else [prompt + answers] * 3)
    assert output.num_forward_passes == 3


def test_one_cache_serves_any_later_canvas(replay, batch):
    """Steps overwrite what the step before left: the same canvas gets the same logits after another one."""
    first, second = half_masked(replay, 3, seed=1), half_masked(replay, 3, seed=2)
    with torch.no_grad():
        denoise = passes(replay, batch, SLOTS)
        before, other, after = denoise(first), denoise(second), denoise(first)
    assert torch.equal(before, after)
    assert not torch.allclose(before, other, atol=1e-2)


@pytest.mark.parametrize("seed", range(50))
def test_cached_and_uncached_decoding_agree_on_random_models(tiny_model, tiny_processor, pictures, seed):
    """A model per seed: every sampler in turn, batches of different images, passes of few and of many regions."""
    # In double precision: single would leave ties between tokens to the rounding of either way.
    model = tiny_model(seed, region_conditioning=CONDITIONINGS[seed % 2]).double()
    settings = {
        "sampler": SAMPLERS[seed % len(SAMPLERS)], "threshold": 0.12, "entropy_bound": 4.0, "seed": seed,
        "block_length": (None, 3)[seed // 2 % 2], "early_exit": seed % 3 > 0, "steps": (4, 6)[seed // 4 % 2],
    }  # fmt: skip
    images, masks = [s.image for s in pictures], [masks_of(s) for s in pictures]
    batch = tiny_processor(model)(images=images, masks=masks, max_regions_per_pass=(2, 6)[seed // 8 % 2])
    cached, uncached = (generate(model, batch, use_cache=flag, **settings) for flag in (True, False))
    assert torch.equal(cached.sequences, uncached.sequences)
    assert cached.num_forward_passes == uncached.num_forward_passes
