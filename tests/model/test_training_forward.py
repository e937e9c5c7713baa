"""`forward` on training batches: its noise and scores, gradients, and that something is learned."""

import pytest
import torch
from model_batches import (
    CONDITIONINGS,
    region_batch,
    training_batch,
)
from torch.nn import functional as F

from perceptiondlm.loss_perceptiondlm import noise_answers
from perceptiondlm.training.recomputation import recompute_activations


def test_forward_reports_loss_and_mask_of_its_noise(tiny_model, tiny_processor, scene):
    """The loss returned is equation 2 on the logits returned, and the slots it masked are those the draws say."""
    model = tiny_model()
    batch = training_batch(tiny_processor(model), scene)
    with torch.no_grad():
        output = model(**batch)
    labels, p, u = batch["labels"], batch["mask_probability"], batch["answer_noise"]
    assert torch.equal(output.masked, (u < p) & (labels != -100))
    nll = F.cross_entropy(output.logits.double().flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
    expected = (nll * output.masked / p).sum() / labels.numel()
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-4)


def test_forward_scores_what_it_noised(tiny_model, tiny_processor, scene):
    """Training and scoring are one path: the noised ids given as `answer_ids` get the logits of training."""
    model = tiny_model()
    batch = training_batch(tiny_processor(model), scene)
    noise = [batch.pop(name) for name in ("labels", "mask_probability", "answer_noise")]
    noised, _ = noise_answers(noise[0], model.config.mask_token_id, *noise[1:])
    with torch.no_grad():
        trained = model(**batch, labels=noise[0], mask_probability=noise[1], answer_noise=noise[2]).logits
        assert torch.equal(trained, model(**batch, answer_ids=noised).logits)


def test_noised_copies_of_an_answer_do_not_see_each_other(tiny_model, tiny_processor, scene):
    """Two copies per region in one pass get the logits each gets alone."""
    model = tiny_model()
    batch = training_batch(tiny_processor(model), scene)
    for name in ("mask_probability", "answer_noise"):
        batch.pop(name)
    ids = torch.where(torch.rand(6, 32, generator=torch.Generator().manual_seed(0)) < 0.5, 7, batch.pop("labels"))
    with torch.no_grad():
        together = model(**batch, answer_ids=ids).logits
        apart = torch.stack([model(**batch, answer_ids=ids[copy::2]).logits for copy in range(2)], dim=1)
    torch.testing.assert_close(together, apart.flatten(0, 1), atol=1e-4, rtol=0)


def test_noise_is_drawn_when_left_out(tiny_model, tiny_processor, scene):
    model = tiny_model()
    batch = training_batch(tiny_processor(model), scene)
    for name in ("mask_probability", "answer_noise"):
        batch.pop(name)
    with torch.no_grad():
        torch.manual_seed(0)
        first, second = model(**batch).masked, model(**batch).masked
        torch.manual_seed(0)
        assert torch.equal(model(**batch).masked, first)
    assert not torch.equal(first, second)


def gradients(model, batch) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model.train()
    model(**batch).loss.backward()
    model.eval()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
@pytest.mark.parametrize("layer", [-1, -2])
def test_gradients_reach_every_trainable_parameter(tiny_model, tiny_processor, scene, conditioning, layer):
    model = tiny_model(region_conditioning=conditioning, vision_feature_layer=layer)
    found = gradients(model, training_batch(tiny_processor(model), scene))
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert set(found) == trainable
    # A bias of the keys shifts all scores of a query alike: its gradient is zero in exact arithmetic.
    still = {name for name, grad in found.items() if not grad.any() and not name.endswith("k_proj.bias")}
    assert not still
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    unused = ["post_layernorm"] + (["encoder.layers.1."] if layer == -2 else [])
    assert frozen == {name for name, _ in model.named_parameters() if any(part in name for part in unused)}


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_gradient_checkpointing_changes_no_gradient(tiny_model, tiny_processor, scene, conditioning):
    model = tiny_model(region_conditioning=conditioning)
    batch = training_batch(tiny_processor(model), scene)
    plain = gradients(model, batch)
    runs = []
    hook = model.language_model.layers[0].self_attn.register_forward_pre_hook(lambda *_: runs.append(1))
    recompute_activations(model)
    checkpointed = gradients(model, batch)
    hook.remove()
    assert len(runs) == 2  # run again in the backward pass
    assert set(plain) == set(checkpointed)
    for name, grad in plain.items():
        torch.testing.assert_close(checkpointed[name], grad, atol=1e-6, rtol=1e-4)


def test_generation_while_training_with_gradient_checkpointing(tiny_model, tiny_processor, scene):
    """Checkpointed layers take no cache; `generate` then goes without, with the same answers."""
    model = tiny_model()
    batch = region_batch(tiny_processor(model), scene)
    expected = model.generate(**batch, max_new_tokens=4, steps=4).sequences
    recompute_activations(model)
    model.train()
    assert torch.equal(model.generate(**batch, max_new_tokens=4, steps=4).sequences, expected)


def test_one_answer_can_be_learned(tiny_model, tiny_processor, scene):
    """A few steps on one scene lower its loss by more than half: signs and shapes of the loss are right end to end."""
    model = tiny_model()
    batch = training_batch(tiny_processor(model), scene)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=3e-3)
    losses = []
    for _ in range(15):
        loss = model(**batch, loss_weighting="masked").loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_the_token_that_fills_answers_has_an_embedding_that_learns(tiny_model, tiny_processor, scene):
    model = tiny_model()
    inputs = tiny_processor(model)(images=scene.image, masks=[item.mask for item in scene.objects])
    fill = model.config.end_of_text_token_id
    labels = torch.full((len(scene.objects), 4), fill)
    noise = torch.tensor([0.0, 1.0, 1.0, 1.0]).expand(labels.shape)
    model(
        **inputs, labels=labels, mask_probability=torch.full((len(labels), 1), 0.5), answer_noise=noise
    ).loss.backward()
    embedding = model.get_input_embeddings().weight
    assert embedding[fill].abs().sum() > 0
    assert embedding.grad[fill].abs().sum() > 0
