"""The parts of the model against slow references: tiles, vision features, RoI-Align, noise, loss, gradients, sizes."""

import json
import random

import numpy as np
import pytest
import torch
from model_passes import embed
from PIL import Image
from torch.nn import functional as F
from transformers import SiglipVisionModel

from perceptiondlm.attention_perceptiondlm import MaskedPass
from perceptiondlm.configuration_perceptiondlm import FORMER_ROI_FIELDS, ROI_VARIANTS, PerceptionDLMConfig, num_tiles
from perceptiondlm.inputs_perceptiondlm import PromptInputs
from perceptiondlm.modeling_perceptiondlm import (
    PerceptionDLMForConditionalGeneration,
    masked_diffusion_loss,
    noise_answers,
    pixel_unshuffle,
    scatter_features,
    token_losses,
)
from perceptiondlm.region_features_perceptiondlm import box_geometry, merge_tiles, roi_align
from perceptiondlm.sequence_perceptiondlm import ROI, SHARED
from perceptiondlm.training.data.noise import stratified_noise


CONDITIONINGS = ("replay", "vision")
UNSAVED = ("dtype", "_name_or_path", "architectures", "transformers_version", "model_type")  # filled in when saving


def region_batch(processor, scene, **kwargs):
    """The scene's regions as model inputs."""
    return processor(images=scene.image, masks=[item.mask for item in scene.objects], **kwargs)


def region_tensors(batch) -> dict[str, torch.Tensor]:
    """The prompt's tensors of a batch."""
    return {name: value for name, value in batch.items() if name in PromptInputs.tensor_names()}


def training_batch(processor, scene, copies: int = 2) -> dict[str, torch.Tensor]:
    """The scene as a training batch: noised copies of every caption."""
    labels = processor.encode_answers([item.caption for item in scene.objects], 32).repeat_interleave(copies, dim=0)
    p, u = stratified_noise(len(scene.objects), 32, copies, seed="0")
    batch = dict(region_batch(processor, scene))
    return batch | {"labels": labels, "mask_probability": p, "answer_noise": u}


# --- tiles and pixel-unshuffle ------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [(1, 1), (3, 2), (1, 2), (5, 1)])
def test_merging_tiles_undoes_tiling(tiny_model, tiny_processor, grid):
    processor = tiny_processor(tiny_model(), image_mean=[0.0] * 3, image_std=[1.0] * 3)
    columns, rows = grid
    pixels = np.random.default_rng(0).integers(0, 256, (rows * 64, columns * 64, 3), dtype=np.uint8)
    tiles, found = processor.image_processor.tile(Image.fromarray(pixels))
    assert found == grid
    assert len(tiles) == num_tiles(grid)
    merged = merge_tiles(torch.from_numpy(tiles).permute(0, 2, 3, 1), grid)
    assert torch.equal(merged.mul(255).round().to(torch.uint8), torch.from_numpy(pixels))


@pytest.mark.parametrize(("side", "factor"), [(4, 2), (6, 3), (8, 2), (4, 1)])
def test_pixel_unshuffle_stacks_squares_of_patches(side, factor):
    """Every patch goes to the token of its square, in row-major order within it."""
    tiles, channels, n = 2, 3, side // factor
    ramp = torch.arange(tiles * side * side * channels, dtype=torch.float32).view(tiles, side * side, channels)
    unshuffled = pixel_unshuffle(ramp, factor)
    assert unshuffled.shape == (tiles, n, n, factor * factor * channels)
    rebuilt = torch.full_like(ramp, -1)
    for t in range(tiles):
        for y in range(side):
            for x in range(side):
                first = ((y % factor) * factor + x % factor) * channels
                rebuilt[t, y * side + x] = unshuffled[t, y // factor, x // factor, first : first + channels]
    assert torch.equal(rebuilt, ramp)


def test_image_tokens_lie_where_their_patches_lie():
    """Patches that carry their own place in the picture: after unshuffle and merging each token holds its four."""
    (columns, rows), side = (3, 2), 4
    tiles = [
        [(row * side + y, column * side + x) for y in range(side) for x in range(side)]
        for row in range(rows)
        for column in range(columns)
    ]
    thumbnail = [(-1, -1)] * side**2
    merged = merge_tiles(pixel_unshuffle(torch.tensor([*tiles, thumbnail]), 2), (columns, rows))
    assert merged.shape == (rows * 2, columns * 2, 8)
    for y in range(rows * 2):
        for x in range(columns * 2):
            square = [(2 * y, 2 * x), (2 * y, 2 * x + 1), (2 * y + 1, 2 * x), (2 * y + 1, 2 * x + 1)]
            assert merged[y, x].view(4, 2).tolist() == [list(place) for place in square]


# --- RoI-Align and replay -----------------------------------------------------------------------------------------


def bilinear(map_hwD: torch.Tensor, x: float, y: float) -> torch.Tensor:
    """Value at pixel coordinates (centres at integers), clamped to the border."""
    height, width, _ = map_hwD.shape
    x, y = min(max(x, 0.0), width - 1.0), min(max(y, 0.0), height - 1.0)
    left, top = int(x), int(y)
    right, bottom = min(left + 1, width - 1), min(top + 1, height - 1)
    fx, fy = x - left, y - top
    upper = map_hwD[top, left] * (1 - fx) + map_hwD[top, right] * fx
    lower = map_hwD[bottom, left] * (1 - fx) + map_hwD[bottom, right] * fx
    return upper * (1 - fy) + lower * fy


def slow_roi_align(map_hwD: torch.Tensor, box: list[float], bins: int, samples: int) -> torch.Tensor:
    """Average of the samples of every bin, one sample at a time, in float64."""
    height, width, depth = map_hwD.shape
    x0, y0, x1, y1 = box[0] * width, box[1] * height, box[2] * width, box[3] * height
    out = torch.zeros(bins * bins, depth, dtype=torch.float64)
    for row in range(bins):
        for column in range(bins):
            for i in range(samples):
                for j in range(samples):
                    y = y0 + (y1 - y0) * (row + (i + 0.5) / samples) / bins - 0.5
                    x = x0 + (x1 - x0) * (column + (j + 0.5) / samples) / bins - 0.5
                    out[row * bins + column] += bilinear(map_hwD.double(), x, y) / samples**2
    return out


@pytest.mark.parametrize(("bins", "samples"), [(4, 2), (3, 1), (2, 3)])
def test_roi_align_against_a_loop(bins, samples):
    features = torch.randn(5, 8, 3, generator=torch.Generator().manual_seed(0))
    boxes = [
        [0.0, 0.0, 1.0, 1.0],  # the whole image, samples outside the outermost centres
        [0.13, 0.41, 0.58, 0.77],
        [0.500, 0.500, 0.503, 0.502],  # far smaller than a feature cell
        [0.97, 0.0, 1.0, 0.04],  # in a corner
        [0.0, 0.2, 0.9, 0.25],  # flat
    ]
    found = roi_align(features, torch.tensor(boxes), bins, samples)
    assert found.shape == (len(boxes), bins**2, 3)
    expected = torch.stack([slow_roi_align(features, box, bins, samples) for box in boxes])
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=0)


