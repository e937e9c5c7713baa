"""Captions made of what is known of a region: its name, its measured colours, its size and place in the picture.

"a dog, brown and white, small, at the bottom left". For a share of the regions a truly more general word stands for the
name ("an animal"): a model trained so says the general word where it outweighs every single name, and the share sets
how sure it must be. With a share q of general words, a name is said where p(name) > q / (1 - q) * p(general word).
"""

import random

import numpy as np

from perceptiondlm.evaluation.photos.colours import colour_shares, named_colours
from perceptiondlm.evaluation.photos.layout import place, size_word
from perceptiondlm.evaluation.photos.names import CategoryNames


UNCOUNTED = frozenset((
    "furniture", "clothing", "food", "sports equipment", "equipment", "tableware", "fabric", "water", "grass",
    "sand", "sky", "snow", "dirt", "gravel", "paper", "cardboard", "broccoli", "glass", "luggage", "skis",
    "scissors", "stairs",
))  # fmt: skip


def true_caption(
    names: CategoryNames, pixels_HW3: np.ndarray, mask_HW: np.ndarray, general_share: float, dice: random.Random
) -> str:
    """A caption of a region.

    Args:
        names: the words for its category.
        pixels_HW3: uint8 (H, W, 3), the picture; mask_HW: bool (H, W).
        general_share: share of captions, in [0, 1), with a general word, the most general of `names.broader`.
        dice: decides.
    """
    name = drawn_name(names, general_share, dice)
    colours = " and ".join(named_colours(colour_shares(pixels_HW3, mask_HW)))
    return f"{with_article(name)}, {colours}, {size_word(mask_HW)}, {place(mask_HW)}"


def drawn_name(names: CategoryNames, general_share: float, dice: random.Random) -> str:
    """The name of a category or, for a share of the draws, the most general word that captions use for it."""
    return names.broader[-1] if names.broader and dice.random() < general_share else names.name


def with_article(name: str) -> str:
    """ "a dog", "an animal", "grass"."""
    if name in UNCOUNTED:
        return name
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
