"""The planner: its formulas against numbers by hand and against what torch counts; what fits; calibration."""

import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from perceptiondlm.modeling_perceptiondlm import PerceptionDLMForConditionalGeneration
from perceptiondlm.scripts.cli import main as command
from perceptiondlm.training.calibrate import calibrate, slice_of, synthetic_batch
from perceptiondlm.training.config import load_run_config
from perceptiondlm.training.footprint import (
    Machine,
    flop_per_sample,
    footprint,
    frozen_bytes,
    layer_bytes,
    planned_config,
    planned_sequence,
    sample_bytes,
    state_bytes,
)
from perceptiondlm.training.modules import count_parameters, prepare_parts
from perceptiondlm.training.planner import make_plan, micro_batch, planned_samples, planned_steps
from perceptiondlm.training.recomputation import recompute_activations


CONFIGS = Path(__file__).parents[2] / "training" / "configs"
RECIPE = CONFIGS / "scenes.yaml"
BASE_STAGES = ("stage1_alignment", "stage2_midtraining", "stage3_instruction", "stage4_refinement")
# Two parts of a run: 1,000 weights that train and 9,000 that do not.
COUNTS = {"projector": {"total": 1000, "trained": 1000}, "language_model": {"total": 9000, "trained": 0}}


pytestmark = pytest.mark.usefixtures("one_thread")


def small_run(*overrides: str):
    """The embedded recipe with text of 8 tokens a sample: D = I / 3 = 256, 4 layers, V = 1,024."""
    return load_run_config(RECIPE, ["plan.tiles=1", *overrides])


# --- formulas by hand -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("machine", "frozen", "expected"),
    [
        # weights that train: 4 bytes in fp32, 4 of gradient, 8 of moments; the others as they are held
        (Machine(1, sharding="ddp"), "float32", 1000 * 16 + 9000 * 4),
        (Machine(8, sharding="ddp"), "bfloat16", 1000 * 16 + 9000 * 2),
        # all weights in bf16; bf16 gradient, fp32 weight and moments of what trains on one GPU of four
        (Machine(4, sharding="zero2"), "float32", 10_000 * 2 + 1000 * (2 + 4 + 8) / 4),
        # everything on one GPU of four, and a layer with the table of tokens, twice, in bf16
        (Machine(4, sharding="fsdp"), "float32",
         (10_000 * 4 + 1000 * 12) / 4 + 2 * 2 * (4 * 256 * 256 + 3 * 256 * 768 + 1024 * 256)),
    ],
)  # fmt: skip
def test_weights_gradients_and_moments(machine, frozen, expected):
    assert state_bytes(COUNTS, planned_config(small_run()), machine, frozen) == expected


def test_frozen_weights_take_what_they_are_held_in():
    config = planned_config(small_run())
    layers = 4 * (4 * 256 * 256 + 3 * 256 * 768)  # attention and MLP
    assert frozen_bytes(layers + 100, config, "8bit") == layers + 200
    assert frozen_bytes(layers + 100, config, "4bit") == pytest.approx(layers * (4 + 0.127) / 8 + 200, rel=1e-3)


def test_state_is_what_torch_holds(tiny_model):
    """Plain data parallelism, after a step: weights, gradients and moments."""
    run = small_run("train.parts=[projector, language_model]", "trainer.gradient_checkpointing=false")
    config = slice_of(planned_config(run), 2)
    model = prepare_parts(PerceptionDLMForConditionalGeneration(config), run.train)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    model(**synthetic_batch(config, planned_sequence(run, config)), use_all_parts=True).loss.backward()
    optimizer.step()
    held = sum(p.nbytes + (0 if p.grad is None else p.grad.nbytes) for p in model.parameters())
    held += sum(t.nbytes for state in optimizer.state.values() for t in state.values() if t.ndim)
    assert state_bytes(count_parameters(model), config, Machine(1, sharding="ddp")) == held


