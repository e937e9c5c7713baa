"""The language model: Llama whose tokens attend to what a pass says, in both directions.

Legend: see sequence_perceptiondlm.
"""

from typing import Any

import torch
from torch import nn
from transformers import LlamaModel
from transformers.models.llama.modeling_llama import LlamaAttention, apply_rotary_pos_emb
from transformers.utils import logging


logger = logging.get_logger(__name__)
COMPILE_OPTIONS: dict[str, Any] = {"fullgraph": True}
MAX_GRAPHS = 64  # compiled shapes of one model


class PassAttention(LlamaAttention):
    """Llama's projections and rotation; what is attended to, and how, is the pass's affair.

    Args:
        config, layer_idx: of Llama.
    """

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.is_causal = False

    def forward(self, hidden_states, position_embeddings=None, attending=None, **_llama):
        """Hidden states (sequences, X, D) to the same shape, and attention weights if the implementation has any."""
        query, key, value = self.project(hidden_states, position_embeddings)
        output, weights = attending.attend(self, query, key, value)
        return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1)), weights

    def project(self, hidden: torch.Tensor, rotation) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rotated queries and keys, and values: (sequences, heads, X, d)."""
        shape = (*hidden.shape[:-1], -1, self.head_dim)
        query, key, value = (
            projection(hidden).view(shape).transpose(1, 2) for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = apply_rotary_pos_emb(query, key, *rotation)
        return query.to(value.dtype), key.to(value.dtype), value  # under autocast, rotating has made them fp32

    def keys_and_values(self, hidden: torch.Tensor, rotation) -> tuple[torch.Tensor, torch.Tensor]:
        """As `project`, without the queries."""
        shape = (*hidden.shape[:-1], -1, self.head_dim)
        key, value = (projection(hidden).view(shape).transpose(1, 2) for projection in (self.k_proj, self.v_proj))
        return apply_rotary_pos_emb(key, key, *rotation)[0].to(value.dtype), value


class BidirectionalLlamaModel(LlamaModel):
    """Llama without the causal mask: who sees whom is decided by the pass."""

    def __init__(self, config):
        super().__init__(config)
        # Llama freezes the padding token's embedding at zero; here that token fills answers and is learned.
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        for index, layer in enumerate(self.layers):
            layer.self_attn = PassAttention(config, index)

    def forward(self, inputs_embeds: torch.Tensor, position_ids: torch.Tensor, attending: Any) -> torch.Tensor:
        """Embeddings (sequences, X, D) to normalised hidden states of that shape.

        Args:
            position_ids: (sequences, X) int64.
            attending: a `MaskedPass` or `StaticPass`.
        """
        hidden, _ = self._through(self.layers, inputs_embeds, position_ids, attending)
        return self.norm(hidden)

    def fill(self, inputs_embeds: torch.Tensor, position_ids: torch.Tensor, attending: Any) -> None:
        """Compute keys and values alone, for `attending.keep`: nothing reads what the last layer makes of them."""
        *layers, last = self.layers
        hidden, rotation = self._through(layers, inputs_embeds, position_ids, attending)
        device = last.self_attn.k_proj.weight.device
        if device.type != "meta":  # offloaded weights come to where the tokens are
            hidden, rotation = hidden.to(device), tuple(part.to(device) for part in rotation)
        keys_and_values = last.self_attn.keys_and_values(last.input_layernorm(hidden), rotation)
        attending.keep.put(last.self_attn.layer_idx, *keys_and_values)

    def _through(self, layers, hidden: torch.Tensor, position_ids: torch.Tensor, attending: Any):
        """Hidden states behind some layers, and the rotation of the tokens' positions."""
        rotation = self.rotary_emb(hidden, position_ids=position_ids)
        for layer in layers:
            hidden = layer(hidden, position_embeddings=rotation, attending=attending)
        return hidden, rotation

    def compiled(self, inputs_embeds: torch.Tensor, position_ids: torch.Tensor, attending: Any) -> torch.Tensor:
        """`forward` through `torch.compile`; eager, after one warning, for shapes beyond `MAX_GRAPHS`."""
        try:
            with torch._dynamo.config.patch(recompile_limit=MAX_GRAPHS, accumulated_recompile_limit=MAX_GRAPHS):
                return _compiled_forward()(self, inputs_embeds, position_ids, attending)
        except torch._dynamo.exc.FailOnRecompileLimitHit:
            logger.warning_once(
                f"more than {MAX_GRAPHS} shapes of passes: further ones run uncompiled. Batches of like images and "
                "numbers of regions need fewer"
            )
            return self(inputs_embeds, position_ids, attending)


def _compiled_forward():
    """The compiled forward of all language models: holds none of them alive. Made at first use."""
    if not _compiled:
        _compiled.append(torch.compile(BidirectionalLlamaModel.forward, **COMPILE_OPTIONS))
    return _compiled[0]


_compiled: list = []
