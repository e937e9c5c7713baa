"""Whole runs of `perceptiondlm annotate`: what is written, what is refused, and what a killed run leaves."""

import argparse
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from annotation_runs import command, comparable, killed_after
from collections_of_scenes import Collection
from datasets import load_dataset
from PIL import Image
from pycocotools import mask as coco_mask

from perceptiondlm.common.loading import DRAWN_MODEL
from perceptiondlm.common.region_files import read_regions
from perceptiondlm.scripts.annotate import add_arguments, job_of
from perceptiondlm.scripts.cli import main
from perceptiondlm.serving.annotate import publishing
from perceptiondlm.serving.annotate.engines import CaptioningActor, read_row
from perceptiondlm.serving.annotate.plan import locked, prepare_folder
from perceptiondlm.serving.annotate.results import finish
from perceptiondlm.serving.annotate.sources import settled
from perceptiondlm.serving.records import REGION_SCHEMA, read_records


COUNT = 9
FAST = ["--model", str(DRAWN_MODEL), "--preset", "fast", "--regions-per-batch", "16", "--images-per-part", "2"]


@pytest.fixture(scope="module")
def collection(tmp_path_factory):
    return Collection(tmp_path_factory.mktemp("collection"), COUNT)


@pytest.fixture(scope="module")
def clean(collection, tmp_path_factory):
    """A run of a COCO file with a broken picture among the others, exported in every format."""
    coco, out = collection.coco(), tmp_path_factory.mktemp("runs") / "clean"
    broken = collection.pictures() / collection.name(4)
    broken.write_bytes(broken.read_bytes()[:300])
    exports = ["--export", "coco", "fiftyone", "cvat", "label-studio", "--preview", "4"]
    assert main(["annotate", str(coco), "--out", str(out), *FAST, "--tokens", *exports]) == 0
    return out


def test_the_records_load_with_datasets_and_name_what_is_there(clean, collection):
    rows = load_dataset(str(clean), "regions", split="train", cache_dir=str(clean.parent / "cache"))
    assert rows.column_names == REGION_SCHEMA.names
    wanted = [
        (collection.name(number), rle, item)
        for number in range(COUNT)
        if number != 4
        for rle, item in zip(collection.rles[number], collection.scenes[number].objects, strict=True)
    ]
    assert len(rows) == len(wanted)
    assert len(set(rows["id"])) == len(rows)
    for row, (name, rle, item) in zip(rows, wanted, strict=True):
        assert (row["image_id"], row["segmentation"], row["label"]) == (name, rle, item.category)
        assert tuple(row["box"]) == item.box
        assert 0 < row["score"] <= 1
        spoken = "".join(token["token"] for token in row["tokens"][:-1]).strip()
        assert spoken == row["caption"]
        assert sum(t["confidence"] for t in row["tokens"]) / len(row["tokens"]) == pytest.approx(row["score"], abs=1e-5)
    named = np.mean([item.category in row["caption"] for row, (_, _, item) in zip(rows, wanted, strict=True)])
    assert named > 0.8  # the embedded model knows the drawn world
    assert json.loads(rows[0]["settings"])["preset"] == "fast"


def test_what_could_not_be_read_is_listed_and_counted(clean, collection):
    (failure,) = [json.loads(line) for line in (clean / "failures.jsonl").read_text().splitlines()]
    assert failure["id"] == collection.name(4)
    assert "damaged" in failure["error"]
    images = load_dataset(str(clean), "images", split="train", cache_dir=str(clean.parent / "cache"))
    assert len(images) == COUNT - 1
    assert sum(images["regions"]) == len(read_records(clean))


