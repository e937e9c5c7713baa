"""What captioning costs, and where it stops: tokens scored, memory held, work per region, broken logits."""

import gc
import weakref

import pytest
import torch
from model_batches import SLOTS, generate, masks_of
from model_passes import embed

from perceptiondlm import language_perceptiondlm, sampling_perceptiondlm
from perceptiondlm.attention_perceptiondlm import plain_attention
from perceptiondlm.common.measuring import count_flops
from perceptiondlm.passes_perceptiondlm import StaticPasses
from perceptiondlm.sampling_perceptiondlm import TokenSampler


def many_boxes(count: int) -> list[list[int]]:
    return [[4 * i % 90, 3 * i % 40, 4 * i % 90 + 20 + i % 7, 3 * i % 40 + 9 + i % 5] for i in range(count)]


@pytest.fixture
def scored(model):
    """How many rows the vocabulary head was given, call by call."""
    rows: list[int] = []
    hook = model.lm_head.register_forward_hook(lambda _module, x, _output: rows.append(x[0].shape[0]))
    yield rows
    hook.remove()


# --- scoring ------------------------------------------------------------------------------------------------------


def test_open_slots_alone_are_scored(model, batch, scored):
    generate(model, batch, early_exit=False)
    assert scored == [3 * (SLOTS - step) for step in range(SLOTS)]
    scored.clear()
    generate(model, batch, early_exit=False, block_length=3)
    assert scored == [9, 6, 3] * 2
    scored.clear()
    generate(model, batch, shared_schedule=True, remasking=True)
    assert set(scored) == {3 * SLOTS}  # decided slots compete again


@pytest.mark.parametrize(
    "settings", [{}, {"preset": "fast"}, {"sampler": "entropy_bound"}, {"temperature": 1.0, "seed": 0}]
)
def test_logits_are_held_a_bounded_number_at_a_time(model, batch, scored, monkeypatch, settings):
    expected = generate(model, batch, **settings)
    scored.clear()
    monkeypatch.setattr(sampling_perceptiondlm, "LOGITS_AT_ONCE", 4 * model.config.text_config.vocab_size)
    found = generate(model, batch, **settings)
    assert max(scored) == 4
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(found.confidences, expected.confidences, atol=1e-6, rtol=0)


def test_top_k_comes_before_any_sort(monkeypatch):
    """Sorting a whole vocabulary costs more than finding its k largest."""
    sampler = TokenSampler(temperature=1.0, top_k=3, top_p=0.9, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(torch.Tensor, "sort", None)
    tokens, _, _ = sampler(torch.randn(5, 1000, generator=torch.Generator().manual_seed(0)))
    assert tokens.shape == (5,)


# --- attention ----------------------------------------------------------------------------------------------------


def test_a_pass_costs_the_same_for_every_further_region(model, processor, scene):
    """Arithmetic of a pass over N regions: N times that of one, however many there are."""
    work = {}
    for count in (1, 8, 32):
        inputs = processor(images=scene.image, boxes=many_boxes(count))
        prompt = embed(model, inputs)
        passes = StaticPasses(model, prompt, [None], SLOTS, compiled=False)
        slots = torch.full((count, SLOTS), model.config.mask_token_id)
        work[count] = count_flops(lambda run=passes, canvas=slots: run(canvas))
    assert work[8] == 8 * work[1]
    assert work[32] == 32 * work[1]


def test_every_kind_of_attention_gives_what_plain_products_give(tiny_model, tiny_processor, scene, monkeypatch):
    """The fused kernel against matrix products, also a few scores at a time, and with fewer heads of keys."""
    for heads in (4, 2):
        models = [
            tiny_model(attn_implementation=name, text_config={"num_key_value_heads": heads})
            for name in ("sdpa", "eager")
        ]
        batch = tiny_processor(models[0])(images=scene.image, masks=masks_of(scene))
        fused, plain = (generate(model, batch) for model in models)
        torch.testing.assert_close(plain.confidences, fused.confidences, atol=1e-4, rtol=0)
        assert torch.equal(plain.sequences, fused.sequences)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 3, length, 8, generator=generator) for length in (5, 40, 40))
    expected = plain_attention(query, key, value, 0.3)
    monkeypatch.setattr("perceptiondlm.attention_perceptiondlm.SCORES_AT_ONCE", 2 * 3 * 40)
    for found, whole in zip(plain_attention(query, key, value, 0.3), expected, strict=True):
        torch.testing.assert_close(found, whole)
    scores = (query @ key.transpose(2, 3)) * 0.3
    torch.testing.assert_close(expected[0], scores.softmax(dim=-1) @ value)
    torch.testing.assert_close(expected[1], scores.logsumexp(dim=-1))


