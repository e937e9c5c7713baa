"""Passes: what they run and keep must not show in the captions.

Maskless attention, compiled passes, refreshed prefixes, and how often the device is asked."""

from collections import Counter

import pytest
import torch
from model_batches import SLOTS, generate, masks_of
from model_passes import passes
from torch.nn import functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from perceptiondlm import language_perceptiondlm
from perceptiondlm.drawn.scenes import draw_scene


# --- flash attention ----------------------------------------------------------------------------------------------


@pytest.fixture
def flash(monkeypatch):
    """A stand-in for flash attention: every query sees every key, and a mask is an error."""

    def attend(module, query, key, value, attention_mask, scaling=None, is_causal=None, **kwargs):
        assert attention_mask is None
        assert not (module.is_causal if is_causal is None else is_causal)
        assert kwargs.get("position_ids") is None  # flash attention would take repeated ids for packed sequences
        return F.scaled_dot_product_attention(query, key, value, scale=scaling).transpose(1, 2), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_stand_in", attend)

    def use(model):
        for config in (model.config.text_config, model.config.vision_config):
            config._attn_implementation = "flash_stand_in"
        return model

    return use


@pytest.mark.parametrize("settings", [{}, {"preset": "fast"}, {"block_length": 3}, {"shared_schedule": True}])
def test_maskless_attention_captions_regions_alike(tiny_model, tiny_processor, scene, flash, settings):
    """One row per region on a copy of the image's prefix needs no mask; two images of one size are a batch."""
    model = tiny_model()
    other = draw_scene(0, 1)
    masks = [other.objects[0].mask]
    images, all_masks = [scene.image, other.image.resize(scene.image.size)], [masks_of(scene)]
    resized = torch.nn.functional.interpolate(torch.tensor(masks[0])[None, None].float(), scene.image.size[::-1])
    all_masks.append([resized[0, 0].bool().numpy()])
    batch = tiny_processor(model)(images=images, masks=all_masks)
    expected = generate(model, batch, **settings)
    found = generate(flash(model), batch, **settings)
    assert torch.equal(found.sequences, expected.sequences)
    assert found.sample_ids.tolist() == [0, 0, 0, 1]
    torch.testing.assert_close(found.confidences, expected.confidences, atol=1e-4, rtol=0)


def test_maskless_attention_answers_questions_and_takes_encoded_images(tiny_model, tiny_processor, scene, flash):
    model = tiny_model()
    processor = tiny_processor(model)
    question = processor(images=scene.image, text="How many objects are in the image?")
    encoded = model.encode_image(**processor(images=scene.image, masks=masks_of(scene)))
    regions = processor(images=encoded, masks=masks_of(scene))
    expected = [generate(model, question), generate(model, regions, encoded_image=encoded)]
    flash(model)
    encoded.prefixes.clear()
    found = [generate(model, question), generate(model, regions, encoded_image=encoded)]
    assert all(torch.equal(a.sequences, b.sequences) for a, b in zip(expected, found, strict=True))


def test_maskless_attention_refuses_what_needs_a_mask(tiny_model, tiny_processor, scene, flash):
    """The other layouts, training, decoding without the cache; questions of two lengths take turns and need none."""
    model = tiny_model()
    processor = tiny_processor(model)
    batch = processor(images=scene.image, masks=masks_of(scene))
    padded = processor(images=[scene.image] * 2, text=["Why?", "How many objects are in the image?"])
    expected = generate(model, padded)
    flash(model)
    assert torch.equal(generate(model, padded).sequences, expected.sequences)
    with pytest.raises(ValueError, match=r"takes no mask.*use attn_implementation='sdpa'"):
        generate(model, batch, use_cache=False)
    with pytest.raises(ValueError, match="takes no mask"):
        model(**batch, labels=torch.zeros(3, SLOTS, dtype=torch.int64))
    released = flash(tiny_model(attention_layout="released"))
    with pytest.raises(ValueError, match="takes no mask"):
        generate(released, tiny_processor(released)(images=scene.image, masks=masks_of(scene)))


