"""What annotate can be asked beside captions of pictures: attributes of regions, videos, segmenters, other batches."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from collections_of_scenes import Collection, rles_of
from PIL import Image
from tiny_segmenters import saved_sam3

from perceptiondlm.common.loading import DRAWN_MODEL
from perceptiondlm.drawn.scenes import draw_scene
from perceptiondlm.scripts.cli import main
from perceptiondlm.serving.annotate import captioner
from perceptiondlm.serving.annotate.captioner import Captioner, batches
from perceptiondlm.serving.annotate.reading import PreparedImage
from perceptiondlm.serving.records import read_records
from perceptiondlm.serving.segmenters import load_segmenter


QUICK = ["--model", str(DRAWN_MODEL), "--steps", "2", "--max-new-tokens", "8", "--images-per-part", "2"]


@pytest.fixture(scope="module")
def collection(tmp_path_factory):
    return Collection(tmp_path_factory.mktemp("collection"), 4, seed=910)


def test_attributes_are_answered_for_every_region(collection, tmp_path):
    """The answers are those of the pipeline's own way to ask; a region at a time gives what all together give."""
    coco = str(collection.coco())
    for name, size in (("all", "64"), ("few", "1")):
        out = ["--out", str(tmp_path / name), "--regions-per-batch", size]
        assert main(["annotate", coco, *out, *QUICK, "--attributes", "name,color=Which colour is it?"]) == 0
    records = read_records(tmp_path / "all")
    assert len(records) == collection.regions()
    answers = [json.loads(row["attributes"]) for row in records]
    assert all(list(answer) == ["name", "color"] for answer in answers)
    assert all(0 <= one["score"] <= 1 for answer in answers for one in answer.values())
    values = [[one["value"] for one in answer.values()] for answer in answers]
    others = [json.loads(row["attributes"]) for row in read_records(tmp_path / "few")]
    assert values == [[one["value"] for one in answer.values()] for answer in others]


def test_a_box_segmented_is_smaller_than_the_box(collection, tmp_path):
    pytest.importorskip("skimage", reason="the classical segmenter needs scikit-image, the extra [segment]")
    boxes = tmp_path / "boxes" / "set0"
    boxes.mkdir(parents=True)
    wanted = [list(item.box) for item in collection.scenes[0].objects]
    (boxes / "scene000.json").write_text(json.dumps(wanted))
    source = ["annotate", str(collection.pictures() / "set0" / "*000.png"), "--boxes", str(boxes)]
    assert main([*source, "--out", str(tmp_path / "plain"), *QUICK]) == 0
    assert main([*source, "--out", str(tmp_path / "cut"), *QUICK, "--segmenter", "classical"]) == 0
    assert [row["box"] for row in read_records(tmp_path / "plain")] == wanted
    assert len(read_records(tmp_path / "cut")) == len(wanted)
    assert read_records(tmp_path / "cut") != read_records(tmp_path / "plain")


