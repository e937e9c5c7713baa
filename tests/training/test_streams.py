"""Streams: every row once per epoch for any readers, one order for all of them, resuming by place, bad rows."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from accelerate import skip_first_batches
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler, DataLoader

from perceptiondlm.training.data import bad_records
from perceptiondlm.training.data.bad_records import Tally, surely_exceeds
from perceptiondlm.training.data.data_config import DataConfig, LossConfig, SourceConfig
from perceptiondlm.training.data.mixture import build_dataset
from perceptiondlm.training.data.streaming import POOL, StreamOrder, hub_files


def write(path: Path, names: list[str], row_group_size: int | None = None, images=None) -> None:
    """A parquet file with a question for every name, which is the answer."""
    path.parent.mkdir(parents=True, exist_ok=True)
    turns = [[{"from": "human", "value": "What?"}, {"from": "gpt", "value": name}] for name in names]
    rows = [{"conversations": json.dumps(t), "images": (images or {}).get(i, [])} for i, t in enumerate(turns)]
    schema = pa.schema([("conversations", pa.string()), ("images", pa.list_(pa.binary()))])
    pq.write_table(pa.Table.from_pylist(rows, schema), path, row_group_size=row_group_size)


def write_set(folder: Path, sizes: list[int], row_group_size: int | None = None) -> list[str]:
    """Files of these sizes; the names of all rows."""
    for file, size in enumerate(sizes):
        write(folder / f"{file:03d}.parquet", [f"{file} {row}" for row in range(size)], row_group_size)
    return [f"{file} {row}" for file, size in enumerate(sizes) for row in range(size)]


@pytest.fixture(scope="module")
def base(tiny_model, tiny_processor):
    model = tiny_model(region_conditioning="none")
    return model.config, tiny_processor(model)


@pytest.fixture
def build(base, tmp_path):
    """Factory `build(*paths or source settings, data settings)` of a stream."""

    def make(*sources, **settings):
        config, processor = base
        entries = [entry if isinstance(entry, dict) else {"path": str(entry)} for entry in sources]
        data = DataConfig([SourceConfig("conversations", streaming=True, **entry) for entry in entries], **settings)
        loss = LossConfig(num_slots=8, max_slots=64, noise_copies=1)
        return build_dataset(data, loss, processor, config, tmp_path / "cache")

    return make


def read(dataset, batch_size=4, processes=1, workers=0, epoch=0, skip=0) -> list[list[list[str]]]:
    """Batches of answers that each process gets in an epoch, fillers as None, as the Trainer's loader deals them."""
    found = []
    for rank in range(processes):
        order = StreamOrder(dataset, batch_size, processes, workers)
        sampler = BatchSamplerShard(BatchSampler(order, batch_size, drop_last=False), processes, rank)
        loader = DataLoader(dataset, batch_sampler=sampler, num_workers=workers, collate_fn=list)
        if skip:
            loader = skip_first_batches(loader, skip)
        dataset.set_epoch(epoch)
        found.append([[None if s["filler"] else s["answer"] for s in batch] for batch in loader])
    return found


def rows(parts) -> Counter:
    return Counter(name for part in parts for batch in part for name in batch if name is not None)


SETS = {
    "six files of 40": ([40] * 6, None),
    "fewer files than readers": ([50], 10),
    "one row group a file": ([37, 1, 90], None),
    "uneven files and groups": ([3, 111, 7, 58], 9),
    "fewer rows than readers": ([2, 1], None),
    "an empty file": ([20, 0, 30], None),
}


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize(("processes", "workers"), [(1, 0), (2, 2), (3, 0), (4, 0), (5, 0)])
def test_an_epoch_holds_every_row_once(build, tmp_path, name, processes, workers):
    sizes, groups = SETS[name]
    names = write_set(tmp_path / "set", sizes, groups)
    dataset = build(tmp_path / "set")
    for epoch in range(2):
        parts = read(dataset, 4, processes, workers, epoch)
        assert rows(parts) == Counter(names)
        assert len({len(part) for part in parts}) == 1  # or one process would wait for ever
        places = 4 * sum(map(len, parts))
        assert places - len(names) < 4 * (processes + dataset.lanes)  # fillers
    assert len(dataset) == len(names)


@pytest.mark.parametrize(("processes", "workers"), [(1, 0), (4, 0), (2, 2), (3, 2), (64, 0), (5, 0)])
def test_large_sets_are_dealt_by_lanes_and_no_row_is_lost(build, tmp_path, monkeypatch, processes, workers):
    monkeypatch.setattr("perceptiondlm.training.data.streaming.POOL", 4)
    names = write_set(tmp_path / "set", [700, 401, 1], 50)
    dataset = build(tmp_path / "set")
    assert rows(read(dataset, 4, processes, workers)) == Counter(names)
    readers = processes * max(1, workers)
    assert dataset.lanes == 64
    assert (64 % readers == 0) == (readers in (1, 4, 64))  # those have lanes of their own, others read some twice


