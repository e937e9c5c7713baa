"""What an engine hands back: drafts while it works, answers at the end, and the handle that brings them."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any


OPEN_SLOT = "▁"  # stands for slots that are not decided, in drafts


class EngineError(RuntimeError):
    """An engine that cannot take a request."""


class EngineBusy(EngineError):
    """As many requests wait as may wait."""


class EngineClosed(EngineError):
    """The engine takes no further requests, or ended before this one."""


@dataclass(frozen=True)
class Answers:
    """What became of a request.

    Args:
        texts: one per region, in the order given; one for a question.
        scores: mean probability of each text's tokens, in [0, 1].
        lengths: tokens of each text.
        ended: whether each text came to an end of its own before its slots were full.
        boxes: of the regions, x0, y0, x1, y1, half-open, in pixels; empty for a question.
        ids, confidences: of every slot of each text: its token, and that one's probability when it was committed.
        size: (height, width) of the image in pixels; None without one image.
        prompt_tokens: of the request, image and regions included.
        num_forward_passes: denoising passes that it took part in.
        image_was_known: whether its encoded image was kept from before.
        seconds_waiting, seconds_running: from submission to the first pass, and from there to the end.
    """

    texts: list[str]
    scores: list[float]
    lengths: list[int]
    ended: list[bool]
    boxes: list[tuple[int, ...]]
    ids: list[list[int]] = field(default_factory=list)
    confidences: list[list[float]] = field(default_factory=list)
    size: tuple[int, int] | None = None
    prompt_tokens: int = 0
    num_forward_passes: int = 0
    image_was_known: bool = False
    seconds_waiting: float = 0.0
    seconds_running: float = 0.0


@dataclass(frozen=True)
class Draft:
    """Answers as they stand between two steps.

    Args:
        ids: (A, G) int64 on the host, the mask token where undecided.
        tokenizer, mask_token_id, end_ids: to read them.
    """

    ids: Any
    tokenizer: Any
    mask_token_id: int
    end_ids: tuple[int, ...]

    def texts(self) -> list[str]:
        """Every answer up to its first decided end, `OPEN_SLOT` for each undecided slot."""
        return [self._text(row) for row in self.ids.tolist()]

    def settled(self) -> list[str]:
        """Of every answer what comes before its first undecided slot: this part stays."""
        rows = self.ids.tolist()
        ends = [next((i for i, token in enumerate(row) if token == self.mask_token_id), len(row)) for row in rows]
        texts = [self._text(row[:end]) for row, end in zip(rows, ends, strict=True)]
        return [text.rstrip("\ufffd") for text in texts]  # a character whose last bytes are still open

    def _text(self, row: list[int]) -> str:
        pieces, run = [], list[int]()
        for token in row:
            if token in self.end_ids:
                break
            if token == self.mask_token_id:
                pieces += [self.tokenizer.decode(run, skip_special_tokens=True), OPEN_SLOT]
                run = []
            else:
                run.append(token)
        return "".join((*pieces, self.tokenizer.decode(run, skip_special_tokens=True)))


class Handle:
    """A request under way.

    Attributes:
        future: gets the [`Answers`], or the error; `asyncio.wrap_future` makes it awaitable.
    """

    def __init__(self) -> None:
        self.future: Future[Answers] = Future()
        self.on_settled: Callable[[Answers | None], None] | None = None  # called before anybody hears of it
        self._lock = threading.Lock()

    def result(self, timeout: float | None = None) -> Answers:
        """Wait for the answers.

        Raises:
            TimeoutError: after `timeout` seconds; the request goes on.
            CancelledError: it was cancelled.
            TypeError, ValueError, OSError: what was asked cannot be answered.
        """
        return self.future.result(timeout)

    def cancel(self) -> None:
        """Give it up; it leaves before the next step. Does nothing to a request that is done."""
        self.future.cancel()

    def done(self) -> bool:
        """Whether it is answered, cancelled or has failed."""
        return self.future.done()

    def settle(self, answers: Answers | None = None, error: BaseException | None = None) -> bool:
        """The engine's word on it: answers, or what went wrong. Whether it was still open: the first word counts."""
        with self._lock:
            if self.future.done() or not self.future.set_running_or_notify_cancel():
                return False
            if self.on_settled is not None:
                self.on_settled(answers)
            if error is not None:
                self.future.set_exception(error)
            elif answers is not None:
                self.future.set_result(answers)
            return True


DraftCallback = Callable[[Draft], None]