# --- memory -------------------------------------------------------------------------------------------------------


def test_no_prefix_is_ever_copied(model, processor, scene, monkeypatch):
    """Regions leave, groups take their turns, an encoded image is asked again: the keys and values stay the same."""
    held = []
    original = StaticPasses.__call__

    def watched(self, *arguments):
        held.append([tensor.data_ptr() for prefix in self.prefixes for pair in prefix.layers for tensor in pair])
        return original(self, *arguments)

    monkeypatch.setattr(StaticPasses, "__call__", watched)
    image = model.encode_image(**processor(images=scene.image, masks=masks_of(scene)))
    inputs = processor(images=image, boxes=many_boxes(10), max_regions_per_pass=4)
    model.generate(**inputs, encoded_image=image, max_new_tokens=SLOTS, steps=SLOTS, preset="fast", threshold=0.1)
    (prefix,) = image.prefixes.values()
    assert all(pointers == [t.data_ptr() for pair in prefix.layers for t in pair] for pointers in held)


def test_groups_of_regions_take_their_turns(model, processor, scene, monkeypatch):
    """Ten regions in groups of four: no pass holds more than four, and image and prefix are computed once."""
    sizes, tiles, filled = [], [], []
    prefill, fill = StaticPasses.__init__, model.language_model.fill

    def watched_prefill(self, model, prompt, *arguments):
        prefill(self, model, prompt, *arguments)
        sizes.append(int(prompt.num_regions.sum()))

    def watched_fill(embeds, *arguments):
        filled.append(embeds.shape[0] * embeds.shape[1])
        fill(embeds, *arguments)

    boxes = many_boxes(10)
    together = generate(model, processor(images=scene.image, boxes=boxes))
    inputs = processor(images=scene.image, boxes=boxes, max_regions_per_pass=4)
    monkeypatch.setattr(StaticPasses, "__init__", watched_prefill)
    monkeypatch.setattr(model.language_model, "fill", watched_fill)
    hook = model.vision_tower.register_forward_hook(lambda _module, x, _output: tiles.append(len(x[0])))
    found = generate(model, inputs)
    hook.remove()
    span, shared = model.config.roi_size**2 + 1, int((inputs["token_roles"][0] == 0).sum())
    assert sizes == [4, 4, 2]
    assert tiles == [len(inputs["pixel_values"])] == [3]
    assert filled == [shared, 4 * span, 4 * span, 2 * span]
    assert torch.equal(found.sequences, together.sequences)


def test_compiling_keeps_no_model_alive(tiny_model, tiny_processor, scene, monkeypatch):
    monkeypatch.setitem(language_perceptiondlm.COMPILE_OPTIONS, "backend", "eager")
    monkeypatch.setattr(language_perceptiondlm, "_compiled", [])
    torch._dynamo.reset()
    model = tiny_model()
    batch = tiny_processor(model)(images=scene.image, masks=masks_of(scene))
    generate(model, batch, compile=True)
    alive = weakref.ref(model.language_model)
    del model
    gc.collect()
    assert alive() is None
    torch._dynamo.reset()


def test_more_shapes_than_graphs_run_uncompiled_after_one_warning(
    tiny_model, tiny_processor, scene, monkeypatch, caplog
):
    monkeypatch.setitem(language_perceptiondlm.COMPILE_OPTIONS, "backend", "eager")
    monkeypatch.setattr(language_perceptiondlm, "_compiled", [])
    monkeypatch.setattr(language_perceptiondlm, "MAX_GRAPHS", 1)
    monkeypatch.setattr(language_perceptiondlm.logger, "propagate", True)
    torch._dynamo.reset()
    model = tiny_model()
    processor = tiny_processor(model)
    for count in (1, 2, 4):
        batch = processor(images=scene.image, boxes=many_boxes(count))
        expected, found = generate(model, batch), generate(model, batch, compile=True)
        assert torch.equal(found.sequences, expected.sequences)
    assert len([r for r in caplog.records if "more than 1 shapes" in r.message]) == 1
    torch._dynamo.reset()


# --- logits that are no numbers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"early_exit": False}, {"preset": "fast"}, {"temperature": 1.0, "seed": 0}])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_end_with_their_likely_causes(tiny_model, tiny_processor, scene, settings, value):
    model = tiny_model()
    batch = tiny_processor(model)(images=scene.image, masks=masks_of(scene))
    with torch.no_grad():
        model.language_model.norm.weight[0] = value
    with pytest.raises(ValueError, match=r"not numbers \(NaN\).*float16.*dtype=torch.bfloat16"):
        generate(model, batch, **settings)
