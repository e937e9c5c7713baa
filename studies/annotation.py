"""Annotation at scale: speed against one image at a time and what bounds it, kills, memory, and what Ray costs.

    python -m perceptiondlm.studies.annotation --photos ../shared/data/photos --json studies/results/annotation_cpu.json
    python -m perceptiondlm.studies.annotation --images 40 --cases speed            # small

The collection: photographs with named regions (a folder of COCO pictures and their region JSON, where `--photos` names
one) and drawn scenes, 4 to 8 regions each, written as one COCO file. The embedded model captions it with
`preset="fast"`. Cases:

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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from perceptiondlm.common.environment import environment
from perceptiondlm.common.json_files import read_json, write_json
from perceptiondlm.common.loading import REPOSITORY
from perceptiondlm.drawn.scenes import draw_scene, scene_annotations
from perceptiondlm.serving.annotate.captioner import Captioner, batches
from perceptiondlm.serving.annotate.job import AnnotationJob, RegionChoice
from perceptiondlm.serving.annotate.plan import locked, prepare_folder
from perceptiondlm.serving.annotate.reading import PartReader
from perceptiondlm.serving.records import read_records


CASES = ("speed", "bounds", "kills", "memory")
LEAST, MOST = 4, 8  # regions of a picture
SEED = 3000  # of the drawn scenes
PART = 16  # images of a part
BATCHES = (8, 32, 128)  # regions in a pass
KILLS = 3
SETTINGS = ["--preset", "fast", "--images-per-part", str(PART)]
RAY = ["--engine", "ray"]


# --- the collection ---------------------------------------------------------------------------------------------------


def write_collection(folder: Path, count: int, photos: Path | None) -> Path:
    """Pictures and one COCO file about all of them; photographs come first, up to half of them."""
    folder.mkdir(parents=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for entry, regions in [*photographs(photos, count // 2), *()]:
        shutil.copy(photos / entry["image"], folder / Path(entry["image"]).name)  # type: ignore[operator]
        size = {"width": entry["width"], "height": entry["height"]}
        add(images, annotations, {"file_name": Path(entry["image"]).name, **size}, regions)
    scenes = (draw_scene(SEED, index) for index in range(10 * count))
    for scene in scenes:
        if len(images) == count:
            break
        if not LEAST <= len(scene.objects) <= MOST:
            continue
        entry = scene_annotations(scene)
        scene.image.save(folder / entry["file_name"])
        size = {"width": entry["width"], "height": entry["height"]}
        add(
            images,
            annotations,
            {"file_name": entry["file_name"], **size},
            [a["mask_rle"] for a in entry["annotations"]],
        )
    path = folder / "regions.json"
    write_json(path, {"images": images, "annotations": annotations})
    return path


def photographs(photos: Path | None, count: int) -> Iterator[tuple[dict[str, Any], list[dict]]]:
    """Photographs with at least `LEAST` regions, and their first `MOST` masks."""
    if photos is None:
        return
    entries = [entry for name in ("train.json", "val.json") for entry in read_json(photos / name)]
    fitting = [entry for entry in entries if len(entry["regions"]) >= LEAST and (photos / entry["image"]).is_file()]
    for entry in fitting[:count]:
        yield entry, [region["segmentation"] for region in entry["regions"][:MOST]]


def add(images: list, annotations: list, image: dict[str, Any], regions: list[Any]) -> None:
    """Append a picture and its regions to a COCO file's lists."""
    images.append({"id": len(images) + 1, **image})
    for region in regions:
        entry = {"id": len(annotations) + 1, "image_id": len(images), "category_id": 1, "iscrowd": 0}
        annotations.append({**entry, "segmentation": region})


# --- runs -------------------------------------------------------------------------------------------------------------


def command(source: Path, out: Path, *more: str) -> list[str]:
    """A run of the command."""
    return [
        sys.executable,
        "-m",
        "perceptiondlm.scripts.cli",
        "annotate",
        str(source),
        "--out",
        str(out),
        *SETTINGS,
        *more,
    ]


def started(arguments: list[str], threads: int | None) -> subprocess.Popen:
    """The command in a process group of its own."""
    variables = {**os.environ, "HF_HUB_OFFLINE": "1"}
    if threads:
        variables["OMP_NUM_THREADS"] = str(threads)
    with tempfile.TemporaryFile() as errors:
        return subprocess.Popen(arguments, start_new_session=True, stdout=subprocess.PIPE, stderr=errors, env=variables)


def whole_run(arguments: list[str], out: Path, watch: Callable[[subprocess.Popen], Any] | None = None, threads=None):
    """Seconds of a run from its first finished part on, regions of the rest, whole seconds; what `watch` saw last."""
    shutil.rmtree(out, ignore_errors=True)
    begin = time.perf_counter()
    process = started(arguments, threads)
    first: tuple[float, int] | None = None
    seen = None
    last = begin
    while process.poll() is None:
        parts = len(list(out.glob("parts/part-*")))
        if parts and first is None:
            first = (time.perf_counter(), parts)
        if parts:
            last = time.perf_counter() if not (out / "data").exists() else last
        seen = watch(process) if watch else None
        time.sleep(0.02)
    if process.returncode:
        raise RuntimeError(f"{' '.join(arguments)} ended with {process.returncode}")
    records = read_records(out)
    parts = -(-len({row["image_id"] for row in records}) // PART)
    assert first is not None  # it wrote at least one part
    share = (parts - first[1]) / parts
    return {
        "seconds": round(time.perf_counter() - begin, 2),
        "seconds_after_first_part": round(last - first[0], 2),
        "regions_per_second": round(share * len(records) / max(last - first[0], 1e-9), 2),
        "images_per_second": round(share * parts * PART / max(last - first[0], 1e-9), 2),
    }, seen


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
        str(source), str(out), RegionChoice(), generate={"preset": "fast"}, images_per_part=PART,
        regions_per_batch=regions_per_batch,
    )  # fmt: skip