def test_exports_hold_the_same_regions(clean, collection):
    """Read back by the readers of other tools' files that the project has anyway."""
    records = read_records(clean)
    coco = json.loads((clean / "exports" / "coco.json").read_text())
    assert [a["caption"] for a in coco["annotations"]] == [row["caption"] for row in records]
    assert [a["segmentation"] for a in coco["annotations"]] == [row["segmentation"] for row in records]
    for number in (0, 5):
        image, size = Path(collection.name(number)), collection.scenes[number].image.size[::-1]
        wanted = [coco_mask.decode(rle).astype(bool) for rle in collection.rles[number]]
        for name in ("cvat.xml", "label_studio.json"):
            found = read_regions(clean / "exports" / name, image, size)
            assert len(found) == len(wanted)
            assert all(np.array_equal(one, other) for one, other in zip(found, wanted, strict=True)), name
    tasks = json.loads((clean / "exports" / "label_studio.json").read_text())
    texts = [r["value"]["text"][0] for t in tasks for r in t["predictions"][0]["result"] if r["type"] == "textarea"]
    assert texts == [row["caption"] for row in records]
    paths = json.loads((clean / "exports" / "fiftyone" / "data.json").read_text())
    labels = json.loads((clean / "exports" / "fiftyone" / "labels.json").read_text())
    assert all(Path(paths[entry["file_name"]]).is_file() for entry in labels["images"])
    assert records[0]["caption"] in (clean / "exports" / "cvat.xml").read_text()


def test_the_contact_sheet_shows_pictures(clean):
    with Image.open(clean / "preview.jpg") as page:
        assert page.width > 1000
        assert np.asarray(page.convert("L")).std() > 20


