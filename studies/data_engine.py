"""What the data engine's filters find, what they leave, and what benchmarks made by its path are worth.

    python -m perceptiondlm.studies.data_engine drawn --images 200 --json studies/results/data_engine_drawn.json
    python -m perceptiondlm.studies.data_engine photos ../shared/data/photos/val.json --json …
    python -m perceptiondlm.studies.data_engine benchmark --images 60 --json …
    python -m perceptiondlm.studies.data_engine paradlc ../shared/data/paradlc --json …

`drawn`: precision and recall of every filter on planted faults, and the share of faultless pairs before and after.
`photos`: photographs with annotated categories; a checkpoint as captioner, the category as check: what is kept, and how
right names and colours are before and after. `benchmark`: a drawn benchmark made by `make-benchmark` beside the
built-in questions, for one model's captions. `paradlc`: checks and statistics of the published files. Runs continue in
--folder.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoModel, AutoProcessor

from perceptiondlm.common.environment import environment
from perceptiondlm.common.json_files import write_json
from perceptiondlm.common.loading import DRAWN_MODEL, from_checkpoint
from perceptiondlm.data_engine.benchmark.build import Work, build_benchmark
from perceptiondlm.data_engine.benchmark.checks import check_benchmark, findings_to_dict
from perceptiondlm.data_engine.config import CONFIGS, EngineConfig, load_engine_config
from perceptiondlm.data_engine.measure import measure_filters
from perceptiondlm.data_engine.record import Record
from perceptiondlm.data_engine.runner import Engine
from perceptiondlm.data_engine.sources.files import CocoSource
from perceptiondlm.data_engine.stages.caption import Caption, region_key
from perceptiondlm.data_engine.stages.category import CategoryCheck
from perceptiondlm.data_engine.stages.text_filters import Length, NearDuplicates, Repetition
from perceptiondlm.drawn.scenes import write_scenes
from perceptiondlm.evaluation.benchmark_stats import benchmark_statistics
from perceptiondlm.evaluation.benchmarks import Benchmark, load_benchmark
from perceptiondlm.evaluation.drawn_scenes import headline
from perceptiondlm.evaluation.judges.rules import SceneJudge
from perceptiondlm.evaluation.photos.annotations import read_pictures
from perceptiondlm.evaluation.photos.names import NameTable
from perceptiondlm.evaluation.photos.scoring import RegionResult, score_picture, told_right, verdict_shares
from perceptiondlm.evaluation.runner import all_captions, caption_image


MERGED_IOU = 0.9  # of the mask filter's rule about merged masks, where it is tried


def drawn(folder: Path, images: int) -> dict[str, Any]:
    """Every filter against planted faults, on both branches; on that without categories also with rule 3."""
    runs = {"coconut": [], "sa1b": [], "sa1b_merged_rule": [f"stages.0.merged_iou={MERGED_IOU}"]}
    measured = {}
    for name, overrides in runs.items():
        config = _config(f"drawn_{name.split('_')[0]}", folder / name, images, overrides)
        engine = config.engine(progress=True)
        engine.run()
        measured[name] = measure_filters(engine.records(), [stage.name for stage in engine.stages])
    return {"images": images, "branches": measured}


def _config(name: str, folder: Path, images: int, overrides: Sequence[str] = ()) -> EngineConfig:
    places = [f"out={folder}", f"source.folder={folder / 'images'}", f"source.limit={images}"]
    return load_engine_config(CONFIGS / f"{name}.yaml", [*places, *overrides])


def photos(folder: Path, annotations: Path, model: str | None, images: int | None) -> dict[str, Any]:
    """The branch with categories on photographs, a checkpoint as captioner."""
    source = CocoSource(path=str(annotations), limit=images)
    captioner = "model" if model in (None, ".") else f"model:{model}"
    stages = [
        Caption(captioner=captioner, generate={"preset": "fast"}),
        CategoryCheck(model="names"),
        Length(min_words=2),
        Repetition(),
        NearDuplicates(),
    ]
    engine = Engine(folder, source, stages, progress=True)
    faults = engine.run()
    records = list(engine.records())
    results = [one for record, found in zip(records, _judged(records, annotations), strict=True) for one in found]
    kept = {region_key(record, region.id) for record in records for region in record.kept}
    before, after = results, [one for one in results if one.region_id in kept]
    return {
        "model": model or "embedded",
        "images": len(records),
        "faults": faults,
        "kept": len(after) / len(before),
        "before": _rightness(before),
        "after": _rightness(after),
        "dropped": _drops(records),
    }


def _judged(records: Sequence[Record], annotations: Path) -> list[list[RegionResult]]:
    """Every caption as it was first written, judged by the annotated names and the picture's colours."""
    pictures, table = read_pictures(annotations), NameTable.coco()
    judged = []
    for record, picture in zip(records, pictures, strict=False):
        keys = [region_key(record, region.id) for region in record.regions]
        captions = {key: region.caption or "" for key, region in zip(keys, record.regions, strict=True)}
        scores = {key: region.facts["score"] for key, region in zip(keys, record.regions, strict=True)}
        judged.append(score_picture(picture, keys, captions, scores, table))
    return judged


