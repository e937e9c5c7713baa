"""Looking at the model while it trains: scores or loss on held-out samples, and pictures with its captions."""

import time
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback

from perceptiondlm.common.drawing import annotate
from perceptiondlm.evaluation.drawn_conversations import evaluate_conversations
from perceptiondlm.evaluation.drawn_scenes import evaluate_scenes
from perceptiondlm.images_perceptiondlm import load_image
from perceptiondlm.regions_perceptiondlm import region_masks
from perceptiondlm.training.config import RunConfig
from perceptiondlm.training.data.collator import AnswerCollator
from perceptiondlm.training.data.data_config import DataConfig
from perceptiondlm.training.data.mixture import build_mixture
from perceptiondlm.training.modules import plain_model


SCENE_SCORES = ("positive", "negative", "average", "recognition", "exact")


class HeldOutEvaluation(TrainerCallback):
    """Scores the model every `evaluation.steps` steps and at the end; everything is logged under `scenes_*`,
    `conversations_*` or `held_out_*`, pictures go to `output_dir/pictures`.

    All processes take part, because each may hold only a share of the weights; the first one writes.
    """

    def __init__(self, trainer: Trainer, run: RunConfig):
        self.trainer, self.run = trainer, run
        self.source, self.settings = run.evaluation.source, run.evaluation
        processor, config = trainer.processing_class, plain_model(trainer.model).config
        self.has_regions = config.region_conditioning != "none"
        if self.source.kind in ("scenes", "regions") and not self.has_regions and self.settings.steps:
            raise ValueError(
                f"evaluation.source {self.source.kind!r} holds regions, which this base model does not know"
            )
        data = DataConfig([self.source], seed=run.data.seed, max_length=run.data.max_length, prepared=run.data.prepared)
        if self.settings.steps:
            self.samples = build_mixture(data, run.loss, processor, config, run.output_dir)
            self.collator = AnswerCollator.build(data, run.loss, processor, config)

    def on_step_end(self, args, state, control, **kwargs):
        """Evaluate at every multiple of `steps`, and at the end."""
        every = self.settings.steps
        if every and (state.global_step % every == 0 or state.global_step == state.max_steps):
            start = time.perf_counter()
            should_log = control.should_log
            self.trainer.log(self.evaluate(state.global_step))
            control.should_log = should_log  # logging clears it, and this step's loss is still to be logged
            self.trainer.meter.pause(time.perf_counter() - start)

    def evaluate(self, step: int) -> dict[str, float]:
        """Scores by name, in percent, or the held-out loss."""
        model, average = plain_model(self.trainer.model), self.trainer.average
        model.eval()
        try:
            with torch.autocast(model.device.type, torch.bfloat16, enabled=self.trainer.args.bf16):
                if average is None:
                    return self.look(model, step)
                with average.applied():
                    return self.look(model, step)
        finally:
            model.train()

    def look(self, model, step: int) -> dict[str, float]:
        """Draw the pictures and score."""
        processor, source = self.trainer.processing_class, self.source
        self.draw(model, step)
        if source.kind == "scenes":
            report = evaluate_scenes(model, processor, source.seed, len(self.samples))
            return {f"scenes_{name}": round(report[name], 2) for name in SCENE_SCORES}
        if source.kind == "scene_conversations":
            report = evaluate_conversations(model, processor, source.kind, source.seed, len(self.samples))
            per_kind = {f"conversations_{kind}": round(value, 2) for kind, value in report["per_kind"].items()}
            return {"conversations_exact": round(report["exact"], 2), **per_kind}
        return {"held_out_loss": round(self.loss(model), 4)}

    @torch.no_grad()
    def loss(self, model) -> float:
        """Equation 2 on all held-out samples, every batch weighing as much as its supervised tokens."""
        total, items, size = 0.0, 0, self.trainer.args.per_device_train_batch_size
        for start in range(0, len(self.samples), size):
            indices = range(start, min(start + size, len(self.samples)))
            batch = {k: v.to(model.device) for k, v in self.collator([self.samples[i] for i in indices]).items()}
            count = int((batch["labels"] != -100).sum())
            total += count * float(model(**batch, loss_weighting=self.run.loss.weighting).loss)
            items += count
        return total / max(items, 1)

    def draw(self, model, step: int) -> None:
        """Caption the regions of the first held-out samples and write the pictures."""
        folder = self.run.output_dir / "pictures"
        for index in range(min(self.settings.pictures, len(self.samples))):
            sample = self.samples[index]
            if "masks" not in sample:
                continue
            picture = captioned(model, self.trainer.processing_class, sample)
            if self.trainer.is_world_process_zero():
                folder.mkdir(parents=True, exist_ok=True)
                picture.save(Path(folder, f"step-{step:06d}-{index}.png"))


@torch.inference_mode()
def captioned(model, processor, sample: dict[str, Any]):
    """A sample's image with its regions and the captions that the model gives them."""
    image = load_image(sample["image"])
    masks = region_masks((image.height, image.width), masks=sample["masks"])
    inputs = processor(images=image, masks=masks).to(model.device)
    return annotate(image, masks, processor.post_process_region_captions(model.generate(**inputs))[0])
