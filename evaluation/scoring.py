"""Scoring of region captions by multiple-choice questions: the protocols of ParaDLC-Bench and DLC-Bench.

Steps (paper arXiv 2606.19534, section 3.3 and appendix 9.3; the numbers below refer to these steps):

1. A judge reads one caption and answers one question at a time by picking a lettered choice.
2. The first question of a region asks whether the caption names the object at all (recognition).
3. The answer is matched to a choice; the choice carries a score: -1, 0, 0.5 or 1 in the published files.
4. Where recognition failed, every score of that region is capped at 0: ``min(score, 0)``.
5. A region's positive (negative) score is the mean over its positive (negative) questions; the recognition
   question belongs to neither.
6. The benchmark averages regions, each with equal weight. ``average = (positive + negative) / 2``, in percent.

Every region's scores equal the published scorers', oddities included: a region without positive questions scores 0 and
counts in the average (12 of the 299 regions of ParaDLC-Bench), one without negative questions does not count there; see
`questions.match_answer` for what counts as an answer. One thing is added: the published scorers fail on a recognition
answer that matches neither choice; here the object counts as not recognised.

``questions.py`` describes a question, ``judges/`` holds the judges. How far scores would move with other images says
the bootstrap over images at the end.
"""

import random
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from tqdm.auto import tqdm

from perceptiondlm.evaluation.questions import Question, match_answer, question_problem, recognition_question


if TYPE_CHECKING:
    from PIL import Image

DRAWS_AT_ONCE = 500  # of the bootstrap: bounds memory; the draws are the same for any number

Crop = tuple["Image.Image", np.ndarray]


@dataclass(frozen=True, eq=False)
class JudgeRequest:
    """One caption and one question for a judge.

    Args:
        region_id: key of the region, used in messages.
        caption: the caption under judgement, possibly empty.
        question: the question with its choices.
        image: the region's crop, for judges that look at pixels; None for a text-only benchmark.
        mask: the region's mask, boolean, same height and width as ``image``; None along with it.
        index: the question's place in its region; the recognition question is 0.
    """

    region_id: str
    caption: str
    question: Question
    image: "Image.Image | None" = None
    mask: np.ndarray | None = None
    index: int = 0


class Judge(Protocol):
    """Anything that answers a batch of requests, one text per request and in the same order.

    Answers are texts so that language models fit: a letter is best, ``match_answer`` reads the rest. Requests
    come in batches so that a judge may answer them concurrently.
    """

    def __call__(self, requests: Sequence[JudgeRequest]) -> list[str]: ...


@dataclass(frozen=True)
class QuestionScore:
    """What became of one question.

    Attributes:
        question: the question's text.
        choices: its pairs ``[text, score]``.
        type: ``"positive"``, ``"negative"`` or ``"recognition"``.
        subtype: the question's own label, or None.
        query: the question's machine-readable meaning, or None.
        answer: the judge's text.
        choice: index of the choice the answer was matched to, or None where it matched nothing.
        raw_score: the score of that choice, 0 where nothing matched.
        score: the score that counts: the raw score, capped at 0 where the region was not recognised.
    """

    question: str
    choices: list[list[Any]]
    type: str
    subtype: str | None
    query: dict[str, Any] | None
    answer: str
    choice: int | None
    raw_score: float
    score: float


@dataclass(frozen=True)
class RegionScore:
    """Scores of one region.

    Attributes:
        region_id: key of the region.
        image_id: key of the image it lies in.
        caption: the caption that was judged.
        recognized: whether the recognition question scored above 0.
        positive: mean of the positive questions, usually in [-1, 1]; 0 where the region has none.
        negative: mean of the negative questions, likewise; None where the region has none.
        score: mean of all questions, positive and negative.
        recognition: the recognition question's row.
        questions: one row per question, in the order given, recognition not among them.
    """

    region_id: str
    image_id: str
    caption: str
    recognized: bool
    positive: float
    negative: float | None
    score: float
    recognition: QuestionScore
    questions: list[QuestionScore]

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> "RegionScore":
        """The region from its plain form in `BenchmarkScore.to_dict`."""
        recognition = QuestionScore(**plain["recognition"])
        return cls(
            **{**plain, "recognition": recognition, "questions": [QuestionScore(**q) for q in plain["questions"]]}
        )


