"""Annotation at scale: speed against one image at a time and what bounds it, kills, memory, and what Ray costs.

    python -m perceptiondlm.studies.annotation --photos ../shared/data/photos --json studies/results/annotation_cpu.json
    python -m perceptiondlm.studies.annotation --images 40 --cases speed            # small

The collection: photographs with named regions (a folder of COCO pictures and their region JSON, where `--photos` names
one) and drawn scenes, 4 to 8 regions each, written as one COCO file. The drawn world's model captions
it with `preset="fast"`. Cases:

    speed     one image at a time through the pipeline, against whole runs with several batch sizes, plain and on Ray
    bounds    where the time of a run goes: reading, tower, prompts, passes
    kills     runs killed with SIGKILL at random moments, then finished, against a clean run; plain and on Ray
    memory    resident memory of a run, from image to image

Every run is the command itself, in a process of its own. The last line is one JSON object.
"""

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from perceptiondlm.common.environment import environment
from perceptiondlm.common.json_files import read_json, write_json
from perceptiondlm.common.loading import REPOSITORY
from perceptiondlm.common.measuring import count_flops, peak_flops
from perceptiondlm.serving.annotate.captioner import Captioner, batches
from perceptiondlm.serving.annotate.job import AnnotationJob, RegionChoice
from perceptiondlm.serving.annotate.plan import locked, prepare_folder
from perceptiondlm.serving.annotate.reading import PartReader
from perceptiondlm.serving.records import read_records
from perceptiondlm.studies.annotation_runs import (
    MODEL,
    MOST,
    PART,
    Clock,
    command,
    finished,
    started,
    whole_run,
    write_collection,
)


CASES = ("speed", "bounds", "kills", "memory")
BATCHES = (8, 32, 128)  # regions in a pass
KILLS = 3
RAY = ["--engine", "ray"]


def one_at_a_time(source: Path) -> dict[str, Any]:
    """Pictures one by one through the pipeline, read and captioned; model loaded before."""
    from perceptiondlm.serving.annotate.coco import CocoFile

    coco = CocoFile.read(source)
    pipe = Captioner(job_for(source, source.parent)).pipe
    names = list(coco.images.items())
    regions = 0
    pipe(str(source.parent / names[0][1]), masks=coco.regions_of_id(names[0][0])["regions"], preset="fast")
    begin = time.perf_counter()
    for number, name in tqdm(names, desc="one at a time"):
        regions += len(pipe(str(source.parent / name), masks=coco.regions_of_id(number)["regions"], preset="fast"))
    seconds = time.perf_counter() - begin
    speeds = {"regions_per_second": regions / seconds, "images_per_second": len(names) / seconds}
    return {"seconds": round(seconds, 2), **{name: round(value, 2) for name, value in speeds.items()}}


def job_for(source: Path, out: Path, regions_per_batch: int = 32) -> AnnotationJob:
    """The job that the command would make."""
    return AnnotationJob(
        str(source), str(out), RegionChoice(), model=MODEL, generate={"preset": "fast"}, images_per_part=PART,
        regions_per_batch=regions_per_batch,
    )  # fmt: skip


# --- cases ------------------------------------------------------------------------------------------------------------


