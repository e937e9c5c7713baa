"""The whole model with a convolutional tower, with crops and colours of regions: it trains, saves, loads, generates."""

import copy
import subprocess
import sys
from io import BytesIO

import pytest
import torch
from accelerate import disk_offload
from PIL import ExifTags, Image

from perceptiondlm.checkpoints.folder import export, register_auto_classes
from perceptiondlm.modeling_perceptiondlm import PerceptionDLMForConditionalGeneration
from perceptiondlm.pipeline_perceptiondlm import RegionCaptioningPipeline
from perceptiondlm.training.start import build_config


FOCAL = {"region_crop_size": 48, "region_appearance": True, "region_pooling": True, "region_gain": 3.0}


@pytest.fixture(scope="module", params=["siglip", "conv", "regions_alone"])
def focal(request, tokenizer, tiny_model, tiny_conv):
    """A model with crops and colours, by either tower; the last reads no image token but its regions'."""
    if request.param == "siglip":
        return tiny_model(**FOCAL)
    settings = tiny_conv(**FOCAL, image_in_prompt=request.param != "regions_alone")
    model = PerceptionDLMForConditionalGeneration(build_config(settings, tokenizer))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():  # of a size at which every part matters
            scale = 1.0 if weight.ndim < 2 else weight[0].numel() ** -0.5
            weight.add_(scale * torch.randn(weight.shape, generator=generator) * (0.1 if weight.ndim < 2 else 1.0))
    return model.eval()


def masks_of(scene):
    return [item.mask for item in scene.objects]


def answers(model, inputs):
    output = model.generate(**inputs, max_new_tokens=8, steps=8)
    return output.sequences


@torch.no_grad()
def scores(model, inputs):
    ids = torch.full((int(inputs["num_regions"].sum()), 6), model.config.mask_token_id)
    return model(**inputs, answer_ids=ids).logits


def test_a_region_sees_what_it_would_see_alone(focal, tiny_processor, scene):
    processor = tiny_processor(focal)
    together = scores(focal, processor(images=scene.image, masks=masks_of(scene)))
    for index, mask in enumerate(masks_of(scene)):
        alone = scores(focal, processor(images=scene.image, masks=[mask]))
        torch.testing.assert_close(alone[0], together[index], atol=2e-4, rtol=1e-3)


def test_crops_and_colours_matter_to_their_region(focal, tiny_processor, scene):
    inputs = tiny_processor(focal)(images=scene.image, masks=masks_of(scene))
    plain = scores(focal, inputs)
    for name in ("region_crops", "region_appearance"):
        changed = {**inputs, name: inputs[name].clone()}
        changed[name][1] += 100 if name == "region_crops" else 1.0
        other = scores(focal, changed)
        torch.testing.assert_close(other[[0, 2]], plain[[0, 2]], atol=1e-4, rtol=1e-3)
        assert (other[1] - plain[1]).abs().max() > 1e-3


def test_where_regions_alone_show_the_image_tiles_cost_no_tokens(focal, tiny_processor, scene):
    processor = tiny_processor(focal, max_tiles=4)
    prompts = [processor(images=scene.image, masks=masks_of(scene), max_tiles=most) for most in (1, 4)]
    assert len(prompts[1]["pixel_values"]) > len(prompts[0]["pixel_values"])
    lengths = [prompt["input_ids"].shape[1] for prompt in prompts]
    assert lengths[0] == lengths[1] if not focal.config.image_in_prompt else lengths[0] < lengths[1]
    assert (scores(focal, prompts[0]) - scores(focal, prompts[1])).abs().max() > 1e-3  # they are seen, though
    text = processor.region_text_length()
    assert lengths[1] == text + processor.prompt_length(scene.image.size, len(scene.objects))
    if not focal.config.image_in_prompt:
        with pytest.raises(ValueError, match="sees regions alone"):
            focal.generate(**processor(images=scene.image, text="What is this?"))


def test_large_regions_may_skip_their_crop(focal, tiny_processor, scene):
    processor = tiny_processor(focal, crop_max_share=0.0)
    inputs = processor(images=scene.image, masks=masks_of(scene))
    assert (inputs["crop_boxes"] == 0).all()
    other = {**inputs, "region_crops": 255 - inputs["region_crops"]}
    torch.testing.assert_close(scores(focal, inputs), scores(focal, other))


def test_an_encoded_image_serves_later_regions(focal, tiny_processor, scene):
    pipe = RegionCaptioningPipeline(focal, processor=tiny_processor(focal))
    settings = {"max_new_tokens": 8, "steps": 8}
    direct = pipe(scene.image, masks=masks_of(scene), **settings)
    encoded = pipe.encode_image(scene.image)
    assert pipe(encoded, masks=masks_of(scene), **settings) == direct
    encoded.picture = None
    with pytest.raises(ValueError, match="without its picture"):
        pipe(encoded, masks=masks_of(scene))


def test_groups_of_regions_see_what_all_at_once_see(focal, tiny_processor, scene):
    processor = tiny_processor(focal)
    together = answers(focal, processor(images=scene.image, masks=masks_of(scene)))
    grouped = processor(images=scene.image, masks=masks_of(scene), max_regions_per_pass=1)
    assert len(grouped["image_ids"]) == 3
    assert torch.equal(answers(focal, grouped), together)


def test_offloaded_weights_change_no_token(focal, tiny_processor, scene, tmp_path):
    """Every weight lies on disk until its module is called."""
    batch = tiny_processor(focal)(images=scene.image, masks=masks_of(scene))
    expected, offloaded = answers(focal, batch), copy.deepcopy(focal)
    disk_offload(offloaded, str(tmp_path), execution_device=torch.device("cpu"), offload_buffers=True)
    assert {weight.device.type for weight in offloaded.parameters()} == {"meta"}
    assert torch.equal(answers(offloaded, batch), expected)


