"""Runs of seconds for tests: the recipe of the embedded default with everything small."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

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


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def log_of(folder: Path) -> list[dict]:
    return json.loads((folder / "training_log.json").read_text())["log"]


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in log_of(folder) if "loss" in row]
