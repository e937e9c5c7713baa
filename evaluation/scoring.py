"""Scoring of region captions by multiple-choice questions: the protocol of DLC-Bench and ParaDLC-Bench.

Steps (paper arXiv 2606.19534, section 3.3 and appendix 9.3; the numbers below refer to these steps):

1. A judge reads one caption and answers one question at a time by picking a lettered choice.
2. The first question of a region asks whether the caption names the object at all (recognition).
3. The answer is matched to a choice; the choice carries a score, usually -1, 0, 0.5 or 1.
4. Where recognition failed, every score of that region is capped at 0: ``min(score, 0)``.
5. A region's positive (negative) score is the mean over its positive (negative) questions; the recognition
   question belongs to neither.
6. The benchmark averages regions, each with equal weight, over the regions that have such questions.
   ``average = (positive + negative) / 2``, in percent.

A question is a mapping with these keys, as in the published ``qa.json`` files:

==============  ============================================================================================
``question``    the question as text, not empty
``choices``     1 to 26 pairs ``[text, score]``
``type``        ``"positive"`` or ``"negative"``
``subtype``     optional label, such as ``"negative part"`` or ``"salient negative"``
``query``       optional mapping with the question's meaning, for judges that read by rule
==============  ============================================================================================

Nothing here knows any particular judge: see ``judges.py`` for one.
"""

import math
import random
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from tqdm.auto import tqdm


if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
QUESTION_TYPES = ("positive", "negative")

Question = Mapping[str, Any]
Crop = tuple["Image.Image", "np.ndarray"]

_ANSWER_PREFIX = r"(?:(?:the\s+)?(?:correct\s+|final\s+|best\s+)?(?:answer|choice|option)(?:\s+is)?\b\s*:?)?"
_LETTER_END = r"(?:\W*$|[\s*_\"'`]*[.:)\]]|[ \t*_]*\n)"
_LETTER_ANSWER = re.compile(rf"^\W*{_ANSWER_PREFIX}\W*([a-z]){_LETTER_END}", re.IGNORECASE)
_WORD = re.compile(r"[^\W_]+")


@dataclass(frozen=True, eq=False)
class JudgeRequest:
    """One caption and one question for a judge.

    Args:
        region_id: key of the region, used in messages.
        caption: the caption under judgement, possibly empty.
        question: the question with its choices (see the module's table).
        image: the region's crop, for judges that look at pixels; None for a text-only benchmark.
        mask: the region's mask, boolean, same height and width as ``image``; None along with it.
    """

    region_id: str
    caption: str
    question: Question
    image: "Image.Image | None" = None
    mask: "np.ndarray | None" = None


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
        type: ``"positive"``, ``"negative"`` or ``"recognition"``.
        subtype: the question's own label, or None.
        query: the question's machine-readable meaning, or None.
        answer: the judge's text.
        choice: index of the choice the answer was matched to, or None where it matched nothing.
        raw_score: the score of that choice, 0 where nothing matched.
        score: the score that counts: the raw score, capped at 0 where the region was not recognised.
    """

    question: str
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
        caption: the caption that was judged.
        recognized: whether the recognition question scored above 0.
        positive: mean of the positive questions, usually in [-1, 1]; None where the region has none.
        negative: mean of the negative questions, likewise.
        recognition: the recognition question's row.
        questions: one row per question, in the order given, recognition not among them.
    """

    region_id: str
    caption: str
    recognized: bool
    positive: float | None
    negative: float | None
    recognition: QuestionScore
    questions: list[QuestionScore] = field(default_factory=list)


@dataclass(frozen=True)
class BenchmarkScore:
    """Scores of a whole benchmark, in percent (100 is perfect, negative values are possible).

    Attributes:
        positive: mean over regions of their positive score; None where no region has positive questions.
        negative: likewise for negative questions.
        average: (positive + negative) / 2; None where either is None.
        recognition: share of regions whose object was named, in [0, 100].
        per_subtype: mean score over the questions of one subtype, each question with equal weight. A question
            without subtype counts under its type.
        per_attribute: share of positive attribute questions scored 1 after the cap, in [0, 100], by attribute;
            a part's attribute is named ``"part color"``. Only questions with a query of kind ``"attribute"``.
        regions: the regions' own scores, in the order of the questions.
        num_images: number of different images; a region id reads ``IMAGE_INDEX``, and an id without an
            underscore is an image of its own.
        num_regions: number of regions scored.
        num_questions: number of questions scored, recognition questions not counted.
    """

    positive: float | None
    negative: float | None
    average: float | None
    recognition: float
    per_subtype: dict[str, float]
    per_attribute: dict[str, float]
    regions: list[RegionScore]
    num_images: int
    num_regions: int
    num_questions: int

    def to_dict(self) -> dict[str, Any]:
        """The whole record as plain dicts and lists, ready for ``json.dump``."""
        return asdict(self)


