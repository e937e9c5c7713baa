"""The HF Trainer for PerceptionDLM: batches of similar length, the loss of equation 2, scores on held-out scenes."""

import random
from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback

from perceptiondlm.evaluation.scenes import evaluate_scenes
from perceptiondlm.training.config import EvaluationConfig
from perceptiondlm.training.data import SceneDataset


class LengthGroupedBatches(Sampler[int]):
    """Indices in an order whose consecutive batches hold samples of similar length, batches themselves shuffled.

    Args:
        dataset: told the epoch through its `set_epoch`, because accelerate tells the sampler only.
        lengths: of every sample, in any unit.
        batch_size: samples per batch.
        seed: with the epoch, decides the order.
        pool: batches that are sorted together.
    """

    def __init__(self, dataset: SceneDataset, lengths: Sequence[int], batch_size: int, seed: int, pool: int = 50):
        self.dataset, self.lengths = dataset, lengths
        self.batch_size, self.seed, self.pool = batch_size, seed, pool
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        """Called before every epoch."""
        self.epoch = epoch
        self.dataset.set_epoch(epoch)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(random.Random(f"{self.seed}/{self.epoch}").getrandbits(62))
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        size = self.pool * self.batch_size
        full: list[list[int]] = []
        rest: list[list[int]] = []
        for start in range(0, len(order), size):
            pool = sorted(order[start : start + size], key=lambda index: self.lengths[index])
            batches = [pool[i : i + self.batch_size] for i in range(0, len(pool), self.batch_size)]
            for batch in batches:
                (full if len(batch) == self.batch_size else rest).append(batch)
        shuffled = [full[i] for i in torch.randperm(len(full), generator=generator).tolist()]
        return (index for batch in (*shuffled, *rest) for index in batch)  # short batches last


class PerceptionDLMTrainer(Trainer):
    """HF Trainer with the masked-diffusion loss and, when lengths are given, length-grouped batches.

    Args:
        loss_weighting: see `masked_diffusion_loss`.
        lengths: length of every training sample, or None for the Trainer's own sampling.
    """

    def __init__(self, *args, loss_weighting: str = "elbo", lengths: Sequence[int] | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.loss_weighting, self.lengths = loss_weighting, lengths
        self.model_accepts_loss_kwargs = False  # the loss is a mean over its own batch

    def _get_train_sampler(self, train_dataset=None):
        if self.lengths is None:
            return super()._get_train_sampler(train_dataset)
        return LengthGroupedBatches(self.train_dataset, self.lengths, self.args.train_batch_size, self.args.seed)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Steps 1 to 4 of the model's forward: condition, noise, denoise, equation 2."""
        outputs = model(**inputs, loss_weighting=self.loss_weighting)
        return (outputs.loss, outputs) if return_outputs else outputs.loss


class SceneEvaluation(TrainerCallback):
    """Captions held-out scenes while training and logs their scores under `scenes_*`."""

    def __init__(self, trainer: Trainer, config: EvaluationConfig):
        self.trainer, self.config = trainer, config

    def on_step_end(self, args, state, control, model=None, processing_class=None, **kwargs):
        """Score at every multiple of `steps`, and at the end."""
        every = self.config.steps
        if every and (state.global_step % every == 0 or state.global_step == state.max_steps):
            model.eval()
            with torch.autocast(model.device.type, torch.bfloat16, enabled=args.bf16):
                report = evaluate_scenes(model, processing_class, self.config.seed, self.config.num_images)
            model.train()
            names = ("positive", "negative", "average", "recognition", "exact")
            should_log = control.should_log
            self.trainer.log({f"scenes_{name}": round(report[name], 2) for name in names})
            control.should_log = should_log  # logging clears it, and this step's loss is still to be logged
