"""Denoising passes: what is kept between them, and what each of them runs.

Legend: B rows of the batch, L prompt tokens, R regions, A answers, G slots per answer, X tokens of a pass.
"""

from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch

from .layout_perceptiondlm import AnswerLayout, Prompt


PROMPT_BUCKET = 256  # compiled passes see prompts padded to a multiple of this
COMPILE_OPTIONS: dict[str, Any] = {"fullgraph": True, "dynamic": False}
MAX_GRAPHS = 64  # compiled shapes of one model: lengths of the prompt times numbers of regions, each in buckets

_compiled: WeakKeyDictionary = WeakKeyDictionary()


class PrefixCache:
    """Keys and values of the prompt. Every pass writes its own behind them, in place; `keep` makes those part of them.

    Args:
        num_layers: of the language model.
        capacity: tokens of the prefix and of the longest pass after it.
    """

    def __init__(self, num_layers: int, capacity: int):
        self.capacity, self.length = capacity, 0
        self.buffers: list[tuple[torch.Tensor, torch.Tensor] | None] = [None] * num_layers

    def update(self, key, value, layer_idx, *_args, **_kwargs):
        """Store (B, heads, X, d) keys and values of a layer and return all it may attend to."""
        pair = self.buffers[layer_idx]
        if pair is None:
            shape = (*key.shape[:2], self.capacity, key.shape[3])
            pair = self.buffers[layer_idx] = (key.new_empty(shape), value.new_empty(shape))
        end = self.length + key.shape[2]
        for buffer, new in zip(pair, (key, value), strict=True):
            buffer[:, :, self.length : end] = new
        return tuple(buffer[:, :, :end] for buffer in pair)

    def keep(self, num_tokens: int) -> None:
        """Add the tokens of the last pass to the prefix."""
        self.length += num_tokens

    def start_from(self, other: "PrefixCache", rows: torch.Tensor) -> None:
        """Begin with the prefix of chosen rows of another cache."""
        for layer, pair in enumerate(other.buffers):
            assert pair is not None  # every layer has seen the prefix
            self.update(*(tensor[rows, :, : other.length] for tensor in pair), layer)
        self.keep(other.length)

    def rows(self, index_B: torch.Tensor) -> "PrefixCache":
        """The cache of some rows of the batch."""
        part = PrefixCache(len(self.buffers), self.capacity)
        part.length = self.length
        part.buffers = [None if pair is None else (pair[0][index_B], pair[1][index_B]) for pair in self.buffers]
        return part

    @property
    def num_bytes(self) -> int:
        """Memory of all buffers."""
        return sum(tensor.nbytes for pair in self.buffers if pair is not None for tensor in pair)


@dataclass
class EncodedImage:
    """An image encoded once, to be captioned as often as wanted (made by `encode_image`).

    It stands for the image in the processor and in the pipeline. What was computed for a question's shared tokens
    (system turn, image, question) is kept, too, so that further regions cost only their own tokens.

    Args:
        tiles: (T, n, n, D) image tokens.
        tile_grids: (1, 2) columns and rows; image_sizes: (1, 2) height and width in pixels.
        prefixes: keys and values of the shared tokens, by those tokens' ids.
    """

    tiles: torch.Tensor
    tile_grids: torch.Tensor
    image_sizes: torch.Tensor
    prefixes: dict[tuple[int, ...], PrefixCache] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        """Memory held: `tiles`, and 2 * layers * shared tokens * width for every question asked so far."""
        return self.tiles.nbytes + sum(prefix.num_bytes for prefix in self.prefixes.values())