@dataclass(frozen=True)
class BenchmarkScore:
    """Scores of a whole benchmark, in percent (100 is perfect, negative values are possible).

    Attributes:
        positive: mean over regions of their positive score.
        negative: mean over the regions with negative questions; None where there is none.
        average: (positive + negative) / 2; None along with ``negative``.
        recognition: share of regions whose object was named, in [0, 100].
        intervals: 95 % bootstrap interval over images ``[lower, upper]`` of each of the four above; empty for fewer
            than two images.
        per_subtype: mean score over the questions of one subtype, each question with equal weight. A question
            without subtype counts under its type.
        per_attribute: share of positive attribute questions scored 1 after the cap, in [0, 100], by attribute;
            a part's attribute is named ``"part color"``. Only questions with a query of kind ``"attribute"``.
        regions: the regions' own scores, in the order of the questions.
        missing: regions with questions that were left out for want of a caption. Where there is any, the scores are
            partial and must be shown as such.
        num_images: number of different images among the regions scored.
        num_regions: number of regions scored.
        num_questions: number of questions scored, recognition questions not counted.
    """

    positive: float
    negative: float | None
    average: float | None
    recognition: float
    intervals: dict[str, list[float]]
    per_subtype: dict[str, float]
    per_attribute: dict[str, float]
    regions: list[RegionScore]
    missing: list[str]
    num_images: int
    num_regions: int
    num_questions: int

    def to_dict(self) -> dict[str, Any]:
        """The whole record as plain dicts and lists, ready for ``json.dump``."""
        return asdict(self)

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> "BenchmarkScore":
        """The record from `to_dict`, or from the JSON written of it."""
        return cls(**{**plain, "regions": [RegionScore.from_dict(region) for region in plain["regions"]]})