def speed(source: Path, folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One at a time against whole runs."""
    rows = [{"way": "pipeline, one image at a time", **one_at_a_time(source)}]
    for size in BATCHES:
        run = whole_run(command(source, folder / "run", "--regions-per-batch", str(size)), folder / "run")
        rows.append({"way": f"annotate, {size} regions a batch", **run})
    if not options.no_ray:
        cases: list[tuple[str, list[str], int | None]] = [
            ("plain, one thread", [], 1),
            ("Ray, one actor", [*RAY, "--actors", "1"], None),
            ("Ray, two actors", [*RAY, "--actors", "2"], None),
        ]
        for name, more, threads in cases:
            run = whole_run(command(source, folder / "run", *more), folder / "run", threads)
            rows.append({"way": f"annotate, {name}", **run})
    base = rows[0]["regions_per_second"]
    return [{**row, "times_one_at_a_time": round(row["regions_per_second"] / base, 2)} for row in rows]


def bounds(source: Path, folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Seconds of the steps of a run in this process, and its arithmetic, by batch size; 1 is an image at a time."""
    peak = peak_flops(torch.device("cpu"), torch.float32)
    rows = []
    for size in (1, *BATCHES):
        job = job_for(source, folder / f"bounds{size}", max(size, MOST))
        with locked(job.folder):
            plan = prepare_folder(job)
        captioner, clock = Captioner(job), Clock()
        captioner.limit = size
        reader = clock.around("reading and measuring", PartReader(job, captioner.processor))
        parts = [reader(number) for number in range(len(plan))]
        captioned = clock.around("model in all", captioner.captioned)
        with timed_steps(captioner.pipe.model, clock):
            regions = sum(len(captioned(part).records) for part in tqdm(parts, desc=f"{size} regions"))
        part = parts[0]
        flops = count_flops(partial(captioner.captioned, part)) / sum(len(image.found) for image in part.images)
        speed = regions / clock.seconds["model in all"]
        row = {
            "regions_per_batch": size,
            "images_per_batch": round(statistics.mean(len(b) for part in parts for b in batches(part.images, size)), 2),
            "regions": regions,
            "regions_per_second": round(speed, 2),
            "gflop_per_region": round(flops / 1e9, 3),
            "gflop_per_second": round(flops * speed / 1e9, 1),
            "gflop_per_second_of_a_large_product": round(peak / 1e9, 1),
        }
        rows.append({**row, "seconds": {name: round(value, 2) for name, value in clock.seconds.items()}})
    return rows


@contextmanager
def timed_steps(model: Any, clock: Clock) -> Iterator[None]:
    """Time the tower, the prompts and the passes of a model; its code may be a copy that the loader made."""
    passes = sys.modules[type(model).__module__.replace("modeling", "passes")]
    functions = {"shared_prefix": "prompts of images", "region_spans": "prompts of regions"}
    saved = {name: getattr(passes, name) for name in functions}
    call = passes.StaticPasses.__call__
    model.encode_images = clock.around("vision tower", model.encode_images)
    try:
        for name, title in functions.items():
            setattr(passes, name, clock.around(title, saved[name]))
        passes.StaticPasses.__call__ = clock.around("denoising passes", call)
        yield
    finally:
        passes.StaticPasses.__call__ = call
        for name, function in saved.items():
            setattr(passes, name, function)


def kills(source: Path, folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Runs killed at random moments, then finished, against a clean one of the same kind."""
    rows = []
    dice = random.Random(options.seed)
    ways: dict[str, list[str]] = {"plain": []} | (
        {} if options.no_ray else {"Ray, two actors": [*RAY, "--actors", "2"]}
    )
    for name, more in ways.items():
        clean, out = folder / "clean", folder / "killed"
        run = whole_run(command(source, clean, *more), clean)
        shutil.rmtree(out, ignore_errors=True)
        moments = []
        for _ in range(KILLS):
            moments.append(killed_at(dice.uniform(0.3, 0.5) * run["seconds"], command(source, out, *more), out))
        log = out.with_suffix(".log")
        finished(started(command(source, out, *more), log), log)
        rows.append({"way": name, "kills": moments, **compared(read_records(clean), read_records(out))})
    return rows


def killed_at(seconds: float, arguments: list[str], out: Path) -> dict[str, Any]:
    """Start a run, kill its process group after so many seconds; the parts that were there."""
    process = started(arguments, out.with_suffix(".log"))
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    stray = [*out.glob("parts/.part-*")]
    state = {"seconds": round(seconds, 1), "parts": len(list(out.glob("parts/part-*"))), "half_written": len(stray)}
    return {**state, "killed": process.returncode == -signal.SIGKILL}


def compared(clean: list[dict[str, Any]], other: list[dict[str, Any]]) -> dict[str, Any]:
    """How two runs' records agree."""
    ids = [row["id"] for row in other]
    by_id = {row["id"]: row for row in other}
    shared = [(row, by_id[row["id"]]) for row in clean if row["id"] in by_id]
    return {
        "regions": len(clean),
        "missing": len(clean) - len(shared),
        "duplicates": len(ids) - len(set(ids)),
        "same_order": ids == [row["id"] for row in clean],
        "equal_records": sum(row == twin for row, twin in shared),
        "equal_captions": sum(row["caption"] == twin["caption"] for row, twin in shared),
        "largest_score_difference": max((abs(row["score"] - twin["score"]) for row, twin in shared), default=0.0),
    }


def memory(source: Path, folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Resident memory of a plain run at each quarter of its parts, in MB."""
    out = folder / "memory"
    samples: list[tuple[int, float]] = []

    whole_run(command(source, out), out, watch=lambda process, parts: samples.append((parts, resident(process))))
    parts = max(part for part, _ in samples)
    marks = [max(1, parts * quarter // 4) for quarter in range(1, 5)]
    held = {mark: max((size for part, size in samples if part == mark), default=0.0) for mark in marks}
    return [{"part": mark, "of": parts, "megabytes": round(size, 1)} for mark, size in held.items()]


def resident(process: int) -> float:
    """Resident memory of a process in MB, 0 where it has gone."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS")), 0.0)


def main(arguments: list[str] | None = None) -> int:
    """Measure, keep what is there after each case, print the last line as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--photos", type=Path, help="folder with train.json, val.json and the pictures they name")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--no-ray", action="store_true", help="leave Ray out")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of kills")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    options = parser.parse_args(arguments)
    os.chdir(REPOSITORY)
    result: dict[str, Any] = {"environment": environment(), "threads": torch.get_num_threads()}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = write_collection(folder / "collection", options.images, options.photos)
        content = read_json(source)
        photos = sum(image["file_name"].endswith(".jpg") for image in content["images"])
        result |= {"images": len(content["images"]), "photos": photos, "regions": len(content["annotations"])}
        for case in options.cases:
            result[case] = globals()[case](source, folder, options)
            print(json.dumps({case: result[case]}), file=sys.stderr)
            if options.json:
                write_json(options.json, result)
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
