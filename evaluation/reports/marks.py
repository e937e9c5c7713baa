"""A caption with what is right and wrong in it marked, by the judge's answers.

A judge says of a question whether the caption is right, not where. So words are looked for: of a right answer the
words of the right value; of a wrong one the words of what must not be said, or of a wrong property the noun it is said
of with the words right before it. What is both is wrong. Words without a mark were not asked about.
"""

import re
from collections.abc import Sequence

from perceptiondlm.evaluation.reports.statements import TEMPLATE_WORDS, Statement


PIECES = re.compile(r"\w+(?:[-']\w+)*|\W+")
BEFORE = 3  # words before a noun that belong to it, at most

Marked = list[tuple[str, str]]  # pieces of the caption, each with "right", "wrong" or ""


def marked(caption: str, statements: Sequence[Statement]) -> Marked:
    """The caption in pieces; joined, they are the caption."""
    pieces = PIECES.findall(caption)
    marks = [""] * len(pieces)
    for one in statements:
        if one.verdict == "right":
            _mark(pieces, marks, one.value, "right", 0)
    for one in statements:
        if one.verdict == "wrong":
            _mark(pieces, marks, one.subject, "wrong", BEFORE if one.value else 0)
    return _joined(pieces, marks)


def _mark(pieces: Sequence[str], marks: list[str], words: frozenset[str], mark: str, before: int) -> None:
    for place, piece in enumerate(pieces):
        if _stem(piece) in {_stem(word) for word in words}:
            marks[place] = mark
            for earlier in range(place - 1, max(place - 1 - 2 * before, -1), -1):
                ends = pieces[earlier].lower() in TEMPLATE_WORDS or re.search(r"[^\w\s'-]", pieces[earlier])
                if ends:
                    break
                marks[earlier] = mark


def _stem(word: str) -> str:
    """A word without the end of a plural, in lower case."""
    word = word.lower()
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word


def _joined(pieces: Sequence[str], marks: Sequence[str]) -> Marked:
    """Neighbouring pieces with one mark as one; what is between words is marked where both words are, and alike."""
    joined: Marked = []
    for place, (piece, mark) in enumerate(zip(pieces, marks, strict=True)):
        if not re.match(r"\w", piece):
            around = {marks[place - 1] if place else "", marks[place + 1] if place + 1 < len(marks) else ""}
            mark = around.pop() if len(around) == 1 else ""
        if joined and joined[-1][1] == mark:
            joined[-1] = (joined[-1][0] + piece, mark)
        else:
            joined.append((piece, mark))
    return joined
