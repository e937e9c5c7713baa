"""Videos: shots, key frames, spans, and captions that are those of their key frames."""

import json

import numpy as np
import pytest
from PIL import Image

from perceptiondlm.drawn.scenes import draw_scene
from perceptiondlm.pipeline_perceptiondlm import RegionCaptioningPipeline
from perceptiondlm.serving.found import FoundRegion


av = pytest.importorskip("av", reason="videos need PyAV")
from perceptiondlm.serving.video import caption_video, masklets_of, read_masklets  # noqa: E402
from perceptiondlm.serving.video.frames import look_through, pictures  # noqa: E402
from perceptiondlm.serving.video.plan import appearances, plan_looks  # noqa: E402


RATE, SIZE = 10, (160, 120)  # frames per second; width and height in pixels
SHOTS = (0, 12)  # first frames of the two scenes of the video
FRAMES = 30


def write_video(path, frames):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=RATE)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = *SIZE, "yuv420p", 4_000_000
        for frame in frames:
            for packet in stream.encode(av.VideoFrame.from_image(frame)):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A video of two drawn scenes, and a masklet of one object of each: the second is seen from frame 15 to 21."""
    path = tmp_path_factory.mktemp("video") / "clip.mp4"
    scenes = [draw_scene(3, 0), draw_scene(3, 4)]
    stills = [scene.image.resize(SIZE, Image.Resampling.BOX) for scene in scenes]
    write_video(path, [stills[0]] * SHOTS[1] + [stills[1]] * (FRAMES - SHOTS[1]))
    masks = [
        np.asarray(Image.fromarray(scene.objects[0].mask).resize(SIZE, Image.Resampling.NEAREST)) for scene in scenes
    ]
    return path, {"first": {n: masks[0] for n in range(12)}, "second": [None] * 15 + [masks[1]] * 7}, masks


@pytest.fixture
def pipe(model, processor):
    return RegionCaptioningPipeline(model=model, processor=processor, max_new_tokens=6, steps=6)


def test_frames_come_with_their_times_and_shots(clip):
    times = look_through(clip[0])
    assert times.size == (SIZE[1], SIZE[0])
    assert times.seconds == pytest.approx([n / RATE for n in range(FRAMES)])
    assert times.end == pytest.approx(FRAMES / RATE)
    assert times.shots == list(SHOTS)
    shown = dict(pictures(clip[0], {0, 20}))
    assert sorted(shown) == [0, 20]
    assert np.abs(np.asarray(shown[0], int) - np.asarray(shown[20], int)).mean() > 10


def test_every_object_has_captions_of_its_key_frames_with_spans(pipe, clip):
    path, masklets, masks = clip
    found = caption_video(pipe, path, masklets, every=0.5)
    spans = {name: [one for one in found if one["object"] == name] for name in masklets}
    assert (spans["first"][0]["start"], spans["first"][-1]["end"]) == (0.0, 1.2)
    assert (spans["second"][0]["start"], spans["second"][-1]["end"]) == (1.5, 2.2)
    for ones in spans.values():
        assert all(one["end"] == other["start"] for one, other in zip(ones, ones[1:], strict=False))
        assert all(one["caption"] != other["caption"] for one, other in zip(ones, ones[1:], strict=False))
    assert {one["shot"] for one in spans["second"]} == {1}
    key = spans["second"][0]
    (frame,) = [picture for _, picture in pictures(path, {key["frame"]})]
    (alone,) = pipe(frame, masks=[masks[1]])
    assert (key["caption"], key["box"]) == (alone["caption"], alone["box"])


def test_a_key_frame_is_encoded_once_for_all_its_objects(pipe, clip):
    path, _, masks = clip
    encoded = []
    hook = pipe.model.vision_tower.register_forward_hook(lambda _module, inputs, _output: encoded.append(1))
    caption_video(pipe, path, {n: {0: masks[0], 5: masks[0], 14: masks[1]} for n in "abc"}, every=10)
    hook.remove()
    assert len(encoded) == 2  # one look per shot


def test_objects_that_no_key_frame_shows_get_their_own(clip):
    small, large = np.zeros((120, 160), bool), np.zeros((120, 160), bool)
    small[:4, :4] = large[:20, :20] = True
    (masklet,) = masklets_of({"x": {3: small, 4: large, 5: small}})
    (look,) = plan_looks(look_through(clip[0]), [masklet], every=10, gap=0.5)
    assert (look.frame, look.start, look.end) == (4, pytest.approx(0.3), pytest.approx(0.6))


def test_an_object_that_was_away_appears_anew():
    seconds = [n / 10 for n in range(40)]
    assert appearances([0, 1, 4, 20, 21], seconds, gap=0.5) == [[0, 1, 4], [20, 21]]


FORMS = ("sa-v", "youtube-vis", "names", "folder", "npz")


@pytest.mark.parametrize("form", FORMS)
def test_masklets_are_read_as_trackers_write_them(tmp_path, form):
    masks = np.zeros((2, 8, 10), bool)
    masks[0, 1:3, 2:5] = masks[1, 4:7, 6:9] = True
    rles = [FoundRegion.of_mask(mask).mask for mask in masks]
    expected = {"1": [0, 2], "2": [1, 2]}
    path = tmp_path / f"masklets.{'npz' if form == 'npz' else 'json'}"
    lists = [[rles[0], None, rles[0]], [None, rles[1], rles[1]]]
    if form == "sa-v":
        content = {"masklet": [list(frame) for frame in zip(*lists, strict=True)], "masklet_id": [1, 2]}
        path.write_text(json.dumps(content))
    elif form == "youtube-vis":
        path.write_text(json.dumps({"annotations": [{"id": n + 1, "segmentations": lists[n]} for n in range(2)]}))
    elif form == "names":
        path.write_text(json.dumps({"1": lists[0], "2": {"1": rles[1], "2": rles[1]}}))
    labels = np.array([masks[0] * 1, masks[1] * 2, masks[0] * 1 + masks[1] * 2], np.uint8)
    if form == "npz":
        np.savez(path, labels)
    elif form == "folder":
        path = tmp_path
        for number, label_map in enumerate(labels):
            Image.fromarray(label_map).save(tmp_path / f"frame{8 + number}.png")  # 8, 9, 10: by number, not by letter
    found = read_masklets(path)
    assert {one.name: list(one.regions) for one in found} == expected
    for one, mask in zip(found, masks, strict=True):
        assert all((region.pixels() == mask).all() for region in one.regions.values())


WRONG = {
    "another size": ({"x": {0: np.ones((9, 9), bool)}}, r"object 'x', frame 0: the mask is \(9, 9\)"),
    "a frame beyond": ({"x": {99: np.ones((120, 160), bool)}}, "frame 99: the video has 30 frames"),
    "no number": ({"x": {"last": np.ones((120, 160), bool)}}, "frame last: frames are numbered from 0"),
}


@pytest.mark.parametrize(("masklets", "message"), WRONG.values(), ids=WRONG)
def test_masklets_that_do_not_fit_are_named(pipe, clip, masklets, message):
    with pytest.raises(ValueError, match=message):
        caption_video(pipe, clip[0], masklets)


def test_files_that_are_no_videos_are_named(pipe, tmp_path, clip):
    text = tmp_path / "clip.mp4"
    text.write_text("no video")
    with pytest.raises(ValueError, match="cannot be read as a video"):
        caption_video(pipe, text, {})
    with pytest.raises(FileNotFoundError, match="there is no video"):
        caption_video(pipe, tmp_path / "absent.mp4", {})
    with pytest.raises(TypeError, match="masklets are a int"):
        caption_video(pipe, clip[0], 3)
