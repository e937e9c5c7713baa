"""The HF Trainer for PerceptionDLM: the loss of equation 2 over passes and processes, learning rates by part,
checkpoints that are whole or not there, and the numbers a run reports."""

import math
import shutil
from pathlib import Path

import torch
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from perceptiondlm.checkpoints.folder import require_space
from perceptiondlm.training.config import RunConfig
from perceptiondlm.training.data.batches import POOL, LengthGroupedBatches
from perceptiondlm.training.data.streaming import StreamOrder
from perceptiondlm.training.ema import MovingAverage
from perceptiondlm.training.meter import Meter
from perceptiondlm.training.modules import parameter_groups, plain_model
from perceptiondlm.training.recomputation import recomputation_kwargs
from perceptiondlm.training.sharding import GradientGuard, checkpoint_bytes, exact_policy, own_class, whole_weights


# Settings that a checkpoint's optimizer remembers, and what they are called there.
GROUP_SETTINGS = {
    "trainer.learning_rate": ("initial_lr",),
    "train.learning_rates": ("initial_lr",),
    "trainer.weight_decay": ("weight_decay",),
    "trainer.adam_beta1": ("betas",),
    "trainer.adam_beta2": ("betas",),
    "trainer.adam_epsilon": ("eps",),
}


class PerceptionDLMTrainer(Trainer):
    """HF Trainer with the masked-diffusion loss.

    Args:
        run: the configuration of the run.
        checkpoint: where it goes on from, if it does.
    """

    def __init__(self, *args, run: RunConfig, checkpoint: Path | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.run, self.checkpoint = run, checkpoint
        self.model_accepts_loss_kwargs = True  # the loss is divided by the items of all passes and processes
        self.meter = Meter(self.args.device)
        self.average = None
        if run.train.ema_decay is not None:
            if self.is_deepspeed_enabled:
                raise ValueError(
                    "train.ema_decay follows fp32 weights, which DeepSpeed hides: use FSDP2 or leave it out"
                )
            self.average = MovingAverage(self.model, run.train.ema_decay)
            self.add_callback(self.average)

    def create_accelerator_and_postprocess(self):
        """Under FSDP2 the loss stays in fp32."""
        super().create_accelerator_and_postprocess()
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is not None:
            if plugin.fsdp_version != 2:
                raise ValueError(
                    f"fsdp_version must be 2, got {plugin.fsdp_version}: see training/accelerate/node_fsdp2.yaml"
                )
            plugin.mixed_precision_policy = exact_policy(plugin.mixed_precision_policy)

    def whole_weights(self):
        """A context in which every process has the whole weights; all processes enter it together."""
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        return whole_weights(self.model, plugin is None or plugin.reshard_after_forward)

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        """What transformers prepares, but for two things.

        With checkpointing it lets gradients flow into every embedding, hence through a frozen vision tower, in vain.
        DeepSpeed steps inside backward: what is wrong with a gradient must be noticed there.
        """
        model = plain_model(self.model)
        reentrant = recomputation_kwargs(self.args).get("use_reentrant", False)
        if getattr(model, "_require_grads_hooks", None) and not reentrant:
            model.disable_input_require_grads()
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if self.is_deepspeed_enabled:
            GradientGuard(self.model_wrapped, self._require_finite)
        return prepared

    def _prepare_input(self, data):
        """Batches keep their precision: the model casts what it computes with, DeepSpeed would cast everything."""
        return data.to(self.args.device) if isinstance(data, torch.Tensor) else super()._prepare_input(data)

    # --- data and optimizer -------------------------------------------------------------------------------------------

    def _get_train_sampler(self, train_dataset=None):
        """Batches of similar length, or a plain shuffle; the places of a stream in their order."""
        size, processes = self.args.train_batch_size, self.args.world_size
        if self.run.data.streaming:
            return StreamOrder(self.train_dataset, size, processes, self.args.dataloader_num_workers)
        pool = POOL if self.run.data.group_by_length else 1
        return LengthGroupedBatches(self.train_dataset, size, self.args.seed, processes, pool)

    def create_optimizer(self, model=None):
        """The optimizer of `trainer.optim`, with a learning rate for each part."""
        model = self.model if model is None else model
        if self.optimizer is None:  # type: ignore[has-type]
            decayed = set(self.get_decay_parameter_names(model))
            rates, rate = self.run.train.learning_rates, self.args.learning_rate
            groups = parameter_groups(model, decayed, self.args.weight_decay, rates, rate)
            kind, settings = self.get_optimizer_cls_and_kwargs(self.args, model)
            self.optimizer = kind(groups, **settings)
        return self.optimizer

    def _load_optimizer_and_scheduler(self, checkpoint):
        """A checkpoint brings its rates and decays along: those that `resume_with` changes are the new ones."""
        before = [dict(group) for group in self.optimizer.param_groups]
        super()._load_optimizer_and_scheduler(checkpoint)
        changed = {
            key for name in self.run.resume_with for key in GROUP_SETTINGS.get(".".join(name.split(".")[:2]), ())
        }
        if checkpoint is None or not changed:
            return
        for group, given in zip(self.optimizer.param_groups, before, strict=True):
            group.update({key: given[key] for key in changed})
        if "initial_lr" in changed:
            set_rates(self.optimizer, self.lr_scheduler)

    # --- loss ---------------------------------------------------------------------------------------------------------

    def _get_num_items_in_batch(self, batch_samples, device):
        """What the loss of one optimizer step is divided by: items of all its passes, on all processes.

        None for the `released` weighting, which divides every pass by its own items and averages passes.
        """
        if self.run.loss.weighting == "released":
            return None
        items = sum(loss_items(batch, self.run.loss.weighting) for batch in batch_samples)
        return self.accelerator.gather(torch.as_tensor(items, device=device)).sum().clamp(min=1)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Steps 1 to 4 of the model's forward: condition, noise, denoise, equation 2.

        Every parameter takes part in every pass, so that processes which share weights run the same modules, and a step
        is the same however it is spread: AdamW treats a gradient of zero unlike none.
        """
        settings = {"loss_weighting": self.run.loss.weighting, "use_all_parts": True}
        outputs = model(**inputs, **settings, num_items=num_items_in_batch)
        loss = outputs.loss
        if num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # gradients are averaged over processes
        if model.training:
            self.meter.add(inputs, outputs.token_losses, outputs.masked)
        return (loss, outputs) if return_outputs else loss

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Forward and backward of one pass; a loss that is no number ends the run before it reaches the weights."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._require_finite("loss", loss.item())
        return loss

    def _get_grad_norm(self, model, grad_norm=None):
        """The gradient's norm; only fp16's loss scaling may see one that is no number."""
        norm = super()._get_grad_norm(model, grad_norm)
        if self.accelerator.scaler is None and norm is not None:
            self._require_finite("gradient norm", float(norm))
        return norm

    def _require_finite(self, name: str, value: float) -> None:
        if not math.isfinite(value):
            raise FloatingPointError(
                f"the {name} is {value} at step {self.state.global_step + 1}. The run stops before weights take it: "
                "checkpoints up to here are good. Go on with a lower rate or less noise in it: --resume "
                "resume_with='[trainer.learning_rate]' trainer.learning_rate=... (or trainer.max_grad_norm)"
            )

    # --- reporting ----------------------------------------------------------------------------------------------------

    def log(self, logs, start_time=None):
        """Beside the loss: loss by noise level, speed and padding since the last time."""
        if "loss" in logs:
            logs = {**logs, **self.measure()}
        super().log(logs, start_time)

    def measure(self) -> dict[str, float]:
        """What the meter counted since the last time, on all processes, which must all call this."""
        return self.meter.drain(lambda counts: self.accelerator.reduce(counts, "sum"))

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model, trial):
        """Write a checkpoint; when it fails, nothing of it stays, and older ones are left alone."""
        folder = Path(self.args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        if self.args.should_save:
            require_space(folder, self.checkpoint_bytes())
        try:
            super()._save_checkpoint(model, trial)
        except Exception as error:
            if self.args.should_save:
                shutil.rmtree(folder, ignore_errors=True)
            raise OSError(f"checkpoint {folder} could not be written, older ones are intact: {error}") from error

    def checkpoint_bytes(self) -> int:
        """Size of a checkpoint of this run."""
        kind = "fsdp" if self.is_fsdp_enabled else "deepspeed" if self.is_deepspeed_enabled else ""
        adapters, average = self.run.train.lora is not None, self.average is not None
        return checkpoint_bytes(self.model.parameters(), kind, self.args.save_only_model, adapters, average)

    def _save(self, output_dir=None, state_dict=None):
        with own_class(self.model):
            super()._save(output_dir, state_dict)

    def save_model(self, output_dir=None, _internal_call=False):
        """Weights as transformers saves them, and their moving average."""
        super().save_model(output_dir, _internal_call)
        if self.average is not None:
            self.average.save(output_dir or self.args.output_dir, self.args.should_save)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.average is not None:
            self.average.load(resume_from_checkpoint)


def set_rates(optimizer, schedule) -> None:
    """Let a schedule go on from where it is with the groups' `initial_lr`."""
    if not hasattr(schedule, "lr_lambdas"):
        raise ValueError(f"{type(schedule).__name__} depends on its past: a run with it cannot go on at another rate")
    schedule.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]
    for group, factor in zip(optimizer.param_groups, schedule.lr_lambdas, strict=True):
        group["lr"] = group["initial_lr"] * factor(schedule.last_epoch)
    schedule._last_lr = [group["lr"] for group in optimizer.param_groups]


def loss_items(batch: dict[str, torch.Tensor], weighting: str) -> torch.Tensor:
    """Items that the loss of a batch is divided by: supervised tokens, of which `masked` counts those that are masked.

    Where the noise covers whole blocks (`supervise_markers`), a marker and a terminator belong to every answer of a
    region that has slots.
    """
    supervised_AW, masked_AW = batch["labels"] != -100, batch["answer_masked"]
    if extra := masked_AW.shape[1] - supervised_AW.shape[1]:
        num_regions = batch["num_regions"]
        targets_B = num_regions.clamp(min=1)
        copies = len(supervised_AW) // int(targets_B.sum())
        marked_A = (num_regions > 0).repeat_interleave(targets_B * copies) & supervised_AW.any(dim=1)
        ends_A1 = marked_A[:, None]
        supervised_AW = torch.cat((ends_A1, supervised_AW, ends_A1.expand(-1, extra - 1)), dim=1)
    if weighting == "masked":
        supervised_AW = supervised_AW & masked_AW
    return supervised_AW.sum()
