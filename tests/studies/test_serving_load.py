"""A real server under a little load: answers are the offline ones, trouble gets a reason, a signal ends it in order."""

import json

import pytest


pytest.importorskip("uvicorn", reason='the server is an extra: pip install "perceptiondlm[serve]"')

from perceptiondlm.studies.serving_load import main


def test_a_server_under_load_answers_as_offline_and_stops_in_order(capsys, tmp_path):
    arguments = ["--requests", "6", "--clients", "4", "--trouble", "0.2", "--stop-after", "0.3", "--scales", "0.6", "1"]
    status = main([*arguments, "--preset", "fast", "--json", str(tmp_path / "load.json")])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert status == 0, result
    assert result == json.loads((tmp_path / "load.json").read_text())
    one, many, stopped = (result[name] for name in ("one_at_a_time", "many_clients", "stopped_under_load"))
    assert one["answered"] == one["statuses"]["200"] == 6
    assert many["answered"] >= 1
    assert sum(many["statuses"].values()) == sum(stopped["statuses"].values()) == 6
    assert 0 < one["p50_seconds"] <= one["p95_seconds"]
    assert stopped["exit_status"] == 0
