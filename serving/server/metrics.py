"""What a Prometheus server reads: requests, seconds, and what the engine is doing."""

import time
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from perceptiondlm.serving.engine import Engine
from perceptiondlm.serving.server.limits import Message, Receive, Send


PREFIX = "perceptiondlm"
SECONDS = (0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class EngineMetrics(Collector):
    """The state of an engine at the moment it is asked for."""

    def __init__(self, engine: Engine):
        self.engine = engine

    def collect(self) -> Iterator[Metric]:
        """All figures."""
        engine, counts, images = self.engine, self.engine.counts, self.engine.images
        for name, text, value in (
            ("waiting_requests", "Requests that are read or wait to join", engine.num_waiting),
            ("running_requests", "Requests that take part in passes", engine.num_running),
            ("cached_images", "Encoded images that are kept", len(images)),
            ("cached_image_bytes", "Memory of encoded images", images.num_bytes),
        ):
            yield GaugeMetricFamily(f"{PREFIX}_{name}", text, value)
        for name, text, value in (
            ("passes", "Denoising passes", counts.passes),
            ("answers_in_passes", "Answers that took part in passes, added up", counts.answers_in_passes),
            ("answers", "Captions and answers given", counts.answers),
            ("engine_refused", "Requests refused because too many waited", counts.refused),
            ("engine_cancelled", "Requests given up by their clients or for their time", counts.cancelled),
            ("engine_failed", "Requests that ended with an error", counts.failed),
            ("image_cache_hits", "Images that were encoded before", images.hits),
            ("image_cache_misses", "Images that were not", images.misses),
        ):
            yield CounterMetricFamily(f"{PREFIX}_{name}", text, value)


class Metrics:
    """Counters of one server.

    Args:
        paths: that are counted by name; all others are one.
    """

    def __init__(self, paths: tuple[str, ...]):
        self.paths, self.registry = paths, CollectorRegistry()
        self.requests = Counter(
            f"{PREFIX}_requests", "Requests by path and status", ("path", "status"), registry=self.registry
        )
        self.seconds = Histogram(
            f"{PREFIX}_request_seconds", "Seconds to the end of the answer", ("path",), buckets=SECONDS,
            registry=self.registry,
        )  # fmt: skip

    def watch(self, engine: Engine) -> None:
        """Report an engine, too."""
        self.registry.register(EngineMetrics(engine))

    def text(self) -> bytes:
        """All figures in Prometheus' text format."""
        return generate_latest(self.registry)


class Counting:
    """ASGI middleware that counts requests and their seconds."""

    def __init__(self, app: Callable[..., Awaitable[None]], metrics: Metrics):
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status, start = "gone", time.perf_counter()

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)

        path = scope["path"] if scope["path"] in self.metrics.paths else "other"
        try:
            await self.app(scope, receive, noting)
        finally:
            self.metrics.requests.labels(path, status).inc()
            self.metrics.seconds.labels(path).observe(time.perf_counter() - start)
