"""Saving and loading, attention kernels, tied and resized embeddings."""

import json
import random

import pytest
import torch
from model_batches import (
    CONDITIONINGS,
    region_batch,
)

from perceptiondlm.modeling_perceptiondlm import (
    PerceptionDLMForConditionalGeneration,
)


UNSAVED = ("dtype", "_name_or_path", "architectures", "transformers_version", "model_type")  # filled in when saving


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_a_saved_model_comes_back_the_same(tiny_model, tiny_processor, scene, tmp_path, conditioning):
    model = tiny_model(region_conditioning=conditioning, attention_layout="released", vision_feature_layer=-1)
    model.generation_config.steps, model.generation_config.suppress_tokens = 5, [3, 4]
    model.save_pretrained(tmp_path)
    loaded = PerceptionDLMForConditionalGeneration.from_pretrained(tmp_path)
    for part in ("", "vision_config", "text_config"):
        read, wrote = (getattr(c, part) if part else c for c in (loaded.config, model.config))
        fields = {k: v for k, v in wrote.to_dict().items() if k not in UNSAVED and not isinstance(v, dict)}
        assert {name: read.to_dict()[name] for name in fields} == fields
    assert (loaded.generation_config.steps, loaded.generation_config.suppress_tokens) == (5, [3, 4])
    assert set(loaded.state_dict()) == set(model.state_dict())
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name
    batch = region_batch(tiny_processor(model), scene)
    ids = torch.full((3, 4), model.config.mask_token_id)
    with torch.no_grad():
        assert torch.equal(model(**batch, answer_ids=ids).logits, loaded.eval()(**batch, answer_ids=ids).logits)


def test_a_model_can_be_loaded_in_half_precision(tiny_model, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    loaded = PerceptionDLMForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"text_config": {"num_hidden_layers": 3}}, "missing keys, such as language_model.layers.2"),
        ({"text_config": {"num_hidden_layers": 1}}, "unexpected keys, such as language_model.layers.1"),
        ({"text_config": {"vocab_size": 700}}, "mismatched keys"),
        ({"region_conditioning": "vision"}, "region_prompts.weight.*unexpected keys, such as region_replay"),
    ],
)
def test_weights_that_do_not_belong_to_the_config_are_refused(tiny_model, tmp_path, changes, kind):
    tiny_model().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    saved = json.loads(path.read_text())
    for name, value in changes.items():
        saved[name] = {**saved[name], **value} if isinstance(value, dict) else value
    path.write_text(json.dumps(saved))
    with pytest.raises(ValueError, match=f"disagree: .*{kind}"):
        PerceptionDLMForConditionalGeneration.from_pretrained(tmp_path)
    loaded = PerceptionDLMForConditionalGeneration.from_pretrained(tmp_path, ignore_mismatched_sizes=True)
    assert loaded.config.text_config.vocab_size == saved["text_config"]["vocab_size"]


@pytest.mark.parametrize("layout", ["isolated", "released"])
def test_eager_and_sdpa_attention_agree(tiny_model, tiny_processor, scene, layout):
    models = {
        name: tiny_model(attn_implementation=name, attention_layout=layout, seed=random.Random(layout).randrange(99))
        for name in ("sdpa", "eager")
    }
    processor = tiny_processor(models["sdpa"])
    rows = processor.region_rows(scene.image, None, "masks", [item.mask for item in scene.objects])
    batch = processor.collate(rows + processor.text_rows(scene.image, "How many?"))  # padding and missing blocks too
    ids = torch.randint(0, 500, (4, 6), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = {name: model(**batch, answer_ids=ids).logits for name, model in models.items()}
        cached = [model.generate(**batch, max_new_tokens=6, steps=6).sequences for model in models.values()]
    assert models["eager"].language_model.config._attn_implementation == "eager"
    torch.testing.assert_close(logits["eager"], logits["sdpa"], atol=1e-4, rtol=0)
    assert torch.equal(*cached)


def test_flex_attention_is_refused(tiny_model, tmp_path):
    with pytest.raises(ValueError, match=r"does not support .*flex"):
        tiny_model(attn_implementation="flex_attention")
    model = tiny_model()
    with pytest.raises(ValueError, match=r"does not support .*flex"):
        model.set_attn_implementation("flex_attention")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"does not support .*flex"):
        PerceptionDLMForConditionalGeneration.from_pretrained(tmp_path, attn_implementation="flex_attention")


def test_embeddings_can_be_tied(tiny_model, tmp_path):
    model = tiny_model(tie_word_embeddings=True)
    assert model.lm_head.weight is model.language_model.embed_tokens.weight
    assert tiny_model().lm_head.weight is not tiny_model().language_model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    loaded = PerceptionDLMForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.language_model.embed_tokens.weight
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


def test_embeddings_can_be_replaced_and_resized(tiny_model, tiny_processor, scene):
    model = tiny_model()
    vocabulary = model.config.text_config.vocab_size
    batch = region_batch(tiny_processor(model), scene)
    ids = torch.full((3, 4), model.config.mask_token_id)
    with torch.no_grad():
        before = model(**batch, answer_ids=ids).logits
        model.resize_token_embeddings(vocabulary + 8)
        after = model(**batch, answer_ids=ids).logits
    assert model.get_input_embeddings() is model.language_model.embed_tokens
    assert after.shape[-1] == model.config.text_config.vocab_size == vocabulary + 8
    torch.testing.assert_close(after[..., :vocabulary], before)
