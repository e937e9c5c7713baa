"""`perceptiondlm evaluate`: caption a benchmark, let a judge read the captions, and report.

A killed run continues where it stopped: captions are kept image by image in --out, answers in the judge's cache.
Several GPUs: accelerate launch --multi_gpu --num_processes N -m perceptiondlm.scripts.cli evaluate ...
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import PartialState

from perceptiondlm.common.environment import environment
from perceptiondlm.common.json_files import write_json
from perceptiondlm.common.loading import DRAWN_MODEL, REPOSITORY, add_model_arguments, generate_settings, load_pipeline
from perceptiondlm.drawn.scenes import write_scenes
from perceptiondlm.evaluation.benchmarks import HUB_IDS, Benchmark, load_benchmark
from perceptiondlm.evaluation.captions import (
    CaptionedImage,
    CaptionLog,
    check_captions,
    read_captions,
    write_captions,
)
from perceptiondlm.evaluation.drawn_scenes import evaluate_scenes
from perceptiondlm.evaluation.judges.chat import ChatJudge
from perceptiondlm.evaluation.judges.registry import judge_report
from perceptiondlm.evaluation.reports.report import write_html, write_markdown
from perceptiondlm.evaluation.reports.results import Results, beside_table_2
from perceptiondlm.evaluation.runner import (
    all_captions,
    caption_benchmark,
    model_identity,
    process_state,
    require_pictures,
    speed,
)
from perceptiondlm.evaluation.scoring import Judge
from perceptiondlm.evaluation.zero_shot import WAYS
from perceptiondlm.scripts.evaluate_photos import evaluate_photos, is_named_regions
from perceptiondlm.scripts.judging import add_judge_arguments, load_judge


JUDGES = "rules (drawn scenes), openai:MODEL, azure:DEPLOYMENT, litellm:MODEL, transformers:PATH or replay:FILE"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the subcommand."""
    parser.add_argument(
        "--dataset",
        default="scenes",
        help=f"{', '.join(HUB_IDS)} (downloaded), scenes (drawn), photos (named regions, with --data), or a folder of "
        "either shape",
    )
    parser.add_argument("--data", type=Path, help="a local copy of the dataset, instead of a download")
    parser.add_argument(
        "--seed", type=int, default=1000, help="scenes: seed of the drawn world (training used 1 and 2)"
    )
    parser.add_argument("--images", type=int, help="scenes: pictures, by default 100; photos: at most so many")
    parser.add_argument(
        "--captions", type=Path, help='score this file {"IMAGEID_ANNINDEX": caption} instead of a model'
    )
    parser.add_argument("--allow-partial", action="store_true", help="score a captions file that lacks regions")
    parser.add_argument("--name", help="of the system in reports; by default the model's or the file's")
    parser.add_argument("--question", help="asked instead of 'Describe each masked region in detail.'")
    parser.add_argument(
        "--max-regions-per-pass", type=int, help="split the regions of an image into passes; for dlc 1, as published"
    )
    parser.add_argument(
        "--zero-shot", choices=WAYS, help="ask a base model, which knows no regions: by boxes in words, or by cut crops"
    )
    parser.add_argument(
        "--share-prompt-ids",
        action="store_true",
        help="one prompt id for all regions of an image (the paper's Table 10)",
    )
    parser.add_argument("--out", type=Path, help="folder for captions, results and reports; a second run continues it")
    parser.add_argument("--json", type=Path, help="write the whole report here, captions included")
    parser.add_argument(
        "--linear",
        action="store_true",
        help="photos: beside it a linear classifier on the same vision tower, trained on train.json beside the file",
    )
    add_judge_arguments(parser, f"{JUDGES}; without it a benchmark is captioned only")
    parser.add_argument(
        "--show-image",
        action=argparse.BooleanOptionalAction,
        help="whether the judge sees the region's crop; by default as the benchmark has it, if the judge can see",
    )
    add_model_arguments(parser, seed=False)


def run(options: argparse.Namespace) -> None:
    """Caption, judge, write, print."""
    if options.dataset == "scenes" and options.images is None:
        options.images = 100
    if options.images is not None and options.images < 1:
        raise ValueError(f"num_images must be at least 1, got {options.images}")
    if is_named_regions(options.dataset, options.data):
        folder = options.out or Path("outputs") / "evaluate" / "photos"
        evaluate_photos(options, folder, process_state(), caption)
        return
    if options.dataset == "scenes" and not options.out and not options.captions:
        run_scenes(options)
        return
    spec = options.judge or ("rules" if options.dataset == "scenes" else None)
    judge = None if spec is None else load_judge(options, spec)  # first: a wrong name or a missing key costs nothing
    state = process_state()
    out = options.out or Path("outputs") / "evaluate" / Path(options.dataset).resolve().name
    benchmark = open_benchmark(options, out, state)
    region_ids = [region.region_id for region in benchmark.regions]
    show = judge is not None and show_image(options, benchmark, judge)
    if isinstance(judge, ChatJudge) and state.is_main_process and not options.captions:
        judge.try_out(show)
    measured: dict[str, Any] = {}
    if options.captions:
        captions, issues = read_captions(options.captions, region_ids, options.allow_partial)
    else:
        images, measured = caption(options, benchmark, out, state)
        captions, issues = check_captions(all_captions(images), region_ids)
    state.destroy_process_group()  # the processes have nothing to say to each other any more
    if not state.is_main_process:
        return
    write_captions(captions, out / "captions.json")
    if spec is None or judge is None:
        print(f"{len(captions)} captions: {out / 'captions.json'}; judge them with --captions and --judge")
        return
    score = benchmark.score(captions, judge, show_image=show, allow_missing=options.allow_partial, progress=True)
    judging = {**judge_report(judge), "sees image and mask": show}
    results = Results(system_name(options), spec, benchmark.name, score, issues, judging=judging, **measured)
    write_reports(results, benchmark, out, options.json)


