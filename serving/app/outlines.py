"""Masks as outlines that a browser draws: SVG paths in the image's pixels."""

from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask
from scipy.ndimage import distance_transform_edt
from skimage.measure import approximate_polygon, find_contours


SCREEN_SIDE = 1400  # pixels of the longest side at which outlines are traced
TOLERANCE = 0.6  # of these pixels that a simplified outline may be off


def traced(mask: dict[str, Any], box: tuple[int, int, int, int]) -> tuple[str, tuple[float, float]]:
    """The border of a mask and a point well inside it, where its number can stand.

    Args:
        mask: COCO RLE, `size` (height, width).
        box: x0, y0, x1, y1 around it, half-open, in pixels.
    Returns:
        an SVG path in image pixels for `fill-rule="evenodd"`, holes included (a region too thin to be traced at screen
        size becomes its box); x and y of the point farthest from the border.
    """
    x0, y0, x1, y1 = (int(edge) for edge in box)
    crop = coco_mask.decode(mask)[y0:y1, x0:x1]
    scale = min(1.0, SCREEN_SIDE / max(mask["size"]))
    width, height = max(1, round((x1 - x0) * scale)), max(1, round((y1 - y0) * scale))
    shares = Image.fromarray(crop * 255).resize((width, height), Image.Resampling.BOX)
    padded = np.pad(np.asarray(shares, dtype=np.float32) / 255, 1)
    step_x, step_y = (x1 - x0) / width, (y1 - y0) / height

    def placed(row: float, column: float) -> tuple[float, float]:
        return x0 + (column - 0.5) * step_x, y0 + (row - 0.5) * step_y

    parts = []
    for ring in find_contours(padded, 0.5):
        points = approximate_polygon(ring, TOLERANCE)
        if len(points) > 3:  # the first point comes again as the last
            corners = (placed(row, column) for row, column in points[:-1])
            parts.append("M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in corners) + "Z")
    depth = distance_transform_edt(padded >= 0.5)
    deepest = divmod(int(depth.argmax()), depth.shape[1]) if depth.any() else (height // 2 + 1, width // 2 + 1)
    return "".join(parts) or f"M{x0} {y0}H{x1}V{y1}H{x0}Z", placed(*deepest)
