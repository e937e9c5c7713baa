"""What trains: frozen parts, a learning rate for each, adapters and their merging, the moving average."""

import hashlib
import json
import subprocess
import sys

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

from perceptiondlm.checkpoints.folder import export
from perceptiondlm.drawn.scenes import draw_scene
from perceptiondlm.training.config import PARTS, QUANTIZED, LoraConfig, TrainConfig, load_run_config
from perceptiondlm.training.ema import MovingAverage
from perceptiondlm.training.modules import count_parameters, parameter_groups, part_of, prepare_parts
from perceptiondlm.training.train import finish, make_trainer, train


RUN = """
init_from: {base}
export_dir: {folder}/final
export_dtype: float32
data: {{sources: [{{kind: scenes, seed: 1, samples: 6}}]}}
evaluation: {{steps: 0}}
trainer: {{output_dir: {folder}, max_steps: 4, per_device_train_batch_size: 2, learning_rate: 0.01, use_cpu: true,
  logging_steps: 1, save_steps: 2, seed: 0, disable_tqdm: true}}
"""
LORA = "train={parts: [projector, regions, language_model], lora: {rank: 4, alpha: 8}}"

# Run in a fresh process: captions of the merged checkpoint, and of its adapters on the model they were trained on.
RELOAD = """
import json, sys
import peft
from transformers import AutoModel, AutoProcessor
from perceptiondlm.drawn.scenes import draw_scene
base, final = sys.argv[1:]
processor = AutoProcessor.from_pretrained(final, trust_remote_code=True)
scene = draw_scene(5, 0)
inputs = processor(images=scene.image, masks=[item.mask for item in scene.objects])
def captions(model):
    return processor.post_process_region_captions(model.eval().generate(**inputs, steps=8))[0]
merged = AutoModel.from_pretrained(final, trust_remote_code=True)
adapted = peft.PeftModel.from_pretrained(AutoModel.from_pretrained(base, trust_remote_code=True), final + "/adapter")
print(json.dumps([captions(merged), captions(adapted), captions(adapted.merge_and_unload())]))
"""


@pytest.fixture(scope="module")
def region_checkpoint(tiny_model, tiny_processor, tmp_path_factory):
    """A saved tiny region model."""
    folder = tmp_path_factory.mktemp("regions")
    model = tiny_model()
    export(model, tiny_processor(model, max_tiles=1), folder, torch.float32)
    return folder


def make_run(base, folder, *overrides: str):
    folder.mkdir(exist_ok=True)
    path = folder / "config.yaml"
    path.write_text(RUN.format(base=base, folder=folder))
    return load_run_config(path, overrides)


def caption(model, processor) -> list[str]:
    scene = draw_scene(5, 0)
    inputs = processor(images=scene.image, masks=[item.mask for item in scene.objects])
    return processor.post_process_region_captions(model.eval().generate(**inputs, steps=8))[0]


def test_every_parameter_belongs_to_one_part(tiny_model):
    for conditioning in ("replay", "vision", "none"):
        model = tiny_model(region_conditioning=conditioning)
        counts = count_parameters(model)
        assert sum(part["total"] for part in counts.values()) == sum(p.numel() for p in model.parameters())
        assert bool(counts["regions"]["total"]) == (conditioning != "none")


def test_learning_rates_and_weight_decay_reach_their_parameters(tiny_model):
    model = prepare_parts(tiny_model(), TrainConfig(parts=["projector", "language_model"]))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed = {name for name in names.values() if name.endswith("weight")}
    groups = parameter_groups(model, decayed, 0.1, {"projector": 1.0}, 2.0)
    seen = [names[id(parameter)] for group in groups for parameter in group["params"]]
    assert sorted(seen) == sorted(name for name in names.values() if part_of(name) in ("projector", "language_model"))
    for group in groups:
        for name in (names[id(parameter)] for parameter in group["params"]):
            assert group["lr"] == (1.0 if part_of(name) == "projector" else 2.0)
            assert group["weight_decay"] == (0.1 if name.endswith("weight") else 0.0)


def test_a_part_with_its_own_learning_rate_moves_by_it(tmp_path, region_checkpoint):
    """AdamW's first step moves every weight by about its learning rate."""
    rates = "train={parts: [projector, language_model], learning_rates: {projector: 1e-4}}"
    run = make_run(region_checkpoint, tmp_path, rates, "trainer.max_steps=1", "trainer.lr_scheduler_type=constant")
    train(run)
    before, after = (
        load_file(region_checkpoint / "model.safetensors"),
        load_file(tmp_path / "final" / "model.safetensors"),
    )
    moved = dict.fromkeys(PARTS, 0.0)
    for name in before:
        moved[part_of(name)] = max(moved[part_of(name)], float((after[name] - before[name]).abs().max()))
    assert moved == pytest.approx(
        {"vision_tower": 0, "projector": 1e-4, "regions": 0, "language_model": 1e-2}, rel=0.05
    )