def show_image(options: argparse.Namespace, benchmark: Benchmark, judge: Judge) -> bool:
    """Whether the judge gets the regions' crops; refuses pictures that are not there."""
    show = benchmark.shows_image(judge) if options.show_image is None else options.show_image
    if show:
        require_pictures(benchmark)
    return show


def run_scenes(options: argparse.Namespace) -> None:
    """Score a model on drawn scenes in memory, by the rule judge."""
    pipe = load_pipeline(options, default_model(options))
    settings = caption_settings(options)
    report = evaluate_scenes(pipe.model, pipe.processor, options.seed, options.images, progress=True, **settings)
    report["environment"] = environment(pipe.device)
    print(table(report))
    if options.json:
        write_json(options.json, report)


def open_benchmark(options: argparse.Namespace, out: Path, state: PartialState) -> Benchmark:
    """The benchmark: downloaded or drawn by the main process first, then read by all."""
    with state.main_process_first():
        if options.dataset == "scenes":
            folder = out / "benchmark"
            if state.is_main_process:
                write_scenes(options.seed, options.images, folder)
            return replace(load_benchmark(folder), name=f"scenes (seed {options.seed})")
        benchmark = load_benchmark(options.data or options.dataset)
    return replace(benchmark, name=options.dataset) if options.dataset in HUB_IDS else benchmark


def caption(
    options: argparse.Namespace, benchmark: Benchmark, out: Path, state: PartialState
) -> tuple[dict[str, CaptionedImage], dict[str, Any]]:
    """Caption the benchmark; returns the images, and what the results say about speed, settings and environment."""
    require_pictures(benchmark)
    if state.num_processes > 1 and options.device is None:
        options.device = str(state.device)
    settings = caption_settings(options)
    if benchmark.protocol == "dlc" and options.zero_shot is None:
        settings.setdefault("max_regions_per_pass", 1)
    log = CaptionLog(out, state.process_index)
    default = default_model(options)
    model = model_identity(options.model or str(default))
    made_with = {"dataset": benchmark.name, **model, "dtype": options.dtype, **settings}
    with state.main_process_first():
        log.check_settings(made_with)
    pipe = load_pipeline(options, default)
    images = caption_benchmark(pipe.model.eval(), pipe.processor, benchmark, log, state, progress=True, **settings)
    measured = {"speed": speed(list(images.values())), "settings": made_with, "environment": environment(pipe.device)}
    return images, measured


def default_model(options: argparse.Namespace) -> Path:
    """The embedded model that is scored without --model: drawn scenes have one of their own."""
    return DRAWN_MODEL if options.dataset == "scenes" else REPOSITORY


def caption_settings(options: argparse.Namespace) -> dict[str, Any]:
    """The settings of `runner.caption_image` that were given."""
    given = {
        "question": options.question,
        "max_regions_per_pass": options.max_regions_per_pass,
        "zero_shot": options.zero_shot,
        "share_prompt_ids": options.share_prompt_ids or None,
    }
    settings = {name: value for name, value in given.items() if value is not None}
    return {**settings, **generate_settings(options, leave_out=("seed",))}


def system_name(options: argparse.Namespace) -> str:
    """What the reports call the system."""
    if options.name or options.captions:
        return options.name or options.captions.stem
    if not options.model:
        return "embedded model"
    return Path(options.model).resolve().name if Path(options.model).is_dir() else options.model


def write_reports(results: Results, benchmark: Benchmark, out: Path, copy: Path | None) -> None:
    """Write results.json, report.md and report.html, and print the table."""
    results.write(out / "results.json")
    if copy:
        results.write(copy)
    write_markdown(results, out / "report.md")
    write_html(results, benchmark, out / "report.html")
    for line in results.issues.lines():
        print(line)
    print(beside_table_2(results))
    print(f"{out / 'captions.json'}, results.json, report.md, report.html")


def table(report: dict[str, Any]) -> str:
    """The report for a terminal."""
    head = f"{'':12s}{'Pos':>8s}{'Neg':>8s}{'Avg':>8s}{'Recog':>8s}"
    rows = [("model", report), *report["baselines"].items()]
    names = ("positive", "negative", "average", "recognition")
    lines = [
        f"{report['dataset']}, seed {report['seed']}: {report['num_images']} images, {report['num_regions']} regions"
    ]
    lines += [head, *(f"{name:12s}" + "".join(f"{row[key]:8.1f}" for key in names) for name, row in rows)]
    lines += [f"captions equal to the reference: {report['exact']:.1f} %"]
    lines += [f"accuracy of {name}: {value:.1f} %" for name, value in report["per_attribute"].items()]
    lines += [f"tokens per forward: {report['tokens_per_forward']:.2f}"]
    lines += [f"seconds per image: {report['seconds_per_image']:.3f}"]
    where = report["environment"]
    lines += [f"on {where['hardware']}, {where['threads']} threads, torch {where['torch']}"]
    return "\n".join(lines)
