"""Run configurations: types, overrides, refusals by name, and the published settings of every stage."""

from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from perceptiondlm.training.config import RunConfig, load_run_config
from perceptiondlm.training.train import idle_cpus, trainer_arguments
from perceptiondlm.training.train import main as train_command


CONFIGS = Path(__file__).parents[2] / "training" / "configs"
RECIPE = CONFIGS / "scenes.yaml"
# Table 3 of the paper and section 4.1: batch, longest sequence, learning rate, trained parts, samples.
PUBLISHED = {
    "stage1_alignment": (512, 2048, 1e-3, {"projector"}, 10**6),
    "stage2_midtraining": (512, 4096, 4e-5, {"projector", "language_model"}, 14 * 10**6),
    "stage3_instruction": (512, 4096, 4e-5, {"projector", "language_model"}, 22 * 10**6),
    "stage4_refinement": (512, 4096, 4e-5, {"projector", "language_model"}, 15 * 10**6),
    "regions": (256, 4096, 4e-5, {"vision_tower", "projector", "regions", "language_model"}, None),
}


def test_overrides_are_typed_and_reach_into_lists():
    overrides = ["trainer.max_steps=3", "data.sources.0.samples=40", "trainer.learning_rate=1e-3", "resume=true"]
    run = load_run_config(RECIPE, overrides)
    assert run.data.sources[0].samples == 40
    assert run.data.sources[0].seed == 1  # the rest of the section stays
    assert (run.trainer["max_steps"], run.resume) == (3, True)
    assert run.trainer["learning_rate"] == 1e-3  # a number although YAML 1.1 reads a string


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.sourcez=3", "unknown setting 'data.sourcez', did you mean 'data.sources'"),
        ("data.sources.0.sample=3", "unknown setting 'data.sources.0.sample', did you mean 'data.sources.0.samples'"),
        ("trainer.learning_rat=1", "did you mean 'trainer.learning_rate'"),
        ("model.atention_layout=full", "did you mean 'model.attention_layout'"),
        ("model.text_config.hiden_size=8", "did you mean 'model.text_config.hidden_size'"),
        ("processor.max_tile=1", "did you mean 'processor.max_tiles'"),
        ("train.parts=[projektor]", "did you mean 'train.parts.projector'"),
        ("train.learning_rates={vision_tower: high}", "train.learning_rates.vision_tower must be of type float"),
        ("train={parts: [projector], learning_rates: {vision_tower: 1e-5}}", "leaves frozen"),
        ("data.sources.1.samples=3", "'1' is no index of a list of 1"),
        ("data.sources.0.samples=many", "data.sources.0.samples must be of type int"),
        ("data.sources={kind: scenes}", "data.sources must be of type list"),
        ("trainer.max_steps=few", "trainer.max_steps must be of type int"),
        ("trainer.bf16=yes please", "trainer.bf16 must be of type bool"),
        ("train.ema_decay=2", r"train.ema_decay must be in \(0, 1\)"),
        ("train.lora={rank: 0}", "rank and alpha must be at least 1"),
        ("train.lora={target_modules: '('}", "is no pattern"),
        ("train.parts=[]", "nothing would be trained"),
        ("preset=80b", "preset must be one of"),
        ("nonsense", "key=value"),
        ("loss=3", "loss must be a section"),
        ("loss.num_slots.more=3", "'num_slots' is a value, not a section"),
        ("resume=3", "resume must be of type bool"),
    ],
)
def test_wrong_overrides_are_refused_by_name(override, message):
    with pytest.raises(ValueError, match=message):
        load_run_config(RECIPE, [override])


def test_missing_and_broken_files_are_named(tmp_path):
    path = tmp_path / "run.yaml"
    for content, message in (("trainer: {}\n", "export_dir"), ("a: [", "is not YAML"), ("- 1\n", "mapping")):
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            load_run_config(path)
    with pytest.raises(FileNotFoundError, match="absent"):
        load_run_config(tmp_path / "absent.yaml")


