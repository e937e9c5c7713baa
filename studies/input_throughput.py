"""How many samples per second the input side delivers: reading, decoding, tiling and noise, up to finished batches.

    python -m perceptiondlm.studies.input_throughput [--workers 0 2 4 8] [--size 1600 1200] [--samples 64]

Photo-like pictures (smooth shapes and noise, JPEG) with questions, in a parquet set that is streamed, and with
captioned masks, in a region set: both as the paper's stages read them, with tiles of 512 px of which an image takes at
most six and a thumbnail. Nothing is trained. The last line is one JSON object.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from pycocotools import mask as coco_mask
from torch.utils.data import DataLoader

from perceptiondlm.checkpoints.tokenizer import build_tokenizer, scene_texts
from perceptiondlm.common.environment import environment
from perceptiondlm.common.json_files import write_json
from perceptiondlm.processing_perceptiondlm import PerceptionDLMProcessor
from perceptiondlm.training.data.batches import LengthGroupedBatches
from perceptiondlm.training.data.collator import AnswerCollator
from perceptiondlm.training.data.data_config import DataConfig, LossConfig, SourceConfig
from perceptiondlm.training.data.mixture import build_dataset
from perceptiondlm.training.data.streaming import StreamOrder
from perceptiondlm.training.start import build_config


# The published tower's tiles: 512 px in patches of 16, shuffled to a quarter, 256 tokens.
VISION = {"image_size": 512, "patch_size": 16, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 4096}
BATCH, REGIONS, WARM_UP = 2, 6, 2  # samples of a batch, masks of a picture, batches before the clock starts
ANSWER = "a large striped red house with a blue roof beside a small green tree"


def pictures(count: int, size: tuple[int, int], seed: int = 0) -> Iterator[bytes]:
    """JPEG pictures of a size (width, height) whose files are as large as photos': smooth fields under fine noise."""
    dice = np.random.default_rng(seed)
    for _ in range(count):
        coarse = Image.fromarray(dice.integers(0, 255, (12, 16, 3), dtype=np.uint8)).resize(
            size, Image.Resampling.BICUBIC
        )
        noisy = np.asarray(coarse, np.int16) + dice.normal(0, 6, (size[1], size[0], 1)).astype(np.int16)
        stream = BytesIO()
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(stream, "JPEG", quality=90)
        yield stream.getvalue()


def write_conversations(folder: Path, images: list[bytes]) -> SourceConfig:
    """A parquet set with a question about each picture."""
    turns = [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": ANSWER}]
    rows = [{"images": [image], "conversations": json.dumps(turns)} for image in images]
    pq.write_table(pa.Table.from_pylist(rows), folder / "set.parquet", row_group_size=100)
    return SourceConfig("conversations", path=str(folder / "set.parquet"), streaming=True)


def write_regions(folder: Path, images: list[bytes], size: tuple[int, int]) -> SourceConfig:
    """A region set with masks side by side in each picture."""
    width, height = size
    masks = np.zeros((height, width, REGIONS), np.uint8, order="F")
    for index in range(REGIONS):
        masks[height // 8 : -height // 8, index * width // REGIONS + 5 : (index + 1) * width // REGIONS - 5, index] = 1
    rles = [{"size": [height, width], "counts": rle["counts"].decode()} for rle in coco_mask.encode(masks)]
    with open(folder / "set.jsonl", "w") as stream:
        for number, image in enumerate(images):
            (folder / f"{number}.jpg").write_bytes(image)
            entry = {"image": f"{number}.jpg", "mask_rles": rles, "captions": [ANSWER] * REGIONS}
            stream.write(json.dumps(entry) + "\n")
    return SourceConfig("regions", path=str(folder / "set.jsonl"))


def delivered(source: SourceConfig, folder: Path, workers: int) -> dict[str, Any]:
    """Samples, images and bytes of tiles per second that a loader delivers of a source."""
    tokenizer = build_tokenizer(scene_texts(0, 50), 768, 4096)
    conditioning = "none" if source.kind == "conversations" else "vision"
    config = build_config(
        {"vision_config": VISION, "text_config": TEXT, "region_conditioning": conditioning}, tokenizer
    )
    processor = PerceptionDLMProcessor.from_config(config, tokenizer)
    data, loss = DataConfig([source], max_length=4096), LossConfig(max_slots=128, noise_copies=1)
    dataset: Any = build_dataset(data, loss, processor, config, folder / "cache")
    order = StreamOrder(dataset, BATCH, 1, workers) if source.streaming else LengthGroupedBatches(dataset, BATCH, 0)
    collator = AnswerCollator.build(data, loss, processor, config)
    loader = DataLoader(dataset, BATCH, sampler=order, num_workers=workers, collate_fn=collator)
    samples = tiles = size = 0
    start = time.perf_counter()
    for number, batch in enumerate(loader, 1):
        if number <= WARM_UP:
            start = time.perf_counter()
            continue
        samples += len(batch["input_ids"])
        tiles += len(batch.get("pixel_values", ()))
        size += sum(tensor.nbytes for tensor in batch.values())
    seconds = time.perf_counter() - start
    return {
        "set": source.kind,
        "workers": workers,
        "samples": samples,
        "samples_per_second": round(samples / seconds, 2),
        "tiles_per_second": round(tiles / seconds, 2),
        "megabytes_per_sample": round(size / samples / 1e6, 2),
    }


def main(arguments: list[str] | None = None) -> int:
    """Measure, print a line for each setting, and keep the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2], help="processes that read, one run for each")
    parser.add_argument("--size", type=int, nargs=2, default=(1600, 1200), help="width and height of the pictures")
    parser.add_argument("--samples", type=int, default=64, help="pictures of each set")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    options = parser.parse_args(arguments)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder, size = Path(name), tuple(options.size)
        images = list(pictures(options.samples, size))
        for source in (write_conversations(folder, images), write_regions(folder, images, size)):
            for workers in options.workers:
                rows.append(delivered(source, folder, workers))
                print("{set}, {workers} workers: {samples_per_second} samples/s".format(**rows[-1]), file=sys.stderr)
        file_size = round(sum(map(len, images)) / len(images) / 1e6, 3)
    result = {"size": list(size), "megabytes_per_picture": file_size, "runs": rows, "environment": environment()}
    if options.json:
        write_json(options.json, result)
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
