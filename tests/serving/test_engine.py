"""Requests share passes, join and leave at any step, and get what they would get alone."""

import threading
import time
from concurrent.futures import CancelledError, ThreadPoolExecutor
from itertools import pairwise

import pytest
import torch
from model_batches import masks_of

from perceptiondlm.drawn.scenes import draw_scene
from perceptiondlm.pipeline_perceptiondlm import RegionCaptioningPipeline
from perceptiondlm.serving.engine import Engine, EngineBusy, EngineClosed
from perceptiondlm.serving.prompts import regions_of


SETTINGS = {"max_new_tokens": 6, "steps": 6}
WAIT = 600  # seconds: a busy machine is no error


@pytest.fixture
def engine(model, processor):
    with Engine(model, processor, settings=SETTINGS) as engine:
        yield engine


@pytest.fixture(scope="module")
def pipe(model, processor):
    return RegionCaptioningPipeline(model=model, processor=processor, **SETTINGS)


@pytest.fixture(scope="module")
def scenes():
    return [draw_scene(5, index) for index in range(6)]


def same(answers, expected) -> bool:
    """Texts and boxes are equal, scores up to rounding."""
    assert [(a, dict(zip(("xmin", "ymin", "xmax", "ymax"), b, strict=True))) for a, b in zip(
        answers.texts, answers.boxes, strict=True)] == [(e["caption"], e["box"]) for e in expected]  # fmt: skip
    return answers.scores == pytest.approx([e["score"] for e in expected], abs=1e-5)


def test_answers_of_many_threads_are_the_pipelines(engine, pipe, scenes):
    """Images, regions, questions and samplers differ; the passes are shared."""
    settings = [{}, {"preset": "fast", "threshold": 0.3}, {"temperature": 0.7, "seed": 5}]
    asked = [(scene, settings[number % 3]) for number, scene in enumerate(scenes * 2)]
    with ThreadPoolExecutor(8) as threads:
        found = list(
            threads.map(lambda ask: engine.submit(ask[0].image, masks=masks_of(ask[0]), **ask[1]).result(WAIT), asked)
        )
    for answers, (scene, given) in zip(found, asked, strict=True):
        assert same(answers, pipe(scene.image, masks=masks_of(scene), **given))
        assert answers.size == scene.image.size[::-1]
    assert engine.counts.passes < sum(answers.num_forward_passes for answers in found)
    assert engine.counts.finished == len(asked)
    assert engine.counts.answers == sum(len(answers.texts) for answers in found)


def test_a_new_request_joins_and_leaves_while_another_runs(engine, pipe, scene):
    """The later one needs a step, the earlier one six, of which it has taken one."""
    ended, late = [], []

    def on_draft(_draft):
        if late:
            return
        late.append(engine.submit(scene.image, masks=masks_of(scene)[:1], steps=1))
        late[0].future.add_done_callback(lambda _: ended.append("late"))
        end = time.monotonic() + WAIT
        while not engine._ready and time.monotonic() < end:
            time.sleep(0.005)  # until it has been read: it then joins before the next step

    early = engine.submit(scene.image, masks=masks_of(scene), early_exit=False, on_draft=on_draft)
    early.future.add_done_callback(lambda _: ended.append("early"))
    assert same(early.result(WAIT), pipe(scene.image, masks=masks_of(scene), early_exit=False))
    assert same(late[0].result(WAIT), pipe(scene.image, masks=masks_of(scene)[:1], steps=1))
    assert ended == ["late", "early"]


