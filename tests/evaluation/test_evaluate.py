"""`perceptiondlm evaluate` from pictures to reports: killed and continued, in two processes, on captions of others."""

import html
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from judge_server import JudgeServer

from perceptiondlm.common.loading import DRAWN_MODEL
from perceptiondlm.drawn.scenes import write_scenes
from perceptiondlm.evaluation import runner
from perceptiondlm.evaluation.benchmarks import load_benchmark
from perceptiondlm.evaluation.captions import CaptionLog
from perceptiondlm.evaluation.reports.results import read_results
from perceptiondlm.evaluation.runner import caption_benchmark, process_state, speed
from perceptiondlm.scripts.cli import main


SCENES = ["evaluate", "--dataset", "scenes", "--seed", "77", "--images", "3", "--steps", "4"]
COMMAND = [sys.executable, "-m", "perceptiondlm.scripts.cli"]
REPORTS = {"captions.json", "results.json", "report.md", "report.html", "captions.0.jsonl", "run.json", "benchmark"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run that went through."""
    out = tmp_path_factory.mktemp("finished")
    assert main([*SCENES, "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawn") / "ours"
    write_scenes(77, 3, folder)
    return load_benchmark(folder)


def test_a_run_writes_captions_results_and_reports(finished, capsys):
    assert {path.name for path in finished.iterdir()} == REPORTS
    results = read_results(finished / "results.json")
    captions = json.loads((finished / "captions.json").read_text())
    assert captions == {region.region_id: region.caption for region in results.score.regions}
    assert (results.system, results.judge, results.dataset) == ("embedded model", "rules", "scenes (seed 77)")
    assert results.settings["steps"] == 4
    assert set(results.speed) == {"tokens_per_forward", "num_forward_passes", "seconds_per_image", "generate_seconds"}
    cells = [f"{results.cells()[name]:.1f}" for name in ("Pos", "Neg", "Avg", "TPF")]
    assert f"| embedded model | {' | '.join(cells)} |" in (finished / "report.md").read_text()


def test_the_run_scores_as_the_report_without_a_folder_does(finished, tmp_path):
    target = tmp_path / "report.json"
    assert main([*SCENES, "--json", str(target)]) == 0
    report, score = json.loads(target.read_text()), read_results(finished / "results.json").score
    assert report["average"] == pytest.approx(score.average)
    assert {row["region"]: row["caption"] for row in report["captions"]} == json.loads(
        (finished / "captions.json").read_text()
    )


def test_captions_from_elsewhere_are_scored_without_a_model(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("perceptiondlm.scripts.evaluate.load_pipeline", None)  # would fail if called
    arguments = ["evaluate", "--dataset", str(finished / "benchmark"), "--judge", "rules", "--name", "theirs"]
    arguments += ["--captions", str(finished / "captions.json"), "--out", str(tmp_path)]
    assert main([*arguments, "--json", str(tmp_path / "copy.json")]) == 0
    assert (tmp_path / "copy.json").read_bytes() == (tmp_path / "results.json").read_bytes()
    ours, theirs = read_results(finished / "results.json"), read_results(tmp_path / "results.json")
    assert theirs.score == ours.score
    assert theirs.system == "theirs"
    assert theirs.speed is None
    assert theirs.cells()["TPF"] is None


def test_partial_captions_need_the_flag_and_are_marked_everywhere(finished, tmp_path, capsys):
    captions = json.loads((finished / "captions.json").read_text())
    gone, blank, number = list(captions)[:3]
    partial = tmp_path / "partial.json"
    partial.write_text(
        json.dumps({**{k: v for k, v in captions.items() if k != gone}, blank: "", number: 5, "x_1": "a"})
    )
    out = tmp_path / "out"
    arguments = ["evaluate", "--dataset", str(finished / "benchmark"), "--judge", "rules", "--out", str(out)]
    assert main([*arguments, "--captions", str(partial)]) == 2
    error = capsys.readouterr().err
    for line in (
        f"regions without a caption (1): {gone!r}",
        "keys that are no region of the benchmark (1): 'x_1'",
        f"captions that are not a string (1): {number!r}",
        f"empty captions (1): {blank!r}",
    ):
        assert line in error
    assert not out.exists()
    assert main([*arguments, "--captions", str(partial), "--allow-partial"]) == 0
    mark = f"partial (partial: {len(captions) - 2} of {len(captions)} regions)"
    printed = capsys.readouterr().out
    page, markdown = (out / "report.html").read_text(), (out / "report.md").read_text()
    for text in (printed, markdown, page):
        assert mark in text
        assert f"captions that are not a string (1): {number!r}" in html.unescape(text)
        assert gone in text
        assert "x_1" in text
    assert "Partial" in markdown
    assert "Partial result" in page
    record = json.loads((out / "results.json").read_text())
    assert record["score"]["missing"] == [gone, number]
    assert record["issues"]["unknown"] == ["x_1"]
    assert record["issues"]["empty"] == [blank]


def test_without_a_judge_a_benchmark_is_captioned_only(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = ["--dataset", str(finished / "benchmark"), "--model", str(DRAWN_MODEL), "--steps", "4"]
    assert main(["evaluate", *arguments]) == 0
    out = tmp_path / "outputs" / "evaluate" / "benchmark"  # where no --out says otherwise
    assert (out / "captions.json").read_bytes() == (finished / "captions.json").read_bytes()
    assert not (out / "results.json").exists()
    assert "--captions and --judge" in capsys.readouterr().out


def test_a_killed_run_continues_where_it_stopped(finished, tmp_path):
    arguments = [*SCENES, "--out", str(tmp_path)]
    log = tmp_path / "captions.0.jsonl"
    process = subprocess.Popen([*COMMAND, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (log.exists() and log.read_bytes().count(b"\n")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = log.read_bytes()
    kept = kept[: kept.rfind(b"\n") + 1]
    assert kept
    with log.open("ab") as file:
        file.write(b'{"image_id": "77-2", "capti')  # as if killed in the middle of a line
    assert main(arguments) == 0
    assert log.read_bytes().startswith(kept)
    assert log.read_bytes().count(b"\n") == 3  # an image each, none twice
    assert (tmp_path / "captions.json").read_bytes() == (finished / "captions.json").read_bytes()


def test_two_processes_share_the_images(finished, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, "-m", "perceptiondlm.scripts.cli", *SCENES, "--out", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    counts = [(tmp_path / f"captions.{process}.jsonl").read_bytes().count(b"\n") for process in (0, 1)]
    assert counts == [2, 1]
    assert (tmp_path / "captions.json").read_bytes() == (finished / "captions.json").read_bytes()


def test_missing_pictures_are_noticed_before_any_work(finished, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "copy"
    shutil.copytree(finished / "benchmark", folder)
    (folder / "images" / "77-1.png").unlink()
    monkeypatch.setattr("perceptiondlm.scripts.evaluate.load_pipeline", None)  # would fail if called
    arguments = ["evaluate", "--dataset", str(folder), "--out", str(tmp_path / "out")]
    assert main(arguments) == 2
    assert "1 of 3 pictures are missing, such as" in capsys.readouterr().err
    seeing = [*arguments, "--captions", str(finished / "captions.json"), "--judge", "rules", "--show-image"]
    assert main(seeing) == 2
    assert "77-1.png" in capsys.readouterr().err


def test_other_settings_do_not_continue_a_run(finished, capsys):
    assert main([*SCENES[:-1], "8", "--out", str(finished)]) == 2
    assert "steps was 4, is 8" in capsys.readouterr().err


def test_finished_images_are_not_captioned_again(benchmark, model, processor, tmp_path):
    log, state = CaptionLog(tmp_path), process_state()
    first = caption_benchmark(model, processor, benchmark, log, state, steps=2)
    assert list(first) == [image.image_id for image in benchmark.images]
    again = caption_benchmark(None, None, benchmark, log, state, steps=2)  # a call of the model would fail
    assert again == first
    figures = speed(list(first.values()))
    assert figures["num_forward_passes"] == 2
    slots = sum(len(image.captions) * 32 for image in first.values())
    assert sum(image.num_slots for image in first.values()) == slots
    assert figures["tokens_per_forward"] == pytest.approx(slots / 2 / 3)


def as_dlc(drawn, folder):
    """The same regions in the form of DLC-Bench: COCO annotations, whose ids are the regions' ids."""
    images, annotations, names, questions = [], [], {}, {}
    entries = json.loads((drawn / "annotations.json").read_text())
    classes, asked = (json.loads((drawn / f"{name}.json").read_text()) for name in ("class_names", "qa"))
    for number, entry in enumerate(entries):
        images.append({"id": number, **{key: entry[key] for key in ("file_name", "height", "width")}})
        for region in entry["annotations"]:
            key, id_ = f"{entry['image_id']}_{region['index']}", 1000 + len(annotations)
            annotations.append({"id": id_, "image_id": number, "segmentation": region["mask_rle"]})
            names[str(id_)], questions[str(id_)] = classes[key], asked[key]
    coco = {"images": images, "annotations": annotations}
    for name, content in (("annotations", coco), ("class_names", names), ("qa", questions)):
        (folder / f"{name}.json").write_text(json.dumps(content))
    shutil.copytree(drawn / "images", folder / "images")


def test_dlc_is_captioned_region_by_region_under_its_annotations_ids(finished, tmp_path, monkeypatch):
    as_dlc(finished / "benchmark", tmp_path)
    rows = []
    captioned = runner.caption_image

    def spy(model, processor, image_id, image, masks, **settings):
        rows.append((len(masks), settings["max_regions_per_pass"], settings["question"]))
        return captioned(model, processor, image_id, image, masks, **settings)

    monkeypatch.setattr(runner, "caption_image", spy)
    out = tmp_path / "out"
    arguments = [
        "evaluate",
        "--dataset",
        str(tmp_path),
        "--model",
        str(DRAWN_MODEL),
        "--steps",
        "4",
        "--judge",
        "rules",
    ]
    arguments += ["--out", str(out)]
    question = "Describe each masked region in detail."  # the default, so that the captions are those of the other run
    assert main([*arguments, "--question", question]) == 0
    assert [row[1:] for row in rows] == [(1, question)] * 3
    assert max(count for count, *_ in rows) > 1
    captions = json.loads((out / "captions.json").read_text())
    assert list(captions) == [str(1000 + index) for index in range(len(captions))]
    assert list(captions.values()) == list(json.loads((finished / "captions.json").read_text()).values())
    assert read_results(out / "results.json").score.num_images == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "absent"], "absent"),
        (["--dataset", "scenes", "--images", "1", "--captions", "absent.json"], "absent.json"),
        (["--dataset", "scenes", "--out", "out", "--images", "0"], "num_images"),
        (["--dataset", "absent", "--judge", "tarot:1"], "judge 'tarot:1'"),
        (["--dataset", "absent", "--judge", "openai:gpt-5.2"], "OPENAI_API_KEY"),
    ],
)
def test_wrong_input_is_one_line_and_status_two(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    assert main(["evaluate", "--allow-partial", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_a_judge_that_cannot_be_asked_is_found_out_before_captioning(finished, tmp_path, capsys):
    refused = {"error": {"message": "Incorrect API key provided", "code": "invalid_api_key"}}
    out = tmp_path / "out"
    with JudgeServer(stop_after=0, stop_reply=(401, refused)) as server:
        arguments = ["evaluate", "--dataset", str(finished / "benchmark"), "--judge", "openai:gpt-5.2", "--steps", "4"]
        arguments += [
            "--base-url",
            server.base_url,
            "--judge-cache",
            str(tmp_path / "answers.jsonl"),
            "--out",
            str(out),
        ]
        assert main(arguments) == 2
        assert server.asked.total() == 1
    assert "refuses the key in OPENAI_API_KEY" in capsys.readouterr().err
    assert not list(out.glob("captions*"))
