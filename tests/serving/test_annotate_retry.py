"""`--retry-failed`: what was mended joins the results at its place, nothing is done twice, a kill leaves no half."""

import argparse
import json
import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from annotation_runs import command, comparable, killed_after
from collections_of_scenes import Collection, png

from perceptiondlm.common.loading import DRAWN_MODEL
from perceptiondlm.scripts.annotate import add_arguments, job_of
from perceptiondlm.scripts.cli import main
from perceptiondlm.serving.annotate import results
from perceptiondlm.serving.annotate.captioner import Captioner
from perceptiondlm.serving.annotate.engines import CaptioningActor, Engine, read_row
from perceptiondlm.serving.annotate.results import failures_of, image_rows
from perceptiondlm.serving.annotate.run import annotate
from perceptiondlm.serving.records import read_records


COUNT, BROKEN = 5, (1, 2, 4)  # pictures, and numbers of those that are cut short
QUICK = ["--model", str(DRAWN_MODEL), "--steps", "2", "--max-new-tokens", "8", "--images-per-part", "2"]
AGAIN = "--retry-failed"


class Photos:
    """A folder of pictures and one of regions, a list of RLEs each; a clean run of them is in `clean`."""

    def __init__(self, folder: Path):
        self.collection, self.regions = Collection(folder, COUNT, seed=920), folder / "regions"
        self.pictures, self.clean = self.collection.pictures(), folder / "clean"
        for number in range(COUNT):
            self.mend_regions(number)
        assert main(self.asked(self.clean)) == 0

    def asked(self, out: Path, *more: str) -> list[str]:
        return ["annotate", str(self.pictures), "--masks", str(self.regions), "--out", str(out), *QUICK, *more]

    def picture(self, number: int) -> Path:
        return self.pictures / self.collection.name(number)

    def regions_of(self, number: int) -> Path:
        return (self.regions / self.collection.name(number)).with_suffix(".json")

    def name(self, number: int) -> str:
        return self.collection.name(number)

    def cut_short(self, number: int) -> None:
        self.picture(number).write_bytes(self.picture(number).read_bytes()[:300])

    def mend(self, number: int) -> None:
        self.picture(number).write_bytes(png(self.collection.scenes[number].image))

    def mend_regions(self, number: int) -> None:
        self.write_regions(number, self.collection.rles[number])

    def write_regions(self, number: int, regions: list) -> None:
        self.regions_of(number).parent.mkdir(parents=True, exist_ok=True)
        self.regions_of(number).write_text(json.dumps(regions))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return Photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def failed_run(photos, tmp_path_factory):
    """A run in which three pictures were cut short; two of them make up a part."""
    out = tmp_path_factory.mktemp("runs") / "failed"
    for number in BROKEN:
        photos.cut_short(number)
    assert main(photos.asked(out)) == 0
    assert failed(out) == [photos.name(number) for number in sorted(BROKEN, key=photos.name)]
    return out


@pytest.fixture
def out(failed_run, photos, tmp_path):
    """A copy of that run; the pictures are whole again but for what the test breaks."""
    for number in range(COUNT):
        photos.mend(number)
        photos.mend_regions(number)
    return shutil.copytree(failed_run, tmp_path / "out")


def failed(folder: Path) -> list[str]:
    return [entry["id"] for entry in failures_of(folder)]


def captioned(monkeypatch) -> list[str]:
    """Ids of images whose regions go through the model from now on, once per region."""
    seen: list[str] = []
    generate = Captioner._generate

    def noting(self, images):
        seen.extend(image.record["id"] for image in images for _ in image.found)
        return generate(self, images)

    monkeypatch.setattr(Captioner, "_generate", noting)
    return seen


def stamps(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.glob("data/*")}


def test_mended_pictures_join_the_results_of_a_clean_run(photos, out, capsys, monkeypatch):
    seen = captioned(monkeypatch)
    assert main(photos.asked(out, AGAIN)) == 0
    assert "tried 3 failures again: 3 mended, 0 still failing" in capsys.readouterr().out
    assert sorted(seen) == sorted(photos.name(n) for n in BROKEN for _ in photos.collection.rles[n])
    assert comparable(out) == comparable(photos.clean)
    assert list(image_rows(out)) == list(image_rows(photos.clean))
    assert failed(out) == []
    assert (out / "README.md").read_text() == (photos.clean / "README.md").read_text()
    assert not (out / "retry").exists()

    before = stamps(out)
    assert main(photos.asked(out, AGAIN)) == 0
    assert "nothing to try again: the list of failures is empty" in capsys.readouterr().out
    assert (len(seen), stamps(out)) == (sum(len(photos.collection.rles[n]) for n in BROKEN), before)


