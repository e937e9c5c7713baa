"""Asking a model behind a network many questions at once: threads, pace, retries, and a stop that keeps answers."""

import email.utils
import logging
import random
import threading
import time
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from perceptiondlm.evaluation.judges.cache import Answer
from perceptiondlm.evaluation.judges.chat import ChatJudge, Prompt, without_thinking
from perceptiondlm.evaluation.judges.errors import JudgeError
from perceptiondlm.evaluation.judges.pictures import Pictures


RETRIED_STATUSES = frozenset({408, 409, 429})  # and all of 5xx
QUOTA_CODES = frozenset({"insufficient_quota", "billing_hard_limit_reached"})
QUIET_ATTEMPTS = 3  # failures of one question before they are worth a warning
LONGEST_RETRY_AFTER = 600.0  # seconds; an endpoint that asks for more is given up

logger = logging.getLogger(__name__)


class AskingJudge(ChatJudge):
    """Asks many questions at once; a subclass sends one. See `ChatJudge` for ``settings``, ``cache`` and ``prices``.

    What may pass (`TryAgain`) is tried again after a growing, jittered pause; an endpoint's ``Retry-After`` holds back
    all questions. Anything else stops the judge at once; questions under way still get their answers, and all answers
    are kept.

    Args:
        place: of the model, for messages.
        concurrency: questions under way at once. It does not change any answer.
        requests_per_minute: at most so many requests, retries included; None for no limit.
        timeout: seconds without a sign of life after which a request is given up.
        max_attempts: requests per question before the judge gives up.
        backoff: pause before the second attempt in seconds; it doubles up to a minute.
    """

    sees_image = True

    def __init__(
        self,
        settings: Mapping[str, Any],
        place: str,
        *,
        cache: str | Path | None = None,
        prices: tuple[float, float] | None = None,
        concurrency: int = 32,
        requests_per_minute: float | None = None,
        timeout: float = 120.0,
        max_attempts: int = 12,
        backoff: float = 0.5,
    ) -> None:
        for name, value in {"concurrency": concurrency, "max_attempts": max_attempts, "timeout": timeout}.items():
            if value <= 0:
                raise ValueError(f"{name} must be positive, got {value}")
        super().__init__(settings, cache, prices)
        self.place = place
        self.concurrency = concurrency
        self.timeout = timeout
        self.max_attempts = max_attempts
        self.backoff = backoff
        self._pace = Pace(requests_per_minute)

    @abstractmethod
    def _send(self, prompt: Prompt) -> Answer:
        """Ask once; raises `TryAgain` for what may pass, `JudgeError` for what will not."""

    def try_out(self, show_image: bool = False) -> None:
        """Ask one question whose answer nobody needs, with a picture or without, so that a wrong key costs nothing."""
        pictures = Pictures(Image.new("RGB", (56, 56)), np.ones((56, 56), dtype=bool)) if show_image else None
        self._request(self._prompt("(trying out)", "Answer with the letter A.", pictures), threading.Event())

    def _ask(self, prompts: Sequence[Prompt]) -> None:
        stop = threading.Event()
        with ThreadPoolExecutor(self.concurrency) as pool:
            tasks = [pool.submit(self._ask_once, prompt, stop) for prompt in prompts]
            try:
                for task in as_completed(tasks):
                    task.result()
            except BaseException as error:  # Ctrl-C as well: let the questions under way finish
                stop.set()
                pool.shutdown(wait=True, cancel_futures=True)
                if isinstance(error, JudgeError):
                    kept = (
                        f"{len(self.cache)} answers are kept in {self.cache.path}; the same command goes on from there"
                    )
                    raise JudgeError(f"{error}. {kept}") from error
                raise

    def _ask_once(self, prompt: Prompt, stop: threading.Event) -> None:
        """One question, unless another thread or process has meanwhile asked it."""
        with self.cache.claim(prompt.key):
            if stop.is_set() or self.cache.get(prompt.key) is not None:
                return
            try:
                answer = self._request(prompt, stop)
            except JudgeError:
                stop.set()
                raise
            if answer is not None:
                self._store(prompt, answer)

    def _request(self, prompt: Prompt, stop: threading.Event) -> Answer | None:
        """Ask until there is an answer; None where the judge was stopped meanwhile."""
        failure = None
        for attempt in range(self.max_attempts):
            if attempt:
                stop.wait(min(self.backoff * 2 ** (attempt - 1), 60.0) * random.uniform(0.5, 1.0))
            self._pace.wait(stop)
            if stop.is_set():
                return None
            try:
                return self._send(prompt)
            except TryAgain as error:
                failure = error
                level = logging.INFO if attempt < QUIET_ATTEMPTS else logging.WARNING
                logger.log(level, "attempt %d about region %r: %s", attempt + 1, prompt.region_id, error)
                self._pace.hold(error.retry_after)
        raise JudgeError(
            f"no answer about region {prompt.region_id!r} from {self.place} after {self.max_attempts} attempts, "
            f"the last: {failure}"
        )


class TryAgain(Exception):
    """A failure that may pass.

    Args:
        message: what happened.
        retry_after: seconds to wait as the endpoint says, 0 if it does not.
    """

    def __init__(self, message: str, retry_after: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Pace:
    """When the next request may go out, for all threads.

    Args:
        requests_per_minute: None for no limit.
    """

    def __init__(self, requests_per_minute: float | None) -> None:
        if requests_per_minute is not None and requests_per_minute <= 0:
            raise ValueError(f"requests_per_minute must be positive, got {requests_per_minute}")
        self._gap = 0.0 if requests_per_minute is None else 60.0 / requests_per_minute
        self._next = 0.0
        self._lock = threading.Lock()

    def wait(self, stop: threading.Event) -> None:
        """Take the next place, and wait for it."""
        with self._lock:
            place = max(self._next, time.monotonic())
            self._next = place + self._gap
        stop.wait(max(place - time.monotonic(), 0.0))

    def hold(self, seconds: float) -> None:
        """Let nothing out for so long."""
        with self._lock:
            self._next = max(self._next, time.monotonic() + seconds)


def checked_text(text: Any, finish_reason: Any, reply: str) -> str:
    """The text of an answer; raises `TryAgain` where a reply holds none, `JudgeError` where it was cut off before."""
    thought = isinstance(text, str) and "<think>" in text and "</think>" not in text
    if (not text or thought) and finish_reason == "length":
        raise JudgeError("the judge used up its max_tokens before it answered; raise max_tokens or turn thinking off")
    if not isinstance(text, str) or not without_thinking(text):
        raise TryAgain(f"the reply holds no answer: {reply[:200]!r}")
    return text


def refusal(status: int | None, code: str | None, said: str, place: str, key_name: str, pause: float) -> Exception:
    """What an HTTP error means: `TryAgain`, or `JudgeError` saying why there will be no answer."""
    if code in QUOTA_CODES or status == 402:
        return JudgeError(f"the quota of the key in {key_name} is used up ({said})")
    if status in (401, 403):
        return JudgeError(f"{place} refuses the key in {key_name} ({said})")
    if status in RETRIED_STATUSES or (status or 0) >= 500:
        if pause > LONGEST_RETRY_AFTER:
            return JudgeError(f"{place} asks to wait for {pause:.0f} s ({said})")
        return TryAgain(said, pause)
    return JudgeError(f"{place} refuses the request ({said})")


def retry_after(value: str) -> float:
    """Seconds of a Retry-After header, given as a number or a date; 0 without one."""
    try:
        return max(float(value), 0.0)
    except ValueError:
        pass
    try:
        return max(email.utils.parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    except ValueError:
        return 0.0