def test_flash_attention_without_its_package_is_an_import_error(tiny_model):
    if torch.cuda.is_available():
        pytest.skip("this machine could have flash attention")
    with pytest.raises(ImportError, match="FlashAttention2"):
        tiny_model(attn_implementation="flash_attention_2")


# --- compiled passes ----------------------------------------------------------------------------------------------


@pytest.fixture
def graphs(monkeypatch):
    """Compile through a backend that only counts; the shapes of the first input of every graph."""
    shapes = []

    def backend(graph, example_inputs):
        shapes.append(next(tuple(x.shape) for x in example_inputs if isinstance(x, torch.Tensor)))
        return graph.forward

    monkeypatch.setitem(language_perceptiondlm.COMPILE_OPTIONS, "backend", backend)
    monkeypatch.setattr(language_perceptiondlm, "_compiled", [])
    torch._dynamo.reset()
    yield shapes
    torch._dynamo.reset()


def test_compiled_passes_change_no_token_and_recompile_only_for_a_new_bucket(tiny_model, tiny_processor, scene, graphs):
    model = tiny_model()
    processor = tiny_processor(model)
    masks = masks_of(scene)

    def both(chosen, **settings):
        batch = processor(images=scene.image, masks=chosen)
        expected, found = generate(model, batch, **settings), generate(model, batch, compile=True, **settings)
        assert torch.equal(expected.sequences, found.sequences)
        assert expected.num_forward_passes == found.num_forward_passes

    both(masks, early_exit=False)
    assert len(graphs) == 1
    both([*masks, masks[0]], early_exit=False)  # three regions and four share a bucket
    both(masks[::-1], sampler="random", seed=1, early_exit=False)
    assert len(graphs) == 1
    both(masks[:1])
    both(masks[1:], preset="fast")  # two regions, then perhaps one
    assert len(graphs) <= 3
    both(masks)
    both(masks, preset="fast")
    both(masks, block_length=3)
    assert len(graphs) <= 3  # buckets of four, two and one


def test_compiled_passes_serve_batches_encoded_images_and_the_other_layouts(tiny_model, tiny_processor, scene, graphs):
    other = draw_scene(0, 1)
    images, masks = [scene.image, other.image], [masks_of(scene), masks_of(other)]
    for layout in ("isolated", "released"):
        model = tiny_model(attention_layout=layout)
        batch = tiny_processor(model)(images=images, masks=masks)
        assert torch.equal(generate(model, batch).sequences, generate(model, batch, compile=True).sequences)
    model = tiny_model()
    processor = tiny_processor(model)
    expected = generate(model, processor(images=scene.image, masks=masks[0]))
    encoded = model.encode_image(**processor(images=scene.image, masks=masks[0]))
    regions = processor(images=encoded, masks=masks[0])
    found = generate(model, regions, encoded_image=encoded, compile=True)
    assert torch.equal(expected.sequences, found.sequences)
    assert graphs


# --- refreshed prefix ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["released", "full"])
def test_a_prefix_is_refreshed_every_so_many_passes(tiny_model, tiny_processor, scene, layout):
    """Whole passes are exact, those between run the answers alone on what the last whole pass left."""
    model = tiny_model(attention_layout=layout)
    batch = tiny_processor(model)(images=scene.image, masks=masks_of(scene))
    lengths = []
    hook = model.language_model.layers[0].register_forward_hook(
        lambda _module, x, _output: lengths.append(x[0].shape[1])
    )
    answers = 3 * (SLOTS + 2)
    whole = batch["input_ids"].shape[1] + answers
    found = generate(model, batch, refresh_interval=3, early_exit=False)
    hook.remove()
    assert lengths == [whole, answers, answers, whole, answers, answers]
    assert found.num_forward_passes == 6
    exact = generate(model, batch, early_exit=False)
    every = generate(model, batch, refresh_interval=1, early_exit=False, use_cache=False)
    assert torch.equal(exact.sequences, every.sequences)


