"""The words for how large a region is and where it stands, as training teaches them."""

import numpy as np


# Upper limits of a region's share of the picture, and the word for it.
SIZES = ((0.003, "tiny"), (0.02, "small"), (0.1, "medium-sized"), (1.0, "large"))
ROWS, COLUMNS = ("top", "", "bottom"), ("left", "", "right")


def size_word(mask_HW: np.ndarray) -> str:
    """The word for a mask's share of its picture."""
    share = float(mask_HW.mean())
    return next(word for limit, word in SIZES if share <= limit)


def place(mask_HW: np.ndarray) -> str:
    """Where the middle of a mask lies, in thirds of the picture: "at the top left", "in the middle"."""
    rows, columns = np.nonzero(mask_HW)
    height, width = mask_HW.shape
    row = ROWS[min(int(3 * (rows.mean() + 0.5) / height), 2)]
    column = COLUMNS[min(int(3 * (columns.mean() + 0.5) / width), 2)]
    return place_words(row, column)


def place_words(row: str, column: str) -> str:
    """What captions call one of `ROWS` and one of `COLUMNS`."""
    words = " ".join(filter(None, (row, column)))
    return f"at the {words}" if words else "in the middle"


PLACES = tuple(place_words(row, column) for row in ROWS for column in COLUMNS)
