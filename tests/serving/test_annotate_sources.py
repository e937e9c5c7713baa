"""Every source gives the same images and regions, each once, cut into parts; what is wrong with one is said at once."""

import json
from dataclasses import replace

import numpy as np
import pytest
from collections_of_scenes import Collection
from PIL import Image
from pycocotools import mask as coco_mask

from perceptiondlm.images_perceptiondlm import load_image
from perceptiondlm.serving.annotate.job import AnnotationJob, RegionChoice
from perceptiondlm.serving.annotate.plan import locked, prepare_folder
from perceptiondlm.serving.annotate.reading import PartReader
from perceptiondlm.serving.annotate.sources import kind_of, load_part, parts_of, settled


COUNT = 7


@pytest.fixture(scope="module")
def collection(tmp_path_factory):
    return Collection(tmp_path_factory.mktemp("collection"), COUNT)


@pytest.fixture(scope="module")
def places(collection):
    """The same scenes as a COCO file, a table and shards; region choices for each."""
    return {
        "coco": (str(collection.coco()), {}),
        "parquet": (str(collection.parquet()), {"image": "picture"}),
        "shards": (str(collection.shards()), {}),
    }


def job_for(source: str, columns=None, out="unused", **choice) -> AnnotationJob:
    regions = RegionChoice(**choice)
    return AnnotationJob(source, str(out), regions, columns=columns or {}, images_per_part=2)


def choice_of(kind: str) -> dict:
    return {"where": "column", "name": "json"} if kind == "shards" else {}


@pytest.mark.parametrize("kind", ["coco", "parquet", "shards"])
def test_sources_agree_on_images_and_regions(kind, places, collection, tmp_path, processor):
    source, columns = places[kind]
    job = settled(job_for(source, columns, tmp_path / "out", **choice_of(kind)))
    with locked(job.folder):
        plan = prepare_folder(job)
    assert plan.counts.sum() == COUNT
    assert plan.counts.max() <= 2
    reader = PartReader(job, processor)
    images = [image for number in range(len(plan)) for image in reader(number).images]
    assert len({image.record["id"] for image in images}) == COUNT
    assert not [failure for image in images for failure in image.failures]
    for number, image in enumerate(images):
        scene = collection.scenes[number]
        assert (image.record["width"], image.record["height"]) == scene.image.size
        assert [region.mask for region in image.found] == collection.rles[number]
        assert [region.box for region in image.found] == [item.box for item in scene.objects]
        if kind == "coco":
            assert [region.label for region in image.found] == [item.category for item in scene.objects]
            assert all(int(key) >= 100 for key in image.keys)


def test_a_data_set_of_datasets_is_read_by_its_rows(collection, places):
    job = settled(replace(job_for(f"hub:{places['parquet'][0]}", {"image": "picture", "id": "key"})))
    parts = list(parts_of(job))
    assert [part["count"] for part in parts] == [1, 2, 2, 2]
    loaded = [image for part in parts for image in load_part(part, job)]
    assert [image.id for image in loaded] == [f"k{number}" for number in range(COUNT)]
    assert load_image(loaded[3].image).size == collection.scenes[3].image.size
    assert loaded[3].regions == collection.rles[3]


def test_folders_take_region_files_named_like_the_pictures(collection, tmp_path, processor):
    """Arrays, JSON, label maps and a mask picture per region; a picture without any is a failure, not a stop."""
    pictures, regions = collection.pictures(), tmp_path / "regions"
    (regions / "set0").mkdir(parents=True)
    (regions / "set1" / "scene001").mkdir(parents=True)
    masks = [np.stack([item.mask for item in scene.objects]) for scene in collection.scenes]
    np.save(regions / "set0" / "scene000.npy", masks[0])
    for place, mask in enumerate(masks[1]):
        Image.fromarray(mask).save(regions / "set1" / "scene001" / f"r{place}.png")
    (regions / "set0" / "scene002_masks.json").write_text(json.dumps(collection.rles[2]))
    job = settled(job_for(str(pictures), out=tmp_path / "out", where="folder", name=str(regions)))
    with locked(job.folder):
        plan = prepare_folder(job)
    reader = PartReader(job, processor)
    images = {image.record["id"]: image for n in range(len(plan)) for image in reader(n).images}
    for number in range(3):
        image = images[collection.name(number)]
        assert [coco_mask.decode(region.mask).sum() for region in image.found] == [m.sum() for m in masks[number]]
    assert images["set1/scene001.png"].keys == [f"r{place}" for place in range(len(masks[1]))]
    (failure,) = images["set1/scene003.png"].failures
    assert "holds no region file named like it" in failure["error"]


