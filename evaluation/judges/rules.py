"""A judge of the drawn world that needs no model: it reads captions by rule, in three stages:

    caption -> `read_caption` -> `Reading` (what is mentioned, with which values) -> verdict -> letter of a choice

Vocabulary of this file:

=========  ================================================================================================
value      a colour, pattern or size of the drawn world
noun       a category ("house") or a part ("roof"), in singular or plural
stem       a noun's singular, by which singular and plural are told to be the same
mention    one occurrence of a noun, with the values bound to it; a denied one counts for nothing
phrase     the words of a noun phrase read so far, before its noun
=========  ================================================================================================
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from perceptiondlm.drawn.objects import CATEGORIES, COLORS, PATTERNS, SIZES
from perceptiondlm.evaluation.questions import LETTERS
from perceptiondlm.evaluation.scoring import JudgeRequest


ATTRIBUTES: dict[str, tuple[str, ...]] = {"color": tuple(COLORS), "pattern": PATTERNS, "size": SIZES}
_ATTRIBUTE_OF = {value: attribute for attribute, values in ATTRIBUTES.items() for value in values}

_IRREGULAR_PLURALS = {"leaf": "leaves", "antenna": "antennae"}
_IRREGULAR_STEMS = {plural: stem for stem, plural in _IRREGULAR_PLURALS.items()}


def _stem(name: str) -> str:
    """Singular of a category or part name."""
    return _IRREGULAR_STEMS.get(name) or (name[:-1] if name.endswith("s") else name)


def _forms(name: str) -> tuple[str, ...]:
    """Singular and plurals of a category or part name."""
    stem = _stem(name)
    if stem.endswith("y"):
        plural = f"{stem[:-1]}ies"
    else:
        plural = f"{stem}es" if stem.endswith(("s", "x", "ch", "sh")) else f"{stem}s"
    return stem, plural, _IRREGULAR_PLURALS.get(stem, plural)


# Stem of a category -> the stems of its parts -> the parts' names.
_PARTS_OF = {_stem(name): {_stem(part.name): part.name for part in parts} for name, parts in CATEGORIES.items()}
_CATEGORY_STEM = {form: _stem(name) for name in CATEGORIES for form in _forms(name)}
_PART_STEM = {form: _stem(part.name) for parts in CATEGORIES.values() for part in parts for form in _forms(part.name)}
_NOUN_STEM = {**_PART_STEM, **_CATEGORY_STEM}

# ----------------------------------------------------------------------------------------------------------
# Words of the grammar.


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_CLAUSE_CONJUNCTIONS = _words("but while whereas though although however then")
_LIST_NEGATIONS = _words("without lacks lacking lack missing minus")
_VALUE_NEGATIONS = _words("not never non cannot")  # "not red" denies a value, "no red roof" the roof
_DEMONSTRATIVE = _words("this that these those")
_DEFINITE = _DEMONSTRATIVE | _words("the its their his her whose")
_INDEFINITE = _words(
    "a an another any some each every both several many one two three four five six seven eight nine ten"
)
_KINDS: dict[str, str] = {
    word: kind
    for kind, words in {
        "noun": _NOUN_STEM,
        "value": _ATTRIBUTE_OF,
        "determiner": _DEFINITE | _INDEFINITE,
        "copula": _words("is was are were be been being looks look appears appear seems seem remains remain"),
        "has": _words(
            "has have having had features featuring includes including wears wearing bears bearing carries "
            "carrying sports sporting"
        ),
        "place": _words(
            "next_to beside near by behind under below above over between among against inside outside around "
            "from at on in to like unlike resembling beneath alongside past along as through into onto across "
            "than toward towards within facing"
        ),
        "conjunction": _CLAUSE_CONJUNCTIONS | _words("and or"),
        "negation": _VALUE_NEGATIONS | _LIST_NEGATIONS | _words("no neither nor none"),
        "pronoun": _words("it they"),
        "generic": _words("object thing item region shape"),
        "attribute": _words("color colors colour colours size pattern patterns"),
        "relative": _words("which who"),
        "with": _words("with"),
        "of": _words("of"),
        "comma": _words(","),
    }.items()
    for word in words
}
_SINGULAR_VERBS = _words("is was looks appears seems remains has features includes")
_EXTENDERS = _words("only just merely simply solely")  # "not only red" denies nothing
_ABSENT = _words("missing absent gone lacking")
_PRESENT = _words("present visible shown there seen drawn included mentioned")
_HOLDING = _words("on in at from to")  # after a part: "the flag on the boat"

# Rewritten before the caption is cut into words, in this order.
_REWRITES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"[\u2018\u2019`]", "'"),
        (r"\b(is|are|was|were|does|do|did|has|have|had)nt\b", r"\1 not"),
        (r"n't\b", " not"),
        (r"\b(it|that|this|there|here)'s\b", r"\1 is"),
        (r"'re\b", " are"),
        (r"'s\b", " 's"),
        (r"\b(\w+)-(?:sized|colou?red|patterned)\b", r"\1"),
        (r"\bcentre", "center"),
        (r"\b(in|at|near|towards?|from) the (?:very )?center\b", r"\1 the middle"),  # a place, not a flower's part
        (r"\b(?:rather than|instead of|as opposed to|free of|devoid of|anything but)\b", "without"),
        (r"\b(?:next|close|adjacent) to\b|\bin front of\b|\bon top of\b", "next_to"),
        (r"\bto be\b", "be"),
        (r":", " be "),
        (r"[()\[\]{}\"\u2013\u2014]|\s-+\s", " , "),
        (r"&|\+", " and "),
        (r"/", " or "),
    )
)
_SENTENCE_END = re.compile(r"[.!?;\n]+")
_TOKEN = re.compile(r"'s\b|\w+(?:[-']\w+)*|,")


@dataclass(eq=False)
class Mention:
    """One occurrence of a category or part in a caption.

    Attributes:
        word: the word as written, in lower case.
        stem: its singular.
        is_part: a part rather than a category.
        owner: stem of the category a part belongs to, where the caption tells.
        heads: for a category: may be what the caption is about (not what something stands next to, or carries).
        denied: the caption says it is not there.
        values: (attribute, value) pairs claimed of it.
    """

    word: str
    stem: str
    is_part: bool
    owner: str | None = None
    heads: bool = False
    denied: bool = False
    values: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Reading:
    """What a caption claims, by the rules of `SceneJudge`.

    Attributes:
        mentions: every mention that is not denied, in the order of the caption.
        subject: stem of the category the caption is about, or None.
    """

    mentions: tuple[Mention, ...]
    subject: str | None

    def names(self, category: str) -> bool:
        """Whether a category is mentioned anywhere in the caption."""
        return bool(self._categories(category))

    def names_part(self, category: str, part: str) -> bool:
        """Whether a part is mentioned as one of this category's, or without an owner."""
        return bool(self._parts(category, part))

    def values(self, attribute: str, category: str, part: str | None = None) -> set[str]:
        """The values of an attribute claimed of a category, or of one of its parts."""
        mentions = self._categories(category) if part is None else self._parts(category, part)
        return {value for mention in mentions for name, value in mention.values if name == attribute}

    def _categories(self, category: str) -> list[Mention]:
        return [mention for mention in self.mentions if not mention.is_part and mention.stem == _stem(category)]

    def _parts(self, category: str, part: str) -> list[Mention]:
        """Number does not matter, unless the category has this very part in the other number."""
        exact = _PARTS_OF[_stem(category)].get(_stem(part), part) != part
        return [
            mention
            for mention in self.mentions
            if mention.is_part
            and mention.owner in (_stem(category), None)
            and (mention.word == part if exact else mention.stem == _stem(part))
        ]


