"""Mixtures, the order of batches for any number of processes, noise, the collator, and equation 2 spelled out."""

import hashlib
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from perceptiondlm.drawn.scenes import draw_scene
from perceptiondlm.training.config import load_run_config
from perceptiondlm.training.data.batches import LengthGroupedBatches, grouped_order, padding_report, padding_share
from perceptiondlm.training.data.collator import AnswerCollator
from perceptiondlm.training.data.data_config import DataConfig, LossConfig, SourceConfig
from perceptiondlm.training.data.mixture import build_dataset
from perceptiondlm.training.data.noise import probability, stratified_noise
from perceptiondlm.training.train import trainer_arguments


ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "training" / "configs" / "scenes.yaml"


@pytest.fixture
def build(tiny_model, tiny_processor, tmp_path):
    """Factory `build(sources, loss settings, data settings)` of dataset and collator of a region model."""

    def make(sources: list[dict], loss: dict | None = None, **settings):
        model = tiny_model()
        processor = tiny_processor(model)
        data = DataConfig([SourceConfig(**source) for source in sources], **settings)
        loss = LossConfig(**(loss or {}))
        dataset = build_dataset(data, loss, processor, model.config, tmp_path / "cache")
        return dataset, AnswerCollator.build(data, loss, processor, model.config)

    return make


class Lengths:
    """What the sampler needs of a dataset."""

    def __init__(self, lengths):
        self.lengths, self.epoch = lengths, 0

    def __len__(self):
        return len(self.lengths)

    def set_epoch(self, epoch):
        self.epoch = epoch


def random_lengths(count: int) -> list[int]:
    return torch.randint(50, 1000, (count,), generator=torch.Generator().manual_seed(0)).tolist()


# --- settings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "pictures"}, "sources.kind must be one of"),
        ({"kind": "regions"}, "needs path, got neither"),
        ({"kind": "regions", "hub": "a/b"}, "needs path, got hub"),
        ({"kind": "conversations"}, "needs path or hub"),
        ({"kind": "conversations", "path": "x", "hub": "a/b"}, "got path and hub"),
        ({"kind": "scenes", "samples": 2, "path": "x"}, "neither path nor hub"),
        ({"kind": "scenes"}, "no end: set sources.samples"),
        ({"kind": "conversations", "hub": "a/b", "streaming": True, "turns": "all"}, "a row of a stream is one sample"),
        ({"kind": "regions", "path": "x", "samples": 1, "streaming": True}, "streaming is for"),
        ({"kind": "regions", "path": "x", "samples": 0}, "at least 1"),
        ({"kind": "conversations", "path": "x", "turns": "last"}, "sources.turns must be one of"),
    ],
)
def test_wrong_sources_are_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        SourceConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weighting": "mean"}, "loss.weighting must be one of"),
        ({"noise_copies": 3}, "loss.noise_copies must be one of"),
        ({"num_slots": 32, "max_slots": 40}, "multiple of num_slots=32, got 40"),
        ({"noise_level": "batch"}, "loss.noise_level"),
    ],
)
def test_wrong_loss_settings_are_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        LossConfig(**settings)


def test_sources_stream_all_or_none():
    stream = SourceConfig("conversations", hub="a/b", streaming=True, samples=3)
    with pytest.raises(ValueError, match=r"all data\.sources stream or none"):
        DataConfig([stream, SourceConfig("scenes", samples=3)])


@pytest.mark.parametrize("name", ["dataloader_persistent_workers", "dataloader_drop_last"])
def test_trainer_settings_that_break_the_order_are_refused(name):
    with pytest.raises(ValueError, match=name):
        trainer_arguments(load_run_config(RECIPE, [f"trainer.{name}=true"]))


# --- the recipe of the embedded model -----------------------------------------------------------------------------


def test_the_embedded_recipe_still_makes_the_batches_it_was_trained_on(tiny_model, tiny_processor, tmp_path):
    """Order, regions, labels and noise of a coarse and a full epoch, recorded when the weights were made."""
    run = load_run_config(RECIPE, ["data.sources.0.samples=48"])
    model = tiny_model(vision_config={"image_size": 256, "patch_size": 16})
    processor = tiny_processor(model, **run.processor)
    dataset = build_dataset(run.data, run.loss, processor, model.config, tmp_path)
    collator = AnswerCollator.build(run.data, run.loss, processor, model.config)
    order = LengthGroupedBatches(dataset, 4, seed=0, pool=4)
    digest = hashlib.sha256()
    for epoch in (1, 2):
        order.set_epoch(epoch)
        indices = list(order)
        digest.update(np.array(indices).tobytes())
        batch = collator([dataset[index] for index in indices[:8]])
        for name in ("input_ids", "labels", "region_boxes", "mask_probability", "answer_masked"):
            digest.update(batch[name].numpy().tobytes())
    assert digest.hexdigest()[:16] == "7e7cc3ffa3a98621"  # without pixels, which releases of Pillow round differently