def recognition_question(class_name: str) -> dict[str, Any]:
    """The question that decides whether a caption names the object (step 2).

    Args:
        class_name: name of the object's class, such as ``"house"``; not blank.

    Returns:
        A question in the published shape with type ``"recognition"``, choices scored 1 and 0, and the query
        ``{"kind": "recognition", "category": class_name}``.

    Raises:
        ValueError: the class name is blank.
    """
    if not class_name.strip():
        raise ValueError("the class name of a recognition question is blank")
    article = "an" if class_name.strip()[0].lower() in "aeiou" else "a"
    return {
        "question": "Which of the following is applicable to the description?",
        "choices": [
            [f"The described object is (or contains) {article} {class_name}.", 1],
            [f"The described object is not {article} {class_name} and contains none.", 0],
        ],
        "type": "recognition",
        "query": {"kind": "recognition", "category": class_name},
    }


def question_prompt(caption: str, question: Question) -> str:
    """The text a language-model judge reads: the caption, the question and its lettered choices.

    Args:
        caption: the caption under judgement; an empty one is shown as ``(no description)``.
        question: a question with choices (see the module's table).
    """
    lettered = zip(LETTERS, question["choices"], strict=False)
    choices = "\n".join(f"{letter}. {text}" for letter, (text, _) in lettered)
    return (
        "Below is a description of one object, followed by a question about the description.\n\n"
        f"Description: {caption.strip() or '(no description)'}\n\n"
        f"Question: {question['question']}\n{choices}\n\n"
        "Judge by what the description says. Answer with the letter only."
    )


def match_answer(answer: str, choices: Sequence[Sequence[Any]]) -> int | None:
    """Match a judge's text to a choice (step 3): by letter, by text, then by substring.

    1. A leading letter standing alone, in any case: ``B``, ``B.``, ``(B)``, ``**B**``, ``B: because``,
       ``Answer: B``. The word "a" in front of another word is no letter.
    2. A choice's text, whatever the case, spacing and punctuation.
    3. Whole words: choices contained in the answer, or failing that the one choice that contains the answer
       (two words at least). Of choices inside one another the longest counts ("not mentioned" over
       "mentioned"); two that are not inside one another match nothing.

    Args:
        answer: the judge's text.
        choices: pairs ``[text, score]``.

    Returns:
        The choice's index, or None where nothing matches.
    """
    letter = _LETTER_ANSWER.match(answer)
    if letter is not None:
        index = LETTERS.index(letter[1].upper())
        if index < len(choices):
            return index
    said = _words(answer)
    texts = [_words(text) for text, _ in choices]
    if said in texts and said.strip():
        return texts.index(said)
    inside = [index for index, text in enumerate(texts) if text.strip() and text in said]
    if inside:
        longest = max(inside, key=lambda index: len(texts[index]))
        return longest if all(texts[index] in texts[longest] for index in inside) else None
    around = [index for index, text in enumerate(texts) if said in text]
    return around[0] if len(around) == 1 and len(said.split()) >= 2 else None


