"""`perceptiondlm benchmark`: time ways of captioning N regions, side by side in one process.

Systems take turns in every round, after a warm-up; the figures are medians over the rounds. What the systems are:
studies/efficiency.py. Weights are random unless the shape is `embedded`.
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from perceptiondlm.common.environment import environment
from perceptiondlm.common.json_files import write_json
from perceptiondlm.common.loading import DRAWN_MODEL, torch_device, torch_dtype
from perceptiondlm.common.measuring import bandwidth, peak_flops, timed
from perceptiondlm.studies.efficiency import GRID, SHAPES, SYSTEMS, Study, build_model, make_inputs
from perceptiondlm.studies.efficiency_plots import plot_groups, plot_regions


GROUPED = ("full", "cached", "fast")  # systems that may take the regions of an image in groups


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
    parser.add_argument("--compile", action="store_true", help="compile the passes of cached and fast")
    parser.add_argument("--compile-rival", action="store_true", help="compile the autoregressive step")
    parser.add_argument(
        "--at-a-time", type=int, nargs="+", default=[], metavar="K",
        help="also caption the largest number of regions in groups of K, each from the pixels (the paper's Figure 1c)",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--plot", type=Path, help="latency and throughput over the number of regions")
    parser.add_argument("--plot-groups", type=Path, help="time over the size of the groups of --at-a-time")


def run(options: argparse.Namespace) -> None:
    """Measure, print, write."""
    _check(options)
    device = torch_device(options.device)
    name = options.dtype or ("float32" if device.type == "cpu" else "bfloat16")
    dtype = torch_dtype(name)
    model = build_model(options.shape, str(DRAWN_MODEL), device, dtype)
    study = Study(
        model, options.tokens, options.steps, options.fast_steps, options.compile, compile_rival=options.compile_rival
    )
    result: dict[str, Any] = {
        "shape": options.shape, "dtype": name, "prompt": {"grid": GRID}, "steps": options.steps,
        "fast_steps": options.fast_steps, "tokens_per_caption": options.tokens, "rounds": options.rounds,
        "compiled": options.compile, "compiled_rival": options.compile_rival,
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "language_weight_bytes": sum(w.nbytes for w in (*model.language_model.parameters(), model.lm_head.weight)),
        "bandwidth_bytes_per_s": bandwidth(device), "peak_flops_per_s": peak_flops(device, dtype),
        "environment": environment(device), "rows": [], "groups": [],
    }  # fmt: skip
    result["weight_read_seconds"] = result["language_weight_bytes"] / result["bandwidth_bytes_per_s"]
    for count in options.regions:
        result["rows"] += measure(study, count, options, device, result)
        write_json(options.json, result)  # what an interruption leaves is whole
        print(table(result, count))
    if options.at_a_time:
        result["groups"] = measure_groups(study, max(options.regions), options, device)
        write_json(options.json, result)
        print(group_table(result["groups"]))
    if options.plot:
        plot_regions(result, options.plot)
    if options.plot_groups:
        plot_groups(result, options.plot_groups)


def _check(options: argparse.Namespace) -> None:
    if min(options.regions) < 1 or options.rounds < 1:
        raise ValueError(f"--regions and --rounds must be at least 1, got {options.regions} and {options.rounds}")
    most = max(options.regions)
    if wrong := [size for size in options.at_a_time if size < 1 or most % size]:
        raise ValueError(f"--at-a-time must divide the largest of --regions, {most}: got {wrong}")
    if options.plot_groups and not options.at_a_time:
        raise ValueError("--plot-groups shows --at-a-time: give both")
    if min(options.steps, options.fast_steps, options.tokens) < 2:
        raise ValueError("--steps, --fast-steps and --tokens must be at least 2: a step's time is taken from two runs")


def take_turns(runs: dict[Any, Callable[[], Any]], rounds: int, device: torch.device, title: str):
    """Seconds of every round and the highest peak memory of every run, after a round of warming up."""
    seconds: dict[Any, list[float]] = {key: [] for key in runs}
    memory: dict[Any, list[int]] = {key: [] for key in runs}
    with tqdm(total=(rounds + 1) * len(runs), desc=title, leave=False) as bar:
        for number in range(rounds + 1):
            for key, function in runs.items():
                elapsed, peak = timed(function, device)
                if number:
                    seconds[key].append(elapsed)
                    memory[key] += [] if peak is None else [peak]
                bar.update()
    return seconds, {key: max(peaks, default=None) for key, peaks in memory.items()}


def measure(study: Study, count: int, options: argparse.Namespace, device, device_figures) -> list[dict[str, Any]]:
    """One row per system for a number of regions; systems take turns, whole and with a single pass."""
    inputs = make_inputs(study.model.config, count, device)
    encoded = study.model.encode_image(**inputs)
    images = {system: encoded if system == "fast_on_cached_image" else None for system in options.systems}
    runs: dict[Any, Callable[[], Any]] = {}
    for system, image in images.items():
        runs[system] = partial(study.run, system, inputs, image)
        runs[system, "one pass"] = partial(study.run, system, inputs, image, passes=1)
    seconds, memory = take_turns(runs, options.rounds, device, f"{count} regions")
    rows = []
    for system, image in images.items():
        sequences, passes = study.sequences(system, count), study.passes(system)
        flops = study.flops(system, inputs, image)
        read = sequences * passes * device_figures["weight_read_seconds"]
        row = timing(seconds[system])
        once = statistics.median(seconds[system, "one pass"])
        rows.append({
            "system": system, "regions": count, **row, "tokens_per_second": count * options.tokens / row["seconds"],
            "passes": sequences * passes, "tokens_per_forward": count * options.tokens / (sequences * passes),
            "milliseconds_per_pass": 1000 * (row["seconds"] - once) / (sequences * (passes - 1)),
            "peak_memory_bytes": memory[system], "flops": flops,
            "bound_seconds": max(flops / device_figures["peak_flops_per_s"], read),
        })  # fmt: skip
    return rows


def measure_groups(study: Study, count: int, options: argparse.Namespace, device) -> list[dict[str, Any]]:
    """Seconds for all regions of an image, K at a time, the image encoded anew for every group."""
    runs: dict[Any, Callable[[], Any]] = {}
    for size in sorted(options.at_a_time):
        inputs = make_inputs(study.model.config, size, device)
        for system in (system for system in options.systems if system in GROUPED):
            runs[system, size] = partial(_in_groups, study, system, inputs, count // size)
    seconds, _ = take_turns(runs, options.rounds, device, f"{count} regions in groups")
    return [
        {"system": system, "regions": count, "at_a_time": size, **timing(times)}
        for (system, size), times in seconds.items()
    ]


def _in_groups(study: Study, system: str, inputs, groups: int) -> None:
    for _ in range(groups):
        study.run(system, inputs)


def timing(times: list[float]) -> dict[str, float]:
    """Median and spread of some seconds."""
    return {"seconds": statistics.median(times), "fastest": min(times), "slowest": max(times)}


def table(result: dict[str, Any], count: int) -> str:
    """The rows of one number of regions for a terminal, with ratios to the full recompute and to the batch rival."""
    rows = {row["system"]: row for row in result["rows"] if row["regions"] == count}
    title = f"{count} regions"
    columns = (("s", 9), ("spread", 18), ("ms/pass", 9), ("tok/s", 9), ("tok/fwd", 9), ("MB", 8), ("bound", 9))
    lines = [f"{title:24s}" + "".join(f"{name:>{width}s}" for name, width in columns) + "  vs full  vs batch"]
    for name, entry in rows.items():
        ratios = [
            rows[rival]["seconds"] / entry["seconds"] if rival in rows else None for rival in ("full", "ar_batch")
        ]
        shown = "".join(f"{'-' if ratio is None else f'{ratio:.2f}':>{9 + i}s}" for i, ratio in enumerate(ratios))
        spread = f"{entry['fastest']:.3f} to {entry['slowest']:.3f}"
        peak = entry["peak_memory_bytes"]
        lines.append(
            f"  {name:22s}{entry['seconds']:9.3f}{spread:>18s}{entry['milliseconds_per_pass']:9.2f}"
            f"{entry['tokens_per_second']:9.1f}{entry['tokens_per_forward']:9.2f}"
            f"{'-' if peak is None else round(peak / 1e6):>8}{entry['bound_seconds']:9.3f}{shown}"
        )
    return "\n".join(lines)


def group_table(groups: list[dict[str, Any]]) -> str:
    """Seconds over the size of the groups, with the speed-up over the smallest."""
    lines = [f"{groups[0]['regions']} regions, in groups of{'':6s}{'s':>9s}{'speed-up':>10s}"]
    first: dict[str, float] = {}
    for row in groups:
        first.setdefault(row["system"], row["seconds"])
        ratio = first[row["system"]] / row["seconds"]
        lines.append(f"  {row['system']:22s}{row['at_a_time']:4d}{row['seconds']:9.3f}{ratio:10.2f}")
    return "\n".join(lines)
