"""Benchmark folders: the published counts, the layouts, crops, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from perceptiondlm.drawn.scenes import draw_scene, write_scenes
from perceptiondlm.evaluation import benchmarks
from perceptiondlm.evaluation.benchmarks import crop, load_benchmark
from perceptiondlm.evaluation.judges.registry import make_judge


PUBLISHED = Path(__file__).parents[3] / "shared" / "data"
needs_published = pytest.mark.skipif(
    not PUBLISHED.is_dir(), reason="the published annotations are not beside this checkout"
)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """A folder of three drawn pictures in the layout of ParaDLC-Bench."""
    folder = tmp_path_factory.mktemp("benchmark") / "scenes"
    write_scenes(0, 3, folder)
    return folder


def edited(folder, target, name, edit):
    """A copy of a benchmark's JSON files, one of them edited."""
    target.mkdir(exist_ok=True)
    for file in benchmarks.FILES:
        content = json.loads((folder / file).read_text())
        (target / file).write_text(json.dumps(edit(content) if file == name else content))
    return target


@needs_published
def test_published_paradlc():
    benchmark = load_benchmark(PUBLISHED / "paradlc")
    questions = [question for asked in benchmark.questions.values() for question in asked]
    assert (benchmark.name, benchmark.protocol) == ("paradlc", "paradlc")
    assert (len(benchmark.images), len(benchmark.regions), len(questions)) == (100, 299, 2345)
    assert {2, 8} <= {len(image.regions) for image in benchmark.images} <= set(range(2, 9))
    assert sum(question["type"] == "positive" for question in questions) == 1137
    assert sum(question.get("subtype") == "salient negative" for question in questions) == 679
    assert sum(question.get("subtype") == "negative part" for question in questions) == 529
    assert all(question.get("query") is None for question in questions)
    first = benchmark.regions[0]
    assert (first.region_id, first.class_name, benchmark.image_ids["1592437_0"]) == ("1592437_0", "person", "1592437")
    assert first.mask().shape == (480, 640)
    assert all(region.mask().any() for region in benchmark.regions)


@needs_published
def test_published_dlc():
    benchmark = load_benchmark(PUBLISHED / "dlc")
    assert (benchmark.name, benchmark.protocol) == ("dlc", "dlc")
    assert (len(benchmark.images), len(benchmark.regions)) == (77, 100)
    assert sum(map(len, benchmark.questions.values())) == 892
    assert benchmark.class_names["2391781"] == "wild bird"
    assert benchmark.regions[0].mask().shape == (benchmark.images[0].height, benchmark.images[0].width)


@needs_published
@pytest.mark.parametrize(("name", "positive"), [("paradlc", 100 * 287 / 299), ("dlc", 100)])
def test_the_best_answers_to_the_published_questions(name, positive):
    """12 regions of ParaDLC-Bench have no positive question and count 0, so 96 is the most one can reach."""
    benchmark = load_benchmark(PUBLISHED / name)

    def best(requests):
        assert all(request.image is None for request in requests)
        return [max(request.question["choices"], key=lambda choice: choice[1])[0] for request in requests]

    result = benchmark.score(dict.fromkeys(benchmark.questions, "a thing"), best, show_image=False)
    assert (result.positive, result.negative, result.recognition) == (pytest.approx(positive), 100, 100)
    assert result.num_images == len(benchmark.images)


def test_a_folder_of_scenes(scenes):
    benchmark = load_benchmark(scenes)
    drawn = [draw_scene(0, index) for index in range(3)]
    assert benchmark.name == "scenes"
    assert list(benchmark.questions) == [region_id for scene in drawn for region_id in scene.region_ids]
    for image, scene in zip(benchmark.images, drawn, strict=True):
        assert (np.asarray(image.open()) == np.asarray(scene.image)).all()
        for region, item in zip(image.regions, scene.objects, strict=True):
            assert (region.mask() == item.mask).all()
            assert region.class_name == item.category
    captions = {
        region_id: item.caption
        for scene in drawn
        for region_id, item in zip(scene.region_ids, scene.objects, strict=True)
    }
    result = benchmark.score(captions, make_judge("rules"))
    assert (result.positive, result.negative, result.num_images) == (100, 100, 3)


def test_the_judge_sees_crops_where_the_protocol_says_so(scenes):
    seen = []

    def judge(requests):
        seen.extend(requests)
        return ["A"] * len(requests)

    benchmark = load_benchmark(scenes)
    captions = dict.fromkeys(benchmark.questions, "")
    benchmark.score(captions, judge)
    image, region = benchmark.images[0], benchmark.images[0].regions[0]
    expected_image, expected_mask = crop(image.open(), region.mask())
    assert seen[0].region_id == region.region_id
    assert (np.asarray(seen[0].image) == np.asarray(expected_image)).all()
    assert (seen[0].mask == expected_mask).all()
    seen.clear()
    load_benchmark(scenes, protocol="dlc").score(captions, judge)
    assert {request.image for request in seen} == {None}
    assert "image" not in seen[0].question["question"]
    crops = benchmark.crops()
    assert len(crops) == len(list(crops)) == len(benchmark.regions)
    assert "1_0" not in crops


