"""The app without a browser: marks become regions, tokens become words, outlines cover their masks, exports load."""

import json
import re
import runpy
import sys
import threading
import time
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO


pytest.importorskip("skimage", reason='the app needs scikit-image: pip install "perceptiondlm[app]"')

from perceptiondlm.common.loading import DRAWN_MODEL, load_pipeline
from perceptiondlm.common.palette import contrast
from perceptiondlm.drawn.scenes import draw_scene
from perceptiondlm.pipeline_perceptiondlm import RegionCaptioningPipeline
from perceptiondlm.scripts.cli import main
from perceptiondlm.serving.app.actions import MOST_PIXELS, Actions, safe_name
from perceptiondlm.serving.app.captioner import Captioner
from perceptiondlm.serving.app.exports import python_code
from perceptiondlm.serving.app.marks import region_of_mark
from perceptiondlm.serving.app.outlines import traced
from perceptiondlm.serving.app.session import MOST_REGIONS, Session, Sessions
from perceptiondlm.serving.app.view import region_view
from perceptiondlm.serving.app.words import Decisions, draft_pieces, words_of
from perceptiondlm.serving.found import FoundRegion
from perceptiondlm.serving.segmenters import load_segmenter


SIZE = (120, 80)  # width, height
IMAGE = Image.new("RGB", SIZE, "white")


def last(views):
    """The view that stays."""
    return list(views)[-1]


# --- marks ------------------------------------------------------------------------------------------------------------


def test_a_box_is_cut_to_the_image_and_may_be_drawn_from_any_corner():
    found = region_of_mark({"kind": "box", "box": [130.5, 90, 60.4, 39.6]}, IMAGE, load_segmenter("none"), fit=False)
    assert found.box == (60, 39, 120, 80)
    assert found.area == 60 * 41


def test_a_brush_covers_its_stroke_and_nothing_else():
    mark = {"kind": "brush", "strokes": [[[20, 40], [100, 40]], [[60, 10]]], "radius": 6}
    mask = region_of_mark(mark, IMAGE, load_segmenter("none"), fit=True).pixels()
    ys, xs = np.mgrid[: SIZE[1], : SIZE[0]]
    along = np.hypot(xs - np.clip(xs, 20, 100), ys - 40)
    distance = np.minimum(along, np.hypot(xs - 60, ys - 10))
    assert mask[distance <= 4.5].all()
    assert not mask[distance >= 7.5].any()


