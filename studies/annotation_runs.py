"""Collections to annotate, runs of the command in processes of their own, and clocks, for studies/annotation.py."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from perceptiondlm.common.json_files import read_json, write_json
from perceptiondlm.common.loading import DRAWN_MODEL
from perceptiondlm.drawn.scenes import draw_scene, scene_annotations
from perceptiondlm.serving.annotate.results import image_rows


LEAST, MOST = 4, 8  # regions of a picture
SEED = 3000  # of the drawn scenes
PART = 16  # images of a part
MODEL = str(DRAWN_MODEL)
SETTINGS = ["--model", MODEL, "--preset", "fast", "--images-per-part", str(PART)]


# --- the collection ---------------------------------------------------------------------------------------------------


def write_collection(folder: Path, count: int, photos: Path | None) -> Path:
    """Pictures and one COCO file about all of them; photographs come first, up to half of them."""
    folder.mkdir(parents=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for entry, regions in photographs(photos, count // 2):
        shutil.copy(photos / entry["image"], folder / Path(entry["image"]).name)
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


def started(arguments: list[str], log: Path, threads: int | None = None) -> subprocess.Popen:
    """The command in a process group of its own; what it says goes into a file."""
    variables = {**os.environ, "HF_HUB_OFFLINE": "1"}
    if threads:
        variables["OMP_NUM_THREADS"] = str(threads)
    with log.open("wb") as stream:
        return subprocess.Popen(arguments, start_new_session=True, stdout=stream, stderr=stream, env=variables)


def finished(process: subprocess.Popen, log: Path) -> None:
    """Wait for a run; refuses one that failed, with the end of what it said."""
    if process.wait():
        raise RuntimeError(f"a run ended with {process.returncode}: {log.read_text()[-800:]}")


def whole_run(
    arguments: list[str], out: Path, threads: int | None = None, watch: Callable[[int, int], None] | None = None
) -> dict[str, Any]:
    """A run from its beginning; its speed is that behind its first finished part, so that loading does not count.

    Args:
        watch: called many times a second with the process's id and the number of finished parts.
    """
    shutil.rmtree(out, ignore_errors=True)
    log = out.with_suffix(".log")
    begin = time.perf_counter()
    process = started(arguments, log, threads)
    arrivals: list[tuple[float, int]] = []  # when which number of parts was there
    while process.poll() is None:
        parts = len(list(out.glob("parts/part-*")))
        if parts > (arrivals[-1][1] if arrivals else 0):
            arrivals.append((time.perf_counter(), parts))
        if watch:
            watch(process.pid, parts)
        time.sleep(0.02)
    finished(process, log)
    regions = [image["regions"] for image in image_rows(out)]
    later = regions[arrivals[0][1] * PART :]  # parts finish in order, or nearly so on Ray
    seconds = arrivals[-1][0] - arrivals[0][0]
    return {
        "seconds": round(time.perf_counter() - begin, 2),
        "seconds_behind_first_part": round(seconds, 2),
        "regions_per_second": round(sum(later) / max(seconds, 1e-9), 2),
        "images_per_second": round(len(later) / max(seconds, 1e-9), 2),
    }


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