def test_questions_conversations_and_found_regions(engine, model, processor, pipe, scene):
    asked = engine.submit(scene.image, question="How many objects?").result(WAIT)
    inputs = processor(images=scene.image, text="How many objects?")
    output = model.generate(**inputs, **SETTINGS)
    assert asked.texts == processor.post_process_image_text_to_text(output)
    assert (asked.boxes, asked.prompt_tokens) == ([], inputs["input_ids"].shape[1])
    turns = [
        {"role": "user", "content": [{"type": "image", "image": scene.image}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": "A house."},
        {"role": "user", "content": [{"type": "image", "image": scene.image}, {"type": "text", "text": "And here?"}]},
    ]
    batch = processor.apply_chat_template(turns, tokenize=True, return_dict=True, add_generation_prompt=True)
    expected = processor.post_process_image_text_to_text(model.generate(**batch, **SETTINGS))
    assert engine.submit(messages=turns).result(WAIT).texts == expected
    assert turns[0]["content"][0]["image"] is scene.image  # the caller's messages stay as they are
    words = processor(text="Is it red?")
    assert engine.submit(question="Is it red?").result(WAIT).texts == processor.post_process_image_text_to_text(
        model.generate(**words, **SETTINGS)
    )
    found = regions_of(scene.image, masks=masks_of(scene))
    assert same(engine.submit(scene.image, found).result(WAIT), pipe(scene.image, masks=masks_of(scene)))
    assert engine.submit(scene.image, []).result(WAIT).texts == []


def test_an_image_is_encoded_once_whatever_it_comes_in(model, processor, scene, tmp_path):
    """Kept by its pixels: as a picture and as a file; a later question about it is cheap."""
    calls = []
    hook = model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    scene.image.save(tmp_path / "scene.png")
    with Engine(model, processor, settings=SETTINGS) as engine:
        first = engine.submit(scene.image, masks=masks_of(scene)).result(WAIT)
        again = engine.submit(tmp_path / "scene.png", masks=masks_of(scene)[:1]).result(WAIT)
        asked = engine.submit(scene.image, question="How many objects?").result(WAIT)
        assert (first.image_was_known, again.image_was_known, asked.image_was_known) == (False, True, True)
        assert len(calls) == 1
        assert (engine.images.hits, engine.images.misses, len(engine.images)) == (2, 1, 1)
        engine.submit(scene.image, masks=masks_of(scene), max_tiles=1).result(WAIT)  # another encoding
        assert len(calls) == 2
    hook.remove()


def test_an_image_is_encoded_ahead_of_its_questions(engine, pipe, scene, tmp_path):
    assert engine.encode(scene.image).result(WAIT).texts == []
    answers = engine.submit(scene.image, masks=masks_of(scene)).result(WAIT)
    assert answers.image_was_known
    assert same(answers, pipe(scene.image, masks=masks_of(scene)))
    with pytest.raises(FileNotFoundError):
        engine.encode(tmp_path / "no such file.png").result(WAIT)


def test_images_are_kept_within_a_bound(model, processor, scenes):
    with Engine(model, processor, settings=SETTINGS) as engine:
        sizes = []
        for scene in scenes[:3]:
            engine.submit(scene.image, masks=masks_of(scene)).result(WAIT)
            sizes.append(engine.images.num_bytes - sum(sizes))
        before = engine.images.num_bytes
        engine.submit(scenes[2].image, question="What is it?").result(WAIT)
        assert engine.images.num_bytes > before  # the image has learned a question
    with Engine(model, processor, settings=SETTINGS, cache_bytes=sizes[1] + sizes[2]) as engine:
        for scene in scenes[:3]:
            engine.submit(scene.image, masks=masks_of(scene)).result(WAIT)
            assert engine.images.num_bytes <= engine.images.max_bytes
        assert engine.submit(scenes[0].image, masks=masks_of(scenes[0])).result(WAIT).image_was_known is False
    with Engine(model, processor, settings=SETTINGS, cache_bytes=0) as engine:
        for _ in range(2):
            assert not engine.submit(scenes[0].image, masks=masks_of(scenes[0])).result(WAIT).image_was_known


def test_more_regions_than_run_at_a_time_take_turns(model, processor, pipe, scene):
    masks = masks_of(scene) * 3
    with Engine(model, processor, settings=SETTINGS, max_answers=4) as engine:
        handles = [
            engine.submit(scene.image, masks=masks, temperature=0.5, seed=1),
            engine.submit(scene.image, masks=masks[:2]),
        ]
        split = pipe(scene.image, masks=masks, max_regions_per_pass=4, temperature=0.5, seed=1)
        assert same(handles[0].result(WAIT), split)
        assert same(handles[1].result(WAIT), pipe(scene.image, masks=masks[:2]))
        assert engine.counts.answers_in_passes / engine.counts.passes <= 4


def test_what_is_wrong_with_one_request_stays_with_it(engine, pipe, scene):
    good = engine.submit(scene.image, masks=masks_of(scene))
    bad = [
        (engine.submit("no such file.png", masks=masks_of(scene)), FileNotFoundError, "no such file.png"),
        (engine.submit(scene.image, boxes=[[5, 5, 5, 9]]), ValueError, r"boxes\[0\]"),
        (engine.submit(scene.image, masks=[masks_of(scene)[0] * 0]), ValueError, r"masks\[0\] is empty"),
        (engine.submit(scene.image, question="Why?", suppress_tokens=[10**6]), ValueError, "suppress_tokens"),
    ]
    for handle, kind, message in bad:
        with pytest.raises(kind, match=message):
            handle.result(WAIT)
    for keywords, message in (
        ({"steps": 0}, "steps must be"),
        ({"beams": 3}, "unknown generate keywords"),
        ({"boxes": [[0, 0, 9, 9]]}, "one form"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.submit(scene.image, masks=masks_of(scene), **keywords)
    with pytest.raises(ValueError, match="nothing is asked"):
        engine.submit(scene.image)
    assert same(good.result(WAIT), pipe(scene.image, masks=masks_of(scene)))
    assert (engine.counts.failed, engine.num_running, engine.num_waiting) == (4, 0, 0)


def test_a_pass_that_fails_ends_its_requests_and_no_others(engine, model, pipe, scene, monkeypatch):
    def broken(*_arguments, **_keywords):
        raise RuntimeError("out of memory, say")

    with monkeypatch.context() as patch:
        patch.setattr(model.lm_head, "forward", broken)
        with pytest.raises(RuntimeError, match="out of memory, say"):
            engine.submit(scene.image, masks=masks_of(scene)).result(WAIT)
    again = engine.submit(scene.image, masks=masks_of(scene)).result(WAIT)
    assert same(again, pipe(scene.image, masks=masks_of(scene)))
    assert engine.is_open


def test_too_many_waiting_requests_are_refused(model, processor, scene, monkeypatch):
    with Engine(model, processor, settings=SETTINGS, max_waiting=2, readers=1) as engine:
        gate, read = threading.Event(), engine.preparer.read
        monkeypatch.setattr(engine.preparer, "read", lambda ask: gate.wait(60) and read(ask))
        handles = [engine.submit(scene.image, question="Why?") for _ in range(2)]
        with pytest.raises(EngineBusy, match="2 requests wait already"):
            engine.submit(scene.image, question="Why?")
        gate.set()
        assert len({handle.result(WAIT).texts[0] for handle in handles}) == 1
        assert engine.counts.refused == 1


def test_a_request_that_is_given_up_leaves(engine, pipe, scene):
    other = engine.submit(scene.image, masks=masks_of(scene))
    drafts = []

    def give_up(draft):
        drafts.append(draft)
        handle.cancel()

    handle = engine.submit(scene.image, masks=masks_of(scene), early_exit=False, on_draft=give_up)
    with pytest.raises(CancelledError):
        handle.result(WAIT)
    assert same(other.result(WAIT), pipe(scene.image, masks=masks_of(scene)))
    again = engine.submit(scene.image, masks=masks_of(scene)).result(WAIT)
    assert same(again, pipe(scene.image, masks=masks_of(scene)))
    assert (len(drafts), engine.counts.cancelled, engine.num_running) == (1, 1, 0)


@pytest.mark.parametrize("drain", [True, False])
def test_closing_finishes_or_ends_what_is_under_way(model, processor, scene, drain):
    engine = Engine(model, processor, settings=SETTINGS)
    handles = [engine.submit(scene.image, masks=masks_of(scene), early_exit=False) for _ in range(5)]
    assert engine.close(drain) or not drain
    assert all(handle.done() for handle in handles)
    errors = [handle.future.exception() for handle in handles]
    assert all(error is None or (isinstance(error, EngineClosed) and not drain) for error in errors)
    assert not drain or not any(errors)
    with pytest.raises(EngineClosed, match="closed"):
        engine.submit(scene.image, question="Why?")
    assert not engine.is_open
    assert not engine._thread.is_alive()


def test_drafts_grow_into_the_answer(engine, scene, processor):
    drafts = []
    handle = engine.submit(scene.image, masks=masks_of(scene), sampler="left_to_right", on_draft=drafts.append)
    answers = handle.result(WAIT)
    assert len(drafts) == answers.num_forward_passes
    settled = [draft.settled() for draft in drafts]
    for before, after in pairwise(settled):
        assert all(new.startswith(old) for old, new in zip(before, after, strict=True))
    assert [text.strip() for text in settled[-1]] == answers.texts
    assert drafts[0].ids.shape == (len(masks_of(scene)), 6)
    assert "▁" in drafts[0].texts()[0]
    assert [text.strip() for text in drafts[-1].texts()] == answers.texts
    assert answers.ids == drafts[-1].ids.tolist()
    for score, length, row in zip(answers.scores, answers.lengths, answers.confidences, strict=True):
        assert sum(row[: length + 1]) / len(row[: length + 1]) == pytest.approx(score)


def test_settings_of_the_engine_are_checked(model, processor):
    for keywords, message in (
        ({"max_answers": 0}, "max_answers must be"),
        ({"cache_bytes": -1}, "max_bytes must be"),
        ({"settings": {"sampler": "best"}}, "sampler must be"),
    ):
        with pytest.raises(ValueError, match=message):
            Engine(model, processor, **keywords)


def test_released_layouts_are_served_too(tiny_model, tiny_processor, scene):
    """Their answers see each other: requests take turns, and get what they get alone."""
    model = tiny_model(attention_layout="released", region_conditioning="vision")
    processor = tiny_processor(model)
    expected = RegionCaptioningPipeline(model=model, processor=processor, **SETTINGS)(
        scene.image, masks=masks_of(scene)
    )
    with Engine(model, processor, settings=SETTINGS) as engine:
        handles = [engine.submit(scene.image, masks=masks_of(scene)) for _ in range(3)]
        assert all(same(handle.result(WAIT), expected) for handle in handles)
        assert len(engine.images) == 0


def test_the_engine_runs_without_gradients(engine, scene):
    states = []
    engine.submit(scene.image, question="Why?", on_draft=lambda _: states.append(torch.is_grad_enabled())).result(WAIT)
    assert states
    assert not any(states)
