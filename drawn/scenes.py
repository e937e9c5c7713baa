"""The drawn world: pictures of objects made of parts, with exact masks, captions and questions.

    >>> scene = draw_scene(seed=0, index=3)          # a pure function of (seed, index)
    >>> scene.image, scene.objects[0].mask           # RGB picture, (H, W) bool visible pixels
    >>> scene.objects[0].caption                     # "a large striped red house with a blue roof ..."

A stand-in for data, never for code: pictures come out in the shapes of ParaDLC-Bench (annotations.json,
qa.json, class_names.json), so the processor, trainer, metric and runner never know the difference.

    python -m perceptiondlm.drawn.scenes --seed 0 --images 12 --preview preview.png --annotations folder

Array legend: H, W = the picture, h, w = one object's own box, all in pixels.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from perceptiondlm.common.json_files import write_json
from perceptiondlm.drawn import objects as scene_objects
from perceptiondlm.drawn.objects import (
    CATEGORIES,
    COLORS,
    PATTERNS,
    PLURAL_PARTS,
    SIZES,
    Dice,
    Sprite,
    fill_ellipse,
    paint,
    render,
)


__all__ = [
    "CATEGORIES",
    "COLORS",
    "PATTERNS",
    "SIZES",
    "Scene",
    "SceneObject",
    "ScenePart",
    "draw_scene",
    "preview_grid",
    "scene_annotations",
    "scene_class_names",
    "scene_conversation",
    "scene_questions",
    "scenes_dataset",
]

# Longer side of an object's box in thousandths of the picture's shorter side, (low, high) by size.
SIZE_RANGES: dict[str, tuple[int, int]] = {"small": (200, 240), "medium": (330, 380), "large": (500, 580)}
MIN_LENGTH = 48  # pixels
MIN_VISIBLE_SHARE = 0.55  # of every object's pixels
PART_VISIBLE_SHARE, PART_VISIBLE_PIXELS = 0.30, 12
TWIN_PROBABILITY = 0.55  # two objects of one category
OPTIONAL_PART_PROBABILITY = 0.5
QUESTION = "Which of the following is applicable to the description?"
NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight")

_BACKGROUNDS = (
    (206, 214, 200),
    (214, 206, 192),
    (196, 208, 218),
    (218, 204, 206),
    (186, 194, 188),
    (198, 190, 206),
    (112, 118, 128),
    (122, 112, 106),
    (102, 118, 110),
    (116, 106, 122),
)


@dataclass(frozen=True)
class ScenePart:
    """A part that was drawn; `visible` says whether enough of it shows in the final picture."""

    name: str
    color: str
    visible: bool


@dataclass(frozen=True)
class SceneObject:
    """One object: attributes, the parts drawn on it (absent ones are not listed) and its visible pixels."""

    category: str
    size: str
    color: str
    pattern: str
    parts: tuple[ScenePart, ...]
    mask: np.ndarray  # (H, W) bool, visible pixels

    @property
    def visible_parts(self) -> tuple[ScenePart, ...]:
        return tuple(part for part in self.parts if part.visible)

    @property
    def caption(self) -> str:
        """`a {size} {pattern} {color} {category} with ...`, naming every visible part in a fixed order."""
        head = f"a {self.size} {self.pattern} {self.color} {self.category}"
        parts = [_part_phrase(part) for part in self.visible_parts]
        return f"{head} with {_enumeration(parts)}" if parts else head

    @property
    def box(self) -> tuple[int, int, int, int]:
        """(x0, y0, x1, y1) around the visible pixels, the upper ends excluded."""
        rows, columns = np.flatnonzero(self.mask.any(1)), np.flatnonzero(self.mask.any(0))
        return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


@dataclass(frozen=True)
class Scene:
    """A picture and its objects, back to front."""

    seed: int
    index: int
    image: Image.Image
    objects: tuple[SceneObject, ...]

    @property
    def image_id(self) -> str:
        return f"{self.seed}-{self.index}"

    @property
    def region_ids(self) -> tuple[str, ...]:
        return tuple(f"{self.image_id}_{k}" for k in range(len(self.objects)))


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _enumeration(phrases: Sequence[str]) -> str:
    return phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} and {phrases[-1]}"


def _part_phrase(part: ScenePart) -> str:
    phrase = f"{part.color} {part.name}"
    return phrase if part.name in PLURAL_PARTS else f"{_article(part.color)} {phrase}"


# ----------------------------------------------------------------------------------------------------------
# Drawing.


@dataclass(frozen=True)
class _Draft:
    """An object before it is placed: its attributes, the colours of its parts, and its own pixels."""

    category: str
    size: str
    color: str
    pattern: str
    part_colors: dict[str, str]
    sprite: Sprite
    pixels: np.ndarray  # (h, w, 3) uint8


@dataclass
class _Placed:
    draft: _Draft
    x: int
    y: int
    area: int  # drawn pixels
    visible: int  # of those, the ones not covered so far

    def window(self) -> tuple[slice, slice]:
        height, width = self.draft.sprite.labels.shape
        return slice(self.y, self.y + height), slice(self.x, self.x + width)


def draw_scene(seed: int, index: int) -> Scene:
    """Draw scene `index` of the world `seed`: 2 to 8 objects on a muted background."""
    dice = Dice(f"{seed}/{index}")
    width, height = _picture_size(dice)
    canvas = _background(height, width, dice)  # (H, W, 3)
    owner = np.zeros((height, width), dtype=np.uint8)  # 0 is the background, else 1 + the object's index
    placed: list[_Placed] = []
    for category in _scene_categories(width, height, dice):
        twins = [p.draft for p in placed if p.draft.category == category]
        # Later tries ask for less room; the first two objects always find a place in an almost empty picture.
        for sizes in (SIZES, SIZES, SIZES[:2], SIZES[:1], SIZES[:1]):
            draft = _draft_object(category, twins, dice.choice(sizes), min(width, height), dice)
            if _place(draft, owner, placed, dice):
                window = placed[-1].window()
                drawn = draft.sprite.labels > 0
                canvas[window][drawn] = draft.pixels[drawn]
                break
    if len(placed) < 2:
        raise RuntimeError(f"scene {seed}/{index}: placed {len(placed)} objects, expected at least 2")
    objects = tuple(_finish(p, owner, k + 1) for k, p in enumerate(placed))
    return Scene(seed, index, Image.fromarray(canvas), objects)


def _picture_size(dice: Dice) -> tuple[int, int]:
    """(width, height): mostly near-square or about 1:2, so that grids of 1 to 4 tiles of 256 pixels occur."""
    kind = dice.integer(0, 99)
    if kind < 45:
        low, high = 224, 300
    elif kind < 65:
        low, high = 380, 520
    elif kind < 95:
        sides = dice.integer(448, 560), dice.integer(224, 280)
        return sides if dice.chance(0.5) else sides[::-1]
    else:
        short = dice.integer(224, 256)
        return (3 * short, short) if dice.chance(0.5) else (short, 3 * short)
    side = dice.integer(low, high)
    return side, min(high, max(low, dice.jitter(side)))


def _background(height: int, width: int, dice: Dice) -> np.ndarray:
    """(H, W, 3) uint8: a muted tone, sometimes a ground band, with faint lines or blotches."""
    base = np.array(dice.choice(_BACKGROUNDS)) + dice.integer(-10, 10)
    canvas = np.empty((height, width, 3), dtype=np.uint8)
    canvas[:] = base
    if dice.chance(0.6):
        canvas[height * dice.integer(45, 80) // 100 :] = base + dice.choice((-26, -18, 18))
    shade = dice.choice((-9, 9))
    texture = dice.integer(0, 2)
    if texture == 0:
        step = dice.integer(14, 30)
        canvas[dice.integer(0, step - 1) :: step] += np.uint8(shade % 256)
    elif texture == 1:
        step = dice.integer(14, 30)
        canvas[:, dice.integer(0, step - 1) :: step] += np.uint8(shade % 256)
    else:
        blotches = np.zeros((height, width), dtype=np.uint8)
        for _ in range(dice.integer(5, 10)):
            x, y = dice.integer(0, width), dice.integer(0, height)
            a, b = dice.integer(8, 40), dice.integer(5, 20)
            fill_ellipse(blotches, (x - a, y - b, x + a, y + b), shade % 256)
        canvas += blotches[..., None]
    return canvas


def _scene_categories(width: int, height: int, dice: Dice) -> list[str]:
    """The categories to draw, back to front; at most one pair, or two in a crowd, share a category."""
    long, short = max(width, height), min(width, height)
    room = (long + short // 2) // short  # 1, 2 or 3 squares
    count = dice.integer(2, 5) if room == 1 else dice.integer(room + 1, 8)
    names = dice.shuffled(tuple(CATEGORIES))[:count]
    if dice.chance(TWIN_PROBABILITY):
        names[1] = names[0]
        if count >= 6 and dice.chance(0.3):
            names[3] = names[2]
    return dice.shuffled(names)


def _draft_object(category: str, twins: Sequence[_Draft], size: str, short: int, dice: Dice) -> _Draft:
    """Draw an object by itself; it differs from its twins in colour and in size or pattern."""
    colors = dice.shuffled([c for c in COLORS if all(c != twin.color for twin in twins)])
    color = colors[0]
    pattern = dice.choice([p for p in PATTERNS if all((p, size) != (t.pattern, t.size) for t in twins)])
    present = [p for p in CATEGORIES[category] if not p.optional or dice.chance(OPTIONAL_PART_PROBABILITY)]
    part_palette = dice.shuffled([c for c in COLORS if c != color])
    part_colors = {part.name: part_palette[k] for k, part in enumerate(present)}
    low, high = SIZE_RANGES[size]
    length = max(MIN_LENGTH, short * dice.integer(low, high) // 1000)
    sprite = render(category, frozenset(part_colors), length, dice.chance(0.5), dice)
    period = max(10, length // 10 * 2)
    pixels = paint(sprite, color, pattern, part_colors, period, dice.integer(0, 2))
    return _Draft(category, size, color, pattern, part_colors, sprite, pixels)


def _place(draft: _Draft, owner: np.ndarray, placed: list[_Placed], dice: Dice, tries: int = 10) -> bool:
    """Put the draft where every object keeps its visible share; False, changing nothing, if no try fits."""
    height, width = owner.shape
    h, w = draft.sprite.labels.shape
    drawn = draft.sprite.labels > 0
    for _ in range(tries):
        x, y = dice.integer(2, width - w - 2), dice.integer(2, height - h - 2)
        under = owner[y : y + h, x : x + w]
        covered = np.bincount(under[drawn], minlength=len(placed) + 1)[1:]
        if all(p.visible - c >= MIN_VISIBLE_SHARE * p.area for p, c in zip(placed, covered, strict=True)):
            for p, c in zip(placed, covered, strict=True):
                p.visible -= int(c)
            area = int(drawn.sum())
            placed.append(_Placed(draft, x, y, area, area))
            under[drawn] = len(placed)
            return True
    return False


def _finish(placed: _Placed, owner: np.ndarray, number: int) -> SceneObject:
    """Decide which parts show once everything is drawn."""
    draft = placed.draft
    showing = owner[placed.window()] == number
    parts = []
    for spec in CATEGORIES[draft.category]:
        if spec.name not in draft.part_colors:
            continue
        drawn = draft.sprite.part_pixels(spec.name)
        shown, total = int((drawn & showing).sum()), int(drawn.sum())
        visible = shown >= PART_VISIBLE_PIXELS and shown >= PART_VISIBLE_SHARE * total
        parts.append(ScenePart(spec.name, draft.part_colors[spec.name], visible))
    return SceneObject(draft.category, draft.size, draft.color, draft.pattern, tuple(parts), owner == number)


# ----------------------------------------------------------------------------------------------------------
# Questions, in the ParaDLC-Bench shape plus a machine-readable "query".


def scene_questions(scene: Scene) -> dict[str, list[dict[str, Any]]]:
    """Region id -> its questions: positives, absent optional parts, and what only other objects have."""
    dice = Dice(f"{scene.seed}/{scene.index}/questions")
    questions = {}
    for region_id, item in zip(scene.region_ids, scene.objects, strict=True):
        others = [other for other in scene.objects if other is not item]
        asked = [
            *_positive_questions(item),
            *_negative_part_questions(item),
            *_salient_negative_questions(item, others, dice),
        ]
        questions[region_id] = [{**q, "choices": dice.shuffled(q["choices"])} for q in asked]
    return questions


def _positive_questions(item: SceneObject) -> list[dict[str, Any]]:
    own = [_positive(name, item.category, getattr(item, name)) for name in ("size", "color", "pattern")]
    parts = [_positive("color", item.category, part.color, part.name) for part in item.visible_parts]
    return own + parts


def _positive(attribute: str, category: str, value: str, part: str | None = None) -> dict[str, Any]:
    """Is the attribute of the object (or of its part) described, and rightly so?"""
    named, holder, missing = category, category, f"The {category}"
    if part is not None:
        named, holder, missing = part, f"{part} of the {category}", f"The {category} or its {part}"
    choices = [
        [f"The {attribute} of the {holder} is mentioned in the description and is {value}.", 1],
        [f"{missing} {_is(named)} not mentioned.", 0],
        [f"The {attribute} of the {holder} is mentioned in the description but is not {value}.", -1],
        [f"The {attribute} of the {named} is not mentioned, but the {holder} {_is(named)} mentioned.", 0.5],
    ]
    query = {
        "kind": "attribute",
        "attribute": attribute,
        "category": category,
        "part": part,
        "value": value,
    }
    return {"question": QUESTION, "choices": choices, "type": "positive", "query": query}


def _is(name: str) -> str:
    return "are" if name in PLURAL_PARTS else "is"


def _negative(subtype: str, subject: str, claim: str, query: dict[str, Any]) -> dict[str, Any]:
    """`claim` is a verb and what follows it ("is mentioned"); the right choice denies it."""
    verb, rest = claim.split(" ", 1)
    choices = [[f"{subject} {verb} {rest}.", -1], [f"{subject} {verb} not {rest}.", 1]]
    return {"question": QUESTION, "choices": choices, "type": "negative", "subtype": subtype, "query": query}


def _part_negative(subtype: str, category: str, part: str) -> dict[str, Any]:
    query = {"kind": "part", "category": category, "part": part}
    return _negative(subtype, f"The {part}", f"{_is(part)} mentioned in the description", query)


def _negative_part_questions(item: SceneObject) -> list[dict[str, Any]]:
    """One per absent optional part; a part that is merely hidden is asked about nowhere."""
    drawn = {part.name for part in item.parts}
    return [
        _part_negative("negative part", item.category, part.name)
        for part in CATEGORIES[item.category]
        if part.name not in drawn
    ]


def _salient_negative_questions(item: SceneObject, others: Sequence[SceneObject], dice: Dice) -> list[dict[str, Any]]:
    """Up to three: a neighbour's category, a twin's attribute, a neighbour's part; none true of `item`."""
    own = item.category
    names = [part.name for part in CATEGORIES[own]]
    categories = [o.category for o in others if o.category != own]
    values = [
        (attribute, getattr(twin, attribute))
        for twin in others
        for attribute in ("size", "color", "pattern")
        if twin.category == own and getattr(twin, attribute) != getattr(item, attribute)
    ]
    parts = [p.name for o in others for p in o.visible_parts if p.name not in names]
    asked = []
    if categories:
        other = dice.choice(categories)
        subject = f"{_article(other).capitalize()} {other}"
        query: dict[str, Any] = {"kind": "category", "category": other}
        asked.append(_negative("salient negative", subject, "is mentioned in the description", query))
    if values:
        attribute, value = dice.choice(values)
        query = {"kind": "value", "attribute": attribute, "category": own, "part": None, "value": value}
        asked.append(_negative("salient negative", f"The {own}", f"is described as {value}", query))
    if parts:
        asked.append(_part_negative("salient negative", own, dice.choice(parts)))
    return asked