def test_roi_align_keeps_the_dtype():
    features = torch.randn(4, 4, 2).to(torch.bfloat16)
    assert roi_align(features, torch.tensor([[0.0, 0.0, 1.0, 1.0]]), 2, 2).dtype == torch.bfloat16


def test_regions_are_read_from_their_own_place_in_their_own_image(tiny_model, tiny_processor):
    """`replay_regions` on tiles that are ramps of the picture's coordinates: a RoI token is the centre of its bin."""
    model = tiny_model(region_conditioning="vision")
    processor = tiny_processor(model)
    wide, tall = Image.new("RGB", (192, 128)), Image.new("RGB", (60, 130))
    boxes = [[[48, 32, 112, 96], [100, 50, 104, 54]], [[10, 40, 50, 120]]]
    batch = processor(images=[wide, tall], boxes=boxes)
    pieces = []
    for columns, rows in batch["tile_grids"].tolist():
        y, x = torch.meshgrid(torch.arange(rows * 4) + 0.5, torch.arange(columns * 4) + 0.5, indexing="ij")
        ramp = torch.stack((x / (columns * 4), y / (rows * 4)), -1)  # fractions of the image
        pieces.append(ramp.view(rows, 4, columns, 4, 2).transpose(1, 2).reshape(-1, 4, 4, 2))
        pieces.append(torch.full((1, 4, 4, 2), 99.0))  # the thumbnail
    tiles = [torch.cat(pieces[:2]), torch.cat(pieces[2:])]
    found = model.replay_regions(PromptInputs(**region_tensors(batch)).checked(model), tiles)
    sizes = [(192, 128), (192, 128), (60, 130)]
    for tokens, box, (width, height) in zip(found, [*boxes[0], *boxes[1]], sizes, strict=True):
        for index, token in enumerate(tokens.tolist()):
            x = box[0] + (box[2] - box[0]) * (index % 4 + 0.5) / 4
            y = box[1] + (box[3] - box[1]) * (index // 4 + 0.5) / 4
            assert token == pytest.approx([x / width, y / height], abs=1e-5)


def bare_replay(tiny_model):
    """A replay module that adds the four cells of coverage to the first four channels, and nothing else."""
    replay = tiny_model().region_replay
    with torch.no_grad():
        for parameter in replay.parameters():
            parameter.zero_()
        replay.coverage_proj.weight[:4] = torch.eye(4)
    return replay


def test_only_the_covered_cell_of_a_bin_is_active(tiny_model):
    """Coverage of the lower right quarter of bin (1, 2) reaches token 6 as its fourth cell, and nothing else."""
    coverage = torch.zeros(1, 8, 8)
    coverage[0, 3, 5] = 1.0
    with torch.no_grad():
        tokens = bare_replay(tiny_model)(torch.zeros(1, 16, 48), coverage, torch.zeros(1, 6))
    assert tokens.nonzero().tolist() == [[0, 6, 3]]
    assert tokens[0, 6, 3] == 1.0


def test_a_mask_reaches_its_tokens_cell_by_cell(tiny_model, tiny_processor):
    """From pixels to tokens: a random pattern of 2 px cells, read back from each bin's channels."""
    pattern = np.random.default_rng(1).random((8, 8)) < 0.5
    pattern[0, 0] = pattern[7, 7] = True  # the box reaches from cell to cell
    mask = np.zeros((40, 50), dtype=bool)
    mask[9:25, 21:37] = pattern.repeat(2, axis=0).repeat(2, axis=1)
    batch = tiny_processor(tiny_model())(images=Image.new("RGB", (50, 40)), masks=[mask])
    with torch.no_grad():
        tokens = bare_replay(tiny_model)(torch.zeros(1, 16, 48), batch["region_coverage"], torch.zeros(1, 6))[0]
    for row in range(8):
        for column in range(8):
            token, cell = (row // 2) * 4 + column // 2, (row % 2) * 2 + column % 2
            assert tokens[token, cell] == pytest.approx(float(pattern[row, column]), abs=1e-6)


def test_replay_adds_bin_place_and_geometry(tiny_model):
    replay = tiny_model().region_replay
    features, coverage = torch.randn(2, 16, 48), torch.rand(2, 8, 8)
    geometry = torch.rand(2, 6)
    with torch.no_grad():
        tokens = replay(features, coverage, geometry)
        for region in range(2):
            for token in range(16):
                row, column = divmod(token, 4)
                cells = coverage[region, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].flatten()
                expected = features[region, token] + replay.coverage_proj(cells)
                expected += replay.bin_embedding.weight[token] + replay.geometry_proj(geometry[region])
                torch.testing.assert_close(tokens[region, token], expected, atol=1e-5, rtol=1e-5)


def test_box_geometry_measures_extent_in_shorter_sides():
    boxes = torch.tensor([[0.25, 0.5, 0.75, 1.0], [0.0, 0.0, 1.0, 1.0]])
    found = box_geometry(boxes, torch.tensor([[100, 200], [300, 60]]))
    assert found.tolist() == [[0.25, 0.5, 0.75, 1.0, 1.0, 0.5], [0.0, 0.0, 1.0, 1.0, 1.0, 5.0]]


@pytest.mark.parametrize("field", ["region_coverage", "region_boxes"])
def test_logits_depend_on_shape_and_place_of_a_region(tiny_model, tiny_processor, scene, field):
    """Same image, same question: the mask's outline alone, and the box alone, change the answer's scores."""
    model = tiny_model()
    batch = region_batch(tiny_processor(model), scene)
    ids = torch.full((3, 4), model.config.mask_token_id)
    changed = dict(batch)
    changed[field] = batch[field].flip(0)
    with torch.no_grad():
        assert (model(**batch, answer_ids=ids).logits - model(**changed, answer_ids=ids).logits).abs().max() > 1e-2


# --- vision tower and region prompts ------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [-1, -2, -3])
def test_vision_features_are_the_hidden_states_of_siglip(tiny_model, layer):
    model = tiny_model(vision_feature_layer=layer)
    stock = SiglipVisionModel(model.config.vision_config).eval()
    stock.load_state_dict(model.vision_tower.state_dict())
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = stock(pixels, output_hidden_states=True).hidden_states[layer]
        torch.testing.assert_close(model.vision_tower(pixels, layer), expected, atol=1e-5, rtol=1e-5)


def test_region_prompts_enter_by_coverage(tiny_model, tiny_processor):
    """Patch embeddings, read before the first layer, change by the coverage-weighted sum of prompts, nowhere else."""
    model = tiny_model(region_conditioning="vision", vision_feature_layer=-3)
    masks = np.zeros((2, 64, 128), dtype=bool)
    masks[0, 8:20, 60:68] = True  # across the border of the two tiles, covering some patches in part
    masks[1, 16:24, 56:64] = True  # overlaps the first
    batch = tiny_processor(model)(images=Image.new("RGB", (128, 64), (90, 60, 30)), masks=masks)
    coverage, patches = batch["prompt_coverage"], []
    hook = model.vision_tower.register_forward_hook(lambda _module, _inputs, output: patches.append(output))
    with torch.no_grad():
        model.encode_tiles(batch["pixel_values"], coverage)
        model.encode_tiles(batch["pixel_values"])
    hook.remove()
    added = (patches[0] - patches[1]).view(3, 8, 8, -1)
    prompts = model.region_prompts.weight
    seen = set()
    for tile in range(3):
        for row in range(8):
            for column in range(8):
                weights = coverage[tile, :, row, column]
                expected = sum(weights[k] * prompts[k] for k in range(6))
                torch.testing.assert_close(added[tile, row, column], expected, atol=1e-5, rtol=0)
                if not weights.any():
                    assert not added[tile, row, column].any()
                else:
                    seen.add((tile, row, column))
    grid_patches = {(0, 1, 7), (0, 2, 7), (1, 1, 0), (1, 2, 0)}  # by hand, from the masks above
    assert {place for place in seen if place[0] < 2} == grid_patches
    assert coverage[0, :2, 2, 7].tolist() == pytest.approx([0.25, 1.0])  # the overlap: 4 of 8 px by 4 of 8 px, and all


def test_region_prompts_can_be_switched_off(tiny_model, tiny_processor, scene):
    with_prompts, without = (tiny_model(region_conditioning="vision", use_region_prompts=use) for use in (True, False))
    batch = region_batch(tiny_processor(with_prompts), scene)
    pixels, coverage = batch["pixel_values"], batch["prompt_coverage"]
    with torch.no_grad():
        assert torch.equal(without.encode_tiles(pixels, coverage), without.encode_tiles(pixels))
        assert not torch.allclose(with_prompts.encode_tiles(pixels, coverage), with_prompts.encode_tiles(pixels))


# --- the sequence as it is written --------------------------------------------------------------------------------


def hand_built_logits(
    model, prompt_embeds, answers: list[list[int]], slots: list[list[int]], prompt_sees_answers: bool
):
    """Logits of the slots when prompt and answers are run as one plain sequence, positions counted from zero.

    `answers` are the ids of every block, `slots` the places of its slots within it.
    """
    tail = torch.tensor([[token for block in answers for token in block]])
    embeds = torch.cat((prompt_embeds, model.get_input_embeddings()(tail)), dim=1)
    length, total = prompt_embeds.shape[1], embeds.shape[1]
    allowed = torch.ones(1, 1, total, total, dtype=torch.bool)
    allowed[:, :, :length, length:] = prompt_sees_answers
    logits = model.lm_head(model.language_model(embeds, torch.arange(total)[None], MaskedPass(allowed)))[0, length:]
    starts = [sum(len(block) for block in answers[:index]) for index in range(len(answers))]
    return torch.stack([logits[[start + slot for slot in own]] for start, own in zip(starts, slots, strict=True)])


@torch.no_grad()
def assert_scores(model, batch, ids, answers, slots):
    embeds = embed(model, batch).embeds
    sees = model.config.attention_layout != "isolated"
    expected = hand_built_logits(model, embeds, answers, slots, sees)
    torch.testing.assert_close(model(**batch, answer_ids=ids).logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("layout", ["isolated", "released", "full"])
def test_an_answer_without_regions_follows_its_prompt_bare(tiny_model, tiny_processor, scene, layout):
    model = tiny_model(attention_layout=layout)
    batch = tiny_processor(model)(images=scene.image, text="How many?")
    ids = torch.tensor([[7, model.config.mask_token_id, 9, 11]])
    assert_scores(model, batch, ids, ids.tolist(), [[0, 1, 2, 3]])


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_isolated_a_caption_follows_its_marker(tiny_model, tiny_processor, scene, conditioning):
    """One region: `prompt, marker, slots`; only the prompt does not look at what follows."""
    model = tiny_model(region_conditioning=conditioning)
    batch = tiny_processor(model)(images=scene.image, masks=[scene.objects[0].mask])
    ids = torch.tensor([[7, model.config.mask_token_id, 9]])
    shared_only = batch["input_ids"].shape[1] - 17  # RoI tokens and newline, which no shared token sees
    assert int((batch["token_roles"] == SHARED).sum()) == shared_only
    with torch.no_grad():
        prompt = embed(model, batch)
        tail = torch.tensor([[model.config.caption_token_ids[0], *ids[0].tolist()]])
        embeds = torch.cat((prompt.embeds, model.get_input_embeddings()(tail)), dim=1)
        group = torch.cat(((batch["token_roles"][0] != SHARED).long(), torch.full((4,), 2)))  # S 0, R 1, C 2
        allowed = (group[:, None] >= group[None, :])[None, None]
        hidden = model.language_model(embeds, torch.arange(embeds.shape[1])[None], MaskedPass(allowed))
        expected = model.lm_head(hidden)[:, -3:]
        torch.testing.assert_close(model(**batch, answer_ids=ids).logits, expected, atol=1e-4, rtol=0)


def test_everything_of_a_prompt_id_moves_with_it(tiny_model, tiny_processor, scene):
    """Ids 2, 0, 1 with the rows of prompt and marker embeddings moved along: the same logits as ids 0, 1, 2."""
    plain, moved = (tiny_model(region_conditioning="vision", num_region_prompts=3) for _ in range(2))
    ids = torch.tensor([2, 0, 1])
    markers = torch.tensor(plain.config.caption_token_ids)
    with torch.no_grad():
        moved.region_prompts.weight[ids] = plain.region_prompts.weight
        embeddings = moved.get_input_embeddings().weight
        embeddings[markers[ids]] = plain.get_input_embeddings().weight[markers[:3]]
    processor = tiny_processor(plain)
    answers = torch.full((3, 5), plain.config.mask_token_id)
    with torch.no_grad():
        expected = plain(**region_batch(processor, scene), answer_ids=answers).logits
        found = moved(**region_batch(processor, scene, prompt_ids=ids.tolist()), answer_ids=answers).logits
        ignored = moved(**region_batch(processor, scene), answer_ids=answers).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert not torch.allclose(ignored, expected, atol=1e-2)


FINE = {"vision_config": {"image_size": 256}}  # 16 tokens per tile side: boxes scaled twice still differ


def test_published_rois_are_shifted_and_scaled_twice(tiny_model, tiny_processor):
    """They equal the plain rule on a box and on tiles changed by hand, in generation and in training."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (128, 64, 3), dtype=np.uint8))
    mask = np.zeros((128, 64), bool)
    mask[20:100, 10:50] = True
    plain, published = (tiny_model(region_geometry=False, roi_variant=v, **FINE) for v in ("aligned", "released"))
    batch = region_tensors(tiny_processor(plain)(images=image, masks=[mask]))
    with torch.no_grad():
        tiles = plain.encode_tiles(batch["pixel_values"])
    assert len(tiles) == 3  # two tiles and the thumbnail
    shifted = tiles[[1, 2, 0]]

    def replayed(model, tiles, box, training=False):
        inputs = PromptInputs(**batch | {"region_boxes": torch.tensor([box])}).checked(model)
        with torch.no_grad():
            return model.replay_regions(inputs, [tiles], training)

    box = [10, 20, 50, 100]
    for training, scale in ((False, 1 / 32), (True, 1 / 28)):
        found = replayed(published, tiles, box, training)
        by_hand = replayed(plain, shifted, [edge * scale for edge in (10, 20, 49, 99)])
        torch.testing.assert_close(found, by_hand)
        for wrong in ((tiles, 49, 99, scale), (shifted, 50, 100, scale), (shifted, 49, 99, 1.0)):
            other = replayed(plain, wrong[0], [edge * wrong[3] for edge in (10, 20, *wrong[1:3])])
            assert not torch.allclose(found, other, atol=1e-3)
    assert not torch.allclose(replayed(published, tiles, box), replayed(published, tiles, box, True), atol=1e-4)


def test_a_single_tile_is_its_own_map_under_every_variant(tiny_model, tiny_processor):
    """Without a thumbnail there is nothing to shift to."""
    tiles = torch.randn(1, 4, 4, 3)
    assert torch.equal(ROI_VARIANTS["released"].feature_map(tiles, (1, 1)), tiles[0])


def test_training_has_its_own_box_scale(tiny_model, tiny_processor, scene):
    """With published RoIs the loss does not see what generation sees."""
    model = tiny_model(roi_variant="released", **FINE)
    batch = training_batch(tiny_processor(model), scene)
    with torch.no_grad():
        embeds = [embed(model, batch, training).embeds for training in (True, False)]
    assert not torch.allclose(*embeds, atol=1e-4)
    losses = []
    for training in (True, False):
        model.embed_prompt = lambda inputs, tiles=None, training=False, _as=training: type(model).embed_prompt(
            model, inputs, tiles, _as
        )
        losses.append(model(**batch).loss.item())
        del model.embed_prompt
    assert model(**batch).loss.item() == losses[0] != losses[1]


@pytest.mark.parametrize("variant", ["aligned", "released"])
def test_configs_of_before_name_the_variant_by_its_parts(variant):
    former = {name: values[variant == "released"] for name, values in FORMER_ROI_FIELDS.items()}
    assert PerceptionDLMConfig(**former).roi_variant == variant
    assert not set(former) & set(PerceptionDLMConfig(**former).to_dict())
    with pytest.raises(ValueError, match=r"'roi_first_tile': 1.*'aligned'.*'released'"):
        PerceptionDLMConfig(roi_first_tile=1)


def test_supervised_markers_give_captions_their_own_length(tiny_model, tiny_processor, scene):
    """Blocks of different lengths in one batch have the loss they have alone, and nothing depends on the padding."""
    model = tiny_model(attention_layout="released", region_conditioning="vision", supervise_markers=True)
    processor = tiny_processor(model)
    masks = [item.mask for item in scene.objects][:1]
    labels = torch.randint(0, 400, (1, 7), generator=torch.Generator().manual_seed(0))
    padded = torch.cat((labels, torch.full((1, 4), -100)), dim=1)
    certain = {"mask_probability": torch.ones(1, 1)}
    inputs = processor(images=scene.image, masks=masks)
    with torch.no_grad():
        tight = model(**inputs, labels=labels, answer_noise=torch.zeros(1, 9), **certain)
        loose = model(**inputs, labels=padded, answer_noise=torch.zeros(1, 13), **certain)
    assert tight.logits.shape[:2] == (1, 9)  # marker, seven tokens, terminator
    assert int(tight.masked.sum()) == int(loose.masked.sum()) == 9
    torch.testing.assert_close(tight.loss, loose.loss)


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_other_layouts_write_the_released_sequence(tiny_model, tiny_processor, scene, conditioning):
    """`marker slots newline` per region, the last one ended by the end of turn; markers follow the prompt id."""
    model = tiny_model(region_conditioning=conditioning, attention_layout="full")
    config = model.config
    batch = region_batch(tiny_processor(model), scene)
    ids = torch.randint(0, 500, (3, 4), generator=torch.Generator().manual_seed(0))
    ends = [config.newline_token_id, config.newline_token_id, config.end_of_turn_token_id]
    markers = [config.caption_token_ids[k if conditioning == "vision" else 0] for k in range(3)]
    blocks = [[marker, *slots, end] for marker, slots, end in zip(markers, ids.tolist(), ends, strict=True)]
    assert_scores(model, batch, ids, blocks, [[1, 2, 3, 4]] * 3)


# --- noise and loss -----------------------------------------------------------------------------------------------


MASK_ID = 50


def noise_case(seed: int = 0):
    """Labels (5, 7) over 20 tokens with some slots unsupervised, p, u and logits."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 20, (5, 7), generator=generator)
    labels[0, 3:], labels[2, 0] = -100, -100
    p, u = torch.rand(5, 1, generator=generator) * 0.9 + 0.1, torch.rand(5, 7, generator=generator)
    return labels, p, u, torch.randn(5, 7, 20, generator=generator)


def test_noise_masks_supervised_tokens_with_probability_p():
    labels, p, u, _ = noise_case()
    noised, masked = noise_answers(labels, MASK_ID, p, u)
    for a in range(5):
        for g in range(7):
            supervised = int(labels[a, g]) != -100
            replaced = supervised and bool(u[a, g] < p[a, 0])
            assert bool(masked[a, g]) == replaced
            assert int(noised[a, g]) == (MASK_ID if replaced or not supervised else int(labels[a, g]))
    assert 0 < masked.sum() < (labels != -100).sum()


def test_noise_at_its_extremes():
    labels, _, u, _ = noise_case()
    assert torch.equal(noise_answers(labels, MASK_ID, torch.ones(5, 1), u)[1], labels != -100)
    assert not noise_answers(labels, MASK_ID, torch.zeros(5, 1), u)[1].any()


@pytest.mark.parametrize("weighting", ["elbo", "masked"])
def test_loss_is_equation_2(weighting):
    labels, p, u, logits = noise_case()
    _, masked = noise_answers(labels, MASK_ID, p, u)
    total, supervised, count = 0.0, 0, 0
    for a in range(5):
        for g in range(7):
            if int(labels[a, g]) == -100:
                continue
            supervised += 1
            if u[a, g] < p[a, 0]:
                scores = logits[a, g].double()
                nll = float(scores.exp().sum().log() - scores[labels[a, g]])
                total += nll / float(p[a, 0]) if weighting == "elbo" else nll
                count += 1
    expected = total / (supervised if weighting == "elbo" else count)
    nll = token_losses(logits[masked], labels, masked)
    assert float(masked_diffusion_loss(nll, labels, masked, p, weighting)) == pytest.approx(expected, rel=1e-5)
    assert float(masked_diffusion_loss(nll, labels, masked, p, weighting, num_items=50)) == pytest.approx(
        expected * (supervised if weighting == "elbo" else count) / 50, rel=1e-5
    )


@pytest.mark.parametrize("weighting", ["elbo", "masked"])
def test_loss_without_a_masked_token_is_zero(weighting):
    labels, p, _, logits = noise_case()
    nothing = torch.zeros_like(labels, dtype=torch.bool)
    loss = masked_diffusion_loss(
        token_losses(logits.requires_grad_()[nothing], labels, nothing), labels, nothing, p, weighting
    )
    loss.backward()
    assert loss.item() == 0.0
    assert not logits.grad.any()


def test_unknown_weighting_is_refused():
    labels, p, _, logits = noise_case()
    with pytest.raises(ValueError, match=r"'mean'.*'elbo'.*'masked'"):
        masked_diffusion_loss(token_losses(logits[labels > 0], labels, labels > 0), labels, labels > 0, p, "mean")


def test_forward_reports_loss_and_mask_of_its_noise(tiny_model, tiny_processor, scene):
    """The loss returned is equation 2 on the logits returned, and the slots it masked are those the draws say."""
    model = tiny_model()
    batch = training_batch(tiny_processor(model), scene)
    with torch.no_grad():
        output = model(**batch)
    labels, p, u = batch["labels"], batch["mask_probability"], batch["answer_noise"]
    assert torch.equal(output.masked, (u < p) & (labels != -100))
    nll = F.cross_entropy(output.logits.double().flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
    expected = (nll * output.masked / p).sum() / labels.numel()
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-4)


def test_forward_scores_what_it_noised(tiny_model, tiny_processor, scene):
    """Training and scoring are one path: the noised ids given as `answer_ids` get the logits of training."""
    model = tiny_model()
    batch = training_batch(tiny_processor(model), scene)
    noise = [batch.pop(name) for name in ("labels", "mask_probability", "answer_noise")]
    noised, _ = noise_answers(noise[0], model.config.mask_token_id, *noise[1:])
    with torch.no_grad():
        trained = model(**batch, labels=noise[0], mask_probability=noise[1], answer_noise=noise[2]).logits
        assert torch.equal(trained, model(**batch, answer_ids=noised).logits)


def test_noised_copies_of_an_answer_do_not_see_each_other(tiny_model, tiny_processor, scene):
    """Two copies per region in one pass get the logits each gets alone."""
    model = tiny_model()
    batch = training_batch(tiny_processor(model), scene)
    for name in ("mask_probability", "answer_noise"):
        batch.pop(name)
    ids = torch.where(torch.rand(6, 32, generator=torch.Generator().manual_seed(0)) < 0.5, 7, batch.pop("labels"))
    with torch.no_grad():
        together = model(**batch, answer_ids=ids).logits
        apart = torch.stack([model(**batch, answer_ids=ids[copy::2]).logits for copy in range(2)], dim=1)
    torch.testing.assert_close(together, apart.flatten(0, 1), atol=1e-4, rtol=0)


def test_noise_is_drawn_when_left_out(tiny_model, tiny_processor, scene):
    model = tiny_model()
    batch = training_batch(tiny_processor(model), scene)
    for name in ("mask_probability", "answer_noise"):
        batch.pop(name)
    with torch.no_grad():
        torch.manual_seed(0)
        first, second = model(**batch).masked, model(**batch).masked
        torch.manual_seed(0)
        assert torch.equal(model(**batch).masked, first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("num_answers", [1, 3, 8])
def test_noise_is_stratified_and_complementary(num_answers):
    p, u = stratified_noise(num_answers, 50, copies=2, seed=f"s/{num_answers}")
    assert p.shape == (2 * num_answers, 1)
    assert u.shape == (2 * num_answers, 50)
    masked = (u < p).view(num_answers, 2, 50)
    assert (masked.sum(dim=1) == 1).all()  # of two copies exactly one masks a token
    for copy in (p[::2, 0], p[1::2, 0]):  # one probability in every n-th of [0, 1]
        assert sorted((copy * num_answers).int().tolist()) == list(range(num_answers))


def test_noise_depends_on_its_seed_alone():
    torch.manual_seed(1)
    first = stratified_noise(3, 8, copies=1, seed="0/1/2")
    torch.manual_seed(2)
    again, other = stratified_noise(3, 8, copies=1, seed="0/1/2"), stratified_noise(3, 8, copies=1, seed="1/1/2")
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[1], other[1])
    with pytest.raises(ValueError, match="3"):
        stratified_noise(3, 8, copies=3, seed="0")


# --- gradients ----------------------------------------------------------------------------------------------------


def gradients(model, batch) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model.train()
    model(**batch).loss.backward()
    model.eval()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
@pytest.mark.parametrize("layer", [-1, -2])
def test_gradients_reach_every_trainable_parameter(tiny_model, tiny_processor, scene, conditioning, layer):
    model = tiny_model(region_conditioning=conditioning, vision_feature_layer=layer)
    found = gradients(model, training_batch(tiny_processor(model), scene))
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert set(found) == trainable
    # A bias of the keys shifts all scores of a query alike: its gradient is zero in exact arithmetic.
    still = {name for name, grad in found.items() if not grad.any() and not name.endswith("k_proj.bias")}
    assert not still
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    unused = ["post_layernorm"] + (["encoder.layers.1."] if layer == -2 else [])
    assert frozen == {name for name, _ in model.named_parameters() if any(part in name for part in unused)}


@pytest.mark.filterwarnings("ignore::FutureWarning")  # the method gets a new name in transformers 6
@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_gradient_checkpointing_changes_no_gradient(tiny_model, tiny_processor, scene, conditioning):
    model = tiny_model(region_conditioning=conditioning)
    batch = training_batch(tiny_processor(model), scene)
    plain = gradients(model, batch)
    runs = []
    hook = model.language_model.layers[0].self_attn.register_forward_pre_hook(lambda *_: runs.append(1))
    model.gradient_checkpointing_enable()
    checkpointed = gradients(model, batch)
    hook.remove()
    assert len(runs) == 2  # run again in the backward pass
    assert set(plain) == set(checkpointed)
    for name, grad in plain.items():
        torch.testing.assert_close(checkpointed[name], grad, atol=1e-6, rtol=1e-4)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # the method gets a new name in transformers 6
def test_generation_while_training_with_gradient_checkpointing(tiny_model, tiny_processor, scene):
    """Checkpointed layers take no cache; `generate` then goes without, with the same answers."""
    model = tiny_model()
    batch = region_batch(tiny_processor(model), scene)
    expected = model.generate(**batch, max_new_tokens=4, steps=4).sequences
    model.gradient_checkpointing_enable()
    model.train()
    assert torch.equal(model.generate(**batch, max_new_tokens=4, steps=4).sequences, expected)


def test_one_answer_can_be_learned(tiny_model, tiny_processor, scene):
    """A few steps on one scene lower its loss by more than half: signs and shapes of the loss are right end to end."""
    model = tiny_model()
    batch = training_batch(tiny_processor(model), scene)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=3e-3)
    losses = []
    for _ in range(15):
        loss = model(**batch, loss_weighting="masked").loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


# --- sizes --------------------------------------------------------------------------------------------------------


def parameters_8b() -> dict[str, int]:
    """The 8B preset's parameters by part, from its sizes."""
    c, f, d, h, vocabulary = 1152, 4304, 4096, 12288, 126464
    vision_layer = 4 * (c * c + c) + (c * f + f) + (f * c + c) + 2 * (2 * c)
    embeddings = (3 * 16 * 16 * c + c) + (512 // 16) ** 2 * c
    text_layer = 4 * d * d + 3 * d * h + 2 * d
    return {
        "vision_tower": embeddings + 27 * vision_layer + 2 * c,
        "projector": (4 * c * d + d) + (d * d + d),
        "region_replay": (4 * d + d) + 16 * d + (6 * d + d),
        "language_model": vocabulary * d + 32 * text_layer + d,
        "lm_head": vocabulary * d,
    }


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_parameters_of_the_8b_preset(conditioning):
    config = PerceptionDLMConfig.from_preset("8b", region_conditioning=conditioning)
    with torch.device("meta"):
        model = PerceptionDLMForConditionalGeneration(config)
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    expected = parameters_8b()
    if conditioning == "vision":
        expected |= {"region_replay": 0, "region_prompts": 6 * 1152}
    assert counts == expected
    assert model.num_parameters() == {"replay": 8_464_890_096, "vision": 8_464_782_320}[conditioning]
    assert model.dtype == torch.float32


def test_a_model_can_be_built_in_half_precision():
    with torch.device("meta"):
        model = PerceptionDLMForConditionalGeneration._from_config(
            PerceptionDLMConfig.from_preset("8b"), dtype=torch.bfloat16
        )
    assert model.dtype == torch.bfloat16
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_half_precision_runs_and_stays_close(tiny_model, tiny_processor, scene, conditioning):
    model = tiny_model(region_conditioning=conditioning)
    batch = region_batch(tiny_processor(model), scene)
    ids = torch.full((3, 4), model.config.mask_token_id)
    with torch.no_grad():
        exact = model(**batch, answer_ids=ids).logits
        rough = model.to(torch.bfloat16)(**batch, answer_ids=ids).logits
    assert rough.dtype == torch.bfloat16
    assert F.cosine_similarity(exact.flatten(), rough.float().flatten(), dim=0) > 0.98


def test_unknown_preset_is_refused():
    with pytest.raises(ValueError, match=r"'9b'.*8b"):
        PerceptionDLMConfig.from_preset("9b")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"attention_layout": "causal"}, "attention_layout.*causal"),
        ({"region_conditioning": "prompt"}, "region_conditioning.*prompt"),
        ({"vision_config": {"patch_size": 10}}, "64 px.*10 px"),
        ({"pixel_unshuffle": 3}, "pixel_unshuffle=3"),
        ({"vision_feature_layer": -4}, r"vision_feature_layer.*\[-3, -1\].*-4"),
        ({"vision_feature_layer": 0}, r"vision_feature_layer.*got 0"),
        ({"use_roi_replay": False}, "use_roi_replay"),
        (
            {"region_conditioning": "vision", "use_roi_replay": False, "use_region_prompts": False},
            "both False",
        ),
        ({"region_conditioning": "vision", "num_region_prompts": 17}, "roi_token_ids holds 16 ids, 17"),
        ({"roi_size": 0}, "roi_size.*0"),
        ({"num_region_prompts": 0}, "num_region_prompts.*0"),
        ({"roi_variant": "shifted"}, "roi_variant.*aligned.*released.*'shifted'"),
        ({"text_only": True}, "text_only=True.*none.*replay"),
    ],
)
def test_settings_that_do_not_fit_are_refused(tiny_model, overrides, message):
    with pytest.raises(ValueError, match=message):
        tiny_model(**overrides)


