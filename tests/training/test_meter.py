"""What a run reports: tokens, places, images, loss by noise level, and speed."""

import pytest
import torch

from perceptiondlm.training.data.noise import probability_bits
from perceptiondlm.training.meter import Meter, sizes


def make_batch() -> dict[str, torch.Tensor]:
    """Two rows: 5 tokens with two regions, 3 tokens without any; two noised copies of every answer of up to 4 slots."""
    labels = torch.zeros(6, 4, dtype=torch.int64)
    labels[4:, 2:] = -100  # the text answer takes two slots
    return {
        "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
        "region_ids": torch.tensor([[-1, 0, 0, 1, -1], [-1, -1, -1, -1, -1]]),
        "tile_grids": torch.tensor([[1, 1]]),
        "labels": labels,
        "mask_probability": probability_bits(torch.tensor([0.1, 0.9, 0.3, 0.7, 0.6, 0.4])[:, None]),
    }


def test_sizes_count_tokens_and_the_places_that_padding_leaves():
    tokens, places, images, rows, supervised = sizes(make_batch()).tolist()
    assert tokens == 5 + 3 + 4 * 4 + 2 * 2
    assert places == 2 * 5 + 2 * (4 * 4)  # every row has room for the four answers of the first
    assert (images, rows, supervised) == (1, 2, 20)


def test_text_alone_counts_no_images():
    batch = make_batch()
    del batch["tile_grids"]
    assert sizes(batch)[2] == 0


def test_meter_sorts_losses_by_noise_and_adds_up_processes():
    meter = Meter(torch.device("cpu"))
    masked = torch.zeros(6, 4, dtype=torch.bool)
    masked[:, 0] = True
    masked[1, 1] = True
    losses = torch.zeros(6, 4).masked_scatter(masked, torch.arange(1.0, 8.0))
    meter.add(make_batch(), losses, masked)
    meter.pause(-9.0)  # as if nine seconds had gone
    report = meter.drain(lambda counts: 2 * counts)  # two processes with the same batch
    assert report["loss_noise_0-25"] == 1.0
    assert report["loss_noise_25-50"] == pytest.approx((4 + 7) / 2)  # p = 0.3 and 0.4
    assert report["loss_noise_50-75"] == pytest.approx((5 + 6) / 2)
    assert report["loss_noise_75-100"] == pytest.approx((2 + 3) / 2)
    assert report["tokens_per_second"] == pytest.approx(2 * 28 / 9, rel=0.05)
    assert report["supervised_share"] == pytest.approx(20 / 28, abs=1e-4)
    assert report["padding_share"] == pytest.approx(1 - 28 / 42, abs=1e-4)
    later = meter.drain(lambda counts: counts)
    assert not any(name.startswith("loss_noise") for name in later)
    assert meter.summary()["samples"] == 4