def scene_class_names(scene: Scene) -> dict[str, str]:
    """Region id -> category."""
    return dict(zip(scene.region_ids, (item.category for item in scene.objects), strict=True))


def scene_conversation(scene: Scene) -> list[tuple[str, str]]:
    """(question, short answer) pairs about the whole picture: count, presence, colours, list."""
    dice = Dice(f"{scene.seed}/{scene.index}/conversation")
    names = [item.category for item in scene.objects]
    present = dice.choice(names)
    absent = dice.choice([name for name in CATEGORIES if name not in names])
    pairs = [("How many objects are in the image?", NUMBER_WORDS[len(names)])]
    for name, answer in dice.shuffled([(present, "yes"), (absent, "no")]):
        pairs.append((f"Is there {_article(name)} {name} in the image?", answer))
    for item in scene.objects:
        if names.count(item.category) == 1:
            pairs.append((f"What color is the {item.category}?", item.color))
    in_order = sorted(scene.objects, key=lambda item: item.box[0] + item.box[2])
    listed = [f"{_article(item.color)} {item.color} {item.category}" for item in in_order]
    pairs.append(("List the objects in the image.", _enumeration(listed)))
    return pairs


# ----------------------------------------------------------------------------------------------------------
# Files and tables.


def _encode_mask(mask_hw: np.ndarray) -> dict[str, Any]:
    """COCO compressed run lengths, {"size": [H, W], "counts": str}, of a bool mask."""
    rle = coco_mask.encode(np.asfortranarray(mask_hw, dtype=np.uint8))
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode("ascii")}


