"""Runs of the data engine: killed and taken up, failing on records, asked with other settings, read by training."""

import json
import multiprocessing
import os
import random
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
from judge_server import JudgeServer

from perceptiondlm.data_engine import runner
from perceptiondlm.data_engine.config import CONFIGS, load_engine_config
from perceptiondlm.data_engine.executors import RayExecutor
from perceptiondlm.data_engine.output import write_outputs
from perceptiondlm.data_engine.record import Changes, Record
from perceptiondlm.data_engine.runner import FAILED, Engine
from perceptiondlm.data_engine.sources.drawn import DrawnSource
from perceptiondlm.data_engine.stages.base import RegionStage
from perceptiondlm.data_engine.stages.caption import Caption
from perceptiondlm.data_engine.stages.category import CategoryCheck
from perceptiondlm.data_engine.stages.text_filters import Length, Repetition
from perceptiondlm.data_engine.store import Lines
from perceptiondlm.evaluation.judges.errors import JudgeError
from perceptiondlm.scripts.cli import main
from perceptiondlm.training.data.data_config import DataConfig, LossConfig, SourceConfig
from perceptiondlm.training.data.mixture import build_dataset


def config(name: str, folder: Path, *overrides: str):
    """A shipped config over four scenes, its folders in a place of its own; pictures are the same for all."""
    pictures = f"source.folder={folder.parent / 'images'}"
    return load_engine_config(
        CONFIGS / f"{name}.yaml", [f"out={folder}", pictures, "source.limit=4", "batch_size=2", *overrides]
    )


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a run but what is gone through in time: name -> bytes."""
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("*.json*")) if path.is_file()}


def finish(run_config, folder: Path) -> None:
    engine = run_config.engine()
    engine.run()
    write_outputs(folder, engine.records, 1, {}, 1)


def die_at(seed: int, run_config, folder: Path, chances: tuple[float, float]) -> None:
    """Run, and die in the middle of a line, or right behind one, at a random write. For a process of its own."""
    dice, append = random.Random(seed), Lines.append

    def dying(self, rows):
        rows = list(rows)
        if dice.random() < chances[0]:
            with self.path.open("ab") as file:
                file.write(json.dumps(rows[0])[: dice.randrange(1, 60)].encode())
            os.kill(os.getpid(), signal.SIGKILL)
        append(self, rows)
        if dice.random() < chances[1]:
            os.kill(os.getpid(), signal.SIGKILL)

    Lines.append = dying
    finish(run_config, folder)


def run_killed(run_config, folder: Path, chances=(0.5, 0.4)) -> tuple[int, set[str]]:
    """Runs that are killed until one gets through; how many were, and the stages in which."""
    fork = multiprocessing.get_context("fork")
    stages: set[str] = set()
    for killed in range(400):
        process = fork.Process(target=die_at, args=(killed, run_config, folder, chances))
        process.start()
        process.join()
        if process.exitcode == 0:
            return killed, stages
        assert process.exitcode == -signal.SIGKILL
        stages |= {max(path.name for path in (folder / "stages").glob("*_*.jsonl") if path.stat().st_size)}
    raise AssertionError("no run got through")


@pytest.mark.parametrize("name", ["drawn_coconut", "drawn_sa1b"])
def test_a_run_killed_in_every_stage_gives_the_same_bytes(name, tmp_path):
    undisturbed, disturbed = config(name, tmp_path / "one"), config(name, tmp_path / "two")
    finish(undisturbed, tmp_path / "one")
    killed, stages = run_killed(disturbed, tmp_path / "two")
    assert killed >= 8
    assert len(stages - {"00_complete.jsonl"}) == len(undisturbed.stages) + 1, stages
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_no_answer_is_paid_twice_whatever_kills_the_run(tmp_path):
    with JudgeServer() as server:
        options = f"{{base_url: '{server.base_url}', concurrency: 1, cache: {tmp_path / 'answers.jsonl'}}}"
        asked = ["stages.1.model=openai:checker", f"stages.1.options={options}"]
        killed, _ = run_killed(config("drawn_coconut", tmp_path / "run", *asked), tmp_path / "run")
        server.settle()
        assert killed >= 8
        assert len(server.asked) > 10
        assert set(server.asked.values()) == {1}
        before = server.asked.total()
        again = config("drawn_coconut", tmp_path / "run", *asked).engine()
        again.run(restart_from="category_check")  # everything anew, but for the answers
        assert server.asked.total() == before


@dataclass
class Picky(RegionStage):
    """Fails on records that a test names."""

    kind: ClassVar[str] = "picky"
    refused: ClassVar[set[str]] = set()

    def look(self, record: Record) -> Changes:
        if record.id in self.refused:
            raise ValueError(f"{record.id} is not to my liking")
        return {region.id: {"facts": {"liked": True}} for region in record.kept}


def picky_engine(folder: Path) -> Engine:
    source = DrawnSource(limit=6, folder=str(folder.parent / "images"), seed=7)
    stages = [Caption(captioner="drawn"), Picky(), CategoryCheck(model="rules"), Length()]
    return Engine(folder, source, stages, batch_size=4)


def test_a_stage_that_fails_on_a_record_goes_on_says_so_and_does_it_again(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(Picky, "refused", set())
    picky_engine(tmp_path / "clean").run()
    monkeypatch.setattr(Picky, "refused", {"7-1", "7-4"})
    engine = picky_engine(tmp_path / "run")
    assert engine.run() == 2
    assert "picky failed on 7-1: ValueError: 7-1 is not to my liking" in caplog.text
    records = {record.id: record for record in engine.records()}
    assert [key for key, record in records.items() if record.faults] == ["7-1", "7-4"]
    for region in records["7-1"].regions:
        assert (region.dropped.stage, region.dropped.reason) == ("picky", FAILED)
    assert any(region.dropped is None for region in records["7-2"].regions)
    counts = write_outputs(tmp_path / "run", engine.records, 1, {}, 1)
    assert counts["faults"] == {"picky": 2}

    monkeypatch.setattr(Picky, "refused", {"7-4"})
    assert picky_engine(tmp_path / "run").run() == 2  # without being told to, nothing is done again
    assert picky_engine(tmp_path / "run").run(retry_faults=True) == 1
    monkeypatch.setattr(Picky, "refused", set())
    assert picky_engine(tmp_path / "run").run(retry_faults=True) == 0
    assert contents(tmp_path / "clean").items() <= contents(tmp_path / "run").items()
    assert not list((tmp_path / "run" / "stages").glob("*.old"))


def test_a_stage_that_fails_on_everything_stops_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(Picky, "refused", {f"7-{k}" for k in range(6)})
    monkeypatch.setattr(runner, "MOST_FAULTS", 4)
    with pytest.raises(ValueError, match=r"picky has failed on 4 records in a row, the last time with .*liking"):
        picky_engine(tmp_path / "run").run()
    monkeypatch.setattr(Picky, "refused", set())
    assert picky_engine(tmp_path / "run").run(retry_faults=True) == 0


def test_a_run_is_taken_up_with_its_own_settings_only(tmp_path):
    finish(config("drawn_coconut", tmp_path / "run"), tmp_path / "run")
    other = config("drawn_coconut", tmp_path / "run", "stages.2.max_words=9")
    with pytest.raises(ValueError, match=r"begun with length\.max_words = 60, now it is 9.*--restart-from length"):
        other.engine().run()
    other.engine().run(restart_from="length")
    drops = [region.dropped for record in other.engine().records() for region in record.regions if region.dropped]
    assert {drop.detail for drop in drops if drop.stage == "length"} & {"10 words", "11 words", "12 words"}
    with pytest.raises(ValueError, match="no stage 'lenght'"):
        other.engine().run(restart_from="lenght")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.1.kind=category_chek", r"stages\.1\.kind 'category_chek' is none of"),
        ("stages.0.captioner=file:absent.json", "no captions file at 'absent.json'"),
        ("stages.0.captioner=gar", "the model 'gar' is none of model, model:PATH"),
        ("stages.1.model=openai", "the model 'openai' is none of rules, names, openai:MODEL"),
        ("stages.2.min_words=70", "min_words 70 and max_words 60 leave no length"),
        ("stages.4.max_alike=2", r"max_alike must be in \[0, 1\], got 2"),
        ("source.sead=3", "unknown setting 'source.sead', did you mean 'source.seed'"),
        ("executor=spark", "executor 'spark' is none of"),
        ("stages.3.kind=length", "the stages .* occur more than once"),
    ],
)
def test_wrong_settings_are_named_before_any_work(tmp_path, override, message):
    with pytest.raises((ValueError, OSError), match=message):
        config("drawn_coconut", tmp_path / "run", override).engine()
    assert not (tmp_path / "run").exists()


def test_training_reads_what_comes_out(tmp_path, tiny_model, tiny_processor, capsys):
    arguments = ["source.limit=6", f"out={tmp_path / 'run'}", f"source.folder={tmp_path / 'images'}"]
    assert main(["data", str(CONFIGS / "drawn_coconut.yaml"), *arguments]) == 0
    told = capsys.readouterr().out
    counts = json.loads((tmp_path / "run" / "statistics.json").read_text())
    assert f"kept {counts['kept_images']} images, {counts['kept_regions']} regions" in told
    model = tiny_model()
    processor = tiny_processor(model)
    data = DataConfig([SourceConfig("regions", path=str(tmp_path / "run" / "regions.jsonl"))])
    dataset = build_dataset(data, LossConfig(num_slots=40, noise_copies=1), processor, model.config, tmp_path / "cache")
    assert (dataset.report[0]["records"], dataset.report[0]["bad"]) == (counts["kept_images"], 0)
    seen = sorted(caption for number in range(len(dataset)) for caption in dataset[number]["captions"])
    rows = map(json.loads, (tmp_path / "run" / "regions.jsonl").read_text().splitlines())
    assert seen == sorted(caption for row in rows for caption in row["captions"])
    page = (tmp_path / "run" / "report.html").read_text()
    assert "other category" in page
    assert page.count("data:image/jpeg") >= 8


@pytest.fixture
def cluster():
    ray = pytest.importorskip("ray", reason="the executor ray needs Ray (extra ray)")
    ray.init(num_cpus=2, include_dashboard=False, ignore_reinit_error=True)
    yield ray
    ray.shutdown()


def test_ray_data_gives_what_this_process_gives(tmp_path, cluster):
    stages = [Caption(captioner="drawn")]
    source = DrawnSource(limit=6, folder=str(tmp_path / "images"), seed=7)
    Engine(tmp_path / "here", source, stages, batch_size=2).run()
    Engine(tmp_path / "there", source, stages, batch_size=2, executor=RayExecutor(2)).run()
    assert contents(tmp_path / "here") == contents(tmp_path / "there")
    with pytest.raises(ValueError, match="9 workers of 0.5 CPU need more than the cluster's 2"):
        Engine(tmp_path / "much", source, stages, executor=RayExecutor(9)).run()


def test_what_stops_a_run_stops_it_on_ray_as_well(tmp_path, cluster):
    @dataclass
    class Unpaid(Repetition):
        kind: ClassVar[str] = "unpaid"

        def run(self, records: Sequence[Record]) -> list[Changes]:
            raise JudgeError("the key is refused")

    source = DrawnSource(limit=2, folder=str(tmp_path / "images"), seed=7)
    engine = Engine(tmp_path / "run", source, [Caption(captioner="drawn"), Unpaid()], executor=RayExecutor(1))
    with pytest.raises(JudgeError, match="the key is refused"):
        engine.run()


def test_a_stage_may_not_touch_what_was_dropped(tmp_path):
    @dataclass
    class Rude(Repetition):
        kind: ClassVar[str] = "rude"

        def run(self, records: Sequence[Record]) -> list[Changes]:
            return [{region.id: {"caption": "mine"} for region in record.regions} for record in records]

    source = DrawnSource(limit=6, folder=str(tmp_path / "images"), seed=7)
    engine = Engine(tmp_path / "run", source, [Caption(captioner="drawn"), CategoryCheck(), Rude()])
    with pytest.raises(ValueError, match="which are dropped or not there"):
        engine.run()
