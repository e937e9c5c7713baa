"""The drawn world as a source with planted faults, so that every filter can be measured against the truth.

Two branches, as the paper has them. With `categories` (as COCONut has them) some categories are wrong. Without (as
SA-1B), masks of parts stand beside the masks of things, some with their whole and some without, some masks are two
things merged, and some are copies. What was planted stands in the region's facts, under "planted"; "object" says which
object of the scene the mask shows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

import numpy as np

from perceptiondlm.data_engine.record import Record, Region, region_of
from perceptiondlm.data_engine.sources.base import Source
from perceptiondlm.drawn.objects import CATEGORIES, COLORS, Dice
from perceptiondlm.drawn.scenes import Scene, SceneObject, draw_scene


MIN_PART_PIXELS = 80


@dataclass
class DrawnSource(Source):
    """Scenes with planted faults; `limit` says how many (default 40).

    Attributes:
        folder: where the pictures are drawn to.
        seed: of the world.
        categories: annotate categories, and plant wrong ones; otherwise plant wrong masks.
        wrong_categories: share of wrong categories.
        parts, merged, copies: per thing, the chance of a mask of a part, of a merged and of a doubled mask.
        lone_parts: share of the parts whose whole is left out.
    """

    kind: ClassVar[str] = "scenes"
    folder: str = "outputs/data_engine/scenes"
    seed: int = 0
    categories: bool = True
    wrong_categories: float = 0.1
    parts: float = 0.5
    merged: float = 0.15
    copies: float = 0.1
    lone_parts: float = 0.2

    def keys(self) -> Sequence[int]:
        return range(self.limit or 40)

    def name(self, key: int) -> str:
        return f"{self.seed}-{key}"

    def read(self, key: int) -> Record:
        scene = drawn_scene(self.seed, key)
        path = Path(self.folder) / f"{scene.image_id}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}")
        scene.image.save(part, format="PNG")
        part.replace(path)
        dice = Dice(f"{self.seed}/{key}/planted")
        regions = self._named(scene, dice) if self.categories else self._masked(scene, dice)
        return Record(scene.image_id, str(path), scene.image.width, scene.image.height, tuple(regions))

    def _named(self, scene: Scene, dice: Dice) -> list[Region]:
        """Things with categories, some of them wrong."""
        regions = []
        for number, item in enumerate(scene.objects):
            wrong = dice.chance(self.wrong_categories)
            others = [name for name in CATEGORIES if name != item.category]
            category = dice.choice(others) if wrong else item.category
            planted = {"planted": ["wrong category"]} if wrong else {}
            regions.append(region_of(str(number), item.mask, category, object=number, **planted))
        return regions

    def _masked(self, scene: Scene, dice: Dice) -> list[Region]:
        """Masks without categories: things, parts, merged things, copies, in the order of a shuffle."""
        regions, left_out = [], set()
        for number, item in enumerate(scene.objects):
            part = part_mask(scene, item, dice) if dice.chance(self.parts) else None
            if part is not None:
                lone = dice.chance(self.lone_parts)
                left_out |= {number} if lone else set()
                planted = "part without its whole" if lone else "part"
                regions.append(region_of(f"{number}-part", part, object=number, planted=[planted]))
            if dice.chance(self.copies):
                thinner = item.mask & np.roll(item.mask, 1, axis=1)
                regions.append(region_of(f"{number}-copy", thinner, object=number, planted=["copy"]))
            if number and dice.chance(self.merged):
                merged = item.mask | scene.objects[number - 1].mask
                regions.append(region_of(f"{number}-merged", merged, object=number, planted=["merged"]))
        things = [
            region_of(str(number), item.mask, object=number)
            for number, item in enumerate(scene.objects)
            if number not in left_out
        ]
        return dice.shuffled([*things, *regions])


def part_mask(scene: Scene, item: SceneObject, dice: Dice) -> np.ndarray | None:
    """The pixels of one visible part, by its colour, (H, W) bool; None where none is large enough."""
    pixels = np.asarray(scene.image)
    for part in dice.shuffled(item.visible_parts):
        mask = item.mask & (pixels == np.array(COLORS[part.color], dtype=np.uint8)).all(axis=-1)
        if int(mask.sum()) >= MIN_PART_PIXELS:
            return mask
    return None


@lru_cache(maxsize=32)
def drawn_scene(seed: int, index: int) -> Scene:
    """A scene; the last few are kept, as every stand-in asks for the scene of its record."""
    return draw_scene(seed, index)


def scene_of(record: Record) -> Scene:
    """The scene that a record shows.

    Raises:
        ValueError: the record is none of `DrawnSource`.
    """
    seed, _, index = record.id.rpartition("-")
    try:
        return drawn_scene(int(seed), int(index))
    except ValueError as error:
        raise ValueError(f"the record {record.id!r} shows no drawn scene; the stand-ins know no other") from error