def scene_annotations(scene: Scene) -> dict[str, Any]:
    """One entry of a ParaDLC-Bench annotations.json."""
    annotations = [
        {
            "index": k,
            "category_name": item.category,
            "bbox": list(item.box),
            "mask_rle": _encode_mask(item.mask),
        }
        for k, item in enumerate(scene.objects)
    ]
    return {
        "file_name": f"{scene.image_id}.png",
        "height": scene.image.height,
        "width": scene.image.width,
        "image_id": scene.image_id,
        "annotations": annotations,
    }


def _scene_row(scene: Scene) -> dict[str, Any]:
    return {
        "image": scene.image,
        "image_id": scene.image_id,
        "region_ids": list(scene.region_ids),
        "mask_rles": [_encode_mask(item.mask) for item in scene.objects],
        "captions": [item.caption for item in scene.objects],
        "class_names": [item.category for item in scene.objects],
        "categories": [item.category for item in scene.objects],
        "sizes": [item.size for item in scene.objects],
        "colors": [item.color for item in scene.objects],
        "patterns": [item.pattern for item in scene.objects],
        "questions": json.dumps(scene_questions(scene)),
        "conversation": json.dumps(scene_conversation(scene)),
    }


_FEATURES = datasets.Features(
    {
        "image": datasets.Image(),
        "image_id": datasets.Value("string"),
        "region_ids": datasets.List(datasets.Value("string")),
        "mask_rles": datasets.List(
            {"size": datasets.List(datasets.Value("int32"), length=2), "counts": datasets.Value("string")}
        ),
        "captions": datasets.List(datasets.Value("string")),
        "class_names": datasets.List(datasets.Value("string")),
        "categories": datasets.List(datasets.Value("string")),
        "sizes": datasets.List(datasets.Value("string")),
        "colors": datasets.List(datasets.Value("string")),
        "patterns": datasets.List(datasets.Value("string")),
        "questions": datasets.Value("string"),
        "conversation": datasets.Value("string"),
    }
)


