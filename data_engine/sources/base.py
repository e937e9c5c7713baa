"""Where images with masks come from."""

import dataclasses
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

from perceptiondlm.data_engine.record import Record


PICTURES = (".jpg", ".jpeg", ".png", ".webp")
READ_ERRORS = (ValueError, TypeError, LookupError, OSError)

logger = logging.getLogger(__name__)


@dataclass
class Source(ABC):
    """A source; its fields are its settings. Reading it twice must give the same records in the same order.

    Attributes:
        limit: at most so many images; None for all.
    """

    kind: ClassVar[str]
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"source.limit must be at least 1, got {self.limit}")
        self.check()

    def check(self) -> None:  # noqa: B027
        """Raise ValueError or FileNotFoundError for settings that cannot work."""

    @abstractmethod
    def keys(self) -> Sequence[Any]:
        """What `read` takes, one per image."""

    @abstractmethod
    def name(self, key: Any) -> str:
        """The id of an image's record."""

    @abstractmethod
    def read(self, key: Any) -> Record:
        """One image with its regions; raises one of `READ_ERRORS` where it cannot be read."""

    def records(self, skip: int = 0) -> Iterator[Record]:
        """All records behind the first `skip`. An image that cannot be read gives a record with a fault."""
        keys = self.keys()
        for key in islice(keys, skip, self.limit):
            try:
                yield self.read(key)
            except READ_ERRORS as error:
                message = f"{type(error).__name__}: {error}"
                logger.warning("%s cannot be read: %s", self.name(key), message)
                yield Record(self.name(key), str(key), 0, 0, (), ((self.kind, message),))

    def settings(self) -> dict[str, Any]:
        """What determines the records, JSON-ready."""
        return {"kind": self.kind, **dataclasses.asdict(self)}


def pictures_in(folder: Path) -> list[Path]:
    """The picture files of a folder and its sub-folders, by name.

    Raises:
        FileNotFoundError: it is no folder, or holds none.
    """
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURES) if folder.is_dir() else []
    if not found:
        raise FileNotFoundError(f"no pictures in {folder}; accepted: a folder with files of {', '.join(PICTURES)}")
    return found
