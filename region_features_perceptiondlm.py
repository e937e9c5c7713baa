"""What a region brings into the sequence: RoI-aligned image features and, under `replay`, what its mask looks like.

Legend: see sequence_perceptiondlm.
"""

import torch
from torch import nn
from torch.nn import functional as F


class AlignedRois:
    """Where RoI features are sampled: on an image's grid tiles, at the region's true box."""

    def feature_map(self, tiles_TnnD: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """The map (rows * n, columns * n, D) that the boxes of an image refer to."""
        return merge_tiles(tiles_TnnD, grid)

    def boxes(self, boxes_R4: torch.Tensor, sizes_R2: torch.Tensor, training: bool) -> torch.Tensor:
        """Half-open pixel boxes (R, 4) as fractions of their images (height, width) (R, 2), fp32."""
        return boxes_R4.float() / sizes_R2.flip(-1).repeat(1, 2)


def merge_tiles(tiles_TnnD: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Lay an image's grid tiles (row-major, thumbnail left out) side by side: (T, n, n, D) to (rows*n, cols*n, D)."""
    columns, rows = grid
    _, n, _, depth = tiles_TnnD.shape
    tiled = tiles_TnnD[: columns * rows].view(rows, columns, n, n, depth)
    return tiled.permute(0, 2, 1, 3, 4).reshape(rows * n, columns * n, depth)


def roi_align(feature_map: torch.Tensor, boxes_R4: torch.Tensor, bins: int, samples: int) -> torch.Tensor:
    """RoI-Align: average of `samples`² aligned bilinear samples in each of `bins`² bins of every box.

    Args:
        feature_map: (rows, columns, D) features that cover the whole image.
        boxes_R4: (R, 4) half-open boxes x0, y0, x1, y1 as fractions of the image in [0, 1].
    Returns:
        (R, bins², D), bins in row-major order, computed in fp32 and cast back.
    """
    count, points = boxes_R4.shape[0], bins * samples
    fractions = (torch.arange(points, device=boxes_R4.device, dtype=torch.float32) + 0.5) / points
    low, size = boxes_R4[:, :2].float(), (boxes_R4[:, 2:] - boxes_R4[:, :2]).float()
    xy = 2.0 * (low[:, None, :] + size[:, None, :] * fractions[None, :, None]) - 1.0  # (R, points, 2) in [-1, 1]
    grid = torch.stack(
        (xy[:, None, :, 0].expand(count, points, points), xy[:, :, None, 1].expand(count, points, points)), dim=-1
    )
    sampled = F.grid_sample(
        feature_map.float().permute(2, 0, 1)[None],
        grid.reshape(1, count * points, points, 2),
        mode="bilinear",
        padding_mode="border",
        align_corners=False,
    )
    sampled = sampled[0].view(-1, count, points, points).transpose(0, 1)  # (R, D, points, points)
    return F.avg_pool2d(sampled, samples).flatten(2).transpose(1, 2).to(feature_map.dtype)


def roi_align_each(maps_RnnD: torch.Tensor, boxes_R4: torch.Tensor, bins: int, samples: int) -> torch.Tensor:
    """`roi_align` of every box in a map of its own: (R, bins², D)."""
    pairs = zip(maps_RnnD, boxes_R4, strict=True)
    return torch.cat([roi_align(map_nnD, box_4[None], bins, samples) for map_nnD, box_4 in pairs])


def bin_shares(coverage: torch.Tensor, subsamples: int) -> torch.Tensor:
    """Share of each bin (R, bins²) that masks cover, fp32, from `subsamples`² cells a bin (R, cells, cells)."""
    return F.avg_pool2d(coverage[:, None].float(), subsamples).flatten(1)


def box_geometry(boxes_R4: torch.Tensor, sizes_R2: torch.Tensor) -> torch.Tensor:
    """Boxes (R, 4) as fractions of the image, then their width and height over the image's shorter side: (R, 6)."""
    height, width = sizes_R2.to(boxes_R4.dtype).unbind(-1)
    extent = (boxes_R4[:, 2:] - boxes_R4[:, :2]) * torch.stack((width, height), -1)
    return torch.cat((boxes_R4, extent / torch.minimum(width, height)[:, None]), dim=-1)


class RegionReplay(nn.Module):
    """RoI tokens: the RoI-aligned features of a region and, under `replay`, what its mask looks like in each bin."""

    def __init__(self, config):
        super().__init__()
        self.bins = config.roi_size
        self.conditioned = config.region_conditioning == "replay"
        self.geometry = self.conditioned and config.region_geometry
        self.gain = config.region_gain
        width = config.text_config.hidden_size
        if self.conditioned:
            self.coverage_proj = nn.Linear(config.coverage_subsamples**2, width)
            self.bin_embedding = nn.Embedding(self.bins**2, width)
        if self.geometry:
            self.geometry_proj = nn.Linear(6, width)

    def forward(self, features: torch.Tensor, coverage: torch.Tensor | None, geometry_R6: torch.Tensor) -> torch.Tensor:
        """Condition RoI features (R, bins², D) on coverage (R, cells, cells) in [0, 1] and geometry (R, 6)."""
        if not self.conditioned:
            return features
        assert coverage is not None  # checked with the inputs
        dtype, cells = features.dtype, coverage.shape[-1] // self.bins
        bin_cells = F.unfold(coverage[:, None].to(dtype), cells, stride=cells).transpose(1, 2)  # (R, bins², cells²)
        places = torch.arange(self.bins**2, device=features.device)
        tokens = features + self.gain * self.coverage_proj(bin_cells) + self.bin_embedding(places)
        if self.geometry:
            tokens = tokens + self.gain * self.geometry_proj(geometry_R6.to(dtype))[:, None]
        return tokens