def _generate_rows(seed: int, num_images: int, drawing: str) -> Iterator[dict[str, Any]]:
    """Rows of `scenes_dataset`; `drawing` only makes the cache forget pictures of an older drawing."""
    for index in range(num_images):
        yield _scene_row(draw_scene(seed, index))


def scenes_dataset(seed: int, num_images: int) -> datasets.Dataset:
    """Scenes 0 .. num_images - 1 of a world as a map-style dataset, drawn once and cached.

    Columns, one row per picture with R regions: `image` (RGB), `image_id`, `region_ids` (R), `mask_rles`
    (R of {"size": [H, W], "counts"}), `captions` (R), `class_names` = `categories` (R), `sizes` (R),
    `colors` (R), `patterns` (R), `questions` (JSON: region id -> questions), `conversation` (JSON: pairs).
    """
    sources = b"".join(Path(str(path)).read_bytes() for path in (__file__, scene_objects.__file__))
    drawing = hashlib.sha256(sources).hexdigest()
    arguments = {"seed": seed, "num_images": num_images, "drawing": drawing}
    dataset = datasets.Dataset.from_generator(_generate_rows, features=_FEATURES, gen_kwargs=arguments)
    if not isinstance(dataset, datasets.Dataset):
        raise TypeError(f"expected a map-style Dataset, got {type(dataset).__name__}")
    return dataset


