"""What one visitor has open: a picture, regions marked on it, captions, questions and answers."""

import secrets
import shutil
import threading
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from perceptiondlm.serving.app.captioner import MOST_REGIONS, Answer, Captioner, Drafts
from perceptiondlm.serving.app.outlines import traced
from perceptiondlm.serving.found import FoundRegion


MOST_SESSIONS = 64
MOST_PIXELS_HELD = 500_000_000  # of all visitors' pictures together, 3 bytes each
MOST_ANSWERS = 50


@dataclass
class MarkedRegion:
    """A region on the picture; its number stays when others are removed."""

    number: int
    found: FoundRegion
    source: str  # "box", "point", "brush", "found" or "example"
    outline: str  # SVG path in image pixels
    anchor: tuple[float, float]  # where its number stands
    caption: Answer | None = None


@dataclass
class Exchange:
    """A question and its answer; about a region by number, or about the whole image."""

    question: str
    region: int | None
    answer: Answer = field(default_factory=Answer)


@dataclass
class Session:
    """One visitor's work.

    Args:
        image: RGB, turned as its EXIF orientation says; None before one was opened.
        image_name: the file's name; shown: path of the picture that the browser shows.
        captioner: the model of the picture.
        settings: keywords of `generate` that made the captions.
        drafts: of the request that goes on; `stop` ends it.
        folder: of its own, where files for the browser lie.
    """

    folder: Path
    image: Image.Image | None = None
    image_name: str = ""
    shown: Path | None = None
    captioner: Captioner | None = None
    regions: list[MarkedRegion] = field(default_factory=list)
    exchanges: list[Exchange] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    last_number: int = 0
    drafts: Drafts | None = None

    def stop(self) -> None:
        """Give up the request that goes on, if one does."""
        if self.drafts is not None:
            self.drafts.close()

    def begin(self, drafts: Drafts) -> Drafts:
        """Let a request take the place of the one before."""
        self.stop()
        self.drafts = drafts
        return drafts

    def open(self, image: Image.Image, name: str, shown: Path, captioner: Captioner) -> None:
        """Start anew with a picture."""
        self.image, self.image_name, self.shown, self.captioner = image, name, shown, captioner
        self.clear()

    def add(self, found: Iterable[FoundRegion], source: str) -> int:
        """Add regions and return how many there were; refuses more than `MOST_REGIONS`."""
        found = list(found)
        if (total := len(self.regions) + len(found)) > MOST_REGIONS:
            raise ValueError(f"that would be {total} regions; this page shows at most {MOST_REGIONS}")
        for region in found:
            self.last_number += 1
            self.regions.append(MarkedRegion(self.last_number, region, source, *traced(region.mask, region.box)))
        return len(found)

    def region(self, number: Any) -> MarkedRegion:
        """The region of a number."""
        for region in self.regions:
            if region.number == number:
                return region
        raise ValueError(f"there is no region {number!r}; there are {[region.number for region in self.regions]}")

    def remove(self, number: Any) -> None:
        """Remove a region and what was asked about it."""
        self.regions.remove(self.region(number))
        self.exchanges = [exchange for exchange in self.exchanges if exchange.region != number]

    def clear(self) -> None:
        """Remove all regions, captions and answers."""
        self.stop()
        self.regions, self.exchanges, self.last_number = [], [], 0

    def ask(self, question: str, region: int | None) -> Exchange:
        """Begin a question; the oldest leave."""
        exchange = Exchange(question, region)
        self.exchanges = [*self.exchanges, exchange][-MOST_ANSWERS:]
        return exchange

    @property
    def captioned(self) -> list[MarkedRegion]:
        """Regions with a finished caption."""
        return [region for region in self.regions if region.caption is not None and region.caption.text is not None]


class Sessions:
    """The sessions of all visitors by key; the one that rested longest leaves first.

    Args:
        folder: where each gets a folder of its own.
        most: sessions, and most_pixels: pixels of their pictures together, that are held.
    """

    def __init__(self, folder: Path, most: int = MOST_SESSIONS, most_pixels: int = MOST_PIXELS_HELD):
        self.folder, self.most, self.most_pixels = folder, most, most_pixels
        self.held: OrderedDict[str, Session] = OrderedDict()
        self.lock = threading.Lock()

    def of(self, key: str) -> Session:
        """A visitor's session, a new one at the first call."""
        with self.lock:
            if key not in self.held:
                folder = self.folder / secrets.token_hex(16)
                folder.mkdir(parents=True)
                self.held[key] = Session(folder)
            self.held.move_to_end(key)
            while len(self.held) > 1 and (len(self.held) > self.most or self._pixels() > self.most_pixels):
                self._forget(next(iter(self.held)))
            return self.held[key]

    def forget(self, key: str) -> None:
        """Drop a session and its files."""
        with self.lock:
            self._forget(key)

    def _pixels(self) -> int:
        return sum(one.image.width * one.image.height for one in self.held.values() if one.image is not None)

    def _forget(self, key: str) -> None:
        session = self.held.pop(key, None)
        if session is not None:
            session.stop()
            shutil.rmtree(session.folder, ignore_errors=True)
