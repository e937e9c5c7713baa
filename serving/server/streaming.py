"""Server-sent events: drafts as they come, to clients of any speed."""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, MutableMapping
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

from starlette.responses import Response

from perceptiondlm.serving.answers import Draft
from perceptiondlm.serving.server.limits import Receive, Refused, Send


def event(data: Any, name: str | None = None) -> bytes:
    """One event, its data as JSON."""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)
    return f"{f'event: {name}{chr(10)}' if name else ''}data: {text}\n\n".encode()


class Drafts:
    """The newest draft of a request. One that came before the reader was ready for it is dropped.

    Make it on the event loop; `put` is called on the engine's thread.
    """

    def __init__(self) -> None:
        self._loop, self._came = asyncio.get_running_loop(), asyncio.Event()
        self._newest: Draft | None = None

    def put(self, draft: Draft) -> None:
        """Take a draft in place of the one before."""
        self._loop.call_soon_threadsafe(self._take, draft)

    def _take(self, draft: Draft) -> None:
        self._newest = draft
        self._came.set()

    async def until(self, future: Future, seconds: float) -> AsyncIterator[Draft]:
        """Drafts until the request is done.

        Raises:
            Refused: that takes longer than so many seconds.
        """
        done, end = asyncio.wrap_future(future), self._loop.time() + seconds
        while not done.done():
            came = asyncio.ensure_future(self._came.wait())
            left = end - self._loop.time()
            try:
                found, _ = await asyncio.wait({done, came}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            finally:
                came.cancel()
            if not found:
                raise Refused(504, f"there was no answer within {seconds:g} s", "timeout")
            self._came.clear()
            if self._newest is not None:
                draft, self._newest = self._newest, None
                yield draft


class EventStream(Response):
    """A response of events, which ends when they do, when the client goes, or when its time is up.

    Args:
        events: closed in any case, so that what they wait for can be given up.
        seconds: for the whole of it: a client that reads too slowly is left then.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], seconds: float):
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self.events, self.seconds = events, seconds

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Send the events."""
        tasks = {asyncio.ensure_future(self._send(send)), asyncio.ensure_future(disconnected(receive))}
        try:
            done, _ = await asyncio.wait(tasks, timeout=self.seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            with suppress(RuntimeError):  # it is running, where the server itself is cancelled
                await self.events.aclose()
        for task in done:
            task.result()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for chunk in self.events:
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def disconnected(receive: Receive) -> None:
    """Return when the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