class Denoiser:
    """Scores the slots of the running answers, pass after pass.

    What a pass runs depends on who looks at captions:

    - isolated: nothing but themselves. The prompt's keys and values are computed once and exact; a pass runs the
      answers alone.
    - released, full: the prompt does. Every `refresh_interval`-th pass runs the whole sequence, which is exact if all
      do; those between run the answers alone, on the prompt's keys and values of the last whole pass.

    Flash attention takes no mask: every region then gets a row of its own, on a copy of its image's prefix.

    Args:
        model: a [`PerceptionDLMForConditionalGeneration`].
        prompt: its prompt.
        num_slots: G.
        encoded_image: where the shared tokens' keys and values are kept between calls.
        use_cache: whether the prompt's keys and values are kept between passes.
        refresh_interval: see above.
        compiled: run passes through `torch.compile`, in shapes that recur: the prompt padded to a multiple of
            `PROMPT_BUCKET`, the answers of a row to a power of two.
    """

    def __init__(
        self,
        model: Any,
        prompt: Prompt,
        num_slots: int,
        encoded_image: EncodedImage | None = None,
        use_cache: bool = True,
        refresh_interval: int = 1,
        compiled: bool = False,
    ):
        self.model, self.compiled, self.refresh_interval = model, compiled, refresh_interval
        self.exact = model.config.attention_layout == "isolated"
        self.passes = 0
        checkpointed = model.training and model.language_model.layers[0].gradient_checkpointing
        use_cache = use_cache and not checkpointed and (self.exact or refresh_interval > 1)  # those layers get no cache
        unpacked = self.exact and use_cache and "flash" in model.config.text_config._attn_implementation
        packed, num_shared, row_R = prompt, 0, None
        if unpacked or (encoded_image is not None and use_cache):
            packed, num_shared = prompt.shared_first()
            prompt, row_R = packed, torch.arange(len(packed.ids), device=packed.ids.device)
        if unpacked:
            prompt, row_R = packed.one_region_per_row(num_shared)
        if compiled:
            length = -(-prompt.ids.shape[1] // PROMPT_BUCKET) * PROMPT_BUCKET
            prompt = prompt.pad_to(length, model.config.end_of_text_token_id)
        bare = not prompt.num_regions.any()
        answers = int(prompt.num_regions.clamp(min=1).sum())
        layout = model.lay_out_answers(prompt, answers, num_slots, bare=bare, round_blocks=compiled)
        cache = None
        if use_cache:
            layers = model.config.text_config.num_hidden_layers
            cache = PrefixCache(layers, prompt.ids.shape[1] + layout.num_blocks * layout.width)
            if self.exact:
                if row_R is not None:
                    self._start(cache, packed.tokens(0, num_shared), encoded_image, row_R)
                self._extend(cache, prompt)
        self.everything = (prompt, layout, cache)
        self.layout: AnswerLayout | None = None
        self.run_all()

    def _start(self, cache: PrefixCache, shared: Prompt, encoded_image: EncodedImage | None, row_R) -> None:
        """Fill a cache with the keys and values of the shared tokens, each image's for all of its rows."""
        if encoded_image is None:
            prefix = PrefixCache(len(cache.buffers), shared.ids.shape[1])
            self._extend(prefix, shared)
            cache.start_from(prefix, row_R)
            return
        if (shared.ids != shared.ids[:1]).any():
            raise ValueError("all rows of a call on an encoded image must ask the same question about it")
        key = tuple(shared.ids[0].tolist())
        if key not in encoded_image.prefixes:
            prefix = PrefixCache(len(cache.buffers), shared.ids.shape[1])
            self._extend(prefix, shared.rows(torch.zeros(1, dtype=torch.int64)))
            encoded_image.prefixes[key] = prefix
        cache.start_from(encoded_image.prefixes[key], torch.zeros_like(row_R))

    def _extend(self, cache: PrefixCache, prompt: Prompt) -> None:
        """Run the tokens of a prompt that a cache does not hold yet, and keep them."""
        if cache.length == prompt.ids.shape[1]:
            return
        new = prompt.tokens(cache.length)
        mask = self.model.attention_mask(new.roles, prompt.roles)
        self.model.language_model.fill(new.embeds, mask, new.positions, cache)
        cache.keep(new.ids.shape[1])

    def _run_on(self, prompt: Prompt, layout: AnswerLayout, cache: PrefixCache | None) -> None:
        self.prompt, self.layout, self.cache = prompt, layout, cache
        self.mask = None if cache is None else self.model.attention_mask(layout.roles, prompt.roles.cat(layout.roles))

    def run_all(self) -> None:
        """Run all answers from now on."""
        if self.layout is not self.everything[1]:
            self._run_on(*self.everything)

    def select(self, index_A: torch.Tensor) -> None:
        """Run these answers alone from now on (A',), and the rows they are in; compiled passes keep all rows."""
        prompt, layout, cache = self.everything
        rows = torch.arange(len(prompt.ids), device=index_A.device) if self.compiled else layout.row_A[index_A].unique()
        if len(rows) < len(prompt.ids):
            prompt = prompt.rows(rows)
            cache = cache.rows(rows) if cache is not None else None
        self._run_on(prompt, layout.subset(index_A, rows, prompt), cache)

    def __call__(self, slots_AG: torch.Tensor) -> torch.Tensor:
        """Logits (A', G, V) for the slots of the running answers."""
        whole = self.cache is None or (not self.exact and self.passes % self.refresh_interval == 0)
        if self.cache is not None and whole:
            self.cache.length = 0
        self.passes += 1
        language_model = self.model.language_model
        run = compiled_forward(language_model) if self.compiled else language_model
        mask = None if whole else self.mask
        with many_graphs() if self.compiled else nullcontext():
            logits = self.model.score_answers(self.prompt, self.layout, slots_AG, self.cache, mask, run)
        if self.cache is not None and whole:
            self.cache.keep(self.prompt.ids.shape[1])
        return logits


def compiled_forward(language_model: torch.nn.Module):
    """The compiled forward of a language model, made at first use and kept as long as the model lives."""
    if language_model not in _compiled:
        _compiled[language_model] = torch.compile(language_model.forward, **COMPILE_OPTIONS)
    return _compiled[language_model]


def many_graphs():
    """A context in which a function may be compiled for `MAX_GRAPHS` shapes."""
    return torch._dynamo.config.patch(recompile_limit=MAX_GRAPHS)
