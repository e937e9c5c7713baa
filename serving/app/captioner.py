"""The model behind the app: an image encoded once, then captions and answers that come as drafts, pass by pass."""

import queue
import threading
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from transformers import Pipeline

from perceptiondlm.common.loading import CODE, REPOSITORY
from perceptiondlm.serving.app.words import Decisions, Word, draft_pieces, words_of


class StoppedByUserError(Exception):
    """Raised inside a running `generate` to end it."""


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


Drafts = Generator[list[Answer], None, None]


class DraftQueue:
    """A streamer for `generate`: hands drafts to another thread, and ends the run when that one has left."""

    def __init__(self) -> None:
        self.items: queue.SimpleQueue = queue.SimpleQueue()
        self.stopped = threading.Event()

    def put_draft(self, ids) -> None:
        """Take the ids (A, G) after a pass."""
        if self.stopped.is_set():
            raise StoppedByUserError
        self.items.put(ids.tolist())

    def end(self) -> None:
        """Nothing to do: the result follows the drafts."""


class Captioner:
    """Runs a region-captioning pipeline for the app, one request at a time.

    Args:
        pipe: `pipeline("region-captioning")`.
        name: directory or Hub id of the model, as exports name it.
        title: what the page calls it, by default its name.
    """

    def __init__(self, pipe: Pipeline, name: str, title: str | None = None):
        self.pipe, self.name, self.title = pipe, name, title or name
        self.lock = threading.Lock()
        self.tokenizer = pipe.processor.tokenizer
        config = pipe.model.config
        self.mask_id = config.mask_token_id
        self.keeps_images = config.region_conditioning != "vision"  # there, features depend on the regions

    @property
    def place(self) -> tuple[str, str | None]:
        """Repository, and the folder inside it where the model is no repository of its own."""
        folder = Path(self.name).resolve()
        if folder.is_relative_to(REPOSITORY) and folder != REPOSITORY and not (folder / CODE).is_file():
            return str(REPOSITORY), folder.relative_to(REPOSITORY).as_posix()
        return self.name, None

    def encode(self, image: Image.Image) -> Any:
        """What stands for an image in later calls: its features, or itself where they depend on the regions."""
        if not self.keeps_images:
            return image
        with self.lock:
            return self.pipe.encode_image(image)

    def captions(
        self, image: Any, masks: Sequence[dict], settings: dict[str, Any], question: str | None = None
    ) -> Drafts:
        """Drafts and at last the captions of regions, or their answers to a question.

        Args:
            image: of `encode`.
            masks: COCO RLE of each region.
            settings: keywords of `generate`.
        Yields:
            after passes, a draft per region in the order given; at last the finished answers.
        """
        inputs = self.pipe.processor(images=image, masks=list(masks), text=question, return_tensors="pt")
        return self._run(image, inputs, settings)

    def answer(self, image: Any, question: str, settings: dict[str, Any]) -> Drafts:
        """Drafts and at last the answer to a question about the whole image, each a list of one."""
        return self._run(image, self.pipe.processor(images=[image], text=question, return_tensors="pt"), settings)

    def _run(self, image: Any, inputs: Any, settings: dict[str, Any]) -> Drafts:
        drafts, decisions = DraftQueue(), Decisions()
        encoded = image if self.keeps_images else None

        def work() -> None:
            try:
                with self.lock:
                    output = self.pipe.model.generate(
                        **inputs.to(self.pipe.device), encoded_image=encoded, streamer=drafts, **settings
                    )
                drafts.items.put(output)
            except StoppedByUserError:
                drafts.items.put(None)
            except BaseException as error:  # noqa: BLE001 - raised again where the result is waited for
                drafts.items.put(error)

        thread = threading.Thread(target=work, name="perceptiondlm-app-generate", daemon=True)
        thread.start()
        try:
            while True:
                item = drafts.items.get()
                if isinstance(item, BaseException):
                    raise item
                if item is None:
                    return
                if hasattr(item, "sequences"):
                    yield self._finished(item, decisions)
                    return
                decisions.add(item)
                if drafts.items.empty():  # a screen that lags shows the newest draft
                    yield [
                        Answer(pieces=draft_pieces(ids, self.tokenizer, self.mask_id), passes=decisions.passes)
                        for ids in item
                    ]
        finally:
            drafts.stopped.set()
            thread.join()

    def _finished(self, output: Any, decisions: Decisions) -> list[Answer]:
        answers = self.pipe.processor.decode_answers(output)
        ids, confidences = output.sequences.tolist(), output.confidences.tolist()
        return [
            Answer(
                words=words_of(row, probabilities, last, self.tokenizer),
                text=answer["text"],
                score=answer["score"],
                tokens=probabilities[: len(draft_pieces(row, self.tokenizer, self.mask_id)) + 1],
                passes=decisions.passes,
            )
            for answer, row, probabilities, last in zip(answers, ids, confidences, decisions.last, strict=True)
        ]
