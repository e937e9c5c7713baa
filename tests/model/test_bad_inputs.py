"""One table of what people get wrong, through the public doors: processor, `generate`, pipeline and `from_pretrained`.

Every case must end in our own `ValueError` or `TypeError` (`FileNotFoundError` for a missing path) that names the
offending item; an error from inside torch or numpy would leave the user alone with it.
"""

import copy
import json
import traceback
from io import BytesIO
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig

from perceptiondlm.checkpoints.folder import export
from perceptiondlm.modeling_perceptiondlm import PerceptionDLMForConditionalGeneration
from perceptiondlm.pipeline_perceptiondlm import RegionCaptioningPipeline


HEIGHT, WIDTH = SIZE = (40, 60)
PIXELS = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
IMAGE = Image.fromarray(PIXELS)
MASK = np.zeros(SIZE, dtype=bool)
MASK[5:20, 10:30] = True
EMPTY = np.zeros(SIZE, dtype=bool)
BOX = [10, 5, 30, 20]
SHORT = {"max_new_tokens": 2, "steps": 2}


class WithoutFrames:
    """A streamer of the autoregressive kind."""

    def put(self, value):
        raise AssertionError("never called")

    def end(self):
        raise AssertionError("never called")


def with_value(value):
    mask = MASK.astype(np.float32)
    mask[0, 0] = value
    return mask


def rle(**changes):
    encoded = coco_mask.encode(np.asfortranarray(MASK, dtype=np.uint8))
    return {"size": list(SIZE), "counts": encoded["counts"].decode(), **changes}


def stored(picture, file_format, **options):
    buffer = BytesIO()
    picture.save(buffer, file_format, **options)
    return buffer


def cut_jpeg():
    return Image.open(BytesIO(stored(IMAGE, "JPEG").getvalue()[:-400]))


def animation():
    return Image.open(stored(IMAGE, "GIF", save_all=True, append_images=[IMAGE.rotate(180)]))


@pytest.fixture(scope="module")
def doors(tiny_model, tiny_processor, tmp_path_factory):
    """The public doors, and what a caller holds in hand."""
    model = tiny_model(text_config={"max_position_embeddings": 256})
    processor = tiny_processor(model)
    folder = tmp_path_factory.mktemp("bad_inputs")
    export(model, processor, folder / "checkpoint", torch.float16)
    (folder / "cut.jpg").write_bytes(stored(IMAGE, "JPEG").getvalue()[:-400])
    (folder / "notes.txt").write_text("no picture")
    return SimpleNamespace(
        model=model,
        processor=processor,
        vision=tiny_model(region_conditioning="vision", num_region_prompts=2),
        processor_for=lambda **changes: tiny_processor(changed(model.config, **changes)),
        pipe=RegionCaptioningPipeline(model=model, processor=processor),
        inputs=dict(processor(images=IMAGE, masks=[MASK, MASK])),
        folder=folder,
    )


def changed(config, tile_size=None, **switches):
    """A model's config with other switches."""
    content = copy.deepcopy(config.to_dict()) | switches
    content["vision_config"]["image_size"] = tile_size or config.vision_config.image_size
    return type(config).from_dict(content)


def process(**keywords):
    """Through the processor, with a good image unless another is given."""
    return lambda d: d.processor(**{"images": IMAGE, **keywords})


def show(image):
    """Through the processor, with a good box on a bad image."""
    return lambda d: d.processor(images=image(d) if callable(image) else image, boxes=[[0, 0, 1, 1]])


def generate(**keywords):
    return lambda d: d.model.generate(**{**d.inputs, **SHORT, **keywords})


def generate_without(*names):
    return lambda d: d.model.generate(**{k: v for k, v in d.inputs.items() if k not in names}, **SHORT)


def generate_changed(name, change):
    return lambda d: d.model.generate(**{**d.inputs, name: change(d.inputs[name])}, **SHORT)


