"""Runs on a stream: killed and resumed bit by bit without replay, two processes equal to one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from miniature_runs import kill_after_a_checkpoint
from safetensors.torch import load_file

from perceptiondlm.training.config import load_run_config
from perceptiondlm.training.train import train


ROOT = Path(__file__).parents[2]
CONFIG = """
export_dir: {folder}/final
tokenizer: {{vocab_size: 512, scenes: 20}}
data: {{sources: [{{kind: conversations, path: {data}, streaming: true}}]}}
loss: {{num_slots: 8, noise_copies: 1, weighting: masked}}
evaluation: {{steps: 0}}
export_dtype: float32
model:
  region_conditioning: none
  vision_feature_layer: -1
  vision_config: {{hidden_size: 32, intermediate_size: 32, num_hidden_layers: 1, num_attention_heads: 2,
    image_size: 64, patch_size: 16, vision_use_head: false}}
  text_config: {{hidden_size: 32, intermediate_size: 32, num_hidden_layers: 1, num_attention_heads: 2,
    num_key_value_heads: 2, max_position_embeddings: 512}}
trainer: {{output_dir: {folder}, num_train_epochs: 2, per_device_train_batch_size: 2, gradient_accumulation_steps: 2,
  learning_rate: 0.003, use_cpu: true, logging_steps: 1, save_steps: 3, seed: 0, disable_tqdm: true}}
"""


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """47 rows in two files and row groups of seven."""
    folder = tmp_path_factory.mktemp("set")
    turns = [[{"from": "human", "value": f"What is {i}?"}, {"from": "gpt", "value": f"it is {i}"}] for i in range(47)]
    rows = [{"conversations": json.dumps(turn)} for turn in turns]
    for file, part in enumerate((rows[:30], rows[30:])):
        pq.write_table(pa.Table.from_pylist(part), folder / f"{file}.parquet", row_group_size=7)
    return folder


def write_config(folder: Path, data: Path) -> Path:
    folder.mkdir()
    (folder / "stream.yaml").write_text(CONFIG.format(folder=folder, data=data))
    return folder / "stream.yaml"


def launch(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "accelerate.commands.launch", *arguments]


def losses(folder: Path) -> list[tuple[float, float]]:
    log = json.loads((folder / "final" / "training_log.json").read_text())["log"]
    return [(row["epoch"], row["loss"]) for row in log if "loss" in row]


def test_a_killed_run_on_a_stream_resumes_to_the_same_weights(tmp_path, data):
    """SIGKILL after a checkpoint, with workers; the resumed run reads only what is left."""
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    settings = ["trainer.dataloader_num_workers=2"]
    train(load_run_config(write_config(straight, data), settings))
    assert len(losses(straight)) == 24  # 47 rows in batches of two and steps of two: 12 steps an epoch
    config = write_config(broken, data)
    command = launch("--cpu", "training/train.py", str(config), *settings)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    kill_after_a_checkpoint(command, broken, 180)
    assert not (broken / "final").exists(), "the run ended before it was killed"
    resumed = subprocess.run(
        [*command, "--resume"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    first, second = (load_file(folder / "final" / "model.safetensors") for folder in (straight, broken))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert losses(straight) == losses(broken)


def test_two_processes_with_two_passes_are_one_with_four(tmp_path, data):
    one, two = tmp_path / "one", tmp_path / "two"
    settings = ["trainer.learning_rate=1e-3", "trainer.num_train_epochs=1"]
    train(load_run_config(write_config(one, data), [*settings, "trainer.gradient_accumulation_steps=4"]))
    command = launch(
        "--config_file", "training/accelerate/two_cpu_processes.yaml", "training/train.py",
        str(write_config(two, data)), *settings, "trainer.ddp_backend=gloo",
    )  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert finished.returncode == 0, finished.stderr[-2000:]
    assert json.loads((two / "summary.json").read_text())["processes"] == 2
    assert len(losses(one)) == 6
    assert [loss for _, loss in losses(two)] == pytest.approx([loss for _, loss in losses(one)], abs=1e-6)