def read_caption(caption: str) -> Reading:
    """Read a caption's claims by the rules of `SceneJudge`.

    Args:
        caption: any text, possibly empty.
    """
    reader = _Reader()
    for sentence in _sentences(caption):
        reader.read(sentence)
    return reader.reading()


def _sentences(caption: str) -> list[list[str]]:
    """The caption's sentences as lower-case words and commas; compounds of known values are taken apart."""
    text = caption.lower()
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    sentences = []
    for sentence in _SENTENCE_END.split(text):
        tokens: list[str] = []
        for token in _TOKEN.findall(sentence):
            pieces = token.split("-")
            known = all(piece in _ATTRIBUTE_OF or piece in ("and", "or") for piece in pieces)
            tokens += pieces if known else [token]
        sentences.append(tokens)
    return sentences


@dataclass
class _Phrase:
    """A noun phrase before its noun.

    Attributes:
        determiner: its determiner, if any.
        values: values read so far, to be bound to the noun.
        has_other: an unknown word was read.
        closed: an unknown word follows a value directly: the noun may be that word.
    """

    determiner: str | None = None
    values: list[tuple[str, str]] = field(default_factory=list)
    has_other: bool = False
    closed: bool = False


class _Reader:
    """Reads sentences word by word, from left to right; one ``_read_KIND`` method per kind of word.

    State within a sentence:
        phrase: the noun phrase being read.
        group: the mentions that a verb coming now would speak about.
        last: the latest mention.
        zone: where the reader is: "subject", "complement" (after "is"), "with" (a list of what something has) or
            "place" (after "next to", the word in ``place``); ``zone_before`` is the zone before a place.
        joint: the comma or conjunction in front of the phrase, or "".
        owners: stems of the categories a part may belong to, the nearest last.
        after_of, attribute_of: the next noun stands after "of", after "the color of".
        negation: the word that denies what is being read, or "". ``denied``: it has denied something by now;
            ``determiner_denied``: a determiner came after it; ``value_only``: it stands right before a value.
    """

    def __init__(self) -> None:
        self.mentions: list[Mention] = []
        # What "it", "the object" or a bare "Red." speak of; merged into the caption's subject at the end.
        self.it = Mention(word="it", stem="", is_part=False)

    def reading(self) -> Reading:
        """What the sentences read so far claim."""
        kept = [mention for mention in self.mentions if not mention.denied]
        subject = self._subject()
        if subject is None:
            return Reading(tuple(kept), None)
        subject.values += self.it.values
        for mention in kept:
            if mention.is_part and mention.owner is None:
                mention.owner = subject.stem
        return Reading(tuple(kept), subject.stem)

    def read(self, tokens: Sequence[str]) -> None:
        """Read one sentence."""
        self.tokens, self.at = list(tokens), 0
        self.phrase = _Phrase()
        self.group: list[Mention] = []
        self.last: Mention | None = None
        self.zone = self.zone_before = "subject"
        self.place = self.joint = self.negation = ""
        self.after_of = self.attribute_of = False
        self.denied = self.value_only = self.determiner_denied = False
        subject = self._subject()
        self.owners = [] if subject is None else [subject.stem]
        while self.at < len(self.tokens):
            start = self.at
            getattr(self, f"_read_{self._kind(start)}")(self.tokens[start])
            self.at = max(self.at, start + 1)
        self._end_phrase(at_end=True)

    # What the words around are.

    def _kind(self, position: int) -> str:
        """Kind of the word at a position: "other" for unknown words, "" outside the sentence."""
        if not 0 <= position < len(self.tokens):
            return ""
        token = self.tokens[position]
        follower = _KINDS.get(self.tokens[position + 1], "other") if position + 1 < len(self.tokens) else ""
        if token in _DEMONSTRATIVE and follower in ("copula", "has", "negation"):
            describes = token == "that" and self._kind(position - 1) in ("noun", "value", "generic", "other")
            return "relative" if describes else "pronoun"
        return _KINDS.get(token, "other")

    @property
    def _previous(self) -> str:
        return self._kind(self.at - 1)

    @property
    def _next(self) -> str:
        return self._kind(self.at + 1)

    @property
    def _definite(self) -> bool:
        return self.phrase.determiner in _DEFINITE

    def _subject(self) -> Mention | None:
        """What the caption is about: the first category not denied, not a place and not carried."""
        return next((mention for mention in self.mentions if mention.heads and not mention.denied), None)

    # Phrases and clauses.

    def _bind(self, mentions: Sequence[Mention]) -> None:
        for mention in mentions:
            mention.values += self.phrase.values

    def _end_phrase(self, at_end: bool = False) -> None:
        """The phrase ends without a known noun: bind its values to what they describe, or drop them."""
        phrase = self.phrase
        if phrase.values:
            if self.zone == "complement":  # "the roof is blue", "the house is a red building"
                self._bind(self.group)
            elif phrase.closed or phrase.determiner or (self.zone == "place" and self.place != "in"):
                pass  # "red bushes", "an orange", "on white"
            elif self.last is not None:  # "a house, small and red"
                self._bind([self.last])
            elif at_end:  # "Red."
                self._bind([self.it])
            else:  # "Small and red, the house": wait for the noun
                return
        self.phrase = _Phrase()

    def _phrase_goes_on(self) -> bool:
        """At a comma, "and" or "or": whether the phrase's noun is still to come ("a small, red house")."""
        phrase, follower = self.phrase, self._next
        if not phrase.values or phrase.closed:
            return False
        if phrase.determiner:
            return follower in ("value", "noun", "negation", "determiner") or (
                follower == "other" and self.zone != "complement"
            )
        return self.zone != "complement" and (self.last is None or self._values_lead_to_noun())

    def _values_lead_to_noun(self) -> bool:
        """Whether a list of values goes on after this word, up to a noun ("with red and blue wheels")."""
        position = self.at + 1
        while self._kind(position) == "value":
            position += 1
            if self._kind(position) in ("comma", "conjunction") and self._kind(position + 1) == "value":
                position += 1
        return self._kind(position - 1) == "value" and self._kind(position) == "noun"

    def _end_negation(self) -> None:
        """A verb, preposition or relative ends a denial, once it has denied something ("not have a door")."""
        if self.denied:
            self.negation = ""

    def _begin_clause(self, token: str) -> None:
        """At a verb: which of the group it speaks about."""
        if self._definite and self.phrase.has_other and self.zone != "place":  # "and the sky is"
            self.group = []
        if token in _SINGULAR_VERBS:
            self.group = self.group[-1:]

    def _leave_place(self) -> None:
        self.zone = "with" if self.group else "subject"

    # Nouns.

    def _read_noun(self, token: str) -> None:
        """A noun, or a chain of them ("house roof", "the house's roof") whose last one is the head."""
        start = self.at
        while self._kind(self.at) == "noun" or self.tokens[self.at : self.at + 1] == ["'s"]:
            self.at += 1
        words = [word for word in self.tokens[start : self.at] if word != "'s"]
        if self.joint and self.zone in ("with", "place") and self._definite:  # "with a red roof, and the door"
            self.zone, self.group = "subject", []
        chain = self._chain(words, denied=self._denies_noun())
        head, parts = chain[-1], [mention for mention in chain if mention.is_part]
        possessive = "'s" in self.tokens[start : self.at]
        self._bind(chain[:1] if possessive else parts[:1] or [head])  # "red house's roof", "red house roof"
        if self.after_of and self.last is not None and self.last.is_part and not head.is_part:
            self.last.owner = head.stem  # "the roof of a house"
        self._update_group(head)
        if self._kind(self.at) == "attribute":  # "the roof's color"
            self.at += 1
        elif self.tokens[self.at - 1] == "'s":  # "the house's walls"
            self.group = []
        self.owners += [mention.stem for mention in chain if not (mention.is_part or mention.denied)]
        self.mentions += chain
        self.last, self.phrase, self.joint = head, _Phrase(), ""
        self.after_of = self.attribute_of = False

    def _chain(self, words: Sequence[str], denied: bool) -> list[Mention]:
        """The mentions of consecutive nouns; parts belong to the last category among them, or to one before."""
        categories = [_CATEGORY_STEM[word] for word in words if word in _CATEGORY_STEM]
        in_front = self.zone in ("subject", "complement")
        chain = []
        for word in words:
            if word in _CATEGORY_STEM:
                stem = _CATEGORY_STEM[word]
                heads = in_front and stem == categories[-1]  # of a "boat house", the house
                chain.append(Mention(word, stem, is_part=False, heads=heads, denied=denied))
            else:
                stem = _PART_STEM[word]
                fitting = [owner for owner in self.owners if stem in _PARTS_OF[owner]]
                owners = categories[-1:] or fitting[-1:] or self.owners[:1]
                owner = owners[0] if owners else None
                chain.append(Mention(word, stem, is_part=True, owner=owner, denied=denied))
        return chain

    def _denies_noun(self) -> bool:
        """Whether the noun being read is denied; a "not" right before a value denies that value alone."""
        if not self.negation:
            return False
        if self.value_only:
            self.negation = ""
            return False
        self.denied = True
        return True

    def _update_group(self, head: Mention) -> None:
        """Make the noun just read, or not, what the next verb speaks about."""
        if self.attribute_of or self.zone == "complement":  # "the color of the roof", "this is a house"
            self.group = [head]
        elif self.zone == "subject" and not self.after_of:
            if self.joint and self.group:
                self.group = [*self.group, head]
            elif not self.group:
                self.group = [head]
        if self.zone == "complement":
            self.zone = "subject"

    def _read_generic(self, token: str) -> None:
        """A word for any object: "the object" is the caption's subject, "another object" nothing known."""
        if self.zone == "complement":  # "the house is a red object"
            self._end_phrase()
            return
        speaks = self._definite or (self._subject() is None and not self.mentions)
        if speaks and self.zone != "place":
            self._bind([self.it])
            self.group, self.last, self.zone = [self.it], self.it, "subject"
        elif self.zone == "subject":
            self.group = []
        self.phrase, self.joint = _Phrase(), ""

    def _read_pronoun(self, token: str) -> None:
        beside_something = self._previous in ("place", "with", "has", "of")  # "a car next to it"
        self._end_phrase()
        self._end_negation()
        if not beside_something:
            self.group, self.last, self.zone, self.joint = [self.it], self.it, "subject", ""

    def _read_attribute(self, token: str) -> None:
        """The name of an attribute: "of red color", "red in color", "its color is", "the color of the roof is"."""
        if self.phrase.values:
            target = self.group if self.zone == "complement" else [self.last or self.it]
            self._bind(target)
        elif self._previous == "place":
            self.zone = self.zone_before
        elif self.zone != "complement":
            self.group, self.zone, self.attribute_of = [self.it], "subject", True
        self.phrase, self.joint = _Phrase(), ""

    # Words inside a phrase.

    def _read_value(self, token: str) -> None:
        if not self.negation:
            self.phrase.values.append((_ATTRIBUTE_OF[token], token))
            return
        if self.negation in _VALUE_NEGATIONS and not self.determiner_denied:
            self.value_only = True
        self.denied = True

    def _read_determiner(self, token: str) -> None:
        if self.negation and self.denied:
            listed = self._previous in ("conjunction", "comma") and token not in _DEFINITE
            if not (listed and self.negation in _LIST_NEGATIONS):  # "without a roof or a door"
                self.negation = ""
        if self.zone == "place" and self._previous == "other":  # "on the left a house"
            self._leave_place()
        shared = self._previous == "conjunction" and token not in _DEFINITE  # "a red and a blue house"
        if token == "whose":
            self.joint, self.group = token, []
        if not (shared and self.phrase.determiner):
            self._end_phrase()
        self.phrase.determiner, self.phrase.has_other, self.phrase.closed = token, False, False
        self.determiner_denied = bool(self.negation)

    def _read_other(self, token: str) -> None:
        if token in (_PRESENT if self.negation else _ABSENT):
            beside = self._kind(self.at - (2 if self._previous == "negation" else 1)) == "noun"
            absent = self.group if self.zone == "complement" else [self.last] if beside and self.last else []
            for mention in absent:  # "the roof is absent", "is not visible", "roof missing"
                mention.denied = True
        self.phrase.has_other = True
        self.phrase.closed = self.phrase.closed or self._previous == "value"

    def _read_negation(self, token: str) -> None:
        follower = self.tokens[self.at + 1] if self.at + 1 < len(self.tokens) else ""
        if token == "not" and follower in _EXTENDERS:
            self.at += 2
            return
        if token in _ABSENT and not self._noun_follows():
            self._read_other(token)
            return
        if token in _LIST_NEGATIONS:
            self._end_phrase()
            self.zone, self.joint = "with", ""
        twice = self._previous == "negation" and bool(self.negation)  # "not without"
        self.negation = "" if twice else token
        self.denied = self.value_only = self.determiner_denied = False

    def _noun_follows(self) -> bool:
        """Whether a noun follows in the same phrase ("missing a roof", not "missing.")."""
        position = self.at + 1
        while self._kind(position) in ("determiner", "value", "other"):
            position += 1
        return self._kind(position) == "noun"

    # Words between phrases.

    def _read_comma(self, token: str) -> None:
        if self.negation and not (self.denied and self._list_ends_with_or()):
            self.negation = ""
        if self._phrase_goes_on():
            return
        self._end_phrase()
        if self.zone == "place":
            self._leave_place()
        self.joint = token

    def _list_ends_with_or(self) -> bool:
        """Whether the list after this comma is closed by "or" ("no roof, door or window")."""
        position = self.at + 1
        while self._kind(position) in ("determiner", "value", "other", "noun", "comma", "conjunction"):
            if self.tokens[position] == "or":
                return True
            if self.tokens[position] in _CLAUSE_CONJUNCTIONS:
                return False
            position += 1
        return False

    def _read_conjunction(self, token: str) -> None:
        if token in _CLAUSE_CONJUNCTIONS:
            self.negation = ""
        elif self._phrase_goes_on():
            return
        self._end_phrase()
        self.joint = token

    def _read_copula(self, token: str) -> None:
        self._begin_clause(token)
        self._end_phrase()
        self._end_negation()
        self.zone, self.joint = "complement", ""

    def _read_has(self, token: str) -> None:
        self._begin_clause(token)
        self._end_phrase()
        self._end_negation()
        if self.group:
            self.last = self.group[0]
            if self.last.stem in _PARTS_OF:
                self.owners = [self.last.stem]
        self.zone, self.joint = "with", ""

    def _read_with(self, token: str) -> None:
        if self._previous == "comma":  # "next to a car, with a roof": the first thing's roof
            self.owners = self.owners[:1]
        self._end_phrase()
        self._end_negation()
        self.zone, self.joint = "with", ""

    def _read_place(self, token: str) -> None:
        self._end_phrase()
        self._end_negation()
        if self.zone == "complement" and (token == "like" or (token == "as" and self._previous == "copula")):
            return  # "looks like a house", "is as red as"
        if token in _HOLDING and self._previous == "noun" and self.last is not None and self.last.is_part:
            self.after_of = True  # "the flag on the boat"
            return
        self.zone_before, self.zone, self.place, self.joint = self.zone, "place", token, ""

    def _read_of(self, token: str) -> None:
        if self._definite and self.phrase.has_other:  # "the shadow of the house"
            self.group = []
        self._end_phrase()
        self.after_of, self.joint = True, ""

    def _read_relative(self, token: str) -> None:
        self._end_phrase()
        self._end_negation()
        if self._previous != "conjunction":  # "which is red", but "and which is red" stays with its group
            self.group = [] if self.last is None else [self.last]
        self.zone, self.joint = "subject", ""


