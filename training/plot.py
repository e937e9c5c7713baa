"""Draw a run's training log: loss, learning rate and scores on held-out scenes.

python -m perceptiondlm.training.plot training_log.json training_curve.png
"""

import argparse
from pathlib import Path

import matplotlib


matplotlib.use("Agg")
from matplotlib import pyplot as plt

from perceptiondlm.scripts.json_files import read_json


SCORES = {
    "scenes_average": "Avg",
    "scenes_recognition": "recognition",
    "scenes_exact": "captions exactly right",
    "conversations_exact": "answers exactly right",
    "held_out_loss": "held-out loss",
}


def plot_log(log: list[dict], path: str | Path) -> None:
    """Write a PNG of the Trainer's log history: loss on the left, scores in percent (or held-out loss) on the right."""
    loss = [(row["step"], row["loss"]) for row in log if "loss" in row]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    left.plot(*zip(*loss, strict=True), color="tab:blue")
    left.set(xlabel="optimizer step", ylabel="loss", yscale="log", title="training loss")
    for key, name in SCORES.items():
        if points := [(row["step"], row[key]) for row in log if key in row]:
            right.plot(*zip(*points, strict=True), marker="o", ms=3, label=name)
    right.set(xlabel="optimizer step", title="held-out samples")
    if right.lines:
        right.legend()
    if not any("held_out_loss" in row for row in log):
        right.set(ylabel="%", ylim=(min(0, right.get_ylim()[0]), 101))
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("log", type=Path, help="training_log.json of a run")
    parser.add_argument("picture", type=Path, help="PNG to write")
    options = parser.parse_args()
    plot_log(read_json(options.log)["log"], options.picture)


if __name__ == "__main__":
    main()
