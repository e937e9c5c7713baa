"""Features of the vision tower, and region prompts within it."""

import numpy as np
import pytest
import torch
from model_batches import (
    region_batch,
)
from PIL import Image
from transformers import SiglipVisionModel


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