# --- mismatches ---------------------------------------------------------------------------------------------------


def without(batch, name):
    return {key: value for key, value in batch.items() if key != name}


def replaced_once(batch, name, old, new):
    """The batch with the first entry that is `old` set to `new`."""
    changed = batch[name].clone()
    changed.view(-1)[(changed == old).flatten().nonzero()[0]] = new
    return {**batch, name: changed}


@pytest.mark.parametrize(
    ("conditioning", "change", "message"),
    [
        ("replay", lambda b: {**b, "pixel_values": b["pixel_values"][..., :48]}, r"\(3, 3, 64, 48\).*64, 64"),
        ("replay", lambda b: {**b, "pixel_values": b["pixel_values"][:2]}, r"\b2\b.*\b3\b"),
        ("replay", lambda b: without(b, "region_coverage"), r"region_coverage.*\(3, 8, 8\).*missing"),
        ("replay", lambda b: {**b, "region_coverage": b["region_coverage"][:2]}, r"\(3, 8, 8\).*\(2, 8, 8\)"),
        ("replay", lambda b: {**b, "region_boxes": b["region_boxes"][:2]}, r"\b3\b.*\b2\b"),
        ("vision", lambda b: without(b, "prompt_coverage"), r"prompt_coverage.*\(3, 6, 8, 8\).*missing"),
        ("vision", lambda b: {**b, "prompt_coverage": b["prompt_coverage"][:, :4]}, r"\(3, 6, 8, 8\).*\(3, 4, 8, 8\)"),
    ],
)
def test_mismatched_inputs_are_named_with_both_sizes(tiny_model, tiny_processor, scene, conditioning, change, message):
    model = tiny_model(region_conditioning=conditioning)
    batch = change(dict(region_batch(tiny_processor(model), scene)))
    with pytest.raises(ValueError, match=message):
        model(**batch, answer_ids=torch.zeros(3, 4, dtype=torch.long))


