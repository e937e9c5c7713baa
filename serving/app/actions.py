"""What a visitor can do, without a word of how it looks: every action takes a session and yields views for the page.

Mistakes of the visitor become a message on the page (`error`), what was there stays; so do refusals of an engine that
is full. Other errors are not caught.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

from PIL import Image

from perceptiondlm.common.json_files import read_json
from perceptiondlm.images_perceptiondlm import load_image
from perceptiondlm.serving.answers import EngineBusy
from perceptiondlm.serving.app.captioner import Captioner
from perceptiondlm.serving.app.exports import export_coco, export_png
from perceptiondlm.serving.app.marks import region_of_mark
from perceptiondlm.serving.app.session import Session
from perceptiondlm.serving.app.view import session_view
from perceptiondlm.serving.prompts import regions_of
from perceptiondlm.serving.segmenters import Segmenter


MOST_PIXELS = 64_000_000  # of a picture
SHOWN_SIDE = 1600  # pixels of the longest side of the picture that the browser gets
LONGEST_QUESTION = 400  # characters
SAID = (ValueError, TypeError, OSError, Image.DecompressionBombError, EngineBusy)  # to the visitor

View = dict[str, Any]
Views = Iterator[View]


@dataclass(frozen=True)
class Example:
    """A picture to start with, its regions in a benchmark's `annotations` form, and a model of its own, if any."""

    title: str
    picture: Path
    masks: Path
    captioner: Callable[[], Captioner] | None = None


def reported(action: Callable[..., Views]) -> Callable[..., Views]:
    """An action of which mistakes of the visitor, and too many visitors at once, end as a view with the message."""

    @wraps(action)
    def run(self, session: Session, *arguments: Any) -> Views:
        try:
            yield from action(self, session, *arguments)
        except SAID as error:
            yield session_view(session, error=str(error))

    return run