def test_a_finished_run_does_nothing_again_and_refuses_another_question(clean, collection, capsys):
    coco = str(collection.folder / "pictures" / "regions.json")
    before = {path: path.stat().st_mtime_ns for path in clean.glob("data/*")}
    assert main(["annotate", coco, "--out", str(clean), *FAST, "--tokens"]) == 0
    assert {path: path.stat().st_mtime_ns for path in clean.glob("data/*")} == before
    assert main(["annotate", coco, "--out", str(clean), *FAST, "--steps", "4", "--tokens"]) == 2
    assert "was asked something else (generate:" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in clean.glob("data/*")} == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sampler", "best"], "sampler"),
        (["--model", "examples"], "config.json"),
        (["--regions-per-batch", "0"], "--regions-per-batch must be at least 1"),
        (["--engine", "local", "--actors", "2"], "need --engine ray"),
        (["--text", "a house", "--masks", "x"], "--text finds regions by itself"),
        (["--text", "a house"], "no segmenter is named"),
        (["--push-to-hub", "a/b/c"], "accepted: user/name"),
    ],
)
def test_wrong_input_is_one_line_and_leaves_no_results(arguments, message, collection, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])
    coco = str(collection.folder / "pictures" / "regions.json")
    assert main(["annotate", coco, "--out", str(tmp_path / "out"), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not list(tmp_path.glob("out/parts/part-*"))


@pytest.mark.parametrize("name", ["thesis.txt", "images", "data"])
def test_files_of_others_are_left_alone(name, collection, tmp_path, capsys):
    (tmp_path / name).write_text("mine")
    coco = str(collection.folder / "pictures" / "regions.json")
    assert main(["annotate", coco, "--out", str(tmp_path), *FAST, "--overwrite"]) == 2
    assert f"holds other files ({name})" in capsys.readouterr().err
    assert (tmp_path / name).read_text() == "mine"
    pictures = str(collection.folder / "pictures")
    assert main(["annotate", pictures, "--out", f"{pictures}/captions", "--masks", coco]) == 2
    assert "lies in the source" in capsys.readouterr().err


def test_pictures_that_may_be_turned_are_counted(tmp_path, capsys):
    """An EXIF orientation that nobody has decided about is said at the end, and is not when somebody has."""
    photo = Image.new("RGB", (64, 48), "red")
    exif = photo.getexif()
    exif[0x0112] = 6
    (tmp_path / "photos").mkdir()
    photo.save(tmp_path / "photos" / "a.jpg", exif=exif)
    (tmp_path / "boxes").mkdir()
    (tmp_path / "boxes" / "a.json").write_text("[[4, 4, 40, 40]]")
    quick = ["--model", str(DRAWN_MODEL), "--steps", "1", "--max-new-tokens", "2"]
    for name, more, said in (("open", [], True), ("told", ["--exif", "applied"], False)):
        source = ["annotate", str(tmp_path / "photos"), "--boxes", str(tmp_path / "boxes")]
        assert main([*source, "--out", str(tmp_path / name), *quick, *more]) == 0
        assert ("1 pictures carry an EXIF orientation" in capsys.readouterr().out) == said
    assert (read_records(tmp_path / "open")[0]["width"], read_records(tmp_path / "told")[0]["width"]) == (64, 48)


def test_publishing_sends_results_and_card(clean, monkeypatch):
    sent = {}

    class Hub:
        def whoami(self):
            return {"name": "user"}

        def create_repo(self, name, **settings):
            sent["repo"] = (name, settings["private"])
            return f"https://hub/{name}"

        def upload_folder(self, folder_path, allow_patterns, **_):
            sent["files"] = {str(p.relative_to(clean)) for rule in allow_patterns for p in folder_path.glob(rule)}

    monkeypatch.setattr(publishing, "HfApi", Hub)
    publishing.check_publishing("user/captions")
    assert publishing.publish(clean, "user/captions", private=True) == "https://hub/user/captions"
    assert sent["repo"] == ("user/captions", True)
    assert {"data/train-00000-of-00001.parquet", "README.md", "failures.jsonl", "preview.jpg"} <= sent["files"]
    assert not {name for name in sent["files"] if "plan" in name or "run.json" in name}


# --- kill -9 ----------------------------------------------------------------------------------------------------------


def test_a_killed_run_goes_on_without_losing_or_repeating_a_region(clean, collection, tmp_path):
    out = tmp_path / "out"
    coco = collection.folder / "pictures" / "regions.json"
    for parts in (1, 3):
        killed_after(parts, command(coco, out, *FAST, "--tokens"), out)
        assert not (out / "data").exists()
    (out / "parts" / ".part-9-half").write_bytes(b"half")  # what a kill in the middle of writing leaves
    kept = {path.name: path.stat().st_mtime_ns for path in out.glob("parts/part-*")}
    assert len(kept) >= 3
    assert main(["annotate", str(coco), "--out", str(out), *FAST, "--tokens"]) == 0
    assert comparable(out) == comparable(clean)
    assert not (out / "parts").exists()


def test_ray_steps_do_what_the_plain_path_does(clean, collection, tmp_path):
    """The functions that Ray is given, called as it calls them: parts go as bytes from readers to actors."""
    coco = collection.folder / "pictures" / "regions.json"
    out = tmp_path / "out"
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    job = settled(job_of(parser.parse_args([str(coco), "--out", str(out), *FAST, "--tokens"])))
    with locked(out):
        plan = prepare_folder(job)
    packed, threads = pickle.dumps(job), torch.get_num_threads()
    actor = CaptioningActor(packed, cpus=0.5)
    torch.set_num_threads(threads)
    for number in reversed(range(len(plan))):  # in any order
        row = read_row({"part": np.int64(number)}, packed)
        told = actor({name: np.array([value], dtype=object) for name, value in row.items()})
        assert (told["part"], told["images"]) == ([number], [plan.counts[number]])
    finish(plan)
    assert comparable(out) == comparable(clean)


def test_ray_writes_the_same_records_with_two_actors(clean, collection, tmp_path):
    pytest.importorskip("ray", reason="annotating on a cluster needs ray, the extra [ray]")
    coco = collection.folder / "pictures" / "regions.json"
    out = tmp_path / "out"
    assert main(["annotate", str(coco), "--out", str(out), *FAST, "--tokens", "--engine", "ray", "--actors", "2"]) == 0
    assert comparable(out) == comparable(clean)
    assert (out / "failures.jsonl").read_text() == (clean / "failures.jsonl").read_text()