def test_placeholders_and_features_are_counted(tiny_model, tiny_processor, scene):
    model = tiny_model()
    batch = dict(region_batch(tiny_processor(model), scene))
    ids = torch.zeros(3, 4, dtype=torch.long)
    one_image_token_less = replaced_once(batch, "input_ids", model.config.image_token_id, 5)
    with pytest.raises(ValueError, match=r"47 image tokens.*48 image features"):
        model(**one_image_token_less, answer_ids=ids)
    one_roi_token_less = replaced_once(batch, "token_roles", ROI, SHARED)
    with pytest.raises(ValueError, match=r"47 RoI tokens.*48 RoI features"):
        model(**one_roi_token_less, answer_ids=ids)


def test_regions_need_one_image_per_row(tiny_model, tiny_processor, scene):
    model = tiny_model()
    batch = dict(region_batch(tiny_processor(model), scene))
    batch["tile_grids"], batch["image_sizes"] = torch.ones(3, 2, dtype=torch.long), batch["image_sizes"].repeat(3, 1)
    with pytest.raises(ValueError, match="3 images for 1 rows"):
        model(**batch, answer_ids=torch.zeros(3, 4, dtype=torch.long))


@pytest.mark.parametrize("num_answers", [0, 2, 4])
def test_answers_that_do_not_fit_the_regions_are_refused(tiny_model, tiny_processor, scene, num_answers):
    model = tiny_model()
    with pytest.raises(ValueError, match=f"{num_answers} answers do not fit 3 regions"):
        model(**region_batch(tiny_processor(model), scene), answer_ids=torch.zeros(num_answers, 4, dtype=torch.long))


