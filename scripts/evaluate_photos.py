"""`perceptiondlm evaluate --dataset photos`: names, colours and confidence on pictures with named regions."""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import PartialState
from tqdm.auto import tqdm

from perceptiondlm.common.json_files import write_json
from perceptiondlm.common.loading import load_pipeline
from perceptiondlm.evaluation.benchmarks import Benchmark
from perceptiondlm.evaluation.captions import CaptionedImage, check_captions, read_captions, write_captions
from perceptiondlm.evaluation.photos.annotations import NamedPicture, read_pictures
from perceptiondlm.evaluation.photos.benchmark import TRAINING_FILE, annotation_file, load_named_regions, name_table
from perceptiondlm.evaluation.photos.linear import linear_names
from perceptiondlm.evaluation.photos.names import NameTable
from perceptiondlm.evaluation.photos.report import table_lines, write_page
from perceptiondlm.evaluation.photos.scoring import (
    RegionResult,
    most_frequent_name,
    score_picture,
    summarize,
    verdict_shares,
)


def is_named_regions(dataset: str, data: Path | None) -> bool:
    """Whether a data set is one of named regions: `photos`, an annotation file, or a folder with val.json."""
    path = Path(dataset)
    return dataset == "photos" or path.suffix == ".json" or (path.is_dir() and (path / "val.json").is_file())


def open_photos(dataset: str, data: Path | None, limit: int | None) -> tuple[Path, Benchmark, list[NamedPicture]]:
    """The annotation file, the benchmark to caption and its pictures.

    Raises:
        ValueError: for `photos` without --data: no pictures come with the package.
    """
    if dataset == "photos" and data is None:
        raise ValueError("--dataset photos needs --data: an annotation file, or a folder with val.json and pictures")
    file = annotation_file(data or Path(dataset))
    benchmark, pictures = load_named_regions(file, f"{file.parent.name}/{file.name}", limit)
    return file, benchmark, pictures


def evaluate_photos(options: argparse.Namespace, out: Path, state: PartialState, caption) -> None:
    """Caption (`caption(options, benchmark, out, state)`, or a captions file), score, write reports, print."""
    file, benchmark, pictures = open_photos(options.dataset, options.data, options.images)
    table = name_table(pictures)  # first: categories without words cost nothing
    if options.linear and not file.with_name(TRAINING_FILE).is_file():
        raise ValueError(f"--linear needs {file.with_name(TRAINING_FILE)}, which the classifier learns from")
    region_ids = [region.region_id for region in benchmark.regions]
    scores: dict[str, float] = {}
    measured: dict[str, Any] = {}
    if options.captions:
        captions, issues = read_captions(options.captions, region_ids, options.allow_partial)
    else:
        images, measured = caption(options, benchmark, out, state)
        captions, scores = captions_and_scores(images)
        captions, issues = check_captions(captions, region_ids)
    state.destroy_process_group()
    if not state.is_main_process:
        return
    write_captions(captions, out / "captions.json")
    results = score_all(benchmark, pictures, captions, scores, table)
    report = {"dataset": benchmark.name, "name": options.name or "model", **summarize(results), **measured}
    report["baselines"] = baselines(options, file, pictures, results, table)
    report["captions"] = [asdict(one) for one in results]
    write_json(out / "results.json", report)
    if options.json:
        write_json(options.json, report)
    write_page(report, results, pictures, out / "report.html")
    print("\n".join((*issues.lines(), *table_lines(report), str(out / "report.html"))))


def captions_and_scores(images: dict[str, CaptionedImage]) -> tuple[dict[str, str], dict[str, float]]:
    """Captions and confidences of all images by region id."""
    captions = {key: text for image in images.values() for key, text in image.captions.items()}
    return captions, {key: score for image in images.values() for key, score in image.scores.items()}


def score_all(
    benchmark: Benchmark,
    pictures: list[NamedPicture],
    captions: dict[str, str],
    scores: dict[str, float],
    table: NameTable,
) -> list[RegionResult]:
    """Every region's result, in the order of the pictures."""
    results = []
    pairs = zip(benchmark.images, pictures, strict=True)
    for image, picture in tqdm(pairs, desc="scoring", total=len(pictures), disable=None):
        region_ids = [region.region_id for region in image.regions]
        results += score_picture(picture, region_ids, captions, scores, table)
    return results


def baselines(
    options: argparse.Namespace,
    file: Path,
    pictures: list[NamedPicture],
    results: list[RegionResult],
    table: NameTable,
) -> dict[str, dict]:
    """What captions would score that know no picture, and with --linear those of a linear classifier.

    The former always say the name most frequent in train.json beside the file, or in it.
    """
    training = file.with_name(TRAINING_FILE)
    known = read_pictures(training if training.is_file() else file)
    name = most_frequent_name(known, table)
    found = {f"always {name!r}": [name] * len(results)}
    if options.linear:
        pipe = load_pipeline(options)
        named = linear_names(pipe.model, pipe.processor, known, pictures)
        found["a linear classifier on the vision tower"] = [known_name(table, category) for category in named]
    return {title: verdict_shares(renamed(results, names, table)) for title, names in found.items()}


def known_name(table: NameTable, category: str) -> str:
    """What captions call a category; a category without words by its own name."""
    return table[category].name if category in table.entries else category


def renamed(results: list[RegionResult], names: list[str], table: NameTable) -> list[RegionResult]:
    """The results as they would be if regions were called by other names."""
    pairs = zip(results, names, strict=True)
    return [RegionResult(**{**asdict(one), "verdict": table.verdict(name, one.category)}) for one, name in pairs]
