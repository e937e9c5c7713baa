"""What a benchmark is made of, as the paper's figure 4 shows it: masks per image, areas, questions by kind."""

from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from perceptiondlm.evaluation.benchmarks import Benchmark, BenchmarkRegion
from perceptiondlm.evaluation.reports.paper_tables import markdown_table


AREA_LIMITS = (0.0, 0.003, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 1.0)  # shares of the image


def area_share(region: BenchmarkRegion) -> float:
    """A region's share of its image's pixels, in [0, 1]."""
    height, width = region.rle["size"]
    rle: Any = dict(region.rle)
    if isinstance(rle["counts"], list):
        rle = coco_mask.frPyObjects(rle, height, width)
    return float(coco_mask.area(rle)) / (height * width)


def benchmark_statistics(benchmark: Benchmark) -> dict[str, Any]:
    """Counts of a benchmark, JSON-ready; pictures are not needed.

    Returns:
        `images`, `regions`, `questions`, `classes` (different names); `masks_per_image`: number of masks -> images;
        `area`: `mean`, `median`, `min`, `max` share of the image, and `histogram`, regions between `AREA_LIMITS`;
        `kinds`: kind of question -> number; `questions_per_region`: `mean`, `min`, `max`; `without_positive`: regions
        without a positive question.
    """
    regions = benchmark.regions
    shares = np.array([area_share(region) for region in regions])
    kinds = Counter(str(q.get("subtype") or q["type"]) for region in regions for q in region.questions)
    per_region = [len(region.questions) for region in regions]
    counts, _ = np.histogram(shares, bins=AREA_LIMITS)
    positive = [any(q["type"] == "positive" for q in region.questions) for region in regions]
    return {
        "benchmark": benchmark.name,
        "images": len(benchmark.images),
        "regions": len(regions),
        "questions": sum(per_region),
        "classes": len({region.class_name for region in regions}),
        "masks_per_image": dict(sorted(Counter(len(image.regions) for image in benchmark.images).items())),
        "area": {
            "mean": float(shares.mean()),
            "median": float(np.median(shares)),
            "min": float(shares.min()),
            "max": float(shares.max()),
            "histogram": counts.tolist(),
        },
        "kinds": dict(kinds.most_common()),
        "questions_per_region": {
            "mean": sum(per_region) / len(per_region),
            "min": min(per_region),
            "max": max(per_region),
        },
        "without_positive": positive.count(False),
    }


def statistics_markdown(found: dict[str, Any]) -> str:
    """The counts as Markdown."""
    area = found["area"]
    per_image = [[str(masks), str(images)] for masks, images in found["masks_per_image"].items()]
    bounds = list(pairwise(AREA_LIMITS))
    areas = [
        [f"{100 * low:g} to {100 * high:g} %", str(count)]
        for (low, high), count in zip(bounds, area["histogram"], strict=True)
    ]
    return "\n".join(
        [
            f"# {found['benchmark']}: {found['images']} images, {found['regions']} regions, "
            f"{found['questions']} questions, {found['classes']} class names\n",
            f"Average area {area['mean']:.3f} of the image (median {area['median']:.4f}, from {area['min']:.5f} to "
            f"{area['max']:.3f}); {found['questions_per_region']['mean']:.1f} questions a region; "
            f"{found['without_positive']} regions without a positive question.\n",
            markdown_table(["masks in an image", "images"], per_image),
            markdown_table(["area of the image", "regions"], areas),
            markdown_table(["questions", "number"], [[kind, str(number)] for kind, number in found["kinds"].items()]),
        ]
    )


def write_figure(found: dict[str, Any], path: Path) -> None:
    """The paper's figure 4 for this benchmark, two histograms side by side.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl

        mpl.use("Agg")
        from matplotlib import pyplot as plt
    except ImportError as error:
        raise ImportError('the figure needs matplotlib: pip install "perceptiondlm[training]"') from error
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    left.bar(
        [str(masks) for masks in found["masks_per_image"]], list(found["masks_per_image"].values()), color="#2a6fb0"
    )
    left.set(xlabel="masks in an image", ylabel="images", title=f"{found['images']} images, {found['regions']} regions")
    names = [f"{100 * low:g}-{100 * high:g}" for low, high in pairwise(AREA_LIMITS)]
    right.bar(names, found["area"]["histogram"], color="#2a9d53")
    right.set(xlabel="area, % of the image", ylabel="regions", title=f"average area {found['area']['mean']:.3f}")
    right.tick_params(axis="x", rotation=30)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
