"""Stand-ins for captioner and segmenter in the drawn world, with faults that are planted and known.

Both depend on nothing but the record and a seed. What is planted stands in a region's facts, under "planted".
"""

from typing import Any

import numpy as np

from perceptiondlm.data_engine.record import Changes, Record, Region, encoded
from perceptiondlm.data_engine.sources.drawn import scene_of
from perceptiondlm.drawn.objects import COLORS, Dice
from perceptiondlm.drawn.scenes import Scene, SceneObject


# Planted by the captioner, at most one a region, with their chances.
CAPTION_FAULTS = {
    "another thing": 0.10,  # the caption of another object, of another category, of the image
    "wrong detail": 0.06,  # one colour is wrong: no filter of the paper's looks for it
    "repetition": 0.05,  # the last words over and over
    "too short": 0.03,  # the first word alone
    "too long": 0.02,
    "copied caption": 0.04,  # word for word the caption of a larger region
}
MISSED = 0.04  # share of objects that the segmenter does not find
LONG = " it is drawn in flat colours with dark outlines on a muted background" * 9


def planted_captions(record: Record, seed: int) -> Changes:
    """Captions of a drawn record's kept regions, some with planted faults.

    A mask of a part is called by the part's whole in half of the cases, and by the part in the others.
    """
    scene = scene_of(record)
    changes: Changes = {}
    by_size = sorted(record.kept, key=lambda region: -region.area)
    for place, region in enumerate(by_size):
        dice = Dice(f"{seed}/{record.id}/{region.id}/caption")
        true = true_caption_of(region, scene, dice)
        fault = _fault(dice)
        caption = true if fault is None else _spoiled(true, fault, region, scene, dice)
        if fault == "copied caption" and place:
            caption = changes[by_size[place - 1].id]["caption"]
        planted = region.facts.get("planted", [])
        if caption != true and fault is not None:
            planted = [*planted, fault]
        changes[region.id] = {"caption": caption, "facts": {"planted": planted} if planted else {}}
    return {region.id: changes[region.id] for region in record.kept}


def true_caption_of(region: Region, scene: Scene, dice: Dice) -> str:
    """What a captioner that sees well says of a mask."""
    item = scene.objects[region.facts["object"]]
    planted = region.facts.get("planted", [])
    if any(fault.startswith("part") for fault in planted) and item.visible_parts and dice.chance(0.5):
        part = dice.choice(item.visible_parts)
        return f"{part.color} {part.name} of a {item.category}"
    return item.caption


def _fault(dice: Dice) -> str | None:
    """One of `CAPTION_FAULTS` by its chance, or None."""
    throw, low = dice.integer(0, 9999) / 10000, 0.0
    for fault, chance in CAPTION_FAULTS.items():
        if low <= throw < low + chance:
            return fault
        low += chance
    return None


def _spoiled(true: str, fault: str, region: Region, scene: Scene, dice: Dice) -> str:
    """A caption with a fault; the true one where the fault is not possible here."""
    item = scene.objects[region.facts["object"]]
    if fault == "another thing":
        others = [other.caption for other in scene.objects if other.category != item.category]
        return dice.choice(others) if others else true
    if fault == "wrong detail":
        return true.replace(item.color, dice.choice([color for color in COLORS if color != item.color]), 1)
    if fault == "repetition":
        last = " ".join(true.split()[-3:])
        return f"{true} {' '.join([f'and {last}'] * 6)}"
    return {"too short": true.split()[0], "too long": true + LONG}.get(fault, true)


def drawn_masks(record: Record, name: str) -> list[dict[str, Any]]:
    """Masks of all things of a name in a drawn record's picture, a little ragged; some are missed."""
    scene = scene_of(record)
    found = []
    for number, item in enumerate(scene.objects):
        dice = Dice(f"{record.id}/{number}/segmenter")
        if item.category == name:
            ragged = _ragged(item, dice)
            if not dice.chance(MISSED):
                found.append(encoded(ragged))
    return found


def _ragged(item: SceneObject, dice: Dice) -> np.ndarray:
    """The mask a pixel or two off, as a segmenter's are, (H, W) bool."""
    shift, axis = dice.integer(0, 2), dice.integer(0, 1)
    return item.mask | np.roll(item.mask, shift, axis=axis)
