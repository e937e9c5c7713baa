"""Checks of a benchmark folder before anyone is scored on it. Each exception is listed with its region.

==================  ==================================================================================================
``shape``           question text, type, 1 to 5 choices with finite scores
``scores``          a positive question offers 1 and -1, a negative one 1 and -1; all scores are -1, 0, 0.5 or 1
``exclusive``       two choices of a question say the same, or the text of one is inside another's: a judge's answer
                    could be read as either
``repeated``        a region is asked the same twice
``contradiction``   a part asked for as absent is asked for as present, too
``wording``         the question's text, or the class name that the recognition question tells, holds the right answer;
                    or the best choice of a kind is by far the longest, nearly always
``positions``       the best choice of a kind of question stands at some place more often than chance explains
``masks``           a mask is empty, of another size than the image, or nearly another one; an image has one region
``pictures``        a picture is missing, or of another size than annotated
``training``        a picture is in a training set, by perceptual hash
==================  ==================================================================================================
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pycocotools import mask as coco_mask

from perceptiondlm.data_engine.benchmark.image_hash import find_copies, training_images
from perceptiondlm.evaluation.benchmarks import Benchmark, BenchmarkImage, BenchmarkRegion
from perceptiondlm.evaluation.questions import Question, question_problem


SCORES = (-1, 0, 0.5, 1)
SAME_MASK = 0.9  # IoU
STANDS_OUT = 1.2  # a choice longer than all others by this factor does
DEVIATIONS = 3.0  # standard deviations beyond which a count is no chance
ABSENT = re.compile(r"^(?:the|an?) (?P<part>.+?) (?:of|on) the .+ (?:is|are) (?:not )?mentioned", re.IGNORECASE)
CLAIM = re.compile(
    r"\bmentioned(?: in the description)?,? and (?:(?:it|he|she|they) )?(?:is|are|has|have) (?P<value>.+?)\.?$"
)


@dataclass(frozen=True)
class Finding:
    """An exception: which check, about what (a region's id, an image's, or a kind of question), and what is wrong."""

    check: str
    where: str
    detail: str


def check_benchmark(
    benchmark: Benchmark, against: Sequence[Path] = (), pictures: bool = True
) -> tuple[list[Finding], dict[str, Any]]:
    """All checks.

    Args:
        against: training sets, see `image_hash.training_images`.
        pictures: whether the pictures are at hand.

    Returns:
        the exceptions, and facts: counts, and how often the best choice stands at each place, by kind of question.
    """
    findings = [one for image in benchmark.images for one in _of_masks(image)]
    for region in benchmark.regions:
        findings += _of_region(region)
    places = best_places(benchmark)
    findings += _of_places(places)
    findings += _of_lengths(benchmark)
    if pictures:
        findings += _of_pictures(benchmark)
    if against:
        files = [image.path for image in benchmark.images]
        others = [path for place in against for path in training_images(place)]
        findings += [
            Finding("training", Path(copy.image).name, f"as {copy.other}, {copy.bits} of 256 bits apart")
            for copy in find_copies(files, others)
        ]
    facts = {
        "images": len(benchmark.images),
        "regions": len(benchmark.regions),
        "questions": sum(len(region.questions) for region in benchmark.regions),
        "exceptions": dict(Counter(finding.check for finding in findings)),
        "best_choice_at": {kind: dict(sorted(counts.items())) for kind, counts in places.items()},
    }
    return findings, facts


def _of_region(region: BenchmarkRegion) -> Iterator[Finding]:
    """Findings about a region's questions."""
    where = region.region_id
    for number, question in enumerate(region.questions):
        if problem := question_problem(question):
            yield Finding("shape", where, f"question {number}: {problem}")
            continue
        yield from (Finding(check, where, f"question {number}: {detail}") for check, detail in _of_question(question))
    said = Counter(str(sorted(map(str, question["choices"]))) for question in region.questions)
    yield from (Finding("repeated", where, f"{count} times: {key[:120]}") for key, count in said.items() if count > 1)
    values = [value for question in region.questions if (value := _claimed(question))]
    names = _words(region.class_name)
    for value in values:
        if (words := _words(value)) and words <= names:
            yield Finding("wording", where, f"the class name {region.class_name!r} tells the answer {value!r}")
    present = [_best(question)[0].lower() for question in region.questions if question["type"] == "positive"]
    for question in region.questions:
        found = ABSENT.match(_worst(question)[0]) if question.get("subtype") == "negative part" else None
        if found and any(re.search(rf"\b{re.escape(found['part'].lower())}\b", text) for text in present):
            yield Finding("contradiction", where, f"{found['part']!r} is asked for as absent and as present")


def _of_question(question: Question) -> Iterator[tuple[str, str]]:
    choices = [(str(text).strip(), score) for text, score in question["choices"]]
    scores = [score for _, score in choices]
    if not set(scores) <= set(SCORES) or not {1, -1} <= set(scores):
        yield "scores", f"{scores}; accepted: 1 and -1, and 0 and 0.5 beside them"
    for number, (text, _) in enumerate(choices):
        for other, (longer, _) in enumerate(choices):
            same = text.lower() == longer.lower()
            if number != other and text.lower().rstrip(".") in longer.lower() and not (same and number > other):
                yield "exclusive", f"choice {text!r} is inside {longer!r}"
    value = _claimed(question)
    if value and re.search(rf"\b{re.escape(value.lower())}\b", question["question"].lower()):
        yield "wording", f"the question's text holds the answer {value!r}"


