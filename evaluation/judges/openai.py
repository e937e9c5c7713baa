"""A judge behind an OpenAI-compatible endpoint: OpenAI, Azure, vLLM and others."""

import json
import logging
import os
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import requests
from requests.adapters import HTTPAdapter

from perceptiondlm.evaluation.judges.asking import AskingJudge, TryAgain, checked_text, refusal, retry_after
from perceptiondlm.evaluation.judges.cache import Answer
from perceptiondlm.evaluation.judges.chat import Prompt


OPENAI_URL = "https://api.openai.com/v1"
AZURE_API_VERSION = "2024-10-21"
# Settings that newer models refuse, and their new names; None: the setting is left out.
ADAPTED = {
    "max_tokens": "max_completion_tokens",
    "temperature": None,
    "top_p": None,
    "frequency_penalty": None,
    "presence_penalty": None,
}
_UNSUPPORTED = re.compile(r"unsupported|not supported|does not support", re.IGNORECASE)

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


class OpenAIJudge(AskingJudge):
    """Asks an endpoint; see `AskingJudge` for what becomes of failures and for the other arguments.

    Tried again: HTTP 408, 409, 429 and 5xx, dropped connections, timeouts, and replies that hold no answer. Anything
    else, such as a wrong key (401) or a used-up quota, stops the judge. A setting that the model does not take
    (HTTP 400 that names it; see `ADAPTED`) is renamed or left out from then on, and `report` says so.

    Args:
        model: name of the model (or deployment).
        endpoint: see `openai_endpoint` and `azure_endpoint`.
        max_tokens: longest answer, in tokens; 300 as published.
        extra_body: further fields of the request, part of the settings; None removes a field. For Qwen3 behind vLLM:
            ``{"chat_template_kwargs": {"enable_thinking": False}}``.
    """

    def __init__(
        self,
        model: str,
        endpoint: Endpoint,
        *,
        max_tokens: int = 300,
        extra_body: Mapping[str, Any] | None = None,
        **asking: Any,
    ) -> None:
        if max_tokens <= 0:
            raise ValueError(f"max_tokens must be positive, got {max_tokens}")
        settings = {
            "model": model,
            "max_tokens": max_tokens,
            "temperature": 0.0,
            "top_p": 1.0,
            "frequency_penalty": 0.0,
            "presence_penalty": 0.0,
            **(extra_body or {}),
        }
        settings = {name: value for name, value in settings.items() if value is not None}
        super().__init__(settings, endpoint.url, **asking)
        self.endpoint = endpoint
        self._session = _session(endpoint, self.concurrency)
        self._taken = dict(self.settings)  # as the endpoint takes them
        self._adapting = threading.Lock()

    def report(self) -> dict[str, Any]:
        """As `ChatJudge.report`; `adapted` holds the settings that the endpoint did not take, and what they became."""
        adapted = {name: ADAPTED[name] for name in self.settings if name in ADAPTED and name not in self._taken}
        return {**super().report(), **({"adapted": adapted} if adapted else {})}

    def _send(self, prompt: Prompt) -> Answer:
        while True:
            sent = self._taken
            try:
                body = _body(sent, prompt)
                reply = self._session.post(self.endpoint.url, data=body, timeout=self.timeout, allow_redirects=False)
            except requests.RequestException as error:
                raise TryAgain(f"{type(error).__name__}: {error}") from error
            if reply.status_code == 200:
                return _read_answer(reply)
            wrong = _error_of(reply)
            if reply.status_code != 400 or not self._adapt(sent, wrong):
                said = f"HTTP {reply.status_code}: {wrong.message}"
                pause = retry_after(reply.headers.get("Retry-After", ""))
                raise refusal(reply.status_code, wrong.code, said, self.place, self.endpoint.key_name, pause)

    def _adapt(self, sent: Mapping[str, Any], error: "_Error") -> bool:
        """Whether the request is to be sent again with other settings, since the model does not take one of `sent`."""
        refused = [name for name in ADAPTED if name in sent and error.names(name)]
        with self._adapting:
            for name in refused:
                if name in self._taken:
                    taken, instead = dict(self._taken), ADAPTED[name]
                    value = taken.pop(name)
                    if instead is not None:
                        taken.setdefault(instead, value)
                    self._taken = taken
                    logger.warning("%s takes no %s: it is %s", self.place, name, _what_becomes(name))
        return bool(refused)


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
        raise TryAgain(f"the reply is no chat completion: {reply.text[:200]!r}") from error
    text = checked_text(text, choice.get("finish_reason"), reply.text)
    return Answer(text, _tokens(body, "prompt_tokens"), _tokens(body, "completion_tokens"))


def _tokens(body: Mapping[str, Any], name: str) -> int:
    """A count of tokens, 0 where the endpoint does not tell."""
    usage = body.get("usage")
    count = usage.get(name) if isinstance(usage, Mapping) else None
    return count if isinstance(count, int) else 0


@dataclass(frozen=True)
class _Error:
    """An error reply."""

    message: str
    code: str | None = None
    param: str | None = None

    def names(self, setting: str) -> bool:
        """Whether the error is that the model does not take a setting, or this value of it."""
        unsupported = _UNSUPPORTED.search(f"{self.code} {self.message}") is not None
        return unsupported and (self.param == setting or (self.param is None and f"'{setting}'" in self.message))


def _error_of(reply: requests.Response) -> _Error:
    """What an error reply says; the message is its beginning where it is not in OpenAI's form."""
    try:
        error = reply.json()["error"]
        param = error.get("param")
        return _Error(str(error.get("message"))[:300], str(error.get("code") or error.get("type")), param)
    except (ValueError, LookupError, TypeError, AttributeError):
        return _Error(reply.text[:300] or str(reply.reason))


def _what_becomes(name: str) -> str:
    instead = ADAPTED[name]
    return "left out, which is the model's own choice" if instead is None else f"sent as {instead}"