def preview_grid(seed: int, indices: Sequence[int], columns: int = 4, cell: int = 320) -> Image.Image:
    """A contact sheet: every picture above a copy with its masks tinted, each fitted into a square cell."""
    rows = -(-len(indices) // columns)
    sheet = Image.new("RGB", (columns * cell, rows * 2 * cell), (255, 255, 255))
    for k, index in enumerate(indices):
        scene = draw_scene(seed, index)
        x, y = k % columns * cell, k // columns * 2 * cell
        for offset, picture in ((0, scene.image), (cell, _tinted(scene))):
            fitted = picture.copy()
            fitted.thumbnail((cell - 8, cell - 8), Image.Resampling.BOX)
            sheet.paste(fitted, (x + 4, y + offset + 4))
    return sheet


def _tinted(scene: Scene) -> Image.Image:
    pixels = np.asarray(scene.image) // 3  # (H, W, 3)
    tints = list(COLORS.values())
    for k, item in enumerate(scene.objects):
        pixels[item.mask] += np.array(tints[k % len(tints)], dtype=np.uint8) // 3 * 2
    return Image.fromarray(pixels)


def write_scenes(seed: int, num_images: int, folder: Path) -> None:
    """Write the ParaDLC-Bench layout: images/, annotations.json, qa.json and class_names.json."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    annotations: list[dict[str, Any]] = []
    questions: dict[str, Any] = {}
    class_names: dict[str, str] = {}
    for index in range(num_images):
        scene = draw_scene(seed, index)
        entry = scene_annotations(scene)
        scene.image.save(folder / "images" / entry["file_name"])
        annotations.append(entry)
        questions.update(scene_questions(scene))
        class_names.update(scene_class_names(scene))
    for name, content in (("annotations", annotations), ("qa", questions), ("class_names", class_names)):
        write_json(folder / f"{name}.json", content)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Draw scenes: a contact sheet, or a benchmark folder.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=int, default=12, help="number of scenes, from index 0")
    parser.add_argument("--preview", type=Path, help="PNG file for a contact sheet")
    parser.add_argument("--annotations", type=Path, help="folder for images and ParaDLC-style JSON files")
    options = parser.parse_args(arguments)
    if options.preview is None and options.annotations is None:
        parser.error("nothing to do: give --preview, --annotations or both")
    if options.preview is not None:
        preview_grid(options.seed, range(options.images)).save(options.preview)
    if options.annotations is not None:
        write_scenes(options.seed, options.images, options.annotations)


if __name__ == "__main__":
    main()
