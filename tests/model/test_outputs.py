"""What `forward` and loading give code that knows transformers' models, and not this one."""

import pytest
import torch
from model_batches import CONDITIONINGS, LAYOUTS, half_masked, region_batch, training_batch

from perceptiondlm.modeling_perceptiondlm import PerceptionDLMForConditionalGeneration


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_hidden_states_and_attentions_are_those_of_the_language_model(
    tiny_model, tiny_processor, scene, layout, conditioning
):
    """One per layer and the embeddings, over prompt and answers; the vision tower's layers are not among them."""
    model = tiny_model(attention_layout=layout, region_conditioning=conditioning, attn_implementation="eager")
    batch, ids = region_batch(tiny_processor(model), scene), half_masked(model, 3)
    with torch.no_grad():
        plain = model(**batch, answer_ids=ids)
        output = model(**batch, answer_ids=ids, output_hidden_states=True, output_attentions=True)
    config = model.config.text_config
    length = batch["input_ids"].shape[1] + 3 * (ids.shape[1] + 1 + (layout != "isolated"))
    assert [tuple(state.shape) for state in output.hidden_states] == [(1, length, config.hidden_size)] * 3
    assert [tuple(a.shape) for a in output.attentions] == [(1, config.num_attention_heads, length, length)] * 2
    torch.testing.assert_close(output.attentions[0].sum(dim=-1), torch.ones(1, config.num_attention_heads, length))
    assert (plain.hidden_states, plain.attentions) == (None, None)
    assert torch.equal(plain.logits, output.logits)
    logits = model.lm_head(model.language_model.norm(output.hidden_states[-1]))
    for answer in output.logits:  # each stands somewhere in the packed row
        assert (logits[0] - answer[0]).abs().amax(dim=-1).min() < 1e-4


def test_tuples_hold_what_outputs_hold(tiny_model, tiny_processor, scene):
    model = tiny_model()
    batch = training_batch(tiny_processor(model), scene)
    with torch.no_grad():
        output = model(**batch, output_hidden_states=True)
        found = model(**batch, output_hidden_states=True, return_dict=False)
    assert list(output) == ["loss", "logits", "masked", "token_losses", "hidden_states"]
    for one, other in zip(found, output.to_tuple(), strict=True):
        for first, second in zip(*((one, other) if isinstance(one, tuple) else ((one,), (other,))), strict=True):
            assert torch.equal(first, second)


def test_the_parts_have_their_names(tiny_model):
    model = tiny_model()
    assert model.get_decoder() is model.language_model
    assert model.get_input_embeddings() is model.language_model.embed_tokens
    assert model.get_output_embeddings() is model.lm_head
    assert model.base_model is model
    assert PerceptionDLMForConditionalGeneration.can_generate()


def test_weights_from_a_state_dict(tiny_model):
    """Without a checkpoint, the state dict is what its owner makes of it: whole, or in part with fresh weights."""
    model = tiny_model()
    state = model.state_dict()
    load = PerceptionDLMForConditionalGeneration.from_pretrained
    whole = load(None, config=model.config, state_dict=dict(state))
    assert all(torch.equal(whole.state_dict()[name], weight) for name, weight in state.items())
    head = {"lm_head.weight": state["lm_head.weight"]}
    part, info = load(None, config=model.config, state_dict=dict(head), output_loading_info=True)
    assert set(info["missing_keys"]) == set(state) - set(head)
    assert torch.equal(part.lm_head.weight, state["lm_head.weight"])
    assert part.projector.linear_1.weight.std().item() == pytest.approx(model.config.initializer_range, rel=0.2)


def test_text_embeddings_stand_for_their_ids(tiny_model, tiny_processor, scene):
    model = tiny_model()
    batch, ids = dict(region_batch(tiny_processor(model), scene)), half_masked(model, 3)
    with torch.no_grad():
        expected = model(**batch, answer_ids=ids).logits
        batch["inputs_embeds"] = model.get_input_embeddings()(batch.pop("input_ids"))
        assert torch.equal(model(**batch, answer_ids=ids).logits, expected)
