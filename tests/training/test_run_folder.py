"""A run folder belongs to one run: starts beside checkpoints, other settings on resuming, and changes on purpose."""

import json
import shutil

import pytest
from miniature_runs import log_of, losses, miniature, weights, write_miniature

from perceptiondlm.training.run_folder import changed_settings
from perceptiondlm.training.train import main, make_trainer, train


pytestmark = pytest.mark.usefixtures("one_thread")


def rates_of(folder):
    return [row["learning_rate"] for row in log_of(folder / "final") if "loss" in row]


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """A run of six steps with checkpoints at 3 and 6."""
    folder = tmp_path_factory.mktemp("run")
    train(miniature(folder, "trainer.max_steps=6"))
    return folder


def test_a_start_beside_checkpoints_is_refused_before_anything_is_touched(finished_run, capsys):
    before = {path: path.stat().st_mtime_ns for path in finished_run.rglob("*")}
    assert main([str(finished_run / "miniature.yaml"), "trainer.max_steps=6"]) == 2
    error = capsys.readouterr().err
    assert f"{finished_run} belongs to a run already: it holds checkpoint-6" in error
    assert "--resume, or choose another trainer.output_dir" in error
    assert before == {path: path.stat().st_mtime_ns for path in finished_run.rglob("*")}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.sources.0.seed=5", "data.sources.0.seed was 1, is 5"),
        ("data.sources.0.samples=12", "data.sources.0.samples was 11, is 12"),
        ("loss.weighting=elbo", "loss.weighting was 'masked', is 'elbo'"),
        ("model.attention_layout=full", "model.attention_layout was None, is 'full'"),
        ("model.text_config.rms_norm_eps=1e-5", "model.text_config.rms_norm_eps was None, is 1e-05"),
        ("trainer.learning_rate=1e-4", "trainer.learning_rate was 0.003, is 0.0001"),
        ("trainer.max_steps=9", "trainer.max_steps was 6, is 9"),
        ("trainer.seed=1", "trainer.seed was 0, is 1"),
        ("trainer.max_grad_norm=0.5", "trainer.max_grad_norm was 1.0, is 0.5"),
        ("trainer.gradient_accumulation_steps=1", "samples per step was 4, is 2"),
        ("trainer.per_device_train_batch_size=4", "samples per step was 4, is 8; trainer.per_device_train_batch_size"),
        ("train.ema_decay=0.9", "train.ema_decay was None, is 0.9"),
        ("processor.max_tiles=2", "processor.max_tiles was 1, is 2"),
        ("tokenizer.vocab_size=520", "tokenizer.vocab_size was 512, is 520"),
    ],
)
def test_going_on_as_another_run_is_refused_by_name(finished_run, override, message):
    run = miniature(
        finished_run, *([] if "max_steps" in override else ["trainer.max_steps=6"]), override, "resume=true"
    )
    before = (finished_run / "run.yaml").read_text()
    with pytest.raises(ValueError, match="belongs to another run") as refused:
        make_trainer(run)
    assert message in str(refused.value)
    assert (finished_run / "run.yaml").read_text() == before


def test_what_does_not_reach_the_weights_may_differ(finished_run):
    run = miniature(
        finished_run, "trainer.max_steps=6", "resume=true", "trainer.logging_steps=3", "evaluation.steps=2",
        "export_dtype=float32", "trainer.save_steps=2", "trainer.max_grad_norm=1.0", "batch_size=4", "plan.samples=4",
        "trainer.dataloader_num_workers=1", f"data.prepared={finished_run}/prepared", "data.max_bad_share=0.1",
        f"export_dir={finished_run}/elsewhere",
    )  # fmt: skip
    assert make_trainer(run).checkpoint.name == "checkpoint-6"


def test_checkpoints_without_marks_belong_to_nobody(tmp_path):
    train(miniature(tmp_path, "trainer.max_steps=3"))
    (tmp_path / "started.json").unlink()
    with pytest.raises(ValueError, match=r"no run\.yaml and started\.json that say whose"):
        make_trainer(miniature(tmp_path, "trainer.max_steps=3", "resume=true"))


