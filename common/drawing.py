"""Pictures for people: an image with its regions tinted, outlined and numbered, the captions beside it."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont


PALETTE = (
    (230, 57, 70),
    (29, 120, 216),
    (42, 157, 83),
    (244, 140, 6),
    (131, 56, 196),
    (0, 150, 160),
    (214, 51, 132),
    (120, 94, 60),
)
MIN_SIDE = 480  # small images are enlarged to this, in pixels


def annotate(image: Image.Image, masks: np.ndarray, captions: Sequence[str]) -> Image.Image:
    """Draw regions and captions.

    Args:
        image: RGB.
        masks: (N, H, W) bool, at the image's size.
        captions: N texts.
    Returns:
        RGB picture: the image with numbered regions, and a legend on its right.
    """
    if len(masks) != len(captions):
        raise ValueError(f"{len(masks)} masks need {len(masks)} captions, got {len(captions)}")
    scale = max(1.0, MIN_SIDE / min(image.size))
    size = (round(image.width * scale), round(image.height * scale))
    large = [np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST)) for mask in masks]
    picture = number_regions(image.resize(size, Image.Resampling.LANCZOS), large)
    return _beside(picture, _legend(captions, picture.height, _font(picture)))


def number_regions(image: Image.Image, masks: Sequence[np.ndarray]) -> Image.Image:
    """The image with its regions tinted, outlined and numbered from 1.

    Args:
        image: RGB.
        masks: N masks (H, W) bool, at the image's size, none empty.
    """
    canvas = np.array(image, dtype=np.float32)
    places = []
    for index, mask in enumerate(masks):
        color = np.array(PALETTE[index % len(PALETTE)], np.float32)
        canvas[mask] = 0.75 * canvas[mask] + 0.25 * color
        canvas[_outline(mask, max(1, min(image.size) // 240))] = color
        places.append(_center(mask))
    picture = Image.fromarray(canvas.round().astype(np.uint8))
    font, draw = _font(picture), ImageDraw.Draw(picture)
    for index, place in enumerate(places):
        _badge(draw, place, str(index + 1), PALETTE[index % len(PALETTE)], font)
    return picture


def _font(picture: Image.Image):
    return ImageFont.load_default(size=max(14, min(picture.size) // 32))


def _outline(mask: np.ndarray, width: int) -> np.ndarray:
    """Pixels of a mask within `width` of its border."""
    inner = np.pad(mask, width)
    shrunk = mask.copy()
    for dy, dx in ((-width, 0), (width, 0), (0, -width), (0, width)):
        shrunk &= inner[width + dy : width + dy + mask.shape[0], width + dx : width + dx + mask.shape[1]]
    return mask & ~shrunk


def _center(mask: np.ndarray) -> tuple[int, int]:
    """The mask pixel closest to its centroid, (x, y)."""
    ys, xs = np.nonzero(mask)
    nearest = np.argmin((ys - ys.mean()) ** 2 + (xs - xs.mean()) ** 2)
    return int(xs[nearest]), int(ys[nearest])


def _badge(draw: ImageDraw.ImageDraw, place: tuple[int, int], text: str, color, font) -> None:
    radius = font.size * 0.8
    x, y = place
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=color, outline="white", width=2)
    draw.text((x, y), text, fill="white", font=font, anchor="mm")


def _legend(captions: Sequence[str], height: int, font) -> Image.Image:
    """A white panel with every caption, wrapped, behind its number; at least `height` tall."""
    width, margin, line = int(font.size * 24), font.size, int(font.size * 1.35)
    wrapped = [_wrap(caption or "(no caption)", font, width - 4 * margin) for caption in captions]
    needed = sum(len(lines) * line + margin for lines in wrapped) + margin
    panel = Image.new("RGB", (width, max(height, int(needed))), "white")
    draw = ImageDraw.Draw(panel)
    y = margin
    for index, lines in enumerate(wrapped):
        _badge(draw, (int(1.5 * margin), int(y + line / 2)), str(index + 1), PALETTE[index % len(PALETTE)], font)
        for text in lines:
            draw.text((3 * margin, y), text, fill=(30, 30, 30), font=font)
            y += line
        y += margin
    return panel


def _wrap(text: str, font, width: float) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def _beside(left: Image.Image, right: Image.Image) -> Image.Image:
    picture = Image.new("RGB", (left.width + right.width, max(left.height, right.height)), "white")
    picture.paste(left, (0, 0))
    picture.paste(right, (left.width, 0))
    return picture