# --- mixtures -----------------------------------------------------------------------------------------------------


def test_counts_take_a_fixed_subset_or_repeat(tmp_path, build):
    path = tmp_path / "set.jsonl"
    record = {"image": "a.png", "mask_rles": {"size": [8, 8], "counts": [0, 64]}, "captions": ["a red cat"]}
    path.write_text("\n".join([json.dumps(record)] * 10))
    draw_scene(0, 0).image.resize((8, 8)).save(tmp_path / "a.png")

    def records(samples=None, seed=0):
        dataset, _ = build([{"kind": "regions", "path": str(path), "samples": samples}], seed=seed)
        return [dataset.locate(index)[1:3] for index in range(len(dataset))]

    assert records() == [(i, 0) for i in range(10)]
    assert len(set(records(4))) == 4
    assert records(4) == records(4) != records(4, seed=1)
    assert len(set(records(25))) == 25
    assert sorted(Counter(record for record, _ in records(25)).values()) == [2] * 5 + [3] * 5


def test_a_mixture_holds_every_sample_of_every_source(build):
    scenes = {"kind": "scenes", "samples": 5, "seed": 3}
    questions = {"kind": "scene_conversations", "samples": 4, "seed": 4}
    dataset, collator = build([scenes, questions])
    samples = [dataset[i] for i in range(9)]
    captions = [sample["captions"] for sample in samples[:5]]
    assert captions == [[item.caption for item in draw_scene(3, i).objects] for i in range(5)]
    assert [sample["images"][0].size for sample in samples[5:]] == [draw_scene(4, i).image.size for i in range(4)]
    assert len({sample["noise_seed"] for sample in samples}) == 9
    assert [entry["samples"] for entry in dataset.report] == [5, 4]
    assert collator(samples)["num_regions"].tolist() == [*map(len, captions), 0, 0, 0, 0]


def test_repeats_of_a_record_have_noise_of_their_own(build, tmp_path):
    path = tmp_path / "set.jsonl"
    record = {"image": "a.png", "mask_rles": {"size": [8, 8], "counts": [0, 64]}, "captions": ["a red cat"]}
    path.write_text(json.dumps(record))
    draw_scene(0, 0).image.resize((8, 8)).save(tmp_path / "a.png")
    dataset, collator = build([{"kind": "regions", "path": str(path), "samples": 3}])
    noise = collator([dataset[i] for i in range(3)])["answer_masked"]
    assert len(noise) == 6
    assert len({tuple(row) for row in noise[::2].tolist()}) == 3


def test_a_survey_is_made_once_and_made_anew_for_other_settings(build, tmp_path):
    sources = [{"kind": "scenes", "samples": 4}]
    first, _ = build(sources)
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.*")}
    again, _ = build(sources)
    assert list(again.lengths) == list(first.lengths)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.*")} == files
    other, _ = build(sources, {"num_slots": 16})
    assert list(other.lengths) != list(first.lengths)


# --- order --------------------------------------------------------------------------------------------------------


def test_length_grouping_wastes_less_and_loses_nothing():
    dataset = Lengths(random_lengths(103))
    order = LengthGroupedBatches(dataset, batch_size=4, seed=0)
    report = padding_report(dataset, batch_size=4, seed=0)
    indices = list(order)
    assert sorted(indices) == list(range(103))
    assert report["padding_share_grouped"] < 0.3 * report["padding_share_shuffled"]
    assert indices == list(order)
    order.set_epoch(1)
    assert indices != list(order)


def test_padding_share_is_what_padding_takes():
    assert padding_share([4, 2, 3, 3], np.arange(4), 2) == pytest.approx(2 / 14)
    assert padding_share([4, 2, 3], np.arange(3), 2) == pytest.approx(2 / 11)
    assert padding_share([5, 5], np.arange(2), 2) == 0


@pytest.mark.parametrize("count", [1, 7, 16, 103])
@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_share_the_batches_of_one(count, world_size):
    """Any number of processes sees the same batches; what fills the last ones is marked as nothing to learn."""
    dataset = Lengths(random_lengths(count))
    alone = list(LengthGroupedBatches(dataset, 4, seed=0))
    shared = LengthGroupedBatches(dataset, 4, seed=0, world_size=world_size)
    indices = list(shared)
    assert len(indices) == len(shared)
    assert len(indices) % (4 * world_size) == 0
    assert indices[:count] == alone
    assert all(index < 0 and 0 <= ~index < count for index in indices[count:])
    assert len(indices) - count < 4 * world_size


