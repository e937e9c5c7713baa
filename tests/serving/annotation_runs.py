"""Runs of `perceptiondlm annotate` in processes of their own, killed, and their records beside others'."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from perceptiondlm.serving.records import read_records


def command(source: Path, out: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "perceptiondlm.scripts.cli", "annotate", str(source), "--out", str(out), *more]


def killed_after(parts: int, arguments: list[str], out: Path) -> None:
    """Start a run and kill it, all its processes, when so many parts are there."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(arguments, start_new_session=True, stderr=subprocess.DEVNULL, env=environment)
    deadline = time.monotonic() + 200
    while len(list(out.glob("parts/part-*"))) < parts and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL


def comparable(folder: Path) -> list[dict]:
    """Records with scores as far as two numbers of threads agree."""
    return [{**row, "score": round(row["score"], 4), "tokens": None} for row in read_records(folder)]
