"""The study of annotation: its collection, its kills, and how it compares runs."""

import sys

from perceptiondlm.serving.annotate.coco import CocoFile
from perceptiondlm.studies.annotation import compared, killed_at
from perceptiondlm.studies.annotation_runs import LEAST, MOST, Clock, write_collection


def test_the_collection_has_the_regions_it_promises(tmp_path):
    coco = CocoFile.read(write_collection(tmp_path / "pictures", 3, None))
    assert len(coco.images) == 3
    for number, name in coco.images.items():
        assert (tmp_path / "pictures" / name).is_file()
        assert LEAST <= len(coco.regions_of_id(number)["regions"]) <= MOST


def test_lost_repeated_and_changed_regions_are_counted():
    clean = [{"id": name, "caption": name, "score": 0.5} for name in "abcd"]
    other = [clean[0], clean[0], {**clean[1], "caption": "x", "score": 0.75}, clean[2]]
    found = compared(clean, other)
    assert (found["missing"], found["duplicates"], found["same_order"]) == (1, 1, False)
    assert (found["equal_records"], found["equal_captions"], found["largest_score_difference"]) == (2, 2, 0.25)
    assert compared(clean, clean)["equal_records"] == 4


def test_a_run_is_killed_with_its_children(tmp_path):
    child = "import subprocess, sys, time; subprocess.Popen(['sleep', '60']); time.sleep(60)"
    assert killed_at(0.5, [sys.executable, "-S", "-c", child], tmp_path / "out")["killed"]
    assert not killed_at(20, [sys.executable, "-S", "-c", "pass"], tmp_path / "out")["killed"]


def test_the_clock_adds_up_calls():
    clock = Clock()
    double = clock.around("double", lambda number: 2 * number)
    assert [double(2), double(3)] == [4, 6]
    assert set(clock.seconds) == {"double"}
