"""Samples to a batch for `forward`: the processor's tensors, the answers' slots and their noise."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from perceptiondlm.configuration_perceptiondlm import PerceptionDLMConfig
from perceptiondlm.processing_perceptiondlm import PerceptionDLMProcessor
from perceptiondlm.training.data.data_config import DataConfig, LossConfig
from perceptiondlm.training.data.noise import probability_bits, stratified_noise
from perceptiondlm.training.data.sources import AnswerFormat


@dataclass
class AnswerCollator:
    """Samples (see sources.py) to a batch: the processor's keys, `labels`, `mask_probability`, `answer_masked`.

    A sample's part of a batch depends on the sample alone, padding aside. Which tokens are masked is decided here, as
    booleans, and probabilities travel as bits (see `probability_bits`), so that no mixed precision changes the noise.

    Args:
        processor: the only preprocessing path there is.
        answers: slots of an answer and how many noised copies it has.
        noise_level: see `stratified_noise`.
        coarse_slots: of a coarse batch only this many first slots are kept, and its images are single tiles.
        marked, terminated: whether a block's marker and terminator are noised beside its slots (`supervise_markers`).
    """

    processor: PerceptionDLMProcessor
    answers: AnswerFormat
    noise_level: str = "region"
    coarse_slots: int | None = None
    marked: bool = False
    terminated: bool = False

    @classmethod
    def build(
        cls, data: DataConfig, loss: LossConfig, processor: PerceptionDLMProcessor, config: PerceptionDLMConfig
    ) -> "AnswerCollator":
        """The collator of a run."""
        answers = AnswerFormat.build(data, loss, processor, config)
        marked, terminated = config.supervise_markers, config.attention_layout != "isolated"
        return cls(processor, answers, loss.noise_level, data.coarse_slots, marked, marked and terminated)

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        rows: list[dict] = []
        parts = []
        for sample in samples:
            own_rows = self._rows(sample)
            parts.append(self._noised_answers(sample, own_rows))
            rows += own_rows
        labels, probabilities, masked, ends = zip(*parts, strict=True)
        batch = dict(self.processor.collate(rows))
        batch |= {"labels": _stack(labels, -100), "mask_probability": probability_bits(torch.cat(probabilities))}
        return batch | {"answer_masked": torch.cat((_stack(masked, True), torch.cat(ends)), dim=1)}

    def _rows(self, sample: dict[str, Any]) -> list[dict]:
        """The processor's rows of a sample's prompt."""
        max_tiles = 1 if sample["coarse"] else None
        if "answers" in sample:
            return [self._turns_row(sample, max_tiles)]
        if "captions" not in sample:
            return self.processor.text_rows(
                [sample["images"]], [sample["prompt"]], rendered=sample.get("rendered", False), max_tiles=max_tiles
            )
        ids = None
        if self.processor.config.region_conditioning == "vision":
            ids = draw_prompt_ids(len(sample["masks"]), self.processor.config.num_region_prompts, sample["noise_seed"])
        return self.processor.region_rows(
            sample["image"], None, "masks", sample["masks"], max_tiles=max_tiles, prompt_ids=ids
        )

    def _turns_row(self, sample: dict[str, Any], max_tiles: int | None) -> dict:
        """One row of a conversation, whose shared tokens are seen from their own turn on."""
        images, prompts = sample["turn_images"], sample["turn_prompts"]
        rows = self.processor.text_rows(images, prompts, rendered=True, max_tiles=max_tiles)
        tiles = [row["tiles"] for row in rows if row["tiles"] is not None]
        joined = {name: [entry for row in rows for entry in row[name]] for name in ("ids", "roles", "grids", "sizes")}
        joined["regions"] = [turn for turn, row in enumerate(rows) for _ in row["ids"]]
        return {**rows[0], **joined, "tiles": np.concatenate(tiles) if tiles else None}

    def _noised_answers(self, sample: dict[str, Any], rows: list[dict]) -> tuple[torch.Tensor, ...]:
        """Labels (A, G), p (A, 1), and whether a token is masked, (A, marker + G) and (A, 1 or 0) for the terminator.

        A filler's labels are all -100.
        """
        in_regions = "captions" in sample
        texts = sample["captions"] if in_regions else sample.get("answers") or [sample["answer"]]
        if self.processor.sort_regions and in_regions:
            texts = [texts[place] for row in rows for place in row["order"]]
        limit = self.answers.slot_limit if len(texts) > 1 or in_regions else self.answers.room(len(rows[0]["ids"]))
        labels = self.answers.encode(texts, limit, in_regions)
        labels = labels[:, : self.coarse_slots] if sample["coarse"] else labels
        labels = torch.full_like(labels, -100) if sample["filler"] else labels
        width, copies = labels.shape[1] + self.marked, self.answers.copies
        p, u = stratified_noise(len(texts), width + self.terminated, copies, sample["noise_seed"], self.noise_level)
        masked = u < p
        return labels.repeat_interleave(copies, dim=0), p, masked[:, :width], masked[:, width:]


def draw_prompt_ids(count: int, num_prompts: int, seed: str) -> list[int]:
    """Prompt ids of `count` regions, without replacement within a pass of `num_prompts` regions."""
    dice = random.Random(f"prompts/{seed}")
    passes = [dice.sample(range(num_prompts), num_prompts) for _ in range(0, count, num_prompts)]
    return [number for numbers in passes for number in numbers][:count]


def _stack(parts: Sequence[torch.Tensor], fill: int) -> torch.Tensor:
    """Rows of tensors of different widths in one, padded on the right."""
    return pad_sequence([row for part in parts for row in part], batch_first=True, padding_value=fill)
