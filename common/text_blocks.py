"""Captions as blocks of wrapped lines, each behind the number of its region."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from perceptiondlm.common.palette import ink_on


LINE = 1.35  # distance of lines, in heights of letters
MARGIN = 1.0  # around a panel and between its blocks, in heights of letters
PANEL = 22  # width of a panel's column, in heights of letters
WIDE = 1.8  # width over height from which the panel lies below the picture
TALLEST = 1.5  # height of a panel beside a picture before it gets another column, in heights of the picture
TEXT_COLOR = (25, 25, 25)
PAPER = (255, 255, 255, 225)


@dataclass(frozen=True)
class TextBlock:
    """A caption with the number and the colour of its region."""

    number: str
    color: tuple[int, int, int]
    text: str

    def wrapped(self, font, width: float, most_lines: int | None = None) -> list[str]:
        """The text in lines of at most `width` pixels, the badge beside them; cut lines end in "…"."""
        lines = wrap(self.text, font, max(font.size, width - self._indent(font) - 0.4 * font.size))
        if most_lines is not None and len(lines) > most_lines:
            lines = [*lines[: most_lines - 1], f"{lines[most_lines - 1].rstrip(' .,;')}…"]
        return lines

    def size(self, lines: Sequence[str], font) -> tuple[int, int]:
        """Width and height of the block in pixels."""
        width = self._indent(font) + max(font.getlength(line) for line in lines) + 0.4 * font.size
        return round(width), round(max(len(lines) * LINE * font.size, badge_side(self.number, font)) + 0.4 * font.size)

    def draw(self, draw: ImageDraw.ImageDraw, corner: tuple[int, int], lines: Sequence[str], font, framed=True) -> None:
        """The block with its upper left corner at `corner`; `framed` on paper with a rim of its colour."""
        (x, y), (width, height) = corner, self.size(lines, font)
        if framed:
            rim = max(1, font.size // 10)
            corners = (x, y, x + width - 1, y + height - 1)
            draw.rounded_rectangle(corners, font.size // 3, PAPER, (*self.color, 255), rim)
        side = badge_side(self.number, font)
        badge(draw, (x + 0.2 * font.size + side / 2, y + 0.2 * font.size + side / 2), self.number, self.color, font)
        top = y + 0.2 * font.size + max(0.0, (side - LINE * font.size) / 2)
        for index, line in enumerate(lines):
            place = (x + self._indent(font), top + index * LINE * font.size + 0.1 * font.size)
            draw.text(place, line, fill=TEXT_COLOR, font=font)

    def _indent(self, font) -> float:
        return badge_side(self.number, font) + 0.7 * font.size


def badge_side(text: str, font) -> float:
    """Side of the square around a badge, in pixels."""
    return max(1.6 * font.size, font.getlength(text) + 0.8 * font.size)


def badge(draw: ImageDraw.ImageDraw, place: tuple[float, float], text: str, color, font) -> None:
    """A number on a disc, its centre at `place`."""
    radius, (x, y) = badge_side(text, font) / 2, place
    corners = (x - radius, y - radius, x + radius, y + radius)
    draw.ellipse(corners, fill=color, outline="white", width=max(2, font.size // 12))
    draw.text((x, y), text, fill=ink_on(color), font=font, anchor="mm")


def wrap(text: str, font, width: float) -> list[str]:
    """A text in lines of at most `width` pixels; words that are longer are cut."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
            continue
        if lines[-1]:
            lines.append("")
        while font.getlength(word) > width and len(word) > 1:
            fits = next(n for n in range(len(word) - 1, 0, -1) if n == 1 or font.getlength(word[:n]) <= width)
            lines[-1], word = word[:fits], word[fits:]
            lines.append("")
        lines[-1] = word
    return lines


def legend(picture: Image.Image, blocks: Sequence[TextBlock], font) -> Image.Image:
    """The picture with all blocks in a white panel: on its right, or below it where it is wide, in columns."""
    below = picture.width >= WIDE * picture.height
    margin, step = round(MARGIN * font.size), round(PANEL * font.size)
    columns = max(1, picture.width // step) if below else 1
    width = picture.width // columns if below else step
    wrapped = [block.wrapped(font, width - 2 * margin) for block in blocks]
    heights = [block.size(lines, font)[1] + margin // 2 for block, lines in zip(blocks, wrapped, strict=True)]
    most = max([sum(heights) / columns if below else TALLEST * picture.height, *heights])
    places, column, y = [], 0, 0  # column and height of every block
    for height in heights:
        if y + height > most + 1 and y:
            column, y = column + 1, 0
        places.append((column, y))
        y += height
    tall = max((y + height for (_, y), height in zip(places, heights, strict=True)), default=0) + 2 * margin
    wide = (column + 1) * width
    size = (picture.width + wide, max(picture.height, tall))
    if below:
        size = (max(picture.width, wide), picture.height + tall)
    whole = Image.new("RGB", size, "white")
    whole.paste(picture, (0, 0))
    left, top = (0, picture.height) if below else (picture.width, 0)
    draw = ImageDraw.Draw(whole)
    for block, lines, (number, y) in zip(blocks, wrapped, places, strict=True):
        block.draw(draw, (left + number * width + margin, top + margin + y), lines, font, framed=False)
    return whole
