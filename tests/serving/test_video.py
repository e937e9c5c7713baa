"""Videos: shots, key frames, spans, and captions that are those of their key frames."""

import json
from argparse import Namespace
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

from perceptiondlm.common.loading import DRAWN_MODEL, load_pipeline
from perceptiondlm.drawn.scenes import draw_scene
from perceptiondlm.pipeline_perceptiondlm import RegionCaptioningPipeline
from perceptiondlm.scripts.cli import main
from perceptiondlm.serving.found import FoundRegion
from perceptiondlm.serving.spans import merge_spans


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
    return path, {"first": dict.fromkeys(range(12), masks[0]), "second": [None] * 15 + [masks[1]] * 7}, masks


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
        assert all(one["end"] == other["start"] for one, other in pairwise(ones))
        assert all(one["caption"] != other["caption"] for one, other in pairwise(ones))
    assert {one["shot"] for one in spans["second"]} == {1}
    key = spans["second"][0]
    (frame,) = [picture for _, picture in pictures(path, {key["frame"]})]
    (alone,) = pipe(frame, masks=[masks[1]])
    assert (key["caption"], key["box"]) == (alone["caption"], alone["box"])


def test_key_frames_that_say_the_same_are_one_span_unless_every_one_is_wanted(pipe, clip):
    path, masklets, _ = clip
    looks = caption_video(pipe, path, masklets, every=0.5, merge_spans=False)
    assert [one["frame"] for one in looks if one["object"] == "first"] == [0, 5, 10]
    assert [(one["start"], one["end"]) for one in looks if one["object"] == "first"] == [(0, 0.5), (0.5, 1), (1, 1.2)]
    spans = caption_video(pipe, path, masklets, every=0.5)
    assert spans == merge_spans(looks)
    assert sum(len(one["frames"]) for one in spans) == len(looks)


def look(name: str, start: float, end: float, caption: str, frame: int, score: float = 0.5, shot: int = 0) -> dict:
    times = {"start": start, "end": end, "frame": frame, "frames": [frame], "shot": shot}
    return {"object": name, "caption": caption, "score": score, "box": [frame, 0, 9, 9], **times}


def test_spans_are_of_one_object_one_shot_one_caption_and_no_gap():
    looks = [
        look("car", 0, 2, "a red car", 0),
        look("dog", 0, 2, "a red car", 0),
        look("car", 2, 4, "a red car", 20, score=0.9),
        look("dog", 2, 4, "a dog", 20),
        look("car", 4, 6, "a red Car", 40),
        look("car", 6, 7, "a red car", 60),
        look("car", 9, 10, "a red car", 90),  # it was away
        look("car", 10, 11, "a red car", 100, shot=1),
    ]
    spans = merge_spans(looks)
    told = [(one["object"], one["start"], one["end"], one["frames"]) for one in spans]
    assert told == [
        ("car", 0, 4, [0, 20]), ("dog", 0, 2, [0]), ("dog", 2, 4, [20]), ("car", 4, 6, [40]), ("car", 6, 7, [60]),
        ("car", 9, 10, [90]), ("car", 10, 11, [100]),
    ]  # fmt: skip
    assert (spans[0]["frame"], spans[0]["box"], spans[0]["score"]) == (20, [20, 0, 9, 9], 0.9)
    assert merge_spans([]) == []


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
    nothing = {"size": [8, 10], "counts": "`2"}  # one run of zeros
    expected = {"1": [0, 2], "2": [1, 2]}
    path = tmp_path / f"masklets.{'npz' if form == 'npz' else 'json'}"
    lists = [[rles[0], nothing, rles[0]], [None, rles[1], rles[1]]]
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


