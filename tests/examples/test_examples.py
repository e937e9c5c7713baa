"""Every example runs as its docstring says, in a process of its own, with the embedded models and sample pictures."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset, Image, load_dataset
from PIL import Image as Pillow


ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
SCENE, SCENE_MASKS = EXAMPLES / "scene.png", EXAMPLES / "scene_masks.json"
NAMES = ("flower", "flower", "umbrella", "mushroom", "boat", "butterfly")  # the sample scene's regions, in order


def run(example: str, *arguments: object, code: int = 0, before: str = "") -> str:
    """Standard output of an example; `before` is executed in its process first."""
    path = EXAMPLES / f"{example}.py"
    script = (
        f"import runpy, sys; sys.argv[0] = {str(path)!r}\n{before}\nrunpy.run_path({str(path)!r}, run_name='__main__')"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == code, done.stderr
    return done.stdout if code == 0 else done.stderr


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """The drawn world's model as people have models: a folder with its code."""
    folder = tmp_path_factory.mktemp("drawn")
    for path in (*(ROOT / "drawn" / "model").iterdir(), *ROOT.glob("*_perceptiondlm.py")):
        shutil.copy(path, folder)
    return folder


def scene_masks() -> list[dict]:
    annotations = json.loads(SCENE_MASKS.read_text())["annotations"]
    return [annotation["mask_rle"] for annotation in annotations]


def assert_names_the_scene(captions: list[str]) -> None:
    assert len(captions) == len(NAMES)
    for name, caption in zip(NAMES, captions, strict=True):
        assert name in caption


def test_caption_image(drawn):
    lines = run("caption_image", SCENE, "--masks", SCENE_MASKS, "--model", drawn).splitlines()
    assert [line.split(".")[0] for line in lines] == ["1", "2", "3", "4", "5", "6"]
    assert_names_the_scene(lines)
    assert len(run("caption_image").splitlines()) == 7  # the sample photograph, by the default
    assert len(run("caption_image", SCENE, "--boxes", "40,30,200,180").splitlines()) == 1


