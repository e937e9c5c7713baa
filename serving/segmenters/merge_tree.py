"""A tree of regions: superpixels, merged with their neighbours until one region is left.

Superpixels are SLIC's (Achanta et al. 2012). Of all neighbours the two that are most alike merge next: the distance of
their mean colours plus the edge along their border, times a power of the smaller one's area, so that small regions go
first. scikit-image does both; this file remembers what merged, and asks the tree.

Shape legend: h, w rows and columns of the working copy, S superpixels, M = 2 S - 1 nodes of the tree.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


try:
    from skimage import color, filters, graph, segmentation
except ImportError as error:
    raise ImportError('the classical segmenter needs scikit-image: pip install "perceptiondlm[segment]"') from error

EDGE_WEIGHT = 100.0  # of the edge along a border (gradient in [0, 1]) beside the distance of colours in Lab
SMALL_FIRST = 0.25  # power of the smaller one's area, as a share of the image, in the cost of a merge
COMPACTNESS = 10.0  # of superpixels
SIDES = 4  # of an image; a region that touches three of them surrounds others


@dataclass(frozen=True)
class MergeTree:
    """All regions that merging passes through; nodes 0 to S - 1 are superpixels, the last is the whole image.

    Attributes:
        labels_hw: superpixel of every pixel, int64.
        colours_S3: mean colours of the superpixels in Lab.
        members_MS: which superpixels each node holds, bool.
        children: of node S + i, the two nodes that it was merged from.
        areas_M: pixels of each node on the working copy.
        contrast_M: how much a node stands out, in [0, 1]: 1 - cost of its last inner merge / cost of the merge that
            took it up, each weighed alike; 0 for the whole image.
        sides_M: how many of the image's four sides each node touches.
    """

    labels_hw: np.ndarray
    colours_S3: np.ndarray
    members_MS: np.ndarray
    children: list[tuple[int, int]]
    areas_M: np.ndarray
    contrast_M: np.ndarray
    sides_M: np.ndarray

    @classmethod
    def of_image(cls, image_hw3: np.ndarray, superpixels: int) -> MergeTree:
        """The tree of an RGB image, uint8 (h, w, 3)."""
        lab = color.rgb2lab(image_hw3)
        labels = segmentation.slic(lab, superpixels, COMPACTNESS, convert2lab=False, start_label=0, channel_axis=-1)
        labels = np.unique(labels, return_inverse=True)[1].reshape(labels.shape)
        areas = np.bincount(labels.ravel())
        sums = np.stack([np.bincount(labels.ravel(), lab[..., c].ravel()) for c in range(3)], axis=1)
        merges = _Merges(labels, sums, areas, filters.sobel(color.rgb2gray(image_hw3)))
        children, costs = merges.run()
        return cls._of_merges(labels, sums / areas[:, None], areas, children, costs)

    @classmethod
    def _of_merges(cls, labels, colours, areas, children, costs) -> MergeTree:
        count = len(areas)
        members = np.zeros((count + len(children), count), bool)
        members[np.arange(count), np.arange(count)] = True
        formed, taken = np.zeros(len(members)), np.zeros(len(members))
        for node, (pair, cost) in enumerate(zip(children, costs, strict=True), start=count):
            members[node] = members[pair[0]] | members[pair[1]]
            formed[node] = max(cost, formed[pair[0]], formed[pair[1]])
            taken[list(pair)] = cost
        contrast = np.clip(1 - formed / np.maximum(taken, 1e-9), 0, 1)
        contrast[-1] = 0.0
        edges = (labels[0], labels[-1], labels[:, 0], labels[:, -1])
        sides = sum((members[:, np.unique(edge)].any(axis=1).astype(int) for edge in edges), np.zeros(len(members), int))
        return cls(labels, colours, members, children, members @ areas, contrast, sides)

    def mask(self, members_S: np.ndarray) -> np.ndarray:
        """The pixels of superpixels, bool (h, w)."""
        return members_S[self.labels_hw]

    def best_partition(self, least_share: float, most_share: float, least_contrast: float) -> list[int]:
        """The nodes, no two overlapping, whose contrasts sum to most, each weighed by the root of its area."""
        pixels = self.labels_hw.size
        fits = (self.areas_M >= least_share * pixels) & (self.areas_M <= most_share * pixels)
        fits &= (self.contrast_M >= least_contrast) & (self.sides_M < SIDES - 1)
        worth = np.where(fits, self.contrast_M * np.sqrt(self.areas_M), 0.0)
        count = len(self.colours_S3)
        best, kept = worth.copy(), fits.copy()
        for node, (left, right) in enumerate(self.children, start=count):
            inner = best[left] + best[right]
            kept[node] = fits[node] and worth[node] >= inner
            best[node] = max(worth[node], inner)
        found, waiting = [], [len(worth) - 1]
        while waiting:
            node = waiting.pop()
            if kept[node]:
                found.append(node)
            elif node >= count:
                waiting += self.children[node - count]
        return found

    def best_around(self, inside: list[int], outside: list[int], most_share: float) -> int | None:
        """The node that holds all superpixels `inside` and none `outside`, and stands out most; None if none does."""
        holds = self.members_MS[:, inside].all(axis=1) & ~self.members_MS[:, outside].any(axis=1)
        small = holds & (self.areas_M <= most_share * self.labels_hw.size)
        candidates = np.flatnonzero(small if small.any() else holds)
        if not candidates.size:
            return None
        worth = self.contrast_M[candidates] * self.areas_M[candidates] ** 0.25
        return int(candidates[worth.argmax()])

    def unlike_ring(self, inner_hw: np.ndarray, ring_hw: np.ndarray) -> np.ndarray:
        """The superpixels with most of their pixels inside that no colour of the ring comes close to, bool (S,)."""
        count = len(self.colours_S3)
        inside = np.bincount(self.labels_hw[inner_hw], minlength=count)
        around = np.bincount(self.labels_hw[ring_hw], minlength=count)
        total = np.bincount(self.labels_hw.ravel(), minlength=count)
        own = inside > 0.5 * total
        surrounding = (around > 0) & ~own
        if not surrounding.any() or not own.any():
            return inside > 0
        apart = np.linalg.norm(self.colours_S3[:, None] - self.colours_S3[None, surrounding], axis=2).min(axis=1)
        limit = _two_groups(apart[own], total[own])
        return own & (apart > limit)

    def contrast_of(self, members_S: np.ndarray) -> float:
        """Distance of the mean colour of superpixels from that of the others, in [0, 1] (1 from 50 in Lab on)."""
        if members_S.all() or not members_S.any():
            return 0.0
        sizes = np.bincount(self.labels_hw.ravel(), minlength=len(members_S))
        means = [np.average(self.colours_S3[part], axis=0, weights=sizes[part]) for part in (members_S, ~members_S)]
        return float(min(1.0, np.linalg.norm(means[0] - means[1]) / 50))


def _two_groups(values: np.ndarray, weights: np.ndarray) -> float:
    """The threshold that splits weighted values into two groups best (Otsu 1979)."""
    repeated = np.repeat(values, np.maximum(1, weights // 8))
    return float(filters.threshold_otsu(repeated)) if np.ptp(repeated) > 0 else -1.0


class _Merges:
    """One run of hierarchical merging, and what it merged."""

    def __init__(self, labels: np.ndarray, sums_S3: np.ndarray, areas_S: np.ndarray, edges_hw: np.ndarray):
        self.labels, self.pixels = labels, labels.size
        self.graph = graph.rag_boundary(labels, edges_hw)  # edges carry "weight" (mean gradient) and "count"
        for node, data in self.graph.nodes(data=True):
            data.update(sum=sums_S3[node], area=int(areas_S[node]), tree=node)
        for one, other, data in self.graph.edges(data=True):
            data["edge"] = data["weight"]
            data["weight"] = self.cost(self.graph.nodes[one], self.graph.nodes[other], data["edge"])
        self.children: list[tuple[int, int]] = []
        self.costs: list[float] = []

    def run(self) -> tuple[list[tuple[int, int]], list[float]]:
        """Merge until one region is left."""
        graph.merge_hierarchical(
            self.labels, self.graph, thresh=np.inf, rag_copy=False, in_place_merge=True,
            merge_func=self.merge, weight_func=self.weigh,
        )  # fmt: skip
        return self.children, self.costs

    def cost(self, one: dict[str, Any], other: dict[str, Any], edge: float) -> float:
        apart = np.linalg.norm(one["sum"] / one["area"] - other["sum"] / other["area"])
        return float((apart + EDGE_WEIGHT * edge) * (min(one["area"], other["area"]) / self.pixels) ** SMALL_FIRST)

    def merge(self, rag: Any, source: int, target: int) -> None:
        """What scikit-image calls before two regions become one."""
        one, other = rag.nodes[source], rag.nodes[target]
        self.costs.append(rag[source][target]["weight"])
        self.children.append((one["tree"], other["tree"]))
        other.update(
            sum=one["sum"] + other["sum"], area=one["area"] + other["area"],
            tree=self.labels.max() + len(self.children),
        )  # fmt: skip

    def weigh(self, rag: Any, source: int, target: int, neighbour: int) -> dict[str, float]:
        """What scikit-image calls for every neighbour of a merged region."""
        none = {"edge": 0.0, "count": 0}
        one, other = (rag[node].get(neighbour, none) for node in (source, target))
        count = one["count"] + other["count"]
        edge = (one["edge"] * one["count"] + other["edge"] * other["count"]) / count
        return {"weight": self.cost(rag.nodes[target], rag.nodes[neighbour], edge), "edge": edge, "count": count}
