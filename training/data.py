"""Training samples and batches: drawn scenes in, processor batches with answers and their noise out.

The noise of a sample is a function of (seed, epoch, index) alone, so resuming or re-sharding a run changes nothing.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Dataset

from perceptiondlm.processing_perceptiondlm import PerceptionDLMProcessor
from perceptiondlm.training.scenes import draw_scene, scene_conversation


class SceneDataset(Dataset):
    """Scenes of the drawn world, drawn when asked for.

    Args:
        seed: of the world; scene i is `draw_scene(seed, i)`.
        num_images: length of the dataset.
        conversation_share: share of scenes that are asked a question about the whole image instead of being captioned
            region by region, in [0, 1].
        coarse_epochs: epochs at the start whose samples are marked `coarse`.
    """

    def __init__(self, seed: int, num_images: int, conversation_share: float = 0.0, coarse_epochs: int = 0):
        self.seed, self.num_images, self.conversation_share = seed, num_images, conversation_share
        self.coarse_epochs, self.epoch = coarse_epochs, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the sampler; the epoch is part of every sample's noise seed."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_images

    def __getitem__(self, index: int) -> dict[str, Any]:
        """`{"image", "noise_seed", "coarse"}` with either `"masks", "captions"` or `"question", "answer"`."""
        scene = draw_scene(self.seed, index)
        sample: dict[str, Any] = {"image": scene.image, "noise_seed": f"{self.epoch}/{self.seed}/{index}"}
        sample["coarse"] = self.epoch < self.coarse_epochs
        if self._is_conversation(index):
            dice = random.Random(f"question/{self.epoch}/{self.seed}/{index}")
            turns = scene_conversation(scene)
            sample["question"], sample["answer"] = turns[int(dice.random() * len(turns))]
        else:
            sample["masks"] = [item.mask for item in scene.objects]
            sample["captions"] = [item.caption for item in scene.objects]
        return sample

    def shape(self, index: int) -> tuple[tuple[int, int], int]:
        """Width and height of a sample's image, and its number of regions."""
        scene = draw_scene(self.seed, index)
        return scene.image.size, 0 if self._is_conversation(index) else len(scene.objects)

    def _is_conversation(self, index: int) -> bool:
        return random.Random(f"sample/{self.seed}/{index}").random() < self.conversation_share


def stratified_noise(num_answers: int, num_slots: int, copies: int, seed: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Mask probabilities p and uniform draws u for `copies` noised copies of each answer.

    Variance reduction, both unbiased in t: t is stratified over the answers of a sample, and of two copies the second
    is antithetic (p' = 1 - p, u' = 1 - u), so that together they mask every token exactly once.

    Returns:
        p (num_answers * copies, 1) and u (num_answers * copies, num_slots), the copies of an answer adjacent.
    """
    generator = torch.Generator().manual_seed(random.Random(seed).getrandbits(62))
    strata = torch.randperm(num_answers, generator=generator)[:, None]
    p = (strata + torch.rand(num_answers, 1, generator=generator)) / num_answers
    u = torch.rand(num_answers, num_slots, generator=generator)
    if copies == 2:
        p, u = torch.stack((p, 1 - p), dim=1), torch.stack((u, 1 - u), dim=1)
    elif copies != 1:
        raise ValueError(f"noise copies must be 1 or 2, got {copies}")
    return p.reshape(-1, 1).clamp(min=1e-3), u.reshape(-1, num_slots)


@dataclass
class AnswerCollator:
    """Samples to a batch for `forward`: the processor's tensors, `labels`, `mask_probability`, `answer_noise`.

    Args:
        processor: the only preprocessing path there is.
        num_slots: slots of an answer, G.
        noise_copies: 1, or 2 for antithetic pairs.
        coarse_slots: of a coarse batch only this many first slots are kept, and its images are single tiles.
    """

    processor: PerceptionDLMProcessor
    num_slots: int
    noise_copies: int = 1
    coarse_slots: int | None = None

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        coarse = samples[0]["coarse"]  # one epoch, hence the same for the whole batch
        max_tiles = 1 if coarse else None
        num_slots = (coarse and self.coarse_slots) or self.num_slots
        rows, labels, probabilities, draws = [], [], [], []
        for sample in samples:
            if "captions" in sample:
                rows += self.processor.region_rows(sample["image"], None, "masks", sample["masks"], max_tiles=max_tiles)
                answers = sample["captions"]
            else:
                rows += self.processor.text_rows(sample["image"], sample["question"], max_tiles=max_tiles)
                answers = [sample["answer"]]
            targets = self.processor.encode_answers(answers, self.num_slots)[:, :num_slots]
            labels.append(targets.repeat_interleave(self.noise_copies, dim=0))
            p, u = stratified_noise(len(answers), num_slots, self.noise_copies, sample["noise_seed"])
            probabilities.append(p)
            draws.append(u)
        batch = dict(self.processor.collate(rows))
        batch |= {"labels": torch.cat(labels), "mask_probability": torch.cat(probabilities)}
        return batch | {"answer_noise": torch.cat(draws)}