def test_activations_by_hand():
    run = small_run("train.parts=[projector, language_model]")
    config, counts = planned_config(run), {**COUNTS, "vision_tower": {"total": 5, "trained": 0}}
    sequence = planned_sequence(run, config)
    sequence.image, sequence.text, sequence.answers, sequence.tiles = 64, 20, 16, 1
    layer = 2 * (8 * 256 + 3 * 768)  # bf16: eight vectors of the width, three of the MLP's
    assert layer_bytes(config.text_config, 2) == layer
    fixed = 10 * 16 * 1024 + 12 * 256 * 256  # scores in bf16 and fp32 with gradient; pixels
    assert sample_bytes(run, config, sequence, counts) == 100 * 4 * layer + fixed
    run.trainer["gradient_checkpointing"] = True
    assert sample_bytes(run, config, sequence, counts) == 100 * (4 * 4 * 256 + layer) + fixed
    counts["vision_tower"]["trained"] = 5
    tower = 256 * (4 * 4 * 256 + 2 * (8 * 256 + 2 * 768))  # 16 x 16 patches through four layers
    assert sample_bytes(run, config, sequence, counts) == 100 * (4 * 4 * 256 + layer) + fixed + tower


@pytest.mark.parametrize("checkpointing", ["true", "false"])
@pytest.mark.parametrize(
    "parts", ["[vision_tower, projector, regions, language_model]", "[projector]", "[projector, language_model]"]
)
def test_operations_are_those_that_torch_counts(parts, checkpointing):
    run = small_run(f"train.parts={parts}", "plan.tiles=3", f"trainer.gradient_checkpointing={checkpointing}")
    config = slice_of(planned_config(run), 4)
    sequence = planned_sequence(run, config)
    model = PerceptionDLMForConditionalGeneration._from_config(config, attn_implementation="eager")
    model = prepare_parts(model, run.train).train()
    if checkpointing == "true":
        recompute_activations(model)
        model.disable_input_require_grads()
    with FlopCounterMode(display=False) as counter:
        model(**synthetic_batch(config, sequence)).loss.backward()
    estimate = flop_per_sample(run, config, sequence, count_parameters(model))
    assert estimate == pytest.approx(counter.get_total_flops(), rel=0.12)


def test_steps_and_passes():
    assert micro_batch(32, 5) == (4, 8)  # the largest that fits and divides a GPU's share
    assert micro_batch(7, 5) == (1, 7)
    assert micro_batch(0.5, 3) == (1, 1)
    run = small_run("trainer.max_steps=-1", "trainer.num_train_epochs=2", "data.sources.0.samples=1000")
    assert planned_samples(run) == 1000
    assert planned_steps(run, 1000, 16) == 125
    assert planned_steps(small_run("trainer.max_steps=7"), 1000, 16) == 7
    assert planned_steps(run, None, 16) is None


def test_days_are_operations_over_speed():
    plan = make_plan(small_run("trainer.max_steps=100"), Machine(2, tflops=50.0, sharding="ddp"))
    seconds = 100 * plan.batch_size * plan.tflop_per_sample / (2 * 50.0)
    assert plan.days == pytest.approx(seconds / 86400)


# --- what fits ------------------------------------------------------------------------------------------------------


def test_a_card_of_24_gb_is_told_what_fits():
    with pytest.raises(ValueError, match="weights and optimizer take 129") as refused:
        stage_plan("stage2_midtraining", gpus=1, memory=24, sharding="ddp")
    for held in ("bfloat16", "8bit", "4bit"):
        assert f"train.lora='{{rank: 16}}' train.frozen_weights={held}" in str(refused.value)
    with pytest.raises(ValueError, match="What fits") as refused:
        stage_plan("stage2_midtraining", gpus=1, memory=16, sharding="ddp")
    assert "frozen_weights=bfloat16" not in str(refused.value)
    assert "frozen_weights=4bit" in str(refused.value)
    with pytest.raises(ValueError, match="nothing short of more GPUs"):
        stage_plan("stage2_midtraining", gpus=1, memory=6, sharding="ddp")


@pytest.mark.parametrize(("held", "gigabytes"), [("bfloat16", 18.1), ("8bit", 11.1), ("4bit", 7.7)])
def test_the_recipe_for_one_card_fits_it(held, gigabytes):
    """8.02 G weights of the language model and 0.41 G of the tower held so, 42 M of adapters, 36 M of the projector."""
    plan = stage_plan("finetune", f"train.frozen_weights={held}", gpus=1, memory=24, sharding="ddp")
    assert plan.state_gb == pytest.approx(gigabytes, abs=0.1)
    assert plan.micro_batch * plan.accumulation == 16


