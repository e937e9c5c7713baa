"""Time and memory of judging a whole benchmark, against a fake judge in a process of its own.

    python -m perceptiondlm.studies.judging --rounds 2 --json report.json

Without `--dataset` the benchmark is made up, as large as ParaDLC-Bench: random pictures and masks, as many regions and
questions. Random pictures take more bytes than photographs do.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from perceptiondlm.common.environment import environment
from perceptiondlm.common.json_files import write_json
from perceptiondlm.common.measuring import timed
from perceptiondlm.evaluation.benchmarks import Benchmark, BenchmarkImage, BenchmarkRegion, load_benchmark
from perceptiondlm.evaluation.judges.registry import make_judge


NUM_IMAGES, NUM_REGIONS, NUM_QUESTIONS = 100, 299, 2345
WIDTH, HEIGHT = 640, 480
REGION_SIDES = (60, 360)  # pixels; crops are up to three times as large, 0.2 million pixels on average


def random_benchmark(folder: Path) -> Benchmark:
    """A benchmark of ParaDLC-Bench's size; its pictures are written into the folder."""
    draw = np.random.default_rng(0)
    shares = np.array_split(np.arange(NUM_REGIONS), NUM_IMAGES)
    counts = list(map(len, np.array_split(np.arange(NUM_QUESTIONS), NUM_REGIONS)))
    images = []
    for number, share in enumerate(shares):
        coarse = draw.integers(0, 256, (HEIGHT // 8, WIDTH // 8, 3), dtype=np.uint8)
        path = folder / f"{number}.jpg"
        Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC).save(path, quality=90)
        regions = [_random_region(f"{number}_{index}", counts[region], draw) for index, region in enumerate(share)]
        images.append(BenchmarkImage(str(number), path, HEIGHT, WIDTH, regions))
    return Benchmark("random", "paradlc", images)


def _random_region(region_id: str, num_questions: int, draw: np.random.Generator) -> BenchmarkRegion:
    """An ellipse somewhere in the picture, with questions."""
    (height, width), sides = draw.integers(*REGION_SIDES, 2), np.array((HEIGHT, WIDTH))
    middle = draw.uniform((height / 2, width / 2), sides - (height / 2, width / 2))
    rows, columns = np.ogrid[:HEIGHT, :WIDTH]
    mask = ((rows - middle[0]) * 2 / height) ** 2 + ((columns - middle[1]) * 2 / width) ** 2 < 1
    questions = [
        {
            "question": f"Which of the following is said about detail {number} of the object?",
            "choices": [
                ["It is mentioned as it is.", 1],
                ["It is mentioned otherwise.", -1],
                ["It is not mentioned.", 0],
            ],
            "type": ("positive", "negative")[number % 2],
        }
        for number in range(num_questions)
    ]
    return BenchmarkRegion(region_id, "object", questions, coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8)))


def measure(benchmark: Benchmark, show_image: bool, latency: float, concurrency: int) -> dict[str, Any]:
    """Judge every region once, with an empty cache; seconds, requests and growth of the resident memory at its peak."""
    captions = {region.region_id: f"An object, the one called {region.region_id}." for region in benchmark.regions}
    command = [sys.executable, "-m", "perceptiondlm.studies.fake_judge", "--latency", str(latency)]
    with (
        tempfile.TemporaryDirectory() as folder,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server,
    ):
        assert server.stdout is not None
        url = server.stdout.readline().strip()
        judge = make_judge("openai:fake", base_url=url, cache=Path(folder) / "answers.jsonl", concurrency=concurrency)
        seconds, memory = timed(lambda: benchmark.score(captions, judge, show_image=show_image), torch.device("cpu"))
        requests, _ = server.communicate()
    return {
        "judge_sees": "image and mask" if show_image else "text",
        "seconds": round(seconds, 2),
        "requests": int(requests),
        "peak_memory_growth_bytes": memory,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", type=Path, help="folder of a benchmark with its pictures, instead of random ones")
    parser.add_argument("--latency", type=float, default=0.05, help="seconds that the judge takes over a question")
    parser.add_argument("--concurrency", type=int, default=32, help="questions under way at once")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        benchmark = load_benchmark(options.dataset) if options.dataset else random_benchmark(Path(folder))
        settings = {"latency": options.latency, "concurrency": options.concurrency}
        rows = []
        for number in range(options.rounds):
            for show_image in (False, True):
                rows.append({"round": number, **measure(benchmark, show_image, **settings)})
                print(rows[-1], flush=True)
    result = {
        "dataset": benchmark.name,
        "regions": len(benchmark.regions),
        "questions": sum(map(len, benchmark.questions.values())),
        **settings,
        "rows": rows,
        "environment": environment(),
    }
    if options.json:
        write_json(options.json, result)


if __name__ == "__main__":
    main()
