"""Captions a benchmark image by image, on one process or several, and continues where a killed run stopped.

Processes share the images between them, without talking to each other but at start and end:

    accelerate launch --multi_gpu --num_processes 8 -m perceptiondlm.scripts.cli evaluate --dataset paradlc ...
"""

import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image
from tqdm.auto import tqdm

from perceptiondlm.common.measuring import synchronize
from perceptiondlm.evaluation.benchmarks import Benchmark
from perceptiondlm.evaluation.captions import CaptionedImage, CaptionLog
from perceptiondlm.evaluation.zero_shot import zero_shot_answers, zero_shot_inputs


WAIT = timedelta(days=2)  # for the slowest process; the default is minutes


def process_state() -> PartialState:
    """This process among those that `accelerate launch` (or torchrun) started; one process without it."""
    return PartialState(cpu=not torch.accelerator.is_available(), timeout=WAIT)


def caption_image(
    model,
    processor,
    image_id: str,
    image: Image.Image,
    masks: Mapping[str, np.ndarray],
    question: str | None = None,
    max_regions_per_pass: int | None = None,
    share_prompt_ids: bool = False,
    zero_shot: str | None = None,
    **generate_kwargs: Any,
) -> CaptionedImage:
    """Caption all regions of one image in parallel.

    Args:
        masks: (H, W) bool mask by region id.
        question: asked instead of the processor's `region_question`.
        max_regions_per_pass: splits the regions into passes; by default as the processor does.
        share_prompt_ids: one prompt id for all regions (the paper's Table 10).
        zero_shot: ask a base model, which knows no regions, in one of the ways of `zero_shot.WAYS`.
        generate_kwargs: settings of `generate`.
    """
    start = time.perf_counter()
    regions = list(masks.values())
    if zero_shot is None:
        shared = {"share_prompt_ids": True} if share_prompt_ids else {}
        inputs = processor(
            images=image, text=question, masks=regions, max_regions_per_pass=max_regions_per_pass, **shared
        )
    else:
        inputs = zero_shot_inputs(processor, image, regions, zero_shot, question)
    inputs = inputs.to(model.device)
    synchronize(model.device)
    generating = time.perf_counter()
    output = model.generate(**inputs, **generate_kwargs)
    synchronize(model.device)
    generated = time.perf_counter()
    if zero_shot is None:
        (answers,) = processor.post_process_region_captions(output, output_scores=True)
    else:
        answers = zero_shot_answers(processor, output)
    captions = {region: answer["caption"] for region, answer in zip(masks, answers, strict=True)}
    scores = {region: answer["score"] for region, answer in zip(masks, answers, strict=True)}
    seconds = time.perf_counter() - start
    return CaptionedImage.of_output(image_id, captions, output, generated - generating, seconds, scores)


def require_pictures(benchmark: Benchmark) -> None:
    """Raise FileNotFoundError, before any work, where picture files of a benchmark are missing."""
    missing = [str(image.path) for image in benchmark.images if not image.path.is_file()]
    if missing:
        raise FileNotFoundError(f"{len(missing)} of {len(benchmark.images)} pictures are missing, such as {missing[0]}")


@torch.inference_mode()
def caption_benchmark(
    model,
    processor,
    benchmark: Benchmark,
    log: CaptionLog,
    state: PartialState,
    progress: bool = False,
    **settings: Any,
) -> dict[str, CaptionedImage]:
    """Caption this process's share of the images that no run has captioned yet, then wait for the other processes.

    Args:
        log: where finished images are read from and added to.
        state: see `process_state`.
        settings: as `caption_image` takes them.
    Returns:
        all images captioned by now, by any process, in the benchmark's order.
    """
    log.drop_torn_line()
    finished = log.images()
    todo = [image for image in benchmark.images if image.image_id not in finished]
    state.wait_for_everyone()  # every process has read the same log; only now it grows
    share = todo[state.process_index :: state.num_processes]
    for entry in tqdm(share, desc="captioning", unit="image", disable=not progress or not state.is_main_process):
        masks = {region.region_id: region.mask() for region in entry.regions}
        log.append(caption_image(model, processor, entry.image_id, entry.open(), masks, **settings))
    state.wait_for_everyone()
    images = log.images()
    return {image.image_id: images[image.image_id] for image in benchmark.images if image.image_id in images}


def all_captions(images: Mapping[str, CaptionedImage]) -> dict[str, str]:
    """Caption by region id."""
    return {region: caption for image in images.values() for region, caption in image.captions.items()}


def speed(images: Sequence[CaptionedImage]) -> dict[str, float]:
    """Efficiency over a benchmark (columns TPF and Time of the paper's Table 2).

    Returns:
        means over images: `tokens_per_forward` (caption slots decoded per denoising pass), `num_forward_passes` and
        `seconds_per_image` (from image to captions); and `generate_seconds`, the time in `generate` for the whole
        benchmark, added up over processes.
    """
    count = len(images)
    return {
        "tokens_per_forward": sum(image.num_slots / image.num_forward_passes for image in images) / count,
        "num_forward_passes": sum(image.num_forward_passes for image in images) / count,
        "seconds_per_image": sum(image.seconds for image in images) / count,
        "generate_seconds": sum(image.generate_seconds for image in images),
    }


def model_identity(path: str) -> dict[str, Any]:
    """What tells a checkpoint from another under the same name: sizes and times of a local directory's weights."""
    weights = sorted(Path(path).glob("*.safetensors")) if Path(path).is_dir() else []
    return {"model": path, "weights": [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in weights]}