def test_a_stored_configuration_starts_the_same_run(tmp_path):
    run = load_run_config(RECIPE, ["train.lora={rank: 4}", "train.ema_decay=0.9"])
    path = tmp_path / "run.yaml"
    path.write_text(run.to_yaml())
    assert load_run_config(path) == run


@pytest.mark.parametrize("stage", PUBLISHED)
def test_stages_hold_the_published_settings_and_plan_without_data(stage, capsys, monkeypatch):
    run = load_run_config(CONFIGS / f"{stage}.yaml")
    batch, length, rate, parts, samples = PUBLISHED[stage]
    assert (run.batch_size, run.data.max_length, run.trainer["learning_rate"]) == (batch, length, rate)
    assert set(run.train.parts) == parts
    assert sum(source.samples or 0 for source in run.data.sources) == (samples or 0)
    assert run.trainer["num_train_epochs"] == 1
    assert (run.trainer["lr_scheduler_type"], run.trainer["warmup_steps"]) == ("cosine", 0.03)
    assert run.trainer["bf16"]
    assert run.trainer["gradient_checkpointing"]
    assert (run.loss.weighting, run.loss.noise_copies, run.loss.noise_level) == ("elbo", 1, "sample")
    monkeypatch.setenv("WORLD_SIZE", "1")
    run.trainer |= {"use_cpu": True, "per_device_train_batch_size": 2}
    assert trainer_arguments(run).gradient_accumulation_steps == batch // 2
    assert train_command([str(CONFIGS / f"{stage}.yaml"), "--dry-run"]) == 0
    assert "days" in capsys.readouterr().out


def test_stages_start_from_one_another():
    runs = [load_run_config(CONFIGS / f"{stage}.yaml") for stage in PUBLISHED]
    for earlier, later in pairwise(runs):
        assert later.init_from == earlier.export_dir


def test_a_batch_size_that_does_not_divide_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="batch_size 512 is no multiple of the 12 samples"):
        trainer_arguments(load_run_config(CONFIGS / "stage1_alignment.yaml"))


def test_wrong_settings_end_the_command_with_one_line(capsys):
    assert train_command([str(RECIPE), "trainer.max_stepz=1"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("training stopped: unknown setting 'trainer.max_stepz'")
    assert error.count("\n") == 1


@pytest.mark.parametrize("path", sorted((CONFIGS.parent / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_configurations_are_read_and_name_layers_that_exist(path, tiny_model):
    config = load_config_from_file(str(path))
    processes = {"one_gpu": 1, "two_cpu_processes": 2, "nodes_zero2": 32}.get(path.stem, 8)
    assert (config.num_processes, config.num_machines) == (processes, 4 if processes == 32 else 1)
    layers = (config.fsdp_config or {}).get("fsdp_transformer_layer_cls_to_wrap", "")
    classes = {type(module).__name__ for module in tiny_model().modules()}
    assert {name for name in layers.split(",") if name} <= classes
    stage = (config.deepspeed_config or {}).get("zero_stage")
    assert stage == (int(path.stem[-1]) if "zero" in path.stem else None)
    clipping = (config.deepspeed_config or {}).get("gradient_clipping")
    assert clipping == ("auto" if "zero" in path.stem else None)  # trainer.max_grad_norm, as elsewhere


def test_a_run_needs_somewhere_to_start():
    with pytest.raises(ValueError, match="give init_from, preset or the sizes"):
        RunConfig(export_dir="a", trainer={"output_dir": "a"})


@pytest.mark.parametrize(("use_cpu", "threads", "told"), [(True, 1, True), (True, 64, False), (False, 1, False)])
def test_idle_cpus_are_pointed_out(use_cpu, threads, told, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    monkeypatch.setattr("torch.get_num_threads", lambda: threads)
    note = idle_cpus(SimpleNamespace(use_cpu=use_cpu, world_size=2))
    assert (note is not None) == told
    assert not told or "OMP_NUM_THREADS=4" in note
