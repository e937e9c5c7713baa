"""Fixtures of the model's tests."""

import pytest
from model_batches import region_batch

from perceptiondlm.drawn.scenes import draw_scene


@pytest.fixture(scope="module")
def replay(tiny_model):
    """The default model."""
    return tiny_model()


@pytest.fixture(scope="module")
def batch(replay, tiny_processor, scene):
    """Three regions of one image for the default model."""
    return region_batch(tiny_processor(replay), scene)


@pytest.fixture(scope="module")
def pictures():
    """Scenes that differ in tiles and in the number of regions (at most six)."""
    chosen = {}
    for index in range(60):
        candidate = draw_scene(0, index)
        width, height = candidate.image.size
        if len(candidate.objects) <= 6:
            chosen.setdefault((round(width / height), len(candidate.objects)), candidate)
    return sorted(chosen.values(), key=lambda s: (len(s.objects), s.index))[:6:2]
