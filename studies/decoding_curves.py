"""Quality against passes: every sampler at several settings, on the same drawn scenes, in one process.

    python -m perceptiondlm.studies.decoding_curves --images 100 --json curves.json --plot curves.png

From these curves the `fast` preset was chosen. They include the paper's Table 9 (steps, with the released schedule) and
Table 11 (slots per caption). A point is a setting's mean over pictures; the reference is one token a
step, without early exit.
"""

import argparse
from pathlib import Path
from typing import Any

from transformers import AutoModel, AutoProcessor

from perceptiondlm.common.environment import environment
from perceptiondlm.common.json_files import write_json
from perceptiondlm.common.loading import DRAWN_MODEL, from_checkpoint
from perceptiondlm.evaluation.drawn_scenes import evaluate_scenes


REFERENCE: dict[str, Any] = {"sampler": "low_confidence", "steps": 32, "early_exit": False}
CURVES: dict[str, list[dict[str, Any]]] = {
    "fixed steps": [{"sampler": "low_confidence", "steps": steps} for steps in (32, 16, 8, 4)],
    "threshold": [{"sampler": "threshold", "threshold": value} for value in (0.95, 0.9, 0.8, 0.7, 0.5)],
    "margin": [{"sampler": "margin", "threshold": value} for value in (0.9, 0.8, 0.6, 0.4)],
    "entropy bound": [{"sampler": "entropy_bound", "entropy_bound": value} for value in (0.05, 0.1, 0.3, 1.0)],
    "released rules": [{"shared_schedule": True, "remasking": True, "steps": steps} for steps in (16, 32, 48, 64)],
    "64 slots": [{"max_new_tokens": 64, "steps": 32}, {"max_new_tokens": 64, "preset": "fast"}],
}
SCORES = ("positive", "negative", "average", "recognition", "exact")
SPEED = ("num_forward_passes", "tokens_per_forward", "seconds_per_image")


def measure(model, processor, seed: int, images: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Scores and speed of one setting."""
    report = evaluate_scenes(model, processor, seed, images, progress=True, **settings)
    return {"settings": settings, **{name: round(report[name], 3) for name in (*SCORES, *SPEED)}}


def curves(model, processor, seed: int, images: int) -> dict[str, Any]:
    """All points, each with its share of the reference's score and its speed-up over the reference."""
    reference = measure(model, processor, seed, images, REFERENCE)
    result: dict[str, Any] = {"seed": seed, "num_images": images, "reference": reference, "curves": {}}
    for name, points in CURVES.items():
        measured = [measure(model, processor, seed, images, settings) for settings in points]
        for point in measured:
            share = point["average"] / reference["average"] if reference["average"] > 0 else None
            point["share_of_reference"] = share and round(share, 4)
            point["speed_up"] = round(reference["seconds_per_image"] / point["seconds_per_image"], 2)
        result["curves"][name] = measured
    return result


def plot(result: dict[str, Any], path: Path) -> None:
    """Average score over passes per picture, a line per sampler."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), dpi=110)
    for name, points in result["curves"].items():
        axes.plot([p["num_forward_passes"] for p in points], [p["average"] for p in points], marker="o", label=name)
    axes.axhline(0.98 * result["reference"]["average"], color="grey", linestyle=":", label="98 % of one token a step")
    axes.set_xlabel("passes of the language model per picture")
    axes.set_ylabel(f"Avg on {result['num_images']} scenes")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def table(result: dict[str, Any]) -> str:
    """The points for a terminal."""
    lines = [f"{'':52s}{'Avg':>7s}{'share':>8s}{'passes':>8s}{'s/image':>9s}{'speed-up':>10s}"]
    reference = {**result["reference"], "share_of_reference": 1.0, "speed_up": 1.0}
    for point in (reference, *(point for points in result["curves"].values() for point in points)):
        name = " ".join(f"{key}={value}" for key, value in point["settings"].items())
        share = "-" if point["share_of_reference"] is None else f"{point['share_of_reference']:.3f}"
        lines.append(
            f"{name:52s}{point['average']:7.2f}{share:>8s}{point['num_forward_passes']:8.2f}"
            f"{point['seconds_per_image']:9.3f}{point['speed_up']:10.2f}"
        )
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default=str(DRAWN_MODEL), help="directory or Hub id; by default that of the drawn world"
    )
    parser.add_argument(
        "--seed", type=int, default=2000, help="of the drawn world; choose presets on another than 1000"
    )
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    processor = from_checkpoint(AutoProcessor, options.model)
    model = from_checkpoint(AutoModel, options.model).eval()
    result = {**curves(model, processor, options.seed, options.images), "environment": environment()}
    write_json(options.json, result)
    if options.plot:
        plot(result, options.plot)
    print(table(result))


if __name__ == "__main__":
    main()
