"""Tiles, pixel-unshuffle and RoI-Align against slow references."""

import numpy as np
import pytest
import torch
from model_batches import region_tensors
from PIL import Image

from perceptiondlm.configuration_perceptiondlm import num_tiles
from perceptiondlm.inputs_perceptiondlm import PromptInputs
from perceptiondlm.modeling_perceptiondlm import (
    pixel_unshuffle,
)
from perceptiondlm.region_features_perceptiondlm import merge_tiles, roi_align


@pytest.mark.parametrize("grid", [(1, 1), (3, 2), (1, 2), (5, 1)])
def test_merging_tiles_undoes_tiling(tiny_model, tiny_processor, grid):
    processor = tiny_processor(tiny_model(), image_mean=[0.0] * 3, image_std=[1.0] * 3)
    columns, rows = grid
    pixels = np.random.default_rng(0).integers(0, 256, (rows * 64, columns * 64, 3), dtype=np.uint8)
    tiles, found = processor.image_processor.tile(Image.fromarray(pixels))
    assert found == grid
    assert len(tiles) == num_tiles(grid)
    merged = merge_tiles(torch.from_numpy(tiles).permute(0, 2, 3, 1), grid)
    assert torch.equal(merged.mul(255).round().to(torch.uint8), torch.from_numpy(pixels))


@pytest.mark.parametrize(("side", "factor"), [(4, 2), (6, 3), (8, 2), (4, 1)])
def test_pixel_unshuffle_stacks_squares_of_patches(side, factor):
    """Every patch goes to the token of its square, in row-major order within it."""
    tiles, channels, n = 2, 3, side // factor
    ramp = torch.arange(tiles * side * side * channels, dtype=torch.float32).view(tiles, side * side, channels)
    unshuffled = pixel_unshuffle(ramp, factor)
    assert unshuffled.shape == (tiles, n, n, factor * factor * channels)
    rebuilt = torch.full_like(ramp, -1)
    for t in range(tiles):
        for y in range(side):
            for x in range(side):
                first = ((y % factor) * factor + x % factor) * channels
                rebuilt[t, y * side + x] = unshuffled[t, y // factor, x // factor, first : first + channels]
    assert torch.equal(rebuilt, ramp)


def test_image_tokens_lie_where_their_patches_lie():
    """Patches that carry their own place in the picture: after unshuffle and merging each token holds its four."""
    (columns, rows), side = (3, 2), 4
    tiles = [
        [(row * side + y, column * side + x) for y in range(side) for x in range(side)]
        for row in range(rows)
        for column in range(columns)
    ]
    thumbnail = [(-1, -1)] * side**2
    merged = merge_tiles(pixel_unshuffle(torch.tensor([*tiles, thumbnail]), 2), (columns, rows))
    assert merged.shape == (rows * 2, columns * 2, 8)
    for y in range(rows * 2):
        for x in range(columns * 2):
            square = [(2 * y, 2 * x), (2 * y, 2 * x + 1), (2 * y + 1, 2 * x), (2 * y + 1, 2 * x + 1)]
            assert merged[y, x].view(4, 2).tolist() == [list(place) for place in square]


def bilinear(map_hwD: torch.Tensor, x: float, y: float) -> torch.Tensor:
    """Value at pixel coordinates (centres at integers), clamped to the border."""
    height, width, _ = map_hwD.shape
    x, y = min(max(x, 0.0), width - 1.0), min(max(y, 0.0), height - 1.0)
    left, top = int(x), int(y)
    right, bottom = min(left + 1, width - 1), min(top + 1, height - 1)
    fx, fy = x - left, y - top
    upper = map_hwD[top, left] * (1 - fx) + map_hwD[top, right] * fx
    lower = map_hwD[bottom, left] * (1 - fx) + map_hwD[bottom, right] * fx
    return upper * (1 - fy) + lower * fy


def slow_roi_align(map_hwD: torch.Tensor, box: list[float], bins: int, samples: int) -> torch.Tensor:
    """Average of the samples of every bin, one sample at a time, in float64."""
    height, width, depth = map_hwD.shape
    x0, y0, x1, y1 = box[0] * width, box[1] * height, box[2] * width, box[3] * height
    out = torch.zeros(bins * bins, depth, dtype=torch.float64)
    for row in range(bins):
        for column in range(bins):
            for i in range(samples):
                for j in range(samples):
                    y = y0 + (y1 - y0) * (row + (i + 0.5) / samples) / bins - 0.5
                    x = x0 + (x1 - x0) * (column + (j + 0.5) / samples) / bins - 0.5
                    out[row * bins + column] += bilinear(map_hwD.double(), x, y) / samples**2
    return out


@pytest.mark.parametrize(("bins", "samples"), [(4, 2), (3, 1), (2, 3)])
def test_roi_align_against_a_loop(bins, samples):
    features = torch.randn(5, 8, 3, generator=torch.Generator().manual_seed(0))
    boxes = [
        [0.0, 0.0, 1.0, 1.0],  # the whole image, samples outside the outermost centres
        [0.13, 0.41, 0.58, 0.77],
        [0.500, 0.500, 0.503, 0.502],  # far smaller than a feature cell
        [0.97, 0.0, 1.0, 0.04],  # in a corner
        [0.0, 0.2, 0.9, 0.25],  # flat
    ]
    found = roi_align(features, torch.tensor(boxes), bins, samples)
    assert found.shape == (len(boxes), bins**2, 3)
    expected = torch.stack([slow_roi_align(features, box, bins, samples) for box in boxes])
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=0)


def test_roi_align_keeps_the_dtype():
    features = torch.randn(4, 4, 2).to(torch.bfloat16)
    assert roi_align(features, torch.tensor([[0.0, 0.0, 1.0, 1.0]]), 2, 2).dtype == torch.bfloat16


def test_regions_are_read_from_their_own_place_in_their_own_image(tiny_model, tiny_processor):
    """`replay_regions` on tiles that are ramps of the picture's coordinates: a RoI token is the centre of its bin."""
    model = tiny_model(region_conditioning="vision")
    processor = tiny_processor(model)
    wide, tall = Image.new("RGB", (192, 128)), Image.new("RGB", (60, 130))
    boxes = [[[48, 32, 112, 96], [100, 50, 104, 54]], [[10, 40, 50, 120]]]
    batch = processor(images=[wide, tall], boxes=boxes)
    pieces = []
    for columns, rows in batch["tile_grids"].tolist():
        y, x = torch.meshgrid(torch.arange(rows * 4) + 0.5, torch.arange(columns * 4) + 0.5, indexing="ij")
        ramp = torch.stack((x / (columns * 4), y / (rows * 4)), -1)  # fractions of the image
        pieces.append(ramp.view(rows, 4, columns, 4, 2).transpose(1, 2).reshape(-1, 4, 4, 2))
        pieces.append(torch.full((1, 4, 4, 2), 99.0))  # the thumbnail
    tiles = [torch.cat(pieces[:2]), torch.cat(pieces[2:])]
    found, _ = model.replay_regions(PromptInputs(**region_tensors(batch)).checked(model), tiles)
    sizes = [(192, 128), (192, 128), (60, 130)]
    for tokens, box, (width, height) in zip(found, [*boxes[0], *boxes[1]], sizes, strict=True):
        for index, token in enumerate(tokens.tolist()):
            x = box[0] + (box[2] - box[0]) * (index % 4 + 0.5) / 4
            y = box[1] + (box[3] - box[1]) * (index // 4 + 0.5) / 4
            assert token == pytest.approx([x / width, y / height], abs=1e-5)
