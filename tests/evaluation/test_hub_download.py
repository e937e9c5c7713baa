"""Benchmarks from the Hub, on a stand-in for it: a server on loopback that knows one revision of one data set."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from perceptiondlm.drawn.scenes import write_scenes
from perceptiondlm.evaluation.benchmarks import load_benchmark
from perceptiondlm.scripts.cli import main


COMMIT = "0123456789abcdef0123456789abcdef01234567"
LOAD = """
import sys
from perceptiondlm.evaluation.benchmarks import load_benchmark
benchmark = load_benchmark(sys.argv[1], revision=sys.argv[2])
print(benchmark.name, benchmark.protocol, len(benchmark.regions), *[image.open().width for image in benchmark.images])
"""


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Three drawn pictures, laid out as the data sets on the Hub are."""
    folder = tmp_path_factory.mktemp("published")
    write_scenes(0, 3, folder / "annotations")
    return folder


@pytest.fixture
def hub(published):
    """The server: `hub.url` and the paths `hub.asked` for."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def do_GET(self):
            path = self.path.partition("?")[0]
            self.server.asked.append(path)
            repository = "datasets/MSALab/ParaDLC-Bench"
            files = {str(p.relative_to(published)): p.read_bytes() for p in published.rglob("*") if p.is_file()}
            if path == f"/api/{repository}/revision/v1":
                self.send(json.dumps({"id": "MSALab/ParaDLC-Bench", "sha": COMMIT}).encode())
            elif path == f"/api/{repository}/tree/{COMMIT}":
                entries = [
                    {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for name, data in files.items()
                ]
                self.send(json.dumps(entries).encode())
            elif path.startswith(f"/{repository}/resolve/{COMMIT}/"):
                self.send(files[path.removeprefix(f"/{repository}/resolve/{COMMIT}/")])
            else:
                self.send(b'{"error": "Repository not found"}', 404, [("X-Error-Code", "RepoNotFound")])

        do_HEAD = do_GET

        def send(self, data, status=200, headers=()):
            self.send_response(status)
            etag = hashlib.sha1(data).hexdigest()
            for name, value in [("ETag", etag), ("X-Repo-Commit", COMMIT), ("Content-Length", len(data)), *headers]:
                self.send_header(name, str(value))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.url = [], f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def _load(endpoint, home, name="paradlc", revision="v1"):
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-c", LOAD, name, revision]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)


def test_a_named_benchmark_is_downloaded_once(hub, published, tmp_path):
    first = _load(hub.url, tmp_path)
    assert first.returncode == 0, first.stderr
    benchmark = load_benchmark(published)
    widths = [image.width for image in benchmark.images]
    assert first.stdout.split() == ["paradlc", "paradlc", str(len(benchmark.regions)), *map(str, widths)]
    hub.asked.clear()
    assert _load(hub.url, tmp_path).stdout == first.stdout
    assert not [path for path in hub.asked if "/resolve/" in path]
    hub.shutdown()
    hub.server_close()
    assert _load(hub.url, tmp_path).stdout == first.stdout  # without the Hub


def test_what_cannot_be_downloaded_says_that_a_local_copy_will_do(hub, tmp_path):
    for name, revision in (("dlc", "main"), ("paradlc", "v2")):
        error = _load(hub.url, tmp_path, name, revision).stderr.splitlines()[-1]
        repository = {"dlc": "nvidia/DLC-Bench", "paradlc": "MSALab/ParaDLC-Bench"}[name]
        assert f"the data set {repository} cannot be downloaded; take a local copy with --data DIR" in error
        assert "404" in error


def test_offline_the_command_says_so_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert main(["evaluate", "--dataset", "paradlc", "--out", str(tmp_path / "out")]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert "MSALab/ParaDLC-Bench cannot be downloaded; take a local copy with --data DIR" in error
    assert "outgoing traffic has been disabled" in error
