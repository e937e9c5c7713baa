"""A request inside the engine, and what the engine counts."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from perceptiondlm.serving.answers import DraftCallback, Handle
from perceptiondlm.serving.preparing import Ask, Prepared


@dataclass(eq=False)
class Job:
    """What a request asks, that as it was read, then the steps it still has to take.

    Args:
        width: most of its answers that run at a time.
        submitted, started: by the monotonic clock.
        was_known: whether its encoded image was kept from before.
        boxes: (R, 4) of its regions.
    """

    handle: Handle
    settings: Mapping[str, Any]
    on_draft: DraftCallback | None
    submitted: float
    ask: Ask | None = None
    prepared: Prepared | None = None
    width: int = 1
    started: float = 0.0
    was_known: bool = False
    decoding: Any = None
    steps: Iterator[Any] | None = None
    step: Any = None
    boxes: Any = None


@dataclass
class Counts:
    """What an engine has done so far.

    Args:
        submitted, refused, finished, failed, cancelled: requests.
        answers: of finished requests.
        passes: denoising passes of the model; answers_in_passes: the answers that took part in each, added up.
    """

    submitted: int = 0
    refused: int = 0
    finished: int = 0
    failed: int = 0
    cancelled: int = 0
    answers: int = 0
    passes: int = 0
    answers_in_passes: int = 0