def test_a_stale_prefix_is_the_prompt_of_the_last_whole_pass(tiny_model, tiny_processor, scene):
    """The second pass against the same answers run behind keys and values that saw the first canvas."""
    model = tiny_model(attention_layout="released")
    batch = tiny_processor(model)(images=scene.image, masks=masks_of(scene))
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randint(0, 500, (3, SLOTS), generator=generator) for _ in range(2))
    with torch.no_grad():
        denoise, exact = passes(model, batch, SLOTS, refresh_interval=2), passes(model, batch, SLOTS)
        assert torch.allclose(denoise(first), exact(first), atol=1e-4)
        stale = denoise(second)
        assert not torch.allclose(stale, exact(second), atol=1e-2)
        assert torch.allclose(denoise(second), exact(second), atol=1e-4)  # refreshed
        denoise(first)
        assert not torch.allclose(denoise(first), stale, atol=1e-2)


def test_refresh_interval_changes_nothing_where_the_prefix_is_exact(model, batch):
    expected, found = generate(model, batch), generate(model, batch, refresh_interval=5)
    assert torch.equal(expected.sequences, found.sequences)


# --- the device is asked rarely -----------------------------------------------------------------------------------


@pytest.fixture
def questions(monkeypatch):
    """Counts what makes the host wait for the device: reading values, and shapes that depend on values."""
    asked: Counter = Counter()
    for name in ("item", "tolist", "nonzero", "cpu", "unique", "__bool__", "__int__", "__float__", "numpy"):
        original = getattr(torch.Tensor, name)

        def counted(self, *args, _name=name, _original=original, **kwargs):
            asked[_name] += 1
            return _original(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, counted)
    return asked


@pytest.mark.parametrize(
    ("settings", "per_step"),
    [
        ({"early_exit": False}, 0),
        ({"early_exit": False, "sampler": "random", "temperature": 0.7, "top_k": 5, "top_p": 0.9, "seed": 0}, 0),
        ({"shared_schedule": True, "remasking": True}, 0),
        ({"early_exit": True, "suppress_tokens": [1, 2]}, 1),
        ({"early_exit": False, "sampler": "threshold", "threshold": 1.0}, 1),
    ],
)
def test_a_step_asks_the_device_once_at_most(model, batch, questions, settings, per_step):
    """Counted as the difference between six steps and three, with no answer leaving in between."""
    counts, passes = [], []
    for slots in (3, 6):
        questions.clear()
        output = generate(model, batch, max_new_tokens=slots, steps=slots, **settings)
        counts.append(sum(questions.values()))
        passes.append(output.num_forward_passes)
    if passes == [3, 6]:
        assert counts[1] - counts[0] == 3 * per_step
    else:
        pytest.fail(f"answers ended early, after {passes} passes: choose other settings")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("settings", [{"early_exit": False}, {"early_exit": False, "sampler": "random", "seed": 0}])
def test_fixed_schedules_never_wait_for_a_gpu(tiny_model, tiny_processor, scene, settings):
    """CUDA's own check: no synchronisation between the first pass and the last."""
    model = tiny_model().cuda()
    batch = tiny_processor(model)(images=scene.image, masks=masks_of(scene)).to("cuda")

    canvas_steps = model._denoise

    def steps(*args):
        for number, step in enumerate(canvas_steps(*args)):
            if number == 0:
                torch.cuda.set_sync_debug_mode("error")
            yield step
        torch.cuda.set_sync_debug_mode("default")

    model._denoise = steps
    try:
        assert generate(model, batch, **settings).num_forward_passes == SLOTS
    finally:
        torch.cuda.set_sync_debug_mode("default")
