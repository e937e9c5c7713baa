"""Attributes: every question alone and together gives the same answers, in one run of shared passes."""

import json
from pathlib import Path

import pytest
import torch

from perceptiondlm.pipeline_perceptiondlm import RegionCaptioningPipeline
from perceptiondlm.scripts.cli import main
from perceptiondlm.serving.attributes import Attribute, ask_attributes, parse_attributes


ROOT = Path(__file__).parents[2]
SETTINGS = {"max_new_tokens": 6, "steps": 6}


@pytest.fixture
def pipe(model, processor):
    return RegionCaptioningPipeline(model=model, processor=processor, **SETTINGS)


def test_names_become_questions_and_own_questions_stay():
    name, color, age = parse_attributes("name, color,age=How old is it?")
    assert (name.name, color.name, age.name) == ("name", "color", "age")
    assert "color of the masked region" in color.question
    assert age.question == "How old is it?"
    assert parse_attributes(["shape=Round, square or oblong?"])[0].question == "Round, square or oblong?"


@pytest.mark.parametrize("given", ["", " , ", "color,color", "=What?", "<b>", "age="])
def test_attributes_that_are_none_are_refused(given):
    with pytest.raises(ValueError, match="attribute"):
        parse_attributes(given)


@pytest.mark.parametrize("most", [None, 2])
def test_together_as_each_question_alone(pipe, scene, most):
    masks, attributes = [item.mask for item in scene.objects], parse_attributes("name,color,material")
    together = ask_attributes(pipe, scene.image, attributes, masks=masks, max_regions_per_pass=most)
    assert len(together) == len(masks)
    for one in attributes:
        alone = pipe(scene.image, masks=masks, text=one.question)
        assert [region[one.name]["value"] for region in together] == [region["caption"] for region in alone]
        scores = [region[one.name]["score"] for region in together]
        assert scores == pytest.approx([region["score"] for region in alone], abs=1e-4)
    values = [answer["value"] for region in together for answer in region.values()]
    assert len(set(values)) > len(masks)  # the questions matter


def test_all_questions_share_one_encoding_and_every_pass(pipe, scene, monkeypatch):
    """The vision tower runs once, and the passes are those of a single question."""
    masks = [item.mask for item in scene.objects]
    encoded, outputs, generate = [], [], pipe.model.generate
    pipe.model.vision_tower.register_forward_hook(lambda _module, inputs, _output: encoded.append(len(inputs[0])))
    monkeypatch.setattr(pipe.model, "generate", lambda **inputs: outputs.append(generate(**inputs)) or outputs[-1])
    ask_attributes(pipe, scene.image, parse_attributes("name,color,size"), masks=masks)
    assert len(encoded) == 1
    assert outputs[0].num_forward_passes <= SETTINGS["steps"]
    assert len(outputs[0].sequences) == 3 * len(masks)


def test_an_encoded_image_remembers_every_question(pipe, scene):
    masks, attributes = [item.mask for item in scene.objects], [Attribute(f"a{i}", f"Is it {i}?") for i in range(10)]
    image = pipe.encode_image(scene.image)
    first = ask_attributes(pipe, image, attributes, masks=masks)
    assert len(image.prefixes) == len(attributes)
    assert first == ask_attributes(pipe, image, attributes, masks=masks)
    plain = ask_attributes(pipe, scene.image, attributes, masks=masks)
    assert [[a["value"] for a in r.values()] for r in first] == [[a["value"] for a in r.values()] for r in plain]


def test_an_image_without_regions_has_no_answers(pipe, scene):
    assert ask_attributes(pipe, scene.image, parse_attributes("color"), masks=[]) == []
    with pytest.raises(ValueError, match="give regions in one of"):
        ask_attributes(pipe, scene.image, parse_attributes("color"))


def test_samples_that_show_one_encoded_image_run_together(model, processor, scene):
    """Several questions about an encoded image as samples of one batch: as many passes as one of them."""
    masks = [item.mask for item in scene.objects]
    image = model.encode_image(**processor(images=scene.image, masks=masks))
    inputs = processor(images=[image] * 2, masks=[masks, masks[:1]], text=["What is it?", "Which colour has it?"])
    together = model.generate(**inputs, encoded_image=image, **SETTINGS)
    assert together.num_forward_passes <= SETTINGS["steps"]
    alone = model.generate(**processor(images=image, masks=masks, text="What is it?"), encoded_image=image, **SETTINGS)
    assert torch.equal(together.sequences[: len(masks)], alone.sequences)


def test_the_command_writes_attributes_beside_captions(tmp_path, capsys):
    scene, masks = str(ROOT / "examples" / "scene.png"), str(ROOT / "examples" / "scene_masks.json")
    result = tmp_path / "result.json"
    command = ["caption", scene, "--masks", masks, "--preset", "fast", "--json", str(result)]
    assert main([*command, "--attributes", "name,color"]) == 0
    (image,) = json.loads(result.read_text())
    for region in image["regions"]:
        assert set(region["attributes"]) == {"name", "color"}
        assert 0 <= region["attributes"]["name"]["score"] <= 1
    printed = capsys.readouterr().out
    assert f"color: {image['regions'][0]['attributes']['color']['value']}" in printed
    assert main([*command, "--attributes", "color"]) == 2  # another request does not replace the file
    assert "answers something else" in capsys.readouterr().err
    assert main([*command, "--attributes", "color,color"]) == 2
    assert "each once" in capsys.readouterr().err
