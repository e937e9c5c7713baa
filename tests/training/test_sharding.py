"""Weights spread over two processes by FSDP2 on a CPU mesh: the same run as one process; and what DeepSpeed needs."""

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from accelerate.utils.deepspeed import DeepSpeedEngineWrapper
from miniature_runs import log_of, losses, miniature, together, weights, write_miniature
from safetensors.torch import load_file
from sharded_on_cpu import main_sharded
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import AutoModel

from perceptiondlm.training.data.noise import probability, probability_bits
from perceptiondlm.training.sharding import GradientGuard, checkpoint_bytes, exact_policy
from perceptiondlm.training.train import make_trainer, train


# One sample a pass: in most steps one process has regions, or an image, and the other does not.
SETTINGS = [
    "trainer.per_device_train_batch_size=1", "trainer.max_steps=6", "trainer.save_steps=3", "evaluation.steps=3",
    "train.ema_decay=0.5", "export_dtype=float32", "data.group_by_length=false",
]  # fmt: skip


pytestmark = pytest.mark.usefixtures("one_thread")


def text_alone(folder: Path) -> str:
    """`data.sources`: scenes, and questions without any image."""
    folder.mkdir()
    turns = [{"from": "human", "value": "What color?"}, {"from": "gpt", "value": "a red one"}]
    rows = [{"id": str(i), "images": [], "conversations": json.dumps(turns)} for i in range(5)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "part.parquet")
    scenes = "{kind: scenes, seed: 1, samples: 7, conversation_share: 0.3}"
    return f"data.sources=[{scenes}, {{kind: conversations, path: {folder}}}]"


def sharded(folder: Path, *settings: str) -> None:
    """Run the miniature under FSDP2 in two processes."""
    arguments = [str(write_miniature(folder)), *settings, "trainer.ddp_backend=gloo"]
    together(main_sharded, arguments, folder / "errors.txt")


def test_two_processes_that_share_weights_are_one_process(tmp_path):
    """Step, evaluation with generation, moving average, checkpoint, export, and resuming from sharded weights."""
    one, two = tmp_path / "one", tmp_path / "two"
    sources = text_alone(tmp_path / "set")
    train(miniature(one, *SETTINGS, sources, "trainer.gradient_accumulation_steps=4"))
    sharded(two, *SETTINGS, sources)
    assert (two / "checkpoint-3" / "pytorch_model_fsdp.bin").is_file()  # weights were shared
    assert losses(two / "final") == pytest.approx(losses(one / "final"), abs=1e-5)
    for name in ("final/model", "checkpoint-3/model", "checkpoint-6/moving_average"):
        alone, shared = (load_file(folder / f"{name}.safetensors") for folder in (one, two))
        assert alone.keys() == shared.keys()
        assert max(float((alone[key] - shared[key]).abs().max()) for key in alone) < 1e-5, name
    pictures = [(folder / "pictures" / "step-000006-0.png").read_bytes() for folder in (one, two)]
    assert pictures[0] == pictures[1]  # the same captions
    for folder in (two / "final", two / "checkpoint-3"):  # each with its code
        AutoModel.from_pretrained(folder, trust_remote_code=True)
    straight = weights(two / "final")
    for folder in ("final", "checkpoint-6"):
        shutil.rmtree(two / folder)
    sharded(two, *SETTINGS, sources, "--resume")
    resumed = weights(two / "final")
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


