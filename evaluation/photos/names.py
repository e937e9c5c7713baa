"""What a region may be called: the accepted words of every category, and what a caption names.

`coco_names.json` lists, for the 133 categories of COCO panoptic, the words that are right, those that are truly more
general, and which of the latter captions use where the name is uncertain. Right are the lemmas of the category's
WordNet 3.0 synsets and a few plain variants (kinds of persons, what COCO merges into one category); general are the
lemmas of their hypernyms. Slang and words for nothing in particular (entity, object, thing) are left out. The list was
fixed before any model was scored by it.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from perceptiondlm.common.json_files import read_json


COCO_NAMES = Path(__file__).with_name("coco_names.json")
VERDICTS = ("right", "general", "wrong")
# Hypernyms that say nothing: a caption that uses one of them names nothing.
VACUOUS = frozenset((
    "entity", "physical entity", "abstract entity", "abstraction", "object", "physical object", "whole", "unit",
    "thing", "item", "something", "matter", "artifact", "artefact", "instrumentality", "instrumentation",
    "living thing", "animate thing", "organism", "being", "causal agent", "cause", "causal agency", "substance",
    "part", "piece", "portion", "component", "constituent", "creation", "product", "commodity", "group", "region",
    "area", "location", "natural object", "stuff",
))  # fmt: skip
# Where the phrase that names a region ends: punctuation, and words that begin what is said about it.
PHRASE_ENDS = re.compile(
    r"[,.;:()]|\b(?:of|in|on|at|with|that|which|who|is|are|was|has|from|by|near|next|behind|under|above|below|against|"
    r"standing|sitting|lying|wearing|holding|made|and|or)\b"
)
WORDS = re.compile(r"[a-z][a-z'-]*")


@dataclass(frozen=True)
class CategoryNames:
    """The words for one category.

    Args:
        category: its key in annotations.
        name: what captions call it.
        right: words that name it, `name` among them.
        general: truly more general words.
        broader: those of `general` that captions use where the name is uncertain, nearest first.
    """

    category: str
    name: str
    right: tuple[str, ...]
    general: tuple[str, ...]
    broader: tuple[str, ...] = ()

    @classmethod
    def of_lemmas(cls, names: Sequence[str], hypernyms: Sequence[str] = ()) -> "CategoryNames":
        """From WordNet's lemmas of a synset and of its hypernyms, nearest first, as ImageNet and LVIS have them."""
        right = tuple(dict.fromkeys(name.lower().replace("_", " ") for name in names))
        lowered = dict.fromkeys(name.lower().replace("_", " ") for name in hypernyms)
        general = tuple(name for name in lowered if name not in VACUOUS and name not in right)
        broader = tuple(name for name in general if name in COMMON_GROUPS)[:2]
        return cls(right[0], right[0], right, general, broader)


# Words for groups of kinds that people use, in the order in which the nearest is chosen from a chain of hypernyms.
COMMON_GROUPS = frozenset((
    "dog", "cat", "bird", "fish", "snake", "lizard", "frog", "turtle", "insect", "spider", "monkey", "bear",
    "animal", "car", "truck", "boat", "ship", "aircraft", "vehicle", "fruit", "vegetable", "food", "bag",
    "clothing", "tool", "toy", "furniture", "container", "musical instrument", "weapon", "computer", "device",
    "appliance", "sports equipment", "fabric", "plant", "flower", "mushroom", "building", "structure", "person",
))  # fmt: skip


class NameTable:
    """Accepted words by category, and the reading of captions with them.

    Args:
        entries: one for each category.
        vocabulary: further words that a caption may use as a name, all wrong for the entries that lack them.
    """

    def __init__(self, entries: Iterable[CategoryNames], vocabulary: Iterable[str] = ()):
        self.entries: Mapping[str, CategoryNames] = {entry.category: entry for entry in entries}
        words = {word for entry in self.entries.values() for word in (*entry.right, *entry.general, entry.name)}
        self.vocabulary = {*words, *(word.lower() for word in vocabulary), *VACUOUS}
        self.found: dict[CategoryNames, CategoryNames] = {}  # what `canonical` gave

    @classmethod
    def coco(cls, vocabulary: Iterable[str] = ()) -> "NameTable":
        """The 133 categories of COCO panoptic (its 80 things are those of COCO instances)."""
        rows = read_json(COCO_NAMES)
        return cls((entry_of(row) for row in rows), vocabulary)

    def __getitem__(self, category: str) -> CategoryNames:
        if category not in self.entries:
            raise KeyError(f"no accepted words for the category {category!r}; known are {sorted(self.entries)[:5]} ...")
        return self.entries[category]

    def canonical(self, lemmas: CategoryNames) -> CategoryNames:
        """The entry that lemmas of WordNet fall under: that of the nearest lemma with one, or the lemmas themselves.

        A lemma has many senses (a kite is a bird, too): some general word of the entry must be among them as well.
        """
        if lemmas not in self.found:
            chain = (*lemmas.right, *lemmas.general)
            fitting = (
                entry
                for word in chain
                for entry in self.entries.values()
                if word in entry.right and (not entry.general or set(chain) & set(entry.general))
            )
            self.found[lemmas] = next(fitting, lemmas)
        return self.found[lemmas]

    @cached_property
    def longest(self) -> int:
        """Most words of a name."""
        return max(len(WORDS.findall(name)) for name in self.vocabulary)

    def said(self, caption: str) -> str | None:
        """The name that a caption gives its region, or None: the last known name of the first phrase that has one.

        "an orange cat on a chair" says cat, "a glass of wine" glass, "a close-up of a small dog" dog. Plurals count as
        their singular.
        """
        for phrase in PHRASE_ENDS.split(caption.lower()):
            words = WORDS.findall(phrase)
            for end in range(len(words), 0, -1):
                for start in range(max(0, end - self.longest), end):
                    if (name := self._known(" ".join(words[start:end]))) is not None:
                        return name
        return None

    def verdict(self, caption: str, category: str) -> str:
        """One of `VERDICTS`; a caption that names nothing, or a thing, an object, is wrong."""
        name, entry = self.said(caption), self[category]
        if name is None or name in VACUOUS:
            return "wrong"
        return "right" if name in entry.right else "general" if name in entry.general else "wrong"

    def _known(self, words: str) -> str | None:
        """A name of the vocabulary, given in the singular or the plural."""
        singular = [words, words.removesuffix("s"), words.removesuffix("es"), re.sub("ies$", "y", words)]
        irregular = {"people": "person", "men": "man", "women": "woman", "children": "child", "knives": "knife"}
        *front, last = words.split(" ")
        singular.append(" ".join((*front, irregular.get(last, last))))
        return next((form for form in singular if form in self.vocabulary), None)


def entry_of(row: Mapping) -> CategoryNames:
    """An entry from a row of `coco_names.json`."""
    return CategoryNames(
        row["category"], row["name"], tuple(row["right"]), tuple(row["general"]), tuple(row["broader"])
    )
