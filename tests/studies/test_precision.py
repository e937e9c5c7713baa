"""Number formats: quantised weights from the library and the shell, and a comparison that counts what differs."""

import json
from pathlib import Path

import pytest
import torch
from transformers import pipeline

from perceptiondlm.common import loading
from perceptiondlm.drawn.scenes import draw_scene
from perceptiondlm.scripts.cli import main
from perceptiondlm.studies import precision


ROOT = Path(__file__).parents[2]
EXAMPLE = ["caption", str(ROOT / "examples" / "scene.png"), "--masks", str(ROOT / "examples" / "scene_masks.json")]


@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_quantised_weights_caption_almost_alike(name):
    """The linear layers shrink, embeddings and head stay as they are; most captions do not change."""
    pytest.importorskip("torchao")
    plain = pipeline("region-captioning", model=str(ROOT), trust_remote_code=True, device="cpu")
    small = pipeline(
        "region-captioning", model=str(ROOT), trust_remote_code=True, device="cpu",
        model_kwargs={"quantization_config": loading.quantization(name)},
    )  # fmt: skip
    layer, twin = (pipe.model.language_model.layers[0].mlp.up_proj.weight for pipe in (plain, small))
    assert precision.stored_bytes(twin) < 0.3 * precision.stored_bytes(layer)
    assert type(small.model.lm_head.weight) is type(plain.model.lm_head.weight)
    scene = draw_scene(1000, 2)
    masks = [item.mask for item in scene.objects]
    captions, quantised = ([region["caption"] for region in pipe(scene.image, masks=masks)] for pipe in (plain, small))
    assert sum(a == b for a, b in zip(captions, quantised, strict=True)) >= len(captions) - 1


def test_shell_captions_with_quantised_weights(tmp_path):
    pytest.importorskip("torchao")
    assert main([*EXAMPLE, "--quantize", "int8", "--json", str(tmp_path / "c.json")]) == 0
    assert len(json.loads((tmp_path / "c.json").read_text())[0]["regions"]) == 6


def test_quantisation_without_its_package_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(loading, "is_torchao_available", lambda: False)
    assert main([*EXAMPLE, "--quantize", "fp8"]) == 2
    assert "--quantize fp8 needs torchao: pip install 'perceptiondlm[quantization]'" in capsys.readouterr().err


def test_comparison_of_formats_counts_what_differs(tmp_path, monkeypatch):
    """fp32 against itself differs nowhere; against a model whose head is disturbed it does."""
    report = tmp_path / "precision.json"
    arguments = [
        "precision",
        "--formats",
        "float32",
        "bfloat16",
        "--images",
        "2",
        "--json",
        str(report),
        "--device",
        "cpu",
    ]
    monkeypatch.setattr("sys.argv", arguments)
    precision.main()
    rows = {row["format"]: row for row in json.loads(report.read_text())["rows"]}
    assert rows["float32"]["tokens_unlike_first_format"] == rows["float32"]["tokens_unlike_uncached"] == 0
    assert rows["bfloat16"]["weight_bytes"] == rows["float32"]["weight_bytes"] / 2
    assert rows["float32"]["tokens"] % 32 == 0
    changed = [torch.tensor([1, 2, 3]), torch.tensor([4])]
    assert precision.different([torch.tensor([1, 5, 6]), torch.tensor([4])], changed) == 2