def test_crops_are_cut_out_of_the_picture_as_it_is_seen(focal, tiny_processor, scene):
    """Regions of a turned photo refer to the turned picture, crops and colours with them."""
    processor = tiny_processor(focal)
    stored = scene.image.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # to be turned clockwise
    file = BytesIO()
    stored.save(file, "PNG", exif=exif)
    seen = processor(images=file.getvalue(), masks=masks_of(scene), exif="applied")
    plain = processor(images=scene.image, masks=masks_of(scene))
    for name in ("pixel_values", "region_crops", "crop_boxes", "region_appearance"):
        assert torch.equal(seen[name], plain[name]), name


def test_crops_travel_as_bytes_and_are_normalised_with_the_tiles(focal, tiny_processor, scene):
    batch = tiny_processor(focal)(images=scene.image, masks=masks_of(scene))
    assert batch["pixel_values"].dtype == batch["region_crops"].dtype == torch.uint8
    floats = {name: batch[name].float() / 127.5 - 1 for name in ("pixel_values", "region_crops")}
    torch.testing.assert_close(scores(focal, {**batch, **floats}), scores(focal, batch), atol=1e-4, rtol=1e-3)


def test_a_picture_of_another_size_than_the_encoded_image_is_refused(focal, tiny_processor, scene):
    processor = tiny_processor(focal)
    inputs = processor(images=scene.image, masks=masks_of(scene))
    encoded = focal.encode_image(**inputs, picture=scene.image.resize((90, 60)))
    with pytest.raises(ValueError, match=r"its picture is \(60, 90\)"):
        processor(images=encoded, masks=masks_of(scene))


def test_inputs_of_another_processor_are_refused(focal, tiny_processor, scene):
    without = copy.deepcopy(focal.config)
    without.region_crop_size = 0
    inputs = tiny_processor(without)(images=scene.image, masks=masks_of(scene))
    with pytest.raises(ValueError, match="region_crops must have shape"):
        scores(focal, inputs)


@pytest.mark.parametrize("shows", ["crops", "no crops", "no regions", "no images"])
def test_training_reaches_every_part(focal, tiny_processor, scene, shows):
    """In batches without crops, regions or images, too: processes that share weights must run the same modules."""
    processor = tiny_processor(focal, crop_max_share=0.0 if shows == "no crops" else 1.0)
    if shows in ("crops", "no crops"):
        inputs = processor(images=scene.image, masks=masks_of(scene))
    else:
        shown = shows == "no regions" and focal.config.image_in_prompt
        inputs = processor(images=scene.image if shown else None, text="How many?")
    answers = max(int(inputs["num_regions"].sum()), 1)
    labels, calls = torch.full((answers, 4), 5), []
    hook = focal.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    focal.train()
    focal(**inputs, labels=labels, mask_probability=torch.ones(answers, 1), use_all_parts=True).loss.backward()
    hook.remove()
    assert len(calls) == 2  # tiles and crops
    without = [name for name, weight in focal.named_parameters() if weight.requires_grad and weight.grad is None]
    focal.zero_grad()
    focal.eval()
    assert not [name for name in without if "vision_tower.head" not in name]


def test_a_fresh_process_loads_what_was_saved(focal, tiny_processor, scene, tmp_path):
    register_auto_classes()
    processor = tiny_processor(focal)
    export(focal, processor, tmp_path / "model", torch.float32)
    expected = answers(focal, processor(images=scene.image, masks=masks_of(scene)))
    scene.image.save(tmp_path / "scene.png")
    torch.save([torch.from_numpy(mask) for mask in masks_of(scene)], tmp_path / "masks.pt")
    code = (
        "import sys, torch\nfrom PIL import Image\nfrom transformers import AutoConfig, AutoModel, AutoProcessor\n"
        "folder = sys.argv[1]\n"
        "config = AutoConfig.from_pretrained(folder + '/model', trust_remote_code=True)\n"
        "processor = AutoProcessor.from_pretrained(folder + '/model', trust_remote_code=True)\n"
        "model = AutoModel.from_pretrained(folder + '/model', trust_remote_code=True)\n"
        "masks = [m.numpy() for m in torch.load(folder + '/masks.pt')]\n"
        "inputs = processor(images=Image.open(folder + '/scene.png'), masks=masks)\n"
        "output = model.generate(**inputs, max_new_tokens=8, steps=8)\n"
        "print(config.vision_config.model_type)\nprint(output.sequences.tolist())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    kind, sequences = done.stdout.strip().splitlines()[-2:]
    assert kind == focal.config.vision_config.model_type
    assert sequences == str(expected.tolist())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision_config": {"model_type": "resnet"}}, "model_type must be one of"),
        ({"region_crop_size": 20}, "multiple of 16"),
        ({"region_crop_size": 48, "region_conditioning": "vision"}, "needs region_conditioning='replay'"),
        ({"region_appearance": True, "region_conditioning": "none"}, "needs region_conditioning='replay'"),
        ({"region_pooling": True, "region_conditioning": "none"}, "region_pooling needs region_conditioning"),
        ({"image_in_prompt": False, "region_conditioning": "vision"}, "image_in_prompt=False needs"),
    ],
)
def test_settings_that_do_not_fit_are_named(changes, message, tiny_model):
    with pytest.raises(ValueError, match=message):
        tiny_model(**changes)
