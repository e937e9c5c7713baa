"""`perceptiondlm prepare`: shares, interruption, copies on other machines, sets of millions of rows."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from perceptiondlm.common.json_files import write_json
from perceptiondlm.scripts.cli import main
from perceptiondlm.training.config import load_run_config
from perceptiondlm.training.data.batches import LengthGroupedBatches
from perceptiondlm.training.data.mixture import MixtureDataset, Part, build_dataset
from perceptiondlm.training.data.survey import SourceReport, Work
from perceptiondlm.training.start import build_processor


ROOT = Path(__file__).parents[2]
CONFIG = """
export_dir: {folder}/final
tokenizer: {{vocab_size: 512, scenes: 20}}
data:
  prepared: {folder}/prepared
  sources: [{source}]
evaluation: {{steps: 0}}
processor: {{max_tiles: 1}}
model:
  vision_config: {{hidden_size: 32, intermediate_size: 32, num_hidden_layers: 1, num_attention_heads: 2,
    image_size: 64, patch_size: 16, vision_use_head: false}}
  text_config: {{hidden_size: 32, intermediate_size: 32, num_hidden_layers: 1, num_attention_heads: 2,
    num_key_value_heads: 2, max_position_embeddings: 512}}
trainer: {{output_dir: {folder}/run}}
"""


def write_regions(folder: Path, count: int, bad: tuple[int, ...] = ()) -> Path:
    """Records of one to three regions."""
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), "blue").save(folder / "a.png")
    mask = {"size": [8, 8], "counts": [0, 64]}
    records = [
        {
            "image": "gone.png" if i in bad else "a.png",
            "mask_rles": [mask] * (i % 3 + 1),
            "captions": ["red"] * (i % 3 + 1),
        }
        for i in range(count)
    ]
    path = folder / "set.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    return path


def write_config(folder: Path, source: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.yaml").write_text(CONFIG.format(folder=folder, source=source))
    return folder / "run.yaml"


def columns(folder: Path) -> dict[str, list[int]]:
    (survey,) = folder.glob("survey-*")
    return {name: np.load(survey / f"{name}.npy").tolist() for name in ("ends", "lengths")}


def dataset_of(config: Path):
    run = load_run_config(config, [])
    model, processor = build_processor(run)
    return build_dataset(run.data, run.loss, processor, model, run.output_dir)


def test_what_was_prepared_is_not_read_again(tmp_path, capsys, monkeypatch):
    path = write_regions(tmp_path, 60, bad=(7,))
    config = write_config(tmp_path / "run", f"{{kind: regions, path: {path}}}")
    assert main(["prepare", str(config), "data.max_bad_share=0.1", "--workers", "1"]) == 0
    printed = capsys.readouterr().out
    assert "60 records, 59 samples, 1 bad" in printed
    assert f"{path}, record 7: " in printed
    assert main(["prepare", str(config)]) == 2  # the usual limit: 1 %
    assert "1 of the first 60 records" in capsys.readouterr().err
    text = config.read_text()
    config.write_text(text.replace("data:\n", "data:\n  max_bad_share: 0.1\n"))
    monkeypatch.setattr("perceptiondlm.training.data.region_sets.RegionSource.measure", None)
    dataset = dataset_of(config)
    assert len(dataset) == 59 == len(dataset.lengths)
    assert isinstance(dataset.lengths, np.memmap)  # shared by all processes that map it


@pytest.mark.parametrize("shards", [2, 3])
def test_shards_are_looked_at_one_by_one_and_put_together_by_the_last(tmp_path, capsys, shards):
    path = write_regions(tmp_path, 100)
    alone = write_config(tmp_path / "alone", f"{{kind: regions, path: {path}}}")
    parts = write_config(tmp_path / "parts", f"{{kind: regions, path: {path}}}")
    assert main(["prepare", str(alone)]) == 0
    capsys.readouterr()
    for number in range(shards, 0, -1):
        assert main(["prepare", str(parts), "--shard", f"{number}/{shards}", "--workers", "2"]) == 0
        assert ("left to other shards" in capsys.readouterr().out) == (number > 1)
    assert columns(tmp_path / "parts" / "prepared") == columns(tmp_path / "alone" / "prepared")
    assert main(["prepare", str(parts), "--shard", "0/2"]) == 2


def test_machines_that_share_no_folder_exchange_files(tmp_path, capsys):
    """Each looks at its share of its own copy of the set; the files of one are copied to the other."""
    for machine in ("one", "two"):
        path = write_regions(tmp_path / machine / "data", 100)
        time.sleep(0.02)  # another time of change
        config = write_config(tmp_path / machine, f"{{kind: regions, path: {path}}}")
        assert main(["prepare", str(config), "--shard", f"{1 + (machine == 'two')}/2"]) == 0
        assert "left to other shards" in capsys.readouterr().out
    shutil.copytree(tmp_path / "two" / "prepared", tmp_path / "one" / "prepared", dirs_exist_ok=True)
    assert main(["prepare", str(tmp_path / "one" / "run.yaml")]) == 0
    assert "100 records, 100 samples" in capsys.readouterr().out
    shutil.copytree(tmp_path / "one" / "prepared", tmp_path / "two" / "prepared", dirs_exist_ok=True)
    assert (
        dataset_of(tmp_path / "two" / "run.yaml").lengths.tolist() == columns(tmp_path / "one" / "prepared")["lengths"]
    )


def test_a_killed_look_goes_on_where_it_stopped(tmp_path):
    """SIGKILL in the middle: what was looked at stays, no process is left behind, the result is the same."""
    path = write_regions(tmp_path, 1600)
    broken = write_config(tmp_path / "broken", f"{{kind: regions, path: {path}}}")
    straight = write_config(tmp_path / "straight", f"{{kind: regions, path: {path}}}")
    command = [sys.executable, "-m", "perceptiondlm.scripts.cli", "prepare", str(broken), "--workers", "2"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, start_new_session=True)
    chunks = tmp_path / "broken" / "prepared"
    deadline = time.monotonic() + 120
    while not (kept := list(chunks.glob("survey-*/chunks/[0-9]*.npz"))) and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert kept, "nothing was looked at in time"
    assert not list(chunks.glob("survey-*/report.json")), "all was looked at before it was killed"
    deadline = time.monotonic() + 20
    while group_lives(process.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not group_lives(process.pid)
    times = {file: file.stat().st_mtime_ns for file in chunks.glob("survey-*/chunks/[0-9]*.npz")}
    assert main(["prepare", str(broken), "--shard", "1/100"]) == 0  # hardly anything more
    assert {file: file.stat().st_mtime_ns for file in times} == times
    assert main(["prepare", str(broken)]) == 0
    assert main(["prepare", str(straight)]) == 0
    assert columns(tmp_path / "broken" / "prepared") == columns(tmp_path / "straight" / "prepared")


def group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_streams_are_looked_through_too(tmp_path, capsys):
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "that"}]
    rows = [{"conversations": json.dumps(turns if i != 70 else turns[:1])} for i in range(150)]
    (tmp_path / "set").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "set" / "0.parquet", row_group_size=40)
    source = f"{{kind: conversations, path: {tmp_path / 'set'}, streaming: true}}"
    config = write_config(tmp_path / "run", source)
    assert main(["prepare", str(config)]) == 0
    printed = capsys.readouterr().out
    assert "150 records, 149 samples, 1 bad" in printed
    assert f"{tmp_path / 'set' / '0.parquet'}, row 70: turns are by ['user']" in printed


def two_processes(config: Path, *folders: str) -> list:
    """What two processes that train together have read and found (see survey_together.py)."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command = [*launch, str(ROOT / "tests" / "training" / "survey_together.py"), str(config), *map(str, folders)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": "1000"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads((config.parent / f"{rank}.json").read_text()) for rank in range(2)]