def test_adapters_train_reload_and_merge_to_the_same_captions(tmp_path, region_checkpoint):
    digest = hashlib.sha256((region_checkpoint / "model.safetensors").read_bytes()).hexdigest()
    run = make_run(region_checkpoint, tmp_path, LORA)
    trainer = make_trainer(run)
    trainer.train()
    before = load_file(region_checkpoint / "model.safetensors")
    state = trainer.model.get_base_model().state_dict()
    for name in before:
        if part_of(name) in ("vision_tower", "language_model"):  # untouched below the adapters
            stem, _, leaf = name.rpartition(".")
            assert torch.equal(state.get(name, state.get(f"{stem}.base_layer.{leaf}")), before[name]), name
    captions = caption(trainer.model.get_base_model(), trainer.processing_class)
    assert captions != caption(
        AutoModel.from_pretrained(region_checkpoint, trust_remote_code=True), trainer.processing_class
    )
    finish(run, trainer)
    code = subprocess.run(
        [sys.executable, "-c", RELOAD, str(region_checkpoint), str(tmp_path / "final")],
        capture_output=True, text=True, check=False, cwd="/",
    )  # fmt: skip
    assert code.returncode == 0, code.stderr[-2000:]
    assert json.loads(code.stdout.splitlines()[-1]) == [captions] * 3
    after = load_file(tmp_path / "final" / "model.safetensors")
    assert after.keys() == before.keys()
    changed = {part_of(name) for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"projector", "regions", "language_model"}
    assert digest == hashlib.sha256((region_checkpoint / "model.safetensors").read_bytes()).hexdigest()


def test_adapters_resume_to_the_same_weights(tmp_path, region_checkpoint):
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    settings = [LORA, "trainer.gradient_checkpointing=true"]
    train(make_run(region_checkpoint, straight, *settings))
    make_trainer(make_run(region_checkpoint, broken, *settings)).train()
    (broken / "checkpoint-4" / "trainer_state.json").unlink()
    train(make_run(region_checkpoint, broken, *settings, "resume=true"))
    first, second = (load_file(folder / "final" / "model.safetensors") for folder in (straight, broken))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_adapters_need_the_language_model_and_leave_the_rest_whole(tiny_model):
    with pytest.raises(ValueError, match="add 'language_model'"):
        TrainConfig(parts=["projector"], lora=LoraConfig())
    model = prepare_parts(tiny_model(region_conditioning="vision"), TrainConfig(lora=LoraConfig(rank=2)))
    assert isinstance(model, peft.PeftModel)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {part_of(name) for name in trained} == set(PARTS)
    assert all("lora_" in name for name in trained if part_of(name) == "language_model")


def test_moving_average_follows_its_definition(tiny_model):
    model = tiny_model()
    model.vision_tower.requires_grad_(False)
    average = MovingAverage(model, decay=0.9)
    average.start()
    weight = model.lm_head.weight
    expected, state = weight.detach().clone(), type("State", (), {"global_step": 0})()
    for step in range(5):
        state.global_step = step
        weight.data.add_(1.0)
        average.on_optimizer_step(None, state, None)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * weight.detach()
    own = weight.detach().clone()
    with average.applied():
        assert torch.allclose(weight, expected, atol=1e-6)
    assert torch.equal(weight, own)
    assert not any(name.startswith("vision_tower") for name in average.average)


def test_a_run_finishes_with_its_moving_average(tmp_path, region_checkpoint):
    train(make_run(region_checkpoint, tmp_path, "train.ema_decay=0.5"))
    final = load_file(tmp_path / "final" / "model.safetensors")
    average = load_file(tmp_path / "checkpoint-4" / "moving_average.safetensors")
    last = load_file(tmp_path / "checkpoint-4" / "model.safetensors")
    assert all(torch.equal(final[name], average[name]) for name in average)
    assert not torch.equal(final["lm_head.weight"], last["lm_head.weight"])
    (tmp_path / "checkpoint-4" / "moving_average.safetensors").unlink()
    resumed = make_run(region_checkpoint, tmp_path, "train.ema_decay=0.5", "resume=true")
    with pytest.raises(FileNotFoundError, match="has no moving average"):
        train(resumed)