def test_a_rate_changed_on_purpose_is_the_rate_that_is_used(tmp_path):
    """A checkpoint's optimizer and schedule remember the old one."""
    constant = "trainer.lr_scheduler_type=constant"
    train(miniature(tmp_path, "trainer.max_steps=3", constant))
    more = ["trainer.max_steps=6", constant, "resume=true", "trainer.learning_rate=5e-4"]
    with pytest.raises(ValueError, match=r"trainer\.learning_rate was 0\.003, is 0\.0005; trainer\.max_steps"):
        make_trainer(miniature(tmp_path, *more))
    with pytest.raises(ValueError, match=r"resume_with names \['trainer\.warmup_step'\], which are no settings"):
        make_trainer(miniature(tmp_path, *more, "resume_with=[trainer.warmup_step, trainer.max_steps]"))
    path, names = write_miniature(tmp_path), "resume_with=[trainer.learning_rate, trainer.max_steps]"
    assert main([str(path), "trainer.max_steps=6", constant, "--resume", names, "trainer.learning_rate=5e-4"]) == 0
    assert rates_of(tmp_path) == [0.003] * 3 + [0.0005] * 3
    first, second = weights(tmp_path / "checkpoint-3"), weights(tmp_path / "checkpoint-6")
    moved = max(float((first[name] - second[name]).abs().max()) for name in first)
    assert 2e-4 < moved < 3 * 5e-4 * 1.7  # three steps of AdamW, not of six times their size
    assert len(losses(tmp_path / "final")) == 6
    assert json.loads((tmp_path / "started.json").read_text())["samples_per_step"] == 4


def test_a_change_on_purpose_survives_a_kill_before_the_next_checkpoint(tmp_path):
    """The same command again, or `--resume` alone: the checkpoint still holds the rate of before."""
    constant, steps = "trainer.lr_scheduler_type=constant", "trainer.max_steps=5"
    train(miniature(tmp_path, steps, constant))
    shutil.rmtree(tmp_path / "checkpoint-5")
    changed = ["resume=true", "trainer.learning_rate=5e-4", constant, steps]
    make_trainer(miniature(tmp_path, *changed, "resume_with=[trainer.learning_rate]"))  # and no step further
    assert make_trainer(miniature(tmp_path, *changed, "resume_with=[trainer]")).checkpoint.name == "checkpoint-3"
    train(miniature(tmp_path, *changed))
    assert rates_of(tmp_path) == [0.003] * 3 + [0.0005] * 2


def test_a_section_covers_its_settings(tmp_path):
    plain, rates = miniature(tmp_path), miniature(tmp_path, "train.learning_rates={vision_tower: 1e-4}")
    assert dict(changed_settings(plain, rates)) == {"train.learning_rates.vision_tower": (None, 1e-4)}
    train(miniature(tmp_path, "trainer.max_steps=1", "trainer.save_steps=1"))
    other = ["trainer.max_steps=1", "trainer.save_steps=1", "resume=true", "data.sources.0={kind: scenes, samples: 12}"]
    with pytest.raises(
        ValueError, match=r"data\.sources\.0\.conversation_share was 0\.3, is 0\.0; data\.sources\.0\.sam"
    ):
        make_trainer(miniature(tmp_path, *other))
    assert make_trainer(miniature(tmp_path, *other, "resume_with=[data.sources]")).checkpoint


def test_a_checkpoint_of_weights_alone_is_not_gone_on_from(tmp_path):
    train(miniature(tmp_path, "trainer.max_steps=3", "trainer.save_only_model=true"))
    with pytest.raises(ValueError, match="checkpoint-3 holds weights alone"):
        make_trainer(miniature(tmp_path, "trainer.max_steps=3", "resume=true"))


def test_resume_with_is_for_resuming(tmp_path):
    with pytest.raises(ValueError, match="resume is off: add --resume"):
        miniature(tmp_path, "resume_with=[trainer.learning_rate]")


def test_settings_that_say_the_same_in_other_words_do_not_differ(tmp_path):
    plain, explicit = miniature(tmp_path), miniature(tmp_path, "trainer.weight_decay=0.0", "trainer.adam_beta2=0.999")
    assert dict(changed_settings(plain, explicit)) == {}
