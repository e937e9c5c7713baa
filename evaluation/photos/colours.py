"""Colours of a region, measured: the share of its pixels that each of eleven basic colour words describes."""

import numpy as np


# Typical shades (sRGB, 0 to 255) of the basic colour terms of English (Berlin & Kay 1969); a pixel takes the word of
# the nearest shade in CIELAB.
SHADES: dict[str, tuple[tuple[int, int, int], ...]] = {
    "black": ((0, 0, 0), (30, 30, 30), (25, 20, 30)),
    "white": ((255, 255, 255), (228, 228, 226)),
    "grey": ((85, 85, 85), (128, 128, 128), (175, 175, 175)),
    "red": ((200, 25, 30), (140, 20, 25), (225, 60, 55)),
    "orange": ((240, 130, 30), (220, 110, 40)),
    "yellow": ((245, 220, 50), (225, 200, 90)),
    "green": ((45, 120, 45), (100, 160, 60), (60, 80, 35), (125, 150, 95)),
    "blue": ((35, 70, 170), (90, 150, 220), (30, 40, 90), (150, 190, 230)),
    "purple": ((110, 50, 140), (150, 110, 180)),
    "pink": ((240, 150, 180), (230, 90, 150), (235, 190, 195)),
    "brown": ((110, 70, 40), (70, 45, 30), (150, 110, 75), (185, 150, 115)),
}
COLOUR_WORDS = tuple(SHADES)
NAMED_SHARE = 0.3  # of a region's pixels, from which a caption names a colour
TRUE_SHARE = 0.15  # ... and from which a caption that names it is right
MAX_PIXELS = 4096  # of a region that are looked at, evenly spaced


def colour_shares(pixels_HW3: np.ndarray, mask_HW: np.ndarray) -> dict[str, float]:
    """Share of a region's pixels by colour word, largest first, in (0, 1].

    Args:
        pixels_HW3: uint8 (H, W, 3) in sRGB.
        mask_HW: bool (H, W), at least one pixel set.
    """
    chosen = pixels_HW3[mask_HW]
    chosen = chosen[:: max(1, len(chosen) // MAX_PIXELS)]
    words = [word for word, shades in SHADES.items() for _ in shades]
    shades_S3 = cielab(np.array([shade for shades in SHADES.values() for shade in shades]))
    nearest = ((cielab(chosen)[:, None] - shades_S3) ** 2).sum(axis=-1).argmin(axis=1)
    counts = np.bincount(nearest, minlength=len(words)) / len(chosen)
    shares = {word: float(sum(counts[i] for i, name in enumerate(words) if name == word)) for word in COLOUR_WORDS}
    return dict(sorted(((w, s) for w, s in shares.items() if s > 0), key=lambda item: -item[1]))


def named_colours(shares: dict[str, float]) -> list[str]:
    """The one or two colours a caption names; the largest alone where none reaches the share for it."""
    return [word for word, share in shares.items() if share >= NAMED_SHARE][:2] or list(shares)[:1]


def cielab(colours_N3: np.ndarray) -> np.ndarray:
    """sRGB (N, 3), 0 to 255, to CIE L*a*b* (N, 3) under D65 (IEC 61966-2-1, CIE 15)."""
    scaled = colours_N3.astype(np.float64) / 255
    linear = np.where(scaled <= 0.04045, scaled / 12.92, ((scaled + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    ratios = linear @ to_xyz.T / np.array([0.9505, 1.0, 1.089])
    roots = np.where(ratios > (6 / 29) ** 3, np.cbrt(ratios), ratios * (29 / 6) ** 2 / 3 + 4 / 29)
    x, y, z = roots.T
    return np.stack((116 * y - 16, 500 * (x - y), 200 * (y - z)), axis=1)
