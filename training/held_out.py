"""Looking at the model while it trains: scores or loss on held-out samples, and pictures with its captions."""

import re
import time
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import TrainerCallback

from perceptiondlm.common.drawing import draw_regions
from perceptiondlm.evaluation.drawn_conversations import evaluate_conversations
from perceptiondlm.evaluation.drawn_scenes import evaluate_scenes
from perceptiondlm.images_perceptiondlm import load_image
from perceptiondlm.regions_perceptiondlm import region_masks
from perceptiondlm.training.config import RunConfig
from perceptiondlm.training.data.collator import AnswerCollator
from perceptiondlm.training.data.data_config import REGION_KINDS, DataConfig
from perceptiondlm.training.data.mixture import build_mixture
from perceptiondlm.training.modules import plain_model
from perceptiondlm.training.trainer import PerceptionDLMTrainer


SCENE_SCORES = ("positive", "negative", "average", "recognition", "exact")


class HeldOutEvaluation(TrainerCallback):
    """Scores the model every `evaluation.steps` steps and at the end; everything is logged under `scenes_*`,
    `conversations_*` or `held_out_*`, pictures go to `output_dir/pictures`.

    All processes take part, because each may hold only a share of the weights; the first one writes.
    """

    def __init__(self, trainer: PerceptionDLMTrainer, run: RunConfig):
        self.trainer, self.run = trainer, run
        self.source, self.settings = run.evaluation.source, run.evaluation
        processor, config = trainer.processing_class, plain_model(trainer.model).config
        self.has_regions = config.region_conditioning != "none"
        if (
            self.source.kind in REGION_KINDS
            and not self.has_regions
            and (self.settings.steps or self.settings.at_start)
        ):
            raise ValueError(
                f"evaluation.source {self.source.kind!r} holds regions, which this base model does not know"
            )
        data = DataConfig([self.source], seed=run.data.seed, max_length=run.data.max_length, prepared=run.data.prepared)
        if self.settings.steps or self.settings.at_start:
            self.samples = build_mixture(data, run.loss, processor, config, run.output_dir)
            self.collator = AnswerCollator.build(data, run.loss, processor, config)

    def on_train_begin(self, args, state, control, **kwargs):
        """Evaluate before the first step, if wanted; a run that goes on has done so."""
        if self.settings.at_start and state.global_step == 0:
            self.trainer.log(self.evaluate(0))
            control.should_log = False
            self.trainer.meter.restart()

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
            bf16 = self.trainer.accelerator.mixed_precision == "bf16"
            averaged = nullcontext() if average is None else average.applied()
            with (
                torch.autocast(model.device.type, torch.bfloat16, enabled=bf16),
                averaged,
                self.trainer.whole_weights(),
            ):
                return self.look(model, step)
        finally:
            model.train()

    def look(self, model, step: int) -> dict[str, float]:
        """Draw the pictures and score."""
        processor, source = self.trainer.processing_class, self.source
        words = self.caption(model, step)
        if source.kind == "scenes":
            report = evaluate_scenes(model, processor, source.seed, len(self.samples))
            return {f"scenes_{name}": round(report[name], 2) for name in SCENE_SCORES}
        if source.kind == "scene_conversations":
            report = evaluate_conversations(model, processor, source.kind, source.seed, len(self.samples))
            per_kind = {f"conversations_{kind}": round(value, 2) for kind, value in report["per_kind"].items()}
            return {"conversations_exact": round(report["exact"], 2), **per_kind}
        return {"held_out_loss": round(self.loss(model), 4), **words}

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

    def caption(self, model, step: int) -> dict[str, float]:
        """Caption held-out regions: pictures of the first samples, and `held_out_words` of a region set."""
        folder, scored = self.run.output_dir / "pictures", self.source.kind in ("regions", "named_regions")
        scores: list[float] = []
        for index in range(len(self.samples) if scored else min(self.settings.pictures, len(self.samples))):
            sample = self.samples[index]
            if "masks" not in sample:
                continue
            image, masks, captions = captioned(model, self.trainer.processing_class, sample)
            scores += [word_f1(given, wanted) for given, wanted in zip(captions, sample["captions"], strict=True)]
            if index < self.settings.pictures and self.trainer.is_world_process_zero():
                folder.mkdir(parents=True, exist_ok=True)
                draw_regions(image, masks, captions).save(Path(folder, f"step-{step:06d}-{index}.png"))
        return {"held_out_words": round(100 * sum(scores) / len(scores), 2)} if scored and scores else {}


@torch.inference_mode()
def captioned(model, processor, sample: dict[str, Any]) -> tuple[Image.Image, np.ndarray, list[str]]:
    """A sample's image, its masks (N, H, W) and the captions that the model gives them."""
    image = load_image(sample["image"])
    masks = region_masks((image.height, image.width), masks=sample["masks"])
    inputs = processor(images=image, masks=masks).to(model.device)
    return image, masks, processor.post_process_region_captions(model.generate(**inputs))[0]


def word_f1(given: str, wanted: str) -> float:
    """Harmonic mean of the shares of words that two texts have in common, in [0, 1], whatever their order and case."""
    words = [Counter(re.findall(r"\w+", text.lower())) for text in (given, wanted)]
    common = (words[0] & words[1]).total()
    return 2 * common / max(words[0].total() + words[1].total(), 1)
