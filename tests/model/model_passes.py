"""Passes of a model on a processor's batch, below `forward` and `generate`."""

import torch

from perceptiondlm.inputs_perceptiondlm import PromptInputs
from perceptiondlm.passes_perceptiondlm import PackedPasses, StaticPasses


def embed(model, batch, training: bool = False):
    """The prompt of a batch, with image and RoI features in place."""
    tensors = {name: value for name, value in batch.items() if name in PromptInputs.tensor_names()}
    return model.embed_prompt(PromptInputs(**tensors).checked(model), training=training)


def passes(model, batch, num_slots: int, cached: bool = True, refresh_interval: int = 1):
    """From canvases (A, G) to logits (A, G, V), as `generate` runs them."""
    prompt = embed(model, batch)
    if cached and model.config.layout.static_prompt:
        run = StaticPasses(model, prompt, [None] * len(prompt.ids), num_slots, compiled=False)
    else:
        run = PackedPasses(model, prompt, num_slots, refresh_interval)
    return lambda ids: model.lm_head(run(ids))


@torch.no_grad()
def scores(model, batch, ids: torch.Tensor, cached: bool = False) -> torch.Tensor:
    """Logits (A, G, V) of a canvas."""
    return passes(model, batch, ids.shape[1], cached)(ids)