def test_two_real_processes_lose_and_repeat_nothing(tmp_path):
    """23 samples in batches of 4 on two processes, three epochs, the last one resumed in the middle."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command = [*launch, str(ROOT / "tests" / "training" / "deal_samples.py"), str(tmp_path)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert finished.returncode == 0, finished.stderr[-2000:]
    (world, first), (_, second) = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert world == 2
    dataset = Lengths([1 + i % 10 for i in range(23)])
    for epoch in range(3):
        dataset.set_epoch(epoch)
        alone = list(LengthGroupedBatches(dataset, 4, seed=0, pool=2))
        batches = [batch for pair in zip(first[epoch], second[epoch], strict=True) for batch in pair]
        assert {e for batch in batches for e, _ in batch} == {epoch}
        seen = [index for batch in batches for _, index in batch if index >= 0]
        assert seen == (alone if epoch < 2 else alone[16:])  # two batches of 4 on each of two processes were skipped
    assert [len(part) for part in first] == [3, 3, 1]


def test_fillers_teach_nothing(build, tiny_model):
    """They add no loss, no items and no gradient, but run like any batch."""
    dataset, collator = build([{"kind": "scenes", "samples": 3}])
    model = tiny_model()
    real, filled = collator([dataset[0], dataset[1]]), collator([dataset[0], dataset[1], dataset[~2]])
    loss, with_filler = model(**real).loss, model(**filled).loss
    torch.testing.assert_close(loss, with_filler)
    idle = model(**collator([dataset[~0]])).loss
    idle.backward()
    assert idle == 0
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)


# --- noise and collator -------------------------------------------------------------------------------------------


def test_noise_depends_on_the_sample_and_epoch_only():
    first, again, other = (stratified_noise(3, 8, 2, seed) for seed in ("0/1/5", "0/1/5", "1/1/5"))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[1], other[1])


def test_t_may_be_drawn_once_per_sample():
    draws = [stratified_noise(4, 8, 1, f"{i}", level="sample")[0] for i in range(400)]
    assert all((p == p[0]).all() for p in draws)
    levels = torch.cat([p[:1] for p in draws]).flatten()
    assert torch.histc(levels, 4, 0, 1).min() > 70  # uniform
    p, _ = stratified_noise(4, 8, 2, "0", level="sample")
    assert torch.equal(p[1::2], 1 - p[::2])


def test_collator_is_deterministic_and_mixes_captions_with_questions(build):
    dataset, collator = build([{"kind": "scenes", "samples": 12, "conversation_share": 0.5}])
    samples = [dataset[index] for index in range(6)]
    batch, again = collator(samples), collator([dataset[index] for index in range(6)])
    answers = sum(len(sample.get("captions", ["one answer"])) for sample in samples)
    assert {"captions" in sample for sample in samples} == {True, False}
    assert batch["labels"].shape == (2 * answers, 32)
    assert all(torch.equal(batch[name], again[name]) for name in batch)


def test_coarse_epochs_train_the_first_slots_on_single_tiles(build):
    dataset, collator = build([{"kind": "scenes", "samples": 4}], coarse_epochs=1, coarse_slots=6)
    coarse = collator([dataset[i] for i in range(4)])
    dataset.set_epoch(1)
    whole = collator([dataset[i] for i in range(4)])
    assert coarse["labels"].shape[1] == 6
    assert len(coarse["pixel_values"]) == 4 < len(whole["pixel_values"])
    assert torch.equal(coarse["labels"], whole["labels"][:, :6])


# --- equation 2 ---------------------------------------------------------------------------------------------------


def test_loss_is_equation_2_spelled_out(build, tiny_model):
    """One answer at a time, one token at a time: -1/p log p(x0 | xt, image, region), over all supervised tokens."""
    dataset, collator = build([{"kind": "scenes", "samples": 2}], {"num_slots": 8, "max_slots": 32})
    model = tiny_model()
    samples = [dataset[0], dataset[1]]
    batch = collator(samples)
    with torch.no_grad():
        loss = model(**batch, loss_weighting="elbo").loss.item()
        total, tokens, row = 0.0, 0, 0
        for sample in samples:
            for mask in sample["masks"]:
                prompt = collator.processor(images=sample["image"], masks=[mask])
                for _ in range(2):  # antithetic copies
                    clean = [int(token) for token in batch["labels"][row] if token != -100]
                    p = float(probability(batch["mask_probability"])[row])
                    hidden = batch["answer_masked"][row].tolist()[: len(clean)]
                    noised = [model.config.mask_token_id if h else x for h, x in zip(hidden, clean, strict=True)]
                    scores = model(**prompt, answer_ids=torch.tensor([noised])).logits[0].double()
                    for i, token in enumerate(clean):
                        if hidden[i]:
                            total -= float(scores[i, token] - scores[i].logsumexp(0)) / p
                    tokens += len(clean)
                    row += 1
    assert row == len(batch["labels"])
    assert loss == pytest.approx(total / tokens, rel=1e-5)


def test_grouping_off_is_a_plain_shuffle():
    order = grouped_order(random_lengths(40), 4, 1, 0)
    assert sorted(order) == list(range(40)) != list(order)
    report = padding_report(Lengths(random_lengths(400)), 4, 0, pool=1)
    assert report["padding_share_grouped"] == report["padding_share_shuffled"]