class Actions:
    """Everything behind the buttons.

    Args:
        captioner: the model of all pictures but those of examples that bring their own.
        segmenter: what makes regions of points, boxes and "everything".
        examples: pictures to start with, by name.
    """

    def __init__(self, captioner: Captioner, segmenter: Segmenter, examples: Mapping[str, Example]):
        self.captioner, self.segmenter, self.examples = captioner, segmenter, examples

    @reported
    def open(self, session: Session, path: Path, name: str) -> Views:
        """Open a picture from a file of the server."""
        yield from self._open(session, path, name, self.captioner)
        yield session_view(session, note="Mark regions: drag boxes, click objects, paint, or find everything.")

    def _open(self, session: Session, path: Path, name: str, captioner: Captioner) -> Views:
        yield session_view(session, busy="opening")
        with Image.open(path) as opened:
            if (pixels := opened.width * opened.height) > MOST_PIXELS:
                raise ValueError(
                    f"the picture has {pixels / 1e6:.0f} megapixels, accepted are up to {MOST_PIXELS / 1e6:.0f}"
                )
            image = load_image(opened, exif="applied")
        encoding = captioner.encode(image)
        shown = session.folder / f"shown-{len(list(session.folder.glob('shown-*')))}.webp"
        small = image.copy()
        small.thumbnail((SHOWN_SIDE, SHOWN_SIDE), Image.Resampling.LANCZOS)
        small.save(shown, quality=90)
        encoding.result()
        session.open(image, safe_name(name), shown, captioner)

    @reported
    def example(self, session: Session, name: Any) -> Views:
        """Open an example with its regions marked."""
        if name not in self.examples:
            raise ValueError(f"there is no example {name!r}; there are {sorted(self.examples)}")
        example = self.examples[name]
        captioner = self.captioner if example.captioner is None else example.captioner()
        yield from self._open(session, example.picture, example.picture.name, captioner)
        masks = [region["mask_rle"] for region in read_json(example.masks)["annotations"]]
        count = session.add(regions_of(session.image, masks=masks), "example")
        note = f"{count} regions are marked. Caption them, or mark your own."
        if captioner is not self.captioner:
            note += f" This picture has a model of its own: {captioner.title}."
        yield session_view(session, note=note)

    @reported
    def mark(self, session: Session, mark: Mapping[str, Any]) -> Views:
        """Add the region that a mark shows."""
        image = opened(session)
        yield session_view(session, busy="marking")
        found = region_of_mark(mark, image, self.segmenter, fit=bool(mark.get("fit")))
        session.add([found], str(mark["kind"]))
        yield session_view(session, note=f"Region {session.last_number} is marked.")

    @reported
    def everything(self, session: Session) -> Views:
        """Replace all regions by what the segmenter finds."""
        image = opened(session)
        yield session_view(session, busy="finding")
        found = regions_of(image, everything=True, segmenter=self.segmenter)
        if not found:
            raise ValueError("nothing was found that stands out: mark regions by hand")
        session.clear()
        count = session.add(found, "found")
        yield session_view(session, note=f"{count} regions were found.")

    @reported
    def remove(self, session: Session, number: Any) -> Views:
        """Remove a region."""
        session.remove(number)
        yield session_view(session, note=f"Region {number} is removed.")

    @reported
    def clear(self, session: Session) -> Views:
        """Remove all regions and answers; the picture stays."""
        session.clear()
        yield session_view(session, note="All regions are removed.")

    @reported
    def caption(self, session: Session, settings: dict[str, Any]) -> Views:
        """Caption all regions at once; drafts come as they are denoised."""
        captioner = captioner_of(session)
        regions = list(session.regions)
        if not regions:
            raise ValueError("mark a region first: drag a box, click an object, paint, or find everything")
        before = [region.caption for region in regions]
        drafts = session.begin(captioner.captions(opened(session), [region.found for region in regions], settings))
        try:
            for answers in drafts:
                for region, answer in zip(regions, answers, strict=True):
                    region.caption = answer
                yield session_view(session, busy="captioning", note=f"Denoising: pass {answers[0].passes}")
        finally:
            drafts.close()
            if any(region.caption is None or region.caption.text is None for region in regions):  # stopped, or failed
                for region, caption in zip(regions, before, strict=True):
                    region.caption = caption
        if drafts.stopped:
            yield session_view(session, note="Stopped.")
            return
        session.settings = settings
        passes = max(region.caption.passes for region in regions if region.caption is not None)
        yield session_view(session, note=f"{counted(len(regions), 'caption')} in {counted(passes, 'pass', 'passes')}.")

    @reported
    def ask(self, session: Session, question: Any, number: int | None, settings: dict[str, Any]) -> Views:
        """Ask about a region, or about the whole image where `number` is None."""
        captioner = captioner_of(session)
        question = " ".join(str(question or "").split())
        if not question or len(question) > LONGEST_QUESTION:
            raise ValueError(f"a question has 1 to {LONGEST_QUESTION} characters, got {len(question)}")
        region = None if number is None else session.region(number)
        if region is None:
            drafts = session.begin(captioner.answer(opened(session), question, settings))
        else:
            drafts = session.begin(captioner.captions(opened(session), [region.found], settings, question))
        exchange = session.ask(question, number)
        try:
            for (answer,) in drafts:
                exchange.answer = answer
                yield session_view(session, busy="asking", note=f"Denoising: pass {answer.passes}")
        finally:
            drafts.close()
            if exchange.answer.text is None and exchange in session.exchanges:  # stopped, or failed
                session.exchanges.remove(exchange)
        note = "Stopped." if drafts.stopped else f"Answered in {counted(exchange.answer.passes, 'pass', 'passes')}."
        yield session_view(session, note=note)

    @reported
    def export(self, session: Session, kind: Any) -> Views:
        """Write a file; the view's `download` says where it lies."""
        writers = {"png": export_png, "coco": export_coco}
        if kind not in writers:
            raise ValueError(f"there are exports {sorted(writers)}, got {kind!r}")
        path = writers[kind](session)
        yield {
            **session_view(session, note=f"{path.name} is ready."),
            "download": {"path": str(path), "name": path.name},
        }


def opened(session: Session) -> Image.Image:
    """The session's picture; refused before one was opened."""
    if session.image is None:
        raise ValueError("open a picture first (a page that rested for long forgets its picture)")
    return session.image


def captioner_of(session: Session) -> Captioner:
    """The model of the session's picture; refused before one was opened."""
    opened(session)
    assert session.captioner is not None  # it came with the picture
    return session.captioner


def safe_name(name: Any) -> str:
    """A file's name without folders and without characters that mean something to shells, HTML or Python."""
    kept = re.sub(r"[^\w .-]", "_", str(name).replace("\\", "/").rsplit("/", 1)[-1]).strip(" .")
    return kept[:100] or "picture"


def counted(number: int, one: str, several: str | None = None) -> str:
    """A number with its noun."""
    return f"{number} {one if number == 1 else several or one + 's'}"
