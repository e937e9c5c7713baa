"""What the endpoints do: read a request, ask the engine, wait for the answer as long as somebody wants it."""

import asyncio
import logging
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from perceptiondlm.serving.answers import Answers, EngineBusy, EngineClosed, Handle
from perceptiondlm.serving.engine import Engine
from perceptiondlm.serving.segmenters import Segmenter
from perceptiondlm.serving.server.chat import Completion, Settled, finish, read_chat, usage, work
from perceptiondlm.serving.server.limits import Limits, Refused
from perceptiondlm.serving.server.reading import UNFIT, Reader, RegionAsk, Upload, parse, refusal_of
from perceptiondlm.serving.server.schemas import CaptionRequest, ChatRequest
from perceptiondlm.serving.server.streaming import Drafts, EventStream, disconnected, event


Result = TypeVar("Result")
CORNERS = ("xmin", "ymin", "xmax", "ymax")
GONE = 499  # nobody reads it: the client has gone
READING_SECONDS = 30  # that a client has beyond its answer to read the last events of a stream

logger = logging.getLogger(__name__)


class Service:
    """Answers requests on an engine.

    Args:
        engine: that runs.
        limits: of requests.
        segmenter: makes regions of points, boxes, texts and "everything"; None takes boxes as they are.
        model_name: as clients name it.
    """

    def __init__(self, engine: Engine, limits: Limits, segmenter: Segmenter | None, model_name: str):
        self.engine, self.limits, self.model_name = engine, limits, model_name
        self.reader = Reader(limits, segmenter)
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="perceptiondlm-requests")

    def close(self) -> None:
        """Let its threads go."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    # --- endpoints --------------------------------------------------------------------------------------------------

    async def captions(self, request: Request) -> Response:
        """Captions of an image's regions."""
        body, upload = await self._caption_request(request)
        ask = await self._on_thread(self.reader.captions, body, upload)
        drafts = Drafts() if body.stream else None
        handle = self._submit(
            body.settings.given(), drafts, image=ask.picture, regions=ask.regions, question=body.question,
            max_tiles=body.max_tiles, exif=body.exif,
        )  # fmt: skip
        name = f"captions-{uuid.uuid4().hex}"
        if drafts is None:
            answers = await self._answers(request, handle)
            return JSONResponse(self._captions_body(name, answers, ask, body.return_masks))
        return self._stream(handle, self._caption_events(name, handle, drafts, ask, body.return_masks))

    async def chat(self, request: Request) -> Response:
        """The next turn of a conversation, or captions of regions in that form."""
        content = await request.body()
        body = await self._on_thread(parse, content, ChatRequest)
        if body.model not in (None, *self.names):
            raise Refused(404, f"there is no model {body.model[:80]!r} here; accepted: {self.names}", "model")
        ask = await self._on_thread(read_chat, body, self.reader, self.engine.model.config.image_in_prompt)
        slots = self.engine.settings.get("max_new_tokens", self.engine.model.generation_config.max_new_tokens)
        settings = body.given_settings(slots)
        drafts = Drafts() if body.stream else None
        takes_back = {**self.engine.settings, **settings}.get("remasking", False)  # what was decided
        handle = self._submit(settings, None if takes_back else drafts, max_tiles=body.max_tiles, **ask.keywords())
        completion = Completion(self.model_name)
        if drafts is None:
            return JSONResponse(completion.whole(await self._answers(request, handle)))
        return self._stream(handle, self._chat_events(completion, handle, drafts))

    @property
    def names(self) -> tuple[str, ...]:
        """What clients may call the model; the second one is what clients of describe-anything's server call theirs."""
        return self.model_name, "describe_anything_model"

    # --- reading ----------------------------------------------------------------------------------------------------

    async def _caption_request(self, request: Request) -> tuple[CaptionRequest, Upload]:
        """A request for captions out of JSON or a form."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind == "multipart/form-data":
            most = self.limits.max_regions + 1
            async with request.form(max_files=most, max_fields=4, max_part_size=self.limits.max_body_bytes) as form:
                upload = await upload_of(form)
            return await self._on_thread(parse, upload.request, CaptionRequest), upload
        if kind not in ("application/json", ""):
            raise Refused(
                415, f"content-type is {kind[:80]!r}; accepted: application/json, multipart/form-data", "type"
            )
        content = await request.body()
        return await self._on_thread(parse, content, CaptionRequest), Upload()

    async def _on_thread(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """Run what takes time beside the event loop; what it refuses becomes a refusal."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, function, *arguments)
        except (*UNFIT, ImportError) as error:
            raise refusal_of(error) from error

    # --- asking and waiting -------------------------------------------------------------------------------------------

    def _submit(self, settings: dict[str, Any], drafts: Drafts | None, **ask: Any) -> Handle:
        most = settings.get("max_new_tokens") or 0
        if most > self.limits.max_new_tokens:
            raise Refused(400, f"max_new_tokens is {most}; accepted: {self.limits.max_new_tokens} at most", "fields")
        try:
            return self.engine.submit(on_draft=None if drafts is None else drafts.put, **ask, **settings)
        except EngineBusy as error:
            raise Refused(503, f"{error}: try again later", "busy") from error
        except EngineClosed as error:
            raise Refused(503, "the server is shutting down", "closing") from error
        except UNFIT as error:
            raise refusal_of(error) from error

    async def _answers(self, request: Request, handle: Handle) -> Answers:
        """Wait until the answer is there, the client has gone, or its time is up."""
        future = asyncio.wrap_future(handle.future)
        gone = asyncio.ensure_future(disconnected(request.receive))
        either: set[asyncio.Future[Any]] = {future, gone}
        try:
            done, _ = await asyncio.wait(
                either, timeout=self.limits.answer_seconds, return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            gone.cancel()
            handle.cancel()  # does nothing where it is done
        if future in done:
            return self._result(handle)
        if gone in done:
            raise Refused(GONE, "the client has gone", "gone")
        raise Refused(504, f"there was no answer within {self.limits.answer_seconds:g} s", "timeout")

    @staticmethod
    def _result(handle: Handle) -> Answers:
        """The answers of a request that is done; what was wrong with it becomes a refusal."""
        try:
            return handle.result(0)
        except EngineClosed as error:
            raise Refused(503, "the server is shutting down", "closing") from error
        except UNFIT as error:
            raise refusal_of(error) from error

    # --- answering --------------------------------------------------------------------------------------------------

    def _captions_body(self, name: str, answers: Answers, ask: RegionAsk, masks: bool) -> dict[str, Any]:
        regions = []
        for index, (text, found) in enumerate(zip(answers.texts, ask.regions, strict=True)):
            box = dict(zip(CORNERS, answers.boxes[index], strict=True))
            region = {"caption": text, "score": answers.scores[index], "box": box}
            region |= {"label": found.label} if found.label is not None else {}
            region |= {"found_score": found.score} if found.score is not None else {}
            region |= {"segmentation": found.mask} if masks else {}
            regions.append(region)
        return {
            "id": name,
            "object": "region.captions",
            "model": self.model_name,
            "width": ask.picture.width,
            "height": ask.picture.height,
            "regions_found": ask.num_found,
            "regions": regions,
            "usage": work(answers),
        }

    def _stream(self, handle: Handle, events: AsyncIterator[bytes]) -> EventStream:
        async def closing() -> AsyncGenerator[bytes, None]:
            try:
                async for one in events:
                    yield one
            except Refused as refused:
                yield event(refused.body(), "error")
            except Exception as error:
                logger.error("a stream failed", exc_info=error)
                yield event(Refused(500, "the server failed on this request", "internal").body(), "error")
            finally:
                handle.cancel()

        return EventStream(closing(), self.limits.answer_seconds + READING_SECONDS)

    async def _caption_events(
        self, name: str, handle: Handle, drafts: Drafts, ask: RegionAsk, masks: bool
    ) -> AsyncIterator[bytes]:
        async for draft in drafts.until(handle.future, self.limits.answer_seconds):
            yield event({"regions": [{"caption": text} for text in draft.texts()]}, "draft")
        yield event(self._captions_body(name, self._result(handle), ask, masks), "result")

    async def _chat_events(self, completion: Completion, handle: Handle, drafts: Drafts) -> AsyncIterator[bytes]:
        settled, opened = Settled(), set[int]()

        def pieces(texts: list[str], final: bool = False) -> list[bytes]:
            found = []
            for index, text in settled.pieces(texts, final):
                found.append(event(completion.piece(index, text, first=index not in opened)))
                opened.add(index)
            return found

        async for draft in drafts.until(handle.future, self.limits.answer_seconds):
            for piece in pieces(draft.settled()):
                yield piece
        answers = self._result(handle)
        for piece in pieces(answers.texts, final=True):
            yield piece
        for index in range(len(answers.texts)):
            yield event(completion.piece(index, None, finish(answers, index), first=index not in opened))
        yield event({**completion.head, "object": "chat.completion.chunk", "choices": [], "usage": usage(answers)})
        yield event("[DONE]")


async def upload_of(form: Any) -> Upload:
    """The parts of a form: files image and masks, and the text request."""
    upload = Upload()
    for name, value in form.multi_items():
        is_file = not isinstance(value, str)
        if name == "image" and is_file and upload.image is None:
            upload.image = await value.read()
        elif name == "masks" and is_file:
            upload.masks.append(await value.read())
        elif name == "request" and not is_file:
            upload.request = value
        else:
            found = f"the form has a {'file' if is_file else 'field'} {name[:80]!r}"
            accepted = "one file image, files masks, and the field request (the rest as JSON)"
            raise Refused(400, f"{found}; accepted: {accepted}", "fields")
    return upload