def test_mixed_precision_of_shared_weights_leaves_the_loss_in_fp32(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    settings = ["trainer.max_steps=3", "trainer.bf16=true", "evaluation.steps=3"]
    train(miniature(one, *settings, "trainer.gradient_accumulation_steps=4"))
    sharded(two, *settings)
    assert losses(two / "final") == pytest.approx(losses(one / "final"), abs=0.02)
    for folder in (one, two):  # captions of fp32 weights under autocast, and of bf16 ones put together
        assert any("scenes_average" in row for row in log_of(folder / "final"))
    rounded = torch.tensor(losses(two / "final")).bfloat16().tolist()
    assert rounded != losses(two / "final")
    policy = exact_policy(MixedPrecisionPolicy(torch.bfloat16, torch.bfloat16, torch.bfloat16))
    assert (policy.param_dtype, policy.reduce_dtype, policy.output_dtype) == (torch.bfloat16, torch.float32, None)
    assert not policy.cast_forward_inputs


def test_no_cast_of_a_batch_changes_its_noise(tmp_path, monkeypatch):
    """What DeepSpeed and FSDP2 do to a batch: floating tensors become bf16."""
    trainer = make_trainer(miniature(tmp_path, "loss.weighting=elbo"))
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    cast = {name: value.bfloat16() if value.is_floating_point() else value for name, value in batch.items()}
    with torch.no_grad():
        exact, rounded = (trainer.model(**inputs, loss_weighting="elbo") for inputs in (batch, cast))
    assert torch.equal(exact.masked, rounded.masked)
    weighted = [out.token_losses / probability(batch["mask_probability"]) for out in (exact, rounded)]
    supervised = (batch["labels"] != -100).sum()
    assert float(rounded.loss) == pytest.approx(float(weighted[1].sum() / supervised), rel=1e-6)
    p = torch.rand(1000, 1)
    assert torch.equal(probability(probability_bits(p)), p)
    monkeypatch.setattr(trainer, "is_deepspeed_enabled", True)
    prepared = trainer._prepare_inputs(batch)
    assert {name: value.dtype for name, value in prepared.items()} == {k: v.dtype for k, v in batch.items()}


@pytest.mark.parametrize("conditioning", ["replay", "vision"])
def test_idle_parts_change_nothing_and_every_parameter_gets_a_gradient(tmp_path, conditioning):
    trainer = make_trainer(
        miniature(tmp_path, text_alone(tmp_path / "set"), f"model.region_conditioning={conditioning}")
    )
    model = trainer.model
    batch = trainer.data_collator([trainer.train_dataset[len(trainer.train_dataset) - 1]])
    assert "pixel_values" not in batch
    plain = model(**batch).loss
    plain.backward()
    without = {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    model.zero_grad()
    everything = model(**batch, use_all_parts=True).loss
    everything.backward()
    assert everything == plain
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert torch.equal(parameter.grad, without.get(name, torch.zeros_like(parameter))), name
    assert len(without) < sum(p.requires_grad for p in model.parameters())


class Engine:
    """What accelerate asks of DeepSpeed's engine: backward, and a step that takes the weights."""

    def __init__(self, module):
        self.module, self.optimizer = module, torch.optim.SGD(module.parameters(), 0.1)

    def set_gradient_accumulation_boundary(self, is_boundary):
        pass

    def backward(self, loss):
        loss.backward()

    def step(self):
        self.optimizer.step()
        self.optimizer.zero_grad()


def test_a_gradient_that_is_no_number_is_noticed_before_deepspeed_steps():
    module = torch.nn.Linear(3, 1)
    before = module.weight.detach().clone()
    engine = Engine(module)
    wrapper = DeepSpeedEngineWrapper(engine)

    def complain(name, value):
        raise FloatingPointError(f"the {name} is {value}")

    GradientGuard(engine, complain)
    wrapper.backward(module(torch.ones(2, 3)).sum())
    after = module.weight.detach().clone()
    assert not torch.equal(before, after)
    wrapper.backward(module(torch.tensor([[float("nan")] * 3])).sum(), sync_gradients=False)
    with pytest.raises(FloatingPointError, match="the gradient is nan"):
        wrapper.backward(module(torch.ones(2, 3)).sum())
    assert torch.equal(module.weight, after)


def test_sharding_that_would_not_happen_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match=r"FSDP does not run with trainer\.use_cpu=true"):
        make_trainer(miniature(tmp_path))


def test_a_checkpoint_takes_what_is_estimated(tmp_path):
    """Whole weights here, a sharded run's in the formula: weights twice under FSDP, fp32 copies under DeepSpeed."""
    trainer = make_trainer(miniature(tmp_path, "train.ema_decay=0.9", "trainer.max_steps=3"))
    trainer.train()
    written = sum(path.stat().st_size for path in (tmp_path / "checkpoint-3").iterdir())
    assert trainer.checkpoint_bytes() <= written < trainer.checkpoint_bytes() * 1.4  # code, tokenizer and states beside
    parameters = [torch.nn.Parameter(torch.zeros(10)), torch.nn.Parameter(torch.zeros(6).bfloat16(), False)]
    plain = checkpoint_bytes(parameters, "", False, False, False)
    assert plain == (10 * 4 + 6 * 2) + 8 * 10
    assert checkpoint_bytes(parameters, "fsdp", False, False, False) == plain + 10 * 4 + 6 * 2
    assert checkpoint_bytes(parameters, "deepspeed", False, False, False) == plain + 10 * 4 + 6 * 2 + 4 * 10
    assert checkpoint_bytes(parameters, "", True, True, True) == 10 * 4 + 4 * 10
