"""Memory of captioning N regions of one image, by formula: what is held, and what a moment's arithmetic takes on top.

    python -m perceptiondlm.studies.memory_model --regions 1 6 20 60 200

Counts the tensors that `generate` holds in the isolated layout with its cache, under `replay`. A run goes through
moments (the vision tower, the regions' features, the two prefills, a pass, scoring); its peak is the largest of them.
Kernels' own buffers are not counted, nor what an allocator keeps. The terms come from reading the model's code; a test
compares their sums with measured allocations.

Legend: as in sequence_perceptiondlm; b bytes of a number in the model's dtype.
"""

import argparse
from dataclasses import dataclass
from functools import cached_property

import torch

from perceptiondlm.checkpoints.convert import target_shapes
from perceptiondlm.configuration_perceptiondlm import PerceptionDLMConfig
from perceptiondlm.sampling_perceptiondlm import LOGITS_AT_ONCE


CARDS = {"24 GB": 24 * 2**30, "80 GB": 80 * 2**30}
RESERVED = (
    10**9
)  # of a card, for the driver's context, kernels' buffers and what the allocator cannot use: an allowance
REGIONS = (1, 6, 20, 60, 200)
PROMPT = (7, 1823)  # tiles, and shared tokens with the default turns in the embedded model's tokenizer