def test_what_is_said_to_fit_fits():
    taken = footprint(load_run_config(CONFIGS / "finetune.yaml"), Machine(1, 24, "ddp"))
    assert taken.free(Machine(1, 24, "ddp")) > taken.sample


# --- calibration ----------------------------------------------------------------------------------------------------


def test_calibration_measures_this_machine_and_the_plan_uses_it(capsys, monkeypatch):
    run = small_run("trainer.gradient_checkpointing=true")
    measured = calibrate(run, torch.device("cpu"), layers=1, passes=1)
    assert 1e-5 < measured.tflops < 100
    slow = make_plan(run, Machine(1, sharding="ddp", tflops=measured.tflops))
    assert slow.tokens_per_second == pytest.approx(
        measured.tflops / slow.tflop_per_sample * slow.sequence.tokens, rel=1e-6
    )
    arguments = ["plan", "--config", str(RECIPE), "--gpus", "1", "--sharding", "ddp", "--measure", "plan.tiles=1"]
    assert command(arguments) == 0
    printed = capsys.readouterr().out
    assert "measured on " in printed
    assert "TFLOP/s" in printed


# --- whole plans ----------------------------------------------------------------------------------------------------


def stage_plan(stage: str, *overrides: str, **machine):
    return make_plan(load_run_config(CONFIGS / f"{stage}.yaml", overrides), Machine(**machine))


def test_plan_agrees_with_the_papers_times_within_a_factor_of_two():
    """Three weeks for the base model and two days for the regions, on 32 H100."""
    base = sum(stage_plan(stage).days for stage in BASE_STAGES)
    assert 10.5 < base < 42
    assert 1 < stage_plan("regions").days < 4


def test_plan_counts_what_trains_and_what_memory_it_takes():
    first, second = stage_plan("stage1_alignment"), stage_plan("stage2_midtraining")
    total = sum(part["total"] for part in first.parameters.values())
    assert 8.4e9 < total < 8.5e9
    assert [name for name, part in first.parameters.items() if part["trained"]] == ["projector"]
    assert first.state_gb < second.state_gb  # gradients and moments of the projector alone
    assert first.steps == -(-(10**6) // 512)
    assert second.batch_size == second.machine.gpus * second.micro_batch * second.accumulation
    whole = stage_plan("stage2_midtraining", memory=200, gpus=8, sharding="ddp")
    trained = sum(part["trained"] for part in whole.parameters.values())
    assert whole.state_gb == pytest.approx((2 * (total - trained) + 16 * trained) / 1e9)  # frozen ones in bf16


def test_plan_scales_with_gpus_and_takes_a_measured_speed():
    many, few = stage_plan("regions", gpus=32), stage_plan("regions", gpus=8)
    assert few.days == pytest.approx(4 * many.days)
    measured = stage_plan("regions", tokens_per_second=2 * many.tokens_per_second)
    assert measured.days == pytest.approx(many.days / 2)
    longer = stage_plan("regions", "plan.samples=5400000")
    assert longer.days == pytest.approx(2 * many.days, rel=1e-3)


def test_plan_refuses_what_does_not_fit_and_says_what_would():
    with pytest.raises(ValueError, match=r"GB of a GPU\. What fits: .*--sharding zero2"):
        stage_plan("stage2_midtraining", sharding="ddp")
    assert stage_plan("stage2_midtraining", "train.lora={rank: 16}", sharding="ddp").state_gb < 19
    with pytest.raises(ValueError, match="gpus must be more than 0"):
        Machine(gpus=0)


def test_plan_command_prints_and_writes(tmp_path, capsys):
    path = tmp_path / "plan.json"
    arguments = [
        "plan",
        "--config",
        str(CONFIGS / "regions.yaml"),
        "--gpus",
        "8",
        "--memory",
        "141",
        "--json",
        str(path),
    ]
    assert command(arguments) == 0
    assert "8 of 141 GB" in capsys.readouterr().out
    assert json.loads(path.read_text())["steps"] == -(-2_700_000 // 256)
    assert command(["plan", "--config", str(RECIPE), "init_from=outputs/absent"]) == 2
    assert "name a preset to plan with" in capsys.readouterr().err
