"""Scores of captions of named regions: right name, truly more general name, wrong name; colours; calibration.

The protocol: the name a caption gives (`NameTable.said`) is compared with the accepted words of the annotated category.
A caption that names nothing, a thing or an object is wrong. Colours are right where every colour word of the caption
covers at least `TRUE_SHARE` of the region's pixels, sizes and places where layout.py finds the same words. All shares
are in percent.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from perceptiondlm.answers_perceptiondlm import calibrated, log_odds
from perceptiondlm.evaluation.photos.annotations import NamedPicture
from perceptiondlm.evaluation.photos.colours import COLOUR_WORDS, TRUE_SHARE, colour_shares
from perceptiondlm.evaluation.photos.layout import PLACES, SIZES, place, size_word
from perceptiondlm.evaluation.photos.names import VERDICTS, NameTable


# Regions by share of the picture, and what the report calls them.
SIZE_LIMITS = (("below 0.3 %", 0.003), ("0.3 to 2 %", 0.02), ("2 to 10 %", 0.1), ("above 10 %", 1.01))
RELIABILITY_BINS = 10
SIZE_WORDS = tuple(word for _, word in SIZES)
COLOUR_PATTERN = re.compile(rf"\b({'|'.join((*COLOUR_WORDS, 'gray'))})\b")


@dataclass(frozen=True)
class RegionResult:
    """One region's caption, judged.

    Args:
        region_id: picture and index of the region.
        category: as annotated; isthing: whether it can be counted.
        share: of the picture's pixels, in (0, 1].
        caption: the text; score: the model's own confidence in [0, 1], None where captions come without.
        said: the name found in it, if any; verdict: one of `VERDICTS`.
        colours_right: whether all colours it names are there; None where it names none.
        size_right, place_right: whether the word of layout.py is true of the mask; None where it uses none of them.
    """

    region_id: str
    category: str
    isthing: bool
    share: float
    caption: str
    score: float | None
    said: str | None
    verdict: str
    colours_right: bool | None
    size_right: bool | None = None
    place_right: bool | None = None


def score_picture(
    picture: NamedPicture,
    region_ids: Sequence[str],
    captions: Mapping[str, str],
    scores: Mapping[str, float],
    table: NameTable,
) -> list[RegionResult]:
    """Judge the captions of one picture's regions; a caption that is missing is an empty one."""
    image, masks = picture.read()
    pixels = np.asarray(image)
    results = []
    for region, region_id, mask in zip(picture.regions, region_ids, masks, strict=True):
        caption = captions.get(region_id, "")
        results.append(
            RegionResult(
                region_id,
                region.category,
                region.isthing,
                float(mask.mean()),
                caption,
                scores.get(region_id),
                table.said(caption),
                table.verdict(caption, region.category),
                colours_right(caption, colour_shares(pixels, mask)),
                said_right(caption, size_word(mask), SIZE_WORDS),
                said_right(caption, place(mask), PLACES),
            )
        )
    return results


def colours_right(caption: str, shares: Mapping[str, float]) -> bool | None:
    """Whether every colour a caption names is there; None where it names none.

    Colours are looked for behind the name where the caption lists them, as in "an orange, green": a fruit is no colour.
    """
    _, comma, listed = caption.lower().partition(",")
    said = {word.replace("gray", "grey") for word in COLOUR_PATTERN.findall(listed if comma else caption.lower())}
    return all(shares.get(word, 0.0) >= TRUE_SHARE for word in said) if said else None


def said_right(caption: str, true: str, words: Iterable[str]) -> bool | None:
    """Whether the one of `words` that a caption lists between its commas is the true one; None where it lists none."""
    said = {part.strip() for part in caption.lower().split(",")} & set(words)
    return said == {true} if said else None


def summarize(results: Sequence[RegionResult]) -> dict[str, Any]:
    """The report's numbers, JSON-ready: all regions, by size, things and stuff, colours, calibration.

    Raises:
        ValueError: without any region.
    """
    if not results:
        raise ValueError("no region was scored")
    tests: dict[str, Callable[[RegionResult], bool]] = {
        "all": lambda _: True,
        "things": lambda one: one.isthing,
        "stuff": lambda one: not one.isthing,
    }
    low = 0.0
    for name, limit in SIZE_LIMITS:
        tests[name] = partial(_between, low, limit)
        low = limit
    tests["things below 0.3 %"] = lambda one: one.isthing and one.share < SIZE_LIMITS[0][1]
    rows = {name: verdict_shares([one for one in results if test(one)]) for name, test in tests.items()}
    told = {
        "colours": told_right([one.colours_right for one in results]),
        "sizes": told_right([one.size_right for one in results]),
        "places": told_right([one.place_right for one in results]),
    }
    return {
        "num_regions": len(results),
        "num_pictures": len(set(map(_picture, results))),
        "shares": rows,
        **{f"{what}_right": right for what, (right, _) in told.items()},
        **{f"captions_with_{what}": 100 * count / len(results) for what, (_, count) in told.items()},
        "calibration": calibration(results),
    }


