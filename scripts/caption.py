"""`perceptiondlm caption`: caption regions of image or video files, print them, write JSON and annotated pictures."""

import argparse
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from perceptiondlm.common.json_files import write_json
from perceptiondlm.common.loading import add_model_arguments, generate_settings, load_pipeline
from perceptiondlm.scripts.caption_jobs import Job, Samples, plan_jobs
from perceptiondlm.scripts.caption_outputs import append_result, check_outputs, draw, finished_requests
from perceptiondlm.serving.attributes import Attribute, ask_attributes, parse_attributes


VIDEOS = (".mp4", ".mov", ".m4v", ".avi", ".mkv", ".webm")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the subcommand."""
    parser.add_argument("images", nargs="+", type=Path, help="image files, or videos with the masks of a tracker")
    regions = parser.add_mutually_exclusive_group(required=True)
    regions.add_argument(
        "--masks",
        nargs="+",
        help="one image: mask pictures, or one file (.npy, .npz, .json with RLEs, polygons, COCO, LabelMe or Label "
        "Studio, .xml of CVAT, .txt of YOLO); several images: one such file for each, or one about all of them; "
        "videos: masklets for each (SA-V or YouTube-VIS .json, label maps)",
    )
    regions.add_argument("--boxes", nargs="+", help="x0,y0,x1,y1 in pixels, or such files")
    regions.add_argument("--label-map", nargs="+", help="one integer label map per image: picture, .npy or .npz")
    parser.add_argument(
        "--exif", choices=("stored", "applied"), help="regions refer to the pixels as stored, or to the turned picture"
    )
    parser.add_argument("--resize-masks", action="store_true", help="fit masks of other sizes to the image")
    parser.add_argument("--question", help="asked instead of 'Describe each masked region in detail.'")
    parser.add_argument(
        "--attributes", help="ask about each region, too: names such as name,color,material, or name=question"
    )
    parser.add_argument("--out", type=Path, help="annotated picture; for several images a directory")
    parser.add_argument(
        "--json", type=Path, help="results; a .jsonl file grows image by image and a second run continues it"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace outputs that other runs have written")
    parser.add_argument(
        "--on-error",
        choices=("skip", "raise"),
        default="skip",
        help="an image that cannot be read: caption the others and name it at the end, or stop",
    )
    parser.add_argument(
        "--merge-spans",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="videos: one span of consecutive key frames of an object whose captions are equal (the default)",
    )
    parser.add_argument("--every", type=float, default=2.0, help="videos: seconds between the key frames of a shot")
    parser.add_argument("--max-regions-per-pass", type=int, help="split the regions of an image into passes")
    add_model_arguments(parser)


def run(options: argparse.Namespace) -> None:
    """Caption all images, one by one, in the order given; what is wrong with the outputs is said before."""
    videos = [path for path in options.images if path.suffix.lower() in VIDEOS]
    if videos:
        if len(videos) < len(options.images) or options.masks is None:
            raise ValueError("videos are captioned by themselves, with --masks: a tracker's masklets for each")
        import_module("perceptiondlm.scripts.caption_video").run_videos(options)  # needs PyAV
        return
    attributes = parse_attributes(options.attributes) if options.attributes is not None else []
    jobs = plan_jobs(options)
    check_outputs(options, jobs)
    done = finished_requests(options.json)
    todo = [job for job in jobs if job.request not in done]
    pipe = load_pipeline(options)
    keywords: dict[str, Any] = {"exif": options.exif, "resize_masks": options.resize_masks}
    keywords |= generate_settings(options)
    if options.max_regions_per_pass is not None:
        keywords["max_regions_per_pass"] = options.max_regions_per_pass
    results, failed = [], []
    captioned = pipe(Samples(todo), on_error=options.on_error, **keywords)
    for job, captions in zip(todo, tqdm(captioned, desc="images", total=len(todo), disable=len(todo) < 2), strict=True):
        if captions is None:
            failed.append(f"{job.path}: {pipe.failures[-1]['error'].partition(': ')[2]}")
            tqdm.write(f"failed: {failed[-1]}", file=sys.stderr)
            continue
        if attributes:
            add_attributes(pipe, job, captions, attributes, keywords)
        result = job.result(captions)
        print_result(result)
        if job.target:
            draw(job, captions)
        append_result(result, options.json)
        results.append(result)
        job.forget()
    if options.json and options.json.suffix.lower() != ".jsonl":
        write_json(options.json, results)
    if failed:
        raise ValueError(f"{len(failed)} of {len(todo)} images failed:\n  " + "\n  ".join(failed))


def add_attributes(
    pipe: Any, job: Job, captions: list[dict[str, Any]], attributes: list[Attribute], keywords: dict[str, Any]
) -> None:
    """Ask about the attributes of a job's regions and put the answers beside their captions."""
    answers = ask_attributes(pipe, job.image, attributes, **{job.form: job.regions}, **keywords)
    for region, told in zip(captions, answers, strict=True):
        region["attributes"] = told


def print_result(result: dict[str, Any]) -> None:
    """One line per region."""
    lines = [f"{result['image']} ({result['width']} x {result['height']})"]
    for number, region in enumerate(result["regions"], start=1):
        lines.append(f"  {number:3d}  {region['score']:.2f}  {region['caption']}")
        for name, answer in region.get("attributes", {}).items():
            lines.append(f"       {answer['score']:.2f}  {name}: {answer['value']}")
    tqdm.write("\n".join(lines))
