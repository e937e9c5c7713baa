"""Masks that are pictures: grey levels, palettes, transparency, and what lossy compression made of them."""

import numpy as np
from PIL import Image

from .images_perceptiondlm import load_pixels, with_alpha


MASK_MODES = ("1", "L", "P", "RGB", "RGBX", "LA", "La", "PA", "RGBA", "RGBa")
LOSSY_TOLERANCE = 16  # grey levels a lossily compressed mask may stray from 0 or 255 ...
LOSSY_SHARE = 0.99  # ... in at least this share of its pixels


def values_of_picture(image: Image.Image, name: str, threshold: int) -> np.ndarray:
    """The values (H, W) of a mask that is a picture; those near 0 and 255 as bool."""
    image = load_pixels(image, name)
    if image.mode.startswith(("I", "F")):
        return np.asarray(image)
    if image.mode not in MASK_MODES:
        raise ValueError(f"{name} is an image of mode {image.mode}; accepted: modes {', '.join(MASK_MODES)}, I, F")
    if image.has_transparency_data:
        clear = with_alpha(image)
        if np.asarray(clear.getchannel("A")).min() < 255:
            return _mask_beside_alpha(clear, image.mode, name, threshold)
        image = image if image.mode == "P" else clear.convert("RGB")
    if image.mode == "P" and not _is_black_and_white(image):
        return np.asarray(image)
    if image.mode == "1":
        return np.asarray(image)
    grey = _grey(image.convert("RGB")) if image.mode != "L" else image
    if grey is None:
        raise ValueError(f"{name} is an RGB image with colours; accepted: modes 1, L, P, grey RGB")
    values_HW, share = _two_valued(grey, threshold)
    if values_HW is None:
        accepted = f"{{0, 1}}, {{0, 255}}, or {LOSSY_SHARE:.0%} within {LOSSY_TOLERANCE} of 0 or 255"
        raise ValueError(f"{name} has {share:.1%} of its grey values near 0 or 255; accepted: {accepted}")
    return values_HW


def _is_black_and_white(image: Image.Image) -> bool:
    """Whether the colours of a palette picture tell the mask: those it uses are greys, black and white among them."""
    used = np.flatnonzero(image.histogram()[:256])
    colours = np.array(image.getpalette("RGB") or (), dtype=np.int64).reshape(-1, 3)
    if used[-1] >= len(colours):
        return False
    colours = colours[used]
    if np.ptp(colours, axis=1).max() > LOSSY_TOLERANCE:
        return False
    levels = colours.mean(axis=1)
    black, white = levels <= LOSSY_TOLERANCE, levels >= 255 - LOSSY_TOLERANCE
    return bool(black.any() and white.any()) or (len(used) == 1 and bool((black | white).all()))


def _grey(image: Image.Image) -> Image.Image | None:
    """The grey form of an RGB picture; None if it has colours beyond what lossy compression makes of grey."""
    red, green, blue = (np.asarray(channel) for channel in image.split())
    apart = np.maximum(np.maximum(red, green), blue) - np.minimum(np.minimum(red, green), blue)
    return image.convert("L") if np.mean(apart <= LOSSY_TOLERANCE) >= LOSSY_SHARE else None


def _two_valued(grey: Image.Image, threshold: int) -> tuple[np.ndarray | None, float]:
    """The mask (H, W) that grey values tell, None if they tell none; and the share of them near 0 and 255."""
    values_HW, levels = np.asarray(grey), np.array(grey.histogram())
    if not levels[2:].any():
        return values_HW == 1, 1.0
    near = (levels[: LOSSY_TOLERANCE + 1].sum() + levels[255 - LOSSY_TOLERANCE :].sum()) / values_HW.size
    return (values_HW >= threshold if near >= LOSSY_SHARE else None), near


def _mask_beside_alpha(clear: Image.Image, mode: str, name: str, threshold: int) -> np.ndarray:
    """The mask (H, W) of a picture with transparency, if its colours or its alpha alone tell one, or both the same."""
    grey = _grey(clear.convert("RGB"))
    told = [_two_valued(part, threshold)[0] for part in (grey, clear.getchannel("A")) if part is not None]
    found = [mask for mask in told if mask is not None and mask.any() and not mask.all()]
    if not found or not np.array_equal(found[0], found[-1]):
        what = "tell two different masks" if found else "tell no mask"
        accepted = "a mask in the colours or in the alpha, or the same in both"
        raise ValueError(f"{name} is an image of mode {mode} whose colours and alpha {what}; accepted: {accepted}")
    return found[0]
