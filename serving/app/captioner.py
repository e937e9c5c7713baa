"""The model behind the app: captions and answers of the shared engine, which come as drafts, pass by pass."""

import queue
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from transformers import Pipeline

from perceptiondlm.common.loading import CODE, REPOSITORY
from perceptiondlm.serving.answers import Answers, Draft, Handle
from perceptiondlm.serving.app.words import Decisions, Word, draft_pieces, words_of
from perceptiondlm.serving.engine import Engine
from perceptiondlm.serving.found import FoundRegion


MOST_REGIONS = 200  # of a picture; they are captioned at once


@dataclass
class Answer:
    """An answer of the model, or a draft of it.

    Args:
        pieces: of a draft, a text per slot, None where it is open.
        words: of a finished answer.
        text: the finished answer; score: mean probability of its tokens, in [0, 1].
        tokens: probability of every token of the finished answer, its end included.
        passes: denoising passes so far.
    """

    pieces: list[str | None] = field(default_factory=list)
    words: list[Word] = field(default_factory=list)
    text: str | None = None
    score: float | None = None
    tokens: list[float] = field(default_factory=list)
    passes: int = 0


class Drafts:
    """A request of a visitor: drafts as they come, at last the finished answers, one per region in the order given.

    Args:
        engine: that answers it.
        settings: keywords of `generate`.
        ask: what `Engine.submit` takes.
    Raises:
        TypeError, ValueError, EngineBusy, EngineClosed: of `Engine.submit`.
    """

    def __init__(self, engine: Engine, settings: dict[str, Any], **ask: Any):
        self._tokenizer, self._decisions = engine.processor.tokenizer, Decisions()
        self._news: queue.SimpleQueue[Draft | Future[Answers]] = queue.SimpleQueue()
        self._handle = engine.submit(on_draft=self._news.put, **ask, **settings)
        self._handle.future.add_done_callback(self._news.put)

    def __iter__(self) -> Iterator[list[Answer]]:
        while isinstance(draft := self._news.get(), Draft):
            self._decisions.add(draft.ids.tolist())
            if self._news.empty():  # a screen that lags shows the newest draft
                yield self._drafted(draft)
        if not self.stopped:
            yield self._finished(self._handle.result())

    def close(self) -> None:
        """Give it up, which ends the iteration; does nothing once it is answered. Any thread may call it."""
        self._handle.cancel()

    @property
    def stopped(self) -> bool:
        """Whether it was given up before it was answered."""
        return self._handle.future.cancelled()

    def _drafted(self, draft: Draft) -> list[Answer]:
        return [
            Answer(pieces=draft_pieces(row, self._tokenizer, draft.mask_token_id), passes=self._decisions.passes)
            for row in self._decisions.ids
        ]

    def _finished(self, answers: Answers) -> list[Answer]:
        rows = zip(answers.texts, answers.scores, answers.ids, answers.confidences, answers.lengths, strict=True)
        return [
            Answer(
                words=words_of(ids, confidences, last, self._tokenizer),
                text=text,
                score=score,
                tokens=confidences[: length + 1],
                passes=self._decisions.passes,
            )
            for (text, score, ids, confidences, length), last in zip(rows, self._decisions.last, strict=True)
        ]


class Captioner:
    """Answers the app's visitors on an engine of its own, where their requests share passes.

    Args:
        pipe: `pipeline("region-captioning")`.
        name: directory or Hub id of the model, as exports name it.
        title: what the page calls it, by default its name.
    """

    def __init__(self, pipe: Pipeline, name: str, title: str | None = None):
        self.name, self.title = name, title or name
        self.engine = Engine(pipe.model, pipe.processor, max_answers=MOST_REGIONS)

    @property
    def place(self) -> tuple[str, str | None]:
        """Repository, and the folder inside it where the model is no repository of its own."""
        folder = Path(self.name).resolve()
        if folder.is_relative_to(REPOSITORY) and folder != REPOSITORY and not (folder / CODE).is_file():
            return str(REPOSITORY), folder.relative_to(REPOSITORY).as_posix()
        return self.name, None

    def close(self) -> None:
        """End what is under way, and the engine."""
        self.engine.close(drain=False)

    def encode(self, image: Image.Image) -> Handle:
        """Begin to encode a picture, so that its first caption need not wait for that."""
        return self.engine.encode(image)

    def captions(
        self, image: Image.Image, regions: Sequence[FoundRegion], settings: dict[str, Any], question: str | None = None
    ) -> Drafts:
        """Ask for captions of regions, or for their answers to a question.

        Args:
            image: RGB.
            settings: keywords of `generate`.
        """
        return Drafts(self.engine, settings, image=image, regions=regions, question=question)

    def answer(self, image: Image.Image, question: str, settings: dict[str, Any]) -> Drafts:
        """Ask about the whole image.

        A model that sees regions alone is asked about the region of all pixels.
        """
        if not self.engine.model.config.image_in_prompt:
            return self.captions(image, [FoundRegion.whole(*image.size)], settings, question)
        return Drafts(self.engine, settings, image=image, question=question)
