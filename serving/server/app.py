"""The FastAPI application: endpoints, errors in one form, start and shutdown.

>>> app = create_app(lambda: Engine(model, processor))      # any ASGI server runs it

    POST /v1/captions            an image and its regions to captions (JSON or a form), drafts as server-sent events
    POST /v1/chat/completions    questions and regions in the form of OpenAI's chat completions (also /chat/completions)
    GET  /v1/models              the model's name
    GET  /health, /ready         whether process and engine live; whether they take requests
    GET  /metrics                figures for Prometheus
    GET  /docs, /openapi.json    this interface
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from perceptiondlm.serving.engine import Engine
from perceptiondlm.serving.segmenters import Segmenter
from perceptiondlm.serving.server.limits import BodyGuard, Limits, Refused
from perceptiondlm.serving.server.metrics import CONTENT_TYPE, Counting, Metrics
from perceptiondlm.serving.server.schemas import CaptionRequest, ChatRequest
from perceptiondlm.serving.server.service import Service


logger = logging.getLogger(__name__)
SCHEMAS = "#/components/schemas/"
FORM = {
    "type": "object",
    "required": ["image"],
    "properties": {
        "image": {"type": "string", "format": "binary"},
        "masks": {"type": "array", "items": {"type": "string", "format": "binary"}},
        "request": {"type": "string", "description": "the other fields of CaptionRequest, as JSON"},
    },
}
POSTS: dict[str, dict[str, Any]] = {
    "/v1/captions": {
        "application/json": {"schema": {"$ref": f"{SCHEMAS}CaptionRequest"}}, "multipart/form-data": {"schema": FORM}
    },
    "/v1/chat/completions": {"application/json": {"schema": {"$ref": f"{SCHEMAS}ChatRequest"}}},
    "/chat/completions": {"application/json": {"schema": {"$ref": f"{SCHEMAS}ChatRequest"}}},
}  # fmt: skip
GETS = ("/v1/models", "/health", "/ready", "/metrics")


def create_app(
    start: Callable[[], Engine],
    limits: Limits | None = None,
    segmenter: Segmenter | None = None,
    model_name: str = "perceptiondlm",
    drain_seconds: float = 30.0,
) -> FastAPI:
    """The application.

    Args:
        start: makes the engine, when the server starts.
        limits: of requests.
        segmenter: makes regions of points, boxes, texts and "everything"; None takes boxes as they are.
        model_name: as clients name it.
        drain_seconds: that requests under way have at shutdown.
    """
    limits = limits or Limits()
    metrics = Metrics((*POSTS, *GETS))

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine = await asyncio.to_thread(start)
        metrics.watch(engine)
        app.state.service = Service(engine, limits, segmenter, model_name)
        try:
            yield
        finally:
            if not await asyncio.to_thread(engine.close, True, drain_seconds):
                logger.warning("requests were left unanswered after %g s", drain_seconds)
            app.state.service.close()

    app = FastAPI(title="PerceptionDLM", version="1", description=__doc__, lifespan=lifespan)
    app.state.metrics = metrics
    add_routes(app)
    add_errors(app)
    app.openapi = lambda: described(app)  # type: ignore[method-assign]
    app.add_middleware(BodyGuard, limits=limits)
    app.add_middleware(Counting, metrics=metrics)
    return app


def add_routes(app: FastAPI) -> None:
    """The endpoints."""

    def bodies(path: str) -> dict[str, Any]:
        return {"openapi_extra": {"requestBody": {"required": True, "content": POSTS[path]}}}

    @app.post("/v1/captions", summary="Caption regions of an image", **bodies("/v1/captions"))
    async def captions(request: Request) -> Response:
        return await service_of(request).captions(request)

    @app.post("/chat/completions", include_in_schema=False)
    @app.post("/v1/chat/completions", summary="Questions and regions as a chat", **bodies("/v1/chat/completions"))
    async def chat(request: Request) -> Response:
        return await service_of(request).chat(request)

    @app.get("/v1/models", summary="The model's name")
    async def models(request: Request) -> dict[str, Any]:
        name = service_of(request).model_name
        return {"object": "list", "data": [{"id": name, "object": "model", "owned_by": "perceptiondlm"}]}

    @app.get("/health", summary="Whether the process and its engine live")
    async def health(request: Request) -> Response:
        alive = service_of(request).engine.is_alive
        return JSONResponse({"status": "ok" if alive else "the engine has ended"}, 200 if alive else 503)

    @app.get("/ready", summary="Whether it takes requests")
    async def ready(request: Request) -> Response:
        engine = service_of(request).engine
        state = {"waiting": engine.num_waiting, "running": engine.num_running}
        return JSONResponse({"ready": engine.is_open, **state}, 200 if engine.is_open else 503)

    @app.get("/metrics", summary="Figures for Prometheus")
    async def metrics(request: Request) -> Response:
        return Response(request.app.state.metrics.text(), media_type=CONTENT_TYPE)


def service_of(request: Request) -> Service:
    """The service that the application has started."""
    return request.app.state.service


def add_errors(app: FastAPI) -> None:
    """Every error in one form; what is our own fault is logged, and its details are kept from the client."""

    @app.exception_handler(Refused)
    async def refused(_request: Request, error: Refused) -> Response:
        headers = {"Retry-After": "1"} if error.status == 503 else {}
        return JSONResponse(error.body(), error.status, headers)

    @app.exception_handler(HTTPException)
    async def http(_request: Request, error: HTTPException) -> Response:
        return JSONResponse(Refused(error.status_code, str(error.detail)[:600], "http").body(), error.status_code)

    @app.exception_handler(Exception)
    async def failed(_request: Request, error: Exception) -> Response:
        logger.error("a request failed", exc_info=error)
        return JSONResponse(Refused(500, "the server failed on this request", "internal").body(), 500)


def described(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI description, with the models of bodies that the endpoints read themselves."""
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        _, models = models_json_schema(
            [(CaptionRequest, "validation"), (ChatRequest, "validation")], ref_template=f"{SCHEMAS}{{model}}"
        )
        schema.setdefault("components", {}).setdefault("schemas", {}).update(models["$defs"])
        app.openapi_schema = schema
    return app.openapi_schema
