"""A folder of pictures and a segmenter as a source of the data engine."""

import pytest

from perceptiondlm.data_engine.sources.files import FolderSource
from perceptiondlm.drawn.scenes import draw_scene


def test_a_segmenter_finds_the_regions_of_a_folder(tmp_path):
    pytest.importorskip("skimage", reason="needs scikit-image: pip install -e '.[segment]'")
    scene = draw_scene(3, 1)
    scene.image.save(tmp_path / "one.png")
    source = FolderSource(folder=str(tmp_path), segmenter="classical")
    source.check()
    (key,) = source.keys()
    record = source.read(key)
    assert (record.width, record.height) == scene.image.size
    assert len(record.regions) > 1
    assert all(region.area == region.pixels().sum() for region in record.regions)
    with pytest.raises(ValueError, match="name one"):
        FolderSource(folder=str(tmp_path)).check()