def test_what_still_fails_stays_on_the_list_with_its_reason_of_today(photos, out, capsys):
    photos.picture(1).unlink()
    photos.cut_short(4)
    assert main(photos.asked(out, AGAIN, "--export", "coco")) == 0
    assert "3 failures again: 1 mended, 2 still failing" in capsys.readouterr().out
    reasons = {entry["id"]: entry["error"] for entry in failures_of(out)}
    assert set(reasons) == {photos.name(1), photos.name(4)}
    assert "damaged" in reasons[photos.name(4)]
    assert "damaged" not in reasons[photos.name(1)]
    before = stamps(out)
    assert main(photos.asked(out, AGAIN)) == 0
    assert "2 failures again: 0 mended, 2 still failing" in capsys.readouterr().out
    assert stamps(out) == before  # the results are not written anew
    assert (out / "exports" / "coco.json").is_file()
    photos.mend(1)
    photos.mend(4)
    assert main(photos.asked(out, AGAIN)) == 0
    assert comparable(out) == comparable(photos.clean)
    assert not (out / "exports").exists()  # they were of the results before


def test_regions_that_failed_are_tried_without_the_others_of_their_image(photos, tmp_path, monkeypatch, capsys):
    """One region of an image is no mask, another image has no region file; they are mended one after the other."""
    out, rles = tmp_path / "out", photos.collection.rles
    for number in range(COUNT):
        photos.mend(number)
    photos.write_regions(0, [rles[0][0], {"size": [3, 3], "counts": "11"}, *rles[0][2:]])
    photos.regions_of(3).unlink()
    assert main(photos.asked(out)) == 0
    assert sorted(failed(out)) == [f"{photos.name(0)}/1", photos.name(3)]
    photos.mend_regions(3)
    photos.cut_short(0)
    assert main(photos.asked(out, AGAIN)) == 0
    (left,) = failures_of(out)
    assert (left["id"], left["kind"]) == (f"{photos.name(0)}/1", "region")
    assert "damaged" in left["error"]  # the regions that the image had are kept
    assert sum(row["image_id"] == photos.name(0) for row in read_records(out)) == len(rles[0]) - 1
    photos.mend(0)
    photos.mend_regions(0)
    seen = captioned(monkeypatch)
    assert main(photos.asked(out, AGAIN)) == 0
    assert seen == [photos.name(0)]
    assert comparable(out) == comparable(photos.clean)
    assert list(image_rows(out)) == list(image_rows(photos.clean))
    assert failed(out) == []


def test_an_image_that_the_model_refuses_stays_on_the_list(photos, out, monkeypatch):
    """Nothing else is there to show that the model works, as the run before has."""

    def refusing(self, images):
        raise ValueError("too odd to be seen")

    for number in BROKEN[1:]:
        photos.cut_short(number)
    monkeypatch.setattr(Captioner, "_generate", refusing)
    assert main(photos.asked(out, AGAIN)) == 0
    assert {entry["error"] for entry in failures_of(out) if entry["id"] == photos.name(1)} == {"too odd to be seen"}


def test_a_killed_retry_leaves_the_results_and_is_not_done_twice(photos, out, monkeypatch):
    before, listed = read_records(out), failed(out)
    killed_after(1, command(photos.pictures, out, "--masks", str(photos.regions), *QUICK, AGAIN), out / "retry")
    assert (read_records(out), failed(out)) == (before, listed)
    done = len(list(out.glob("retry/parts/part-*")))
    seen = captioned(monkeypatch)
    assert main(photos.asked(out, AGAIN)) == 0
    assert len(set(seen)) <= len(BROKEN) - done
    assert comparable(out) == comparable(photos.clean)
    assert failed(out) == []


