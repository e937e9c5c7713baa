"""`region-captioning`: whatever goes in, the results are those of processor and model by hand, in the same order."""

import itertools
from collections.abc import Iterator
from io import BytesIO

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from transformers import ImageSegmentationPipeline, SegformerConfig, SegformerForSemanticSegmentation, pipeline
from transformers.models.segformer.image_processing_pil_segformer import SegformerImageProcessorPil

from perceptiondlm.pipeline_perceptiondlm import RegionCaptioningPipeline


SETTINGS = {"max_new_tokens": 4, "steps": 4}
CORNERS = ("xmin", "ymin", "xmax", "ymax")


def noise_image(width, height, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def block(size, x0, y0, x1, y1):
    mask = np.zeros(size, dtype=bool)
    mask[y0:y1, x0:x1] = True
    return mask


def rle(mask, as_text=True):
    encoded = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    counts = encoded["counts"].decode() if as_text else encoded["counts"]
    return {"size": encoded["size"], "counts": counts}


IMAGES = [noise_image(128, 64, 0), noise_image(64, 64, 1), noise_image(60, 130, 2)]
BOXES = [[[10, 5, 30, 25], [40, 32, 100, 60], [0, 0, 1, 1]], [[3, 4, 60, 61]], [[0, 100, 60, 130], [20, 0, 40, 90]]]
MASKS = [
    [block((image.height, image.width), *box) for box in boxes] for image, boxes in zip(IMAGES, BOXES, strict=True)
]


class CountingPipeline(RegionCaptioningPipeline):
    """Notes the size of every batch, and the rows and settings that reach the model."""

    def __init__(self, *args, **kwargs):
        self.batches, self.rows = [], []
        super().__init__(*args, **kwargs)

    def preprocess(self, samples, **kwargs):
        self.batches.append(len(samples))
        inputs = super().preprocess(samples, **kwargs)
        self.rows.append(len(inputs["input_ids"]))
        return inputs


@pytest.fixture
def pipe(model, processor):
    return CountingPipeline(model=model, processor=processor, **SETTINGS)


@pytest.fixture(scope="module")
def by_hand(model, processor):
    """Captions of one image without the pipeline."""

    def caption(image, text=None, max_regions_per_pass=None, settings=SETTINGS, **regions):
        inputs = processor(images=image, text=text, max_regions_per_pass=max_regions_per_pass, **regions)
        output = model.generate(**inputs, **settings)
        (scored,) = processor.post_process_region_captions(output, output_scores=True)
        boxes = inputs["region_boxes"].tolist()
        return [{**r, "box": dict(zip(CORNERS, box, strict=True))} for r, box in zip(scored, boxes, strict=True)]

    return caption


def assert_same(found, expected):
    """Equal captions and boxes, scores equal to rounding (a batch of another size sums in another order)."""
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert {**one, "score": None} == {**other, "score": None}
        assert one["score"] == pytest.approx(other["score"], abs=1e-5)


def assert_same_lists(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert_same(one, other)


@pytest.fixture(scope="module")
def expected(by_hand):
    return [by_hand(image, masks=masks) for image, masks in zip(IMAGES, MASKS, strict=True)]


def test_one_image_gives_one_result_per_mask(pipe, expected):
    found = pipe(IMAGES[0], masks=MASKS[0])
    assert found == expected[0]
    assert [list(region) for region in found] == [["caption", "score", "box"]] * 3
    assert [list(region["box"].items()) for region in found] == [
        list(zip(CORNERS, box, strict=True))
        for box in BOXES[0]  # half-open: a box of one pixel is 1 wide
    ]
    for region in found:
        assert isinstance(region["caption"], str)
        assert isinstance(region["score"], float)
        assert 0 < region["score"] <= 1
        assert all(type(edge) is int for edge in region["box"].values())
    assert len({region["caption"] for region in expected[0]}) > 1  # the tiny model does tell regions apart


def test_results_come_in_the_order_of_the_masks(pipe, expected):
    assert_same(pipe(IMAGES[0], masks=MASKS[0][::-1]), expected[0][::-1])


@pytest.mark.parametrize("form", ["array", "tensor", "path", "sample"])
def test_forms_of_one_image(form, pipe, expected, tmp_path):
    IMAGES[0].save(tmp_path / "image.png")
    pixels = np.array(IMAGES[0])
    image = {
        "array": pixels,
        "tensor": torch.from_numpy(pixels).permute(2, 0, 1),
        "path": str(tmp_path / "image.png"),
        "sample": {"image": IMAGES[0], "label": "ignored"},
    }[form]
    assert pipe(image, masks=MASKS[0]) == expected[0]


def test_one_image_in_a_list_gives_a_list_of_lists(pipe, expected):
    assert pipe([IMAGES[0]], masks=[MASKS[0]]) == [expected[0]]


@pytest.mark.parametrize(("batch_size", "batches"), [(None, [1, 1, 1]), (2, [2, 1]), (5, [3])])
def test_a_list_of_images_runs_in_batches(batch_size, batches, pipe, expected):
    found = pipe(IMAGES, masks=MASKS, batch_size=batch_size)
    assert isinstance(found, list)
    assert_same_lists(found, expected)
    assert pipe.batches == batches


def test_batch_size_may_be_given_at_construction(model, processor, expected):
    pipe = CountingPipeline(model=model, processor=processor, batch_size=2, **SETTINGS)
    assert_same_lists(pipe(IMAGES, masks=MASKS), expected)
    assert_same_lists(pipe(IMAGES, masks=MASKS, batch_size=3), expected)
    assert pipe.batches == [2, 1, 3]


def test_list_of_samples(pipe, expected):
    samples = [{"image": image, "masks": masks} for image, masks in zip(IMAGES, MASKS, strict=True)]
    assert pipe(samples) == expected
    assert set(samples[0]) == {"image", "masks"}  # left as they were


def test_boxes_and_label_maps(pipe, expected, by_hand):
    assert pipe(IMAGES[0], boxes=BOXES[0]) == expected[0]
    assert_same_lists(pipe(IMAGES, boxes=BOXES, batch_size=3), expected)
    labels = [sum((i + 1) * mask for i, mask in enumerate(masks)) for masks in (MASKS[1], MASKS[0])]
    images = [IMAGES[1], IMAGES[0]]
    by_label = [by_hand(image, label_map=label) for image, label in zip(images, labels, strict=True)]
    assert pipe(images[1], label_map=labels[1]) == by_label[1]
    assert_same_lists(pipe(images, label_map=labels, batch_size=2), by_label)
    assert [len(regions) for regions in by_label] == [1, 3]


def test_samples_of_different_forms_may_follow_one_another(pipe, expected):
    samples = [{"image": IMAGES[0], "masks": MASKS[0], "boxes": None}, {"image": IMAGES[1], "boxes": BOXES[1]}]
    assert list(pipe(iter(samples))) == expected[:2]


def test_text_replaces_the_question(pipe, by_hand, expected):
    question = "What color is it?"
    asked = [by_hand(image, text=question, masks=masks) for image, masks in zip(IMAGES, MASKS, strict=True)]
    assert asked[0] != expected[0]
    assert pipe(IMAGES[0], masks=MASKS[0], text=question) == asked[0]
    assert pipe(IMAGES, masks=MASKS, text=question) == asked
    default = pipe.processor.region_question
    assert pipe(IMAGES[:2], masks=MASKS[:2], text=[default, question]) == [expected[0], asked[1]]
    samples = [{"image": IMAGES[0], "masks": MASKS[0], "text": question}, {"image": IMAGES[1], "masks": MASKS[1]}]
    assert list(pipe(iter(samples))) == [asked[0], expected[1]]


# --- generators and datasets ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch_size", "drawn_for_first"), [(None, 1), (2, 2)])
def test_a_generator_is_consumed_as_results_are(batch_size, drawn_for_first, pipe, expected):
    drawn = []

    def samples():
        for index in list(range(3)) * 4:
            drawn.append(index)
            yield {"image": IMAGES[index], "masks": MASKS[index]}

    results = pipe(samples(), batch_size=batch_size)
    assert isinstance(results, Iterator)
    assert drawn == []
    assert_same(next(results), expected[0])
    assert len(drawn) == drawn_for_first
    assert_same_lists(list(itertools.islice(results, 4)), [expected[i] for i in (1, 2, 0, 1)])
    assert len(drawn) == 5 + (5 % drawn_for_first)


def dataset_of(as_text=True):
    rows = {
        "image_id": ["a", "b", "c"],
        "image": IMAGES,
        "masks": [[rle(mask, as_text) for mask in masks] for masks in MASKS],
        "captions": [["left alone"] * len(masks) for masks in MASKS],
        "width": [image.width for image in IMAGES],
    }
    return datasets.Dataset.from_dict(rows)


DATASETS = {
    "text counts": lambda: dataset_of(),
    "binary counts": lambda: dataset_of(as_text=False),
    "numpy format": lambda: dataset_of().with_format("numpy"),
    "torch format": lambda: dataset_of().with_format("torch"),
    "streamed": lambda: dataset_of().to_iterable_dataset(),
}


@pytest.mark.parametrize("form", DATASETS)
def test_a_dataset_with_further_columns_gives_an_iterator(form, pipe, expected):
    results = pipe(DATASETS[form](), batch_size=2)
    assert isinstance(results, Iterator)
    assert pipe.batches == []
    assert_same_lists(list(results), expected)
    assert pipe.batches == [2, 1]


def test_a_dataset_of_pictures_boxes_and_questions(pipe, expected, by_hand):
    question = "What color is it?"
    pictures = [[Image.fromarray(mask) for mask in masks] for masks in MASKS]
    features = {"image": datasets.Image(), "masks": datasets.List(datasets.Image())}
    dataset = datasets.Dataset.from_dict({"image": IMAGES, "masks": pictures}, features=datasets.Features(features))
    assert list(pipe(dataset)) == expected
    dataset = datasets.Dataset.from_dict({"image": IMAGES, "boxes": BOXES, "text": [None, question, None]})
    second = by_hand(IMAGES[1], masks=MASKS[1], text=question)
    assert list(pipe(dataset)) == [expected[0], second, expected[2]]


def test_a_bad_sample_is_refused_when_its_turn_comes(pipe, expected):
    samples = [{"image": IMAGES[0], "masks": MASKS[0]}, {"image": IMAGES[1], "masks": [np.zeros((64, 64), bool)]}]
    results = pipe(iter(samples))
    assert next(results) == expected[0]
    with pytest.raises(ValueError, match=r"sample 1: masks\[0\] is empty"):
        next(results)


def test_a_sequence_ends_at_its_length(pipe, expected):
    """A map-style dataset may well answer beyond it."""

    class Repeating(torch.utils.data.Dataset):
        def __len__(self):
            return 3

        def __getitem__(self, index):
            return {"image": IMAGES[index % 3], "masks": MASKS[index % 3]}

    class Bare:
        __len__, __getitem__ = Repeating.__len__, Repeating.__getitem__

    assert_same_lists(list(pipe(Repeating(), batch_size=2)), expected)
    assert_same_lists(list(pipe(Bare(), batch_size=2)), expected)


SAMPLES = [{"image": image, "masks": masks} for image, masks in zip(IMAGES, MASKS, strict=True)]
BAD_SAMPLES = {
    "missing file": ({"image": "no/such.png", "masks": MASKS[0]}, "image: there is no file no/such.png"),
    "no picture": ({"image": b"abc", "masks": MASKS[0]}, "image: 3 bytes cannot be read"),
    "empty mask": ({"image": IMAGES[1], "masks": [np.zeros((64, 64), bool)]}, "masks[0] is empty"),
    "no regions": ({"image": IMAGES[1]}, "a sample needs 'image' and one of"),
    "no sample": (7, "a sample is a int"),
}


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("case", BAD_SAMPLES)
def test_a_bad_sample_is_skipped_and_named(case, batch_size, pipe, expected):
    bad, words = BAD_SAMPLES[case]
    samples = [SAMPLES[0], SAMPLES[1], bad, SAMPLES[2]]
    results = list(pipe(iter(samples), batch_size=batch_size, on_error="skip"))
    assert_same_lists([results[0], results[1], results[3]], expected)
    assert results[2] is None
    (failure,) = pipe.failures
    assert failure["sample"] == 2
    assert words in failure["error"]


def test_results_before_a_bad_sample_of_the_batch_come_out(pipe, expected):
    results = pipe(iter([*SAMPLES[:2], BAD_SAMPLES["no picture"][0]]), batch_size=3)
    assert_same_lists([next(results), next(results)], expected[:2])
    with pytest.raises(ValueError, match="sample 2: image: 3 bytes"):
        next(results)


def test_a_dataset_whose_row_cannot_be_decoded_goes_on(pipe, expected):
    rows = {"image": [{"bytes": b"abc", "path": None}, *({"bytes": png(i), "path": None} for i in IMAGES[1:])]}
    rows["masks"] = [[rle(mask) for mask in masks] for masks in MASKS]
    dataset = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    results = list(pipe(dataset, on_error="skip"))
    assert results[0] is None
    assert_same_lists(results[1:], expected[1:])
    encoded = dataset.cast_column("image", datasets.Image(decode=False)).select([1, 2])
    assert_same_lists(list(pipe(encoded)), expected[1:])


def png(image):
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def test_wrong_settings_are_raised_even_where_bad_samples_are_skipped(pipe):
    with pytest.raises(ValueError, match="steps"):
        pipe(SAMPLES, on_error="skip", steps=0)
    with pytest.raises(ValueError, match=r"on_error must be one of \('raise', 'skip'\), got 'ignore'"):
        pipe(SAMPLES, on_error="ignore")


def test_images_without_regions_give_empty_lists(pipe, expected):
    for regions in ({"masks": []}, {"boxes": []}, {"label_map": np.zeros((64, 128), int)}, {"masks": {"masks": []}}):
        assert pipe(IMAGES[0], **regions) == []
    samples = [{"image": IMAGES[0], "masks": []}, SAMPLES[1], {"image": IMAGES[2], "boxes": np.zeros((0, 4))}]
    for batch_size in (1, 3):
        found = list(pipe(iter(samples), batch_size=batch_size))
        assert_same_lists(found, [[], expected[1], []])
    assert pipe(IMAGES[:2], masks=[[], []]) == [[], []]


def test_samples_of_a_batch_may_give_regions_in_different_forms(pipe, expected):
    samples = [SAMPLES[0], {"image": IMAGES[1], "boxes": BOXES[1]}]
    assert_same_lists(pipe(samples, batch_size=2), expected[:2])


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_change_no_result(workers, pipe, expected):
    dataset = dataset_of()
    assert_same_lists(list(pipe(dataset, batch_size=2, num_workers=workers)), expected)
    assert_same_lists(pipe(IMAGES, masks=MASKS, num_workers=workers), expected)
    samples = [*SAMPLES, BAD_SAMPLES["no picture"][0]] * 5
    results = list(pipe(iter(samples), batch_size=3, num_workers=workers, on_error="skip"))
    assert [result is None for result in results] == [False, False, False, True] * 5
    assert [failure["sample"] for failure in pipe.failures] == [3, 7, 11, 15, 19]


def test_workers_prepare_the_next_samples_while_the_model_runs(model, processor):
    """With workers, later samples have been asked for when the first batch reaches the model."""
    asked = []

    def samples():
        for number in range(8):
            asked.append(number)
            yield SAMPLES[number % 3]

    class Watching(RegionCaptioningPipeline):
        def _forward(self, *args, **kwargs):
            self.seen = [*getattr(self, "seen", []), len(asked)]
            return super()._forward(*args, **kwargs)

    pipe = Watching(model=model, processor=processor, **SETTINGS)
    list(pipe(samples(), batch_size=2))
    assert pipe.seen == [2, 4, 6, 8]
    asked.clear()
    pipe.seen = []
    list(pipe(samples(), batch_size=2, num_workers=2))
    assert pipe.seen[0] > 2


def test_pipeline_from_objects_needs_no_remote_code(model, processor, expected):
    pipe = pipeline("region-captioning", model=model, processor=processor, **SETTINGS)
    assert isinstance(pipe, RegionCaptioningPipeline)
    assert pipe(IMAGES[0], masks=MASKS[0]) == expected[0]


def test_points_ask_for_a_segmenter(pipe):
    with pytest.raises(ValueError, match="a segmenter such as SAM"):
        pipe(IMAGES[0], points=[[12, 7, 1]])


# --- settings ---------------------------------------------------------------------------------------------------------


def test_settings_of_the_call_override_those_of_the_construction(pipe, by_hand, expected):
    fewer = by_hand(IMAGES[0], masks=MASKS[0], settings={"max_new_tokens": 2, "steps": 1})
    assert fewer != expected[0]
    assert pipe(IMAGES[0], masks=MASKS[0], max_new_tokens=2, steps=1) == fewer
    assert pipe(IMAGES[0], masks=MASKS[0]) == expected[0]  # nothing stuck


def test_sampling_follows_the_seed(pipe, expected):
    first, again, other = (pipe(IMAGES[0], masks=MASKS[0], temperature=3.0, seed=seed) for seed in (7, 7, 8))
    assert first == again
    assert first not in (expected[0], other)


def test_regions_per_pass_at_construction_and_in_the_call(model, processor, expected):
    pipe = CountingPipeline(model=model, processor=processor, max_regions_per_pass=2, **SETTINGS)
    assert_same(pipe(IMAGES[0], masks=MASKS[0]), expected[0])
    assert_same(pipe(IMAGES[0], masks=MASKS[0], max_regions_per_pass=1), expected[0])
    assert_same_lists(pipe(IMAGES, masks=MASKS, batch_size=3, max_regions_per_pass=2), expected)
    assert pipe.rows == [2, 3, 2 + 1 + 1]


def test_an_unknown_setting_of_the_construction_is_refused_by_the_first_call(model, processor):
    pipe = RegionCaptioningPipeline(model=model, processor=processor, beams=2)
    with pytest.raises(ValueError, match=r"unknown generate keywords \['beams'\]"):
        pipe(IMAGES[0], masks=MASKS[0])


# --- other pipelines' output ------------------------------------------------------------------------------------------


def test_output_of_an_image_segmentation_pipeline_is_taken_as_it_is(pipe, by_hand):
    torch.manual_seed(0)
    config = SegformerConfig(
        num_encoder_blocks=1, depths=[1], sr_ratios=[1], hidden_sizes=[8], patch_sizes=[3], strides=[2],
        num_attention_heads=[1], mlp_ratios=[1], decoder_hidden_size=8, num_labels=3,
    )  # fmt: skip
    segment = ImageSegmentationPipeline(
        model=SegformerForSemanticSegmentation(config).eval(),
        image_processor=SegformerImageProcessorPil(size={"height": 32, "width": 32}),
    )
    segments = segment(IMAGES[0])
    assert len(segments) > 1
    masks = [np.asarray(item["mask"]) > 0 for item in segments]
    assert pipe(IMAGES[0], masks=segments) == by_hand(IMAGES[0], masks=masks)


def test_output_of_a_mask_generation_pipeline_is_taken_as_it_is(pipe, expected):
    """Its `postprocess` returns this dict; the pipeline itself needs torchvision."""
    generated = [
        {"masks": masks, "scores": torch.ones(len(masks)), "rle_mask": [rle(mask) for mask in masks]} for masks in MASKS
    ]
    assert pipe(IMAGES[0], masks=generated[0]) == expected[0]
    assert pipe(IMAGES, masks=generated) == expected