# --- frozen weights -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bf16_checkpoint(tiny_model, tiny_processor, tmp_path_factory):
    """A region model stored in bf16, as the published ones are, of widths that bitsandbytes takes on CPUs."""
    folder = tmp_path_factory.mktemp("bf16")
    model = tiny_model(text_config={"hidden_size": 64, "intermediate_size": 128})
    export(model, tiny_processor(model, max_tiles=1), folder, torch.bfloat16)
    return folder


@pytest.mark.parametrize("held", ["auto", "8bit", "4bit"])
def test_frozen_weights_take_less_memory_and_leave_no_trace_in_the_merged_checkpoint(tmp_path, bf16_checkpoint, held):
    if held in QUANTIZED:
        pytest.importorskip("bitsandbytes", reason="needs the extra quantization")
    looked_at = "evaluation={source: {kind: scenes, seed: 2, samples: 1}, steps: 4}"
    settings = [LORA, f"train.frozen_weights={held}", "trainer.bf16=true", looked_at]
    counts = count_parameters(AutoModel.from_pretrained(bf16_checkpoint, trust_remote_code=True))
    run = make_run(bf16_checkpoint, tmp_path, *settings)
    trainer = make_trainer(run)
    frozen = {p.dtype for name, p in trainer.model.named_parameters() if ".base_layer." in name}
    assert frozen == {"auto": {torch.bfloat16}, "8bit": {torch.int8}, "4bit": {torch.uint8}}[held]
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}
    original = trainer.model.get_base_model().vision_tower.state_dict()
    assert {value.dtype for value in original.values()} == {torch.bfloat16}
    assert count_parameters(trainer.model)["vision_tower"]["total"] == counts["vision_tower"]["total"]
    adapters = sum(p.numel() for name, p in trainer.model.named_parameters() if "lora_" in name)
    total = count_parameters(trainer.model)["language_model"]["total"]
    assert total == counts["language_model"]["total"] + adapters
    trainer.train()
    finish(run, trainer)
    before = load_file(bf16_checkpoint / "model.safetensors")
    after = load_file(tmp_path / "final" / "model.safetensors")
    assert after.keys() == before.keys()
    for name, value in before.items():
        if part_of(name) == "vision_tower" or "embed_tokens" in name or "norm" in name:
            assert torch.equal(after[name], value.float()), name
    adapter = load_file(tmp_path / "final" / "adapter" / "adapter_model.safetensors")
    name = "language_model.layers.0.mlp.up_proj"
    low, high = (adapter[f"base_model.model.{name}.lora_{side}.weight"].float() for side in "AB")
    expected = (before[f"{name}.weight"].float() + 2 * high @ low).bfloat16().float()  # alpha / rank = 2
    assert torch.allclose(after[f"{name}.weight"], expected, rtol=0.01)
    assert not torch.equal(after[f"{name}.weight"], before[f"{name}.weight"].float())
    AutoModel.from_pretrained(tmp_path / "final", trust_remote_code=True)


def test_frozen_parts_without_adapters_stay_as_they_are_stored(tmp_path, bf16_checkpoint, region_checkpoint):
    settings = ["train.parts=[projector]", "trainer.bf16=true"]
    model = make_trainer(make_run(bf16_checkpoint, tmp_path, *settings)).model
    assert {part_of(name) for name, p in model.named_parameters() if p.dtype == torch.float32} == {"projector"}
    train(make_run(bf16_checkpoint, tmp_path / "run", *settings))
    before = load_file(bf16_checkpoint / "model.safetensors")
    after = load_file(tmp_path / "run" / "final" / "model.safetensors")
    changed = {part_of(name) for name in before if not torch.equal(before[name].float(), after[name])}
    assert changed == {"projector"}
    whole = make_trainer(make_run(region_checkpoint, tmp_path / "fp32", *settings)).model
    assert {p.dtype for p in whole.parameters()} == {torch.float32}  # rounding them would be a loss


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["train.frozen_weights=half"], "must be one of"),
        (["train.frozen_weights=4bit", "trainer.bf16=true"], "add train.lora"),
        ([LORA, "train.frozen_weights=4bit"], "needs trainer.bf16=true"),
        ([LORA, "train.frozen_weights=8bit", "trainer.bf16=true", "init_from=null", "preset=8b"], "needs init_from"),
    ],
)
def test_frozen_weights_that_cannot_be_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        make_run("absent", tmp_path, *settings)
