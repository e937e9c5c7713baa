"""What many regions of one image, and many images, cost: time, arithmetic and memory of passes and of whole runs.

    python -m perceptiondlm.studies.regions_at_scale --json after.json
    python -m perceptiondlm.studies.regions_at_scale --code OTHER_CHECKOUT --json before.json
    python -m perceptiondlm.studies.regions_at_scale --show after.json --before before.json

Goes through the public doors alone (AutoModel, AutoProcessor, `generate`), so that the code of another checkout of this
repository, named by `--code`, is measured by the same script. The shape `small` has the random weights of
studies/efficiency.py, the shape `embedded` those beside the code. Memory is the most that tensors take beyond weights
and inputs, counted by the profiler; seconds of a pass are the difference between two numbers of steps.
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModel, AutoProcessor

from perceptiondlm.common.environment import environment
from perceptiondlm.common.json_files import read_json, write_json
from perceptiondlm.common.loading import DRAWN_MODEL, REPOSITORY, from_checkpoint
from perceptiondlm.common.measuring import count_flops, peak_allocation, timed
from perceptiondlm.drawn.scenes import draw_scene
from perceptiondlm.studies.efficiency import SHAPES


CPU = torch.device("cpu")
IMAGE_SIZE = (1536, 1024)  # seven tiles of 512 pixels
SHAPE_NAMES = ("small", "embedded")
BATCH_IMAGES, BATCH_REGIONS = 8, 4
BATCH_SEED = 2000
FIGURES = {  # of a row: column title, factor, format
    "seconds_per_pass": ("s per pass", 1, "{:.3f}"),
    "seconds": ("s in all", 1, "{:.2f}"),
    "flops_per_pass": ("GFLOP per pass", 1e-9, "{:,.1f}"),
    "flops": ("GFLOP in all", 1e-9, "{:,.0f}"),
    "peak_bytes": ("peak, MB", 1e-6, "{:,.0f}"),
}


def picture() -> Image.Image:
    """An image of seven tiles: colours at random, in patches of 64 pixels."""
    columns, rows = (side // 64 for side in IMAGE_SIZE)
    colours = np.random.default_rng(0).integers(0, 256, (rows, columns, 3), dtype=np.uint8)
    return Image.fromarray(colours).resize(IMAGE_SIZE, Image.Resampling.NEAREST)


def boxes(count: int) -> list[list[int]]:
    """Boxes of different places and sizes in `picture()`."""
    generator = np.random.default_rng(count)
    size = np.array(IMAGE_SIZE)
    low = (generator.random((count, 2)) * (size - 64)).astype(int)
    high = low + 32 + (generator.random((count, 2)) * (size - low - 32)).astype(int)
    return np.concatenate((low, high), axis=1).tolist()


def load(shape: str, code: Path):
    """Model and processor of a shape, by the code in a directory; the embedded one is that of the drawn world."""
    drawn = code / DRAWN_MODEL.relative_to(REPOSITORY)
    embedded = drawn if drawn.is_dir() else code
    processor = from_checkpoint(AutoProcessor, embedded)
    if shape == "embedded":
        return from_checkpoint(AutoModel, embedded).eval(), processor
    config = from_checkpoint(AutoConfig, embedded)
    sizes = SHAPES[shape]
    for name in ("vision_config", "text_config"):
        setattr(config, name, type(getattr(config, name))(**sizes[name]))
    torch.manual_seed(0)
    model = AutoModel.from_config(config, trust_remote_code=True).float().eval()
    return model, type(processor).from_config(config, processor.tokenizer)


def measure(run: Callable[[int], Any], steps: int, rounds: int) -> dict[str, Any]:
    """Time, arithmetic and memory of a run of a number of steps, and of one of its passes.

    Args:
        run: captions everything in so many steps; the first, unmeasured call warms up.
    """
    run(1)
    once = statistics.median(timed(partial(run, 1), CPU)[0] for _ in range(rounds))
    whole = statistics.median(timed(partial(run, steps), CPU)[0] for _ in range(rounds))
    flops, flops_once = (count_flops(partial(run, number)) for number in (steps, 1))
    return {
        "steps": steps,
        "seconds": whole,
        "seconds_per_pass": (whole - once) / (steps - 1),
        "flops": flops,
        "flops_per_pass": (flops - flops_once) / (steps - 1),
        "peak_bytes": peak_allocation(partial(run, min(steps, 2)), CPU),
    }


def one_image(model, processor, regions: int, group: int | None, steps: int, rounds: int) -> dict[str, Any]:
    """All regions of one image, in one pass or in groups."""
    limit = {} if group is None else {"max_regions_per_pass": group}
    inputs = processor(images=picture(), boxes=boxes(regions), **limit)

    def run(number: int) -> None:
        model.generate(**inputs, steps=number, early_exit=False)

    return {"regions": regions, "images": 1, "group": group, **measure(run, steps, rounds)}


def many_images(model, processor, rounds: int) -> dict[str, Any]:
    """Eight drawn images of four regions in one batch under the fast preset: answers leave as they are finished."""
    scenes = (draw_scene(BATCH_SEED, index) for index in count())
    chosen = list(islice((scene for scene in scenes if len(scene.objects) >= BATCH_REGIONS), BATCH_IMAGES))
    masks = [[item.mask for item in scene.objects[:BATCH_REGIONS]] for scene in chosen]
    inputs = processor(images=[scene.image for scene in chosen], masks=masks)
    run = partial(model.generate, **inputs, preset="fast")
    passes = run().num_forward_passes
    return {
        "regions": BATCH_REGIONS,
        "images": BATCH_IMAGES,
        "group": None,
        "steps": passes,
        "seconds": statistics.median(timed(run, CPU)[0] for _ in range(rounds)),
        "flops": count_flops(run),
        "peak_bytes": peak_allocation(run, CPU),
    }


def run_study(options: argparse.Namespace) -> dict[str, Any]:
    """Measure every case; the report is written after each."""
    result: dict[str, Any] = {"dtype": "float32", "rounds": options.rounds, "environment": environment(), "rows": []}
    cases: list[tuple[str, int, int | None]] = [
        (shape, regions, group)
        for shape in options.shapes
        for regions in options.regions
        for group in (None, options.group)
        if group is None or group < regions
    ]
    cases += [("embedded", 0, None)] if "embedded" in options.shapes else []
    loaded: tuple[str, Any, Any] | None = None
    for shape, regions, group in tqdm(cases, desc="cases"):
        if loaded is None or loaded[0] != shape:
            loaded = (shape, *load(shape, options.code))
        _, model, processor = loaded
        row = (
            one_image(model, processor, regions, group, options.steps, options.rounds)
            if regions
            else many_images(model, processor, options.rounds)
        )
        result["rows"].append({"shape": shape, **row})
        write_json(options.json, result)
    return result


def table(result: dict[str, Any], before: dict[str, Any] | None = None) -> str:
    """Rows as Markdown; with a second report, its figure stands before the first one's."""
    lines = [
        "| shape | images x regions | at a time | " + " | ".join(title for title, _, _ in FIGURES.values()) + " |",
        "| " + " | ".join(["---"] * (3 + len(FIGURES))) + " |",
    ]
    earlier = {case(row): row for row in (before or {"rows": []})["rows"]}
    for row in result["rows"]:
        old = earlier.get(case(row), {})
        cells = [row["shape"], f"{row['images']} x {row['regions']}", "all" if row["group"] is None else row["group"]]
        for name, (_, factor, form) in FIGURES.items():
            shown = [form.format(factor * r[name]) for r in (old, row) if name in r]
            cells.append(" → ".join(shown))
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def case(row: dict[str, Any]) -> tuple:
    """What a row measured."""
    return row["shape"], row["images"], row["regions"], row["group"]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where the report goes")
    parser.add_argument(
        "--code", type=Path, default=REPOSITORY, help="a checkout of this repository, by default this one"
    )
    parser.add_argument("--shapes", nargs="+", choices=SHAPE_NAMES, default=list(SHAPE_NAMES))
    parser.add_argument("--regions", type=int, nargs="+", default=[4, 60, 200], metavar="N")
    parser.add_argument("--group", type=int, default=10, help="regions at a time, besides all at once")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--show", type=Path, help="print a report as Markdown instead of measuring")
    parser.add_argument("--before", type=Path, help="with --show: a report whose figures stand before those")
    options = parser.parse_args()
    if (options.json is None) == (options.show is None):
        parser.error("give --json to measure, or --show to print a report")
    if options.show:
        print(table(read_json(options.show), read_json(options.before) if options.before else None))
        return
    if min(*options.regions, options.group, options.rounds) < 1 or options.steps < 2:
        parser.error("--regions, --group and --rounds must be at least 1, --steps at least 2")
    if not (options.code / "config.json").is_file():
        parser.error(f"--code {options.code} has no config.json: it must be a checkout of this repository")
    print(table(run_study(options)))


if __name__ == "__main__":
    main()
