"""A frozen tower's features are computed once, survive a kill, and are thinned in training alone."""

import copy

import pytest
import torch

from perceptiondlm.training.tower_features import FeatureStore, FrozenTower, fingerprint, reuse_features


@pytest.fixture
def frozen(tiny_model):
    model = tiny_model()
    model.vision_tower.requires_grad_(False)
    return model


@pytest.fixture
def tiles(frozen):
    side = frozen.config.vision_config.image_size
    return torch.rand(3, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


def counted(tower):
    """The tower, and a list that grows by the tiles of every pass through it."""
    passes, compute = [], tower.forward

    def forward(pixels, *args):
        passes.append(len(pixels))
        return compute(pixels, *args)

    tower.forward = forward
    return passes


def test_a_tile_is_encoded_once_in_all_runs(frozen, tiles, tmp_path):
    expected = frozen.vision_tower(tiles, -1).half().float()
    passes = counted(frozen.vision_tower)
    first = FrozenTower(frozen.vision_tower, tmp_path, 2**30, 0.0)
    assert torch.equal(first(tiles[:2], -1), expected[:2])
    assert torch.equal(first(tiles[[1, 2, 2, 0]], -1), expected[[1, 2, 2, 0]])
    again = FrozenTower(frozen.vision_tower, tmp_path, 2**30, 0.0)
    again.compute = first.compute
    assert torch.equal(again(tiles, -1), expected)
    assert passes == [2, 1]


def test_what_a_kill_leaves_half_written_is_computed_again(frozen, tiles, tmp_path):
    tower = FrozenTower(frozen.vision_tower, tmp_path, 2**30, 0.0)
    expected = tower(tiles, -1)
    path = next(tmp_path.rglob("*.features"))
    path.write_bytes(path.read_bytes()[:-5])
    passes = counted(frozen.vision_tower)
    assert torch.equal(FrozenTower(frozen.vision_tower, tmp_path, 2**30, 0.0)(tiles, -1), expected)
    assert passes == [1]
    assert torch.equal(FrozenTower(frozen.vision_tower, tmp_path, 2**30, 0.0)(tiles, -1), expected)
    assert passes == [1]


def test_a_full_store_takes_no_more(tmp_path):
    store = FeatureStore(tmp_path / "store", (4, 2), limit=2 * 16)
    for number in range(3):
        store.put(bytes([number]) * 16, torch.full((4, 2), float(number), dtype=torch.float16))
    assert store.get(bytes([1]) * 16).unique().tolist() == [1.0]
    assert store.get(bytes([2]) * 16) is None
    assert (tmp_path / "store.features").stat().st_size == 2 * 16


def test_other_weights_have_other_features(frozen):
    other = copy.deepcopy(frozen.vision_tower)
    next(other.parameters()).data.add_(1e-3)
    assert fingerprint(other) != fingerprint(frozen.vision_tower)


def test_channels_are_dropped_while_training_only(frozen, tiles):
    expected = frozen.vision_tower(tiles, -1)
    reuse_features(frozen, None, 1.0, 0.5)
    assert torch.equal(frozen.eval().vision_tower(tiles, -1), expected)
    thinned = frozen.train().vision_tower(tiles, -1)
    dropped_TC = (thinned == 0).all(dim=1)
    assert 0.3 < dropped_TC.float().mean() < 0.7
    torch.testing.assert_close(thinned, torch.where(dropped_TC[:, None], 0.0, 2 * expected))
    assert "vision_tower.forward" not in frozen.state_dict()


def test_a_tower_that_trains_is_refused(tiny_model, tmp_path):
    with pytest.raises(ValueError, match="take 'vision_tower' out of"):
        reuse_features(tiny_model(), str(tmp_path), 1.0, 0.0)
    seeing = tiny_model(region_conditioning="vision")
    seeing.vision_tower.requires_grad_(False)
    with pytest.raises(ValueError, match="depend on the regions"):
        reuse_features(seeing, str(tmp_path), 1.0, 0.0)