def stopped_at_move(number: int, monkeypatch, arguments: list[str]) -> None:
    """Run the command and stop it before the move of that number of what another try made."""
    moves, move = [], os.replace

    class Moves:
        @staticmethod
        def replace(source, target):
            if len(moves) == number:
                raise KeyboardInterrupt
            moves.append(source)
            move(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(results, "os", Moves)
        with pytest.raises(SystemExit):
            main(arguments)


def test_a_kill_while_results_are_moved_is_made_good_by_the_next_call(photos, out, tmp_path, monkeypatch):
    """Stopped before each of the moves; the call that follows does not even ask for another try."""
    stopped_at_move(0, monkeypatch, photos.asked(out, AGAIN))
    for number in range(6):
        copy = shutil.copytree(out, tmp_path / f"copy{number}")
        stopped_at_move(number, monkeypatch, photos.asked(copy))
        assert main(photos.asked(copy)) == 0
        assert comparable(copy) == comparable(photos.clean)
        assert failed(copy) == []
        assert not (copy / "retry").exists()


def test_a_run_that_was_not_finished_is_finished_first(photos, out, tmp_path):
    new = tmp_path / "new"
    photos.cut_short(1)
    assert main(photos.asked(new, AGAIN)) == 0
    assert failed(new) == [photos.name(1)]
    assert len(read_records(new)) == len(read_records(photos.clean)) - len(photos.collection.rles[1])


def test_beginning_anew_and_going_on_exclude_each_other(photos, tmp_path, capsys):
    assert main(photos.asked(tmp_path / "out", AGAIN, "--overwrite")) == 2
    assert "--overwrite begins anew, --retry-failed goes on" in capsys.readouterr().err


def test_a_mended_shard_is_read_where_its_samples_lie_now(tmp_path):
    """The picture that was broken is longer when whole, so all that follow it have moved."""
    (tmp_path / "broken").mkdir()
    collection, broken = Collection(tmp_path, 4, seed=930), Collection(tmp_path / "broken", 4, seed=930)
    shards = collection.shards()
    asked = ["annotate", str(shards), "--masks", "column:json", *QUICK]
    assert main([*asked, "--out", str(tmp_path / "clean")]) == 0
    whole = {path.name: path.read_bytes() for path in shards.iterdir()}
    broken.scenes[0] = replace(broken.scenes[0], image=broken.scenes[0].image.crop((0, 0, 8, 8)))  # no region fits it
    for path in broken.shards().iterdir():
        shutil.copy(path, shards)
    assert main([*asked, "--out", str(tmp_path / "out")]) == 0
    assert len(failed(tmp_path / "out")) == len(collection.rles[0])
    for name, content in whole.items():
        (shards / name).write_bytes(content)
    assert main([*asked, "--out", str(tmp_path / "out"), AGAIN]) == 0
    assert comparable(tmp_path / "out") == comparable(tmp_path / "clean")
    assert failed(tmp_path / "out") == []


class StepsOfRay(Engine):
    """The functions that Ray is given, called as it calls them: parts go as bytes, in any order."""

    def run(self, job, numbers, progress):
        packed, threads = pickle.dumps(job), torch.get_num_threads()
        actor = CaptioningActor(packed, cpus=0.5)
        torch.set_num_threads(threads)
        for number in reversed(numbers):
            row = read_row({"part": np.int64(number)}, packed)
            told = actor({name: np.array([value], dtype=object) for name, value in row.items()})
            progress.add({name: int(value[0]) for name, value in told.items()})


def test_ray_steps_try_again_what_the_plain_path_would(photos, out):
    """Twice in one process, whose readers must not take the second try for the first."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    job = job_of(parser.parse_args(photos.asked(out)[1:]))
    photos.cut_short(1)
    for mended, left in ((2, 1), (1, 0)):
        outcome = annotate(job, StepsOfRay(), retry_failed=True)
        assert (outcome.retried.mended, outcome.totals.failed_images) == (mended, left)
        photos.mend(1)
    assert comparable(out) == comparable(photos.clean)


def test_ray_tries_again_what_the_plain_path_would(photos, out):
    pytest.importorskip("ray", reason="annotating on a cluster needs ray, the extra [ray]")
    assert main(photos.asked(out, AGAIN, "--engine", "ray", "--actors", "2")) == 0
    assert comparable(out) == comparable(photos.clean)
    assert failed(out) == []
    assert list(image_rows(out)) == list(image_rows(photos.clean))