def test_processes_that_train_together_share_the_look(tmp_path):
    """With one folder each reads half; with two, as on machines that share none, each reads all."""
    path = write_regions(tmp_path, 100)
    config = write_config(tmp_path / "run", f"{{kind: regions, path: {path}}}")
    (first, lengths), (second, again) = two_processes(config, tmp_path / "shared", tmp_path / "shared")
    assert sorted(first + second) == list(range(100))
    assert min(len(first), len(second)) > 30
    assert lengths == again == columns(tmp_path / "shared")["lengths"]
    (first, apart), (second, again) = two_processes(config, tmp_path / "a", tmp_path / "b")
    assert sorted(first) == sorted(second) == list(range(100))
    assert apart == again == lengths


def test_processes_with_different_copies_of_a_set_are_refused(tmp_path):
    path = write_regions(tmp_path, 40)
    config = write_config(tmp_path / "run", f"{{kind: regions, path: {path}, image_root: {tmp_path}}}")
    lines = path.read_text().splitlines()
    (config.parent / "set-0.jsonl").write_text("\n".join(lines))
    (config.parent / "set-1.jsonl").write_text("\n".join(lines[1:]))
    (_, first), (_, second) = two_processes(config, tmp_path / "a", tmp_path / "b")
    assert first == second
    assert "the machines hold different copies of the sets" in first


class Nothing:
    """A source that is never asked."""

    dropped: ClassVar = {}


def test_millions_of_rows_take_numpy_columns_alone(tmp_path):
    """Every sample is found where the survey says, and an epoch's order holds each once."""
    count = 200_000
    counts = np.arange(count) % 3
    np.save(tmp_path / "ends.npy", np.cumsum(counts))
    np.save(tmp_path / "lengths.npy", np.arange(counts.sum(), dtype=np.int32) % 4000)
    write_json(tmp_path / "report.json", {"report": asdict(SourceReport("x", records=count)), "dropped": {}})
    work = Work(Nothing(), "x", range(count), tmp_path, 0.01)
    dataset = MixtureDataset([Part(Nothing(), work, 1, np.array([4, 7]))])
    assert len(dataset) == counts.sum() + 2
    places = [(record, 0, unit) for record in range(count) for unit in range(counts[record])]
    found = [dataset.locate(index)[1:] for index in range(0, len(dataset) - 2, 997)]
    assert found == places[::997]
    assert [dataset.locate(index)[1:] for index in (-2 + len(dataset), -1 + len(dataset))] == [(4, 1, 0), (7, 1, 0)]
    assert sorted(LengthGroupedBatches(dataset, 8, seed=0)) == list(range(len(dataset)))
