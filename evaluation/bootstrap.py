"""How far scores would move with other images: the bootstrap over images."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np


if TYPE_CHECKING:
    from perceptiondlm.evaluation.scoring import RegionScore


DRAWS_AT_ONCE = 500  # bounds memory; the draws are the same for any number


def bootstrap_samples(
    regions: "Sequence[RegionScore]", num_samples: int = 10_000, seed: int = 0
) -> dict[str, np.ndarray]:
    """Scores of benchmarks made of images drawn with replacement, as many as there are.

    Images are drawn, not regions, because regions of one image resemble one another. The draws depend on the number of
    images and the seed alone, and images count in the order of their ids: for two systems scored on the same images,
    the difference of their samples is the paired bootstrap.

    Args:
        regions: scored regions of at least one image.
        num_samples: number of drawn benchmarks S.
        seed: seed of the draws.

    Returns:
        ``positive``, ``negative``, ``average`` and ``recognition``, each (S,) float64 in percent; NaN where a draw
        holds no region with such questions.
    """
    images = {image_id: place for place, image_id in enumerate(sorted({region.image_id for region in regions}))}
    # Per image: sum of positives, regions, sum of negatives, regions with negatives, recognised regions.
    sums = np.zeros((len(images), 5))
    for region in regions:
        has_negative = region.negative is not None
        sums[images[region.image_id]] += (region.positive, 1, region.negative or 0.0, has_negative, region.recognized)
    shares = np.full(len(images), 1 / len(images))
    draws = np.random.default_rng(seed)
    sizes = [min(DRAWS_AT_ONCE, num_samples - start) for start in range(0, num_samples, DRAWS_AT_ONCE)]
    # Counts of the images, (size, images), times their sums: (S, 5) in the end.
    totals = np.concatenate([draws.multinomial(len(images), shares, size=size) @ sums for size in sizes])
    with np.errstate(invalid="ignore"):  # 0 / 0: no region with negative questions
        positive = 100 * totals[:, 0] / totals[:, 1]
        negative = 100 * totals[:, 2] / totals[:, 3]
    return {
        "positive": positive,
        "negative": negative,
        "average": (positive + negative) / 2,
        "recognition": 100 * totals[:, 4] / totals[:, 1],
    }


def interval(samples: np.ndarray, level: float = 0.95) -> list[float] | None:
    """Lower and upper bound of the central share ``level`` of the samples, NaN left out; None without any."""
    finite = samples[np.isfinite(samples)]
    if not finite.size:
        return None
    return [float(bound) for bound in np.quantile(finite, [(1 - level) / 2, (1 + level) / 2])]
