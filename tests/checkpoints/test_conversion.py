"""Conversion: what released checkpoints compute is kept number by number, and nothing is lost on the way.

The numbers were recorded from the released code (tiny random weights); they lie in `../shared`, which is not part of
the repository. Everything else runs on checkpoints made here.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from model_passes import embed
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoModel, AutoProcessor, LlamaConfig, LlamaForCausalLM, SiglipConfig, SiglipModel, pipeline

from perceptiondlm.checkpoints import convert as conversion
from perceptiondlm.checkpoints.convert import Options, convert
from perceptiondlm.checkpoints.folder import export
from perceptiondlm.checkpoints.layouts import RELEASED_PROCESSOR, RELEASED_QUIRKS, TO_RELEASED_RULES, rename
from perceptiondlm.processing_perceptiondlm import PerceptionDLMProcessor
from perceptiondlm.sequence_perceptiondlm import PAD


SHARED = Path(__file__).parents[3] / "shared"
DEMO = SHARED / "data" / "demo"
needs_reference = pytest.mark.skipif(
    not (SHARED / "reference").is_dir(), reason="the recordings of the released code (../shared/reference) are absent"
)


# --- against the released code ------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def reference(tmp_path_factory):
    """The unpacked recordings, and both tiny checkpoints converted."""
    folder = tmp_path_factory.mktemp("reference")
    for archive in sorted((SHARED / "reference").glob("*.tar.xz")):
        with tarfile.open(archive) as file:
            file.extractall(folder, filter="data")
    for name in ("parallel", "base"):
        convert(Options(str(folder / f"tiny_{name}_checkpoint"), folder / name))
    return folder


@pytest.fixture(scope="session")
def parallel(reference):
    """Model and processor of the converted region model."""
    return load(reference / "parallel")


@pytest.fixture(scope="session")
def base(reference):
    """Model and processor of the converted base model."""
    return load(reference / "base")


def load(folder):
    """Through the same doors as every other checkpoint."""
    model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    return model, AutoProcessor.from_pretrained(folder, trust_remote_code=True)


def demo_inputs(processor, *numbers, **keywords):
    """The demo image with some of its masks."""
    masks = [Image.open(DEMO / f"demo_mask_{number}.jpg") for number in numbers]
    return processor(images=Image.open(DEMO / "demo.jpg"), masks=masks, **keywords)


def close(found, expected, tolerance):
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)


def normalised(tiles: torch.Tensor) -> torch.Tensor:
    """Tiles in bytes as the vision tower sees them."""
    assert tiles.dtype == torch.uint8
    return (tiles.float() / 255 - 0.5) / 0.5


@needs_reference
def test_pixels_and_patch_prompts_are_exact(parallel, reference):
    model, processor = parallel
    recorded = load_file(reference / "parallel_one_region.safetensors")
    inputs = demo_inputs(processor, 0)
    assert torch.equal(normalised(inputs["pixel_values"]), recorded["pixel_values"])
    addend = torch.einsum("tkp,kc->tpc", inputs["prompt_coverage"].flatten(2), model.region_prompts.weight)
    assert torch.equal(addend, recorded["vit_mask_embeds"])


@needs_reference
def test_every_stage_of_one_region_matches(parallel, reference):
    """Vision features, embeddings, attention, positions, hidden states and logits, from raw image and mask."""
    model, processor = parallel
    recorded = load_file(reference / "parallel_one_region.safetensors")
    inputs = demo_inputs(processor, 0)
    assert torch.equal(inputs["input_ids"], recorded["input_ids_replayed"][:, : inputs["input_ids"].shape[1]])
    hidden = []
    hook = model.language_model.register_forward_hook(lambda _module, _inputs, output: hidden.append(output))
    with torch.no_grad():
        tiles = model.encode_tiles(inputs["pixel_values"], inputs["prompt_coverage"])
        close(tiles.flatten(1, 2), recorded["vision_embeds"], 5e-5)
        prompt = embed(model, inputs)
        spans = model.place_answers(prompt, 1, 16)
        slots = torch.full((1, 16), model.config.mask_token_id)
        answers = model.get_input_embeddings()(spans.lay_out(spans.enclose(slots)))
        close(torch.cat((prompt.embeds, answers), dim=1), recorded["inputs_embeds"], 5e-5)
        logits = model.score_slots(prompt, spans, slots)
    hook.remove()
    roles, layout = prompt.roles.cat(spans.roles), model.config.layout
    assert layout.name == "released"
    assert torch.equal(layout.allowed(roles, roles), recorded["attn_allowed_4d"].bool())
    positions = torch.cat((layout.prompt_positions(prompt.roles), spans.positions), dim=1)
    assert torch.equal(positions, recorded["position_ids"])
    close(hidden[0], recorded["step0.hidden"], 1e-4)
    close(logits[0], recorded["step0.caption_logits"], 3e-4)


@needs_reference
@pytest.mark.parametrize(("steps", "passes"), [(8, 8), (32, 31)])
def test_decoded_tokens_are_identical(parallel, reference, steps, passes):
    """Shared schedule with remasking: 16 slots are decided after 31 of 32 steps."""
    model, processor = parallel
    recorded = load_file(reference / "parallel_one_region.safetensors")
    output = model.generate(**demo_inputs(processor, 0), max_new_tokens=16, steps=steps)
    assert output.sequences[0].tolist() == recorded[f"x_tokens_steps{steps}"][0, -17:-1].tolist()
    assert output.num_forward_passes == passes


@pytest.fixture(scope="session")
def training_case(parallel, reference):
    """Three regions with their captions and the released draws, in this model's form."""
    model, processor = parallel
    settings = json.loads((reference / "parallel_training_loss.json").read_text())
    recorded = load_file(reference / "parallel_training_loss.safetensors")
    captions = re.findall(r"<\|Mask_Cap_\d\|>(.*?)(?:\n|<)", settings["text"])
    ids = [processor.tokenizer(caption, add_special_tokens=False)["input_ids"] for caption in captions]
    labels = torch.full((3, max(map(len, ids))), -100)
    for row, tokens in enumerate(ids):
        labels[row, : len(tokens)] = torch.tensor(tokens)
    # masks enter by area (0, 2, 1); the released draw of prompt ids was 4, 1, 3 in that order
    inputs = demo_inputs(processor, 0, 1, 2, prompt_ids=[4, 3, 1])
    spans = model.place_answers(embed(model, inputs), 3, labels.shape[1], (labels != -100).sum(dim=1))
    places = spans.pick(spans.positions)  # of every block token in the released sequence
    assert inputs["region_order"].tolist() == [0, 2, 1]
    return settings, recorded, inputs, labels, places


