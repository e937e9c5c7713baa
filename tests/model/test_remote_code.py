"""Checkpoints stand alone: fresh processes load them by path, offline, without this repository's package.

One process does several things, since every process pays for its imports. What it found comes back as JSON.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from perceptiondlm.checkpoints.folder import AUTO_MAP, CUSTOM_PIPELINES, export
from perceptiondlm.modeling_perceptiondlm import PerceptionDLMForConditionalGeneration
from perceptiondlm.processing_perceptiondlm import PerceptionDLMProcessor


ROOT = Path(__file__).parents[2]  # the embedded default

# The README's first lines, word for word.
SNIPPET = """
from transformers import AutoModel, AutoProcessor, pipeline

processor = AutoProcessor.from_pretrained(".", trust_remote_code=True)
model = AutoModel.from_pretrained(".", trust_remote_code=True)            # dtype=, device_map= as usual
inputs = processor(images=image, masks=masks, return_tensors="pt").to(model.device)
output = model.generate(**inputs)                                          # PerceptionDLMGenerationOutput
captions = processor.post_process_region_captions(output)                  # one list per image, in the order the masks came

pipe = pipeline("region-captioning", model=".", trust_remote_code=True)
pipe(image, masks=masks)          # [{"caption": …, "score": …, "box": {"xmin": …}, …}, …] one per mask, same order
"""  # noqa: E501

PREAMBLE = """
import json, os, sys
sys.modules["perceptiondlm"] = None  # importing it from here on is an error
sys.path = [entry for entry in sys.path if entry not in ("", os.getcwd())]
import numpy as np
import torch
from PIL import Image
from transformers import (
    AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer, pipeline,
)
image = Image.open(os.environ["TEST_IMAGE"])
masks = list(np.load(os.environ["TEST_MASKS"]))
found = {}

def report():
    print("FOUND " + json.dumps(found))
"""

LOAD_EVERYTHING = """
for kind, path in (("relative", "source"), ("absolute", os.path.abspath("source"))):
    config = AutoConfig.from_pretrained(path, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(path, trust_remote_code=True)
    model = AutoModel.from_pretrained(path, trust_remote_code=True)
    other = AutoModelForImageTextToText.from_pretrained(path, trust_remote_code=True)
    pipe = pipeline("region-captioning", model=path, trust_remote_code=True)
    inputs = processor(images=image, masks=masks)
    output = model.generate(**inputs)
    found[kind] = {
        "modules": sorted({type(x).__module__.split(".")[0] for x in (config, processor, model, other, pipe)}),
        "classes": [type(x).__name__ for x in (config, processor, model, other, pipe)],
        "layout": config.attention_layout,
        "ids": tokenizer("a red cat")["input_ids"],
        "dtype": str(model.dtype),
        "settings": type(model.generation_config).__name__,
        "captions": processor.post_process_region_captions(output),
        "other": processor.post_process_region_captions(other.generate(**inputs)),
        "pipeline": pipe(image, masks=masks),
    }
"""

SAVE = """
model.save_pretrained("saved")
processor.save_pretrained("saved")
pipe.save_pretrained("piped")
report()
"""

RUN_SNIPPET = (
    """
for folder in json.loads(os.environ["TEST_FOLDERS"]):
    os.chdir(folder)
    """
    + SNIPPET.replace("\n", "\n    ")
    + """
    found[os.path.basename(folder)] = {"captions": captions, "pipeline": pipe(image, masks=masks)}
report()
"""
)


def run_fresh(script, cwd, home, **environment):
    """What a new interpreter reports that finds nothing but installed packages and the files it names."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH" and not name.startswith("HF_")}
    cache = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(home), "HF_MODULES_CACHE": str(home / "modules")}
    finished = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PREAMBLE + script],
        cwd=cwd,
        env={**kept, **cache, "OMP_NUM_THREADS": "1", **{name: str(value) for name, value in environment.items()}},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    return json.loads(finished.stdout.rpartition("FOUND ")[2])


def write_inputs(folder, image, masks):
    """An image and its masks as files, named by environment variables."""
    image.save(folder / "image.png")
    np.save(folder / "masks.npy", np.stack(masks))
    return {"TEST_IMAGE": folder / "image.png", "TEST_MASKS": folder / "masks.npy"}


def saved_config(folder):
    return json.loads((folder / "config.json").read_text())


def assert_code_is_named(folder):
    """The config names every entry point, and the files it names lie beside it."""
    config = saved_config(folder)
    assert config["auto_map"] == AUTO_MAP
    assert json.loads(json.dumps(config["custom_pipelines"])) == CUSTOM_PIPELINES
    entries = [*AUTO_MAP.values(), *(entry["impl"] for entry in CUSTOM_PIPELINES.values())]
    for name in {entry.split(".")[0] for entry in entries}:
        assert (folder / f"{name}.py").read_text() == (ROOT / f"{name}.py").read_text(), name