def test_batches_do_not_depend_on_processes_or_workers(build, tmp_path):
    write_set(tmp_path / "set", [90, 150], 20)
    dataset = build(tmp_path / "set")
    (alone,) = read(dataset, 4)
    for processes, workers in ((1, 3), (2, 0), (2, 2), (4, 0)):
        parts = read(dataset, 4, processes, workers)
        together = [batch for step in zip(*parts, strict=True) for batch in step]
        assert together[: len(alone)] == alone
        assert all(name is None for batch in together[len(alone) :] for name in batch)
    (other,) = read(dataset, 4, epoch=1)
    assert other != alone


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_goes_on_from_any_batch_without_reading_what_was_before(build, tmp_path, monkeypatch, workers):
    write_set(tmp_path / "set", [300, 300], 100)
    dataset = build(tmp_path / "set")
    (whole,) = read(dataset, 4, epoch=1)
    for skip in (1, 50, 149):
        assert read(dataset, 4, workers=workers, epoch=1, skip=skip) == [whole[skip:]]
    measured = []
    measure = "perceptiondlm.training.data.streaming.measure_row"
    from perceptiondlm.training.data.conversations import measure_row

    monkeypatch.setattr(measure, lambda *args: measured.append(1) or measure_row(*args))
    read(dataset, 4, epoch=1, skip=149)
    assert len(measured) <= 2 * POOL  # one pool of every lane, two lanes


def test_epochs_shorter_than_the_set_go_on_where_the_last_one_stopped(build, tmp_path):
    names = write_set(tmp_path / "set", [25, 23], 5)
    dataset = build({"path": str(tmp_path / "set"), "samples": 16})
    epochs = [rows(read(dataset, 4, epoch=epoch)) for epoch in range(6)]
    assert [sum(epoch.values()) for epoch in epochs] == [16] * 6
    assert sum(epochs[:3], Counter()) == sum(epochs[3:], Counter()) == Counter(names)
    dataset = build({"path": str(tmp_path / "set"), "samples": 96})
    assert rows(read(dataset)) == Counter(names * 2)


def test_sources_are_mixed_by_their_samples(build, tmp_path):
    first = write_set(tmp_path / "a", [30])
    write(tmp_path / "b" / "0.parquet", [f"b {i}" for i in range(50)])
    dataset = build(tmp_path / "a", {"path": str(tmp_path / "b"), "samples": 10})
    found = rows(read(dataset, 4, processes=2))
    assert sum(count for name, count in found.items() if name in first) == 30
    assert len(found) == 40 == sum(found.values())


def test_batches_hold_samples_of_similar_length(build, tmp_path):
    answers = ["red " * (1 + 12 * (i % 4)) + str(i) for i in range(64)]
    write(tmp_path / "set" / "0.parquet", answers)
    mixed = {}
    for grouped in (True, False):
        (batches,) = read(build(tmp_path / "set", group_by_length=grouped))
        assert rows([batches]) == Counter(answers)
        mixed[grouped] = sum(len(set(map(len, batch))) > 2 for batch in batches)  # numbers of 1 or 2 digits
    assert mixed[True] <= 2 < mixed[False]


# --- bad rows -----------------------------------------------------------------------------------------------------


def test_bad_rows_are_skipped_named_and_counted(build, tmp_path, caplog):
    path = tmp_path / "set" / "0.parquet"
    write(path, [f"number {i}" for i in range(150)], images={3: [b"nothing"]})
    dataset = build(path)
    for epoch in range(2):
        assert rows(read(dataset, processes=2, epoch=epoch)) == Counter(f"number {i}" for i in range(150) if i != 3)
    assert [(entry["name"], entry["place"]) for entry in dataset.report] == [(str(path), f"{path}, row 3")]
    assert "0 <image> places for 1 images" in dataset.report[0]["error"]
    assert f"{path}, row 3" in caplog.text


def test_a_few_bad_rows_at_the_start_stop_nothing_and_a_bad_set_stops(build, tmp_path):
    """2 of the first 121 rows, 0.05 % of all."""
    path = tmp_path / "few" / "0.parquet"
    write(path, [str(i) for i in range(4000)], images={0: [b"x"], 1: [b"x"]})
    dataset = build(path)
    assert sum(rows(read(dataset)).values()) == 3998
    write(
        tmp_path / "many" / "0.parquet", [str(i) for i in range(4000)], images={i: [b"x"] for i in range(0, 4000, 20)}
    )
    with pytest.raises(ValueError, match=r"\d+ of the first \d+ records of .*many.* are bad, data.max_bad_share=0.01"):
        read(build(tmp_path / "many"))
    write(tmp_path / "small" / "0.parquet", [str(i) for i in range(150)], images={i: [b"x"] for i in (1, 2, 3)})
    with pytest.raises(ValueError, match="3 of the first 150 records"):  # the share of a whole set is known
        read(build(tmp_path / "small"))


