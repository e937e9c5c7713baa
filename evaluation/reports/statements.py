"""What a judged question says, in words that can be looked for in a caption: for marks and for failure classes.

Questions of the drawn world carry a query; published ones are read by their wording.
"""

import re
from dataclasses import dataclass

from perceptiondlm.evaluation.scoring import QuestionScore


# "mentioned in the description and (is|it is|has …) VALUE."
CLAIM = re.compile(
    r"\bmentioned(?: in the description)?,?(?: and)? (?:(?:it|he|she|they|its|their) )?"
    r"(?:is|are|has|have) (?P<value>.+?)\.?$",
    re.IGNORECASE,
)
TEMPLATE_WORDS = frozenset((
    "the", "a", "an", "of", "in", "on", "at", "to", "and", "or", "but", "is", "are", "it", "its", "not", "no", "this",
    "that", "with", "by", "for", "from", "their", "his", "her", "he", "she", "they", "as", "be", "description",
    "mentioned", "described", "mention", "all", "any", "some", "other", "which", "following", "applicable",
))  # fmt: skip
WORD = re.compile(r"\w+(?:[-']\w+)*")
TEXT = re.compile(
    r"\b(text|letters?|lettering|words?|numbers?|digits?|logos?|brand(?:ing)?|inscriptions?|captions?|labels?|slogan|"
    r"(?:license|number) plates?|reads?|reading|written|printed|spell(?:s|ed)?)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Statement:
    """A judged question.

    Attributes:
        text: the choice that the judge took, or "(no choice)".
        verdict: "right" (a positive score on a positive question), "wrong" (a negative score), "silent" (0 or 0.5) or
            "avoided" (a negative question, well answered).
        value: words of the right value, for a positive question.
        subject: words of the thing or part that the question is about.
    """

    text: str
    verdict: str
    value: frozenset[str]
    subject: frozenset[str]


def statement(row: QuestionScore) -> Statement:
    """What became of a question; its score before the cap of unrecognised regions, as it was said in any case."""
    text = "(no choice)" if row.choice is None else str(row.choices[row.choice][0])
    if row.raw_score < 0:
        verdict = "wrong"
    elif row.type == "negative":
        verdict = "avoided" if row.raw_score > 0 else "silent"
    else:
        verdict = "right" if row.raw_score >= 1 else "silent"
    return Statement(text, verdict, _value(row), _subject(row))


def content_words(text: str) -> frozenset[str]:
    """The words of a text that mean something, in lower case."""
    return frozenset(word for word in WORD.findall(text.lower()) if word not in TEMPLATE_WORDS)


def is_about_text(row: QuestionScore) -> bool:
    """Whether a question is about something that is written on the object."""
    return any(TEXT.search(str(text)) for text, _ in row.choices)


def best_choice(row: QuestionScore) -> str:
    """The text with the highest score."""
    return str(max(row.choices, key=lambda choice: choice[1])[0])


def worst_choice(row: QuestionScore) -> str:
    """The text with the lowest score."""
    return str(min(row.choices, key=lambda choice: choice[1])[0])


def _value(row: QuestionScore) -> frozenset[str]:
    if row.type == "negative":
        return frozenset()
    if row.query and "value" in row.query:
        return content_words(str(row.query["value"]))
    found = CLAIM.search(best_choice(row))
    return content_words(found["value"]) if found else frozenset()


def _subject(row: QuestionScore) -> frozenset[str]:
    """Of a negative question what must not be said; of a positive one the words that all its choices share."""
    query = row.query or {}
    if row.type == "negative":
        named = " ".join(str(query[key]) for key in ("part", "value") if query.get(key)) or str(
            query.get("category", "")
        )
        return content_words(named or worst_choice(row))
    if query:
        return content_words(str(query.get("part") or query.get("category", "")))
    shared = [content_words(str(text)) for text, _ in row.choices]
    return frozenset.intersection(*shared) - _value(row)