def test_forward_needs_answers_or_labels(tiny_model, tiny_processor, scene):
    model = tiny_model()
    batch = region_batch(tiny_processor(model), scene)
    ids = torch.zeros(3, 4, dtype=torch.long)
    for given in ({}, {"answer_ids": ids, "labels": ids}):
        with pytest.raises(ValueError, match=r"answer_ids.*labels"):
            model(**batch, **given)


def test_sequences_longer_than_the_model_are_refused(tiny_model, tiny_processor, scene):
    model = tiny_model(text_config={"max_position_embeddings": 100})
    with pytest.raises(ValueError, match=r"needs \d+ positions, the model has 100"):
        model.generate(**region_batch(tiny_processor(model), scene))


def test_scattering_counts_places_and_features():
    embeds, places = torch.zeros(1, 4, 2), torch.tensor([[False, True, False, True]])
    filled = scatter_features(embeds, places, torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "image")
    assert filled.tolist() == [[[0, 0], [1, 2], [0, 0], [3, 4]]]
    assert not embeds.any()
    with pytest.raises(ValueError, match=r"2 image tokens.*3 image features"):
        scatter_features(embeds, places, torch.ones(3, 2), "image")


# --- saving, loading, attention kernels ---------------------------------------------------------------------------


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_a_saved_model_comes_back_the_same(tiny_model, tiny_processor, scene, tmp_path, conditioning):
    model = tiny_model(region_conditioning=conditioning, attention_layout="released", vision_feature_layer=-1)
    model.generation_config.steps, model.generation_config.suppress_tokens = 5, [3, 4]
    model.save_pretrained(tmp_path)
    loaded = PerceptionDLMForConditionalGeneration.from_pretrained(tmp_path)
    for part in ("", "vision_config", "text_config"):
        read, wrote = (getattr(c, part) if part else c for c in (loaded.config, model.config))
        fields = {k: v for k, v in wrote.to_dict().items() if k not in UNSAVED and not isinstance(v, dict)}
        assert {name: read.to_dict()[name] for name in fields} == fields
    assert (loaded.generation_config.steps, loaded.generation_config.suppress_tokens) == (5, [3, 4])
    assert set(loaded.state_dict()) == set(model.state_dict())
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name
    batch = region_batch(tiny_processor(model), scene)
    ids = torch.full((3, 4), model.config.mask_token_id)
    with torch.no_grad():
        assert torch.equal(model(**batch, answer_ids=ids).logits, loaded.eval()(**batch, answer_ids=ids).logits)


