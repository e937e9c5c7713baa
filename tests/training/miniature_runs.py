"""Runs of seconds for tests: the recipe of the embedded default with everything small."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path

import torch
from safetensors.torch import load_file

from perceptiondlm.checkpoints.folder import newest_checkpoint
from perceptiondlm.training.config import RunConfig, load_run_config


ROOT = Path(__file__).parents[2]

# 11 samples, an odd number.
MINIATURE = """
export_dir: {folder}/final
tokenizer: {{vocab_size: 512, scenes: 20}}
data: {{sources: [{{kind: scenes, seed: 1, samples: 11, conversation_share: 0.3}}]}}
loss: {{num_slots: 32, noise_copies: 2, weighting: masked}}
evaluation: {{source: {{kind: scenes, seed: 2, samples: 1}}, steps: 0}}
processor: {{max_tiles: 1}}
model:
  vision_feature_layer: -1
  vision_config: {{hidden_size: 32, intermediate_size: 32, num_hidden_layers: 1, num_attention_heads: 2,
    image_size: 64, patch_size: 16, vision_use_head: false}}
  text_config: {{hidden_size: 32, intermediate_size: 32, num_hidden_layers: 1, num_attention_heads: 2,
    num_key_value_heads: 2, max_position_embeddings: 512}}
trainer: {{output_dir: {folder}, max_steps: 9, per_device_train_batch_size: 2, gradient_accumulation_steps: 2,
  learning_rate: 0.003, use_cpu: true, logging_steps: 1, save_steps: 3, seed: 0, disable_tqdm: true}}
"""


def write_miniature(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "miniature.yaml"
    path.write_text(MINIATURE.format(folder=folder))
    return path


def miniature(folder: Path, *overrides: str) -> RunConfig:
    return load_run_config(write_miniature(folder), overrides)


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "accelerate.commands.launch", *arguments]


def launch(*arguments: str) -> subprocess.CompletedProcess:
    """Run `accelerate launch` to its end, one thread per process."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command(*arguments), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def together(program: Callable[[list[str]], int], arguments: list[str], errors: Path) -> None:
    """Run a program in two processes of one group, as `accelerate launch` does, without importing everything in each.

    A server imports once and forks the processes; what they say on stderr goes to a file.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(["perceptiondlm.training.train"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = [
        context.Process(target=_in_group, args=(rank, port, program, arguments, errors), daemon=True)
        for rank in range(2)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(300)
    codes = [process.exitcode for process in started]
    assert codes == [0, 0], errors.read_text()[-3000:]


def _in_group(rank: int, port: int, program: Callable[[list[str]], int], arguments: list[str], errors: Path) -> None:
    group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in group.items()}, MASTER_ADDR="127.0.0.1")
    torch.set_num_threads(1)
    with open(errors, "a") as file:
        os.dup2(file.fileno(), 2)
    sys.exit(program(arguments))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def log_of(folder: Path) -> list[dict]:
    return json.loads((folder / "training_log.json").read_text())["log"]


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in log_of(folder) if "loss" in row]


def kill_after_a_checkpoint(arguments: list[str], folder: Path, seconds: float) -> None:
    """Start a run in a process group of its own; SIGKILL at a random moment after its first checkpoint in `folder`.

    Args:
        seconds: after which it is killed without one.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(arguments, cwd=ROOT, env=environment, start_new_session=True, **quiet)
    try:
        deadline = time.monotonic() + seconds
        while newest_checkpoint(folder) is None and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(random.random() / 5)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