def test_a_video_is_captioned_by_its_masklets_with_times(tmp_path):
    av = pytest.importorskip("av", reason="videos need PyAV, the extra [video]")
    scene = draw_scene(911, 0)
    width, height = (side // 2 * 2 for side in scene.image.size)
    picture = scene.image.crop((0, 0, width, height))
    with av.open(str(tmp_path / "clip.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for _ in range(12):
            container.mux(stream.encode(av.VideoFrame.from_image(picture)))
        container.mux(stream.encode())
    masks = [item.mask[:height, :width] for item in scene.objects]
    cut = rles_of(type("Cut", (), {"objects": [type("Item", (), {"mask": mask}) for mask in masks]}))
    (tmp_path / "clip.json").write_text(json.dumps({f"o{n}": [rle] * 12 for n, rle in enumerate(cut)}))
    asked = ["annotate", str(tmp_path / "clip.mp4"), "--out", str(tmp_path / "out"), *QUICK]
    assert main([*asked, "--export", "spans"]) == 0
    rows = read_records(tmp_path / "out")
    by_object = {name: [row for row in rows if row["id"].endswith(f"/{name}")] for name in ("o0", "o1")}
    for spans in by_object.values():
        assert [(row["start"], row["end"]) for row in spans] == [(0.0, 2.0), (2.0, 3.0)]
    assert {row["image_id"] for row in rows} == {"clip.mp4/frame000000", "clip.mp4/frame000008"}
    (video,) = json.loads((tmp_path / "out" / "exports" / "spans.json").read_text())
    assert video["video"] == str(tmp_path / "clip.mp4")
    for name, looks in by_object.items():
        assert looks[0]["caption"] == looks[1]["caption"]  # the picture stands still
        spans = [(one["start"], one["end"], one["frames"]) for one in video["spans"] if one["object"] == name]
        assert spans == [(0.0, 3.0, [0, 8])]


def test_spans_are_refused_for_pictures(collection, tmp_path, capsys):
    assert main(["annotate", str(collection.coco()), "--out", str(tmp_path / "out"), *QUICK, "--export", "spans"]) == 2
    assert "--export spans is for videos" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_glob_of_pictures_takes_regions_of_a_coco_file(collection, tmp_path):
    """What the glob does not name is left out, and an image's id is its path below the first part with a mark."""
    source = ["annotate", str(collection.pictures() / "set*" / "*[02].png"), "--masks", str(collection.coco())]
    assert main([*source, "--out", str(tmp_path / "out"), *QUICK]) == 0
    rows = read_records(tmp_path / "out")
    wanted = [(collection.name(number), rle) for number in (0, 2) for rle in collection.rles[number]]
    assert [(row["image_id"], row["segmentation"]) for row in rows] == wanted
    assert {row["label"] for row in rows} <= {item.category for scene in collection.scenes for item in scene.objects}


def test_a_folder_of_label_maps_gives_a_row_per_label(collection, tmp_path):
    """Labels 3, 6, ... in pictures named like the photographs; the rows come in the order of the labels."""
    maps = tmp_path / "maps"
    for number, scene in enumerate(collection.scenes):
        labels = sum(3 * (place + 1) * item.mask.astype(np.uint8) for place, item in enumerate(scene.objects))
        path = maps / collection.name(number)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(labels).save(path)
    source = ["annotate", str(collection.pictures()), "--label-maps", str(maps), "--out", str(tmp_path / "out")]
    assert main([*source, *QUICK]) == 0
    found = {}
    for row in read_records(tmp_path / "out"):
        found.setdefault(row["image_id"], []).append(row["segmentation"])
    assert found == {collection.name(number): rles for number, rles in enumerate(collection.rles)}


def test_a_text_gives_a_row_per_region_that_its_segmenter_names(collection, tokenizer, tmp_path, monkeypatch):
    """With a tiny SAM 3 of random weights: the rows are the regions it finds, the label is the text."""
    name = saved_sam3(tmp_path / "sam3", tokenizer)
    monkeypatch.setattr(captioner, "load_segmenter", partial(load_segmenter, least_named=0.0))
    source = str(collection.pictures() / "set0" / "*000.png")
    asked = ["annotate", source, "--segmenter", name, "--text", "red car", "--out", str(tmp_path / "out"), *QUICK]
    assert main(asked) == 0
    rows = read_records(tmp_path / "out")
    found = load_segmenter(name, least_named=0.0).named(collection.scenes[0].image, "red car")
    assert found
    assert [row["segmentation"] for row in rows] == [region.mask for region in found]
    assert {row["label"] for row in rows} == {"red car"}
    assert all(row["caption"] for row in rows)


def test_batches_hold_regions_not_images():
    """At most as many regions as asked, images of like size together, none left out, none twice."""
    dice = np.random.default_rng(0)
    images = []
    for number in range(40):
        count, tiles = int(dice.integers(0, 9)), int(dice.integers(1, 8))
        passes = [{"tiles": np.zeros((tiles, 1))}] if count else []
        images.append(PreparedImage({"id": str(number)}, found=[None] * count, passes=passes))
    made = list(batches(images, 16))
    assert sorted(place for batch in made for place in batch) == [n for n, image in enumerate(images) if image.found]
    assert max(sum(len(images[place].found) for place in batch) for batch in made) <= 16
    tiles = [len(images[place].passes[0]["tiles"]) for batch in made for place in batch]
    assert tiles == sorted(tiles)
    large = [batch for batch in batches(images, 2) if sum(len(images[place].found) for place in batch) > 2]
    assert large
    assert all(len(batch) == 1 for batch in large)  # an image of more regions than fit is a batch by itself


def captioner_that(generate) -> Captioner:
    """A captioner whose model is a function of images."""
    captioner = Captioner.__new__(Captioner)
    captioner.limit, captioner.went_through, captioner._generate = 8, False, generate
    return captioner


def test_a_batch_that_does_not_fit_into_memory_is_halved():
    images = [PreparedImage({"id": str(number)}, found=[None]) for number in range(8)]

    def generate(chosen):
        if len(chosen) > 2:
            raise torch.OutOfMemoryError
        return [[{"caption": image.record["id"]}] for image in chosen]

    captioner = captioner_that(generate)
    answers = dict(captioner._answers(images, list(range(8))))
    assert {place: answer[0]["caption"] for place, answer in answers.items()} == {n: str(n) for n in range(8)}
    assert captioner.limit == 2  # of later parts


def test_an_image_that_the_model_refuses_costs_no_other_one():
    images = [PreparedImage({"id": str(number)}, found=[None]) for number in range(4)]

    def generate(chosen):
        if any(image.record["id"] == "2" for image in chosen):
            raise ValueError("image 2 is odd")
        return [[{"caption": "fine"}] for _ in chosen]

    answers = dict(captioner_that(generate)._answers(images, [0, 1, 2, 3]))
    assert isinstance(answers.pop(2), ValueError)
    assert answers == {place: [{"caption": "fine"}] for place in (0, 1, 3)}
    with pytest.raises(ValueError, match="odd"):  # nothing has gone through yet: the model itself may be at fault
        dict(captioner_that(generate)._answers(images, [2]))
