"""`perceptiondlm annotate`: caption the regions of a whole collection; a second call continues where a run stopped.

SOURCE is a folder or glob of pictures, a COCO or LVIS JSON file, parquet files, WebDataset shards, or a data set on the
Hub (org/name). `--retry-failed` tries again what failed before. See docs/annotate.md.
"""

import argparse
import sys
from pathlib import Path

from perceptiondlm.common.loading import add_model_arguments, generate_settings, model_path, model_state
from perceptiondlm.serving.annotate.engines import ENGINES, Engine
from perceptiondlm.serving.annotate.exports import EXPORTS
from perceptiondlm.serving.annotate.job import BOX_FORMATS, AnnotationJob, RegionChoice
from perceptiondlm.serving.annotate.run import Wanted, annotate


COLUMN, SEGMENTER = "column:", "segmenter:"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the subcommand."""
    parser.add_argument("source", help="folder, glob, .json, .parquet, .tar, or a data set on the Hub (org/name)")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results; continued if it is a run's")
    parser.add_argument("--overwrite", action="store_true", help="begin anew in a folder that holds a run")
    parser.add_argument(
        "--retry-failed", action="store_true", help="try the images and regions again that are in failures.jsonl"
    )
    add_region_arguments(parser.add_argument_group("regions"))
    add_source_arguments(parser.add_argument_group("source"))
    add_engine_arguments(parser.add_argument_group("where it runs"))
    results = parser.add_argument_group("results")
    results.add_argument("--tokens", action="store_true", help="keep the confidence of every token")
    results.add_argument("--attributes", help="name,color,...: one question each about every region, kept as JSON")
    results.add_argument("--export", nargs="+", choices=tuple(EXPORTS), default=[], help="formats beside parquet")
    results.add_argument(
        "--preview", type=int, nargs="?", const=12, default=0, help="a contact sheet of so many images"
    )
    results.add_argument("--push-to-hub", metavar="NAME", help="publish the results as a data set, user/name")
    results.add_argument("--private", action="store_true", help="publish for yourself alone")
    add_model_arguments(parser)


def add_region_arguments(group: argparse._ArgumentGroup) -> None:
    """Where regions come from."""
    given = group.add_mutually_exclusive_group()
    where = "a file about all images (COCO, CVAT, Label Studio), a folder, column:NAME"
    given.add_argument("--masks", help=f"{where}, or segmenter:NAME, which finds everything")
    given.add_argument("--boxes", help=f"{where}; with --segmenter they become masks")
    given.add_argument("--label-maps", help="a folder, or column:NAME")
    group.add_argument("--segmenter", help="classical, or the Hub id or folder of a SAM, SAM 2 or SAM 3 model")
    group.add_argument("--text", help="find what this text names, by a segmenter that reads (SAM 3)")
    group.add_argument("--box-format", choices=BOX_FORMATS, default="xyxy", help="of boxes in columns")
    group.add_argument(
        "--exif", choices=("stored", "applied"), help="regions refer to the pixels as stored, or to the turned picture"
    )
    group.add_argument("--resize-masks", action="store_true", help="fit masks of other sizes to the image")
    group.add_argument("--question", help="asked instead of 'Describe each masked region in detail.'")


def add_source_arguments(group: argparse._ArgumentGroup) -> None:
    """What a source leaves open."""
    group.add_argument("--images", help="folder of the pictures of a COCO file, by default the file's")
    group.add_argument("--image-column", help="of a table, by default image, img, jpg, png or path")
    group.add_argument("--id-column", help="of a table; by default a row's place is its id")
    group.add_argument("--label-column", help="of a table: names of the regions")
    group.add_argument("--config", help="configuration of a data set on the Hub")
    group.add_argument("--split", default="train", help="of a data set on the Hub")
    group.add_argument("--revision", help="of a data set on the Hub")


def add_engine_arguments(group: argparse._ArgumentGroup) -> None:
    """Where and in what portions."""
    group.add_argument("--engine", choices=ENGINES, default="auto", help="auto: Ray for several actors or GPUs")
    group.add_argument("--workers", type=int, default=1, help="threads that read ahead, without Ray")
    group.add_argument("--actors", type=int, help="models at work at the same time; by default one per GPU")
    group.add_argument("--gpus-per-actor", type=float, help="1 by default, 0 without GPUs")
    group.add_argument("--cpus-per-actor", type=float, default=0.5, help="slots that an actor takes")
    group.add_argument("--address", help="of a Ray cluster, or auto")
    group.add_argument("--regions-per-batch", type=int, default=32, help="most regions in a pass of the model")
    group.add_argument("--images-per-part", type=int, default=32, help="images that are finished, or lost, together")


def run(options: argparse.Namespace) -> None:
    """Annotate and say what came of it."""
    model_path(options.model)
    engine = Engine(
        options.engine, options.workers, options.actors, options.gpus_per_actor, options.cpus_per_actor, options.address
    )
    wanted = Wanted(options.export, options.preview, options.push_to_hub, options.private)
    try:
        outcome = annotate(job_of(options), engine, wanted, options.overwrite, options.retry_failed)
    except KeyboardInterrupt:
        print(f"stopped: the same command continues in {options.out}", file=sys.stderr)
        raise SystemExit(130) from None
    if outcome.retried:
        print(outcome.retried.sentence())
    speed = f", {outcome.regions_per_second:.1f} regions/s" if outcome.regions_per_second else ""
    print(f"{outcome.folder}: {outcome.totals.sentence()}{speed}")
    for file in outcome.files:
        print(file)
    if outcome.url:
        print(outcome.url)
    if not outcome.totals.images:
        print("no image could be read: see failures.jsonl", file=sys.stderr)


def job_of(options: argparse.Namespace) -> AnnotationJob:
    """The job that the arguments describe."""
    named = {"image": options.image_column, "id": options.id_column, "label": options.label_column}
    dataset = {"name": options.config, "split": options.split, "revision": options.revision}
    return AnnotationJob(
        source=options.source,
        out=str(options.out),
        regions=region_choice(options),
        images=options.images,
        columns={kind: name for kind, name in named.items() if name},
        dataset=dataset,
        exif=options.exif,
        resize_masks=options.resize_masks,
        question=options.question,
        attributes=tuple(one for one in (options.attributes or "").split(",") if one.strip()),
        tokens=options.tokens,
        model=options.model,
        model_state=model_state(options.model),
        device=options.device,
        dtype=options.dtype,
        quantize=options.quantize,
        generate=generate_settings(options),
        regions_per_batch=options.regions_per_batch,
        images_per_part=options.images_per_part,
    )


def region_choice(options: argparse.Namespace) -> RegionChoice:
    """Where regions come from, by what was given."""
    forms = {"masks": options.masks, "boxes": options.boxes, "label_map": options.label_maps}
    form, place = next(((form, place) for form, place in forms.items() if place), ("masks", None))
    shared = {"form": form, "text": options.text, "segmenter": options.segmenter, "box_format": options.box_format}
    if place is None:
        return RegionChoice(**shared, where="segmenter" if options.segmenter or options.text else "source")
    if place.startswith(COLUMN):
        return RegionChoice(**shared, where="column", name=place.removeprefix(COLUMN))
    if place.startswith(SEGMENTER) or (place == "classical" and form == "masks"):
        shared["segmenter"] = place.removeprefix(SEGMENTER)
        return RegionChoice(**shared, where="segmenter")
    return RegionChoice(**shared, where="folder" if Path(place).is_dir() else "file", name=place)
