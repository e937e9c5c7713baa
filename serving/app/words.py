"""Generated tokens as words for a screen: each with its confidence and the pass that decided it; drafts with gaps."""

from collections.abc import Sequence
from dataclasses import dataclass

from perceptiondlm.prompting_perceptiondlm import END_OF_TEXT, END_OF_TURN


@dataclass(frozen=True)
class Word:
    """A word of an answer.

    Args:
        text: without the space before it.
        confidence: the smallest probability among its tokens when they were committed, in [0, 1].
        decided: the denoising pass, from 1, after which none of its tokens changed any more.
    """

    text: str
    confidence: float
    decided: int


def end_ids(tokenizer) -> frozenset[int]:
    """Ids of the tokens that end an answer."""
    return frozenset(tokenizer.convert_tokens_to_ids([END_OF_TURN, END_OF_TEXT]))


def answer_length(ids: Sequence[int], ends: frozenset[int]) -> int:
    """Slots before the first decided end token."""
    return next((place for place, token in enumerate(ids) if token in ends), len(ids))


def draft_pieces(ids: Sequence[int], tokenizer, mask_id: int) -> list[str | None]:
    """What a draft says so far.

    Args:
        ids: of the G slots of one answer.
        mask_id: the id of an open slot.
    Returns:
        a text per slot, spaces included, None where the slot is open; slots behind an end token are left out.
    """
    known = ids[: answer_length(ids, end_ids(tokenizer))]
    return [None if token == mask_id else tokenizer.decode([token], skip_special_tokens=True) for token in known]


def words_of(ids: Sequence[int], confidences: Sequence[float], decided: Sequence[int], tokenizer) -> list[Word]:
    """The words of a finished answer.

    Args:
        ids, confidences, decided: of the G slots: token, probability in [0, 1], and the pass that decided it, from 1.
    """
    length = answer_length(ids, end_ids(tokenizer))
    starts = [len(tokenizer.decode(ids[:place], skip_special_tokens=True)) for place in range(length + 1)]
    text = tokenizer.decode(ids[:length], skip_special_tokens=True)
    words, end = [], 0
    for word in text.split():
        start = text.index(word, end)
        end = start + len(word)
        tokens = [place for place in range(length) if starts[place] < end and starts[place + 1] > start]
        words.append(Word(word, min(confidences[place] for place in tokens), max(decided[place] for place in tokens)))
    return words


class Decisions:
    """After which pass each slot last changed, gathered from drafts as they come."""

    def __init__(self) -> None:
        self.passes = 0
        self.last: list[list[int]] = []
        self.ids: list[list[int]] = []

    def add(self, ids: list[list[int]]) -> None:
        """Take the draft (A, G) after a pass."""
        self.passes += 1
        if not self.ids:
            self.last = [[self.passes] * len(row) for row in ids]
        else:
            for row, old, new in zip(self.last, self.ids, ids, strict=True):
                row[:] = [self.passes if was != now else before for before, was, now in zip(row, old, new, strict=True)]
        self.ids = ids
