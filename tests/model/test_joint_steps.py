"""Decodings that share passes: an answer does not depend on its company."""

import pytest
import torch
from model_batches import masks_of


SETTINGS = {"max_new_tokens": 6, "steps": 6}
VARIETY = (
    {},
    {"sampler": "threshold", "threshold": 0.3},
    {"temperature": 0.8, "seed": 7},
    {"sampler": "random", "seed": 3, "steps": 3},
    {"block_length": 3},
    {"early_exit": False, "remasking": True},
)


def requests(processor, scene):
    """Keywords of `generate`, unlike each other in regions, question and settings."""
    masks = masks_of(scene)
    some = (masks, masks[:1], masks[1:], masks[::-1], masks * 2, masks[2:])
    texts = (None, "What is it?", None, "Name the object in each masked region.", None, None)
    return [
        {**processor(images=scene.image, masks=masks, text=text), **SETTINGS, **settings}
        for masks, text, settings in zip(some, texts, VARIETY, strict=True)
    ]


def run_together(model, requests, joins_every=1):
    """All requests on shared passes, one more of them joining every few steps; outputs, passes, and most at a time."""
    joint, waiting, running, outputs = model.joint_steps(), list(enumerate(requests)), [], {}
    ticks, passes, most = 0, 0, 0
    with torch.no_grad():
        while waiting or running:
            if waiting and ticks % joins_every == 0:
                number, request = waiting.pop(0)
                decoding = model.start_decoding(**request)
                steps = decoding.steps()
                running.append((number, decoding, steps, next(steps)))
            passes += joint.take([step for *_, step in running])
            most, ticks = max(most, len(running)), ticks + 1
            following = [(number, decoding, steps, next(steps, None)) for number, decoding, steps, _ in running]
            outputs |= {number: decoding.output() for number, decoding, _, step in following if step is None}
            running = [entry for entry in following if entry[-1] is not None]
    return [outputs[number] for number in range(len(requests))], passes, most


def test_company_changes_nothing(model, processor, scene):
    """Requests join and leave at different steps; each gets its own answer, passes and schedule."""
    asked = requests(processor, scene)
    found, passes, most = run_together(model, asked, joins_every=2)
    alone = [model.generate(**request) for request in asked]
    assert most > 2
    assert passes < sum(output.num_forward_passes for output in alone)
    for together, expected in zip(found, alone, strict=True):
        assert torch.equal(together.sequences, expected.sequences)
        torch.testing.assert_close(together.confidences, expected.confidences, atol=1e-5, rtol=0)
        assert together.num_forward_passes == expected.num_forward_passes


def test_company_changes_nothing_at_all(tiny_model, tiny_processor, scene):
    """In double precision, where rounding is far below what single-precision confidences can show, to the last bit."""
    model = tiny_model().double()
    asked = requests(tiny_processor(model), scene)
    for together, request in zip(run_together(model, asked)[0], asked, strict=True):
        expected = model.generate(**request)
        assert torch.equal(together.sequences, expected.sequences)
        assert torch.equal(together.confidences, expected.confidences)


def test_steps_of_one_shape_share_a_pass_and_others_do_not(model, processor, scene):
    masks = masks_of(scene)
    regions, short = processor(images=scene.image, masks=masks), {"max_new_tokens": 4, "steps": 4}
    question = processor(images=scene.image, text="How many objects?")
    asked = [{**regions, **SETTINGS}, {**regions, **SETTINGS}, {**question, **SETTINGS}, {**regions, **short}]
    joint, sizes = model.joint_steps(), []
    decodings = [model.start_decoding(**request) for request in asked]
    with torch.no_grad():
        steps = [next(decoding.steps()) for decoding in decodings]
        hook = model.language_model.layers[0].register_forward_hook(
            lambda _module, inputs, _output: sizes.append(tuple(inputs[0].shape[:2]))
        )
        passes = joint.take(steps)
        hook.remove()
    assert passes == 3
    assert sorted(sizes) == [(1, 6), (3, 5), (6, 7)]  # sequences and tokens of each pass


@pytest.mark.parametrize("overrides", [{"attention_layout": "released"}, {"region_conditioning": "vision"}])
def test_layouts_whose_answers_see_each_other_take_turns(tiny_model, tiny_processor, scene, overrides):
    model = tiny_model(**overrides)
    processor = tiny_processor(model)
    asked = [{**processor(images=scene.image, masks=masks), **SETTINGS} for masks in (masks_of(scene),) * 3]
    found, passes, _ = run_together(model, asked)
    expected = model.generate(**asked[0])
    for together in found:
        assert torch.equal(together.sequences, expected.sequences)
    own = sum(output.num_forward_passes for output in found)
    assert passes == own if "attention_layout" in overrides else passes < own


def test_the_head_runs_within_its_bound(model, processor, scene, monkeypatch):
    """As many requests at a time as fit the number of logits that may be held."""
    from perceptiondlm import decoding_perceptiondlm as decoding

    asked = requests(processor, scene)[:4]
    vocabulary, rows = model.config.text_config.vocab_size, []
    monkeypatch.setattr(decoding, "LOGITS_AT_ONCE", 20 * vocabulary)
    hook = model.lm_head.register_forward_hook(lambda _module, inputs, _output: rows.append(len(inputs[0])))
    found, *_ = run_together(model, asked)
    hook.remove()
    assert max(rows) <= 20
    assert any(row > 6 for row in rows)
    for together, request in zip(found, asked, strict=True):
        assert torch.equal(together.sequences, model.generate(**request).sequences)


def test_an_image_without_a_fingerprint_is_taken_as_it_is(model, processor, scene):
    inputs = processor(images=scene.image, masks=masks_of(scene))
    image = model.encode_image(**inputs, fingerprint=False)
    assert image.made_by is None
    regions = processor(images=image, masks=masks_of(scene))
    found = model.generate(**regions, encoded_image=image, **SETTINGS)
    assert torch.equal(found.sequences, model.generate(**inputs, **SETTINGS).sequences)