def _best(question: Question) -> Sequence[Any]:
    return max(question["choices"], key=lambda choice: choice[1])


def _worst(question: Question) -> Sequence[Any]:
    return min(question["choices"], key=lambda choice: choice[1])


def _claimed(question: Question) -> str | None:
    """The value that a positive question asks for: from its query, or what stands behind "mentioned and is"."""
    query = question.get("query") or {}
    if "value" in query and question["type"] == "positive":
        return str(query["value"])
    found = CLAIM.search(str(_best(question)[0])) if question["type"] == "positive" else None
    return found["value"] if found else None


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))


def kind_of(question: Question) -> str:
    """Type, subtype and number of choices in words."""
    return f"{question.get('subtype') or question['type']}, {len(question['choices'])} choices"


def best_places(benchmark: Benchmark) -> dict[str, Counter]:
    """Kind of question -> how often the best choice stands at each place (A, B, …)."""
    places: dict[str, Counter] = defaultdict(Counter)
    for region in benchmark.regions:
        for question in region.questions:
            if question_problem(question) is None:
                scores = [score for _, score in question["choices"]]
                places[kind_of(question)]["ABCDE"[scores.index(max(scores))]] += 1
    return dict(places)


def _beyond_chance(count: int, total: int, chance: float) -> bool:
    return total * chance >= 5 and count - total * chance > DEVIATIONS * (total * chance * (1 - chance)) ** 0.5


def _of_places(places: Mapping[str, Counter]) -> Iterator[Finding]:
    for kind, counts in places.items():
        choices, total = int(kind.rsplit(", ", 1)[1].split()[0]), counts.total()
        for letter in "ABCDE"[:choices]:
            if choices > 1 and _beyond_chance(counts[letter], total, 1 / choices):
                share = 100 * counts[letter] / total
                yield Finding("positions", kind, f"the best choice is {letter} in {share:.0f} % of {total} questions")


def _of_lengths(benchmark: Benchmark) -> Iterator[Finding]:
    """Kinds of which the best choice stands out by its length in nearly all questions."""
    longest: dict[str, list[bool]] = defaultdict(list)
    for region in benchmark.regions:
        for question in filter(lambda one: question_problem(one) is None, region.questions):
            best = _best(question)
            others = [len(str(choice[0])) for choice in question["choices"] if choice is not best]
            if others:
                longest[kind_of(question)].append(len(str(best[0])) > STANDS_OUT * max(others))
    for kind, flags in longest.items():
        if len(flags) >= 20 and sum(flags) / len(flags) > 0.95:
            share = 100 * sum(flags) / len(flags)
            yield Finding("wording", kind, f"the best choice is by far the longest in {share:.0f} % of {len(flags)}")


def _of_masks(image: BenchmarkImage) -> Iterator[Finding]:
    if len(image.regions) < 2:
        yield Finding("masks", image.image_id, "it has one region; at least two are asked about at once")
    masks = []
    for region in image.regions:
        size = list(region.rle["size"])
        if size != [image.height, image.width]:
            yield Finding("masks", region.region_id, f"{size}, the image has {[image.height, image.width]}")
        rle: Any = dict(region.rle)
        masks.append(coco_mask.frPyObjects(rle, *size) if isinstance(rle["counts"], list) else rle)
        if coco_mask.area(masks[-1]) == 0:
            yield Finding("masks", region.region_id, "it is empty")
    if len({tuple(mask["size"]) for mask in masks}) == 1:
        overlap = coco_mask.iou(masks, masks, [0] * len(masks))
        for one in range(len(masks)):
            for two in range(one):
                if overlap[one, two] >= SAME_MASK:
                    other = image.regions[two].region_id
                    yield Finding("masks", image.regions[one].region_id, f"IoU {overlap[one, two]:.2f} with {other}")


def _of_pictures(benchmark: Benchmark) -> Iterator[Finding]:
    for image in benchmark.images:
        try:
            image.open()
        except (OSError, ValueError) as error:
            yield Finding("pictures", image.image_id, str(error))


def findings_text(findings: Sequence[Finding], facts: Mapping[str, Any], most: int = 20) -> str:
    """Findings for a terminal, at most `most` of each check."""
    lines = [f"{facts['images']} images, {facts['regions']} regions, {facts['questions']} questions"]
    for check, number in facts["exceptions"].items():
        lines.append(f"{check}: {number}")
        of_check = [finding for finding in findings if finding.check == check]
        lines += [f"  {finding.where}: {finding.detail}" for finding in of_check[:most]]
        lines += [f"  … and {number - most} more"] if number > most else []
    if not findings:
        lines.append("no exceptions")
    return "\n".join(lines)


def findings_to_dict(findings: Sequence[Finding], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Findings and facts, JSON-ready."""
    return {**facts, "findings": [asdict(finding) for finding in findings]}
