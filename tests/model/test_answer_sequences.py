"""The sequence as it is written: logits equal those of one plain sequence built by hand."""

import pytest
import torch
from model_batches import CONDITIONINGS, region_batch
from model_passes import embed

from perceptiondlm.attention_perceptiondlm import MaskedPass
from perceptiondlm.sequence_perceptiondlm import SHARED


def hand_built_logits(
    model, prompt_embeds, answers: list[list[int]], slots: list[list[int]], prompt_sees_answers: bool
):
    """Logits of the slots when prompt and answers are run as one plain sequence, positions counted from zero.

    `answers` are the ids of every block, `slots` the places of its slots within it.
    """
    tail = torch.tensor([[token for block in answers for token in block]])
    embeds = torch.cat((prompt_embeds, model.get_input_embeddings()(tail)), dim=1)
    length, total = prompt_embeds.shape[1], embeds.shape[1]
    allowed = torch.ones(1, 1, total, total, dtype=torch.bool)
    allowed[:, :, :length, length:] = prompt_sees_answers
    logits = model.lm_head(model.language_model(embeds, torch.arange(total)[None], MaskedPass(allowed)))[0, length:]
    starts = [sum(len(block) for block in answers[:index]) for index in range(len(answers))]
    return torch.stack([logits[[start + slot for slot in own]] for start, own in zip(starts, slots, strict=True)])


@torch.no_grad()
def assert_scores(model, batch, ids, answers, slots):
    embeds = embed(model, batch).embeds
    sees = model.config.attention_layout != "isolated"
    expected = hand_built_logits(model, embeds, answers, slots, sees)
    torch.testing.assert_close(model(**batch, answer_ids=ids).logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("layout", ["isolated", "released", "full"])
def test_an_answer_without_regions_follows_its_prompt_bare(tiny_model, tiny_processor, scene, layout):
    model = tiny_model(attention_layout=layout)
    batch = tiny_processor(model)(images=scene.image, text="How many?")
    ids = torch.tensor([[7, model.config.mask_token_id, 9, 11]])
    assert_scores(model, batch, ids, ids.tolist(), [[0, 1, 2, 3]])


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_isolated_a_caption_follows_its_marker(tiny_model, tiny_processor, scene, conditioning):
    """One region: `prompt, marker, slots`; only the prompt does not look at what follows."""
    model = tiny_model(region_conditioning=conditioning)
    batch = tiny_processor(model)(images=scene.image, masks=[scene.objects[0].mask])
    ids = torch.tensor([[7, model.config.mask_token_id, 9]])
    shared_only = batch["input_ids"].shape[1] - 17  # RoI tokens and newline, which no shared token sees
    assert int((batch["token_roles"] == SHARED).sum()) == shared_only
    with torch.no_grad():
        prompt = embed(model, batch)
        tail = torch.tensor([[model.config.caption_token_ids[0], *ids[0].tolist()]])
        embeds = torch.cat((prompt.embeds, model.get_input_embeddings()(tail)), dim=1)
        group = torch.cat(((batch["token_roles"][0] != SHARED).long(), torch.full((4,), 2)))  # S 0, R 1, C 2
        allowed = (group[:, None] >= group[None, :])[None, None]
        hidden = model.language_model(embeds, torch.arange(embeds.shape[1])[None], MaskedPass(allowed))
        expected = model.lm_head(hidden)[:, -3:]
        torch.testing.assert_close(model(**batch, answer_ids=ids).logits, expected, atol=1e-4, rtol=0)


def test_everything_of_a_prompt_id_moves_with_it(tiny_model, tiny_processor, scene):
    """Ids 2, 0, 1 with the rows of prompt and marker embeddings moved along: the same logits as ids 0, 1, 2."""
    plain, moved = (tiny_model(region_conditioning="vision", num_region_prompts=3) for _ in range(2))
    ids = torch.tensor([2, 0, 1])
    markers = torch.tensor(plain.config.caption_token_ids)
    with torch.no_grad():
        moved.region_prompts.weight[ids] = plain.region_prompts.weight
        embeddings = moved.get_input_embeddings().weight
        embeddings[markers[ids]] = plain.get_input_embeddings().weight[markers[:3]]
    processor = tiny_processor(plain)
    answers = torch.full((3, 5), plain.config.mask_token_id)
    with torch.no_grad():
        expected = plain(**region_batch(processor, scene), answer_ids=answers).logits
        found = moved(**region_batch(processor, scene, prompt_ids=ids.tolist()), answer_ids=answers).logits
        ignored = moved(**region_batch(processor, scene), answer_ids=answers).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert not torch.allclose(ignored, expected, atol=1e-2)


def test_supervised_markers_give_captions_their_own_length(tiny_model, tiny_processor, scene):
    """Blocks of different lengths in one batch have the loss they have alone, and nothing depends on the padding."""
    model = tiny_model(attention_layout="released", region_conditioning="vision", supervise_markers=True)
    processor = tiny_processor(model)
    masks = [item.mask for item in scene.objects][:1]
    labels = torch.randint(0, 400, (1, 7), generator=torch.Generator().manual_seed(0))
    padded = torch.cat((labels, torch.full((1, 4), -100)), dim=1)
    certain = {"mask_probability": torch.ones(1, 1)}
    inputs = processor(images=scene.image, masks=masks)
    with torch.no_grad():
        tight = model(**inputs, labels=labels, answer_noise=torch.zeros(1, 9), **certain)
        loose = model(**inputs, labels=padded, answer_noise=torch.zeros(1, 13), **certain)
    assert tight.logits.shape[:2] == (1, 9)  # marker, seven tokens, terminator
    assert int(tight.masked.sum()) == int(loose.masked.sum()) == 9
    torch.testing.assert_close(tight.loss, loose.loss)


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_other_layouts_write_the_released_sequence(tiny_model, tiny_processor, scene, conditioning):
    """`marker slots newline` per region, the last one ended by the end of turn; markers follow the prompt id."""
    model = tiny_model(region_conditioning=conditioning, attention_layout="full")
    config = model.config
    batch = region_batch(tiny_processor(model), scene)
    ids = torch.randint(0, 500, (3, 4), generator=torch.Generator().manual_seed(0))
    ends = [config.newline_token_id, config.newline_token_id, config.end_of_turn_token_id]
    markers = [config.caption_token_ids[k if conditioning == "vision" else 0] for k in range(3)]
    blocks = [[marker, *slots, end] for marker, slots, end in zip(markers, ids.tolist(), ends, strict=True)]
    assert_scores(model, batch, ids, blocks, [[1, 2, 3, 4]] * 3)