def test_one_bad_region_does_not_cost_its_image(collection, tmp_path, processor):
    content = json.loads(collection.coco().read_text())
    content["annotations"][0] |= {"segmentation": [[-900.0, 5, 90, 5, 90, 60]], "bbox": None}
    path = collection.pictures() / "bad.json"
    path.write_text(json.dumps(content))
    job = settled(job_for(str(path), out=tmp_path / "out"))
    with locked(job.folder):
        prepare_folder(job)
    first = PartReader(job, processor)(0).images[0]
    path.unlink()
    assert len(first.found) == len(collection.rles[0]) - 1
    (failure,) = first.failures
    assert (failure["kind"], failure["id"]) == ("region", "set0/scene000.png/100")


def test_lvis_names_pictures_by_their_address(collection):
    content = json.loads(collection.coco().read_text())
    for entry in content["images"]:
        entry["coco_url"] = f"http://images.example.org/{entry.pop('file_name')}"
    path = collection.pictures() / "lvis.json"
    path.write_text(json.dumps(content))
    ids = [image.id for part in parts_of(job_for(str(path))) for image in load_part(part, job_for(str(path)))]
    path.unlink()
    assert ids == [collection.name(number) for number in range(COUNT)]


def test_a_classical_segmenter_finds_the_regions(collection, tmp_path, processor):
    pytest.importorskip("skimage", reason="the classical segmenter needs scikit-image, the extra [segment]")
    job = settled(job_for(str(collection.pictures()), out=tmp_path, where="segmenter", segmenter="classical"))
    with locked(job.folder):
        prepare_folder(job)
    images = PartReader(job, processor)(0).images
    assert all(image.found and image.passes for image in images)


@pytest.mark.parametrize(
    ("source", "choice", "message"),
    [
        ("absent/folder/deep", {}, "there is nothing at"),
        ("coco", {"where": "file", "name": "x.json"}, "carries regions of its own"),
        ("pictures", {}, "nothing says where their regions are"),
        ("pictures", {"where": "column", "name": "masks"}, "is no table"),
        ("pictures", {"where": "folder", "name": "pictures"}, "holds no region file"),
        ("parquet", {}, "name the one of the image: --image-column"),
        ("shards", {}, "name the one of the regions: --masks column:NAME"),
        ("shards", {"where": "column", "name": "masks.json"}, "has no column masks.json"),
    ],
)
def test_what_is_missing_is_named_before_any_work(source, choice, message, collection, places):
    source = {"pictures": str(collection.pictures()), **{k: v[0] for k, v in places.items()}}.get(source, source)
    choice = {key: source if value == "pictures" else value for key, value in choice.items()}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        list(parts_of(settled(job_for(source, **choice))))


def test_kinds_are_told_apart(collection, places, tmp_path):
    assert kind_of(str(collection.pictures())) == "files"
    assert kind_of(f"{collection.pictures()}/**/*.png") == "files"
    assert [kind_of(places[name][0]) for name in ("coco", "parquet", "shards")] == ["coco", "parquet", "shard"]
    assert kind_of("some-user/some-set") == "hub"


def test_ids_must_tell_rows_apart(collection, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{**row, "key": "same"} for row in collection.rows()[:2]]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    job = settled(job_for(str(tmp_path / "rows.parquet"), {"image": "picture", "id": "key"}))
    with pytest.raises(ValueError, match="holds 'same' twice"):
        list(parts_of(job))