@pytest.mark.parametrize(
    ("mark", "message"),
    [
        ({"kind": "box", "box": [10, 10, 11, 60]}, "less than 2 pixels"),
        ({"kind": "box", "box": [10, 10, float("nan"), 60]}, "needs numbers"),
        ({"kind": "box", "box": "1234"}, "needs 4 numbers"),
        ({"kind": "box", "box": [10, 10, 60]}, "needs 4 numbers"),
        ({"kind": "point", "point": [200, 10]}, "outside the image of 120 x 80"),
        ({"kind": "point", "point": [5, 5]}, "needs a segmenter"),
        ({"kind": "brush", "strokes": [], "radius": 3}, "list of strokes"),
        ({"kind": "brush", "strokes": [[[5, 5]]], "radius": 1e5}, "radius is between"),
        ({"kind": "brush", "strokes": [[[5, 5]] * 20_001], "radius": 3}, "at most 20000 points"),
        ({"kind": "brush", "strokes": [[[500, 500]]], "radius": 3}, "no pixel of the image"),
        ({"kind": "lasso"}, "box, point or brush, got 'lasso'"),
        ({}, "box, point or brush, got None"),
    ],
)
def test_marks_that_mean_nothing_are_refused_with_a_reason(mark, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        region_of_mark(mark, IMAGE, load_segmenter("none"), fit=True)


def test_an_outline_filled_again_is_the_mask_with_its_hole():
    drawn = Image.new("L", (400, 300))
    draw = ImageDraw.Draw(drawn)
    draw.ellipse((50, 40, 300, 260), fill=1)
    draw.ellipse((120, 100, 200, 180), fill=0)
    mask = np.asarray(drawn, bool)
    region = FoundRegion.of_mask(mask)
    path, (x, y) = traced(region.mask, region.box)
    rings = [[float(n) for n in re.split("[L ]", ring)] for ring in re.findall("M([^Z]+)Z", path)]
    filled = np.zeros_like(mask)
    for ring in rings:
        filled ^= coco_mask.decode(coco_mask.frPyObjects([ring], *mask.shape))[..., 0].astype(bool)
    assert len(rings) == 2
    assert (filled & mask).sum() / (filled | mask).sum() > 0.98
    assert mask[int(y), int(x)]
    assert min(np.hypot(*(np.argwhere(~mask) - (y, x)).T)) > 30  # the number stands well inside


def test_a_single_pixel_has_an_outline():
    mask = np.zeros((2000, 3000), bool)
    mask[1000, 2000] = True
    region = FoundRegion.of_mask(mask)
    path, (x, y) = traced(region.mask, region.box)
    assert path.startswith("M")
    assert (x, y) == pytest.approx((2000.5, 1000.5), abs=1)


# --- words ------------------------------------------------------------------------------------------------------------


def test_words_carry_their_least_sure_token_and_their_last_pass(tokenizer):
    text = "a large red boat with unforeseeable stripes"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    end = tokenizer.convert_tokens_to_ids("<|eot_id|>")
    confidences = [1 - 0.01 * place for place in range(len(ids) + 4)]
    decided = list(range(1, len(ids) + 5))
    words = words_of([*ids, end, *ids[:3]], confidences, decided, tokenizer)
    assert [word.text for word in words] == text.split()
    pieces = [tokenizer.decode([token]) for token in ids]
    assert len(pieces) > len(words)  # a rare word is made of several tokens
    place = 0
    for word in words:
        start, spelled = place, ""
        while spelled.strip() != word.text:
            spelled += pieces[place]
            place += 1
        assert word.confidence == pytest.approx(confidences[place - 1])
        assert (word.decided, place - start >= 1) == (decided[place - 1], True)


def test_a_draft_shows_open_slots_up_to_its_end(tokenizer):
    mask, end = tokenizer.convert_tokens_to_ids(["<|mdm_mask|>", "<|eot_id|>"])
    (boat,) = tokenizer(" red", add_special_tokens=False)["input_ids"]
    assert draft_pieces([mask, boat, mask, end, mask], tokenizer, mask) == [None, " red", None]


def test_decisions_remember_the_last_pass_that_changed_a_slot():
    decisions = Decisions()
    for draft in ([[9, 5, 9]], [[3, 5, 9]], [[3, 5, 4]], [[3, 6, 4]]):
        decisions.add(draft)
    assert (decisions.passes, decisions.last) == (4, [[2, 4, 3]])


# --- actions ----------------------------------------------------------------------------------------------------------


SETTINGS = {"steps": 4, "max_new_tokens": 8}
WAIT = 600  # seconds: a busy machine is no error


@contextmanager
def actions_of(model, processor):
    """What a visitor can do on a tiny random model."""
    captioner = Captioner(RegionCaptioningPipeline(model=model, processor=processor), "tiny")
    yield Actions(captioner, load_segmenter("none"), {})
    captioner.close()


@pytest.fixture(scope="module")
def actions(model, processor):
    with actions_of(model, processor) as actions:
        yield actions


def session_of(actions, scene, folder):
    """A visitor with a scene and its objects marked."""
    folder.mkdir(exist_ok=True)
    session = Session(folder)
    scene.image.save(folder / "scene.png")
    view = last(actions.open(session, folder / "scene.png", "../../etc/my scene<b>.png"))
    assert (view["error"], view["image"]["name"]) == (None, "my scene_b_.png")
    session.add([FoundRegion.of_mask(item.mask) for item in scene.objects], "found")
    return session


@pytest.fixture
def session(actions, scene, tmp_path):
    """A session with the scene and its three objects marked."""
    return session_of(actions, scene, tmp_path)


def captions_of(view):
    """The words of every caption of a view."""
    assert view["error"] is None
    return [[word for word, *_ in region["caption"]["words"]] for region in view["regions"]]


def generated(model, processor, image, **asked):
    """Texts that `generate` gives."""
    output = model.generate(**processor(images=image, **asked), **SETTINGS)
    return [answer["text"].split() for answer in processor.decode_answers(output)]


def test_drafts_come_before_captions_and_captions_are_those_of_generate(actions, session, scene, model, processor):
    views = list(actions.caption(session, SETTINGS))
    drafts = [view for view in views if "pieces" in view["regions"][0]["caption"]]
    assert len(drafts) >= 1
    assert all(view["busy"] == "captioning" for view in drafts)
    assert any(None in region["caption"]["pieces"] for region in drafts[0]["regions"])
    inputs = processor(images=scene.image, masks=[item.mask for item in scene.objects], return_tensors="pt")
    expected = processor.post_process_region_captions(model.generate(**inputs, **SETTINGS), True)[0]
    assert views[-1]["busy"] is None
    for region, caption in zip(session.regions, expected, strict=True):
        assert region.caption.text == caption["caption"]
        assert region.caption.score == pytest.approx(caption["score"], abs=1e-4)


@pytest.mark.parametrize("how", ["stopped", "left"])
def test_a_stopped_run_keeps_the_captions_before_and_frees_the_model(actions, session, how):
    last(actions.caption(session, SETTINGS))
    before, cancelled = [region.caption for region in session.regions], actions.captioner.engine.counts.cancelled
    running = actions.caption(session, {"steps": 64, "max_new_tokens": 64})
    assert next(running)["busy"] == "captioning"
    if how == "left":
        running.close()
    else:
        session.stop()
        view = last(running)
        assert view["note"] == "Stopped."
        assert all("words" in region["caption"] for region in view["regions"])
    assert [region.caption for region in session.regions] == before
    engine = actions.captioner.engine
    assert (engine.num_running, engine.num_waiting, engine.counts.cancelled) == (0, 0, cancelled + 1)


def test_two_visitors_share_passes_and_get_what_each_gets_alone(actions, session, tmp_path):
    other = session_of(actions, draw_scene(5, 1), tmp_path / "other")
    engine, visitors = actions.captioner.engine, (session, other)

    def passes_of(run):
        before = engine.counts.passes
        return run(), engine.counts.passes - before

    def caption(one):
        return captions_of(last(actions.caption(one, SETTINGS)))

    alone, passes_alone = zip(*(passes_of(partial(caption, one)) for one in visitors), strict=True)

    busy = threading.Event()

    def hold(_draft):
        """Until both wait to join: they then do so before the same step."""
        busy.set()
        end = time.monotonic() + WAIT
        while len(engine._ready) < 2 and time.monotonic() < end:
            time.sleep(0.005)

    def together():
        with ThreadPoolExecutor(2) as threads:
            held = engine.submit(session.image, question="Why?", steps=1, on_draft=hold)
            assert busy.wait(WAIT)
            found = list(threads.map(caption, visitors))
            held.result(WAIT)
        return found

    found, passes_together = passes_of(together)
    assert found == list(alone)
    assert passes_together == 1 + max(passes_alone)  # one is the held question's


def test_a_picture_is_encoded_when_it_is_opened_and_never_again(actions, scene, tmp_path, model):
    calls = []
    hook = model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    brighter = replace(scene, image=scene.image.point(lambda value: min(value + 9, 255)))
    session = session_of(actions, brighter, tmp_path)
    assert len(calls) == 1
    captions_of(last(actions.caption(session, SETTINGS)))
    last(actions.ask(session, "How many?", None, SETTINGS))
    session_of(actions, brighter, tmp_path)  # another visitor, or the same one again
    assert len(calls) == 1
    hook.remove()


@pytest.mark.parametrize(
    "config",
    [{"image_in_prompt": False}, {"attention_layout": "released", "region_conditioning": "vision"}],
    ids=["regions alone", "released"],
)
def test_models_of_other_kinds_caption_and_answer_too(tiny_model, tiny_processor, scene, tmp_path, config):
    """One that sees regions alone is asked about the region of all pixels instead of the image."""
    model = tiny_model(**config)
    processor = tiny_processor(model)
    masks, question = [item.mask for item in scene.objects], "What is it?"
    with actions_of(model, processor) as actions:
        session = session_of(actions, scene, tmp_path)
        view = last(actions.caption(session, SETTINGS))
        assert captions_of(view) == generated(model, processor, scene.image, masks=masks)
        view = last(actions.ask(session, question, None, SETTINGS))
        assert view["error"] is None
        words = [word for word, *_ in view["exchanges"][0]["answer"]["words"]]
    whole = {} if model.config.image_in_prompt else {"masks": [np.ones(masks[0].shape, bool)]}
    assert [words] == generated(model, processor, scene.image, text=question, **whole)


def test_a_visitor_who_stops_while_waiting_leaves_at_once(actions, session):
    """The model is busy with another's question, and the line does not move."""
    engine, going_on, released = actions.captioner.engine, threading.Event(), threading.Event()

    def hold(_draft):
        going_on.set()
        released.wait(WAIT)

    held = engine.submit(session.image, question="Why?", steps=1, on_draft=hold)
    assert going_on.wait(WAIT)
    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(lambda: last(actions.caption(session, SETTINGS)))
        while session.drafts is None and not running.done():
            time.sleep(0.005)
        session.stop()
        assert running.result(WAIT)["note"] == "Stopped."
    assert not held.done()
    assert [region.caption for region in session.regions] == [None] * 3
    released.set()
    held.result(WAIT)


def test_visitors_are_told_where_too_many_wait(actions, session, monkeypatch):
    monkeypatch.setattr(actions.captioner.engine, "max_waiting", 0)
    assert "requests wait already" in last(actions.caption(session, SETTINGS))["error"]


def test_questions_about_region_and_picture_are_answered_beside_them(actions, session):
    view = last(actions.ask(session, "  What\n colour? ", 2, SETTINGS))
    view = last(actions.ask(session, "How many?", None, SETTINGS))
    assert [(one["region"], one["question"]) for one in view["exchanges"]] == [(2, "What colour?"), (None, "How many?")]
    assert all("words" in one["answer"] for one in view["exchanges"])
    assert "there is no region 9" in last(actions.ask(session, "What?", 9, SETTINGS))["error"]
    assert "1 to 400 characters" in last(actions.ask(session, "x" * 401, None, SETTINGS))["error"]
    view = last(actions.remove(session, 2))
    assert [one["region"] for one in view["exchanges"]] == [None]


def test_what_visitors_do_wrong_is_said_and_changes_nothing(actions, session, tmp_path):
    count = len(session.regions)
    huge = tmp_path / "huge.png"
    Image.new("1", (MOST_PIXELS // 1000 + 1, 1000)).save(huge)
    (tmp_path / "page.png").write_text("<svg onload='alert(1)'>")
    assert "accepted are up to 64" in last(actions.open(session, huge, "huge.png"))["error"]
    assert "cannot identify" in last(actions.open(session, tmp_path / "page.png", "page.png"))["error"]
    assert "needs a segmenter" in last(actions.everything(session))["error"]
    assert "less than 2 pixels" in last(actions.mark(session, {"kind": "box", "box": [5, 5, 5, 5]}))["error"]
    assert "steps must be" in last(actions.caption(session, {"steps": 0}))["error"]
    assert "there is no example" in last(actions.example(session, "../x"))["error"]
    assert "no caption to export" in last(actions.export(session, "png"))["error"]
    assert (len(session.regions), session.image_name) == (count, "my scene_b_.png")
    with pytest.raises(ValueError, match=f"at most {MOST_REGIONS}"):
        session.add([session.regions[0].found] * MOST_REGIONS, "found")
    assert len(session.regions) == count
    empty = Session(tmp_path)
    assert "open a picture first" in last(actions.caption(empty, SETTINGS))["error"]


def test_exports_are_a_picture_and_coco(actions, session, scene):
    last(actions.caption(session, SETTINGS))
    view = last(actions.export(session, "png"))
    with Image.open(view["download"]["path"]) as picture:
        assert picture.width > scene.image.width
    view = last(actions.export(session, "coco"))
    assert view["download"]["name"] == "my scene_b_-captions.json"
    coco = COCO(view["download"]["path"])
    annotations = coco.loadAnns(coco.getAnnIds())
    for annotation, region, item in zip(annotations, session.regions, scene.objects, strict=True):
        assert (coco.annToMask(annotation).astype(bool) == item.mask).all()
        assert annotation["caption"] == region.caption.text
        tokens = annotation["token_confidences"]
        assert sum(tokens) / len(tokens) == pytest.approx(annotation["score"], abs=1e-3)


def test_copied_python_prints_the_captions_of_the_page(session, scene, capsys, monkeypatch):
    """On a model that lies in a folder of a repository, with the repository's code."""
    pipe = load_pipeline(Namespace(model=None, device=None, dtype="auto", quantize=None), DRAWN_MODEL)
    captioner = Captioner(pipe, str(DRAWN_MODEL))
    session.captioner = captioner
    last(Actions(captioner, load_segmenter("none"), {}).caption(session, {"preset": "fast", "steps": 20}))
    script = session.folder / "script.py"
    script.write_text(python_code(session))
    scene.image.save(session.folder / session.image_name)
    captioner.close()
    monkeypatch.chdir(session.folder)
    runpy.run_path(str(script))
    printed = [line.partition("  ")[2] for line in capsys.readouterr().out.splitlines()]
    assert printed == [region.caption.text for region in session.regions]


def test_views_are_json_and_numbers_are_legible_on_their_colours(session):
    for number, region in enumerate(session.regions * 3, start=1):
        region.number = number
        view = json.loads(json.dumps(region_view(region)))
        color, ink = (tuple(bytes.fromhex(view[key][1:])) for key in ("color", "ink"))
        assert contrast(color, ink) >= 4.5


def test_sessions_are_apart_and_the_oldest_leaves_with_its_files(tmp_path):
    sessions = Sessions(tmp_path, most=2)
    first = sessions.of("a")
    (first.folder / "file").write_text("x")
    assert sessions.of("a") is first
    assert sessions.of("b") is not first
    sessions.of("c")
    assert not first.folder.exists()
    assert sessions.of("a") is not first
    sessions.forget("a")
    assert len(list(tmp_path.iterdir())) == 1


def test_pictures_of_all_visitors_together_are_bounded(tmp_path):
    sessions = Sessions(tmp_path, most_pixels=3 * IMAGE.width * IMAGE.height)
    for name in "abc":
        sessions.of(name).image = IMAGE
    assert sessions.of("a").image is not None
    sessions.of("d").image = IMAGE
    assert set(sessions.held) == {"a", "b", "c", "d"}
    assert sessions.of("d").image is not None
    assert set(sessions.held) == {"c", "a", "d"}


def test_names_lose_what_means_something_elsewhere():
    assert safe_name('C:\\x\\"""evil;<b>.png') == "___evil__b_.png"
    assert safe_name("../..") == "picture"


def test_files_that_were_not_uploaded_are_refused(tmp_path, monkeypatch):
    pytest.importorskip("gradio", reason='the app needs gradio: pip install "perceptiondlm[app]"')
    from perceptiondlm.serving.app.ui import uploaded

    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    inside = tmp_path / "uploads" / "x" / "photo.png"
    inside.parent.mkdir(parents=True)
    inside.write_bytes(b"")
    assert uploaded(str(inside)) == inside
    for path in ("/etc/passwd", f"{inside}/../../../secret", None, str(tmp_path / "uploads")):
        with pytest.raises(ValueError, match="not uploaded here"):
            uploaded(path)


def test_a_missing_extra_is_named_with_its_install_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["app"]) == 2
    assert 'pip install "perceptiondlm[app]"' in capsys.readouterr().err
