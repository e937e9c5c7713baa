"""Which image a file about many images is asked for, and how names are compared."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any


@dataclass(frozen=True)
class ImageEntry:
    """What readers know of the image whose regions are wanted.

    Args:
        path: its file.
        size: (height, width) in pixels.
    """

    path: Path
    size: tuple[int, int]

    def is_named(self, name: Any) -> bool:
        """Whether a file's entry carries this image's name, folders left out."""
        return isinstance(name, str) and base_name(name) in (self.path.name, self.path.stem)


def base_name(name: str) -> str:
    """The last part of a path, URL or upload name, whichever system wrote it."""
    return PureWindowsPath(PurePosixPath(name.split("?")[-1] if "?d=" in name else name.split("?")[0]).name).name


def is_end_of(name: str, path: Path) -> bool:
    """Whether a relative name is the end of a path, folder by folder."""
    parts = PureWindowsPath(name).parts
    return path.absolute().parts[-len(parts) :] == parts


def is_number_of(number: str, stem: str) -> bool:
    return number == stem or (number.isdecimal() and stem.isdecimal() and int(number) == int(stem))


def few(names: Sequence[Any]) -> str:
    return ", ".join(map(str, names[:4])) + (", …" if len(names) > 4 else "")


def size_text(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"


def check_drawn(size: tuple[Any, Any], name: Any, image: ImageEntry) -> None:
    """Refuse regions that were drawn on an image of another size; a file may not say."""
    if None not in size and tuple(map(int, size)) != image.size:
        drawn = f"{size[0]} x {size[1]}"
        raise ValueError(f"{name} was drawn on an image of {drawn}, {image.path} is {size_text(image.size)}")
