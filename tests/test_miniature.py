"""The five stages in miniature, from a tiny model in a few steps; and the scoring of whole-image questions."""

import json

import pytest
import torch

from perceptiondlm.evaluation.conversations import KINDS, evaluate_conversations, question_kind
from perceptiondlm.training import miniature
from perceptiondlm.training.checkpoint import export
from perceptiondlm.training.data_config import DataConfig, LossConfig, SourceConfig
from perceptiondlm.training.miniature import STAGES, Miniature, table
from perceptiondlm.training.mixture import build_dataset
from perceptiondlm.training.scenes import draw_scene, scene_conversation


@pytest.fixture
def tiny_start(tiny_model, tiny_processor, tmp_path):
    """A saved tiny region model that lends its parts."""
    model = tiny_model()
    export(model, tiny_processor(model, max_tiles=1), tmp_path / "start", torch.float32)
    return tmp_path / "start"


def test_stages_run_one_after_another_and_are_scored(tiny_start, tmp_path, monkeypatch):
    small = miniature.load_run_config
    settings = ["data.sources.0.samples=8", "trainer.bf16=false", "trainer.dataloader_num_workers=0"]
    settings += ["trainer.per_device_train_batch_size=2", "trainer.disable_tqdm=true"]
    monkeypatch.setattr(miniature, "load_run_config", lambda path, overrides: small(path, [*overrides, *settings]))
    whole = Miniature(tmp_path / "all", str(tiny_start), share=0.001, images=1)
    results = whole.run()
    assert list(results) == ["lent_parts", *STAGES]
    for name, stage in STAGES.items():
        log = json.loads((tmp_path / "all" / name / "final" / "training_log.json").read_text())
        begin = str(tiny_start) if stage.after is None else f"{tmp_path}/all/{stage.after}/final"
        assert log["config"]["init_from"] == begin
        assert results[name]["steps"] == 1
    assert set(results["stage4_refinement"]["per_kind"]) <= set(KINDS.values())
    assert "average" in results["regions"]
    assert len(table(results).splitlines()) == 2 + len(results)
    monkeypatch.setattr(miniature, "train", lambda run: pytest.fail("a finished stage was run again"))
    assert whole.run() == results


def test_every_question_of_a_scene_has_a_kind():
    kinds = [question_kind(question) for index in range(5) for question, _ in scene_conversation(draw_scene(0, index))]
    assert set(kinds) == set(KINDS.values())


def test_answers_are_right_only_when_they_are_the_reference(tiny_model, tiny_processor, monkeypatch):
    model = tiny_model(region_conditioning="none")
    processor = tiny_processor(model)
    references = [answer for _, answer in scene_conversation(draw_scene(7, 0))]
    said = [*references[:2], *(f"{answer} or not" for answer in references[2:])]
    monkeypatch.setattr(type(processor), "post_process_image_text_to_text", lambda self, output: said)
    report = evaluate_conversations(model, processor, seed=7, num_images=1, steps=1, max_new_tokens=1)
    assert report["num_questions"] == len(references)
    assert report["exact"] == pytest.approx(100 * 2 / len(references))
    assert report["per_kind"]["list"] == 0
    assert report["per_kind"]["count"] == 100


def test_a_source_can_ask_for_lists_alone(tiny_model, tiny_processor, tmp_path):
    model = tiny_model(region_conditioning="none")
    source = SourceConfig("scene_conversations", samples=6, questions="list")
    dataset = build_dataset(DataConfig([source]), LossConfig(), tiny_processor(model), model.config, tmp_path)
    assert {dataset[index]["prompt"] for index in range(6)} == {"List the objects in the image."}
    with pytest.raises(ValueError, match=r"sources.questions must be one of \('all', 'list'\), got 'some'"):
        SourceConfig("scene_conversations", samples=6, questions="some")
