"""A judge behind an OpenAI-compatible endpoint: OpenAI, Azure, vLLM and others."""

import email.utils
import json
import logging
import os
import random
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests
from requests.adapters import HTTPAdapter

from perceptiondlm.evaluation.judges.cache import Answer
from perceptiondlm.evaluation.judges.chat import ChatJudge, Prompt, without_thinking
from perceptiondlm.evaluation.judges.errors import JudgeError


OPENAI_URL = "https://api.openai.com/v1"
AZURE_API_VERSION = "2024-10-21"
RETRIED_STATUSES = frozenset({408, 409, 429})  # and all of 5xx
QUOTA_CODES = frozenset({"insufficient_quota", "billing_hard_limit_reached"})
QUIET_ATTEMPTS = 3  # failures of one question before they are worth a warning
LONGEST_RETRY_AFTER = 600.0  # seconds; an endpoint that asks for more is given up

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Endpoint:
    """Where to ask.

    Attributes:
        url: full address of the chat completions.
        headers: what proves that one may ask.
        key_name: where the key came from, for messages.
    """

    url: str
    headers: Mapping[str, str]
    key_name: str


def openai_endpoint(base_url: str | None = None) -> Endpoint:
    """An endpoint that speaks OpenAI's protocol, with the key in ``OPENAI_API_KEY``.

    Args:
        base_url: such as ``http://localhost:8000/v1``; default: ``OPENAI_BASE_URL``, else OpenAI's own. A server of
            one's own may do without a key.

    Raises:
        ValueError: no key for OpenAI's own endpoint; an address without http.
    """
    url = _checked_url(base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI_URL)
    key = os.environ.get("OPENAI_API_KEY")
    if not key and url == OPENAI_URL:
        raise ValueError("the judge needs a key: set OPENAI_API_KEY, or base_url for a server of your own")
    return Endpoint(f"{url}/chat/completions", {"Authorization": f"Bearer {key}"} if key else {}, "OPENAI_API_KEY")


def azure_endpoint(deployment: str, base_url: str | None = None, api_version: str | None = None) -> Endpoint:
    """A deployment on Azure, with the key in ``AZURE_OPENAI_API_KEY`` (or ``AZURE_OPENAI_KEY``).

    Args:
        deployment: its name.
        base_url: the resource's address; default: ``AZURE_OPENAI_ENDPOINT``.
        api_version: default: ``OPENAI_API_VERSION``, else ``2024-10-21``.

    Raises:
        ValueError: no address, an address without http, or no key.
    """
    resource = base_url or os.environ.get("AZURE_OPENAI_ENDPOINT")
    key = os.environ.get("AZURE_OPENAI_API_KEY") or os.environ.get("AZURE_OPENAI_KEY")
    if not resource or not key:
        lacking = "AZURE_OPENAI_API_KEY" if resource else "AZURE_OPENAI_ENDPOINT (or base_url)"
        raise ValueError(f"the Azure judge needs {lacking}")
    version = api_version or os.environ.get("OPENAI_API_VERSION") or AZURE_API_VERSION
    url = f"{_checked_url(resource)}/openai/deployments/{deployment}/chat/completions?api-version={version}"
    return Endpoint(url, {"api-key": key}, "AZURE_OPENAI_API_KEY")


class OpenAIJudge(ChatJudge):
    """Asks an endpoint many questions at once; see `ChatJudge` for ``cache`` and ``prices``.

    Tried again after a growing, jittered pause: HTTP 408, 409, 429 and 5xx, dropped connections, timeouts, and replies
    that hold no answer. ``Retry-After`` holds back all questions. Anything else, such as a wrong key (401) or a used-up
    quota, stops the judge at once; questions under way still get their answers, and all answers are kept.

    Args:
        model: name of the model (or deployment).
        endpoint: see `openai_endpoint` and `azure_endpoint`.
        concurrency: questions under way at once. It does not change any answer.
        requests_per_minute: at most so many requests, retries included; None for no limit.
        max_tokens: longest answer, in tokens; 300 as published.
        timeout: seconds without a sign of life after which a request is given up.
        max_attempts: requests per question before the judge gives up.
        backoff: pause before the second attempt in seconds; it doubles up to a minute.
        extra_body: further fields of the request, part of the settings; None removes a field. For Qwen3 behind vLLM:
            ``{"chat_template_kwargs": {"enable_thinking": False}}``.
    """

    sees_image = True

    def __init__(
        self,
        model: str,
        endpoint: Endpoint,
        *,
        cache: str | Path | None = None,
        prices: tuple[float, float] | None = None,
        concurrency: int = 32,
        requests_per_minute: float | None = None,
        max_tokens: int = 300,
        timeout: float = 120.0,
        max_attempts: int = 12,
        backoff: float = 0.5,
        extra_body: Mapping[str, Any] | None = None,
    ) -> None:
        limits = {"concurrency": concurrency, "max_tokens": max_tokens, "max_attempts": max_attempts}
        for name, value in {**limits, "timeout": timeout}.items():
            if value <= 0:
                raise ValueError(f"{name} must be positive, got {value}")
        settings = {
            "model": model,
            "max_tokens": max_tokens,
            "temperature": 0.0,
            "top_p": 1.0,
            "frequency_penalty": 0.0,
            "presence_penalty": 0.0,
            **(extra_body or {}),
        }
        super().__init__({name: value for name, value in settings.items() if value is not None}, cache, prices)
        self.endpoint = endpoint
        self.concurrency = concurrency
        self.timeout = timeout
        self.max_attempts = max_attempts
        self.backoff = backoff
        self._pace = _Pace(requests_per_minute)
        self._session = _session(endpoint, concurrency)

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
            except _TryAgain as error:
                failure = error
                level = logging.INFO if attempt < QUIET_ATTEMPTS else logging.WARNING
                logger.log(level, "attempt %d about region %r: %s", attempt + 1, prompt.region_id, error)
                self._pace.hold(error.retry_after)
        raise JudgeError(
            f"no answer about region {prompt.region_id!r} from {self.endpoint.url} after {self.max_attempts} attempts, "
            f"the last: {failure}"
        )

    def _send(self, prompt: Prompt) -> Answer:
        body = _body(self.settings, prompt)
        try:
            reply = self._session.post(self.endpoint.url, data=body, timeout=self.timeout, allow_redirects=False)
        except requests.RequestException as error:
            raise _TryAgain(f"{type(error).__name__}: {error}") from error
        if reply.status_code != 200:
            self._refused(reply)
        return _read_answer(reply)

    def _refused(self, reply: requests.Response) -> None:
        """Raise what an HTTP error means: try again, or stop."""
        code, message = _error_of(reply)
        said = f"HTTP {reply.status_code}: {message}"
        if code in QUOTA_CODES or reply.status_code == 402:
            raise JudgeError(f"the quota of the key in {self.endpoint.key_name} is used up ({said})")
        if reply.status_code in (401, 403):
            raise JudgeError(f"{self.endpoint.url} refuses the key in {self.endpoint.key_name} ({said})")
        if reply.status_code in RETRIED_STATUSES or reply.status_code >= 500:
            pause = _retry_after(reply)
            if pause > LONGEST_RETRY_AFTER:
                raise JudgeError(f"{self.endpoint.url} asks to wait for {pause:.0f} s ({said})")
            raise _TryAgain(said, pause)
        raise JudgeError(f"{self.endpoint.url} refuses the request ({said})")


