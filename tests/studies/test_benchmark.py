"""The efficiency study compares systems that do the same work: each writes what it should, and all are reported."""

import json

import pytest
import torch
from PIL import Image

from perceptiondlm.common.measuring import timed
from perceptiondlm.scripts.cli import main
from perceptiondlm.studies import decoding_curves, efficiency
from perceptiondlm.studies.efficiency import (
    SHAPES,
    SYSTEMS,
    Study,
    as_released,
    build_model,
    make_inputs,
    released_layout,
)


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


def test_fewer_passes_are_the_first_ones(study):
    """A run with one pass does the prefill and one step: what a pass costs is taken from the difference."""
    inputs = make_inputs(study.model.config, 2, torch.device("cpu"))
    for system in ("ar_one_by_one", "ar_shared_prefix", "ar_batch"):
        assert torch.equal(study.run(system, inputs, passes=2), study.run(system, inputs)[:, :2])
    settings = {"max_new_tokens": 6, "early_exit": False}
    assert torch.equal(
        study.run("cached", inputs, passes=1), study.model.generate(**inputs, steps=1, **settings).sequences
    )


def test_counted_arithmetic_is_that_of_the_matrix_products(study):
    """The full recompute, by formula: vision tower, projector, and 6 passes of 8 tokens per region and the prompt."""
    inputs = make_inputs(study.model.config, 2, torch.device("cpu"))
    found = study.flops("full", inputs)
    length = inputs["input_ids"].shape[1] + 2 * (1 + 6 + 1)
    width, inner, layers, vocabulary = 48, 64, 2, 256
    per_layer = 2 * length * (4 * width**2 + 3 * width * inner) + 4 * length**2 * width
    passes = 6 * (layers * per_layer + 2 * length * width * vocabulary)
    patches, depth, hidden = 16, 32, 48
    tower = 7 * (2 * patches * 3 * 256 * depth)
    tower += 7 * (2 * patches * (4 * depth**2 + 2 * depth * hidden) + 4 * patches**2 * depth)  # feature layer -2 of 2
    projector = 7 * 2 * 4 * (4 * depth * width + width**2)
    replay = 2 * 2 * 16 * 4 * width + 2 * 2 * 6 * width
    assert found == pytest.approx(passes + tower + projector + replay, rel=1e-3)


def test_command_reports_every_system(tiny_shape, tmp_path, capsys):
    arguments = ["benchmark", "--shape", "small", "--device", "cpu", "--regions", "1", "4", "--rounds", "2"]
    arguments += ["--fast-steps", "2", "--steps", "4", "--tokens", "4", "--at-a-time", "1", "2", "4"]
    arguments += ["--plot", str(tmp_path / "b.png"), "--plot-groups", str(tmp_path / "groups.png")]
    assert main([*arguments, "--json", str(tmp_path / "b.json")]) == 0
    result = json.loads((tmp_path / "b.json").read_text())
    assert {(row["system"], row["regions"]) for row in result["rows"]} == {(s, n) for s in SYSTEMS for n in (1, 4)}
    assert all(row["fastest"] <= row["seconds"] <= row["slowest"] for row in result["rows"])
    rows = {row["system"]: row for row in result["rows"] if row["regions"] == 4}
    assert [rows[name]["tokens_per_forward"] for name in ("ar_batch", "ar_one_by_one", "fast")] == [4, 1, 8]
    assert [rows[name]["passes"] for name in ("ar_batch", "ar_one_by_one", "full")] == [4, 16, 4]
    assert all(row["bound_seconds"] <= row["seconds"] for row in result["rows"])
    assert (
        rows["fast_on_cached_image"]["flops"] < rows["fast"]["flops"] < rows["cached"]["flops"] < rows["full"]["flops"]
    )
    grouped = {(row["system"], row["at_a_time"]) for row in result["groups"]}
    assert grouped == {(system, size) for system in ("full", "cached", "fast") for size in (1, 2, 4)}
    assert all(Image.open(tmp_path / name).size[0] > 500 for name in ("b.png", "groups.png"))
    printed = capsys.readouterr().out
    assert "vs full" in printed
    assert "speed-up" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--regions", "0"], "--regions"),
        (["--regions", "4", "--at-a-time", "3"], "--at-a-time must divide the largest of --regions, 4: got [3]"),
        (["--plot-groups", "x.png"], "--plot-groups shows --at-a-time"),
        (["--tokens", "1"], "at least 2"),
        (["--dtype", "float33"], "--dtype"),
        (["--device", "abacus"], "--device"),
    ],
)
def test_wrong_benchmark_arguments_are_refused(arguments, message, tmp_path, capsys):
    json_path = tmp_path / "b.json"
    assert main(["benchmark", "--fast-steps", "2", "--json", str(json_path), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not json_path.exists()


def test_peak_memory_counts_what_a_run_takes_at_its_peak():
    """An array of 64 MB, freed before the run ends, then one that was there before."""
    device = torch.device("cpu")
    _, peak = timed(lambda: torch.ones(16 * 2**20).sum(), device)
    if peak is None:
        pytest.skip("this system does not tell peak memory")
    assert 60e6 < peak < 80e6
    kept = torch.ones(16 * 2**20)
    assert timed(kept.sum, device)[1] < 10e6


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