def generate_from(**processor_settings):
    """Inputs of a processor that does not fit the model."""
    return lambda d: d.model.generate(**d.processor_for(**processor_settings)(images=IMAGE, boxes=[BOX]), **SHORT)


def pipe(*inputs, **keywords):
    return lambda d: d.pipe(*inputs, **keywords)


def consume(make_samples, **keywords):
    return lambda d: list(d.pipe(make_samples(), **keywords))


def load(edit_config=None, edit_weights=None):
    """Through `from_pretrained`, after editing a copy of a good checkpoint."""

    def run(d):
        good, bad = d.folder / "checkpoint", d.folder / "edited"
        bad.mkdir(exist_ok=True)
        config, weights = json.loads((good / "config.json").read_text()), load_file(good / "model.safetensors")
        if edit_config is not None:
            edit_config(config)
        if edit_weights is not None:
            edit_weights(weights)
        (bad / "config.json").write_text(json.dumps(config))
        (bad / "generation_config.json").write_text((good / "generation_config.json").read_text())
        save_file(weights, bad / "model.safetensors", metadata={"format": "pt"})
        return PerceptionDLMForConditionalGeneration.from_pretrained(bad)

    return run


MASKS = {
    "empty mask": (process(masks=[MASK, EMPTY]), ValueError, "masks[1] is empty (0 pixels set)"),
    "empty mask of the second image": (
        process(images=[IMAGE, IMAGE], masks=[[MASK], [MASK, MASK, EMPTY]]),
        ValueError,
        "masks[1][2] is empty (0 pixels set)",
    ),
    "mask of another size": (process(masks=[MASK, MASK.T]), ValueError, "masks[1] is 60 x 40; accepted: the image's"),
    "stack of another size": (process(masks=np.ones((2, 8, 9), bool)), ValueError, "masks[0] is 8 x 9"),
    "no regions and no text": (process(), ValueError, "nothing to do: give regions (masks, boxes or label_map)"),
    "no image": (process(images=None, masks=[MASK]), ValueError, "masks were given without an image"),
    "no mask in the list": (process(masks=[]), ValueError, "masks holds no region"),
    "None as a mask": (process(masks=[MASK, None]), TypeError, "masks[1] is a NoneType"),
    "NaN": (process(masks=[MASK, with_value(np.nan)]), ValueError, "masks[1] holds the value nan (float32)"),
    "logits": (process(masks=[with_value(-3.5)]), ValueError, "masks[0] holds the value -3.5 (float32)"),
    "probabilities": (process(masks=torch.from_numpy(with_value(0.5))), ValueError, "masks[0] holds the value 0.5"),
    "labels as a mask": (process(masks=MASK * 7), ValueError, "masks[0] holds the value 7"),
    "grey photo as a mask": (process(masks=IMAGE.convert("L")), ValueError, "masks[0] has"),
    "missing mask file": (process(masks=["no/such.png"]), FileNotFoundError, "masks[0]: there is no file no/such.png"),
    "RLE of another size": (process(masks=[rle(size=[60, 40])]), ValueError, "masks[0] (RLE size) is 60 x 40"),
    "RLE cut short": (process(masks=[rle(counts=rle()["counts"][:-3])]), ValueError, "masks[0] has RLE counts"),
    "RLE of nonsense": (process(masks=[rle(), rle(counts="h e l l o")]), ValueError, "masks[1] has byte 32"),
    "RLE of lists": (process(masks=rle(counts=[[1, 2], [3]])), ValueError, "masks[0] has RLE counts object (2,)"),
    "RLE of too many runs": (process(masks=[rle(counts=[0, 2401])]), ValueError, "with sum 2401"),
    "dict of something else": (process(masks=[{"bitmap": MASK}]), ValueError, "masks[0] is a dict of ['bitmap']"),
    "polygon of two points": (process(masks=[[0, 0, 5, 5]]), ValueError, "masks[0], ring 0 has 4 numbers"),
    "polygon of words": (process(masks=[[[0, 0, 5, 0, 5, 5], "x"]]), TypeError, "masks[0], ring 1 is 'x'"),
    "polygon outside": (process(masks=[[0, 0, 99, 0, 5, 5]]), ValueError, "x, y = [99.0, 0.0]"),
    "two forms": (process(masks=[MASK], boxes=[BOX]), ValueError, "give regions in one form, got ['masks', 'boxes']"),
    "a mask for two images": (
        process(images=[IMAGE, IMAGE], masks=[[MASK]]),
        ValueError,
        "2 images need 2 entries of masks, got 1",
    ),
    "two lists for one image": (
        process(images=[IMAGE], masks=[[MASK], [MASK]]),
        ValueError,
        "1 images need 1 entries of masks, got 2",
    ),
    "background only": (process(label_map=MASK * 0), ValueError, "label_map holds no region"),
    "label map of another size": (process(label_map=MASK.T * 2), ValueError, "label_map is 60 x 40"),
    "label map of fractions": (process(label_map=MASK * 2.5), ValueError, "label_map (float64) holds the value 2.5"),
}
BOXES = {
    "negative": (process(boxes=[BOX, [-1, 0, 5, 5]]), ValueError, "boxes[1] is [-1.0, 0.0, 5.0, 5.0]; accepted"),
    "inverted": (process(boxes=[[9, 9, 3, 12]]), ValueError, "boxes[0] is [9.0, 9.0, 3.0, 12.0]"),
    "of no width": (process(boxes=[[9, 9, 9, 12]]), ValueError, "boxes[0] is [9.0, 9.0, 9.0, 12.0]"),
    "outside": (process(boxes=[[0, 0, 40, 60]]), ValueError, "0 <= y0 < y1 <= 40"),
    "NaN": (process(boxes=np.array([[0, 0, np.nan, 5]])), ValueError, "boxes[0] is [0.0, 0.0, nan, 5.0]"),
    "infinite": (process(boxes=torch.tensor([[0, 0, torch.inf, 5]])), ValueError, "boxes[0] is"),
    "of three numbers": (process(boxes=[[1, 2, 3]]), ValueError, "boxes[0] has 3 numbers"),
    "one flat box": (process(boxes=BOX), TypeError, "boxes[0] is 10; accepted: numbers x0, y0, x1, y1"),
    "array of one box": (process(boxes=np.array(BOX)), ValueError, "boxes has shape (4,); accepted: (N, 4)"),
    "string": (process(boxes="0,0,5,5"), TypeError, "boxes is a str"),
    "of the second image": (
        process(images=[IMAGE, IMAGE], boxes=[[BOX], [BOX, [0, 0, 61, 5]]]),
        ValueError,
        "boxes[1][1] is [0.0, 0.0, 61.0, 5.0]",
    ),
}
IMAGES = {
    "no width": (show(Image.new("RGB", (0, 5))), ValueError, "image is 5 x 0 (height x width)"),
    "empty array": (show(np.zeros((0, 5, 3), np.uint8)), ValueError, "image is a ndarray of uint8 (0, 5, 3)"),
    "CMYK": (show(IMAGE.convert("CMYK")), ValueError, "image has mode CMYK"),
    "16 bit": (show(Image.fromarray(PIXELS[..., 0].astype(np.uint16))), ValueError, "image has mode I;16"),
    "floats": (show(PIXELS / 255), ValueError, "image is a ndarray of float64 (40, 60, 3)"),
    "four channels": (show(np.zeros((9, 9, 4), np.uint8)), ValueError, "image is a ndarray of uint8 (9, 9, 4)"),
    "channels last in a tensor": (show(torch.from_numpy(PIXELS)), ValueError, "image is a Tensor of torch.uint8"),
    "animation": (show(lambda d: animation()), ValueError, "image is animated or has several pages (2 frames)"),
    "cut JPEG": (show(lambda d: cut_jpeg()), ValueError, "image is truncated or damaged"),
    "cut JPEG file": (show(lambda d: d.folder / "cut.jpg"), ValueError, "image is truncated or damaged"),
    "no picture": (show(lambda d: str(d.folder / "notes.txt")), ValueError, "notes.txt cannot be read"),
    "missing file": (show("no/such.jpg"), FileNotFoundError, "image: there is no file no/such.jpg"),
    "number": (show(5), TypeError, "image is a int; accepted: PIL image, path"),
    "bytes": (show(b"GIF89a"), ValueError, "image: 6 bytes cannot be read"),
    "second of a list": (
        process(images=[IMAGE, IMAGE.convert("CMYK")], boxes=[[BOX], [BOX]]),
        ValueError,
        "image[1] has mode CMYK",
    ),
    "second of a text": (process(images=[[IMAGE, None]], text="What?"), TypeError, "images[0][1] is a NoneType"),
    "empty list": (process(images=[], masks=[]), ValueError, "images is an empty list"),
}
TEXTS = {
    "number": (process(text=5), TypeError, "text must be a string or a list of strings, got int"),
    "bytes": (process(text=b"What?"), TypeError, "got bytes"),
    "number in a list": (process(images=None, text=["What?", 5]), TypeError, "text[1] is int"),
    "empty list": (process(images=None, text=[]), ValueError, "text is an empty list"),
    "number beside regions": (process(boxes=[BOX], text=5), TypeError, "got int"),
    "None beside regions": (process(boxes=[BOX], text=[None]), TypeError, "text[0] is NoneType"),
    "two for one image": (process(boxes=[BOX], text=["a", "b"]), ValueError, "1 images need one text or 1, got 2"),
    "three lists of images for two texts": (
        process(images=[IMAGE, IMAGE, IMAGE], text=["a", "b"]),
        ValueError,
        "2 texts need 2 lists of images, got 3",
    ),
    "placeholder without an image": (
        process(images=None, text=["a", "<|start_header_id|>user<|end_header_id|>\n<img><IMG_CONTEXT></img>b"]),
        ValueError,
        "text[1] has 1 image placeholders (<IMG_CONTEXT>) for 0 images",
    ),
    "image without a placeholder": (
        process(text="<|start_header_id|>user<|end_header_id|>\nWhat?"),
        ValueError,
        "text[0] has 0 image placeholders (<IMG_CONTEXT>) for 1 images",
    ),
    "unknown keyword": (process(boxes=[BOX], mask=[MASK]), TypeError, "unknown processor keywords ['mask']"),
    "a video": (process(text="What?", videos=[IMAGE]), TypeError, "unknown processor keywords ['videos']"),
    "numpy tensors": (process(boxes=[BOX], return_tensors="np"), ValueError, "return_tensors must be 'pt', got 'np'"),
    "no region a pass": (
        process(boxes=[BOX], max_regions_per_pass=0),
        ValueError,
        "max_regions_per_pass must be an integer of at least 1, got 0",
    ),
    "half a region a pass": (process(boxes=[BOX], max_regions_per_pass=0.5), ValueError, "at least 1, got 0.5"),
    "a word of regions a pass": (process(boxes=[BOX], max_regions_per_pass="2"), ValueError, "at least 1, got '2'"),
}
SETTINGS = {
    "unknown": (generate(beams=4, cfg_scale=2), ValueError, "unknown generate keywords ['beams', 'cfg_scale']"),
    "not diffusion's": (
        generate(num_beams=4),
        ValueError,
        "num_beams=4 belongs to autoregressive generation; accepted: 1",
    ),
    "no step": (generate(steps=0), ValueError, "steps must be an integer of at least 1, got 0"),
    "negative steps": (generate(steps=-3), ValueError, "steps must be an integer of at least 1, got -3"),
    "steps as text": (generate(steps="8"), ValueError, "steps must be an integer of at least 1, got '8'"),
    "steps as a float": (generate(steps=8.0), ValueError, "got 8.0"),
    "no tokens": (generate(max_new_tokens=0), ValueError, "max_new_tokens must be an integer of at least 1, got 0"),
    "more tokens than positions": (
        generate(max_new_tokens=200, steps=1),
        ValueError,
        "positions, the model has 256: use fewer tiles, tokens or regions",
    ),
    "block that does not divide": (generate(max_new_tokens=8, block_length=3), ValueError, "block_length=3 must"),
    "fewer steps than blocks": (generate(max_new_tokens=8, block_length=1, steps=4), ValueError, "steps=4 must be"),
    "unknown sampler": (generate(sampler="beam"), ValueError, "sampler must be one of"),
    "negative temperature": (generate(temperature=-1), ValueError, "temperature must be a finite number"),
    "NaN temperature": (generate(temperature=float("nan")), ValueError, "at least 0, got nan"),
    "temperature as text": (generate(temperature="hot"), ValueError, "got 'hot'"),
    "top_p of 0": (generate(temperature=1.0, top_p=0), ValueError, "top_p must be in (0, 1], got 0"),
    "top_k of 0": (generate(temperature=1.0, top_k=0), ValueError, "top_k must be an integer of at least 1, got 0"),
    "seed as a float": (generate(seed=0.5), ValueError, "seed must be an integer in [0, 2**63), got 0.5"),
    "huge seed": (generate(seed=2**70), ValueError, "seed must be an integer in [0, 2**63), got"),
    "suppressed text": (generate(suppress_tokens="cat"), ValueError, "suppress_tokens must be a list of token ids"),
    "suppressed -1": (generate(suppress_tokens=[-1]), ValueError, "list of token ids, got [-1]"),
    "biased id too large": (generate(sequence_bias={(10**6,): 1.0}), ValueError, "sequence_bias must be of ids below"),
    "suppressed id too large": (generate(suppress_tokens=[10**6]), ValueError, "1 ids up to 1000000"),
    "everything suppressed": (
        lambda d: generate(suppress_tokens=list(range(d.model.config.text_config.vocab_size)))(d),
        ValueError,
        "leave at least one token",
    ),
    "autoregressive config": (
        generate(generation_config=GenerationConfig(max_new_tokens=4)),
        TypeError,
        "generation_config must be a PerceptionDLMGenerationConfig, got GenerationConfig",
    ),
    "config as a dict": (generate(generation_config={"steps": 4}), TypeError, "got dict"),
    "autoregressive streamer": (generate(streamer=WithoutFrames()), TypeError, "streamer must have put_draft"),
}
INCOMPLETE = {
    "no pixels": (generate_without("pixel_values"), ValueError, "regions need pixel_values, tile_grids"),
    "no grids": (generate_without("tile_grids"), ValueError, "tile_grids and image_sizes of their images"),
    "no sizes": (generate_without("image_sizes"), ValueError, "image_sizes of their images"),
    "no boxes": (generate_without("region_boxes"), ValueError, "num_regions counts 2 regions, region_boxes holds 0"),
    "no count": (generate_without("num_regions"), ValueError, "num_regions counts 0 regions, region_boxes holds 2"),
    "no coverage": (generate_without("region_coverage"), ValueError, "region_coverage must have shape (2, 8, 8)"),
    "no roles": (generate_without("token_roles"), ValueError, "token_roles and region_ids"),
    "no region ids": (generate_without("region_ids"), ValueError, "token_roles and region_ids"),
    "text alone": (
        generate_without("pixel_values", "region_boxes", "num_regions", "token_roles", "region_ids"),
        ValueError,
        "image tokens but the model computed 0 image features",
    ),
    "a box too few": (generate_changed("region_boxes", lambda boxes: boxes[:1]), ValueError, "region_boxes holds 1"),
    "a tile too few": (generate_changed("pixel_values", lambda tiles: tiles[:-1]), ValueError, "pixel_values hold 6"),
    "another grid": (generate_changed("tile_grids", lambda grid: grid * 2), ValueError, "tile_grids describe 25"),
    "ids of another tokenizer": (
        generate_changed("input_ids", lambda ids: ids + 100_000),
        ValueError,
        "tokens",
    ),
    "processor of other tiles": (generate_from(tile_size=32), ValueError, "pixel_values are (7, 3, 32, 32)"),
    "processor of other patches": (
        generate_from(pixel_unshuffle=1),
        ValueError,
        "the prompt has 448 image tokens but the model computed 112 image features",
    ),
    "processor of the other conditioning": (
        generate_from(region_conditioning="vision"),
        ValueError,
        "region_coverage must have shape (1, 8, 8) under region_conditioning='replay', got missing",
    ),
    "processor of other bins": (
        generate_from(roi_size=2),
        ValueError,
        "region_coverage must have shape (1, 8, 8) under region_conditioning='replay', got (1, 4, 4)",
    ),
    "processor of more prompts": (
        lambda d: d.vision.generate(
            **d.processor_for(region_conditioning="vision", num_region_prompts=4)(images=IMAGE, boxes=[BOX]), **SHORT
        ),
        ValueError,
        "prompt_coverage must have shape (7, 2, 8, 8) under region_conditioning='vision', got (7, 4, 8, 8)",
    ),
}
NEEDS = "a sample needs 'image' and one of ('masks', 'boxes', 'label_map', 'points'), got"
PIPELINE = {
    "no regions": (pipe(IMAGE), ValueError, f"{NEEDS} ['image']"),
    "no image": (pipe({"masks": [MASK]}), ValueError, f"{NEEDS} ['masks']"),
    "no image in a dataset": (consume(lambda: iter([{"boxes": [BOX]}])), ValueError, f"{NEEDS} ['boxes']"),
    "two forms": (pipe(IMAGE, masks=[MASK], boxes=[BOX]), ValueError, f"{NEEDS} ['image', 'masks', 'boxes']"),
    "image is None": (pipe({"image": None, "masks": [MASK]}), TypeError, "image is a NoneType"),
    "number": (pipe(5), TypeError, "images is a int; accepted: an image, a list, generator or dataset"),
    "None": (pipe(None), TypeError, "images is a NoneType"),
    "bytes": (pipe(b"GIF89a", masks=[MASK]), ValueError, "image: 6 bytes cannot be read"),
    "generator of images": (consume(lambda: iter([IMAGE])), TypeError, "a sample is a Image; accepted: a dict with"),
    "regions beside a generator": (
        pipe(iter([{"image": IMAGE}]), boxes=[BOX]),
        ValueError,
        "a dataset's samples carry their own regions: leave out ['boxes']",
    ),
    "one list of masks for two images": (
        pipe([IMAGE, IMAGE], masks=[[MASK]]),
        ValueError,
        "2 entries of masks, got 1",
    ),
    "array of masks for two images": (
        pipe([IMAGE, IMAGE], masks=np.stack([MASK, MASK])),
        ValueError,
        "entries of masks, got ndarray",
    ),
    "one text for two images": (
        pipe([IMAGE, IMAGE], boxes=[[BOX], [BOX]], text=["a"]),
        ValueError,
        "2 entries of text, got 1",
    ),
    "empty mask": (pipe(IMAGE, masks=[MASK, EMPTY]), ValueError, "masks[1] is empty"),
    "missing file": (pipe("no/such.jpg", masks=[MASK]), FileNotFoundError, "there is no file no/such.jpg"),
    "text of another type": (pipe(IMAGE, boxes=[BOX], text=7), TypeError, "text must be a string, got int"),
    "unknown keyword": (pipe(IMAGE, boxes=[BOX], beams=2), ValueError, "unknown generate keywords ['beams']"),
    "no steps": (pipe(IMAGE, boxes=[BOX], steps=0), ValueError, "steps must be an integer of at least 1, got 0"),
    "batches of 0": (pipe([IMAGE], boxes=[[BOX]], batch_size=0), ValueError, "batch_size must be an integer of at"),
    "batches of -1": (pipe([IMAGE], boxes=[[BOX]], batch_size=-1), ValueError, "at least 1, got -1"),
    "batches of text": (pipe([IMAGE], boxes=[[BOX]], batch_size="2"), ValueError, "at least 1, got '2'"),
}
DISAGREE = "and the config disagree:"
CHECKPOINTS = {
    "a weight is missing": (
        load(edit_weights=lambda weights: weights.pop("lm_head.weight")),
        ValueError,
        f"{DISAGREE} 1 missing keys, such as lm_head.weight",
    ),
    "a weight is unknown": (
        load(edit_weights=lambda weights: weights.update(stray=torch.zeros(2))),
        ValueError,
        f"{DISAGREE} 1 unexpected keys, such as stray",
    ),
    "a weight has another shape": (
        load(edit_weights=lambda weights: weights.update({"lm_head.weight": torch.zeros(3, 4)})),
        ValueError,
        f"{DISAGREE} 1 mismatched keys, such as ('lm_head.weight', torch.Size([3, 4])",
    ),
    "another width": (
        load(lambda config: config["text_config"].update(hidden_size=64)),
        ValueError,
        "mismatched keys, such as ('language_model.embed_tokens.weight'",
    ),
    "another depth": (
        load(lambda config: config["text_config"].update(num_hidden_layers=3)),
        ValueError,
        "9 missing keys, such as language_model.layers.2.input_layernorm.weight",
    ),
    "another conditioning": (
        load(lambda config: config.update(region_conditioning="vision")),
        ValueError,
        "missing keys, such as region_prompts.weight",
    ),
    "an unknown layout": (
        load(lambda config: config.update(attention_layout="islands")),
        ValueError,
        "attention_layout must be one of ('isolated', 'released', 'full'), got 'islands'",
    ),
    "a tile that holds no whole patches": (
        load(lambda config: config["vision_config"].update(image_size=60)),
        ValueError,
        "a tile of 60 px must hold a whole number of 8 px patches",
    ),
}
TABLE = {
    f"{group}: {name}": case
    for group, cases in (
        ("masks", MASKS),
        ("box", BOXES),
        ("image", IMAGES),
        ("text", TEXTS),
        ("setting", SETTINGS),
        ("incomplete batch", INCOMPLETE),
        ("pipeline", PIPELINE),
        ("checkpoint", CHECKPOINTS),
    )
    for name, case in cases.items()
}


@pytest.mark.parametrize("case", TABLE)
def test_bad_input_is_refused_by_name(case, doors):
    call, expected, fragment = TABLE[case]
    with pytest.raises(expected) as caught:
        call(doors)
    assert type(caught.value) is expected
    assert fragment in str(caught.value)
    raised_in = traceback.extract_tb(caught.value.__traceback__)[-1].filename
    assert raised_in.endswith("_perceptiondlm.py"), raised_in


def test_the_doors_open_to_good_input(doors):
    """What the table breaks works unbroken, so no case is refused for another reason than its own."""
    assert doors.model.generate(**doors.inputs, **SHORT).sequences.shape == (2, 2)
    assert len(doors.pipe(IMAGE, masks=[MASK, rle(), rle(counts=rle()["counts"].encode())], **SHORT)) == 3
    assert len(doors.pipe([IMAGE, IMAGE], boxes=[[BOX], [BOX]], text=["a", "b"], batch_size=2, **SHORT)) == 2
    assert load()(doors).config.attention_layout == "isolated"
