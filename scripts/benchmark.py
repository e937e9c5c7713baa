"""`perceptiondlm benchmark`: time ways of captioning N regions, side by side in one process.

Systems take turns in every round, after a warm-up; the figures are medians over the rounds. What the systems are:
evaluation/efficiency.py. Weights are random unless the shape is `embedded`.
"""

import argparse
import gc
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from perceptiondlm.evaluation.efficiency import GRID, SHAPES, SYSTEMS, Study, build_model, make_inputs
from perceptiondlm.evaluation.environment import environment
from perceptiondlm.scripts.loading import REPOSITORY, torch_dtype


COLOURS = ("#888888", "#1d78d8", "#e63946", "#f48c06", "#9a9a3c", "#83388c", "#2a9d53")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the subcommand."""
    parser.add_argument("--shape", choices=("embedded", *SHAPES, "8b"), default="embedded")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default=None, help="by default bfloat16 on an accelerator, float32 on the CPU")
    parser.add_argument("--regions", type=int, nargs="+", default=[1, 2, 4, 6, 8, 16, 32], metavar="N")
    parser.add_argument("--systems", nargs="+", choices=tuple(SYSTEMS), default=list(SYSTEMS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=32, help="denoising steps of full and cached")
    parser.add_argument("--fast-steps", type=int, required=True, help="passes that the fast preset needs, on average")
    parser.add_argument("--tokens", type=int, default=32, help="per caption")
    parser.add_argument("--compile-rival", action="store_true", help="compile the autoregressive step")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--plot", type=Path, help="latency and throughput over the number of regions")


def run(options: argparse.Namespace) -> None:
    """Measure, print, write."""
    if min(options.regions) < 1 or options.rounds < 1:
        raise ValueError(f"--regions and --rounds must be at least 1, got {options.regions} and {options.rounds}")
    device = torch.device(options.device)
    name = options.dtype or ("float32" if device.type == "cpu" else "bfloat16")
    model = build_model(options.shape, str(REPOSITORY), device, torch_dtype(name))
    study = Study(model, options.tokens, options.steps, options.fast_steps, options.compile_rival)
    result: dict[str, Any] = {
        "shape": options.shape, "dtype": name, "prompt": {"grid": GRID}, "steps": options.steps,
        "fast_steps": options.fast_steps, "tokens_per_caption": options.tokens, "rounds": options.rounds,
        "parameters": sum(weight.numel() for weight in model.parameters()), "rows": [],
    }  # fmt: skip
    language = sum(weight.nbytes for weight in (*model.language_model.parameters(), model.lm_head.weight))
    result["bandwidth_bytes_per_s"] = bandwidth(device)
    result["weight_read_seconds"] = language / result["bandwidth_bytes_per_s"]
    result["environment"] = environment(device)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    for count in options.regions:
        result["rows"] += measure(study, count, options, device)
        options.json.write_text(json.dumps(result, indent=1) + "\n")  # what an interruption leaves is whole
        print(table(result, count))
    if options.plot:
        plot(result, options.plot)


def measure(study: Study, count: int, options: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """One row per system for a number of regions; systems take turns."""
    inputs = make_inputs(study.model.config, count, device)
    encoded = study.model.encode_image(**inputs)
    seconds: dict[str, list[float]] = {system: [] for system in options.systems}
    memory = dict.fromkeys(options.systems, 0)
    for number in tqdm(range(options.rounds + 1), desc=f"{count} regions", leave=False):
        for system in options.systems:
            image = encoded if system == "fast_on_cached_image" else None
            elapsed, peak = timed(study, system, inputs, image, device)
            if number:  # the first round warms up
                seconds[system].append(elapsed)
                memory[system] = max(memory[system], peak)
    return [row(system, count, times, memory[system], options) for system, times in seconds.items()]


def timed(study: Study, system: str, inputs, image, device: torch.device) -> tuple[float, int]:
    """Seconds and, on a GPU, peak memory of one run."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    study.run(system, inputs, image)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elapsed = time.perf_counter() - start
    return elapsed, torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def row(system: str, count: int, times: list[float], peak: int, options: argparse.Namespace) -> dict[str, Any]:
    """The figures of one system at one number of regions."""
    median = statistics.median(times)
    passes = {"full": options.steps, "cached": options.steps, "ar_batch": options.tokens}
    passes |= dict.fromkeys(("fast", "fast_on_cached_image"), options.fast_steps)
    runs = passes.get(system, options.tokens * count)
    return {
        "system": system,
        "regions": count,
        "seconds": median,
        "fastest": min(times),
        "slowest": max(times),
        "tokens_per_second": count * options.tokens / median,
        "tokens_per_forward": count * options.tokens / runs,
        "passes": runs,
        "peak_memory_bytes": peak or None,
    }


def bandwidth(device: torch.device) -> float:
    """Bytes per second of reading memory: a sum over a large buffer, the best of five."""
    buffer = torch.ones(2**28 if device.type == "cuda" else 2**26, device=device)
    times = []
    for _ in range(5):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        buffer.sum().item()
        times.append(time.perf_counter() - start)
    return buffer.nbytes / min(times)


def table(result: dict[str, Any], count: int) -> str:
    """The rows of one number of regions for a terminal, with ratios to the full recompute and to the batch rival."""
    rows = {row["system"]: row for row in result["rows"] if row["regions"] == count}
    lines = [
        f"{count} regions{'':16s}{'s':>9s}{'spread':>18s}{'tok/s':>8s}{'tok/fwd':>9s}{'vs full':>9s}{'vs batch':>10s}"
    ]
    for name, entry in rows.items():
        ratios = [
            rows[rival]["seconds"] / entry["seconds"] if rival in rows else None for rival in ("full", "ar_batch")
        ]
        shown = "".join(f"{'-' if ratio is None else f'{ratio:.2f}':>{9 + i}s}" for i, ratio in enumerate(ratios))
        spread = f"{entry['fastest']:.3f} to {entry['slowest']:.3f}"
        lines.append(
            f"  {name:22s}{entry['seconds']:9.3f}{spread:>18s}{entry['tokens_per_second']:8.1f}"
            f"{entry['tokens_per_forward']:9.2f}{shown}"
        )
    return "\n".join(lines)


def plot(result: dict[str, Any], path: Path) -> None:
    """Latency and throughput over the number of regions, as Figure 1(b) of the paper."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

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
    figure.suptitle(f"{result['shape']} shape, {result['environment']['hardware']}, {result['dtype']}")
    figure.savefig(path)
    pyplot.close(figure)