def test_readme_shows_what_is_run_here():
    assert SNIPPET in (ROOT / "README.md").read_text()


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_model, tiny_processor):
    """A tiny checkpoint, loaded and saved again by a fresh process and then deleted; and what that process found."""
    folder = tmp_path_factory.mktemp("remote")
    model = tiny_model()
    model.generation_config.max_new_tokens = model.generation_config.steps = 5
    export(model, tiny_processor(model, max_tiles=2), folder / "source", torch.float16)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 100, 3), dtype=np.uint8))
    masks = np.zeros((2, 60, 100), dtype=bool)
    masks[0, 5:40, 10:30] = masks[1, 20:60, 25:90] = True
    loaded = PerceptionDLMForConditionalGeneration.from_pretrained(folder / "source")
    processor = PerceptionDLMProcessor.from_pretrained(folder / "source")
    output = loaded.generate(**processor(images=image, masks=masks))
    files = write_inputs(folder, image, masks)
    (folder / "elsewhere").mkdir()
    found = run_fresh(LOAD_EVERYTHING + SAVE, folder, folder / "home", **files)
    exported = saved_config(folder / "source")
    shutil.rmtree(folder / "source")
    shutil.rmtree(folder / "home")
    return {
        "folder": folder,
        "files": files,
        "captions": processor.post_process_region_captions(output),
        "scored": processor.post_process_region_captions(output, output_scores=True)[0],
        "ids": processor.tokenizer("a red cat")["input_ids"],
        "config": exported,
        "found": found,
    }


def assert_pipeline_agrees(results, scored):
    boxes = [{"xmin": 10, "ymin": 5, "xmax": 30, "ymax": 40}, {"xmin": 25, "ymin": 20, "xmax": 90, "ymax": 60}]
    assert [result["box"] for result in results] == boxes
    assert [result["caption"] for result in results] == [one["caption"] for one in scored]
    assert [result["score"] for result in results] == pytest.approx([one["score"] for one in scored], abs=1e-5)


def test_exported_config_names_every_entry_point(world):
    assert world["config"]["auto_map"] == AUTO_MAP
    assert world["config"]["custom_pipelines"] == CUSTOM_PIPELINES
    assert world["config"]["dtype"] == "float32"  # stored in half precision, loaded in the model's own


@pytest.mark.parametrize("path", ["relative", "absolute"])
def test_every_auto_class_loads_the_checkpoint(world, path):
    found = world["found"][path]
    assert found["modules"] == ["transformers_modules"]
    model = "PerceptionDLMForConditionalGeneration"
    pieces = ["PerceptionDLMConfig", "PerceptionDLMProcessor", model, model, "RegionCaptioningPipeline"]
    assert found["classes"] == pieces
    assert found["layout"] == "isolated"
    assert found["ids"] == world["ids"]
    assert found["dtype"] == "torch.float32"
    assert found["settings"] == "PerceptionDLMGenerationConfig"


@pytest.mark.parametrize("path", ["relative", "absolute"])
def test_loaded_code_captions_as_the_package_does(world, path):
    found = world["found"][path]
    assert found["captions"] == world["captions"]
    assert found["other"] == world["captions"]
    assert_pipeline_agrees(found["pipeline"], world["scored"])


@pytest.mark.parametrize("folder", ["saved", "piped"])
def test_what_is_saved_again_carries_its_code(world, folder):
    saved = world["folder"] / folder
    assert_code_is_named(saved)
    for name in ("model.safetensors", "generation_config.json", "processor_config.json", "tokenizer.json"):
        assert (saved / name).is_file(), name
    assert {path.name for path in saved.glob("*.py")} == {path.name for path in ROOT.glob("*_perceptiondlm.py")}


def test_what_is_saved_again_runs_the_readme_without_its_source(world):
    folders = [str(world["folder"] / name) for name in ("saved", "piped")]
    home = world["folder"] / "second_home"
    cwd = world["folder"] / "elsewhere"
    found = run_fresh(RUN_SNIPPET, cwd, home, TEST_FOLDERS=json.dumps(folders), **world["files"])
    for name in ("saved", "piped"):
        assert found[name]["captions"] == world["captions"]
        assert_pipeline_agrees(found[name]["pipeline"], world["scored"])


def test_embedded_default_runs_the_readme_from_a_clean_directory(tmp_path, scene):
    """The repository's root files alone, as a clone or the Hub has them."""
    clone = tmp_path / "clone"
    clone.mkdir()
    for path in ROOT.iterdir():
        if path.is_file() and not path.name.startswith("."):
            shutil.copyfile(path, clone / path.name)
    assert_code_is_named(clone)
    masks = [item.mask for item in scene.objects]
    files = write_inputs(tmp_path, scene.image, masks)
    found = run_fresh(RUN_SNIPPET, tmp_path, tmp_path / "home", TEST_FOLDERS=json.dumps([str(clone)]), **files)
    (captions,) = found["clone"]["captions"]
    results = found["clone"]["pipeline"]
    assert [result["caption"] for result in results] == captions
    assert [tuple(result["box"].values()) for result in results] == [item.box for item in scene.objects]
    assert all(captions)
