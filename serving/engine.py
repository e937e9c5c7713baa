"""Continuous batching: requests join shared denoising passes between any two steps, and leave as they finish.

>>> engine = Engine(model, processor)
>>> handle = engine.submit(image, masks=masks, preset="fast")
>>> handle.result().texts
['a large red house …', …]
>>> engine.close()

In the isolated layout a region's answer depends on its image, mask, question and settings, and on nothing that runs
beside it. So requests of any age share a pass, each with its own schedule, sampler and seed, and an answer is what
`generate` gives for that request alone, up to the rounding of matrix products of another size. Requests whose answers
see each other (other layouts), and those with another number of slots, take turns instead of sharing a pass.
"""

import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from transformers.utils import logging

from perceptiondlm.serving.answers import Answers, Draft, DraftCallback, EngineBusy, EngineClosed, Handle
from perceptiondlm.serving.found import FoundRegion
from perceptiondlm.serving.image_cache import ImageCache
from perceptiondlm.serving.jobs import Counts, Job
from perceptiondlm.serving.preparing import Ask, Preparer


logger = logging.get_logger(__name__)


class Engine:
    """Answers requests of any number of threads on one model.

    Args:
        model, processor: which belong together, of `AutoModel` and `AutoProcessor` or of a pipeline.
        max_answers: most answers (regions or questions) that run at a time. A request with more regions is split; its
            later regions take their turn after the earlier ones.
        max_waiting: most requests that are read or wait to join; further ones are refused.
        cache_bytes: memory for encoded images, by the content of their pixels; 0 keeps none.
        readers: threads that read pictures and regions beside the model.
        joins_per_step: requests that are let in between two steps while others run: the more, the fuller the passes,
            and the longer running answers wait for the prompts of new ones.
        settings: of `generate`, for requests that do not say otherwise.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        max_answers: int = 64,
        max_waiting: int = 256,
        cache_bytes: int = 2**30,
        readers: int = 2,
        joins_per_step: int = 4,
        settings: Mapping[str, Any] | None = None,
    ):
        for name, value in (
            ("max_answers", max_answers), ("max_waiting", max_waiting), ("readers", readers),
            ("joins_per_step", joins_per_step),
        ):  # fmt: skip
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
        self.model, self.processor, self.settings = model.eval(), processor, dict(settings or {})
        self.max_answers, self.max_waiting, self.joins_per_step = max_answers, max_waiting, joins_per_step
        self.images, self.counts = ImageCache(cache_bytes), Counts()
        self.preparer = Preparer(model, processor, self.images, max_answers)
        self._check(self.settings)
        self._ends = (model.config.end_of_turn_token_id, model.config.end_of_text_token_id)
        self._open, self._reading, self._ready, self._running = set[Job](), 0, deque[Job](), list[Job]()
        self._closing, self._abandoned, self._changed = False, False, threading.Condition()
        self._readers = ThreadPoolExecutor(readers, thread_name_prefix="perceptiondlm-reader")
        self._thread = threading.Thread(target=self._serve, name="perceptiondlm-engine", daemon=True)
        self._thread.start()

    # --- for callers ----------------------------------------------------------------------------------------------

    def submit(
        self,
        image: Any = None,
        regions: Sequence[FoundRegion] | None = None,
        *,
        masks: Any = None,
        boxes: Any = None,
        label_map: Any = None,
        question: str | None = None,
        messages: Sequence[Mapping[str, Any]] | None = None,
        max_tiles: int | None = None,
        exif: str | None = None,
        on_draft: DraftCallback | None = None,
        **settings: Any,
    ) -> Handle:
        """Ask for captions of regions, or with a question or messages alone for an answer.

        Args:
            image: in any form that the processor takes.
            regions: found regions; or one of masks, boxes and label_map in any form of the processor.
            question: about the image; with regions it replaces the default one.
            messages: a conversation whose image parts hold pictures, instead of image and question.
            max_tiles, exif: of the image processor.
            on_draft: called after every step with a [`Draft`], on the engine's thread: it must return at once.
            settings: keywords of `generate`, over those of the engine.
        Raises:
            TypeError, ValueError: for keywords that do not go together and settings out of range. What is wrong with
                images and regions comes as the handle's error.
            EngineBusy, EngineClosed: it takes no further requests, now or at all.
        """
        forms = {"masks": masks, "boxes": boxes, "label_map": label_map}
        given = {name: value for name, value in forms.items() if value is not None}
        if len(given) + (regions is not None) > 1:
            raise ValueError(f"give regions in one form, got {[*given, *(['regions'] if regions is not None else [])]}")
        wanted = {**self.settings, **settings}
        self._check(wanted)
        return self._submit(Ask(image, given or regions, question, messages, wanted, max_tiles, exif), on_draft)

    def encode(self, image: Any, max_tiles: int | None = None, exif: str | None = None) -> Handle:
        """Encode an image ahead of what will be asked about it; the handle's answers are none.

        Does nothing with a model that encodes images together with their regions. Arguments and errors as of `submit`.
        """
        return self._submit(Ask(image, max_tiles=max_tiles, exif=exif, encode_only=True))

    def _submit(self, ask: Ask, on_draft: DraftCallback | None = None) -> Handle:
        job = Job(Handle(), ask.settings, on_draft, time.monotonic(), ask)
        job.handle.on_settled = partial(self._settled, job)
        with self._changed:
            if self._closing:
                raise EngineClosed("the engine is closed")
            if self.num_waiting >= self.max_waiting:
                self.counts.refused += 1
                raise EngineBusy(f"{self.max_waiting} requests wait already")
            self._reading += 1
            self.counts.submitted += 1
            self._open.add(job)
            self._readers.submit(self._read, job)
        job.handle.future.add_done_callback(partial(self._given_up, job))
        return job.handle

    @property
    def num_waiting(self) -> int:
        """Requests that are read or wait to join."""
        return len(self._open) - self.num_running

    @property
    def num_running(self) -> int:
        """Requests that take part in passes."""
        return sum(job in self._open for job in self._running)

    @property
    def is_open(self) -> bool:
        """Whether it takes requests: it was not closed, and its thread runs."""
        return not self._closing and self.is_alive

    @property
    def is_alive(self) -> bool:
        """Whether its thread runs."""
        return self._thread.is_alive()

    def close(self, drain: bool = True, timeout: float | None = None) -> bool:
        """Take no further requests; finish those under way, or with `drain=False` end them with `EngineClosed`.

        Returns:
            whether all was finished within `timeout` seconds; what was not is ended then.
        """
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if drain:
            self._thread.join(timeout)
        finished = not self._thread.is_alive()
        self._abandon()
        self._thread.join()
        self._readers.shutdown(cancel_futures=True)
        return finished

    def _abandon(self) -> None:
        """End all requests that are open."""
        with self._changed:
            self._closing = self._abandoned = True
            self._changed.notify_all()
            left = list(self._open)
        for job in left:
            job.handle.settle(error=EngineClosed("the engine was closed before this request was answered"))

    def _settled(self, job: Job, answers: Answers | None) -> None:
        """A request is over, on whichever thread; None: it failed."""
        with self._changed:
            self._open.discard(job)
            self.counts.finished += answers is not None
            self.counts.failed += answers is None
            self.counts.answers += 0 if answers is None else len(answers.texts)

    def _given_up(self, job: Job, future: Future) -> None:
        """A request is over; count it if it was cancelled."""
        if future.cancelled():
            with self._changed:
                self._open.discard(job)
                self.counts.cancelled += 1

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_error: Any) -> None:
        self.close()

    # --- reading, on the readers' threads ---------------------------------------------------------------------------

    def _check(self, settings: Mapping[str, Any]) -> None:
        """Refuse settings before any work is done for them."""
        self.model.generation_config_class(**settings)

    def _read(self, job: Job) -> None:
        """Read a request's picture and regions; it then waits to join."""
        try:
            if not job.handle.done():
                assert job.ask is not None  # it was not read before
                job.prepared = self.preparer.read(job.ask)
                job.width, job.ask = job.prepared.num_answers, None
        except Exception as error:  # noqa: BLE001 - whatever is wrong with a request is told to its caller
            job.handle.settle(error=error)
        with self._changed:
            self._reading -= 1
            self._ready.append(job)
            self._changed.notify_all()

    # --- the model's thread -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def _serve(self) -> None:
        """Let requests in, take a step of all that run, and so on."""
        joint = self.model.joint_steps()
        try:
            while (joining := self._await_work()) is not None:
                for job in joining:
                    self._join(job)
                self._running = [job for job in self._running if not job.handle.done()]
                if self._running:
                    self._step(joint)
                else:
                    joint.take([])  # lets go of what the last pass held
        finally:
            self._abandon()

    def _await_work(self) -> list[Job] | None:
        """The requests that join now; None when all is done and none will come."""
        with self._changed:
            while not (self._ready or self._running or self._abandoned):
                if self._closing and not self._reading:
                    return None
                self._changed.wait()
            if self._abandoned:
                return None
            self._ready = deque(job for job in self._ready if not job.handle.done())
            free = self.max_answers - sum(job.width for job in self._running)
            joining: list[Job] = []
            while self._ready and len(joining) < self.joins_per_step:
                if self._ready[0].width > free and (self._running or joining):
                    break
                joining.append(self._ready.popleft())
                free -= joining[-1].width
            return joining

    def _join(self, job: Job) -> None:
        """Compute a request's prompt, up to its first step."""
        prepared, job.prepared = job.prepared, None
        assert prepared is not None  # or it would not be ready
        job.started, job.was_known = time.monotonic(), prepared.known is not None
        try:
            if prepared.is_empty:
                self.preparer.encoded(prepared)
                self.preparer.remember(prepared)
                job.handle.settle(Answers([], [], [], [], []))
                return
            inputs = self.preparer.inputs(prepared)
            job.boxes = inputs.get("region_boxes")
            job.decoding = self.model.start_decoding(**inputs, **job.settings)
            job.steps = job.decoding.steps()
            job.step = next(job.steps)
            self.preparer.remember(prepared)
            self._running.append(job)
        except Exception as error:  # noqa: BLE001 - as above
            job.handle.settle(error=error)

    def _step(self, joint: Any) -> None:
        """Take a step of all requests that run; those that are through leave."""
        running = self._running
        try:
            self.counts.passes += joint.take([job.step for job in running])
        except Exception as error:  # noqa: BLE001 - out of memory, for one: those that shared the pass end with it
            logger.error("a pass of %d requests failed: %s", len(running), error)
            for job in running:
                job.handle.settle(error=error)
            self._running = []
            return
        self.counts.answers_in_passes += sum(len(job.step.part.ids) for job in running)
        for job in running:
            self._advance(job)
        self._running = [job for job in running if job.step is not None]

    def _advance(self, job: Job) -> None:
        """Tell what a step has made of a request, and set up its next one."""
        assert job.steps is not None  # it runs
        try:
            if job.on_draft is not None:
                job.on_draft(
                    Draft(job.decoding.drafts(), self.processor.tokenizer, self.model.config.mask_token_id, self._ends)
                )
            job.step = next(job.steps, None)
            if job.step is None:
                job.handle.settle(self._answers(job))
        except Exception as error:  # noqa: BLE001 - as above
            job.step = None
            job.handle.settle(error=error)

    def _answers(self, job: Job) -> Answers:
        output, inputs, now = job.decoding.output(), job.decoding.inputs, time.monotonic()
        found = self.processor.decode_answers(output)
        rows = output.sequences.tolist()
        lengths = [next((i for i, token in enumerate(row) if token in self._ends), len(row)) for row in rows]
        boxes = [] if job.boxes is None else job.boxes[output.region_indices].tolist()
        sizes = [] if inputs.image_sizes is None else inputs.image_sizes.unique(dim=0).tolist()
        return Answers(
            texts=[answer["text"] for answer in found],
            scores=[answer["score"] for answer in found],
            lengths=lengths,
            ended=[length < len(row) for length, row in zip(lengths, rows, strict=True)],
            boxes=[tuple(box) for box in boxes],
            ids=rows,
            confidences=output.confidences.tolist(),
            size=tuple(sizes[0]) if len(sizes) == 1 else None,
            prompt_tokens=int(inputs.attention_mask.sum()),
            num_forward_passes=output.num_forward_passes,
            image_was_known=job.was_known,
            seconds_waiting=job.started - job.submitted,
            seconds_running=now - job.started,
        )


__all__ = ["Answers", "Draft", "Engine", "EngineBusy", "EngineClosed", "Handle"]
