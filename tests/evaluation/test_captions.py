"""Captions files, checked by region, and the log that a run grows."""

import json
import os

import pytest

from perceptiondlm.evaluation.captions import (
    CaptionedImage,
    CaptionLog,
    check_captions,
    read_captions,
    write_captions,
)


REGIONS = ["7_0", "7_1", "12_3"]


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def test_a_whole_file_comes_back_in_the_order_of_the_benchmark(tmp_path):
    captions = {"12_3": "ein Krug, grün", "7_0": 'a "cup"', "7_1": "a mug\nwith a handle"}
    write_captions(captions, tmp_path / "deep" / "captions.json")
    read, issues = read_captions(tmp_path / "deep" / "captions.json", REGIONS)
    assert list(read.items()) == [(key, captions[key]) for key in REGIONS]
    assert not issues.partial
    assert issues.lines() == []


def test_everything_amiss_is_named_by_key_and_needs_the_flag(tmp_path):
    path = write(tmp_path / "c.json", '{"7_0": " ", "7_1": 5, "8_8": "a", "9_9": null, "8_8": "b"}')
    with pytest.raises(ValueError, match="does not fit") as error:
        read_captions(path, REGIONS)
    message = str(error.value)
    for line in (
        "regions without a caption (1): '12_3'",
        "keys that are no region of the benchmark (2): '8_8', '9_9'",
        "keys given more than once (1): '8_8'",
        "captions that are not a string (1): '7_1'",
        "empty captions (1): '7_0'",
        "--allow-partial",
    ):
        assert line in message
    captions, issues = read_captions(path, REGIONS, allow_partial=True)
    assert captions == {"7_0": " "}
    assert issues.to_dict() == {
        "missing": ["12_3"],
        "unknown": ["8_8", "9_9"],
        "repeated": ["8_8"],
        "not_text": ["7_1"],
        "empty": ["7_0"],
    }


def test_a_region_given_twice_is_not_scored():
    captions, issues = check_captions(dict.fromkeys(REGIONS, "a"), REGIONS, repeated=["7_1"])
    assert list(captions) == ["7_0", "12_3"]
    assert issues.partial


def test_empty_captions_are_scored_and_named(tmp_path):
    path = write(tmp_path / "c.json", {**dict.fromkeys(REGIONS, "a cup"), "7_1": ""})
    captions, issues = read_captions(path, REGIONS)
    assert captions["7_1"] == ""
    assert not issues.partial
    assert issues.lines() == ["empty captions (1): '7_1'"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "holds a list"),
        ('{"7_0": ', "is not JSON"),
        ("{}", "no caption is left to score"),
        ('{"8_8": "a"}', "no caption is left to score"),
    ],
)
def test_files_without_captions_are_refused_even_with_the_flag(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        read_captions(write(tmp_path / "c.json", content), REGIONS, allow_partial=True)
    with pytest.raises(FileNotFoundError, match=r"absent\.json"):
        read_captions(tmp_path / "absent.json", REGIONS)


def test_many_keys_are_counted_and_the_first_named(tmp_path):
    path = write(tmp_path / "c.json", {"7_0": "a"})
    with pytest.raises(ValueError, match=r"\(499\): '0_0', '1_0', .*'300_0' and 199 more"):
        read_captions(path, [f"{index}_0" for index in range(500)])


def image(image_id: str, text: str = "a cup") -> CaptionedImage:
    return CaptionedImage(image_id, {f"{image_id}_0": text}, 32, 8, 0.5, 0.75)


def test_log_is_shared_by_processes_and_forgets_a_torn_line_only(tmp_path):
    first, second = CaptionLog(tmp_path, 0), CaptionLog(tmp_path, 1)
    first.append(image("7", "ein Krug, grün\u2028neu"))
    second.append(image("9"))
    with second.path.open("ab") as file:
        file.write(b'{"image_id": "10", "capt')  # killed while writing
    assert CaptionLog(tmp_path).images() == {"7": image("7", "ein Krug, grün\u2028neu"), "9": image("9")}
    second.drop_torn_line()
    second.append(image("10"))
    assert set(first.images()) == {"7", "9", "10"}


def test_a_damaged_line_is_an_error_by_file_and_line(tmp_path):
    log = CaptionLog(tmp_path)
    log.append(image("7"))
    with log.path.open("ab") as file:
        file.write(b'{"image_id": "8"}\n')
    with pytest.raises(ValueError, match=r"captions\.0\.jsonl, line 2 is damaged"):
        log.images()


def test_another_run_does_not_continue_the_log(tmp_path):
    settings = {"model": "a", "steps": 32, "weights": [["w", 1, 2]]}
    CaptionLog(tmp_path).check_settings(settings)
    CaptionLog(tmp_path).check_settings(dict(reversed(settings.items())))
    with pytest.raises(ValueError, match=r"steps was 32, is 16.*choose another --out"):
        CaptionLog(tmp_path).check_settings({**settings, "steps": 16})
    with pytest.raises(ValueError, match="sampler was None, is 'margin'"):
        CaptionLog(tmp_path).check_settings({**settings, "sampler": "margin"})


def test_writing_again_leaves_no_other_file(tmp_path):
    for _ in range(2):
        write_captions({"7_0": "a"}, tmp_path / "captions.json")
    assert os.listdir(tmp_path) == ["captions.json"]
