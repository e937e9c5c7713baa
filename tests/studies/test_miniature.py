"""The five stages in miniature, from a tiny model in a few steps; and the scoring of whole-image questions."""

import json

import pytest
import torch

from perceptiondlm.checkpoints.folder import export
from perceptiondlm.drawn.object_sets import KINDS, cut, drawn_objects, object_turns, write_set
from perceptiondlm.drawn.scenes import draw_scene, scene_conversation
from perceptiondlm.evaluation.drawn_conversations import SCENE_KINDS, evaluate_conversations
from perceptiondlm.studies import miniature
from perceptiondlm.studies.miniature import STAGES, Miniature, table
from perceptiondlm.training.data.data_config import DataConfig, LossConfig, SourceConfig
from perceptiondlm.training.data.mixture import build_dataset


@pytest.fixture
def tiny_start(tiny_model, tiny_processor, tmp_path):
    """A saved tiny region model that lends its parts."""
    model = tiny_model()
    export(model, tiny_processor(model, max_tiles=1), tmp_path / "start", torch.float32)
    return tmp_path / "start"


def test_stages_run_one_after_another_and_are_scored(tiny_start, tmp_path, monkeypatch):
    small = miniature.load_run_config
    settings = ["data.sources.0.samples=4", "trainer.bf16=false", "trainer.dataloader_num_workers=0"]
    settings += ["trainer.per_device_train_batch_size=2", "trainer.disable_tqdm=true"]
    monkeypatch.setattr(miniature, "load_run_config", lambda path, overrides: small(path, [*overrides, *settings]))
    whole = Miniature(tmp_path / "all", str(tiny_start), share=0.0005, images=1)
    results = whole.run()
    assert list(results) == list(STAGES)
    for name, stage in STAGES.items():
        log = json.loads((tmp_path / "all" / name / "final" / "training_log.json").read_text())
        begin = str(tiny_start) if stage.after is None else f"{tmp_path}/all/{stage.after}/final"
        assert log["config"]["init_from"] == begin
        assert results[name]["steps"] == 1
    assert set(results["stage4_refinement"]["per_kind"]) == set(KINDS)
    assert "average" in results["regions"]
    assert len(table(results).splitlines()) == 5 + len(results)
    monkeypatch.setattr(miniature, "train", lambda run: pytest.fail("a finished stage was run again"))
    assert whole.run() == results


def test_answers_are_right_only_when_they_are_the_reference(tiny_model, tiny_processor, monkeypatch):
    model = tiny_model(region_conditioning="none")
    processor = tiny_processor(model)
    references = [answer for _, answer in scene_conversation(draw_scene(7, 0))]
    said = [*references[:2], *(f"{answer} or not" for answer in references[2:])]
    monkeypatch.setattr(type(processor), "post_process_image_text_to_text", lambda self, output: said)
    report = evaluate_conversations(
        model, processor, "scene_conversations", seed=7, num_images=1, steps=1, max_new_tokens=1
    )
    assert report["num_questions"] == len(references)
    assert report["exact"] == pytest.approx(100 * 2 / len(references))
    assert report["per_kind"]["list"] == 0
    assert report["per_kind"]["count"] == 100
    assert set(report["per_kind"]) <= set(SCENE_KINDS.values())


def test_questions_about_objects_follow_what_is_drawn(tmp_path):
    parts = set()
    for scene, item in drawn_objects(seed=3, count=40):
        turns = object_turns(item)
        assert set(turns) == set(KINDS)
        assert turns["name"][1] == f"{item.color} {item.category}"
        detail = turns["detail"][1].split(" with ")
        assert detail[0] == f"{item.pattern} {item.color} {item.category}"
        assert detail[1:] == [f"{part.color} {part.name}" for part in item.visible_parts[:1]]
        asked = turns["part"][0].removesuffix("?").split()[-1]
        assert turns["part"][1] == ("yes" if asked in [part.name for part in item.parts] else "no")
        parts.add(turns["part"][1])
        x0, y0, x1, y1 = item.box
        picture = cut(scene, item)
        assert picture.width >= x1 - x0
        assert picture.height >= y1 - y0
    assert parts == {"yes", "no"}


def test_sets_of_objects_are_read_as_published_ones_are(tiny_model, tiny_processor, tmp_path):
    write_set(tmp_path / "set", seed=3, rows=7, kinds=("name", "color"))
    model = tiny_model(region_conditioning="none")
    data = DataConfig([SourceConfig("conversations", path=str(tmp_path / "set"))])
    dataset = build_dataset(data, LossConfig(), tiny_processor(model), model.config, tmp_path)
    items = [object_turns(item) for _, item in drawn_objects(3, 7)]
    expected = [items[i]["name" if i % 2 == 0 else "color"][1] for i in range(7)]
    assert [dataset[i]["answer"] for i in range(7)] == expected
    write_set(tmp_path / "words", seed=3, rows=7, kinds=("name", "color"), pictures=False)
    data = DataConfig([SourceConfig("conversations", path=str(tmp_path / "words"))])
    told = build_dataset(data, LossConfig(), tiny_processor(model), model.config, tmp_path)
    for i, (_, item) in enumerate(drawn_objects(3, 7)):
        assert told[i]["images"] == []
        assert told[i]["answer"] == expected[i]
        assert all(f"{part.color} {part.name}" in told[i]["prompt"] for part in item.visible_parts)
        assert f"{item.pattern} {item.color} {item.category}" in told[i]["prompt"]
    with pytest.raises(ValueError, match="unknown kinds of questions"):
        write_set(tmp_path / "other", seed=3, rows=1, kinds=("smell",))