# --- cases ------------------------------------------------------------------------------------------------------------


def speed(source: Path, folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One at a time against whole runs."""
    rows = [{"way": "pipeline, one image at a time", **one_at_a_time(source)}]
    for size in BATCHES:
        run, _ = whole_run(command(source, folder / "run", "--regions-per-batch", str(size)), folder / "run")
        rows.append({"way": f"annotate, {size} regions a batch", **run})
    if not options.no_ray:
        ways = (("plain, one thread", [], 1), ("Ray, one actor", [*RAY, "--actors", "1"], None),
                ("Ray, two actors", [*RAY, "--actors", "2"], None))  # fmt: skip
        for name, more, threads in ways:
            run, _ = whole_run(command(source, folder / "run", *more), folder / "run", threads=threads)
            rows.append({"way": f"annotate, {name}", **run})
    base = rows[0]["regions_per_second"]
    return [{**row, "times_one_at_a_time": round(row["regions_per_second"] / base, 2)} for row in rows]


def bounds(source: Path, folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Seconds of the steps of a run in this process, by batch size."""
    from perceptiondlm import passes_perceptiondlm as passes

    rows = []
    for size in (1, *BATCHES):
        job = job_for(source, folder / f"bounds{size}", size)
        with locked(job.folder):
            plan = prepare_folder(job)
        captioner = Captioner(job)
        clock = Clock()
        model_module = sys.modules[type(captioner.pipe.model).__module__]
        own_passes = sys.modules.get(model_module.__name__.replace("modeling", "passes"), passes)
        reader = clock.around("reading and measuring", PartReader(job, captioner.processor))
        parts = [reader(number) for number in range(len(plan))]
        model = captioner.pipe.model
        model.encode_images = clock.around("vision tower", model.encode_images)
        saved = {name: getattr(own_passes, name) for name in ("shared_prefix", "region_spans")}
        own_passes.shared_prefix = clock.around("prompts of images", saved["shared_prefix"])
        own_passes.region_spans = clock.around("prompts of regions", saved["region_spans"])
        call = own_passes.StaticPasses.__call__
        own_passes.StaticPasses.__call__ = clock.around("denoising passes", call)
        captioned = clock.around("model in all", captioner.captioned)
        if size == 1:
            captioner.limit = 1
        regions = sum(len(captioned(part).records) for part in tqdm(parts, desc=f"{size} regions"))
        for name, function in saved.items():
            setattr(own_passes, name, function)
        own_passes.StaticPasses.__call__ = call
        images = [image for part in parts for image in part.images]
        mean = statistics.mean(len(batch) for part in parts for batch in batches(part.images, captioner.limit))
        seconds = {name: round(value, 2) for name, value in clock.seconds.items()}
        row = {"regions_per_batch": size, "images_per_batch": round(mean, 2), "images": len(images), "regions": regions}
        rows.append(
            {**row, "regions_per_second": round(regions / clock.seconds["model in all"], 2), "seconds": seconds}
        )
    return rows


class Clock:
    """Adds up the seconds of calls."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def around(self, name: str, function: Callable) -> Callable:
        """The function, timed under a name."""

        def timed(*arguments: Any, **keywords: Any) -> Any:
            begin = time.perf_counter()
            try:
                return function(*arguments, **keywords)
            finally:
                self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin

        return timed


def kills(source: Path, folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Runs killed at random moments, then finished, against a clean one of the same kind."""
    rows = []
    dice = random.Random(options.seed)
    ways = {"plain": [], "Ray, two actors": [*RAY, "--actors", "2"]}
    for name, more in ways.items() if not options.no_ray else [("plain", [])]:
        clean, out = folder / "clean", folder / "killed"
        run, _ = whole_run(command(source, clean, *more), clean)
        shutil.rmtree(out, ignore_errors=True)
        moments = []
        for _ in range(KILLS):
            moments.append(killed_at(dice.uniform(0.3, 0.9) * run["seconds"], command(source, out, *more), out))
        finishing = started(command(source, out, *more), None)
        if finishing.wait():
            raise RuntimeError(f"the run in {out} ended with {finishing.returncode}")
        rows.append({"way": name, "kills": moments, **compared(read_records(clean), read_records(out))})
    return rows


def killed_at(seconds: float, arguments: list[str], out: Path) -> dict[str, Any]:
    """Start a run, kill its process group after so many seconds; the parts that were there."""
    process = started(arguments, None)
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
    out, samples = folder / "memory", []

    def watch(process: subprocess.Popen) -> list[tuple[int, float]]:
        samples.append((len(list(out.glob("parts/part-*"))), resident(process.pid)))
        return samples

    whole_run(command(source, out), out, watch)
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