def released_loss(model, training_case, seed):
    """The loss under the released draws of t and u."""
    _, recorded, inputs, labels, places = training_case
    probability = (recorded[f"seed{seed}.t"] * 0.999 + 1e-3).expand(3, 1)
    noise = recorded[f"seed{seed}.u"][0][places]
    return model(**inputs, labels=labels, mask_probability=probability, answer_noise=noise)


@needs_reference
def test_three_regions_stand_and_attend_as_released(parallel, training_case):
    """Captions of different lengths: embeddings, positions and the attention mask of the whole sequence."""
    model = parallel[0]
    _, recorded, inputs, labels, _ = training_case
    with torch.no_grad():
        prompt = embed(model, inputs, training=True)
        spans = model.place_answers(prompt, 3, labels.shape[1], (labels != -100).sum(dim=1))
        ids = spans.lay_out(spans.enclose(labels.clamp(min=0)))
        embeds = torch.cat((prompt.embeds, model.get_input_embeddings()(ids)), dim=1)
    roles, layout = prompt.roles.cat(spans.roles), model.config.layout
    there = (roles.role != PAD)[0]
    positions = torch.cat((layout.prompt_positions(prompt.roles), spans.positions), dim=1)[:, there]
    assert torch.equal(positions, recorded["position_ids"])
    close(embeds[:, there], recorded["inputs_embeds_replayed"], 5e-5)
    allowed = layout.allowed(roles, roles)[:, :, there][:, :, :, there]
    assert torch.equal(allowed, recorded["attn_allowed_4d"].bool())


@needs_reference
@pytest.mark.parametrize("seed", [7, 11, 1234])
def test_training_loss_matches(parallel, training_case, seed):
    """Markers, newlines and end of turn are noised and supervised, too."""
    run = training_case[0]["runs"][str(seed)]
    with torch.no_grad():
        output = released_loss(parallel[0], training_case, seed)
    assert int(output.masked.sum()) == run["n_masked"]
    assert float(output.loss) == pytest.approx(run["loss"], rel=1e-4)


