"""Time spans of a video's captions: looks at one object that say the same are one span."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def merge_spans(looks: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Consecutive looks at one object whose captions are equal word for word, as one span each.

    Args:
        looks: entries with `object`, `shot`, `start` and `end` (seconds), `caption`, `score`, `frame` and `frames`
            (numbers of key frames). Looks are consecutive where one begins when the other ends, within a shot.

    Returns:
        spans of the same form, ordered by `start`: from the first look's start to the last one's end, with the
        `frames` of all, and everything else of the look with the highest score.
    """
    looks = list(looks)
    places = {name: place for place, name in enumerate(dict.fromkeys(look["object"] for look in looks))}
    spans: list[dict[str, Any]] = []
    for look in sorted(looks, key=lambda look: (places[look["object"]], look["start"])):
        if spans and _goes_on(spans[-1], look):
            last = spans[-1]
            surest = max(last, look, key=lambda one: one["score"])
            times = {"start": last["start"], "end": look["end"], "frames": [*last["frames"], *look["frames"]]}
            spans[-1] = {**surest, **times}
        else:
            spans.append(dict(look))
    return sorted(spans, key=lambda span: (span["start"], places[span["object"]]))


def _goes_on(span: Mapping[str, Any], look: Mapping[str, Any]) -> bool:
    """Whether a look follows a span of its object at once, in its shot, and says the same."""
    same = all(span[name] == look[name] for name in ("object", "shot", "caption"))
    return same and span["end"] == look["start"]
