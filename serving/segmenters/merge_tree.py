"""A tree of regions: superpixels, merged with their neighbours until one region is left.

Superpixels are SLIC's (Achanta et al. 2012). Of all neighbours the two that are most alike merge next. Unlike are those
whose colours differ (mean and histogram) and that have an edge between them; the cost of a merge also grows with the
size of both, so that the parts of a thing come together before they join what surrounds it, and falls with the share of
their border that they have in common, so that what is enclosed joins what encloses it (as in selective search,
Uijlings et al. 2013). scikit-image makes the superpixels and their graph.

Shape legend: h, w rows and columns of the working copy, S superpixels, M = 2 S - 1 nodes of the tree, K colour bins.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


try:
    from skimage import color, filters, graph, segmentation
except ImportError as error:
    raise ImportError('the classical segmenter needs scikit-image: pip install "perceptiondlm[segment]"') from error

EDGE_WEIGHT = 3.0  # of the mean gradient along a border (0 to 1) beside the distance of colours (0 to 1)
MEANS_SHARE = 0.5  # of the distance of mean colours in that of colours; histograms have the rest
FARTHEST = 60.0  # distance of mean colours in Lab from which on it counts as 1
SMALL_FIRST = 0.15  # power of the product of both areas, as shares of the image, in the cost of a merge
ENCLOSED_FIRST = 0.5  # power of the share of the border in common
BINS = (6, 6, 6)  # of colours, for L, a and b
BANDWIDTH, ROUNDS = 7.0, 5  # of the models of colours beside and inside a box, in Lab; of their refinement
COMPACTNESS = 10.0  # of superpixels
LARGER, LARGER_AROUND = 1.3, 0.6  # power of the area in the worth of a region, of everything and around points
INNER, FAINT = (
    1.0,
    0.3,
)  # what lowers contrast: a share of what is unlike inside, and a constant, so that faint borders do
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
        contrast_M: how much a node stands out, in [0, 1]: how unlike its neighbours are along its border, against that
            and how unlike the two were that it was merged from; 0 for the whole image.
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
        merges = _Merges(labels, lab, filters.sobel(color.rgb2gray(image_hw3)))
        merges.run()
        members = np.zeros((len(merges.outer), len(merges.areas)), bool)
        members[np.arange(len(merges.areas)), np.arange(len(merges.areas))] = True
        for node, pair in enumerate(merges.children, start=len(merges.areas)):
            members[node] = members[pair[0]] | members[pair[1]]
        outer, inner = np.array(merges.outer), np.array(merges.inner)
        contrast = outer / (outer + INNER * inner + FAINT)
        contrast[-1] = 0.0
        edges = (labels[0], labels[-1], labels[:, 0], labels[:, -1])
        sides = sum(
            (members[:, np.unique(edge)].any(axis=1).astype(int) for edge in edges), np.zeros(len(members), int)
        )
        return cls(labels, merges.colours, members, merges.children, members @ merges.areas, contrast, sides)

    def mask(self, members_S: np.ndarray) -> np.ndarray:
        """The pixels of superpixels, bool (h, w)."""
        return members_S[self.labels_hw]

    def best_partition(self, least_share: float, most_share: float, least_contrast: float) -> list[int]:
        """The nodes, no two overlapping, whose contrasts sum to most, each weighed by a power of its area."""
        pixels = self.labels_hw.size
        fits = (self.areas_M >= least_share * pixels) & (self.areas_M <= most_share * pixels)
        fits &= (self.contrast_M >= least_contrast) & (self.sides_M < SIDES - 1)
        worth = np.where(fits, self.contrast_M * self.areas_M**LARGER, 0.0)
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
        worth = self.contrast_M[candidates] * self.areas_M[candidates] ** LARGER_AROUND
        return int(candidates[worth.argmax()])

    def unlike_ring(self, inner_hw: np.ndarray, ring_hw: np.ndarray) -> np.ndarray:
        """The superpixels inside that look more like each other than like the ring around them, bool (S,).

        Both sides get a model of their colours, the likelier side takes each superpixel, and again, until it settles.
        """
        count = len(self.colours_S3)
        total = np.bincount(self.labels_hw.ravel(), minlength=count).astype(np.float64)
        inside = np.bincount(self.labels_hw[inner_hw], minlength=count)
        around = np.bincount(self.labels_hw[ring_hw], minlength=count)
        own = inside > 0.5 * total
        if not own.any() or not around.any():
            return inside > 0
        near_SS = np.exp(-0.5 * (np.linalg.norm(self.colours_S3[:, None] - self.colours_S3, axis=2) / BANDWIDTH) ** 2)
        chosen, outer = own, np.where(own, 0.0, around.astype(np.float64))
        for _ in range(ROUNDS):
            inner_model = near_SS @ (total * chosen) / total[chosen].sum()
            outer_weights = outer + total * (own & ~chosen)
            outer_model = near_SS @ outer_weights / max(outer_weights.sum(), 1.0)
            following = own & (inner_model > outer_model)
            if not following.any() or (following == chosen).all():
                break
            chosen = following
        return chosen

    def contrast_of(self, members_S: np.ndarray) -> float:
        """Distance of the mean colour of superpixels from that of the others, in [0, 1]."""
        if members_S.all() or not members_S.any():
            return 0.0
        sizes = np.bincount(self.labels_hw.ravel(), minlength=len(members_S))
        means = [np.average(self.colours_S3[part], axis=0, weights=sizes[part]) for part in (members_S, ~members_S)]
        return min(1.0, float(np.linalg.norm(means[0] - means[1])) / FARTHEST)


class _Merges:
    """One run of hierarchical merging, and what it merged. Every region has a place of S; a merged one keeps its first.

    Attributes:
        children: of every merge, the two nodes.
        inner, outer: of every node, how unlike its two were, and how unlike its neighbours were when it came to be.
    """

    def __init__(self, labels_hw: np.ndarray, lab_hw3: np.ndarray, edges_hw: np.ndarray):
        flat, self.pixels = labels_hw.ravel(), labels_hw.size
        self.areas = np.bincount(flat).astype(np.float64)
        count = len(self.areas)
        self.sums_S3 = np.stack([np.bincount(flat, lab_hw3[..., c].ravel()) for c in range(3)], axis=1)
        self.colours = self.sums_S3 / self.areas[:, None]
        self.histograms_SK = color_histograms(flat, lab_hw3.reshape(-1, 3), count)
        squares = np.bincount(flat, (lab_hw3**2).sum(axis=2).ravel()) / self.areas
        rough_S = np.sqrt(np.maximum(squares - (self.colours**2).sum(axis=1), 0)) / FARTHEST
        # The length of the border of two regions, and the sum of the gradient along it.
        self.common_SS, self.edges_SS = np.zeros((count, count)), np.zeros((count, count))
        if count > 1:
            for one, other, data in graph.rag_boundary(labels_hw, edges_hw).edges(data=True):
                self.common_SS[one, other] = self.common_SS[other, one] = data["count"]
                self.edges_SS[one, other] = self.edges_SS[other, one] = data["weight"] * data["count"]
        self.children: list[tuple[int, int]] = []
        self.nodes_S = np.arange(count)  # the node that stands at each place
        self.unlike_SS = np.stack([self.unlike(place) for place in range(count)])
        self.inner = np.minimum(1.0, rough_S).tolist()
        self.outer = [self.outside(place) for place in range(count)]

    def run(self) -> None:
        """Merge until one region is left."""
        borders_S, sizes_S = self.common_SS.sum(axis=1), self.areas.copy()
        costs_SS = np.stack([self.costs(place, borders_S, sizes_S) for place in range(len(sizes_S))])
        for _ in range(len(sizes_S) - 1):
            kept, gone = sorted(divmod(int(costs_SS.argmin()), len(sizes_S)))
            self.children.append((int(self.nodes_S[kept]), int(self.nodes_S[gone])))
            self.inner.append(self.unlike_SS[kept, gone])
            self.nodes_S[kept] = len(sizes_S) + len(self.children) - 1
            borders_S[kept] += borders_S[gone] - 2 * self.common_SS[kept, gone]
            for sums in (self.sums_S3, self.histograms_SK, sizes_S):
                sums[kept] += sums[gone]
            for pairs_SS in (self.common_SS, self.edges_SS):
                pairs_SS[kept] += pairs_SS[gone]
                pairs_SS[kept, kept] = pairs_SS[kept, gone] = 0
                pairs_SS[:, kept] = pairs_SS[kept]
                pairs_SS[gone] = pairs_SS[:, gone] = 0
            self.unlike_SS[kept] = self.unlike_SS[:, kept] = self.unlike(kept)
            self.outer.append(self.outside(kept))
            costs_SS[kept] = costs_SS[:, kept] = self.costs(kept, borders_S, sizes_S)
            costs_SS[gone] = costs_SS[:, gone] = np.inf

    def unlike(self, place: int) -> np.ndarray:
        """Distance of a region from every other by colour and by the edge between them, (S,)."""
        sizes_S1 = self.histograms_SK.sum(axis=1, keepdims=True)
        means_S3, shares_SK = self.sums_S3 / sizes_S1, self.histograms_SK / sizes_S1
        apart_S = np.minimum(1.0, np.linalg.norm(means_S3 - means_S3[place], axis=1) / FARTHEST)
        shared_S = np.minimum(shares_SK, shares_SK[place]).sum(axis=1)
        edge_S = self.edges_SS[place] / np.maximum(self.common_SS[place], 1)
        return MEANS_SHARE * apart_S + (1 - MEANS_SHARE) * (1 - shared_S) + EDGE_WEIGHT * edge_S

    def costs(self, place: int, borders_S: np.ndarray, sizes_S: np.ndarray) -> np.ndarray:
        """Cost of merging a region with every other, infinite for those that are no neighbours, (S,)."""
        sizes = (sizes_S * sizes_S[place] / self.pixels**2) ** SMALL_FIRST
        common = self.common_SS[place] / np.maximum(1.0, np.minimum(borders_S, borders_S[place]))
        with np.errstate(divide="ignore"):
            costs_S = self.unlike_SS[place] * sizes / common**ENCLOSED_FIRST
        return np.where(self.common_SS[place] > 0, costs_S, np.inf)

    def outside(self, place: int) -> float:
        """How unlike the neighbours of a region are, weighed by the border in common."""
        common_S = self.common_SS[place]
        return float(self.unlike_SS[place] @ common_S / common_S.sum()) if common_S.any() else 0.0


def color_histograms(labels_N: np.ndarray, lab_N3: np.ndarray, count: int) -> np.ndarray:
    """Pixels of each colour bin in each superpixel, float64 (S, K)."""
    low, high = np.array([0.0, -60.0, -60.0]), np.array([100.0, 60.0, 60.0])
    places_N3 = np.clip(((lab_N3 - low) / (high - low) * BINS).astype(int), 0, np.array(BINS) - 1)
    bins_N = np.ravel_multi_index(tuple(places_N3.T), BINS)
    total = int(np.prod(BINS))
    return np.bincount(labels_N * total + bins_N, minlength=count * total).reshape(count, total).astype(np.float64)
