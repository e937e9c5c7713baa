"""Pictures of the efficiency study, after Figures 1(b) and 1(c) of the paper."""

from pathlib import Path
from typing import Any


COLOURS = ("#888888", "#1d78d8", "#e63946", "#f48c06", "#9a9a3c", "#83388c", "#2a9d53")


def plot_regions(result: dict[str, Any], path: Path) -> None:
    """Latency and throughput over the number of regions, a line per system (Figure 1b)."""
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), dpi=110, layout="constrained")
    names = {row["system"]: None for row in result["rows"]}
    for name, colour in zip(names, COLOURS, strict=False):
        rows = sorted((row for row in result["rows"] if row["system"] == name), key=lambda row: row["regions"])
        counts = [row["regions"] for row in rows]
        axes[0].plot(counts, [row["seconds"] for row in rows], marker="o", color=colour, label=name)
        axes[1].plot(counts, [row["regions"] / row["seconds"] for row in rows], marker="o", color=colour, label=name)
    axes[0].set(xlabel="regions", ylabel="seconds per image", yscale="log", title="latency")
    axes[1].set(xlabel="regions", ylabel="captions per second", yscale="log", title="throughput")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    _finish(figure, result, path)


def plot_groups(result: dict[str, Any], path: Path) -> None:
    """Seconds per image for the same regions, K at a time (Figure 1c): a panel per system, speed-ups on the bars."""
    pyplot = _pyplot()
    names = list({row["system"]: None for row in result["groups"]})
    figure, axes = pyplot.subplots(
        1, len(names), figsize=(3.2 * len(names), 3.4), dpi=110, layout="constrained", squeeze=False
    )
    for name, axis, colour in zip(names, axes[0], COLOURS, strict=False):
        rows = [row for row in result["groups"] if row["system"] == name]
        bars = axis.bar([str(row["at_a_time"]) for row in rows], [row["seconds"] for row in rows], color=colour)
        axis.bar_label(bars, [f"{rows[0]['seconds'] / row['seconds']:.2f}x" for row in rows], padding=2)
        axis.set(xlabel="regions at a time", title=name)
        axis.margins(y=0.15)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel(f"seconds for {result['groups'][0]['regions']} regions")
    _finish(figure, result, path)


def _pyplot():
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _finish(figure, result: dict[str, Any], path: Path) -> None:
    figure.suptitle(f"{result['shape']} shape, {result['environment']['hardware']}, {result['dtype']}")
    figure.savefig(path)
    _pyplot().close(figure)