class SceneJudge:
    """Answers questions about the drawn world by reading captions with fixed rules, without a model.

    It reads the captions of `perceptiondlm.drawn.scenes`, and free text as far as these rules go:

    1. Words count whole, in any case: "HOUSE!" names a house; "lighthouse", "greenish" and "red-roofed" name
       nothing. Singular and plural are the same. Only the drawn world's own words are known: "crimson",
       "residence" or "tiny" are not mentions, by design.
    2. A value belongs to the noun that follows it in its phrase; in "house roof" to the part. A phrase ends at
       a comma, "with", "and", a verb, a preposition or a determiner, unless its noun is still to come ("a
       small, red house", "a red and blue house"). An unknown noun takes its values with it ("red bushes").
    3. A value without a following noun belongs to what the verb speaks about ("the roof is blue", "its color
       is red", "a house which is red", "roof: blue"), or to the noun before it ("a house, small and red").
    4. "It", "the object" and "its color" speak of the caption's subject.
    5. A part belongs to the category of its "of", "on" or possessive, else to the nearest category before it
       that can have it, else to the sentence's first category or the caption's subject. It counts for that
       category only.
    6. A denied word is not a mention ("no", "not", "without", "lacks", "neither ... nor", "rather than", "is
       absent", "is not visible"), and neither is what is said of it. A denial reaches over "and" and "or" up to
       the next determiner, comma, verb, preposition or "but"; over a comma where the list is closed by "or";
       over "a" in a list after "without". Two denials in a row cancel out.
    7. "Not red" denies nothing but the value. "Not only red but blue" claims both.
    8. The subject is the first category mentioned that is neither denied, nor where something is ("next to a
       car"), nor had by something ("with a cup"). "The wheel of a house" is about a house. Only the subject is
       recognised; every other category is mentioned all the same.
    9. Claims about several things of one category are put together: "a red house next to a blue house" claims
       red and blue of the house. So do repeated mentions.
    10. "Or", "maybe" and lists do not hedge: every value named is claimed.

    Known limits: a known noun in front of an unknown one is taken for the thing itself ("house walls", "fish
    tank"), questions for statements ("is this a house?"), and "hardly red" for red.

    Queries and the verdict's score (the choice with that score is picked):

    ==================  ====================================================================================
    ``recognition``     1 if the subject is ``category``, else 0
    ``attribute``       0 if the category, or the part in question, is not mentioned; 0.5 if no value is
                        claimed; 1 if exactly ``value`` is claimed; -1 if any other value is, with it or not
    ``part``            -1 if the category's ``part`` is mentioned, else 1
    ``category``        -1 if ``category`` is mentioned anywhere, else 1
    ``value``           -1 if ``value`` is claimed of the category (or its ``part``), else 1
    ==================  ====================================================================================

    "A part is mentioned" does not look at number, unless the category has that very part in the other number
    (a robot's "antenna", asked about a butterfly's "antennae"): then only the exact word counts. Where a ``part``
    or ``value`` question offers 0, as published ones do for parts, 0 is picked if the category is not mentioned.
    """

    sees_image = False

    def __call__(self, requests: Sequence[JudgeRequest]) -> list[str]:
        """Answer every request with the letter of a choice.

        Raises:
            ValueError: naming the region: a question without ``query``, a query that is not about the drawn
                world, or no choice with the verdict's score.
        """
        readings: dict[str, Reading] = {}
        answers = []
        for request in requests:
            query = _checked_query(request)
            if request.caption not in readings:
                readings[request.caption] = read_caption(request.caption)
            scores = [score for _, score in request.question["choices"]]
            wanted = _verdict(readings[request.caption], query, scores)
            if wanted not in scores:
                raise ValueError(
                    f"region {request.region_id!r}: the verdict scores {wanted}, the choices offer {scores} "
                    f"({request.question['question']!r}, {dict(query)})"
                )
            answers.append(LETTERS[scores.index(wanted)])
        return answers


