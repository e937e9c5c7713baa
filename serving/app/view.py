"""A session as the browser draws it: plain JSON. Texts are drawn as text, never as HTML."""

from itertools import count
from typing import Any

from perceptiondlm.common.palette import color_of, ink_on
from perceptiondlm.serving.app.captioner import Answer
from perceptiondlm.serving.app.session import Exchange, MarkedRegion, Session


_serials = count(1)


def session_view(session: Session, busy: str | None = None, note: str = "", error: str | None = None) -> dict[str, Any]:
    """What the page shows.

    Args:
        busy: "opening", "marking", "finding", "captioning" or "asking" while that runs.
        note: a line about what happened; error: what went wrong instead.
    Returns:
        `image` (path, name, width, height, or None), `regions`, `exchanges`, `busy`, `note`, `error`, and `serial`,
        which no other view has: the page draws a view that it has not seen.
    """
    image = None
    if session.image is not None:
        width, height = session.image.size
        image = {"path": str(session.shown), "name": session.image_name, "width": width, "height": height}
    return {
        "image": image,
        "regions": [region_view(region) for region in session.regions],
        "exchanges": [exchange_view(exchange) for exchange in session.exchanges],
        "busy": busy,
        "note": note,
        "error": error,
        "serial": next(_serials),
    }


def region_view(region: MarkedRegion) -> dict[str, Any]:
    """`number`, `color` and `ink` (CSS), `outline` (SVG path), `anchor`, `box`, `source`, `label` and `caption`."""
    color = color_of(region.number - 1)
    return {
        "number": region.number,
        "color": css(color),
        "ink": css(ink_on(color)),
        "outline": region.outline,
        "anchor": [round(edge, 1) for edge in region.anchor],
        "box": [int(edge) for edge in region.found.box],
        "source": region.source,
        "label": region.found.label,
        "caption": None if region.caption is None else answer_view(region.caption),
    }


def exchange_view(exchange: Exchange) -> dict[str, Any]:
    """`question`, `region` (number or None for the whole image) and `answer`."""
    return {"question": exchange.question, "region": exchange.region, "answer": answer_view(exchange.answer)}


def answer_view(answer: Answer) -> dict[str, Any]:
    """`words` of `[text, confidence, pass]` and `score`, or a draft's `pieces` (None is an open slot); `passes`."""
    if answer.text is None:
        return {"pieces": answer.pieces, "passes": answer.passes}
    words = [[word.text, round(word.confidence, 3), word.decided] for word in answer.words]
    return {"words": words, "score": answer.score, "passes": answer.passes}


def css(color: tuple[int, int, int]) -> str:
    """An RGB colour as CSS."""
    return "#" + "".join(f"{channel:02x}" for channel in color)
