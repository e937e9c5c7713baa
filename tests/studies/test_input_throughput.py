"""The benchmark of the input side runs and counts what it delivers."""

import json

from perceptiondlm.studies.input_throughput import main


def test_both_sets_are_read_and_counted(capsys, tmp_path):
    assert main(["--samples", "8", "--size", "300", "200", "--workers", "0", "--json", str(tmp_path / "r.json")]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [(run["set"], run["workers"]) for run in result["runs"]] == [("conversations", 0), ("regions", 0)]
    assert result["runs"][0]["samples"] == 4  # of eight, without the two batches before the clock starts
    assert all(run["samples_per_second"] > 0 and run["megabytes_per_sample"] > 1 for run in result["runs"])
    assert result == json.loads((tmp_path / "r.json").read_text())