_QUERY_KEYS = {
    "recognition": ("category",),
    "attribute": ("attribute", "category", "part", "value"),
    "part": ("category", "part"),
    "category": ("category",),
    "value": ("attribute", "category", "part", "value"),
}


def _checked_query(request: JudgeRequest) -> Mapping[str, Any]:
    """The question's query, or ValueError where it is not a query about the drawn world."""
    region, query = f"region {request.region_id!r}", request.question.get("query")
    if query is None:
        raise ValueError(
            f"{region}: the question {request.question['question']!r} has no 'query'; SceneJudge reads only "
            "questions about drawn scenes, use a language-model judge for others"
        )
    if query.get("kind") not in _QUERY_KEYS:
        raise ValueError(f"{region}: query kind {query.get('kind')!r} is none of {tuple(_QUERY_KEYS)}")
    missing = [key for key in _QUERY_KEYS[query["kind"]] if key not in query]
    if missing:
        raise ValueError(f"{region}: the {query['kind']} query {dict(query)} lacks {missing}")
    if query["category"] not in CATEGORIES:
        raise ValueError(f"{region}: category {query['category']!r} is none of {tuple(CATEGORIES)}")
    if query.get("part") is not None and query["part"] not in _PART_STEM:
        raise ValueError(f"{region}: the drawn world has no part {query['part']!r}")
    if "value" in query and query["value"] not in ATTRIBUTES.get(query["attribute"], ()):
        raise ValueError(f"{region}: {query['value']!r} is no {query['attribute']} of the drawn world")
    return query


def _verdict(reading: Reading, query: Mapping[str, Any], scores: Sequence[float]) -> float:
    """The score of the choice that the caption deserves; see the table of `SceneJudge`."""
    kind, category = query["kind"], query["category"]
    part: Any = query.get("part")
    if kind == "recognition":
        return float(reading.subject == _stem(category))
    if kind == "category":
        return -1.0 if reading.names(category) else 1.0
    named = reading.names(category)
    if kind == "part":
        return -1.0 if reading.names_part(category, part) else float(named or 0 not in scores)
    claimed = reading.values(query["attribute"], category, part)
    if kind == "value":
        return -1.0 if query["value"] in claimed else float(named or 0 not in scores)
    if not named or (part is not None and not reading.names_part(category, part)):
        return 0.0
    if not claimed:
        return 0.5
    return 1.0 if claimed == {query["value"]} else -1.0