@needs_reference
def test_gradient_norms_match(parallel, training_case, reference):
    model, norms = parallel[0], training_case[0]["grad_norms"]
    released_loss(model, training_case, 7).loss.backward()
    compared = 0
    for name, parameter in model.named_parameters():
        expected = norms[rename(name, TO_RELEASED_RULES)]
        assert (parameter.grad is None) == (expected is None), name
        if expected is not None:  # a key's bias shifts all scores alike: its gradient is rounding noise
            assert float(parameter.grad.norm()) == pytest.approx(expected, rel=1e-3, abs=1e-5), name
            compared += 1
    model.zero_grad()
    assert compared > 60


@needs_reference
def test_base_model_matches(base, reference):
    """Question answering in blocks: embeddings, logits and tokens."""
    model, processor = base
    recorded = load_file(reference / "base_block16.safetensors")
    question = "What color shirt is the man in the picture wearing?"
    inputs = processor(images=Image.open(DEMO / "demo.jpg"), text=question)
    assert torch.equal(inputs["input_ids"], recorded["input_ids"])
    assert torch.equal(normalised(inputs["pixel_values"]), recorded["pixel_values"])
    with torch.no_grad():
        prompt = embed(model, inputs)
        close(prompt.embeds, recorded["inputs_embeds"], 5e-5)
        slots = torch.full((1, 32), model.config.mask_token_id)
        logits = model.score_slots(prompt, model.place_answers(prompt, 1, 32), slots)
        close(logits[0], recorded["step0.gen_logits_raw"], 3e-4)
    output = model.generate(**inputs, max_new_tokens=32, block_length=16, steps=16)
    assert torch.equal(output.sequences, recorded["b16g32s16.tokens"])


@needs_reference
def test_base_training_loss_matches(base, reference):
    model, processor = base
    recorded = load_file(reference / "base_block16.safetensors")
    settings = json.loads((reference / "base_block16.json").read_text())
    text = settings["train_prompt"][: settings["train_prompt"].rindex("\n") + 1]
    inputs = processor(images=Image.open(DEMO / "demo.jpg"), text=text)
    start = inputs["input_ids"].shape[1]
    labels = recorded["train.labels"][:, start:]
    labels = labels[labels != -100][None]
    noise = torch.zeros(1, labels.shape[1] + 2)  # marker and terminator, which a row without regions lacks
    noise[:, 1:-1] = recorded["train.u"][:, start : start + labels.shape[1]]
    with torch.no_grad():
        probability = (recorded["train.t"] * 0.999 + 1e-3)[None]
        loss = model(**inputs, labels=labels, mask_probability=probability, answer_noise=noise).loss
    assert float(loss) == pytest.approx(float(recorded["train.loss"]), rel=1e-4)


@needs_reference
def test_source_keys_and_config_come_back(reference, tmp_path):
    """Kept tensors, their names and the config are those of the source, bit for bit."""
    for name in ("parallel", "base"):
        source = reference / f"tiny_{name}_checkpoint"
        convert(Options(str(reference / name), tmp_path / name, to="released"))
        before, after = load_file(source / "model.safetensors"), load_file(tmp_path / name / "model.safetensors")
        dropped = json.loads((reference / name / "conversion.json").read_text())["dropped"]
        assert set(before) - set(dropped) == set(after)
        assert all(torch.equal(before[key], after[key]) for key in after)
        configs = [json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / name)]
        assert configs[0] == configs[1]


@needs_reference
def test_a_vocabulary_cut_to_the_tokenizer_loads_too(parallel, reference, tmp_path):
    """Training shrank the embeddings to the tokenizer's 126375 rows while the config still says 126464."""
    source = Path(shutil.copytree(reference / "tiny_parallel_checkpoint", tmp_path / "source"))
    weights = load_file(source / "model.safetensors")
    for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        weights[name] = weights[name][:126375].clone()
    save_file(weights, source / "model.safetensors")
    convert(Options(str(source), tmp_path / "model"))
    model, processor = load(tmp_path / "model")
    inputs = demo_inputs(processor, 1, 2)
    slots = torch.full((2, 8), model.config.mask_token_id)
    with torch.no_grad():
        found = model(**inputs, answer_ids=slots).logits
        whole = parallel[0](**demo_inputs(parallel[1], 1, 2), answer_ids=slots).logits
    assert found.shape[-1] == 126375
    close(found, whole[..., :126375], 1e-5)
    for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        weights[name] = weights[name][:126000].clone()
    save_file(weights, source / "model.safetensors")
    with pytest.raises(ValueError, match="126000 rows for 126375 tokens"):
        convert(Options(str(source), tmp_path / "short"))