def test_a_model_can_be_loaded_in_half_precision(tiny_model, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    loaded = PerceptionDLMForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"text_config": {"num_hidden_layers": 3}}, "missing keys, such as language_model.layers.2"),
        ({"text_config": {"num_hidden_layers": 1}}, "unexpected keys, such as language_model.layers.1"),
        ({"text_config": {"vocab_size": 700}}, "mismatched keys"),
        ({"region_conditioning": "vision"}, "region_prompts.weight.*unexpected keys, such as region_replay"),
    ],
)
def test_weights_that_do_not_belong_to_the_config_are_refused(tiny_model, tmp_path, changes, kind):
    tiny_model().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    saved = json.loads(path.read_text())
    for name, value in changes.items():
        saved[name] = {**saved[name], **value} if isinstance(value, dict) else value
    path.write_text(json.dumps(saved))
    with pytest.raises(ValueError, match=f"disagree: .*{kind}"):
        PerceptionDLMForConditionalGeneration.from_pretrained(tmp_path)
    loaded = PerceptionDLMForConditionalGeneration.from_pretrained(tmp_path, ignore_mismatched_sizes=True)
    assert loaded.config.text_config.vocab_size == saved["text_config"]["vocab_size"]


@pytest.mark.parametrize("layout", ["isolated", "released"])
def test_eager_and_sdpa_attention_agree(tiny_model, tiny_processor, scene, layout):
    models = {
        name: tiny_model(attn_implementation=name, attention_layout=layout, seed=random.Random(layout).randrange(99))
        for name in ("sdpa", "eager")
    }
    processor = tiny_processor(models["sdpa"])
    rows = processor.region_rows(scene.image, None, "masks", [item.mask for item in scene.objects])
    batch = processor.collate(rows + processor.text_rows(scene.image, "How many?"))  # padding and missing blocks too
    ids = torch.randint(0, 500, (4, 6), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = {name: model(**batch, answer_ids=ids).logits for name, model in models.items()}
        cached = [model.generate(**batch, max_new_tokens=6, steps=6).sequences for model in models.values()]
    assert models["eager"].language_model.config._attn_implementation == "eager"
    torch.testing.assert_close(logits["eager"], logits["sdpa"], atol=1e-4, rtol=0)
    assert torch.equal(*cached)


def test_flex_attention_is_refused(tiny_model, tmp_path):
    with pytest.raises(ValueError, match=r"does not support .*flex"):
        tiny_model(attn_implementation="flex_attention")
    model = tiny_model()
    with pytest.raises(ValueError, match=r"does not support .*flex"):
        model.set_attn_implementation("flex_attention")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"does not support .*flex"):
        PerceptionDLMForConditionalGeneration.from_pretrained(tmp_path, attn_implementation="flex_attention")