@dataclass
class MemoryModel:
    """Memory of one image's captions.

    Args:
        config: of a model in the isolated layout under `replay`, its heads of keys as many as of queries.
        tiles: T; shared_tokens: S, image tokens included; slots: G.
        itemsize: b.
        copies_casts: whether sums of numbers in two dtypes copy one of them first, as PyTorch does on the CPU.
    """

    config: PerceptionDLMConfig
    tiles: int
    shared_tokens: int
    slots: int = 32
    itemsize: int = 2
    copies_casts: bool = False

    def __post_init__(self):
        text = self.config.text_config
        if self.config.attention_layout != "isolated" or self.config.region_conditioning != "replay":
            raise ValueError(
                "the formula is that of attention_layout='isolated' and region_conditioning='replay', got "
                f"{self.config.attention_layout!r} and {self.config.region_conditioning!r}"
            )
        if text.num_key_value_heads != text.num_attention_heads:
            raise ValueError(
                f"the formula counts as many heads of keys as of queries: got {text.num_key_value_heads} and "
                f"{text.num_attention_heads}"
            )
        self.width = text.hidden_size * self.itemsize  # of a token's hidden state, in bytes
        self.inner = text.intermediate_size * self.itemsize
        self.span = self.config.roi_size**2 + 1

    @cached_property
    def weights(self) -> int:
        """All weights."""
        return self.itemsize * sum(int(torch.Size(shape).numel()) for shape in target_shapes(self.config).values())

    @property
    def pixels(self) -> int:
        """Tiles in bytes, as they come from the processor."""
        return self.tiles * 3 * self.config.vision_config.image_size**2

    @property
    def image(self) -> int:
        """Image tokens, held while their image is captioned."""
        return self.tiles * self.config.tokens_per_side**2 * self.width

    def keys_and_values(self, tokens: int) -> int:
        """Of so many tokens, in all layers."""
        return 2 * self.config.text_config.num_hidden_layers * tokens * self.width

    @property
    def prefix(self) -> int:
        """Keys and values of the shared tokens."""
        return self.keys_and_values(self.shared_tokens)

    def spans(self, regions: int) -> int:
        """Keys and values of N RoI spans."""
        return self.keys_and_values(regions * self.span)

    def vision(self) -> int:
        """The vision tower: pixels in fp32 and in the model's dtype beside the largest moment of a layer."""
        vision = self.config.vision_config
        patches = self.tiles * self.config.patches_per_side**2
        hidden, inner = (patches * size * self.itemsize for size in (vision.hidden_size, vision.intermediate_size))
        layer = max(7 * hidden, 3 * hidden + 2 * inner)  # attention with its projections; perceptron
        cast = 0 if self.itemsize == 4 else self.pixels * self.itemsize
        return 4 * self.pixels + max(4 * self.pixels, cast + layer)

    def regions(self, regions: int) -> int:
        """RoI-Align beside the prompt's embeddings and the image's features: a feature map, sampled points in fp32."""
        size, image = self.config.text_config.hidden_size, self.tiles * self.config.tokens_per_side**2
        grid = (self.tiles - 1 or 1) * self.config.tokens_per_side**2
        points = 4 * size * regions * (self.config.roi_size * self.config.roi_sampling_ratio) ** 2
        pooled = points // self.config.roi_sampling_ratio**2
        cast = 0 if self.itemsize == 4 else 4 * size * grid
        held = self._prompt_embeds(regions) + image * self.width
        return held + max(self._prompt_embeds(regions), grid * self.width + max(cast + points, 2 * points + pooled))

    def prefix_fill(self, regions: int) -> int:
        """Prefill of the shared tokens beside the embeddings of the whole prompt; the last layer has keys alone."""
        layer = self._layer(self.shared_tokens, behind_prefix=False)
        return self._prompt_embeds(regions) + layer - self.prefix // self.config.text_config.num_hidden_layers

    def spans_fill(self, regions: int) -> int:
        """Prefill of the RoI spans beside the embeddings of the whole prompt."""
        layer = self._layer(regions * self.span) - self.spans(regions) // self.config.text_config.num_hidden_layers
        return self._prompt_embeds(regions) + layer

    def one_pass(self, regions: int) -> int:
        """A pass over N answers."""
        tokens = 1 + self.slots
        return self._layer(regions * tokens, own=(self.span + tokens) / tokens)

    def scoring(self, regions: int) -> int:
        """Logits of a bounded number of slots in the model's dtype and in fp32, and their probabilities."""
        vocabulary = self.config.text_config.vocab_size
        slots = regions * self.slots
        rows = min(slots, max(1, LOGITS_AT_ONCE // vocabulary))
        cast = 0 if self.itemsize == 4 else self.itemsize
        return rows * vocabulary * (cast + 8) + (2 * slots + regions) * self.width

    def moments(self, regions: int) -> dict[str, int]:
        """Everything that is there at each moment of captioning N regions, weights included."""
        given = self.weights + self.pixels
        kept = given + self.image + self.prefix
        return {
            "vision": given + self.vision(),
            "regions": given + self.image + self.regions(regions),
            "prefix": kept + self.prefix_fill(regions),
            "spans": kept + self.spans(regions) + self.spans_fill(regions),
            "pass": kept + self.spans(regions) + self.one_pass(regions),
            "scoring": kept + self.spans(regions) + self.scoring(regions),
        }

    def peak(self, regions: int) -> int:
        """Memory that captioning N regions in one pass takes."""
        return max(self.moments(regions).values())

    def largest_group(self, capacity: int) -> int:
        """The most regions of one pass that fit into so many bytes, 0 if none does."""
        if self.peak(1) > capacity:
            return 0
        low, high = 1, 2
        while self.peak(high) <= capacity:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.peak(middle) <= capacity else (low, middle)
        return low

    def _prompt_embeds(self, regions: int) -> int:
        return (self.shared_tokens + regions * self.span) * self.width

    def _layer(self, tokens: int, behind_prefix: bool = True, own: float = 0.0) -> int:
        """The largest moment of a layer of the language model.

        Args:
            tokens: of all sequences.
            own: keys that are put together for a token's own part of attention, per token; 0 where none are.
        """
        text = self.config.text_config
        width, inner = tokens * self.width, tokens * self.inner
        perceptron = 4 * width + 3 * inner  # inputs, hidden, residual, normalised; activated, up, product
        rotating = 10 * width
        merging = 0
        if behind_prefix:  # inputs, hidden, normalised, queries, keys, values, two outputs; some of those in fp32
            apart = 4 if self.copies_casts and self.itemsize != 4 else 0
            merging = round((8 + (8 + apart) / self.itemsize + 2 * own) * width)
        rotation = 2 * width // text.num_attention_heads
        return max(perceptron, rotating, merging) + rotation


def table(model: MemoryModel, regions: tuple[int, ...] | list[int] = REGIONS) -> str:
    """Memory over the number of regions as Markdown, and whether it fits the cards; the last row: what fits at most."""
    cards = list(CARDS)
    lines = [
        "| regions | weights | shared prefix | RoI spans | a pass | scoring | peak | "
        + " | ".join(f"{card} card" for card in cards)
        + " |",
        "| " + " | ".join(["---"] * (7 + len(cards))) + " |",
    ]
    for count in regions:
        parts = (model.weights, model.prefix, model.spans(count), model.one_pass(count), model.scoring(count))
        peak = model.peak(count)
        fits = ["fits" if peak <= CARDS[card] - RESERVED else "does not fit" for card in cards]
        cells = [str(count), *(gigabytes(part) for part in (*parts, peak)), *fits]
        lines.append("| " + " | ".join(cells) + " |")
    largest = [f"{model.largest_group(CARDS[card] - RESERVED):,}" for card in cards]
    lines.append("| " + " | ".join(["largest group", *[""] * 6, *largest]) + " |")
    return "\n".join(lines)


def gigabytes(num_bytes: float) -> str:
    """Bytes for a table, in GB."""
    return f"{num_bytes / 1e9:.2f}"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--regions", type=int, nargs="+", default=list(REGIONS), metavar="N")
    options = parser.parse_args()
    if min(options.regions) < 1:
        parser.error(f"--regions must be at least 1, got {options.regions}")
    print(table(MemoryModel(PerceptionDLMConfig.from_preset("8b"), *PROMPT), options.regions))


if __name__ == "__main__":
    main()
