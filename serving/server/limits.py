"""What the server accepts, how it refuses, and the guard that stops a request's body at its bounds."""

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, fields
from typing import Any


Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


@dataclass(frozen=True)
class Limits:
    """Bounds of a request; what is beyond them is refused with a reason before any work is done for it.

    Args:
        max_body_bytes: of a request, pictures included.
        max_pixels: of a picture, read from its header before it is decoded.
        max_mask_pixels: of all mask pictures of a request together.
        max_regions: of a request.
        max_points: numbers of all polygons and run lengths of a request together.
        max_images: of a conversation.
        max_text: characters of all questions of a request together.
        max_new_tokens: slots of an answer.
        max_requests: under way at a time, those whose bodies are still arriving included.
        body_seconds: until a request's body has arrived.
        answer_seconds: from then until its answer, or the end of its stream.
        allow_urls: whether pictures may be fetched from http(s) addresses, which are never private ones.
        url_seconds: to fetch one.
    """

    max_body_bytes: int = 32 * 2**20
    max_pixels: int = 40_000_000
    max_mask_pixels: int = 400_000_000
    max_regions: int = 512
    max_points: int = 2_000_000
    max_images: int = 8
    max_text: int = 8_000
    max_new_tokens: int = 512
    max_requests: int = 256
    body_seconds: float = 30.0
    answer_seconds: float = 300.0
    allow_urls: bool = False
    url_seconds: float = 10.0

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if item.type is not bool and (isinstance(value, bool) or not value > 0):
                raise ValueError(f"{item.name} must be above 0, got {value!r}")


class Refused(Exception):
    """A request that is answered with an error.

    Args:
        status: of HTTP; reason: what was wrong and what is accepted; code: a word for programs.
    """

    def __init__(self, status: int, reason: str, code: str):
        super().__init__(reason)
        self.status, self.code = status, code
        self.reason = reason.encode("utf-8", "replace").decode()  # it may quote what is no text

    def body(self) -> dict[str, Any]:
        """What the client gets."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.reason, "type": kind, "code": self.code}}


def too_large(what: str) -> Refused:
    """Refusal of something beyond a bound."""
    return Refused(413, what, "too_large")


class BodyGuard:
    """ASGI middleware: at most so many requests at a time, and bodies of so many bytes within so many seconds.

    Args:
        app: what it guards; `Refused` raised while it reads a body must be answered there.
        limits: the bounds.
    """

    def __init__(self, app: Callable[..., Awaitable[None]], limits: Limits):
        self.app, self.limits, self.num_requests = app, limits, 0

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Pass a request on, its body guarded."""
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD"):
            await self.app(scope, receive, send)
            return
        self.num_requests += 1
        try:
            await self.app({**scope, "perceptiondlm.requests": self.num_requests}, self._guarded(scope, receive), send)
        finally:
            self.num_requests -= 1

    def _guarded(self, scope: MutableMapping[str, Any], receive: Receive) -> Receive:
        limits, received, finished = self.limits, 0, False
        deadline = asyncio.get_running_loop().time() + limits.body_seconds
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        size = int(declared) if declared.isdigit() else 0

        async def guarded() -> Message:
            nonlocal received, finished
            if finished:
                return await receive()
            if self.num_requests > limits.max_requests:
                raise Refused(503, f"{limits.max_requests} requests are under way already: try again later", "busy")
            if max(size, received) > limits.max_body_bytes:
                raise too_large(f"the body has more than {limits.max_body_bytes} bytes")
            left = deadline - asyncio.get_running_loop().time()
            try:
                message = await asyncio.wait_for(receive(), max(left, 0.001))
            except asyncio.TimeoutError as error:
                raise Refused(408, f"the body did not arrive within {limits.body_seconds:g} s", "timeout") from error
            received += len(message.get("body", b""))
            if received > limits.max_body_bytes:
                raise too_large(f"the body has more than {limits.max_body_bytes} bytes")
            finished = message["type"] != "http.request" or not message.get("more_body", False)
            return message

        return guarded