def test_many_images_of_several_sizes(tmp_path, drawn):
    scene = Pillow.open(EXAMPLES / "scene.png")
    half = {"size": [scene.height // 2, scene.width // 2], "counts": [0, scene.height // 2 * (scene.width // 2)]}
    scene.save(tmp_path / "a.png")
    scene.resize((scene.width // 2, scene.height // 2)).save(tmp_path / "b.png")
    scene.save(tmp_path / "c.png")
    scene.save(tmp_path / "without_masks.png")
    for name, masks in (("a", scene_masks()), ("b", [half]), ("c", scene_masks()[::-1])):
        content = {"annotations": [{"mask_rle": mask} for mask in masks]}
        (tmp_path / f"{name}_masks.json").write_text(json.dumps(content))
    total, *lines = run("many_images", tmp_path, "--batch-size", 2, "--model", drawn).splitlines()
    assert total == "3 images, 13 regions"
    captions = {line.split(" ", 1)[0]: json.loads(line.split(" ", 1)[1]) for line in lines}
    assert list(captions) == ["a.png", "b.png", "c.png"]
    assert_names_the_scene(captions["a.png"])
    assert captions["c.png"] == captions["a.png"][::-1]
    assert len(captions["b.png"]) == 1


def test_encode_once_ask_often(drawn):
    lines = run("encode_once_ask_often", SCENE, "--masks", SCENE_MASKS, "--model", drawn).splitlines()
    assert lines[0].startswith("encoded in")
    assert_names_the_scene(lines[1:-2])
    assert lines[-2] == "the same together: True"
    assert lines[-1].startswith("the same in 32 steps: ")


def test_questions_in_several_turns():
    question, answer, *rest = run("questions").splitlines()
    assert question == "How many objects are in the image?"
    assert answer.strip() in ("one", "two", "three", "four", "five", "six")  # it counts, if not always right
    assert rest[0] == "What color is the boat?"


def test_caption_dataset_writes_both_formats(tmp_path, drawn):
    records = [
        {"id": f"n{row}", "image": str(EXAMPLES / "scene.png"), "masks": scene_masks()[row:]} for row in range(3)
    ]
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    run("caption_dataset", tmp_path / "captions.jsonl", "--data", tmp_path / "records.jsonl", "--model", drawn)
    lines = [json.loads(line) for line in (tmp_path / "captions.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == ["n0", "n1", "n2"]
    assert [len(line["regions"]) for line in lines] == [6, 5, 4]
    assert_names_the_scene([region["caption"] for region in lines[0]["regions"]])

    Dataset.from_list(records).cast_column("image", Image()).to_parquet(tmp_path / "records.parquet")
    run("caption_dataset", tmp_path / "captions.parquet", "--data", tmp_path / "records.parquet", "--model", drawn)
    written = load_dataset("parquet", data_files=str(tmp_path / "captions.parquet"), split="train").to_list()
    assert [[region["caption"] for region in row["regions"]] for row in written] == [
        [region["caption"] for region in line["regions"]] for line in lines
    ]


def test_caption_dataset_refuses_other_formats_before_any_work(tmp_path):
    assert "must end in .jsonl or .parquet" in run("caption_dataset", tmp_path / "captions.csv", code=2)


def test_annotate_hub_dataset_goes_on_from_where_it_was(tmp_path, drawn):
    """A data set of `datasets` under a local path stands for one on the Hub; a second call finds everything done."""
    rows = [{"image": str(EXAMPLES / "scene.png"), "masks": scene_masks()[row:]} for row in (0, 4)]
    (tmp_path / "set").mkdir()
    Dataset.from_list(rows).cast_column("image", Image()).to_parquet(tmp_path / "set" / "rows.parquet")
    for _ in range(2):
        arguments = (f"hub:{tmp_path / 'set'}", tmp_path / "out", "--model", drawn)
        said, file, _, *lines = run("annotate_hub_dataset", *arguments).splitlines()
        assert said == "8 regions of 2 images"
        assert len(json.loads(Path(file).read_text())["annotations"]) == 8
        assert lines[0].startswith("train/0/0  ")
        assert_names_the_scene(lines)


def test_every_example_is_short_and_has_a_test():
    examples = sorted(EXAMPLES.glob("*.py"))
    assert len(examples) >= 6
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    for example in examples:
        assert f'run("{example.stem}"' in tests, example.name
        code = [line for line in example.read_text().splitlines() if line.strip() and not line.startswith("# ")]
        assert 20 <= len(code) <= 40, f"{example.name} has {len(code)} lines"


# --- SAM --------------------------------------------------------------------------------------------------------------

# torchvision does not import beside the CPU build of torch. transformers needs one function of it here, non-maximum
# suppression; where it is missing, the example's process gets this one. Everything else is the pipeline as it is.
SUPPRESSION = """
import importlib.util, types, torch
from transformers.models.sam import image_processing_pil_sam as sam

def batched_nms(boxes, scores, idxs, iou_threshold):
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1)
    kept = []
    for index in scores.argsort(descending=True).tolist():
        starts, ends = boxes[kept, :2].clamp(min=boxes[index, :2]), boxes[kept, 2:].clamp(max=boxes[index, 2:])
        common = (ends - starts).clamp(min=0).prod(dim=1)
        if (common <= iou_threshold * (areas[kept] + areas[index] - common)).all():
            kept.append(index)
    return torch.tensor(kept)

if importlib.util.find_spec("torchvision") is None:
    sys.modules["torchvision"] = types.ModuleType("torchvision")
    sys.modules["torchvision.ops"] = types.ModuleType("torchvision.ops")
    sys.modules["torchvision.ops.boxes"] = types.ModuleType("torchvision.ops.boxes")
    sys.modules["torchvision.ops.boxes"].batched_nms = batched_nms
    processor = sam.SamImageProcessorPil
    checked = processor.post_process_for_mask_generation
    processor.post_process_for_mask_generation = getattr(checked, "__wrapped__", checked)
"""


@pytest.fixture(scope="module")
def tiny_sam(tmp_path_factory) -> Path:
    """A SAM of random weights, a few thousand of them."""
    import torch
    from transformers import SamConfig, SamModel
    from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil

    sizes = {"hidden_size": 32, "image_size": 128, "patch_size": 16}
    vision = {**sizes, "output_channels": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_dim": 64}
    decoder = {"hidden_size": 32, "mlp_dim": 64, "num_attention_heads": 2, "iou_head_hidden_dim": 32}
    config = SamConfig(
        vision_config={**vision, "num_pos_feats": 16, "global_attn_indexes": [1], "window_size": 4},
        prompt_encoder_config={**sizes, "mask_input_channels": 4},
        mask_decoder_config=decoder,
    )
    folder = tmp_path_factory.mktemp("sam")
    torch.manual_seed(0)
    SamModel(config).save_pretrained(folder)
    SamImageProcessorPil(
        size={"longest_edge": 128},
        pad_size={"height": 128, "width": 128},
        mask_size={"longest_edge": 64},
        mask_pad_size={"height": 64, "width": 64},
    ).save_pretrained(folder)
    return folder


def test_sam_masks_go_in_as_they_are(tiny_sam):
    """Random weights find masks all over the image: 3 a point, 4 x 4 points, none left out."""
    everything = ("--points-per-side", 4, "--quality", "-1000", "--stability", "-1", "--overlap", 1)
    found, *lines = run("sam_masks_to_captions", "--sam", tiny_sam, *everything, before=SUPPRESSION).splitlines()
    count = int(found.split()[2])
    assert count == 48
    assert len(lines) == count
    assert all("(" in line and len(line.split(")  ", 1)[1]) > 5 for line in lines)


def test_regions_are_found_and_captioned(tmp_path):
    pytest.importorskip("skimage", reason="the classical segmenter needs scikit-image")
    printed = run("find_and_caption", EXAMPLES / "scene.png", "--out", tmp_path / "found.png").splitlines()
    assert len(printed) > 3
    assert all(0 <= float(line.split()[0]) <= 1 for line in printed)
    with Pillow.open(tmp_path / "found.png") as picture, Pillow.open(EXAMPLES / "scene.png") as scene:
        assert picture.width > scene.width
