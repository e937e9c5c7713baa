"""The efficiency study compares systems that do the same work: each writes what it should, and all are reported."""

import json

import pytest
import torch
from PIL import Image

from perceptiondlm.evaluation import decoding_curves, efficiency
from perceptiondlm.evaluation.efficiency import (
    SHAPES,
    SYSTEMS,
    Study,
    as_released,
    build_model,
    make_inputs,
    released_layout,
)
from perceptiondlm.scripts.cli import main


TINY = {
    **SHAPES["small"],
    "vision_config": {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
        "image_size": 64, "patch_size": 16, "vision_use_head": False,
    },
    "text_config": {
        "vocab_size": 256, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 4, "max_position_embeddings": 512, "pad_token_id": None, "initializer_range": 0.3,
    },
    "initializer_range": 0.3,
}  # fmt: skip


@pytest.fixture
def tiny_shape(monkeypatch):
    monkeypatch.setitem(efficiency.SHAPES, "small", TINY)


@pytest.fixture
def study(tiny_shape):
    return Study(build_model("small", "", torch.device("cpu"), torch.float32), num_tokens=6, steps=6, fast_steps=2)


def test_rivals_write_the_same_tokens(study):
    """Anew, in turn on a shared prefix, or in one batch: greedy decoding of the same causal model."""
    inputs = make_inputs(study.model.config, 3, torch.device("cpu"))
    outputs = [study.run(system, inputs) for system in ("ar_one_by_one", "ar_shared_prefix", "ar_batch")]
    assert outputs[0].shape == (3, 6)
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])
    assert len({tuple(row) for row in outputs[0].tolist()}) == 3


def test_rivals_decode_what_a_plain_causal_model_says(study):
    """The first region, token by token, without a cache."""
    inputs = make_inputs(study.model.config, 2, torch.device("cpu"))
    found = study.run("ar_batch", inputs)[0].tolist()
    with torch.no_grad():
        shared, own = study._prefix(inputs)
        embeds = torch.cat((shared, own[:1]), dim=1)
        for token in found:
            assert int(study.causal(inputs_embeds=embeds).logits[0, -1].argmax()) == token
            embeds = torch.cat((embeds, study.model.get_input_embeddings()(torch.tensor([[token]]))), dim=1)


def test_diffusion_systems_are_the_model(study):
    """`cached` and `fast` are generate; an encoded image changes nothing; `full` is the released rule."""
    model, inputs = study.model, make_inputs(study.model.config, 3, torch.device("cpu"))
    settings = {"max_new_tokens": 6, "early_exit": False}
    assert torch.equal(study.run("cached", inputs), model.generate(**inputs, steps=6, **settings).sequences)
    fast = model.generate(**inputs, steps=2, **settings).sequences
    assert torch.equal(study.run("fast", inputs), fast)
    encoded = model.encode_image(**inputs)
    assert torch.equal(study.run("fast_on_cached_image", inputs, encoded), fast)
    with released_layout(model.config):
        rules = {"steps": 6, "shared_schedule": True, "remasking": True}
        released = model.generate(**as_released(inputs), **rules, **settings).sequences
    assert torch.equal(study.run("full", inputs), released)
    assert model.config.attention_layout == "isolated"


def test_command_reports_every_system(tiny_shape, tmp_path, capsys):
    arguments = ["benchmark", "--shape", "small", "--device", "cpu", "--regions", "1", "3", "--rounds", "2"]
    arguments += ["--fast-steps", "2", "--steps", "4", "--tokens", "4"]
    assert main([*arguments, "--json", str(tmp_path / "b.json"), "--plot", str(tmp_path / "b.png")]) == 0
    result = json.loads((tmp_path / "b.json").read_text())
    assert {(row["system"], row["regions"]) for row in result["rows"]} == {(s, n) for s in SYSTEMS for n in (1, 3)}
    assert all(row["fastest"] <= row["seconds"] <= row["slowest"] for row in result["rows"])
    forwards = {row["system"]: row["tokens_per_forward"] for row in result["rows"] if row["regions"] == 3}
    assert forwards["ar_batch"] == 3
    assert forwards["ar_one_by_one"] == 1
    assert forwards["fast"] == 6
    assert Image.open(tmp_path / "b.png").size[0] > 500
    assert "vs full" in capsys.readouterr().out


def test_benchmark_refuses_no_regions(tmp_path, capsys):
    arguments = ["benchmark", "--regions", "0", "--fast-steps", "2", "--json", str(tmp_path / "b.json")]
    assert main(arguments) == 2
    assert "--regions" in capsys.readouterr().err


def test_curves_hold_every_sampler(tiny_model, tiny_processor, monkeypatch, tmp_path):
    """Each point says what share of the reference's score it keeps and in how many passes."""
    points = {"fixed steps": [{"steps": 2}], "threshold": [{"sampler": "threshold", "threshold": 0.1}]}
    monkeypatch.setattr(decoding_curves, "CURVES", points)
    monkeypatch.setattr(decoding_curves, "REFERENCE", {"steps": 4, "early_exit": False})
    model = tiny_model()
    model.generation_config.max_new_tokens = 4
    result = decoding_curves.curves(model, tiny_processor(model), seed=1, images=2)
    assert result["reference"]["num_forward_passes"] == 4
    assert result["curves"]["fixed steps"][0]["num_forward_passes"] == 2
    assert 1 <= result["curves"]["threshold"][0]["num_forward_passes"] <= 4
    decoding_curves.plot(result, tmp_path / "curves.png")
    assert Image.open(tmp_path / "curves.png").size[0] > 500
    assert len(decoding_curves.table(result).splitlines()) == 4