def told_right(verdicts: Sequence[bool | None]) -> tuple[float | None, int]:
    """Percent of verdicts that are true, None without any, and how many there are; None is no verdict."""
    given = [verdict for verdict in verdicts if verdict is not None]
    return (100 * sum(given) / len(given) if given else None), len(given)


def _between(low: float, limit: float, one: RegionResult) -> bool:
    return low <= one.share < limit


def verdict_shares(results: Sequence[RegionResult]) -> dict[str, float | int | None]:
    """Percent of regions by verdict, `right_or_general` beside them, and their number."""
    count, verdicts = len(results), Counter(one.verdict for one in results)
    shares = {verdict: 100 * verdicts[verdict] / count if count else None for verdict in VERDICTS}
    either = 100 * (verdicts["right"] + verdicts["general"]) / count if count else None
    return {"regions": count, **shares, "right_or_general": either}


def calibration(results: Sequence[RegionResult]) -> dict[str, Any] | None:
    """How far a caption's score is the chance that it is true (right or truly more general).

    Returns:
        `bins`, see `reliability`, and their `expected_error`; `fit`, see `fit_scores`; `error_when_fitted`: that error
        where each half of the pictures is brought to the truth by a fit to the other (None for one picture). None where
        captions come without scores.
    """
    pictures = {name: place for place, name in enumerate(dict.fromkeys(_picture(one) for one in results))}
    halves: list[list[tuple[float, bool]]] = [[], []]
    for one in results:
        if one.score is not None:
            halves[pictures[_picture(one)] % 2].append((one.score, one.verdict != "wrong"))
    scored = [*halves[0], *halves[1]]
    if not scored:
        return None
    bins = reliability(scored)
    error = None
    if all(halves):
        lines = [fit_scores(half) for half in halves[::-1]]
        fitted = [
            (calibrated(score, line), true) for line, half in zip(lines, halves, strict=True) for score, true in half
        ]
        error = expected_error(reliability(fitted))
    return {"bins": bins, "expected_error": expected_error(bins), "fit": fit_scores(scored), "error_when_fitted": error}


def _picture(one: RegionResult) -> str:
    return one.region_id.rpartition("_")[0]


def reliability(scored: Sequence[tuple[float, bool]]) -> list[dict[str, Any]]:
    """Scores and truth in bins of equal width: mean `score`, `true` share and number of `regions`."""
    bins = []
    for number in range(RELIABILITY_BINS):
        inside = [pair for pair in scored if min(int(pair[0] * RELIABILITY_BINS), RELIABILITY_BINS - 1) == number]
        if inside:
            mean, true = (sum(values) / len(inside) for values in zip(*inside, strict=True))
            bins.append({"score": mean, "true": true, "regions": len(inside)})
    return bins


def expected_error(bins: Sequence[Mapping[str, Any]]) -> float:
    """Mean distance of score and truth over regions (ECE)."""
    return sum(abs(one["score"] - one["true"]) * one["regions"] for one in bins) / sum(one["regions"] for one in bins)


def fit_scores(scored: Sequence[tuple[float, bool]]) -> list[float]:
    """Slope and intercept that a processor with these scores takes as `score_calibration` (Platt scaling).

    Logistic regression of truth on the scores' log-odds, with a prior of one region around slope 1 and intercept 0.
    """
    odds_R = torch.tensor([log_odds(score) for score, _ in scored], dtype=torch.float64)
    true_R = torch.tensor([float(true) for _, true in scored], dtype=torch.float64)
    line = torch.tensor([1.0, 0.0], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([line], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        misfit = F.binary_cross_entropy_with_logits(line[0] * odds_R + line[1], true_R, reduction="sum")
        value = misfit + ((line[0] - 1) ** 2 + line[1] ** 2) / 2
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    return line.detach().tolist()


def most_frequent_name(pictures: Sequence[NamedPicture], table: NameTable) -> str:
    """What captions would say that know no picture: the commonest category's name among these (training) pictures."""
    counts = Counter(region.category for picture in pictures for region in picture.regions)
    return table[counts.most_common(1)[0][0]].name
