"""What models are shown of a region: the whole image with it outlined, its surroundings, and it alone."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageOps

from perceptiondlm.common.drawing import draw_regions
from perceptiondlm.evaluation.benchmarks import crop
from perceptiondlm.evaluation.judges.pictures import Pictures


LONGEST_SIDE = 1024  # of a picture that is sent, in pixels
GREY = 128


def outlined(image: Image.Image, masks_HW: Sequence[np.ndarray]) -> Image.Image:
    """The image with regions tinted, outlined and numbered from 1."""
    return draw_regions(image, masks_HW)


def alone(image: Image.Image, mask_HW: np.ndarray) -> Image.Image:
    """The surroundings of a region (see `benchmarks.crop`), everything but the region itself in grey."""
    around, inside = crop(image, mask_HW)
    pixels = np.asarray(around).copy()
    pixels[~inside] = GREY
    return Image.fromarray(pixels)


def region_pictures(image: Image.Image, mask_HW: np.ndarray) -> Pictures:
    """For a captioner: image, surroundings, and region alone."""
    return _fitted(
        ("The whole image, the region outlined and marked 1:", outlined(image, [mask_HW])),
        ("The region and what is around it:", crop(image, mask_HW)[0]),
        ("The region alone, everything else in grey:", alone(image, mask_HW)),
    )


def extraction_pictures(image: Image.Image, masks_HW: Sequence[np.ndarray], number: int) -> Pictures:
    """For the extraction of attributes: the region's surroundings, it alone, and all regions in the image.

    Args:
        number: index of the region in question.
    """
    mask = masks_HW[number]
    return _fitted(
        ("The object and what is around it:", crop(image, mask)[0]),
        ("The object alone, everything else in grey:", alone(image, mask)),
        (
            f"The whole image with all objects numbered; the object in question is {number + 1}:",
            outlined(image, masks_HW),
        ),
    )


def _fitted(*shown: tuple[str, Image.Image]) -> Pictures:
    return Pictures.of(
        [
            (
                text,
                ImageOps.contain(picture, (LONGEST_SIDE, LONGEST_SIDE))
                if max(picture.size) > LONGEST_SIDE
                else picture,
            )
            for text, picture in shown
        ]
    )
