"""docs/finetuning.md, command by command, on tiny data; and what import-regions accepts and refuses."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from miniature_runs import ROOT
from PIL import Image
from pycocotools import mask as coco_mask
from transformers import AutoModel, AutoProcessor

from perceptiondlm.checkpoints.folder import export
from perceptiondlm.scripts.cli import main as perceptiondlm
from perceptiondlm.training.held_out import word_f1
from perceptiondlm.training.own_regions import import_regions
from perceptiondlm.training.train import main as train_command


# What makes the recipe a matter of seconds.
TINY = [
    "batch_size=2", "trainer.num_train_epochs=2", "trainer.use_cpu=true", "trainer.dataloader_num_workers=0",
    "trainer.disable_tqdm=true", "trainer.logging_steps=1", "trainer.learning_rate=1e-2", "loss.max_slots=32",
    "evaluation.source.samples=1", "evaluation.steps=3",
]  # fmt: skip
POLYGON = [[4, 4, 30, 4, 30, 30, 4, 30]]


def write_photos(folder: Path, count: int = 6) -> Path:
    folder.mkdir(parents=True)
    for number in range(count):
        Image.new("RGB", (64, 64), (40 * number, 90, 120)).save(folder / f"{number}.jpg")
    return folder


def write_coco(path: Path, count: int = 6, **changes) -> Path:
    """Two annotations an image: a polygon and an RLE; `changes` go into the last one."""
    mask = np.zeros((64, 64), np.uint8, order="F")
    mask[34:60, 34:60] = 1
    rle = coco_mask.encode(mask)
    kinds = [POLYGON, {"size": [64, 64], "counts": rle["counts"].decode()}]
    annotations = [
        {"id": 2 * n + k, "image_id": n, "segmentation": kinds[k], "caption": f"a {['red', 'blue'][k]} house"}
        for n in range(count)
        for k in range(2)
    ]
    annotations[-1].update(changes)
    images = [{"id": n, "file_name": f"{n}.jpg", "height": 64, "width": 64} for n in range(count)]
    categories = [{"id": 3, "name": "kettle"}]
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return path


def commands_of(page: Path, section: str) -> list[list[str]]:
    """The shell commands of a section of a page, as argument lists."""
    block = re.search(rf"## {section}\n```bash\n(.*?)```", page.read_text(), re.DOTALL)
    return [shlex.split(line) for line in block[1].splitlines()]


def test_the_page_runs_from_coco_to_a_better_merged_checkpoint(
    tmp_path, tiny_model, tiny_processor, monkeypatch, capsys
):
    model = tiny_model()
    export(model, tiny_processor(model, max_tiles=1), tmp_path / "models" / "perceptiondlm", torch.bfloat16)
    write_photos(tmp_path / "photos")
    write_coco(tmp_path / "annotations.json")
    (tmp_path / "training").symlink_to(ROOT / "training")
    monkeypatch.chdir(tmp_path)
    steps = commands_of(ROOT / "docs" / "finetuning.md", "Run")
    assert [step[:2] for step in steps] == [
        ["perceptiondlm", "import-regions"], ["perceptiondlm", "plan"], ["accelerate", "launch"],
    ]  # fmt: skip
    for step in steps:
        if step[0] == "perceptiondlm":
            assert perceptiondlm(step[1:]) == 0
        else:
            assert train_command([*step[step.index("training/train.py") + 1 :], *TINY]) == 0
    assert "5 images to train on, 1 held out" in capsys.readouterr().out
    final = tmp_path / "outputs" / "finetune" / "final"
    summary = json.loads((final / "summary.json").read_text())
    before, after = summary["scores_before"], summary["scores"]
    assert before.keys() == after.keys() == {"held_out_loss", "held_out_words"}
    assert after["held_out_loss"] < before["held_out_loss"]
    names = {path.name for path in (tmp_path / "outputs" / "finetune" / "pictures").iterdir()}
    assert "step-000000-0.png" in names
    assert (final / "adapter" / "adapter_model.safetensors").is_file()
    merged = AutoModel.from_pretrained(final, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(final, trust_remote_code=True)
    inputs = processor(images=Image.new("RGB", (64, 64)), boxes=[[4, 4, 30, 30]])
    assert len(processor.post_process_region_captions(merged.generate(**inputs, steps=2))[0]) == 1


def test_a_folder_of_masks_and_a_coco_file_give_the_same_set(tmp_path):
    photos = write_photos(tmp_path / "photos", 3)
    import_regions(write_coco(tmp_path / "coco.json", 3), tmp_path / "one", photos, held_out=0.4)
    for number in range(3):
        (photos / str(number)).mkdir()
        for name, start, color in (("a", 4, "red"), ("b", 34, "blue")):
            mask = np.zeros((64, 64), np.uint8)
            mask[start : start + 26, start : start + 26] = 255
            Image.fromarray(mask).save(photos / str(number) / f"{name}.png")
            (photos / str(number) / f"{name}.txt").write_text(f"a {color} house\n")
    counts = import_regions(photos, tmp_path / "two", held_out=0.4)
    assert counts == {"held_out": 1, "train": 2}
    for part in ("train", "held_out"):
        first, second = ((tmp_path / folder / f"{part}.jsonl").read_text() for folder in ("one", "two"))
        assert first == second
    apart = json.loads((tmp_path / "one" / "held_out.jsonl").read_text())["image"]
    assert apart not in (tmp_path / "one" / "train.jsonl").read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"caption": ""}, r"annotation 5 .* has no caption: .*--names"),
        ({"image_id": 99}, r"annotation 5 .* belongs to image 99, which the file does not list"),
        ({"segmentation": {"size": [32, 32], "counts": [0, 1024]}}, r"annotation 5"),
        ({"segmentation": []}, r"annotation 5"),
    ],
)
def test_what_is_wrong_is_named_and_nothing_is_written(tmp_path, changes, message):
    photos = write_photos(tmp_path / "photos", 3)
    with pytest.raises(ValueError, match=message):
        import_regions(write_coco(tmp_path / "coco.json", 3, **changes), tmp_path / "out", photos)
    assert not (tmp_path / "out").exists()


def test_missing_pictures_captions_and_files_are_named(tmp_path, capsys):
    photos = write_photos(tmp_path / "photos", 3)
    coco = write_coco(tmp_path / "coco.json", 4)
    with pytest.raises(ValueError, match=r"3\.jpg is missing, or is no picture"):
        import_regions(coco, tmp_path / "out", photos)
    (photos / "0").mkdir()
    Image.new("L", (64, 64), 255).save(photos / "0" / "whole.png")
    with pytest.raises(FileNotFoundError, match=r"whole\.png has no caption: write it into .*whole\.txt"):
        import_regions(photos, tmp_path / "out")
    assert perceptiondlm(["import-regions", str(tmp_path / "photos" / "0.jpg"), "--out", str(tmp_path / "out")]) == 2
    assert "0.jpg" in capsys.readouterr().err


def test_categories_stand_in_for_captions_when_asked(tmp_path):
    coco = write_coco(tmp_path / "coco.json", 3, caption=None, category_id=3)
    import_regions(coco, tmp_path / "out", write_photos(tmp_path / "photos", 3), held_out=0, names=True)
    captions = [json.loads(line)["captions"] for line in (tmp_path / "out" / "train.jsonl").read_text().splitlines()]
    assert sorted(captions) == [["a red house", "a blue house"]] * 2 + [["a red house", "kettle"]]


def test_words_are_compared_whatever_their_order():
    assert word_f1("A red house.", "house, red") == pytest.approx(0.8)
    assert word_f1("", "a house") == 0
    assert word_f1("a a house", "a house") == pytest.approx(0.8)
