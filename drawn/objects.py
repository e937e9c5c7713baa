"""The shapes of the drawn world: twelve categories made of parts, rasterised with integers only.

* `CATEGORIES` lists the parts of every category in the order captions name them.
* One small function per category returns its `Shape`s, back to front, in a free integer unit square
  (about 1000 units a side, y pointing down); every call may jitter the proportions by ten percent.
* `render` scales the shapes to pixels and returns an array of part labels; `paint` colours that array.

Everything is exact integer arithmetic on numpy arrays, so the pixels do not depend on the machine, nor on
the version of an imaging library.

Array legend: h, w = the object's own box in pixels.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np


Point = tuple[int, int]
T = TypeVar("T")

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (218, 36, 36),
    "orange": (250, 142, 22),
    "yellow": (252, 226, 48),
    "green": (38, 160, 62),
    "blue": (38, 84, 214),
    "purple": (140, 48, 176),
    "white": (248, 248, 248),
    "black": (26, 26, 28),
}
# The tone a pattern is drawn in: far from the body colour in lightness, close to it in hue.
PATTERN_INKS: dict[str, tuple[int, int, int]] = {
    "red": (122, 8, 14),
    "orange": (168, 80, 0),
    "yellow": (172, 136, 0),
    "green": (8, 82, 26),
    "blue": (150, 190, 255),
    "purple": (220, 168, 244),
    "white": (164, 166, 172),
    "black": (134, 136, 142),
}
PATTERNS: tuple[str, ...] = ("plain", "striped", "dotted", "checkered")
SIZES: tuple[str, ...] = ("small", "medium", "large")
OUTLINE_COLOR = (12, 12, 14)
BODY = "body"


class Part(NamedTuple):
    """A nameable part of a category; `optional` parts may be absent, `plural` ones take no article."""

    name: str
    optional: bool = False
    plural: bool = False


CATEGORIES: dict[str, tuple[Part, ...]] = {
    "house": (Part("roof"), Part("door"), Part("chimney", optional=True), Part("window", optional=True)),
    "car": (Part("wheels", plural=True), Part("window"), Part("flag", optional=True)),
    "tree": (Part("trunk"), Part("fruit", optional=True, plural=True)),
    "flower": (Part("center"), Part("stem"), Part("leaf", optional=True)),
    "fish": (Part("tail"), Part("eye"), Part("fin", optional=True)),
    "boat": (Part("sail"), Part("flag", optional=True)),
    "mushroom": (Part("stem"), Part("door", optional=True)),
    "robot": (Part("head"), Part("legs", plural=True), Part("antenna", optional=True)),
    "cup": (Part("handle"), Part("straw", optional=True)),
    "rocket": (
        Part("nose"),
        Part("fins", plural=True),
        Part("flame", optional=True),
        Part("window", optional=True),
    ),
    "umbrella": (Part("handle"), Part("tip", optional=True)),
    "butterfly": (Part("torso"), Part("antennae", optional=True, plural=True)),
}
PLURAL_PARTS = frozenset(part.name for parts in CATEGORIES.values() for part in parts if part.plural)


class Dice:
    """Random choices built on `random.Random(text).random()` alone, the same in every Python version."""

    def __init__(self, text: str) -> None:
        self._random = random.Random(text)

    def chance(self, probability: float) -> bool:
        return self._random.random() < probability

    def integer(self, low: int, high: int) -> int:
        """An integer in [low, high], both ends included."""
        return low + int(self._random.random() * (high - low + 1))

    def choice(self, items: Sequence[T]) -> T:
        return items[self.integer(0, len(items) - 1)]

    def shuffled(self, items: Sequence[T]) -> list[T]:
        """A shuffled copy (Fisher-Yates)."""
        result = list(items)
        for last in range(len(result) - 1, 0, -1):
            other = self.integer(0, last)
            result[last], result[other] = result[other], result[last]
        return result

    def jitter(self, value: int) -> int:
        """`value` changed by at most ten percent."""
        return value * self.integer(900, 1100) // 1000


class Shape(NamedTuple):
    """One filled shape in unit coordinates: a polygon, or the ellipse inside the box of two `points`.

    `part` is the part it belongs to (or "body"); a `dark` shape is drawn in the outline colour.
    """

    part: str
    points: tuple[Point, ...]
    ellipse: bool = False
    dark: bool = False


def _polygon(part: str, *points: Point) -> Shape:
    return Shape(part, points)


def _box(part: str, x0: int, y0: int, x1: int, y1: int, dark: bool = False) -> Shape:
    return Shape(part, ((x0, y0), (x1, y0), (x1, y1), (x0, y1)), dark=dark)


def _ellipse(part: str, x0: int, y0: int, x1: int, y1: int, dark: bool = False) -> Shape:
    return Shape(part, ((x0, y0), (x1, y1)), ellipse=True, dark=dark)


def _disc(part: str, x: int, y: int, radius: int, dark: bool = False) -> Shape:
    return _ellipse(part, x - radius, y - radius, x + radius, y + radius, dark)


# ----------------------------------------------------------------------------------------------------------
# The categories. Each function gets the dice and the set of present parts; shapes are listed back to front,
# and shapes of absent parts are dropped by `render`.


def _house(dice: Dice) -> list[Shape]:
    eaves = dice.jitter(430)
    left, right = 500 - dice.jitter(360), 500 + dice.jitter(360)
    door, window = dice.jitter(215), dice.jitter(215)
    door_left, window_right = left + 95, right - 85
    return [
        _box("chimney", 640, 0, 640 + dice.jitter(215), 400),
        _box(BODY, left, eaves - 20, right, 1000),
        _polygon("roof", (40, eaves + 15), (500, dice.integer(0, 40)), (960, eaves + 15)),
        _box("door", door_left, 1000 - dice.jitter(360), door_left + door, 1000),
        _box("window", window_right - window, eaves + 120, window_right, eaves + 120 + window),
    ]


def _car(dice: Dice) -> list[Shape]:
    top, belt = dice.integer(0, 30), dice.integer(290, 330)
    rear, front = dice.jitter(190), 1000 - dice.jitter(200)
    radius = dice.jitter(145)
    return [
        _box("flag", 40, -250, 90, 400),
        _box("flag", 40, -250, 40 + dice.jitter(290), -60),
        _polygon(
            BODY,
            (20, belt),
            (rear, belt - 10),
            (rear + 110, top),
            (front - 110, top),
            (front, belt - 10),
            (970, belt + 40),
            (1000, 620),
            (0, 620),
        ),
        _polygon(
            "window",
            (rear + 85, belt + 10),
            (rear + 150, top + 75),
            (front - 150, top + 75),
            (front - 85, belt + 10),
        ),
        _disc("wheels", 235, 620, radius),
        _disc("wheels", 765, 620, radius),
    ]


def _tree(dice: Dice) -> list[Shape]:
    half, crown = dice.jitter(100), dice.jitter(250)
    fruit = dice.jitter(88)
    return [
        _polygon("trunk", (500 - half, 500), (500 + half, 500), (530 + half, 1000), (470 - half, 1000)),
        _disc(BODY, 500, 250, 250),
        _disc(BODY, 130 + crown, 440, crown),
        _disc(BODY, 870 - crown, 440, crown),
        _disc(BODY, 500, 470, 220),
        _disc("fruit", 330, 480, fruit),
        _disc("fruit", 500, 210, fruit),
        _disc("fruit", 670, 470, fruit),
    ]


def _flower(dice: Dice) -> list[Shape]:
    half, petal = dice.jitter(80), dice.jitter(150)
    # Six petals on a ring of radius 220 around (400, 370).
    ring = [(400, 150), (590, 260), (590, 480), (400, 590), (210, 480), (210, 260)]
    leaf = dice.jitter(330)
    return [
        _box("stem", 400 - half, 500, 400 + half, 1060),
        *(_disc(BODY, x, y, petal) for x, y in ring),
        _disc("center", 400, 370, dice.jitter(140)),
        _polygon(
            "leaf",
            (400, 990),
            (440, 850),
            (450 + leaf // 2, 790),
            (470 + leaf, 770),
            (440 + leaf * 3 // 4, 900),
            (430 + leaf // 3, 975),
        ),
    ]


def _fish(dice: Dice) -> list[Shape]:
    top, bottom = 460 - dice.jitter(290), 460 + dice.jitter(290)
    eye = dice.jitter(88)
    notch = dice.integer(70, 120)
    return [
        _polygon("tail", (0, 170), (notch, 460), (0, 750), (340, 560), (340, 360)),
        _polygon("fin", (400, 330), (400, top - dice.jitter(190)), (590, top - 120), (790, 330)),
        _ellipse(BODY, 240, top, 1000, bottom),
        _disc("eye", 800, 420, eye),
    ]


def _boat(dice: Dice) -> list[Shape]:
    keel, deck = dice.jitter(200), dice.integer(610, 650)
    top = dice.integer(0, 40)
    return [
        _box("flag", 375, -190, 425, 200),
        _polygon("flag", (375, -210), (375 + dice.jitter(330), -95), (375, 20)),
        _polygon("sail", (400, top), (900, deck + 5), (dice.jitter(100), deck + 5)),
        _polygon(BODY, (0, deck), (1000, deck), (1000 - keel, 1000), (keel, 1000)),
    ]


def _mushroom(dice: Dice) -> list[Shape]:
    rim, neck, foot = dice.integer(480, 560), dice.jitter(150), dice.jitter(210)
    door = dice.jitter(105)
    return [
        _polygon("stem", (500 - neck, 400), (500 + neck, 400), (500 + foot, 1000), (500 - foot, 1000)),
        _disc("door", 500, 780, door),
        _box("door", 500 - door, 780, 500 + door, 1000),
        _dome(BODY, 0, 0, 1000, rim),
        _ellipse(BODY, 0, rim - 100, 1000, rim + 80),
    ]


def _dome(part: str, x0: int, y0: int, x1: int, y1: int, bottom: Sequence[Point] = ()) -> Shape:
    """The upper half of an ellipse; `bottom` replaces its flat lower edge, from right to left."""
    # cos and sin of 0, 15, ..., 90 degrees in thousandths.
    cosines = (1000, 966, 866, 707, 500, 259, 0)
    sines = cosines[::-1]
    x, half, height = (x0 + x1) // 2, (x1 - x0) // 2, y1 - y0
    left = [(x - half * c // 1000, y1 - height * s // 1000) for c, s in zip(cosines, sines, strict=True)]
    right = [(2 * x - px, py) for px, py in reversed(left[:-1])]
    return _polygon(part, *left, *right, *bottom)


def _robot(dice: Dice) -> list[Shape]:
    head, half = dice.jitter(190), dice.jitter(235)
    leg = dice.jitter(160)
    return [
        _box("antenna", 470, -120, 530, 200),
        _disc("antenna", 500, -140, dice.jitter(110)),
        _box("legs", 500 - half + 10, 650, 500 - half + 10 + leg, 1000),
        _box("legs", 500 + half - 10 - leg, 650, 500 + half - 10, 1000),
        _box(BODY, 500 - half - 150, 390, 500 + half + 150, 520),
        _box(BODY, 500 - half - 150, 390, 500 - half - 30, 690),
        _box(BODY, 500 + half + 30, 390, 500 + half + 150, 690),
        _box(BODY, 500 - half, 340, 500 + half, 740),
        _box("head", 500 - head, 40, 500 + head, 345),
        _box("head", 500 - head + 70, 130, 500 - head + 140, 205, dark=True),
        _box("head", 500 + head - 140, 130, 500 + head - 70, 205, dark=True),
    ]


def _cup(dice: Dice) -> list[Shape]:
    foot, top = dice.jitter(110), dice.integer(180, 220)
    reach = dice.jitter(320)
    edge = 640
    return [
        _polygon("straw", (250, 420), (420, 420), (640, -220), (470, -220)),
        _polygon(
            "handle",
            (edge, 330),
            (edge + reach - 90, 330),
            (edge + reach, 420),
            (edge + reach, 690),
            (edge + reach - 90, 780),
            (edge - 40, 780),
            (edge - 40, 640),
            (edge + reach - 150, 640),
            (edge + reach - 150, 470),
            (edge, 470),
        ),
        _polygon(BODY, (0, top), (700, top), (700 - foot, 1000), (foot, 1000)),
    ]


def _rocket(dice: Dice) -> list[Shape]:
    half, porthole = dice.jitter(205), dice.jitter(115)
    left, right = 400 - half, 400 + half
    span = dice.jitter(190)
    tip = dice.jitter(290)
    return [
        _polygon(
            "flame",
            (left + 20, 860),
            (right - 20, 860),
            (right - 50, 1030),
            (460, 980),
            (400, 880 + tip),
            (340, 980),
            (left + 50, 1030),
        ),
        _polygon("fins", (left + 20, 560), (left - span, 780), (left - span, 960), (left + 20, 860)),
        _polygon("fins", (right - 20, 560), (right + span, 780), (right + span, 960), (right - 20, 860)),
        _polygon(BODY, (left, 290), (right, 290), (right, 800), (right - 50, 900), (left + 50, 900), (left, 800)),
        _dome("nose", left - 10, dice.integer(0, 40), right + 10, 310),
        _disc("window", 400, 510, porthole),
    ]


def _umbrella(dice: Dice) -> list[Shape]:
    rim, half = dice.integer(540, 590), 65
    top = 110
    scallops = [(830, rim - 75), (665, rim), (500, rim - 75), (335, rim), (170, rim - 75)]
    foot = dice.integer(1000, 1060)
    hook = dice.jitter(230)
    return [
        _polygon(
            "handle",
            (500 - half, 400),
            (500 + half, 400),
            (500 + half, foot - 60),
            (500, foot),
            (500 - hook, foot),
            (430 - hook, foot - 60),
            (430 - hook, foot - 190),
            (560 - hook, foot - 190),
            (560 - hook, foot - 130),
            (500 - half, foot - 130),
        ),
        _polygon("tip", (390, 220), (425, -100), (575, -100), (610, 220)),
        _dome(BODY, 0, top, 1000, rim, scallops),
    ]


def _butterfly(dice: Dice) -> list[Shape]:
    upper, lower = dice.jitter(300), dice.jitter(220)
    half = dice.jitter(85)
    return [
        _polygon("antennae", (420, 330), (270, -60), (360, -90), (520, 250)),
        _polygon("antennae", (580, 330), (730, -60), (640, -90), (480, 250)),
        _disc("antennae", 300, -90, 80),
        _disc("antennae", 700, -90, 80),
        _ellipse(BODY, 0, 330 - upper, 500, 330 + upper - 40),
        _ellipse(BODY, 500, 330 - upper, 1000, 330 + upper - 40),
        _ellipse(BODY, 90, 680 - lower, 500, 680 + lower),
        _ellipse(BODY, 500, 680 - lower, 910, 680 + lower),
        _box(BODY, 400, 300, 600, 750),
        _ellipse("torso", 500 - half, 110, 500 + half, 880),
    ]


_SHAPES: dict[str, Callable[[Dice], list[Shape]]] = {
    "house": _house,
    "car": _car,
    "tree": _tree,
    "flower": _flower,
    "fish": _fish,
    "boat": _boat,
    "mushroom": _mushroom,
    "robot": _robot,
    "cup": _cup,
    "rocket": _rocket,
    "umbrella": _umbrella,
    "butterfly": _butterfly,
}


# ----------------------------------------------------------------------------------------------------------
# From shapes to pixels.


def fill_polygon(canvas_hw: np.ndarray, points: Sequence[Point], value: int) -> None:
    """Set the pixels whose centres lie inside the polygon (even-odd rule); corners are pixel corners."""
    height, width = canvas_hw.shape[:2]
    top, bottom = max(0, min(y for _, y in points)), min(height, max(y for _, y in points))
    left, right = max(0, min(x for x, _ in points)), min(width, max(x for x, _ in points))
    if top >= bottom or left >= right:
        return
    inside = np.zeros((bottom - top, right - left), dtype=bool)
    columns = np.arange(left, right)
    for (xa, ya), (xb, yb) in zip(points, [*points[1:], points[0]], strict=True):
        if ya > yb:
            xa, ya, xb, yb = xb, yb, xa, ya
        first, last = max(top, ya), min(bottom, yb)
        if first >= last:
            continue
        # The edge crosses the centre line of row r at x = xa + (2r + 1 - 2ya) * dx / (2 dy): count the
        # columns whose centre lies left of that, in integers.
        dx, dy = xb - xa, yb - ya
        numerator = 2 * xa * dy + (2 * np.arange(first, last) + 1 - 2 * ya) * dx - dy
        crossing = -(-numerator // (2 * dy))
        inside[first - top : last - top] ^= columns < crossing[:, None]
    canvas_hw[top:bottom, left:right][inside] = value


def fill_ellipse(canvas_hw: np.ndarray, box: Sequence[int], value: int) -> None:
    """Set the pixels whose centres lie inside the ellipse that touches the box (x0, y0, x1, y1)."""
    height, width = canvas_hw.shape[:2]
    x0, y0, x1, y1 = box
    left, top, right, bottom = max(0, x0), max(0, y0), min(width, x1), min(height, y1)
    if top >= bottom or left >= right:
        return
    a, b = x1 - x0, y1 - y0
    columns = ((2 * np.arange(left, right, dtype=np.int64) + 1 - x0 - x1) * b) ** 2
    rows = ((2 * np.arange(top, bottom, dtype=np.int64) + 1 - y0 - y1) * a) ** 2
    canvas_hw[top:bottom, left:right][columns <= ((a * b) ** 2 - rows)[:, None]] = value


class Sprite(NamedTuple):
    """A rendered object: `labels` (h, w) uint8, 0 outside, else 1 + the index into `owners`.

    `owners` holds for every label the part it belongs to ("body" included) and whether it is dark.
    """

    labels: np.ndarray
    owners: tuple[tuple[str, bool], ...]

    def part_pixels(self, part: str) -> np.ndarray:
        """(h, w) bool, the drawn pixels of `part`."""
        values = [k + 1 for k, (owner, _) in enumerate(self.owners) if owner == part]
        pixels = np.zeros(self.labels.shape, dtype=bool)
        for value in values:
            pixels |= self.labels == value
        return pixels


def render(category: str, parts: frozenset[str], length: int, mirrored: bool, dice: Dice) -> Sprite:
    """Draw a category with the given parts so that the longer side of its box is `length` pixels."""
    shapes = [s for s in _SHAPES[category](dice) if s.part == BODY or s.part in parts]
    xs = [x for shape in shapes for x, _ in shape.points]
    ys = [y for shape in shapes for _, y in shape.points]
    x_low, x_high, y_low, y_high = min(xs), max(xs), min(ys), max(ys)
    extent = max(x_high - x_low, y_high - y_low)

    def scaled(value: int) -> int:
        return (2 * value * length + extent) // (2 * extent)

    labels = np.zeros((scaled(y_high - y_low), scaled(x_high - x_low)), dtype=np.uint8)
    owners: list[tuple[str, bool]] = []
    for shape in shapes:
        owner = (shape.part, shape.dark)
        if owner not in owners:
            owners.append(owner)
        value = owners.index(owner) + 1
        points = [(scaled(x_high - x if mirrored else x - x_low), scaled(y - y_low)) for x, y in shape.points]
        if shape.ellipse:
            (xa, ya), (xb, yb) = points
            fill_ellipse(labels, (min(xa, xb), ya, max(xa, xb), yb), value)
        else:
            fill_polygon(labels, points, value)
    return Sprite(labels, tuple(owners))


def pattern_pixels(pattern: str, height: int, width: int, period: int, style: int) -> np.ndarray:
    """(height, width) bool, the inked pixels of a pattern; `style` 0..2 turns the stripes."""
    y, x = np.arange(height)[:, None], np.arange(width)[None, :]
    half = period // 2
    if pattern == "plain":
        return np.zeros((height, width), dtype=bool)
    if pattern == "striped":
        along = (y + 0 * x, x + 0 * y, x + y)[style]
        return along % period < half
    if pattern == "checkered":
        return ((y // half) + (x // half)) % 2 == 0
    if pattern == "dotted":
        row = y // period
        dx = 2 * ((x + row % 2 * half) % period) + 1 - period
        dy = 2 * (y % period) + 1 - period
        return 5 * (dx * dx + dy * dy) <= 2 * period * period
    raise ValueError(f"unknown pattern {pattern!r}, expected one of {PATTERNS}")


def paint(sprite: Sprite, color: str, pattern: str, part_colors: dict[str, str], period: int, style: int) -> np.ndarray:
    """(h, w, 3) uint8: the sprite's colours, pattern and dark outlines (pixels outside it are arbitrary)."""
    labels = sprite.labels
    height, width = labels.shape
    palette = np.zeros((len(sprite.owners) + 1, 3), dtype=np.uint8)
    for k, (owner, dark) in enumerate(sprite.owners):
        name = color if owner == BODY else part_colors[owner]
        palette[k + 1] = OUTLINE_COLOR if dark else COLORS[name]
    pixels = palette[labels]
    if pattern != "plain":
        body = labels == sprite.owners.index((BODY, False)) + 1
        pixels[body & pattern_pixels(pattern, height, width, period, style)] = PATTERN_INKS[color]
    pixels[_outline(labels)] = OUTLINE_COLOR
    return pixels


def _outline(labels_hw: np.ndarray) -> np.ndarray:
    """(h, w) bool: pixels within the line width of something drawn before them, or of the outside."""
    height, width = labels_hw.shape
    longest = max(height, width)
    line = 1 if longest < 100 else 2 if longest < 220 else 3
    padded = np.pad(labels_hw, line)
    edge = np.zeros((height, width), dtype=bool)
    for dy, dx in ((0, line), (2 * line, line), (line, 0), (line, 2 * line)):
        edge |= padded[dy : dy + height, dx : dx + width] < labels_hw
    return edge
