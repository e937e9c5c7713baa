"""What a run measures as it goes: loss by noise level, tokens and images per second, the share of padding."""

import time
from collections.abc import Callable

import torch

from perceptiondlm.training.data.noise import probability


NOISE_BINS = ("0-25", "25-50", "50-75", "75-100")  # percent of tokens masked, by expectation


class Meter:
    """Running sums over batches on one process; `drain` adds them up over all processes.

    Args:
        device: where batches are, so that adding one waits for nothing.
    """

    COUNTS = ("tokens", "places", "images", "samples", "supervised")

    def __init__(self, device: torch.device):
        self.loss = torch.zeros(len(NOISE_BINS), dtype=torch.float64, device=device)
        self.masked = torch.zeros_like(self.loss)
        self.counts = torch.zeros(len(self.COUNTS), dtype=torch.float64, device=device)
        self.totals = dict.fromkeys(self.COUNTS, 0.0)
        self.seconds, self.start = 0.0, time.perf_counter()

    def add(self, batch: dict[str, torch.Tensor], token_losses: torch.Tensor, masked: torch.Tensor) -> None:
        """Count a batch of the collator and its token losses (A, G), masked (A, G) bool."""
        level = (
            (probability(batch["mask_probability"]) * len(NOISE_BINS)).long().clamp(max=len(NOISE_BINS) - 1).flatten()
        )
        self.loss.index_add_(0, level, token_losses.sum(dim=1, dtype=torch.float64))
        self.masked.index_add_(0, level, masked.sum(dim=1, dtype=torch.float64))
        self.counts += sizes(batch)

    def restart(self) -> None:
        """Leave the time so far out of the speed."""
        self.start = time.perf_counter()

    def pause(self, seconds: float) -> None:
        """Leave time that was not training out of the speed."""
        self.start += seconds

    def drain(self, add_up: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
        """Numbers since the last call: `loss_noise_*`, `tokens_per_second`, `images_per_second`, `padding_share`,
        `supervised_share`.

        Args:
            add_up: sums a tensor over all processes.
        """
        sums = add_up(torch.cat((self.loss, self.masked, self.counts))).tolist()
        loss, masked, counts = (
            sums[: len(NOISE_BINS)],
            sums[len(NOISE_BINS) : 2 * len(NOISE_BINS)],
            sums[2 * len(NOISE_BINS) :],
        )
        now = time.perf_counter()
        seconds, self.start = now - self.start, now
        self.seconds += seconds
        for tensor in (self.loss, self.masked, self.counts):
            tensor.zero_()
        new = dict(zip(self.COUNTS, counts, strict=True))
        for name, value in new.items():
            self.totals[name] += value
        levels = zip(NOISE_BINS, loss, masked, strict=True)
        report = {f"loss_noise_{name}": round(total / count, 4) for name, total, count in levels if count}
        return report | rates(new, seconds)

    def summary(self) -> dict[str, float]:
        """Numbers of the whole run, as far as they were drained."""
        return {**self.totals, "seconds": self.seconds, **rates(self.totals, self.seconds)}


def rates(counts: dict[str, float], seconds: float) -> dict[str, float]:
    """Speed and padding of counted batches."""
    seconds = max(seconds, 1e-9)
    return {
        "tokens_per_second": round(counts["tokens"] / seconds, 1),
        "images_per_second": round(counts["images"] / seconds, 2),
        "padding_share": round(1 - counts["tokens"] / max(counts["places"], 1), 4),
        "supervised_share": round(counts["supervised"] / max(counts["tokens"], 1), 4),
    }


def sizes(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Tokens, places for tokens (padding included), images, rows and supervised tokens of a batch, (5,) float64.

    Answers stand behind the prompts, in as many blocks per row as the row with the most answers has.
    """
    mask_BL, labels_AG = batch["attention_mask"], batch["labels"]
    targets_B = (batch["region_ids"].amax(dim=1) + 1).clamp(min=1)  # regions, turns, or one answer
    copies = len(labels_AG) / targets_B.sum()
    supervised = (labels_AG != -100).sum()
    tokens = mask_BL.sum() + supervised
    places = mask_BL.numel() + len(mask_BL) * targets_B.max() * copies * labels_AG.shape[1]
    images = torch.tensor(len(batch["tile_grids"]) if "tile_grids" in batch else 0)
    counts = (tokens, places, images, torch.tensor(len(mask_BL)), supervised)
    return torch.stack([count.to(mask_BL.device, torch.float64) for count in counts])