def test_named_benchmarks_come_from_the_hub_and_files_may_lie_in_annotations(scenes, tmp_path, monkeypatch):
    (tmp_path / "annotations").mkdir()
    for file in benchmarks.FILES:
        (tmp_path / "annotations" / file).write_text((scenes / file).read_text())
    (tmp_path / "annotations" / "images").symlink_to(scenes / "images")
    asked = []

    def download(repo_id, **options):
        asked.append((repo_id, options))
        return str(tmp_path)

    monkeypatch.setattr(benchmarks, "snapshot_download", download)
    benchmark = load_benchmark("paradlc", revision="v1")
    assert asked == [("MSALab/ParaDLC-Bench", {"repo_type": "dataset", "revision": "v1"})]
    assert (benchmark.name, len(benchmark.images)) == ("paradlc", 3)
    assert benchmark.images[0].open().width == benchmark.images[0].width


def test_uncompressed_run_lengths_and_regions_without_questions(scenes, tmp_path):
    plain = load_benchmark(scenes).regions

    def uncompressed(annotations):
        for image in annotations:
            for item in image["annotations"]:
                flat = coco_mask.decode(item["mask_rle"]).ravel(order="F")
                edges = np.flatnonzero(np.diff(flat)) + 1
                counts = np.diff([0, *edges, flat.size]).tolist()
                item["mask_rle"]["counts"] = [0, *counts] if flat[0] else counts
        return annotations

    lists = load_benchmark(edited(scenes, tmp_path, "annotations.json", uncompressed)).regions
    assert all((one.mask() == other.mask()).all() for one, other in zip(plain, lists, strict=True))
    dropped = plain[0].region_id
    fewer = load_benchmark(edited(scenes, tmp_path, "qa.json", lambda qa: {**qa, dropped: []}))
    assert len(fewer.regions) == len(plain) - 1
    assert dropped not in fewer.class_names


@pytest.mark.parametrize(
    ("name", "edit", "message"),
    [
        ("annotations.json", lambda images: images[1:], r"regions have questions but no annotation: 0-0_0, 0-0_1"),
        ("class_names.json", lambda names: {}, "regions have questions but no class name: 0-0_0"),
        ("annotations.json", lambda images: [*images, images[0]], "region ids that occur twice .*: 0-0_0, 0-0_1"),
    ],
)
def test_files_that_do_not_fit_together(scenes, tmp_path, name, edit, message):
    with pytest.raises(ValueError, match=message):
        load_benchmark(edited(scenes, tmp_path, name, edit))


def test_what_is_missing_is_named(scenes, tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"'nowhere' is neither a folder nor one of the benchmarks \('paradlc',"
    ):
        load_benchmark("nowhere")
    with pytest.raises(ValueError, match="protocol 'coco' is none of"):
        load_benchmark(scenes, protocol="coco")
    folder = edited(scenes, tmp_path, "", None)
    with pytest.raises(FileNotFoundError, match=r"images/.*png"):
        load_benchmark(folder).images[0].open()
    (folder / "images").mkdir()
    image = load_benchmark(folder).images[0]
    Image.new("RGB", (3, 2)).save(image.path)
    with pytest.raises(ValueError, match=f"is 3 x 2, annotated as {image.width} x {image.height}"):
        image.open()
    (folder / "qa.json").write_text("{")
    with pytest.raises(ValueError, match=r"qa.json is not JSON"):
        load_benchmark(folder)
    (folder / "qa.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no qa.json, neither at its top nor in annotations/"):
        load_benchmark(folder)


@pytest.mark.parametrize(
    ("rows", "columns", "expected"),  # half-open; the image is 200 high and 300 wide
    [
        ((90, 110), (100, 160), ((16, 184), (40, 220))),  # 20 high counts as 56 about row 100: 72..128, grown
        ((10, 80), (0, 80), ((0, 150), (0, 160))),  # cut off at the top and at the left
        ((120, 190), (230, 300), ((50, 200), (160, 300))),  # and at the other sides
        ((0, 200), (0, 300), ((0, 200), (0, 300))),
        ((0, 1), (299, 300), ((0, 85), (215, 300))),  # about row 0.5: -27.5 is -27, rounded to zero as published
        ((101, 102), (100, 101), ((17, 185), (16, 184))),
    ],
)
def test_crops_of_boxes(rows, columns, expected):
    mask = np.zeros((200, 300), dtype=bool)
    mask[slice(*rows), slice(*columns)] = True
    pixels = np.arange(200 * 300 * 3).reshape(200, 300, 3).astype(np.uint8)
    image, cropped = crop(Image.fromarray(pixels), mask)
    window = tuple(slice(*bounds) for bounds in expected)
    assert (np.asarray(image) == pixels[window]).all()
    assert image.size == (cropped.shape[1], cropped.shape[0])
    assert (cropped == mask[window]).all()


def test_crops_that_cannot_be():
    image = Image.new("RGB", (30, 20))
    with pytest.raises(ValueError, match="mask is 20 x 30, the image 30 x 20"):
        crop(image, np.ones((30, 20), dtype=bool))
    with pytest.raises(ValueError, match="mask is empty"):
        crop(image, np.zeros((20, 30), dtype=bool))
