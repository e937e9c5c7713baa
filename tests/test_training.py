"""The training run: configuration, data and noise, batches of similar length, and a whole run in miniature."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoProcessor

from perceptiondlm.training.config import load_run_config
from perceptiondlm.training.scenes import draw_scene


ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "training" / "configs" / "scenes.yaml"

# A run of seconds: the recipe of the embedded default with everything small.
MINIATURE = """
export_dir: {folder}/final
tokenizer: {{vocab_size: 512, scenes: 20}}
data: {{seed: 1, num_images: 24, conversation_share: 0.3}}
loss: {{num_slots: 32, noise_copies: 2, weighting: masked}}
evaluation: {{seed: 2, num_images: 1, steps: 4}}
processor: {{max_tiles: 1}}
model:
  vision_feature_layer: -1
  vision_config: {{hidden_size: 32, intermediate_size: 32, num_hidden_layers: 1, num_attention_heads: 2,
    image_size: 64, patch_size: 16, vision_use_head: false}}
  text_config: {{hidden_size: 32, intermediate_size: 32, num_hidden_layers: 1, num_attention_heads: 2,
    num_key_value_heads: 2, max_position_embeddings: 512}}
trainer: {{output_dir: {folder}, max_steps: 12, per_device_train_batch_size: 4, learning_rate: 0.003, use_cpu: true,
  logging_steps: 1, save_steps: 8, report_to: none, seed: 0, disable_tqdm: true}}
"""


def write_miniature(folder: Path) -> Path:
    path = folder / "miniature.yaml"
    path.write_text(MINIATURE.format(folder=folder))
    return path


def launch(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "training/train.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


def test_recipe_of_the_embedded_default_parses_and_takes_typed_overrides():
    run = load_run_config(RECIPE, ["data.num_images=40", "trainer.max_steps=3", "resume=true"])
    assert (run.data.num_images, run.trainer["max_steps"], run.resume) == (40, 3, True)
    assert run.loss.num_slots == 32


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.imagez=3", "imagez"),
        ("data.num_images=many", "data.num_images must be of type int"),
        ("nonsense", "key=value"),
        ("loss=3", "loss must be a section"),
        ("resume=3", "resume must be of type bool"),
    ],
)
def test_wrong_overrides_are_refused_by_name(override, message):
    with pytest.raises(ValueError, match=message):
        load_run_config(RECIPE, [override])


def test_missing_settings_are_named(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model: {}\n")
    with pytest.raises(ValueError, match="export_dir"):
        load_run_config(path)
    with pytest.raises(FileNotFoundError, match="absent"):
        load_run_config(tmp_path / "absent.yaml")


def test_a_run_learns_logs_and_leaves_a_checkpoint_that_stands_alone(tmp_path):
    config = write_miniature(tmp_path)
    finished = launch(str(config))
    assert finished.returncode == 0, finished.stderr[-2000:]
    log = json.loads((tmp_path / "final" / "training_log.json").read_text())["log"]
    losses = [row["loss"] for row in log if "loss" in row]
    assert len(losses) == 12
    assert losses[-1] < losses[0]
    assert [row["step"] for row in log if "scenes_average" in row] == [4, 8, 12]
    assert (tmp_path / "final" / "training_curve.png").stat().st_size > 1000
    model = AutoModel.from_pretrained(tmp_path / "final", trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(tmp_path / "final", trust_remote_code=True)
    scene = draw_scene(seed=3, index=0)
    inputs = processor(images=scene.image, masks=[item.mask for item in scene.objects])
    captions = processor.post_process_region_captions(model.generate(**inputs, steps=2))
    assert model.dtype == torch.float32  # stored as fp16, loaded as the model was trained
    assert len(captions[0]) == len(scene.objects)


def test_an_interrupted_run_resumes_to_the_same_weights(tmp_path):
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    for folder in (straight, broken):
        folder.mkdir()
    assert launch(str(write_miniature(straight))).returncode == 0
    config = write_miniature(broken)
    assert launch(str(config)).returncode == 0
    for part in ("final", "checkpoint-12"):  # as if the second half had never been run
        subprocess.run(["rm", "-r", str(broken / part)], check=True)
    resumed = launch(str(config), "resume=true")
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    finals = [folder / "final" for folder in (straight, broken)]
    first, second = (AutoModel.from_pretrained(final, trust_remote_code=True).state_dict() for final in finals)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_wrong_setting_ends_the_run_before_any_work(tmp_path):
    finished = launch(str(write_miniature(tmp_path)), "model.region_conditioning=telepathy")
    assert finished.returncode != 0
    assert "region_conditioning must be one of" in finished.stderr
    assert not (tmp_path / "final").exists()
