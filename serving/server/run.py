"""A server from its options: one process of uvicorn, or replicas of Ray Serve."""

import argparse
import asyncio
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from perceptiondlm.common.loading import load_pipeline
from perceptiondlm.serving.engine import Engine
from perceptiondlm.serving.segmenters import load_segmenter
from perceptiondlm.serving.server.limits import Limits


try:
    import uvicorn
    from fastapi import FastAPI
    from uvicorn.protocols.http.h11_impl import H11Protocol

    from perceptiondlm.serving.server.app import create_app
except ImportError as error:
    raise ImportError(
        f'perceptiondlm serve needs FastAPI and uvicorn ({error}): pip install "perceptiondlm[serve]"'
    ) from error


HEAD_SECONDS = 15  # for the first line and the headers of a request
CLOSING_SECONDS = 5  # for what is left after the drain


@dataclass(frozen=True)
class Recipe:
    """How a server is made; it can be sent to other processes.

    Args:
        model: of `perceptiondlm.common.loading`: model, device, dtype, quantize.
        engine: keywords of [`Engine`].
        limits: of requests.
        segmenter: its name; None takes boxes as they are.
        model_name: as clients name it; by default the last part of the model's.
        drain_seconds: that requests under way have at shutdown.
    """

    model: dict[str, Any] = field(default_factory=dict)
    engine: dict[str, Any] = field(default_factory=dict)
    limits: Limits = field(default_factory=Limits)
    segmenter: str | None = None
    model_name: str | None = None
    drain_seconds: float = 30.0

    def start(self) -> Engine:
        """Load the model and start its engine."""
        defaults = {"model": None, "device": None, "dtype": "auto", "quantize": None}
        pipe = load_pipeline(argparse.Namespace(**defaults | self.model))
        return Engine(pipe.model, pipe.processor, **self.engine)

    def app(self) -> FastAPI:
        """The application; the model is loaded when it starts."""
        name = self.model_name or Path(self.model.get("model") or "perceptiondlm").name
        segmenter = None if self.segmenter is None else load_segmenter(self.segmenter, self.model.get("device"))
        return create_app(self.start, self.limits, segmenter, name, self.drain_seconds)


class PromptConnections(H11Protocol):
    """uvicorn's connections, but one that does not get on with the head of a request is closed.

    The bodies of requests have bounds of their own; see `BodyGuard`.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to watch it."""
        super().connection_made(transport)
        self._idle_behind: Any = self  # the request behind which it was idle at the last look; itself: it was not
        self.loop.call_later(HEAD_SECONDS, self._look, True)

    def _look(self, first: bool = False) -> None:
        if self.transport.is_closing():
            return
        idle = self.cycle is None or self.cycle.response_complete
        if idle and (first or self._idle_behind is self.cycle):
            self.transport.close()
            return
        self._idle_behind = self.cycle if idle else self
        self.loop.call_later(HEAD_SECONDS, self._look)


def serve(recipe: Recipe, host: str, port: int) -> None:
    """Serve until a signal says to stop (SIGTERM, SIGINT); requests under way are then finished.

    Args:
        port: 0 takes a free one, which the log names.
    """
    config = uvicorn.Config(
        recipe.app(), host=host, port=port, http=PromptConnections, server_header=False, ws="none", access_log=False,
        timeout_graceful_shutdown=round(recipe.drain_seconds + CLOSING_SECONDS),
    )  # fmt: skip
    server = uvicorn.Server(config)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)  # uvicorn, which takes them while it runs, raises them again at its end
    server.run()