def test_the_share_is_judged_over_all_readers(tmp_path):
    """20 of 1,000 rows are too many wherever they are found; 20 of one reader among 40 are not."""
    first = Tally(tmp_path, "run", "0")
    for reader in range(1, 40):
        Tally(tmp_path, "run", str(reader)).add("set", 1000, {}, 10**6, 0.01)
    first.add("set", 1000, {f"row {i}": "bad" for i in range(20)}, 10**5, 0.01)
    bad = [{f"row {reader}/{i}": "bad" for i in range(20)} for reader in range(3)]
    for reader in range(2):
        Tally(tmp_path, "other", str(reader)).add("set", 1000, bad[reader], 3 * 10**5, 0.01)
    with pytest.raises(ValueError, match="60 of the first 3000 records"):
        Tally(tmp_path, "other", "2").add("set", 1000, bad[2], 3 * 10**5, 0.01)


@pytest.mark.parametrize(
    ("bad", "count", "stops"),
    [
        (2, 121, False),
        (1, 1, False),
        (12, 1000, False),
        (30, 1000, True),
        (220_500, 22_000_000, False),
        (223_000, 22_000_000, True),
    ],
)
def test_the_limit_is_compared_with_a_lower_confidence_bound(bad, count, stops):
    assert surely_exceeds(bad, count, 0.01) is stops


def test_a_passing_error_is_retried_and_a_lasting_one_counted(build, tmp_path, monkeypatch):
    monkeypatch.setattr(bad_records, "RETRY_SECONDS", (0, 0))
    folder = tmp_path / "set"
    write_set(folder, [100], 50)
    import fsspec

    open_file, failures = fsspec.open, {"left": 2}

    def flaky(path, *args, **kwargs):
        if failures["left"]:
            failures["left"] -= 1
            raise OSError(5, "Input/output error")
        return open_file(path, *args, **kwargs)

    dataset = build(folder)
    monkeypatch.setattr(fsspec, "open", flaky)
    assert sum(rows(read(dataset)).values()) == 100
    failures["left"] = 10**6
    with pytest.raises(ValueError, match=r"\d+ of the first \d+ records.*row group \d cannot be read"):
        read(dataset, epoch=1)


def test_damaged_row_groups_cost_their_rows_and_cut_files_are_refused(build, tmp_path, monkeypatch):
    monkeypatch.setattr(bad_records, "RETRY_SECONDS", ())
    path = tmp_path / "set" / "000.parquet"
    names = write_set(tmp_path / "set", [60], 20)
    whole = path.read_bytes()
    start = pq.read_metadata(path).row_group(1).column(0).data_page_offset
    path.write_bytes(whole[:start] + b"\xff" * 40 + whole[start + 40 :])
    dataset = build(path, max_bad_share=0.5)
    assert rows(read(dataset)) == Counter(names[:20] + names[40:])
    assert {entry["place"] for entry in dataset.report} == {f"{path}, row {row}" for row in range(20, 40)}
    for end in (0, 3, 10, start + 5, len(whole) - 200, len(whole) - 1):
        path.write_bytes(whole[:end])
        with pytest.raises(ValueError, match=r"000\.parquet is no parquet file, or was cut short"):
            build(path)


def test_sets_of_the_hub_are_read_where_they_lie(build, tmp_path):
    """A folder stands for a repository: its parquet files are found by `datasets`."""
    names = write_set(tmp_path / "repository" / "data", [10, 12])
    for file in (tmp_path / "repository" / "data").iterdir():
        file.rename(file.with_name(f"train-{file.name}"))
    source = {"hub": str(tmp_path / "repository")}
    assert len(hub_files(SourceConfig("conversations", streaming=True, **source))) == 2
    assert rows(read(build(source))) == Counter(names)
    with pytest.raises(ValueError, match=r"has the splits \['train'\]; sources.split is 'test'"):
        build({**source, "split": "test"})


def test_a_killed_reader_leaves_counts_and_logs_that_can_be_read(build, tmp_path):
    """SIGKILL while rows are logged: what is there is whole, and half a line is passed over."""
    script = (
        "import sys; from pathlib import Path; from perceptiondlm.training.data.bad_records import Tally\n"
        "t = Tally(Path(sys.argv[1]), 'run', '0')\n"
        "i = 0\nwhile True: t.add('set', 100, {f'row {i}': 'x' * 3000}, 10**9, 0.5); i += 1; print(i, flush=True)"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE) as process:
        for _ in range(50):
            process.stdout.readline()
        time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
    with open(tmp_path / "bad_records.jsonl", "a") as log:
        log.write('{"name": "se')
    entries = bad_records.logged(tmp_path / "bad_records.jsonl")
    again = Tally(tmp_path, "run", "0")
    again.add("set", 1, {"row x": "bad"}, 10**9, 0.5)
    assert len(bad_records.logged(tmp_path / "bad_records.jsonl")) == len(entries) + 1
    again.own["set"][1] -= 1
    assert 50 <= again.own["set"][1] <= len(entries) <= again.own["set"][1] + 1