@needs_reference
def test_the_way_back_keeps_the_tokenizer(reference, tmp_path):
    """Ids of every token, and a class that transformers 4, which the released code needs, can read."""
    convert(Options(str(reference / "parallel"), tmp_path / "back", to="released"))
    files = [folder / "tokenizer.json" for folder in (reference / "tiny_parallel_checkpoint", tmp_path / "back")]
    before, after = (Tokenizer.from_file(str(file)) for file in files)
    assert before.get_vocab() == after.get_vocab()
    text = "<|Mask_Cap_3|>A man\nin a <img> suit<|eot_id|>"
    assert before.encode(text).ids == after.encode(text).ids
    settings = json.loads((tmp_path / "back" / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"


# --- checkpoints made here ----------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def released(tiny_model, tokenizer, tmp_path_factory):
    """A checkpoint in the released layout, two shards, of a tiny model."""
    folder = tmp_path_factory.mktemp("released")
    model = tiny_model(**RELEASED_QUIRKS)
    processor = PerceptionDLMProcessor.from_config(model.config, tokenizer, **RELEASED_PROCESSOR)
    export(model, processor, folder / "ours", torch.float32)
    convert(Options(str(folder / "ours"), folder / "source", to="released", max_shard_size=150_000))
    return folder / "source"


@pytest.fixture
def source(released, tmp_path):
    """A copy of the released checkpoint, to be damaged."""
    return Path(shutil.copytree(released, tmp_path / "source"))


def contents(folder):
    """All tensors of a directory."""
    return {k: v for path in sorted(folder.glob("*.safetensors")) for k, v in load_file(path).items()}


def test_there_and_back(released, tmp_path):
    """Convert, back, convert: tensors bit-equal, keys and configs equal, in both directions."""
    convert(Options(str(released), tmp_path / "first"))
    convert(Options(str(tmp_path / "first"), tmp_path / "back", to="released"))
    convert(Options(str(tmp_path / "back"), tmp_path / "second"))
    for one, other in ((released, tmp_path / "back"), (tmp_path / "first", tmp_path / "second")):
        before, after = contents(one), contents(other)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert json.loads((one / "config.json").read_text()) == json.loads((other / "config.json").read_text())
    assert any("vision_model.vision_model.encoder" in name for name in contents(released))


def test_a_converted_model_computes_what_it_did(released, tmp_path, scene):
    """Through pipeline and CLI doors: more regions than prompts, batches, captions in the order asked for."""
    convert(Options(str(released), tmp_path / "model"))
    pipe = pipeline("region-captioning", model=str(tmp_path / "model"), trust_remote_code=True)
    masks = [item.mask for item in scene.objects]
    masks = (masks * 8)[:8]
    together = pipe(scene.image, masks=masks, steps=4)
    assert len(together) == 8
    found = [region["box"] for region in together]
    expected = [np.flatnonzero(mask.any(axis=0))[0] for mask in masks]
    assert [box["xmin"] for box in found] == expected
    batch = pipe([scene.image, scene.image], masks=[masks[:2], masks[:3]], steps=4, batch_size=2)
    alone = [pipe(scene.image, masks=masks[:n], steps=4) for n in (2, 3)]
    assert [[r["caption"] for r in image] for image in batch] == [[r["caption"] for r in image] for image in alone]
    with pytest.raises(ValueError, match="empty"):
        pipe(scene.image, masks=[np.zeros_like(masks[0])])


def test_regions_enter_by_area_and_return_in_order(released, tmp_path, scene):
    """A released model is asked in the same order whatever order the caller chose."""
    convert(Options(str(released), tmp_path / "model"))
    model, processor = load(tmp_path / "model")
    masks = [item.mask for item in scene.objects][:3]
    forward = processor(images=scene.image, masks=masks)
    reverse = processor(images=scene.image, masks=masks[::-1])
    assert torch.equal(forward["region_boxes"], reverse["region_boxes"])
    one, other = model.generate(**forward, steps=8), model.generate(**reverse, steps=8)
    assert torch.equal(one.sequences, other.sequences.flip(0))
    assert len({tuple(row) for row in one.sequences.tolist()}) > 1


def test_nearest_masks_can_lose_a_region_and_area_masks_cannot(tiny_model, tokenizer):
    """The quirk and its cure, side by side: a region of 2 px between sampled pixels."""
    model = tiny_model(**RELEASED_QUIRKS)
    mask = np.zeros((64, 64), bool)
    mask[13:15, 21:23] = True
    kept = {}
    for sampling in ("nearest", "area"):
        processor = PerceptionDLMProcessor.from_config(model.config, tokenizer, mask_sampling=sampling)
        inputs = processor(images=Image.new("RGB", (64, 64)), masks=[mask])
        kept[sampling] = float(inputs["prompt_coverage"].sum())
    assert kept["nearest"] == 0
    assert kept["area"] == pytest.approx(4 / 64)


def test_mask_threshold_decides_about_stray_grey(tiny_model, tokenizer):
    """A JPEG's stray levels are background by default; the released model takes every level but 0."""
    values = np.zeros((64, 64), np.uint8)
    values[8:16, 8:16], values[40, 50] = 255, 5
    model = tiny_model(**RELEASED_QUIRKS)
    boxes = {}
    for threshold in (128, 1):
        processor = PerceptionDLMProcessor.from_config(model.config, tokenizer, mask_threshold=threshold)
        inputs = processor(images=Image.new("RGB", (64, 64)), masks=[Image.fromarray(values)])
        boxes[threshold] = inputs["region_boxes"][0].tolist()
    assert boxes == {128: [8, 8, 16, 16], 1: [8, 8, 51, 41]}


# --- LLaDA and SigLIP ---------------------------------------------------------------------------------------------

BLOCK_NAMES = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ff_norm", "self_attn.q_proj": "q_proj",
    "self_attn.k_proj": "k_proj", "self_attn.v_proj": "v_proj", "self_attn.o_proj": "attn_out",
    "mlp.gate_proj": "ff_proj", "mlp.up_proj": "up_proj", "mlp.down_proj": "ff_out",
}  # fmt: skip


@pytest.fixture(scope="session")
def llada(tokenizer, tmp_path_factory):
    """One tiny LLaDA in both namings: (Llama's, the original's, the model itself)."""
    folder = tmp_path_factory.mktemp("llada")
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 512}
    config = LlamaConfig(**sizes, rms_norm_eps=1e-5, rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    torch.manual_seed(0)
    model = LlamaForCausalLM._from_config(config, attn_implementation="eager").eval()
    weights = {name: weight.contiguous() for name, weight in model.state_dict().items()}
    published = {**sizes, "model_type": "llada", "rms_norm_eps": 1e-5, "rope_theta": 5e5, "hidden_act": "silu"}
    published |= {"initializer_range": 0.02, "attention_bias": False, "rope_scaling": None}
    write_source(folder / "hf", weights, published, tokenizer)
    original = {
        "model_type": "llada", "d_model": 48, "mlp_hidden_size": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 4,
        "max_sequence_length": 512, "vocab_size": len(tokenizer), "embedding_size": len(tokenizer), "rope": True,
        "rms_norm_eps": 1e-5, "rope_theta": 5e5, "activation_type": "silu", "layer_norm_type": "rms",
        "weight_tying": False, "include_bias": False, "alibi": False, "block_type": "llama",
    }  # fmt: skip
    write_source(folder / "original", {original_name(k): v for k, v in weights.items()}, original, tokenizer)
    return folder / "hf", folder / "original", model


def original_name(name):
    """LLaDA's own name of a Llama tensor."""
    whole = {"model.embed_tokens.weight": "wte", "model.norm.weight": "ln_f", "lm_head.weight": "ff_out"}
    if name in whole:
        return f"model.transformer.{whole[name]}.weight"
    layer, part = re.match(r"model\.layers\.(\d+)\.(.*)\.weight", name).groups()
    return f"model.transformer.blocks.{layer}.{BLOCK_NAMES[part]}.weight"


def write_source(folder, weights, config, tokenizer):
    """A source directory."""
    folder.mkdir(parents=True)
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


@pytest.fixture(scope="session")
def tower(tmp_path_factory):
    """A tiny SigLIP, text tower and all."""
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": 64, "patch_size": 8}
    text = {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 1, "max_position_embeddings": 8, "projection_size": 32}
    torch.manual_seed(1)
    model = SiglipModel(SiglipConfig(text_config=text, vision_config=vision))
    folder = tmp_path_factory.mktemp("tower") / "siglip"
    model.save_pretrained(folder)
    return folder, model


@pytest.mark.parametrize("naming", ["hf", "original"])
def test_llada_alone_answers_text(llada, tmp_path, naming):
    """Both namings become the same text-only model, whose scores are those of an unmasked Llama."""
    hf, original, reference = llada
    convert(Options(str(hf if naming == "hf" else original), tmp_path / "model"))
    model, processor = load(tmp_path / "model")
    inputs = processor(text="What is drawn?")
    slots = torch.full((1, 4), model.config.mask_token_id)
    with torch.no_grad():
        found = model(**inputs, answer_ids=slots).logits
        ids = torch.cat((inputs["input_ids"], slots), dim=1)
        everything = torch.zeros(1, 1, ids.shape[1], ids.shape[1])
        expected = reference(ids, attention_mask=everything).logits[:, -4:]
    close(found, expected, 1e-5)
    output = model.generate(**inputs, max_new_tokens=8, steps=8, block_length=4)
    assert output.sequences.shape == (1, 8)
    with pytest.raises(ValueError, match="no vision tower"):
        model.generate(**processor(text="What is drawn?", images=Image.new("RGB", (64, 64))))


def test_tower_and_llada_make_a_stage_1_model(llada, tower, tmp_path):
    """The composite holds both sources bit for bit and a fresh projector, and trains."""
    report = convert(Options(str(llada[1]), tmp_path / "model", vision_tower=str(tower[0])))
    assert {name.split(".")[0] for name in report.fresh} == {"projector"}
    weights = contents(tmp_path / "model")
    for name, weight in llada[2].state_dict().items():
        assert torch.equal(weights[name.replace("model.", "language_model.", 1)], weight), name
    vision = tower[1].vision_model.state_dict()
    assert torch.equal(
        weights["vision_tower.embeddings.patch_embedding.weight"], vision["embeddings.patch_embedding.weight"]
    )
    assert 0 < float(weights["projector.linear_1.weight"].std()) < 0.1
    assert any("head" in name for name in report.dropped)
    model, processor = load(tmp_path / "model")
    inputs = processor(images=Image.new("RGB", (64, 64), "red"), text="What is drawn?")
    labels = processor.encode_answers(["a red cat"], 8)
    loss = model(**inputs, labels=labels, mask_probability=torch.ones(1, 1)).loss
    loss.backward()
    assert torch.isfinite(loss)
    assert float(model.projector.linear_1.weight.grad.abs().sum()) > 0


def test_base_becomes_a_region_model(llada, tower, tmp_path, scene):
    """Region parts are as a new model has them, everything else is the base's; both conditionings caption regions."""
    convert(Options(str(llada[0]), tmp_path / "base", vision_tower=str(tower[0])))
    before = contents(tmp_path / "base")
    with pytest.raises(ValueError, match="knows no regions"):
        load(tmp_path / "base")[1](images=scene.image, masks=[item.mask for item in scene.objects])
    for conditioning, prefix in (("replay", "region_replay."), ("vision", "region_prompts.")):
        target = tmp_path / conditioning
        report = convert(Options(str(tmp_path / "base"), target, to="region", region_conditioning=conditioning))
        after = contents(target)
        assert all(torch.equal(after[name], before[name]) for name in before)
        assert sorted(report.fresh) == sorted(name for name in after if name.startswith(prefix))
        assert all(float(after[name].abs().sum()) > 0 for name in report.fresh if name.endswith("weight"))
        pipe = pipeline("region-captioning", model=str(target), trust_remote_code=True)
        assert len(pipe(scene.image, masks=[item.mask for item in scene.objects], steps=2)) == len(scene.objects)


def test_rows_for_added_tokens_are_grown(llada, tower, tmp_path, tokenizer):
    """A vocabulary without region tokens gets rows for them; old rows stay."""
    folder = Path(shutil.copytree(llada[0], tmp_path / "short"))
    keep = len(tokenizer) - 23  # region tokens come last
    content = json.loads((folder / "tokenizer.json").read_text())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < keep]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings = {
        k: v
        for k, v in settings.items()
        if k not in ("additional_special_tokens", "extra_special_tokens", "added_tokens_decoder")
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    weights = load_file(folder / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = weights[name][:keep].clone()
    save_file(weights, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": keep}))
    convert(Options(str(folder), tmp_path / "base", vision_tower=str(tower[0])))
    convert(Options(str(tmp_path / "base"), tmp_path / "region", to="region"))
    grown = contents(tmp_path / "region")["lm_head.weight"]
    assert grown.shape[0] == len(tokenizer)
    assert torch.equal(grown[:keep], weights["lm_head.weight"])
    assert float(grown[keep:].std()) == pytest.approx(0.02, rel=0.2)


# --- what may be wrong --------------------------------------------------------------------------------------------


def damage_shard(folder):
    path = sorted(folder.glob("model-*.safetensors"))[0]
    path.write_bytes(path.read_bytes()[:-100])


def garble_header(folder):
    path = sorted(folder.glob("model-*.safetensors"))[0]
    path.write_bytes(path.read_bytes()[:8] + b"garbage" + path.read_bytes()[15:])


def remove_shard(folder):
    sorted(folder.glob("model-*.safetensors"))[0].unlink()


def edit_json(name, change):
    def damage(folder):
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content))

    return damage


def edit_tensors(change):
    def damage(folder):
        path = sorted(folder.glob("model-*.safetensors"))[0]
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        places = {k: v for k, v in index["weight_map"].items() if v != path.name} | dict.fromkeys(tensors, path.name)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))

    return damage