def score_captions(
    captions: Mapping[str, str],
    questions: Mapping[str, Sequence[Question]],
    class_names: Mapping[str, str],
    judge: Judge,
    progress: bool = False,
    *,
    crops: Mapping[str, Crop] | None = None,
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
        crops: image crop and boolean mask per region id, handed on to judges that look; looked up one batch
            at a time, so a mapping that crops when asked is fine.
        batch_size: requests per call of the judge, at least 1.

    Raises:
        ValueError: before judging, naming the region: a caption, class name or crop is missing, or a question
            does not have the published shape; there is nothing to score; ``batch_size`` is below 1. While
            judging: the judge returned more or fewer answers than it was asked for.
        TypeError: a caption or an answer is not a string.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    scored = {region_id: list(asked) for region_id, asked in questions.items() if asked}
    if not scored:
        raise ValueError(f"nothing to score: none of the {len(questions)} regions has a question")
    for region_id, asked in scored.items():
        _check_region(region_id, asked, captions, class_names, crops)

    plan = {region_id: [recognition_question(class_names[region_id]), *asked] for region_id, asked in scored.items()}
    pending = [(region_id, question) for region_id, asked in plan.items() for question in asked]
    answers: list[str] = []
    with tqdm(total=len(pending), desc="judging", unit="question", disable=not progress) as bar:
        for start in range(0, len(pending), batch_size):
            batch = pending[start : start + batch_size]
            answers += _ask(judge, [_request(*item, captions, crops) for item in batch])
            bar.update(len(batch))

    remaining = iter(answers)
    return _summarize(
        [_score_region(region_id, captions[region_id], asked, remaining) for region_id, asked in plan.items()]
    )


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


def _words(text: str) -> str:
    """Lower-case words with a space before, between and after, so that ``in`` compares whole words."""
    return f" {' '.join(_WORD.findall(text.lower()))} "


def _check_region(
    region_id: str,
    asked: Sequence[Question],
    captions: Mapping[str, str],
    class_names: Mapping[str, str],
    crops: Mapping[str, Crop] | None,
) -> None:
    """Raise if anything needed to judge this region is missing or malformed."""
    if region_id not in captions:
        raise ValueError(f"region {region_id!r} has {len(asked)} questions but no caption")
    if not isinstance(captions[region_id], str):
        raise TypeError(f"the caption of region {region_id!r} is a {type(captions[region_id]).__name__}, not a string")
    if not class_names.get(region_id, "").strip():
        raise ValueError(f"region {region_id!r} has {len(asked)} questions but no class name")
    if crops is not None and region_id not in crops:
        raise ValueError(f"region {region_id!r} has {len(asked)} questions but no crop")
    for position, question in enumerate(asked):
        problem = _question_problem(question)
        if problem:
            raise ValueError(f"question {position} of region {region_id!r}: {problem}")


def _question_problem(question: Question) -> str | None:
    """What is wrong with a question's shape, or None."""
    if not isinstance(question, Mapping):
        return f"expected a mapping, got {type(question).__name__}"
    if not isinstance(question.get("question"), str) or not question["question"].strip():
        return "no question text"
    if question.get("type") not in QUESTION_TYPES:
        return f"type {question.get('type')!r} is none of {QUESTION_TYPES}"
    if not isinstance(question.get("query", {}), Mapping):
        return f"query {question['query']!r} is not a mapping"
    choices = question.get("choices")
    if not isinstance(choices, Sequence) or isinstance(choices, str) or not 1 <= len(choices) <= len(LETTERS):
        count = len(choices) if isinstance(choices, Sequence) else "no"
        return f"{count} choices, need 1 to {len(LETTERS)}"
    for choice in choices:
        if not isinstance(choice, Sequence) or isinstance(choice, str) or len(choice) != 2:
            return f"choice {choice!r} is not a pair of text and score"
        text, score = choice
        if not isinstance(text, str) or not text.strip():
            return f"choice {choice!r} has no text"
        if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
            return f"choice {choice!r} has no finite number as score"
    return None


def _request(
    region_id: str, question: Question, captions: Mapping[str, str], crops: Mapping[str, Crop] | None
) -> JudgeRequest:
    """The request for one question, with the region's crop where there are crops."""
    image, mask = (None, None) if crops is None else crops[region_id]
    return JudgeRequest(region_id, captions[region_id], question, image, mask)


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
        type=question["type"],
        subtype=question.get("subtype"),
        query=None if query is None else dict(query),
        answer=answer,
        choice=choice,
        raw_score=raw_score,
        score=raw_score if recognized else min(raw_score, 0.0),
    )


def _score_region(region_id: str, caption: str, asked: Sequence[Question], answers: Iterator[str]) -> RegionScore:
    """Steps 3 to 5 for one region: takes one answer per question off ``answers``, recognition first."""
    first = _score_question(asked[0], next(answers), recognized=True)
    recognized = first.raw_score > 0
    rows = [_score_question(question, next(answers), recognized) for question in asked[1:]]
    return RegionScore(
        region_id=region_id,
        caption=caption,
        recognized=recognized,
        positive=_mean([row.score for row in rows if row.type == "positive"]),
        negative=_mean([row.score for row in rows if row.type == "negative"]),
        recognition=first,
        questions=rows,
    )


def _summarize(regions: list[RegionScore]) -> BenchmarkScore:
    """Step 6, and the same rows grouped by subtype and attribute."""
    rows = [row for region in regions for row in region.questions]
    subtypes: dict[str, list[float]] = defaultdict(list)
    attributes: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        subtypes[row.subtype or row.type].append(row.score)
        query = row.query or {}
        if row.type == "positive" and query.get("kind") == "attribute":
            owner = "" if query.get("part") is None else "part "
            attributes[f"{owner}{query.get('attribute')}"].append(float(row.score == 1))

    positive = _mean([region.positive for region in regions if region.positive is not None])
    negative = _mean([region.negative for region in regions if region.negative is not None])
    return BenchmarkScore(
        positive=None if positive is None else 100 * positive,
        negative=None if negative is None else 100 * negative,
        average=None if positive is None or negative is None else 50 * (positive + negative),
        recognition=100 * sum(region.recognized for region in regions) / len(regions),
        per_subtype={name: 100 * sum(scores) / len(scores) for name, scores in sorted(subtypes.items())},
        per_attribute={name: 100 * sum(scores) / len(scores) for name, scores in sorted(attributes.items())},
        regions=regions,
        num_images=len({region.region_id.rpartition("_")[0] or region.region_id for region in regions}),
        num_regions=len(regions),
        num_questions=len(rows),
    )


def _mean(values: Sequence[float]) -> float | None:
    """The mean, or None of an empty sequence."""
    return sum(values) / len(values) if values else None
