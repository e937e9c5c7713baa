"""Whole runs in miniature: learning, checkpoints that stand alone, kill and resume, two processes, failures, stages."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from miniature_runs import (
    ROOT,
    command,
    kill_after_a_checkpoint,
    launch,
    log_of,
    losses,
    miniature,
    weights,
    write_miniature,
)
from PIL import Image
from pycocotools import mask as coco_mask
from transformers import AutoModel, AutoProcessor, Trainer

from perceptiondlm.checkpoints.folder import export, newest_checkpoint
from perceptiondlm.drawn.scenes import draw_scene
from perceptiondlm.training.config import PARTS, load_run_config
from perceptiondlm.training.data.noise import probability
from perceptiondlm.training.modules import part_of
from perceptiondlm.training.train import main, make_trainer, train
from perceptiondlm.training.trainer import loss_items


CONFIGS = ROOT / "training" / "configs"


pytestmark = pytest.mark.usefixtures("one_thread")


# --- a run ----------------------------------------------------------------------------------------------------------


def test_a_run_learns_reports_and_leaves_a_checkpoint_that_stands_alone(tmp_path):
    assert main([str(write_miniature(tmp_path)), "evaluation.steps=4", "trainer.max_steps=12"]) == 0
    final = tmp_path / "final"
    assert len(losses(final)) == 12
    assert losses(final)[-1] < losses(final)[0]
    assert [row["step"] for row in log_of(final) if "scenes_average" in row] == [4, 8, 12]
    names = sorted(path.name for path in (tmp_path / "pictures").iterdir())
    assert names == ["step-000004-0.png", "step-000008-0.png", "step-000012-0.png"]
    assert (final / "training_curve.png").stat().st_size > 1000
    model = AutoModel.from_pretrained(final, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(final, trust_remote_code=True)
    scene = draw_scene(3, 0)
    inputs = processor(images=scene.image, masks=[item.mask for item in scene.objects])
    captions = processor.post_process_region_captions(model.generate(**inputs, steps=2))
    assert model.dtype == torch.float32  # stored as fp16, loaded as the model was trained
    assert len(captions[0]) == len(scene.objects)
    assert load_run_config(tmp_path / "run.yaml") == miniature(tmp_path, "evaluation.steps=4", "trainer.max_steps=12")
    AutoModel.from_pretrained(tmp_path / "checkpoint-12", trust_remote_code=True)  # as does every one on the way


def test_summary_and_card_say_what_was_done(tmp_path):
    train(miniature(tmp_path, "evaluation.steps=9", "trainer.logging_steps=3"))
    summary = json.loads((tmp_path / "final" / "summary.json").read_text())
    assert summary == json.loads((tmp_path / "summary.json").read_text())
    assert (summary["steps"], summary["batch_size"]) == (9, 4)
    assert summary["speed"]["samples"] == 11 * 3  # three epochs of eleven, fillers of one process there are none
    assert summary["speed"]["tokens_per_second"] > 0
    assert 0 < summary["speed"]["padding_share"] < 1
    assert summary["padding"]["padding_share_grouped"] <= summary["padding"]["padding_share_shuffled"]
    assert summary["data"][0]["records"] == 11
    assert set(summary["loss_by_noise"]) == {f"loss_noise_{name}" for name in ("0-25", "25-50", "50-75", "75-100")}
    assert "scenes_average" in summary["scores"]
    card = (tmp_path / "final" / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["pipeline_tag"] == "image-text-to-text"
    assert "9 of 4 samples" in card
    assert "post_process_region_captions" in card


def test_loss_by_noise_level_averages_to_the_loss(tmp_path):
    """Under `masked` the loss is the mean over masked tokens, hence the mean of the levels by their tokens."""
    trainer = make_trainer(miniature(tmp_path, "trainer.logging_steps=1"))
    seen = {}
    add = trainer.meter.add

    def spy(batch, token_losses, masked):
        seen["loss"] = float(token_losses.sum() / masked.sum())
        add(batch, token_losses, masked)
        seen["levels"] = (trainer.meter.loss.clone(), trainer.meter.masked.clone())

    trainer.meter.add = spy
    batch = trainer.data_collator([trainer.train_dataset[0], trainer.train_dataset[1]])
    loss = trainer.training_step(trainer.model, batch, trainer._get_num_items_in_batch([batch], torch.device("cpu")))
    totals, counts = seen["levels"]
    assert float(totals.sum() / counts.sum()) == pytest.approx(float(loss), rel=1e-5)
    quarter = (probability(batch["mask_probability"]) * 4).long().clamp(max=3)
    supervised = (batch["labels"] != -100) & batch["answer_masked"]
    assert counts.tolist() == [int(supervised[quarter[:, 0] == level].sum()) for level in range(4)]


@pytest.mark.parametrize("layout", ["isolated", "released"])
@pytest.mark.parametrize("weighting", ["elbo", "masked"])
@pytest.mark.parametrize("markers", [False, True])
def test_items_of_a_batch_are_what_the_model_divides_by(tmp_path, layout, weighting, markers):
    settings = (f"model.attention_layout={layout}", f"model.supervise_markers={markers}")
    trainer = make_trainer(miniature(tmp_path, *settings, f"loss.weighting={weighting}"))
    batch = trainer.data_collator([trainer.train_dataset[i] for i in (*range(6), ~0)])  # the last one is a filler
    with torch.no_grad():
        own = trainer.model(**batch, loss_weighting=weighting).loss
        sums = trainer.model(**batch, loss_weighting=weighting, num_items=torch.tensor(1.0)).loss
    assert float(sums / own) == pytest.approx(int(loss_items(batch, weighting)), rel=1e-5)


def test_gradient_checkpointing_changes_nothing_but_memory(tmp_path):
    for name, setting in (("plain", "false"), ("checkpointed", "true")):
        train(miniature(tmp_path / name, f"trainer.gradient_checkpointing={setting}", "trainer.max_steps=3"))
    plain, checkpointed = (weights(tmp_path / name / "final") for name in ("plain", "checkpointed"))
    assert all(torch.allclose(plain[name], checkpointed[name], atol=1e-3) for name in plain)
    assert losses(tmp_path / "plain" / "final") == pytest.approx(losses(tmp_path / "checkpointed" / "final"), abs=1e-5)


def test_checkpointing_leaves_a_frozen_vision_tower_without_gradients(tmp_path):
    """transformers would let gradients flow through it, which cost its backward pass and its activations."""
    settings = ["train.parts=[projector, language_model]", "trainer.gradient_checkpointing=true", "trainer.max_steps=1"]
    trainer = make_trainer(miniature(tmp_path, *settings))
    seen = []
    trainer.model.vision_tower.register_forward_hook(lambda module, inputs, output: seen.append(output.requires_grad))
    trainer.train()
    assert seen
    assert not any(seen)


# --- interruption and distribution ----------------------------------------------------------------------------------


def test_a_killed_run_resumes_to_the_same_weights_bit_by_bit(tmp_path):
    """SIGKILL at a random moment after a checkpoint, with workers, length grouping and accumulation on."""
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    settings = ["trainer.max_steps=30", "trainer.dataloader_num_workers=2", "train.ema_decay=0.9"]
    train(miniature(straight, *settings))
    config = write_miniature(broken)
    arguments = command("--cpu", "training/train.py", str(config), *settings)
    kill_after_a_checkpoint(arguments, broken, 120)
    assert newest_checkpoint(broken) is not None
    assert not (broken / "final").exists(), "the run ended before it was killed"
    resumed = launch("--cpu", "training/train.py", str(config), *settings, "--resume")
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    assert int(newest_checkpoint(broken).name.split("-")[1]) == 30
    for part in ("final", "checkpoint-30"):
        first, second = weights(straight / part), weights(broken / part)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)
    assert losses(straight / "final") == losses(broken / "final")


def test_a_checkpoint_that_was_being_written_is_passed_over(tmp_path, capsys):
    train(miniature(tmp_path))
    assert newest_checkpoint(tmp_path).name == "checkpoint-9"
    (tmp_path / "checkpoint-9" / "trainer_state.json").write_text('{"epoch": 0.5, "glo')
    (tmp_path / "checkpoint-10").mkdir()
    assert newest_checkpoint(tmp_path).name == "checkpoint-6"
    assert "checkpoint-10 is not complete" in capsys.readouterr().out
    assert newest_checkpoint(tmp_path / "absent") is None


def test_two_processes_with_two_passes_are_one_process_with_four(tmp_path):
    """Eleven samples an epoch, in batches of two: the last step of an epoch is uneven."""
    one, two = tmp_path / "one", tmp_path / "two"
    settings = ["trainer.learning_rate=1e-3", "trainer.max_steps=6"]
    train(miniature(one, *settings, "trainer.gradient_accumulation_steps=4"))
    finished = launch(
        "--config_file", "training/accelerate/two_cpu_processes.yaml", "training/train.py",
        str(write_miniature(two)), *settings, "trainer.ddp_backend=gloo",
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr[-2000:]
    assert json.loads((two / "summary.json").read_text())["processes"] == 2
    assert losses(two / "final") == pytest.approx(losses(one / "final"), abs=1e-6)
    counts = [json.loads((folder / "summary.json").read_text())["loss_by_noise"] for folder in (one, two)]
    assert counts[0] == pytest.approx(counts[1], abs=1e-3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="two processes find GPUs")
@pytest.mark.parametrize("setting", ["trainer.ddp_backend=gloo", "trainer.ddp_backend=null"])
def test_processes_that_would_not_hear_of_each_other_are_refused(tmp_path, setting):
    finished = launch(
        "--config_file", "training/accelerate/two_cpu_processes.yaml", "training/train.py",
        str(write_miniature(tmp_path)), "trainer.use_cpu=false", setting,
    )  # fmt: skip
    assert finished.returncode != 0
    assert "set trainer.use_cpu=true trainer.ddp_backend=gloo" in finished.stderr
    assert not (tmp_path / "final").exists()


# --- failures -------------------------------------------------------------------------------------------------------


def test_a_wrong_setting_ends_the_run_before_any_work(tmp_path):
    with pytest.raises(ValueError, match="region_conditioning must be one of"):
        train(miniature(tmp_path, "model.region_conditioning=telepathy"))
    assert not (tmp_path / "final").exists()


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (["init_from=models/absent/folder"], FileNotFoundError, "models/absent/folder"),
        (["init_from={base}", "model.text_config={}", "model={}"], ValueError, "does not exist|holds"),
        (["data.sources=[{kind: regions, path: absent.jsonl}]"], FileNotFoundError, "absent.jsonl"),
        (["data.sources=[]"], ValueError, "data.sources is empty"),
        (["model.region_conditioning=none", "evaluation.steps=5", "data.sources.0.conversation_share=1.0"], ValueError,
         "this base model does not know"),
    ],
)  # fmt: skip
def test_what_is_missing_is_named(tmp_path, overrides, error, message):
    other = tmp_path / "siglip"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "siglip"}')
    with pytest.raises(error, match=message):
        train(miniature(tmp_path, *(text.replace("{base}", str(other)) for text in overrides)))


def test_a_loss_that_is_no_number_stops_the_run_and_leaves_good_checkpoints(tmp_path):
    trainer = make_trainer(miniature(tmp_path))
    step = trainer.compute_loss

    def diverge(model, inputs, **kwargs):
        loss = step(model, inputs, **kwargs)
        return loss * float("nan") if trainer.state.global_step == 4 else loss

    trainer.compute_loss = diverge
    with pytest.raises(FloatingPointError, match="the loss is nan at step 5"):
        trainer.train()
    assert newest_checkpoint(tmp_path).name == "checkpoint-3"
    assert all(weight.isfinite().all() for weight in weights(tmp_path / "checkpoint-3").values())


def test_a_gradient_that_is_no_number_stops_the_run(tmp_path):
    trainer = make_trainer(miniature(tmp_path))
    trainer.model.lm_head.weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(FloatingPointError, match=r"the gradient norm is (nan|inf) at step 1"):
        trainer.train()
    assert all(weight.isfinite().all() for weight in trainer.model.parameters())


def test_a_full_disk_stops_the_run_and_leaves_good_checkpoints(tmp_path, monkeypatch):
    usage, original = shutil.disk_usage(tmp_path), shutil.disk_usage
    trainer = make_trainer(miniature(tmp_path))
    full = usage._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full if trainer.state.global_step > 3 else original(path))
    with pytest.raises(OSError, match=r"checkpoint-6 needs .* GiB, the disk has 0.00 GiB free"):
        trainer.train()
    assert newest_checkpoint(tmp_path).name == "checkpoint-3"
    assert not (tmp_path / "checkpoint-6").exists()


def test_a_checkpoint_that_fails_half_way_leaves_nothing_behind(tmp_path, monkeypatch):
    trainer = make_trainer(miniature(tmp_path))
    save = Trainer._save_optimizer_and_scheduler

    def fail(self, folder):
        if self.state.global_step > 3:
            raise OSError(28, "No space left on device")
        save(self, folder)

    monkeypatch.setattr(Trainer, "_save_optimizer_and_scheduler", fail)
    with pytest.raises(OSError, match=r"checkpoint-6 could not be written, older ones are intact.*No space left"):
        trainer.train()
    assert newest_checkpoint(tmp_path).name == "checkpoint-3"
    assert not (tmp_path / "checkpoint-6").exists()


# --- stages on data made here ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base_checkpoint(tiny_model, tiny_processor, tmp_path_factory):
    """A saved tiny base model, as stage 4 leaves it."""
    folder = tmp_path_factory.mktemp("base")
    model = tiny_model(region_conditioning="none")
    export(model, tiny_processor(model, max_tiles=2), folder, torch.float32)
    return folder


def write_conversations(path: Path, count: int = 12) -> Path:
    """A parquet set of pictures with one question each."""
    path.mkdir()
    picture = path / "picture.png"
    Image.new("RGB", (64, 64), "red").save(picture)
    turns = [{"from": "human", "value": "<image>\nWhat color?"}, {"from": "gpt", "value": "a red one"}]
    rows = [{"id": str(i), "images": [picture.read_bytes()], "conversations": json.dumps(turns)} for i in range(count)]
    pq.write_table(pa.Table.from_pylist(rows), path / "part.parquet")
    return path


def write_regions(path: Path, count: int = 6) -> Path:
    """A region set in JSON lines: pictures with two captioned masks each."""
    Image.new("RGB", (64, 64), "blue").save(path.parent / "picture.png")
    mask = np.zeros((64, 64, 2), np.uint8, order="F")
    mask[4:30, 4:30, 0] = mask[34:60, 34:60, 1] = 1
    rles = [{"size": [64, 64], "counts": rle["counts"].decode()} for rle in coco_mask.encode(mask)]
    record = {"image": "picture.png", "mask_rles": rles, "captions": ["a red house", "a blue tree"]}
    path.write_text("\n".join([json.dumps(record)] * count))
    return path


@pytest.mark.parametrize("stage", ["stage1_alignment", "stage2_midtraining", "stage3_instruction", "stage4_refinement"])
def test_base_stages_run_end_to_end_and_train_what_the_paper_trains(tmp_path, base_checkpoint, stage):
    path = write_conversations(tmp_path / "set")
    run = load_run_config(CONFIGS / f"{stage}.yaml", [
        f"init_from={base_checkpoint}", f"data.sources.0.path={path}", "data.sources.0.samples=12", "batch_size=4",
        f"export_dir={tmp_path}/final", f"trainer.output_dir={tmp_path}", "trainer.use_cpu=true", "trainer.bf16=false",
        "trainer.per_device_train_batch_size=2", "trainer.dataloader_num_workers=0", "trainer.logging_steps=1",
        "export_dtype=float32", f"evaluation.source={{kind: conversations, path: {path}, samples: 2}}",
        "evaluation.steps=2", "trainer.disable_tqdm=true", "loss.max_slots=32", "trainer.learning_rate=1e-3",
    ])  # fmt: skip
    train(run)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["steps"], summary["batch_size"]) == (3, 4)  # 12 samples, one epoch
    assert summary["scores"]["held_out_loss"] > 0
    before, after = weights(base_checkpoint), weights(tmp_path / "final")
    changed = {part_of(name) for name in before if not torch.equal(before[name], after[name])}
    assert changed == set(run.train.parts)
    AutoModel.from_pretrained(tmp_path / "final", trust_remote_code=True)


@pytest.mark.parametrize("conditioning", ["vision", "replay"])
def test_region_stage_adds_its_parts_to_a_base_model_and_trains_everything(tmp_path, base_checkpoint, conditioning):
    path = write_regions(tmp_path / "regions.jsonl")
    sources = f"[{{kind: regions, path: {path}, image_root: {tmp_path}}}]"
    run = load_run_config(CONFIGS / "regions.yaml", [
        f"init_from={base_checkpoint}", f"data.sources={sources}", f"model.region_conditioning={conditioning}",
        "batch_size=2", f"export_dir={tmp_path}/final", f"trainer.output_dir={tmp_path}", "trainer.use_cpu=true",
        "trainer.bf16=false", "trainer.per_device_train_batch_size=2", "trainer.dataloader_num_workers=0",
        "export_dtype=float32", f"evaluation.source={{kind: regions, path: {path}, samples: 1}}", "evaluation.steps=2",
        "trainer.disable_tqdm=true", "trainer.learning_rate=1e-3",
    ])  # fmt: skip
    train(run)
    before, after = weights(base_checkpoint), weights(tmp_path / "final")
    changed = {part_of(name) for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"vision_tower", "projector", "language_model"}
    assert {part_of(name) for name in set(after) - set(before)} == {"regions"}
    assert (tmp_path / "pictures" / "step-000002-0.png").is_file()
    model = AutoModel.from_pretrained(tmp_path / "final", trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(tmp_path / "final", trust_remote_code=True)
    assert model.config.region_conditioning == conditioning
    assert processor.image_processor.max_tiles == 2  # the base model's
    image = Image.new("RGB", (64, 64), "blue")
    output = model.generate(**processor(images=image, boxes=[[4, 4, 30, 30], [34, 34, 60, 60]]), steps=2)
    assert len(processor.post_process_region_captions(output)[0]) == 2


def test_parts_can_start_anew(tmp_path, base_checkpoint):
    sources = "[{kind: scene_conversations, seed: 1, samples: 4}]"
    overrides = [f"init_from={base_checkpoint}", "model={}", f"data.sources={sources}", "train.parts=[projector]"]
    start = make_trainer(miniature(tmp_path, *overrides, "model={text_config: {attention_dropout: 0.1}}")).model
    assert start.config.text_config.attention_dropout == 0.1  # a change; the rest of the section is the checkpoint's
    kept = start.state_dict()
    anew = make_trainer(miniature(tmp_path, *overrides, "train.reset=[projector]")).model.state_dict()
    before = weights(base_checkpoint)
    assert all(torch.equal(kept[name], before[name]) for name in before)
    different = {name for name in before if not torch.equal(anew[name], before[name])}
    assert different == {name for name in before if name.startswith(PARTS["projector"])}
    assert 0.015 < float(anew["projector.linear_1.weight"].std()) < 0.025