class _TryAgain(Exception):
    """A failure that may pass.

    Args:
        message: what happened.
        retry_after: seconds to wait as the endpoint says, 0 if it does not.
    """

    def __init__(self, message: str, retry_after: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class _Pace:
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


def _checked_url(url: str) -> str:
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"base_url must start with http:// or https://, got {url!r}")
    return url.rstrip("/")


def _session(endpoint: Endpoint, concurrency: int) -> requests.Session:
    """Connections to an endpoint; proxies and certificates are looked up in the environment once, no .netrc is read."""
    session = requests.Session()
    for name, value in session.merge_environment_settings(endpoint.url, {}, None, None, None).items():
        setattr(session, name, value)
    session.trust_env = False
    session.headers.update({"Content-Type": "application/json", **endpoint.headers})
    for scheme in ("http://", "https://"):
        session.mount(scheme, HTTPAdapter(pool_maxsize=concurrency))
    return session


def _body(settings: Mapping[str, Any], prompt: Prompt) -> bytes:
    """The request as JSON: text alone, or image, mask and text. Pictures, most of it, come as JSON, made once."""
    pieces = [json.dumps(prompt.text).encode("ascii")]
    if prompt.pictures is not None:
        pieces = [b"[", prompt.pictures.message_parts(), b', {"type": "text", "text": ', *pieces, b"}]"]
    head = json.dumps(settings)[:-1].encode("ascii")
    return b"".join((head, b', "messages": [{"role": "user", "content": ', *pieces, b"}]}"))


def _read_answer(reply: requests.Response) -> Answer:
    """The answer in a chat completion; a reply without one is tried again."""
    try:
        body = reply.json()
        choice = body["choices"][0]
        text = choice["message"].get("content") or choice["message"].get("refusal")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise _TryAgain(f"the reply is no chat completion: {reply.text[:200]!r}") from error
    thought = isinstance(text, str) and "<think>" in text and "</think>" not in text
    if (not text or thought) and choice.get("finish_reason") == "length":
        raise JudgeError("the judge used up its max_tokens before it answered; raise max_tokens or turn thinking off")
    if not isinstance(text, str) or not without_thinking(text):
        raise _TryAgain(f"the reply holds no answer: {reply.text[:200]!r}")
    return Answer(text, _tokens(body, "prompt_tokens"), _tokens(body, "completion_tokens"))


def _tokens(body: Mapping[str, Any], name: str) -> int:
    """A count of tokens, 0 where the endpoint does not tell."""
    usage = body.get("usage")
    count = usage.get(name) if isinstance(usage, Mapping) else None
    return count if isinstance(count, int) else 0


def _error_of(reply: requests.Response) -> tuple[str | None, str]:
    """Code and message of an error reply; the message is its beginning where it is not in OpenAI's form."""
    try:
        error = reply.json()["error"]
        return str(error.get("code") or error.get("type")), str(error.get("message"))[:300]
    except (ValueError, LookupError, TypeError, AttributeError):
        return None, reply.text[:300] or str(reply.reason)


def _retry_after(reply: requests.Response) -> float:
    """Seconds of a Retry-After header, given as a number or a date; 0 without one."""
    value = reply.headers.get("Retry-After", "")
    try:
        return max(float(value), 0.0)
    except ValueError:
        pass
    try:
        return max(email.utils.parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    except ValueError:
        return 0.0
