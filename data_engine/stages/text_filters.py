"""Filters of captions that read the text alone: length, repetition, near-duplicates within an image."""

import re
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from perceptiondlm.data_engine.record import Changes, Drop, Record
from perceptiondlm.data_engine.stages.base import RegionStage, check_share


WORD = re.compile(r"\w+(?:[-'\u2019]\w+)*")
SENTENCE_END = re.compile(r"[.!?;\n]+")


def words_of(text: str) -> list[str]:
    """The words of a text, in lower case."""
    return WORD.findall(text.lower())


@dataclass
class Length(RegionStage):
    """Drops captions that are ``empty``, ``too short`` or ``too long``.

    Attributes:
        min_words, max_words: both allowed.
    """

    kind: ClassVar[str] = "length"
    min_words: int = 3
    max_words: int = 100

    def check(self) -> None:
        if not 0 <= self.min_words <= self.max_words:
            raise ValueError(f"{self.name}: min_words {self.min_words} and max_words {self.max_words} leave no length")

    def look(self, record: Record) -> Changes:
        return {region.id: self._change(region.caption or "") for region in record.kept}

    def _change(self, caption: str) -> dict:
        count = len(words_of(caption))
        reason = "empty" if count == 0 else "too short" if count < self.min_words else None
        reason = "too long" if count > self.max_words else reason
        drop = {} if reason is None else {"drop": Drop(self.name, reason, f"{count} words")}
        return {"facts": {"words": count}, **drop}


@dataclass
class Repetition(RegionStage):
    """Drops captions that go round in circles, as language models do when they lose the thread.

    1. ``stutter``: a word stands `most_in_a_row` times or more in a row.
    2. ``repeated sentence``: a sentence of three words or more stands there twice.
    3. ``repeated phrase``: of all runs of `phrase` words more than `max_repeated` have stood there before.

    Attributes:
        phrase: words of a run, at least 2.
        max_repeated: share in [0, 1].
        most_in_a_row: at least 2.
    """

    kind: ClassVar[str] = "repetition"
    phrase: int = 4
    max_repeated: float = 0.2
    most_in_a_row: int = 3

    def check(self) -> None:
        check_share(self.name, max_repeated=self.max_repeated)
        if self.phrase < 2 or self.most_in_a_row < 2:
            raise ValueError(
                f"{self.name}: phrase and most_in_a_row must be at least 2, got {self.phrase}, {self.most_in_a_row}"
            )

    def look(self, record: Record) -> Changes:
        return {region.id: self._change(region.caption or "") for region in record.kept}

    def _change(self, caption: str) -> dict:
        words = words_of(caption)
        runs = Counter(zip(*(words[start:] for start in range(self.phrase)), strict=False))
        repeated = 1 - len(runs) / runs.total() if runs else 0.0
        reason = self._reason(caption, words, repeated)
        drop = {} if reason is None else {"drop": Drop(self.name, *reason)}
        return {"facts": {"repeated": round(repeated, 4)}, **drop}

    def _reason(self, caption: str, words: list[str], repeated: float) -> tuple[str, str] | None:
        row = 1
        for before, word in pairwise(words):
            row = row + 1 if word == before else 1
            if row >= self.most_in_a_row:
                return "stutter", f"{word!r} {row} times in a row"
        sentences = Counter(tuple(words_of(sentence)) for sentence in SENTENCE_END.split(caption))
        twice = next((sentence for sentence, count in sentences.items() if count > 1 and len(sentence) > 2), None)
        if twice:
            return "repeated sentence", " ".join(twice)
        if repeated > self.max_repeated:
            return "repeated phrase", f"{100 * repeated:.0f} % of all runs of {self.phrase} words are repeated"
        return None


@dataclass
class NearDuplicates(RegionStage):
    """Drops captions that say almost what a larger region's caption of the same image says: they tell no region apart.

    Captions are alike by the share of word pairs that they have in common (Jaccard); the largest region's stays.

    Attributes:
        max_alike: captions that are more alike are duplicates, in [0, 1].
    """

    kind: ClassVar[str] = "near_duplicates"
    max_alike: float = 0.9

    def check(self) -> None:
        check_share(self.name, max_alike=self.max_alike)

    def look(self, record: Record) -> Changes:
        changes: Changes = {}
        kept: list[tuple[str, frozenset]] = []
        for region in sorted(record.kept, key=lambda region: -region.area):
            pairs = _pairs(region.caption or "")
            alike, other = max(((_alike(pairs, theirs), name) for name, theirs in kept), default=(0.0, ""))
            change: dict = {"facts": {"alike": round(alike, 4)}}
            if alike > self.max_alike:
                change["drop"] = Drop(self.name, "near-duplicate", f"{100 * alike:.0f} % as region {other}")
            else:
                kept.append((region.id, pairs))
            changes[region.id] = change
        return changes


def _pairs(text: str) -> frozenset:
    """Pairs of neighbouring words, the start and the end of the text among them."""
    words = ["", *words_of(text), ""]
    return frozenset(pairwise(words))


def _alike(one: frozenset, other: frozenset) -> float:
    return len(one & other) / len(one | other)