def test_the_command_captions_a_video_with_its_masklets(clip, tmp_path, capsys):
    path, masklets, _ = clip
    masks = {name: [None] * FRAMES for name in masklets}
    for one in masklets_of(masklets):
        for frame, region in one.regions.items():
            masks[one.name][frame] = region.mask
    file, result = tmp_path / "masklets.json", tmp_path / "result.json"
    file.write_text(json.dumps(masks))
    command = ["caption", str(path), "--masks", str(file), "--preset", "fast", "--json", str(result)]
    assert main(command) == 0
    (video,) = json.loads(result.read_text())
    assert {span["object"] for span in video["spans"]} == {"first", "second"}
    assert f"{video['spans'][0]['caption']}\n" in capsys.readouterr().out
    assert main(command) == 2
    assert "--overwrite replaces it" in capsys.readouterr().err
    assert main([*command, "--overwrite", "--no-merge-spans", "--every", "0.5"]) == 0
    (video,) = json.loads(result.read_text())
    assert [span["frame"] for span in video["spans"] if span["object"] == "first"] == [0, 5, 10]
    assert main([*command, "--overwrite", "--attributes", "color"]) == 2
    assert "got --attributes" in capsys.readouterr().err
    assert main(["caption", str(path), "--boxes", "1,1,9,9"]) == 2
    assert "with --masks: a tracker's masklets" in capsys.readouterr().err


# --- drafts -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drawn():
    """The drawn world's model, whose captions are confident."""
    return load_pipeline(Namespace(model=str(DRAWN_MODEL), device=None, dtype="float32", quantize=None))


def inputs_of(pipe, scene, **keywords):
    return pipe.processor(images=scene.image, masks=[item.mask for item in scene.objects], **keywords)


def test_confirmed_drafts_save_passes(drawn):
    """Over a few scenes, and at a threshold at which they take more than the two passes that confirm a draft."""
    careful = {"preset": "fast", "threshold": 0.99}
    passes, same = {"masks": 0, "draft": 0}, []
    for index in range(4):
        inputs = inputs_of(drawn, draw_scene(500, index))
        plain = drawn.model.generate(**inputs, **careful)
        again = drawn.model.generate(**inputs, **careful, draft=plain.sequences)
        passes["masks"] += plain.num_forward_passes
        passes["draft"] += again.num_forward_passes
        same += (again.sequences == plain.sequences).all(dim=1).tolist()
    assert passes["draft"] < passes["masks"]
    assert np.mean(same) >= 0.5


def test_a_draft_of_mask_tokens_changes_nothing(drawn):
    inputs = inputs_of(drawn, draw_scene(500, 3))
    plain = drawn.model.generate(**inputs, preset="fast")
    blank = torch.full_like(plain.sequences, drawn.model.config.mask_token_id)
    nothing = drawn.model.generate(**inputs, preset="fast", draft=blank)
    assert torch.equal(nothing.sequences, plain.sequences)
    assert nothing.num_forward_passes == plain.num_forward_passes + 2


def test_a_draft_of_other_regions_is_not_kept(drawn):
    """Drafts of the objects in reverse order: what is wrong is denoised anew."""
    scene = draw_scene(500, 3)
    plain = drawn.model.generate(**inputs_of(drawn, scene), preset="fast")
    turned = drawn.model.generate(**inputs_of(drawn, scene), preset="fast", draft=plain.sequences.flip(0))
    names = [item.category for item in scene.objects]
    captions = drawn.processor.post_process_region_captions(turned)[0]
    right = [name in caption for name, caption in zip(names, captions, strict=True)]
    assert np.mean(right) > 0.5


def test_drafts_follow_the_callers_order_in_groups_of_regions(drawn):
    scene = draw_scene(500, 3)
    plain = drawn.model.generate(**inputs_of(drawn, scene), preset="fast")
    keywords = {"preset": "fast", "draft": plain.sequences}
    whole = drawn.model.generate(**inputs_of(drawn, scene), **keywords)
    grouped = drawn.model.generate(**inputs_of(drawn, scene, max_regions_per_pass=2), **keywords)
    assert torch.equal(whole.sequences, grouped.sequences)
    with pytest.raises(ValueError, match=r"draft is torch.int64 \(1, 32\); accepted: torch.int64"):
        drawn.model.generate(**inputs_of(drawn, scene), preset="fast", draft=plain.sequences[:1])


def test_key_frames_start_from_the_captions_of_the_one_before(drawn, clip):
    path, masklets, _ = clip
    passes = []
    generate = drawn.model.generate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drawn.model, "generate", lambda **inputs: passes.append("draft" in inputs) or generate(**inputs))
        found = caption_video(drawn, path, masklets, every=0.5, drafts=True, preset="fast")
    assert passes == [False, True, True, False]  # key frames 0, 5, 10 and, in the other shot, 17
    assert {one["object"] for one in found} == {"first", "second"}
