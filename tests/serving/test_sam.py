"""Mask-generation models of transformers as segmenters, on tiny random weights saved to a folder."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_segmenters import saved, saved_sam3
from transformers import Sam2Config, Sam2Model, SamConfig, SamModel
from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil

from perceptiondlm.serving.segmenters import Segmenter, load_segmenter
from perceptiondlm.serving.segmenters.sam import SamSegmenter, distinct


SIDE = 64  # pixels of the tiny models' input
DECODER = {
    "hidden_size": 32, "mlp_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "iou_head_hidden_dim": 32,
}  # fmt: skip
COLOURS = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
SQUARE = {"size": {"height": SIDE, "width": SIDE}, **COLOURS}
PADDED = {**SQUARE, "size": {"longest_edge": SIDE}, "pad_size": {"height": SIDE, "width": SIDE}, "resample": 2}
LOOSE = {"points_per_side": 4, "prompts_per_pass": 5, "least_score": -1e9, "least_stability": 0.0, "least_share": 0.0}


def picture(width: int = 90, height: int = 50) -> Image.Image:
    values = np.random.default_rng(3).integers(0, 256, (height // 10, width // 10, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def sam(tmp_path_factory):
    prompt = {"hidden_size": 32, "image_size": SIDE, "patch_size": 8, "mask_input_channels": 8}
    vision = {
        "hidden_size": 32, "output_channels": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": SIDE,
        "patch_size": 8, "window_size": 4, "global_attn_indexes": [1], "num_pos_feats": 16, "mlp_dim": 32,
    }  # fmt: skip
    config = SamConfig(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=DECODER)
    return saved(SamModel(config), tmp_path_factory.mktemp("sam"), PADDED)


@pytest.fixture(scope="module")
def sam2(tmp_path_factory):
    backbone = {
        "hidden_size": 8, "num_attention_heads": 1, "image_size": [SIDE, SIDE], "blocks_per_stage": [1, 1, 2, 1],
        "embed_dim_per_stage": [8, 16, 32, 64], "num_attention_heads_per_stage": [1, 1, 2, 2],
        "window_size_per_stage": [8, 4, 4, 2], "global_attention_blocks": [3], "patch_kernel_size": [7, 7],
        "patch_stride": [4, 4], "patch_padding": [3, 3], "query_stride": [2, 2],
        "window_positional_embedding_background_size": [4, 4], "model_type": "sam2_hiera_det_model",
    }  # fmt: skip
    vision = {
        "backbone_config": backbone, "backbone_channel_list": [64, 32, 16, 8], "fpn_hidden_size": 32,
        "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]], "fpn_top_down_levels": [2, 3],
    }  # fmt: skip
    prompt = {"hidden_size": 32, "image_size": SIDE, "patch_size": 16, "mask_input_channels": 8}
    config = Sam2Config(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=DECODER)
    return saved(Sam2Model(config), tmp_path_factory.mktemp("sam2"), SQUARE)


@pytest.fixture(scope="module", params=["sam", "sam2"])
def segmenter(request):
    return load_segmenter(request.getfixturevalue(request.param), device="cpu", **LOOSE)


def test_pictures_are_prepared_as_transformers_does(sam):
    """Against the image processor of SAM itself: a wide, a tall and a square picture, larger and smaller."""
    ours = load_segmenter(sam, device="cpu").settings
    theirs = SamImageProcessorPil(size=PADDED["size"], pad_size=PADDED["pad_size"])
    for size in ((90, 50), (40, 130), (64, 64), (13, 9)):
        image = picture(*size)
        expected = theirs(image, return_tensors="pt")
        torch.testing.assert_close(ours.pixel_values(image), expected["pixel_values"], atol=1e-5, rtol=0)
        frame = ours.frame((image.height, image.width))
        assert list(frame.seen) == expected["reshaped_input_sizes"][0].tolist()
        logits = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        masks = theirs.post_process_masks([logits], [frame.size], [frame.seen])[0][0]
        for found, wanted in zip(logits[0], masks, strict=True):
            assert (torch.from_numpy(frame.mask(found)) == wanted).all()


def test_boxes_of_masks_enclose_them(sam):
    frame = load_segmenter(sam, device="cpu").settings.frame((50, 90))
    masks = torch.zeros(2, 16, 16, dtype=torch.bool)
    masks[0, 2:5, 4:12] = True
    (x0, y0, x1, y1), nothing = frame.boxes_of(masks).tolist()
    inside = np.argwhere(frame.mask(torch.where(masks[0], 9.0, -9.0)))
    assert (x0, y0) == pytest.approx(inside.min(axis=0)[::-1], abs=2)
    assert (x1, y1) == pytest.approx(inside.max(axis=0)[::-1] + 1, abs=2)
    assert nothing == [0, 0, 0, 0]


def test_prompts_give_the_models_own_masks(segmenter):
    """Points and a box against a plain call of the model."""
    image, model = picture(), segmenter.model
    assert isinstance(segmenter, Segmenter)
    frame, pixels = segmenter.settings.frame((50, 90)), segmenter.settings.pixel_values(image)
    (pointed,) = segmenter.at_points(image, [(30, 20)])
    with torch.no_grad():
        output = model(
            pixel_values=pixels, input_points=frame.points([[[[30.0, 20.0]]]]), input_labels=torch.ones(1, 1, 1).long()
        )
    best = output.iou_scores[0, 0].argmax()
    assert (pointed.pixels() == frame.mask(output.pred_masks[0, 0, best])).all()
    (boxed,) = segmenter.at_boxes(image, [(10, 5, 70, 40)])
    with torch.no_grad():
        corners = frame.points([[10.0, 5.0], [70.0, 40.0]]).reshape(1, 1, 4)
        output = model(pixel_values=pixels, input_boxes=corners, multimask_output=False)
    assert (boxed.pixels() == frame.mask(output.pred_masks[0, 0, 0])).all()
    assert 0 <= boxed.score <= 1


def test_a_prompt_gives_what_it_gives_alone(segmenter):
    """Entries of one and of two points, mixed, in more than one pass of the decoder."""
    image = picture()
    points = [(30, 20), [(60, 30), (70, 35)], (5, 45), [(20, 10), (80, 40)], (88, 1), (44, 25), (10, 10), (70, 8)]
    labels = [1, [1, 1], 1, [1, 0], 1, 1, 1, 1]
    together = segmenter.at_points(image, points, labels)
    alone = [segmenter.at_points(image, [p], [s])[0] for p, s in zip(points, labels, strict=True)]
    assert [region.box for region in together] == [region.box for region in alone]
    differing = [(a.pixels() ^ b.pixels()).mean() for a, b in zip(together, alone, strict=True)]
    assert max(differing) < 0.01


def test_an_image_is_encoded_once_for_all_prompts(segmenter):
    calls = []
    hook = segmenter.model.vision_encoder.register_forward_hook(lambda *_: calls.append(1))
    image = picture(70, 64)
    segmenter.at_points(image, [(30, 20), [(60, 30), (65, 35)]])
    segmenter.at_boxes(image.copy(), [(1, 1, 50, 50)])
    segmenter.everything(image)
    hook.remove()
    assert len(calls) == 1


def test_everything_is_sorted_without_near_duplicates_and_obeys_its_settings(segmenter):
    image = picture()
    found = segmenter.everything(image)
    assert found
    assert [r.area for r in found] == sorted((r.area for r in found), reverse=True)
    assert len(found) < 3 * LOOSE["points_per_side"] ** 2
    assert all(region.size == (50, 90) for region in found)
    name, options = segmenter.name, {**LOOSE, "least_share": 0.2}
    large = load_segmenter(name, device="cpu", **options).everything(image)
    assert [r.mask for r in large] == [r.mask for r in found if r.area >= 0.2 * 50 * 90]
    assert load_segmenter(name, device="cpu", **{**LOOSE, "least_stability": 1.1}).everything(image) == []


def test_near_duplicates_go_and_the_surer_stays():
    boxes = np.array([[0, 0, 10, 10], [0, 0, 10, 9], [20, 20, 30, 30], [5, 5, 15, 15]], float)
    assert distinct(boxes, np.array([0.5, 0.9, 0.7, 0.6]), 0.7) == [1, 2, 3]


def test_what_no_segmenter_is_is_refused(sam, tmp_path):
    segmenter = load_segmenter(sam, device="cpu")
    with pytest.raises(ValueError, match="knows no words; accepted for texts: SAM 3"):
        segmenter.named(picture(), "car")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="is a model of type 'bert'; accepted: edgetam"):
        load_segmenter(str(tmp_path))
    with pytest.raises(ValueError, match="points_per_side must be a whole number"):
        SamSegmenter(sam, points_per_side=0)
    with pytest.raises(ValueError, match="--device must be one of this machine"):
        load_segmenter(sam, device="tpu:9")


# --- SAM 3 ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sam3(tmp_path_factory, tokenizer):
    return saved_sam3(tmp_path_factory.mktemp("sam3"), tokenizer)


def test_a_text_finds_all_that_the_detector_is_sure_of(sam3):
    image, segmenter = picture(), load_segmenter(sam3, device="cpu", least_named=0.0)
    assert isinstance(segmenter, Segmenter)
    found = segmenter.named(image, "house")
    assert 1 < len(found) <= 6
    scores = [region.score for region in found]
    assert scores == sorted(scores, reverse=True)
    assert {region.label for region in found} == {"house"}
    middle = (scores[0] + scores[-1]) / 2
    sure = load_segmenter(sam3, device="cpu", least_named=middle).named(image, "house")
    assert [region.mask for region in sure] == [region.mask for region in found if region.score >= middle]
    other = segmenter.named(image, "a blue striped tree beside a red car")
    assert [region.score for region in other] != scores  # the words matter


def test_the_detector_alone_takes_no_points_and_no_long_texts(sam3):
    segmenter = load_segmenter(sam3, device="cpu")
    for ask in (lambda: segmenter.at_points(picture(), [(1, 1)]), lambda: segmenter.everything(picture())):
        with pytest.raises(ValueError, match="holds SAM 3's detector alone"):
            ask()
    with pytest.raises(ValueError, match="tokens; accepted: up to 32"):
        segmenter.named(picture(), "a house and a tree " * 20)
