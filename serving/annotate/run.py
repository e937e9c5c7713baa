"""A whole run: plan, parts, results, and what is made of them. Called again, it goes on where it was stopped."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from perceptiondlm.common.json_files import read_json
from perceptiondlm.serving.annotate.engines import Engine
from perceptiondlm.serving.annotate.exports import SPANS, export
from perceptiondlm.serving.annotate.job import AnnotationJob
from perceptiondlm.serving.annotate.plan import Plan, locked, prepare_folder
from perceptiondlm.serving.annotate.preview import contact_sheet
from perceptiondlm.serving.annotate.progress import Progress
from perceptiondlm.serving.annotate.publishing import check_publishing, publish
from perceptiondlm.serving.annotate.results import Totals, failures_of, finish, write_card
from perceptiondlm.serving.annotate.retrying import Retried, plan_retry, retry_job, settle
from perceptiondlm.serving.annotate.sources import kind_of, settled
from perceptiondlm.serving.attributes import parse_attributes
from perceptiondlm.serving.segmenters import load_segmenter


@dataclass(frozen=True)
class Wanted:
    """What is made of a finished run.

    Args:
        exports: names of `exports.EXPORTS`.
        preview: images on the contact sheet, 0 for none.
        hub: name of the data set to publish to; private: whether only its owner sees it.
    """

    exports: Sequence[str] = ()
    preview: int = 0
    hub: str | None = None
    private: bool = False


@dataclass
class Outcome:
    """What came of a run.

    Attributes:
        folder: of the results.
        totals: images, regions and failures of the whole run.
        regions_per_second: of this call; None where all was done before.
        files: exports and preview.
        url: of the published data set.
        retried: what another try at the failures came to, where one was asked for.
    """

    folder: Path
    totals: Totals
    regions_per_second: float | None
    files: list[Path]
    url: str | None = None
    retried: Retried | None = None


def annotate(
    job: AnnotationJob,
    engine: Engine | None = None,
    wanted: Wanted | None = None,
    overwrite: bool = False,
    retry_failed: bool = False,
) -> Outcome:
    """Caption the regions of a source, or what is left of it.

    Args:
        overwrite: begin anew in a folder that holds a run.
        retry_failed: when all is done, try the images and regions again that are on the list of failures.

    Raises:
        ValueError, TypeError, OSError: naming what is wrong with source, regions, settings or folder, before any work;
            and where the results cannot be written.
    """
    engine, wanted = engine or Engine(), wanted or Wanted()
    if overwrite and retry_failed:
        raise ValueError("--overwrite begins anew, --retry-failed goes on: name one of them")
    if wanted.hub:
        check_publishing(wanted.hub)
    if job.attributes:
        parse_attributes(job.attributes)
    if not job.regions.needs_model:
        check_segmenter(job.regions.segmenter or "none")
    job = settled(job)
    if SPANS in wanted.exports and kind_of(job.source) != "video":
        raise ValueError(f"--export {SPANS} is for videos, and {job.source} is none; accepted: the other formats")
    with locked(job.folder):
        plan = prepare_folder(job, overwrite)
        settle(plan)
        speed, retried = None, None
        if not read_json(plan.folder / "run.json")["complete"]:
            speed = run_parts(job, plan, engine)
        totals = finish(plan)
        if retry_failed:
            retried = try_again(job, plan, engine)
            totals = finish(plan)
        if not (plan.folder / "README.md").is_file():
            write_card(plan.folder, totals, job.identity())
        files = export(plan.folder, list(wanted.exports)) if wanted.exports else []
        sheet = contact_sheet(plan, job, wanted.preview) if wanted.preview else None
        url = publish(plan.folder, wanted.hub, wanted.private) if wanted.hub else None
    return Outcome(plan.folder, totals, speed, files + ([sheet] if sheet else []), url, retried)


def try_again(job: AnnotationJob, plan: Plan, engine: Engine) -> Retried:
    """Try the failures of a finished run again, once each; what is mended joins the results."""
    before = failures_of(plan.folder)
    if before:
        run_parts(retry_job(job), plan_retry(job, plan, before), engine)
        settle(plan)
    left = {entry["id"] for entry in failures_of(plan.folder)}
    return Retried(len(before), sum(entry["id"] not in left for entry in before))


def check_segmenter(name: str) -> None:
    """Refuse a segmenter whose package is missing, with its install line."""
    try:
        load_segmenter(name)
    except ImportError as error:
        raise ValueError(str(error)) from error


def run_parts(job: AnnotationJob, plan: Plan, engine: Engine) -> float | None:
    """Do the parts that are left; regions per second, None where none was left."""
    finished = set(plan.finished())
    left = [number for number in range(len(plan)) if number not in finished]
    if not left:
        return None
    progress = Progress(int(plan.counts.sum()), int(plan.counts[sorted(finished)].sum()))
    try:
        engine.run(job, left, progress)
    finally:
        progress.close()
    return progress.regions_per_second
