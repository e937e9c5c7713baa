"""Attention of the language model: what a run of tokens attends to, and the kernels that do it.

A pass gives every layer an object with one method, `attend(layer, query, key, value)`:

    MaskedPass   rows of tokens under a mask of any layout; used in training, and where the prompt sees the answers
    StaticPass   spans or answers behind prefixes that never change: no mask, and cost linear in the number of regions.
                 A query meets its own few tokens in one product and the shared prefix in another; the two are merged
                 by their log-sum-exp, which gives the softmax over both.

Legend: see sequence_perceptiondlm.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward, repeat_kv

from .cache_perceptiondlm import KeyValues, PackedCache


SCORES_AT_ONCE = 2**24  # numbers that the attention without a fused kernel holds at a time


class MaskedPass:
    """Rows of tokens under a mask.

    Args:
        allowed: bool (B, 1, X, keys), True where attention is allowed; None: all see all.
        cache: what holds the keys of earlier tokens and takes those of this pass.
    """

    def __init__(self, allowed: torch.Tensor | None, cache: PackedCache | None = None):
        self.allowed, self.cache = allowed, cache

    def attend(self, layer: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor):
        """(B, h, X, d) each to (B, X, h, d) and, from eager attention, the weights."""
        if self.cache is not None:
            key, value = self.cache.update(key, value, layer.layer_idx)
        implementation = layer.config._attn_implementation
        mask = attention_mask(self.allowed, query, implementation)
        interface = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        dropout = layer.attention_dropout if layer.training else 0.0
        return interface(layer, query, key, value, mask, dropout=dropout, scaling=layer.scaling)


class StaticPass:
    """Sequences of one length behind prefixes that never change.

    Args:
        prefixes: the prefix of each run of sequences, and how many sequences there are in the run.
        own: further keys and values that each sequence has for itself.
        own_index: which entry of `own` each sequence has, by default its own place.
        keep: takes the keys and values of this pass.
    """

    def __init__(
        self,
        prefixes: Sequence[tuple[KeyValues | None, int]],
        own: KeyValues | None = None,
        own_index: torch.Tensor | None = None,
        keep: KeyValues | None = None,
    ):
        self.prefixes, self.own, self.own_index, self.keep = prefixes, own, own_index, keep

    def attend(self, layer: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor):
        """(sequences, h, X, d) each to (sequences, X, h, d)."""
        if self.keep is not None:
            self.keep.put(layer.layer_idx, key, value)
        if self.own is not None:
            earlier = self.own.layers[layer.layer_idx]
            if self.own_index is not None:
                index = self.own_index.to(key.device)
                earlier = (earlier[0].index_select(0, index), earlier[1].index_select(0, index))
            key, value = torch.cat((earlier[0], key), dim=2), torch.cat((earlier[1], value), dim=2)
        options = (layer.scaling, layer.num_key_value_groups, layer.config._attn_implementation)
        output, lse = attend_with_lse(query, key, value, *options)
        counts, parts = [count for _, count in self.prefixes], []
        runs = zip(self.prefixes, query.split(counts), output.split(counts), lse.split(counts), strict=True)
        for (prefix, _), own_query, own, own_lse in runs:
            if prefix is not None:
                own = behind_prefix(own_query, own, own_lse, prefix.layers[layer.layer_idx], options)
            parts.append(own)
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).transpose(1, 2), None


def behind_prefix(query, output, lse, prefix: tuple[torch.Tensor, torch.Tensor], options) -> torch.Tensor:
    """Extend attention over own tokens (output (c, h, X, d), lse (c, h, X)) to a prefix (1, h, S, d) that all share."""
    count, heads, length, width = query.shape
    rows = query.transpose(0, 1).reshape(1, heads, count * length, width)
    before, before_lse = attend_with_lse(rows, *prefix, *options)
    before = before.view(heads, count, length, width).transpose(0, 1)
    before_lse = before_lse.view(heads, count, length).transpose(0, 1)
    share = torch.sigmoid(lse - before_lse).unsqueeze(3)  # of the softmax's mass that lies on the own tokens
    return (before + share * (output.float() - before)).to(query.dtype)


def attend_with_lse(query, key, value, scaling: float, groups: int, implementation: str):
    """Attention of all queries over all keys, and the log-sum-exp of each query's scores.

    PyTorch's flash kernels serve the CPU, and half precision on NVIDIA and AMD GPUs, its memory-efficient one fp32
    there. Eager attention, and devices without such a kernel, take plain products, a bounded number of scores at once.

    Args:
        query: (B, h, X, d); key, value: (B, h / groups, keys, d).
        scaling: factor on the scores; groups: queries' heads per head of keys and values.
        implementation: the model's choice; "eager" asks for plain products.
    Returns:
        (B, h, X, d) in the inputs' dtype and (B, h, X) fp32.
    """
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    kind = "plain" if implementation == "eager" else query.device.type
    if kind == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, scale=scaling)
    if kind == "cuda" and query.dtype in (torch.float16, torch.bfloat16):
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, scale=scaling)[:2]
    if kind == "cuda":
        output, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
            query, key, value, None, True, scale=scaling
        )
        return output, lse.narrow(2, 0, query.shape[2])  # the kernel rounds its length up
    return plain_attention(query, key, value, scaling)


def plain_attention(query, key, value, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
    """What `attend_with_lse` does, as matrix products; scores and softmax in fp32."""
    per_query = query.shape[0] * query.shape[1] * key.shape[2]
    outputs, sums = [], []
    for part in query.split(max(1, SCORES_AT_ONCE // per_query), dim=2):
        scores = (part @ key.transpose(2, 3)).float() * scaling
        lse = scores.logsumexp(dim=-1)
        outputs.append((scores - lse[..., None]).exp().to(value.dtype) @ value)
        sums.append(lse)
    return torch.cat(outputs, dim=2), torch.cat(sums, dim=2)


def attention_mask(allowed: torch.Tensor | None, query: torch.Tensor, implementation: str) -> torch.Tensor | None:
    """A mask in the form an attention implementation expects, where the queries are.

    Returns:
        bool for sdpa, additive in the queries' dtype for eager, None for flash attention, which knows no masks.
    Raises:
        ValueError: flash attention, and some token must not see another.
    """
    if allowed is None:
        return None
    if "flash" in implementation:
        if allowed.all():
            return None
        raise ValueError(
            f"attn_implementation={implementation!r} takes no mask, but here some tokens are hidden from others. It "
            "serves generate with the cache in the isolated layout, and questions of one length at a time elsewhere; "
            "for other batches, other layouts and training use attn_implementation='sdpa' (the vision tower may keep "
            "it: {'vision_config': 'flash_attention_2', 'text_config': 'sdpa'})"
        )
    allowed = allowed.to(query.device)
    if implementation != "eager":
        return allowed
    return torch.zeros_like(allowed, dtype=query.dtype).masked_fill(~allowed, torch.finfo(query.dtype).min)