def test_embeddings_can_be_tied(tiny_model, tmp_path):
    model = tiny_model(tie_word_embeddings=True)
    assert model.lm_head.weight is model.language_model.embed_tokens.weight
    assert tiny_model().lm_head.weight is not tiny_model().language_model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    loaded = PerceptionDLMForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.language_model.embed_tokens.weight
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


def test_embeddings_can_be_replaced_and_resized(tiny_model, tiny_processor, scene):
    model = tiny_model()
    vocabulary = model.config.text_config.vocab_size
    batch = region_batch(tiny_processor(model), scene)
    ids = torch.full((3, 4), model.config.mask_token_id)
    with torch.no_grad():
        before = model(**batch, answer_ids=ids).logits
        model.resize_token_embeddings(vocabulary + 8)
        after = model(**batch, answer_ids=ids).logits
    assert model.get_input_embeddings() is model.language_model.embed_tokens
    assert after.shape[-1] == model.config.text_config.vocab_size == vocabulary + 8
    torch.testing.assert_close(after[..., :vocabulary], before)


def test_the_token_that_fills_answers_has_an_embedding_that_learns(tiny_model, tiny_processor, scene):
    model = tiny_model()
    inputs = tiny_processor(model)(images=scene.image, masks=[item.mask for item in scene.objects])
    fill = model.config.end_of_text_token_id
    labels = torch.full((len(scene.objects), 4), fill)
    noise = torch.tensor([0.0, 1.0, 1.0, 1.0]).expand(labels.shape)
    model(
        **inputs, labels=labels, mask_probability=torch.full((len(labels), 1), 0.5), answer_noise=noise
    ).loss.backward()
    embedding = model.get_input_embeddings().weight
    assert embedding[fill].abs().sum() > 0
    assert embedding.grad[fill].abs().sum() > 0