def _rightness(results: Sequence[RegionResult]) -> dict[str, Any]:
    colours, count = told_right([one.colours_right for one in results])
    return {**verdict_shares(results), "colours_right": colours, "with_colours": count}


def _drops(records: Sequence[Record]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for record in records:
        for region in record.regions:
            if region.dropped is not None:
                key = f"{region.dropped.stage}: {region.dropped.reason}"
                counts[key] = counts.get(key, 0) + 1
    return counts


def benchmark(folder: Path, model: str | None, images: int) -> dict[str, Any]:
    """A drawn benchmark made by the engine's path beside the built-in questions, for one model's captions."""
    config = _config("drawn_benchmark", folder / "work", images)
    config.engine(progress=True).run()
    work = Work(folder / "work")
    records = work.records()
    if not (folder / "made" / "qa.json").exists():
        build_benchmark(records, work.items(records), folder / "made")
    write_scenes(config.source["seed"], images, folder / "built_in")
    made, built_in = load_benchmark(folder / "made"), load_benchmark(folder / "built_in")
    place = model or str(DRAWN_MODEL)
    loaded, processor = from_checkpoint(AutoModel, place).eval(), from_checkpoint(AutoProcessor, place)
    found = {}
    for image in made.images:
        masks = {region.region_id: region.mask() for region in image.regions}
        found[image.image_id] = caption_image(loaded, processor, image.image_id, image.open(), masks, preset="fast")
    captions = all_captions(found)
    findings, facts = check_benchmark(made)
    return {
        "model": model or "drawn/model",
        "made": _scored(made, captions),
        "built_in": _scored(built_in, captions),
        "checks": findings_to_dict(findings, facts),
    }


def _scored(asked: Benchmark, captions: dict[str, str]) -> dict[str, Any]:
    score = asked.score(captions, SceneJudge())
    return {**headline(score), "intervals": score.intervals, "questions": score.num_questions}


def paradlc(folder: Path) -> dict[str, Any]:
    """Checks and statistics of a published folder, pictures left out."""
    published = load_benchmark(folder)
    findings, facts = check_benchmark(published, pictures=False)
    where: dict[str, dict[str, int]] = {check: {} for check in facts["exceptions"]}
    for finding in findings:
        where[finding.check][finding.where] = where[finding.check].get(finding.where, 0) + 1
    return {**facts, "where": where, "statistics": benchmark_statistics(published)}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("drawn", "photos", "benchmark", "paradlc"))
    parser.add_argument("data", nargs="?", type=Path, help="photos: annotation file; paradlc: folder")
    parser.add_argument("--images", type=int, help="at most so many; drawn: 200, benchmark: 60 by default")
    parser.add_argument("--model", help="checkpoint; by default the embedded one, for benchmark the drawn world's")
    parser.add_argument("--folder", type=Path, default=Path("outputs/studies/data_engine"), help="of the runs")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    if options.what in ("photos", "paradlc") and options.data is None:
        parser.error(f"{options.what} needs its data")
    folder = options.folder / options.what
    result = {
        "drawn": lambda: drawn(folder, options.images or 200),
        "photos": lambda: photos(folder, options.data, options.model, options.images),
        "benchmark": lambda: benchmark(folder, options.model, options.images or 60),
        "paradlc": lambda: paradlc(options.data),
    }[options.what]()
    if options.json:
        write_json(options.json, {**result, "environment": environment()})
    print({key: value for key, value in result.items() if key not in ("where", "checks")})


if __name__ == "__main__":
    main()
