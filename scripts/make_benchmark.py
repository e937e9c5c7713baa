"""`perceptiondlm make-benchmark`: from images with several masks to a benchmark like ParaDLC-Bench.

extract CONFIG.yaml     attributes of every region into the config's folder (WORK), by a model or by rule
sheet WORK              a CSV of all items and a page with the pictures, for one annotator
import WORK SHEET.csv   read a filled-in sheet back; every decision is logged
agreement WORK          how far annotators agree, and where they do not
build WORK              the benchmark folder, from what the annotators settled on
check FOLDER            the checks of a finished benchmark, ours or a published one
"""

import argparse
from pathlib import Path

from perceptiondlm.common.json_files import write_json
from perceptiondlm.data_engine.benchmark.build import Work, build_benchmark
from perceptiondlm.data_engine.benchmark.checks import check_benchmark, findings_text, findings_to_dict
from perceptiondlm.data_engine.benchmark.curation import agreement, settle
from perceptiondlm.data_engine.benchmark.pages import write_items_page
from perceptiondlm.data_engine.benchmark.sheet import read_sheet, write_sheet
from perceptiondlm.data_engine.config import load_engine_config
from perceptiondlm.evaluation.benchmarks import load_benchmark


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the subcommand."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    steps = parser.add_subparsers(dest="step", required=True)
    extract = steps.add_parser("extract", help="attributes of every region, by a model or by rule")
    extract.add_argument("config", type=Path, help="a YAML file whose last stage is attributes")
    extract.add_argument("overrides", nargs="*", help="settings, such as source.limit=100")
    extract.add_argument("--restart-from", metavar="STAGE", help="do this stage and all later ones anew")
    extract.add_argument("--retry-faults", action="store_true", help="do the images again on which a stage failed")
    sheet = steps.add_parser("sheet", help="a CSV of all items and a page with the pictures, for one annotator")
    read = steps.add_parser("import", help="read a filled-in sheet back")
    agree = steps.add_parser("agreement", help="how far annotators agree")
    build = steps.add_parser("build", help="the benchmark folder")
    for step in (sheet, read, agree, build):
        step.add_argument("work", type=Path, help="the folder that extract wrote (out in its YAML file)")
    read.add_argument("sheet", type=Path, help="the CSV file")
    for step in (sheet, read):
        step.add_argument("--annotator", required=True, help="whose decisions they are")
    sheet.add_argument("--out", type=Path, help="the CSV file; by default WORK/sheets/ANNOTATOR.csv")
    build.add_argument("--out", type=Path, required=True, help="the benchmark folder")
    build.add_argument("--undecided", choices=("keep", "drop"), help="what becomes of items nobody has decided on")
    build.add_argument("--settled-by", metavar="NAME", help="whose decision counts where annotators are at odds")
    build.add_argument("--seed", type=int, default=0, help="of the order of choices")
    check = steps.add_parser("check", help="the checks of a finished benchmark")
    check.add_argument("folder", help="a benchmark folder, or paradlc or dlc (downloaded)")
    check.add_argument("--without-pictures", action="store_true", help="the pictures are not at hand")
    for step in (build, check):
        step.add_argument(
            "--against", type=Path, nargs="+", default=[], metavar="TRAINING",
            help="folders of training pictures, or region sets (.jsonl): none of theirs may be in the benchmark",
        )  # fmt: skip
        step.add_argument("--json", type=Path, help="write the findings here")


def run(options: argparse.Namespace) -> None:
    """Run one step."""
    {
        "extract": _extract, "sheet": _sheet, "import": _import, "agreement": _agreement, "build": _build,
        "check": lambda given: _check(given, given.folder),
    }[options.step](options)  # fmt: skip


def _extract(options: argparse.Namespace) -> None:
    config = load_engine_config(options.config, options.overrides)
    if not config.stages or config.stages[-1].get("kind") != "attributes":
        raise ValueError(f"{options.config}: the last stage must be attributes")
    engine = config.engine(progress=True)
    failed = engine.run(options.restart_from, options.retry_faults)
    work = Work(engine.folder)
    records = work.records()
    print(f"{len(records)} images, {len(work.items(records))} items: {engine.folder}")
    if failed:
        print(f"failed on {failed} images; do these again with --retry-faults")


def _sheet(options: argparse.Namespace) -> None:
    work = Work(options.work)
    records = work.records()
    curation = work.curation(records)
    path = options.out or options.work / "sheets" / f"{options.annotator}.csv"
    left = write_sheet(curation, options.annotator, path)
    page = path.with_suffix(".html")
    write_items_page(records, curation, page)
    print(f"{path}: {len(curation.items)} items, {left} to be decided; the pictures: {page}")


def _import(options: argparse.Namespace) -> None:
    work = Work(options.work)
    curation = work.curation(work.records())
    new = read_sheet(curation, options.annotator, options.sheet)
    left = len(curation.undecided(options.annotator))
    print(f"{len(new)} new decisions of {options.annotator}, {left} items to be decided")


def _agreement(options: argparse.Namespace) -> None:
    work = Work(options.work)
    pairs = agreement(work.curation(work.records()))
    for pair in pairs:
        kappa = "none" if pair["kappa"] is None else f"{pair['kappa']:.2f}"
        wording = "" if pair["same_wording"] is None else f", wording alike in {100 * pair['same_wording']:.0f} %"
        names = " and ".join(pair["annotators"])
        print(f"{names}: {pair['items']} items, agreed on {100 * pair['agreed']:.1f} %, kappa {kappa}{wording}")
        for item in pair["conflicts"]:
            print(f"  at odds: {item}")
    if not pairs:
        print("no two annotators have decided on the same items")


def _build(options: argparse.Namespace) -> None:
    work = Work(options.work)
    records = work.records()
    items = settle(work.curation(records), options.settled_by, options.undecided)
    counts = build_benchmark(records, items, options.out, options.seed)
    print(f"{options.out}: {counts['images']} images, {counts['regions']} regions, {counts['questions']} questions")
    options.without_pictures = False
    _check(options, str(options.out))


def _check(options: argparse.Namespace, folder: str) -> None:
    benchmark = load_benchmark(folder)
    findings, facts = check_benchmark(benchmark, options.against, pictures=not options.without_pictures)
    print(findings_text(findings, facts))
    if options.json:
        write_json(options.json, findings_to_dict(findings, facts))