def score_captions(
    captions: Mapping[str, str],
    questions: Mapping[str, Sequence[Question]],
    class_names: Mapping[str, str],
    judge: Judge,
    progress: bool = False,
    *,
    protocol: str = "paradlc",
    crops: Mapping[str, Crop] | None = None,
    image_ids: Mapping[str, str] | None = None,
    allow_missing: bool = False,
    batch_size: int = 256,
) -> BenchmarkScore:
    """Ask a judge every question of every region and score the answers (steps 1 to 6).

    Args:
        captions: caption per region id. An empty caption is judged as it is: nothing is mentioned in it.
            Captions of regions without questions are left aside.
        questions: questions per region id. A region with an empty list is left aside.
        class_names: class name per region id, for the recognition question.
        judge: answers batches of requests.
        progress: show a progress bar over questions.
        protocol: wording of the recognition question, ``"paradlc"`` or ``"dlc"``.
        crops: image crop and boolean mask per region id, handed on to judges that look; looked up one batch
            at a time, so a mapping that crops when asked is fine.
        image_ids: image per region id; default: `image_of` the region id.
        allow_missing: score the regions that have captions and list the others in ``missing``.
        batch_size: requests per call of the judge, at least 1.

    Raises:
        ValueError: before judging, naming the regions: captions, a class name or a crop are missing, or a question
            does not have the published shape; there is nothing to score; ``batch_size`` is below 1. While
            judging: the judge returned more or fewer answers than it was asked for.
        TypeError: a caption or an answer is not a string.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    plan = _plan(questions, class_names, protocol)
    missing = [region_id for region_id in plan if region_id not in captions]
    if missing and not allow_missing:
        raise ValueError(f"{len(missing)} of {len(plan)} regions have no caption: {', '.join(missing)}")
    plan = {region_id: asked for region_id, asked in plan.items() if region_id in captions}
    if not plan:
        raise ValueError(f"nothing to score: none of the {len(missing)} regions has a caption")
    for region_id in plan:
        if not isinstance(captions[region_id], str):
            kind = type(captions[region_id]).__name__
            raise TypeError(f"the caption of region {region_id!r} is a {kind}, not a string")
        if crops is not None and region_id not in crops:
            raise ValueError(f"region {region_id!r} has a caption but no crop")
    answers = _judged(plan, captions, crops, judge, batch_size, progress)
    return _score(plan, answers, captions, image_ids, missing)


def score_answers(
    answers: Mapping[str, Sequence[str]],
    questions: Mapping[str, Sequence[Question]],
    class_names: Mapping[str, str],
    *,
    captions: Mapping[str, str] | None = None,
    image_ids: Mapping[str, str] | None = None,
) -> BenchmarkScore:
    """Score answers that were given before (steps 3 to 6).

    Args:
        answers: the judge's answers per region id, the recognition question's first, then in the questions' order.
        questions, class_names, image_ids: as in `score_captions`.
        captions: the captions judged, for the record; default: empty.

    Raises:
        ValueError: a region has questions but no answers, or not one answer per question.
    """
    plan = _plan(questions, class_names, "paradlc")
    for region_id, asked in plan.items():
        given = len(answers.get(region_id, ()))
        if given != len(asked):
            raise ValueError(
                f"region {region_id!r} has {given} answers, need {len(asked)}: recognition and each question"
            )
    return _score(plan, answers, captions or dict.fromkeys(plan, ""), image_ids, [])


def summarize(regions: list[RegionScore], missing: Sequence[str] = ()) -> BenchmarkScore:
    """Step 6 for scored regions, at least one, and the same rows grouped by subtype and attribute."""
    rows = [row for region in regions for row in region.questions]
    subtypes: dict[str, list[float]] = defaultdict(list)
    attributes: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        subtypes[row.subtype or row.type].append(row.score)
        query = row.query or {}
        if row.type == "positive" and query.get("kind") == "attribute":
            owner = "" if query.get("part") is None else "part "
            attributes[f"{owner}{query.get('attribute')}"].append(float(row.score == 1))

    positive = 100 * sum(region.positive for region in regions) / len(regions)
    negative = _mean([100 * region.negative for region in regions if region.negative is not None])
    num_images = len({region.image_id for region in regions})
    return BenchmarkScore(
        positive=positive,
        negative=negative,
        average=None if negative is None else (positive + negative) / 2,
        recognition=100 * sum(region.recognized for region in regions) / len(regions),
        intervals=_intervals(regions) if num_images > 1 else {},
        per_subtype={name: 100 * sum(scores) / len(scores) for name, scores in sorted(subtypes.items())},
        per_attribute={name: 100 * sum(scores) / len(scores) for name, scores in sorted(attributes.items())},
        regions=regions,
        missing=list(missing),
        num_images=num_images,
        num_regions=len(regions),
        num_questions=len(rows),
    )


def image_of(region_id: str) -> str:
    """The image of a region id that reads ``IMAGE_INDEX``; an id without an underscore is an image of its own."""
    return region_id.rpartition("_")[0] or region_id


def constant_captions(region_ids: Iterable[str], caption: str) -> dict[str, str]:
    """Baseline: one caption, such as the most frequent one, for every region, whatever the region shows."""
    return dict.fromkeys(region_ids, caption)


def shuffled_captions(captions: Mapping[str, str], seed: int) -> dict[str, str]:
    """Chance level: every region gets another region's caption, fluent but about a random object.

    The regions are put in one random cycle (Sattolo's algorithm), so no region keeps its own caption; two
    regions with equal captions may still swap them.

    Args:
        captions: caption per region id, at least two.
        seed: seed of the permutation; the same seed and captions give the same result.

    Raises:
        ValueError: fewer than two captions.
    """
    if len(captions) < 2:
        raise ValueError(f"shuffling needs at least 2 captions, got {len(captions)}")
    texts = list(captions.values())
    draw = random.Random(seed)
    for last in range(len(texts) - 1, 0, -1):
        other = draw.randrange(last)
        texts[last], texts[other] = texts[other], texts[last]
    return dict(zip(captions, texts, strict=True))


def _plan(
    questions: Mapping[str, Sequence[Question]], class_names: Mapping[str, str], protocol: str
) -> dict[str, list[Question]]:
    """All questions to ask per region, recognition first; everything about them checked (step 2)."""
    plan: dict[str, list[Question]] = {}
    for region_id, asked in questions.items():
        if not asked:
            continue
        if not class_names.get(region_id, "").strip():
            raise ValueError(f"region {region_id!r} has {len(asked)} questions but no class name")
        for position, question in enumerate(asked):
            problem = question_problem(question)
            if problem:
                raise ValueError(f"question {position} of region {region_id!r}: {problem}")
        plan[region_id] = [recognition_question(class_names[region_id], protocol), *asked]
    if not plan:
        raise ValueError(f"nothing to score: none of the {len(questions)} regions has a question")
    return plan


def _judged(
    plan: Mapping[str, Sequence[Question]],
    captions: Mapping[str, str],
    crops: Mapping[str, Crop] | None,
    judge: Judge,
    batch_size: int,
    progress: bool,
) -> dict[str, list[str]]:
    """The judge's answers per region, in the order of its questions (step 1)."""
    pending = [(region_id, index) for region_id, asked in plan.items() for index in range(len(asked))]
    answers: dict[str, list[str]] = {region_id: [] for region_id in plan}
    with tqdm(total=len(pending), desc="judging", unit="question", disable=not progress) as bar:
        for start in range(0, len(pending), batch_size):
            batch = pending[start : start + batch_size]
            given = _ask(judge, _requests(batch, plan, captions, crops))
            for (region_id, _), answer in zip(batch, given, strict=True):
                answers[region_id].append(answer)
            bar.update(len(batch))
    return answers


def _requests(
    batch: Sequence[tuple[str, int]],
    plan: Mapping[str, Sequence[Question]],
    captions: Mapping[str, str],
    crops: Mapping[str, Crop] | None,
) -> list[JudgeRequest]:
    """The requests of one batch of (region, question number); every region's crop is taken once."""
    region_ids = dict.fromkeys(region_id for region_id, _ in batch)
    taken = {region_id: None if crops is None else crops[region_id] for region_id in region_ids}
    requests = []
    for region_id, index in batch:
        image, mask = taken[region_id] or (None, None)
        question = plan[region_id][index]
        requests.append(JudgeRequest(region_id, captions[region_id], question, image, mask, index))
    return requests


def _ask(judge: Judge, requests: Sequence[JudgeRequest]) -> list[str]:
    """The judge's answers, checked to be one string per request."""
    answers = judge(requests)
    if len(answers) != len(requests):
        raise ValueError(f"the judge returned {len(answers)} answers to {len(requests)} requests")
    for request, answer in zip(requests, answers, strict=True):
        if not isinstance(answer, str):
            kind = type(answer).__name__
            raise TypeError(f"the judge's answer for region {request.region_id!r} is a {kind}, not a string")
    return answers


def _score_question(question: Question, answer: str, recognized: bool) -> QuestionScore:
    """Steps 3 and 4 for one question."""
    choice = match_answer(answer, question["choices"])
    raw_score = 0.0 if choice is None else float(question["choices"][choice][1])
    query = question.get("query")
    return QuestionScore(
        question=question["question"],
        choices=[list(pair) for pair in question["choices"]],
        type=question["type"],
        subtype=question.get("subtype"),
        query=None if query is None else dict(query),
        answer=answer,
        choice=choice,
        raw_score=raw_score,
        score=raw_score if recognized else min(raw_score, 0.0),
    )


def _score_region(
    region_id: str, image_id: str, caption: str, asked: Sequence[Question], answers: Sequence[str]
) -> RegionScore:
    """Steps 3 to 5 for one region; the recognition question comes first."""
    first = _score_question(asked[0], answers[0], recognized=True)
    recognized = first.raw_score > 0
    rows = [_score_question(*pair, recognized) for pair in zip(asked[1:], answers[1:], strict=True)]
    return RegionScore(
        region_id=region_id,
        image_id=image_id,
        caption=caption,
        recognized=recognized,
        positive=_mean([row.score for row in rows if row.type == "positive"]) or 0.0,
        negative=_mean([row.score for row in rows if row.type == "negative"]),
        score=_mean([row.score for row in rows]) or 0.0,
        recognition=first,
        questions=rows,
    )


def _score(
    plan: Mapping[str, Sequence[Question]],
    answers: Mapping[str, Sequence[str]],
    captions: Mapping[str, str],
    image_ids: Mapping[str, str] | None,
    missing: list[str],
) -> BenchmarkScore:
    """Steps 3 to 6."""
    if image_ids is None:
        image_ids = {region_id: image_of(region_id) for region_id in plan}
    regions = [
        _score_region(region_id, image_ids[region_id], captions[region_id], asked, answers[region_id])
        for region_id, asked in plan.items()
    ]
    return summarize(regions, missing)


def _intervals(regions: Sequence[RegionScore]) -> dict[str, list[float]]:
    """95 % bootstrap interval of each headline number that is defined."""
    bounds = {name: interval(samples) for name, samples in bootstrap_samples(regions).items()}
    return {name: pair for name, pair in bounds.items() if pair is not None}


def _mean(values: Sequence[float]) -> float | None:
    """The mean, or None of an empty sequence."""
    return sum(values) / len(values) if values else None


def bootstrap_samples(
    regions: Sequence[RegionScore], num_samples: int = 10_000, seed: int = 0
) -> dict[str, np.ndarray]:
    """Scores of benchmarks made of images drawn with replacement, as many as there are.

    Images are drawn, not regions, because regions of one image resemble one another. The draws depend on the number of
    images and the seed alone, and images count in the order of their ids: for two systems scored on the same images,
    the difference of their samples is the paired bootstrap.

    Args:
        regions: scored regions of at least one image.
        num_samples: number of drawn benchmarks S.
        seed: seed of the draws.

    Returns:
        ``positive``, ``negative``, ``average`` and ``recognition``, each (S,) float64 in percent; NaN where a draw
        holds no region with such questions.
    """
    images = {image_id: place for place, image_id in enumerate(sorted({region.image_id for region in regions}))}
    # Per image: sum of positives, regions, sum of negatives, regions with negatives, recognised regions.
    sums = np.zeros((len(images), 5))
    for region in regions:
        has_negative = region.negative is not None
        sums[images[region.image_id]] += (region.positive, 1, region.negative or 0.0, has_negative, region.recognized)
    shares = np.full(len(images), 1 / len(images))
    draws = np.random.default_rng(seed)
    sizes = [min(DRAWS_AT_ONCE, num_samples - start) for start in range(0, num_samples, DRAWS_AT_ONCE)]
    # Counts of the images, (size, images), times their sums: (S, 5) in the end.
    totals = np.concatenate([draws.multinomial(len(images), shares, size=size) @ sums for size in sizes])
    with np.errstate(invalid="ignore"):  # 0 / 0: no region with negative questions
        positive = 100 * totals[:, 0] / totals[:, 1]
        negative = 100 * totals[:, 2] / totals[:, 3]
    return {
        "positive": positive,
        "negative": negative,
        "average": (positive + negative) / 2,
        "recognition": 100 * totals[:, 4] / totals[:, 1],
    }


def interval(samples: np.ndarray, level: float = 0.95) -> list[float] | None:
    """Lower and upper bound of the central share ``level`` of the samples, NaN left out; None without any."""
    finite = samples[np.isfinite(samples)]
    if not finite.size:
        return None
    return [float(bound) for bound in np.quantile(finite, [(1 - level) / 2, (1 + level) / 2])]
