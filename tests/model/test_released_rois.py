"""RoIs as the published weights read them."""

import numpy as np
import pytest
import torch
from model_batches import region_tensors, training_batch
from model_passes import embed
from PIL import Image

from perceptiondlm.configuration_perceptiondlm import FORMER_ROI_FIELDS, ROI_VARIANTS, PerceptionDLMConfig
from perceptiondlm.inputs_perceptiondlm import PromptInputs


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
            return model.replay_regions(inputs, [tiles], training)[0]

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