def first_key(content):
    return next(iter(content["weight_map"]))


def set_first(tensors, function):
    name = next(iter(tensors))
    tensors[name] = function(tensors[name])


def use_pickle(folder):
    for path in folder.glob("model*"):
        path.unlink()
    torch.save({}, folder / "pytorch_model.bin")


DAMAGES = {
    "cut shard": (damage_shard, "damaged"),
    "garbled shard": (garble_header, "damaged"),
    "missing shard": (remove_shard, r"model-00001-of-\d+.safetensors.*missing"),
    "missing index entry": (
        edit_json("model.safetensors.index.json", lambda c: c["weight_map"].pop(first_key(c))),
        "does not list",
    ),
    "index of a tensor nobody has": (
        edit_json("model.safetensors.index.json", lambda c: c["weight_map"].update({"ghost": first_shard(c)})),
        "ghost.*do not hold",
    ),
    "missing tensor": (edit_tensors(lambda t: t.pop(next(iter(t)))), "does not fill"),
    "extra tensor": (edit_tensors(lambda t: t.update({"adapter.weight": torch.ones(2)})), "adapter.weight"),
    "superfluous layer": (
        edit_tensors(lambda t: t.update({"language_model.model.layers.7.mlp.up_proj.weight": torch.ones(2, 2)})),
        "layers.7.*does not call for",
    ),
    "integers": (edit_tensors(lambda t: set_first(t, lambda w: w.to(torch.int8))), "I8.*F32, F16, BF16"),
    "mixed dtypes": (edit_tensors(lambda t: set_first(t, lambda w: w.to(torch.float16))), "different dtypes.*--dtype"),
    "wrong shape": (edit_tensors(lambda t: set_first(t, lambda w: torch.cat((w, w)))), "shapes disagree|rows"),
    "unknown model type": (edit_json("config.json", lambda c: c.update(model_type="llava")), "'llava'.*pdmllm"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json"),
    "broken config": (lambda folder: (folder / "config.json").write_text("{"), "not JSON"),
    "other projector": (
        edit_json("config.json", lambda c: c.update(vision_abstractor_config={"projection_type": "qformer"})),
        "qformer.*mlp2x_gelu",
    ),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json"),
    "pickles": (use_pickle, "pickled weights are not read"),
}


def first_shard(content):
    return next(iter(content["weight_map"].values()))


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_faulty_source_is_refused_before_anything_is_written(source, tmp_path, damage):
    spoil, message = DAMAGES[damage]
    spoil(source)
    before = sorted(tmp_path.iterdir())
    with pytest.raises((ValueError, OSError), match=f"(?s){message}"):
        convert(Options(str(source), tmp_path / "target"))
    assert sorted(tmp_path.iterdir()) == before


def test_mixed_dtypes_convert_when_one_is_chosen(source, tmp_path):
    edit_tensors(lambda t: set_first(t, lambda w: w.to(torch.float16)))(source)
    convert(Options(str(source), tmp_path / "target", dtype=torch.bfloat16))
    assert {weight.dtype for weight in contents(tmp_path / "target").values()} == {torch.bfloat16}


def test_an_existing_target_is_left_alone(source, tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    (target / "mine.txt").write_text("keep")
    with pytest.raises(FileExistsError, match="exists already"):
        convert(Options(str(source), target))
    assert [path.name for path in target.iterdir()] == ["mine.txt"]


def test_a_full_disk_is_noticed_before_writing(source, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10**6))
    with pytest.raises(OSError, match=r"the disk has 0\.00 GiB free"):
        convert(Options(str(source), tmp_path / "target"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("No space left on device")])
def test_an_interruption_leaves_nothing_behind(source, tmp_path, monkeypatch, error):
    """Raised while the files after the shards are written."""

    def interrupt(*_arguments):
        raise error

    monkeypatch.setattr(conversion, "write_model_files", interrupt)
    with pytest.raises(type(error)):
        convert(Options(str(source), tmp_path / "target"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_a_killed_run_leaves_no_target_and_the_next_one_succeeds(source, tmp_path):
    partial = tmp_path / ".target.partial"
    partial.mkdir()
    (partial / "model.safetensors").write_bytes(b"half")
    convert(Options(str(source), tmp_path / "target"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]
    assert len(contents(tmp_path / "target")) > 50


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": "released"}, "does not convert --to released"),
        ({"to": "region"}, "does not convert --to region"),
        ({"vision_tower": "itself"}, "--vision-tower joins a SigLIP"),
    ],
)
def test_impossible_combinations_are_refused(source, tmp_path, options, message):
    if "vision_tower" in options:
        options = {"vision_tower": str(source)}
    with pytest.raises(ValueError, match=message):
        convert(Options(str(source), tmp_path / "target", **options))


def test_only_a_finished_target_is_pushed(source, tmp_path, monkeypatch):
    """The Hub gets the whole directory, and nothing when the conversion fails."""
    pushed = []

    class Hub:
        def create_repo(self, repository, exist_ok):
            assert exist_ok

        def upload_folder(self, repo_id, folder_path):
            pushed.append((repo_id, sorted(path.name for path in folder_path.iterdir())))

    monkeypatch.setattr(conversion, "HfApi", Hub)
    convert(Options(str(source), tmp_path / "target", push_to_hub="someone/model"))
    ((repository, files),) = pushed
    assert repository == "someone/model"
    assert {"config.json", "conversion.json", "model.safetensors.index.json", "modeling_perceptiondlm.py"} <= set(files)
    remove_shard(source)
    with pytest.raises(FileNotFoundError):
        convert(Options(str(source), tmp_path / "other", push_to_hub="someone/model"))
    assert len(pushed) == 1


def test_our_own_quirks_do_not_fit_the_released_code(tiny_model, tokenizer, tmp_path):
    model = tiny_model()
    export(model, PerceptionDLMProcessor.from_config(model.config, tokenizer), tmp_path / "ours", torch.float32)
    with pytest.raises(ValueError, match=r"released code cannot run.*isolated"):
        convert(Options(str(tmp_path / "ours"), tmp_path / "target", to="released"))


def test_command_line(released, tmp_path):
    """The command prints what it used and dropped; wrong input is one line and exit status 2."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "perceptiondlm.scripts.cli", "convert"]
    good = subprocess.run(
        [*command, str(released), str(tmp_path / "t")], capture_output=True, text=True, env=environment
    )
    assert good.returncode == 0, good.stderr
    assert re.search(r"released -> .*t: \d+ tensors used", good.stdout)
    assert "peak memory" in good.stdout
    bad = subprocess.run(
        [*command, str(released), str(tmp_path / "t")], capture_output=True, text=True, env=environment
    )
    assert bad.returncode == 2
    assert "exists already" in bad.stderr.splitlines()[-1]
    assert "Traceback" not in bad.stderr
