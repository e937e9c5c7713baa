"""Conversation sets: every published shape of a row, answers found by the template, limits, bad rows."""

import json
import random
import re
from io import BytesIO

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from transformers.utils.chat_template_utils import render_jinja_template

from perceptiondlm.checkpoints.layouts import BASE_CHAT_TEMPLATE, LLADA_CHAT_TEMPLATE
from perceptiondlm.processing_perceptiondlm import CHAT_TEMPLATE
from perceptiondlm.training.data.collator import AnswerCollator
from perceptiondlm.training.data.conversations import split_turns
from perceptiondlm.training.data.data_config import DataConfig, LossConfig, SourceConfig
from perceptiondlm.training.data.mixture import build_dataset


QUESTIONS = [
    {"from": "system", "value": "Be short."},
    {"from": "human", "value": "<image>\nHow many cats?"},
    {"from": "gpt", "value": "two"},
    {"from": "human", "value": "What color?"},
    {"from": "gpt", "value": "a red one and a blue one"},
]
OPENAI = [{"role": "user", "content": "Name a fruit."}, {"role": "assistant", "content": "apple"}]


def png(color: str = "red", size: tuple[int, int] = (40, 40)) -> bytes:
    stream = BytesIO()
    Image.new("RGB", size, color).save(stream, "PNG")
    return stream.getvalue()


def write(path, rows: list[dict], **columns) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, **columns)


def row(turns=None, images=None) -> dict:
    """A row of encoded bytes and turns as JSON."""
    return {"id": "1", "images": [png()] if images is None else images, "conversations": json.dumps(turns or QUESTIONS)}


@pytest.fixture(scope="module")
def base(tiny_model, tiny_processor):
    """A base model's config and its processor."""
    model = tiny_model(region_conditioning="none")
    return model.config, tiny_processor(model)


@pytest.fixture
def build(base, tmp_path):
    """Factory `build(path or hub settings, data settings)` of dataset and collator."""

    def make(source: dict, loss: dict | None = None, **settings):
        config, processor = base
        data = DataConfig([SourceConfig("conversations", **source)], **settings)
        loss = LossConfig(**{"num_slots": 8, "max_slots": 64, "noise_copies": 1, **(loss or {})})
        dataset = build_dataset(data, loss, processor, config, tmp_path / "cache")
        return dataset, AnswerCollator.build(data, loss, processor, config)

    return make


def prompt_text(processor, batch, row: int = 0) -> str:
    """The prompt of a row with its image tokens as one."""
    ids = batch["input_ids"][row][batch["attention_mask"][row] == 1]
    text = processor.tokenizer.decode(ids)
    while "<IMG_CONTEXT><IMG_CONTEXT>" in text:
        text = text.replace("<IMG_CONTEXT><IMG_CONTEXT>", "<IMG_CONTEXT>")
    return text


@pytest.mark.parametrize("shape", ["bytes", "struct", "path struct", "path", "Image feature"])
def test_images_come_in_every_published_shape(build, tmp_path, shape):
    (tmp_path / "set" / "pictures").mkdir(parents=True)
    (tmp_path / "set" / "pictures" / "a.png").write_bytes(png("blue"))
    image = {
        "bytes": png("blue"),
        "struct": {"bytes": png("blue"), "path": "elsewhere.png"},
        "path struct": {"bytes": None, "path": "pictures/a.png"},
        "path": "pictures/a.png",
        "Image feature": {"bytes": png("blue"), "path": None},
    }[shape]
    if shape == "Image feature":
        features = datasets.Features(
            {"images": datasets.List(datasets.Image()), "conversations": datasets.Value("string")}
        )
        rows = {"images": [[image]], "conversations": [json.dumps(QUESTIONS)]}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "set" / "a.parquet")
    else:
        write(tmp_path / "set" / "a.parquet", [row(images=[image])])
    dataset, collator = build({"path": str(tmp_path / "set")})
    batch = collator([dataset[0]])
    assert dataset.report[0]["bad"] == 0
    assert batch["pixel_values"][0, :, 0, 0].tolist() == [0, 0, 255]  # blue


@pytest.mark.parametrize("as_json", [True, False])
def test_the_sequence_is_the_chat_with_only_the_answer_to_learn(build, base, tmp_path, as_json):
    """What is trained is the conversation as the chat template writes it, earlier answers clean before the last."""
    processor = base[1]
    entry = row()
    entry["conversations"] = entry["conversations"] if as_json else QUESTIONS
    write(tmp_path / "a.parquet", [entry])
    dataset, collator = build({"path": str(tmp_path / "a.parquet"), "turns": "all"})
    assert len(dataset) == 2
    batch = collator([dataset[0], dataset[1]])
    header = "<|start_header_id|>{}<|end_header_id|>\n"
    first = (
        header.format("system") + "Be short.<|eot_id|>\n" + header.format("user")
        + "<img><IMG_CONTEXT></img>How many cats?<|eot_id|>\n" + header.format("assistant")
    )  # fmt: skip
    second = first + "two<|eot_id|>\n" + header.format("user") + "What color?<|eot_id|>\n" + header.format("assistant")
    assert [prompt_text(processor, batch, i) for i in (0, 1)] == [first, second]
    answers = [processor.tokenizer.decode(labels[labels != -100]) for labels in batch["labels"]]
    assert answers[0].startswith("two<|eot_id|><|endoftext|>")
    assert answers[1].startswith("a red one and a blue one<|eot_id|>")
    # the template's own assistant mask marks the same tokens
    messages = [
        {"role": {"human": "user", "gpt": "assistant"}.get(turn["from"], "system"), "content": turn["value"]}
        for turn in QUESTIONS
    ]
    rendered = processor.tokenizer.apply_chat_template(
        messages, chat_template=processor.chat_template, return_assistant_tokens_mask=True, return_dict=True
    )
    marked = [i for i, m in zip(rendered["input_ids"], rendered["assistant_masks"], strict=True) if m]
    assert processor.tokenizer.decode(marked) == "two<|eot_id|>a red one and a blue one<|eot_id|>"


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, BASE_CHAT_TEMPLATE, LLADA_CHAT_TEMPLATE])
def test_every_chat_template_marks_its_answers(template):
    """In each, the answer begins where generation would, and what is before it holds the earlier turns."""
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How many cats?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "two"}]},
        {"role": "user", "content": "What color?"},
        {"role": "assistant", "content": "red"},
    ]
    turns = split_turns(messages, template)
    assert [(turn.answer, turn.num_images) for turn in turns] == [("two", 1), ("red", 1)]
    for turn, before in zip(turns, (1, 3), strict=True):
        rendered, _ = render_jinja_template([messages[:before]], chat_template=template, add_generation_prompt=True)
        assert turn.prompt == rendered[0]
    with pytest.raises(ValueError, match="marks 0 of 2 answers"):
        split_turns(messages, template.replace("{% generation %}", "").replace("{% endgeneration %}", ""))


def test_answers_take_whole_multiples_of_slots(build, base, tmp_path):
    """The end of turn is always among them, and an answer's own slots do not depend on its batch."""
    processor = base[1]
    write(tmp_path / "a.parquet", [row()])
    dataset, collator = build({"path": str(tmp_path), "turns": "all"})
    together, alone = collator([dataset[0], dataset[1]]), collator([dataset[0]])
    tokens = len(processor.tokenizer("a red one and a blue one")["input_ids"])
    assert alone["labels"].shape == (1, 8)
    assert together["labels"].shape == (2, -(-(tokens + 1) // 8) * 8)
    assert (together["labels"][0, 8:] == -100).all()
    assert torch.equal(together["labels"][:1, :8], alone["labels"])
    assert torch.equal(together["answer_masked"][:1, :8], alone["answer_masked"])


def test_a_batch_has_the_losses_of_its_samples(build, base, tiny_model, tmp_path):
    """Answers of different lengths, with and without images, side by side: nothing of the padding is seen."""
    write(tmp_path / "a.parquet", [row(), row(OPENAI, [])])
    dataset, collator = build({"path": str(tmp_path), "turns": "all"})
    model = tiny_model(region_conditioning="none")
    samples = [dataset[i] for i in range(3)]
    with torch.no_grad():
        batch = collator(samples)
        together = model(**batch).token_losses.sum(dim=1)
        alone = [model(**collator([sample])).token_losses.sum() for sample in samples]
    torch.testing.assert_close(together, torch.stack(alone), atol=1e-3, rtol=1e-4)


def test_several_images_stand_where_the_text_puts_them(build, base, tmp_path):
    turns = [{"from": "human", "value": "Is <image> like <image>\n?"}, {"from": "gpt", "value": "no"}]
    write(tmp_path / "a.parquet", [row(turns, [png("red"), png("blue", (80, 20))])])
    dataset, collator = build({"path": str(tmp_path)})
    batch = collator([dataset[0]])
    assert "Is <img><IMG_CONTEXT></img> like <img><IMG_CONTEXT></img>?" in prompt_text(base[1], batch)
    assert batch["image_sizes"].tolist() == [[40, 40], [20, 80]]


def test_one_turn_is_drawn_per_epoch(build, tmp_path):
    write(tmp_path / "a.parquet", [row()])
    dataset, _ = build({"path": str(tmp_path), "turns": "one"})
    assert len(dataset) == 1
    drawn = []
    for epoch in range(12):
        dataset.set_epoch(epoch)
        drawn.append(dataset[0]["answer"])
        assert dataset[0]["answer"] == drawn[-1]
    assert set(drawn) == {"two", "a red one and a blue one"}


BAD_ROWS = {
    "an image that is no image": (row(images=[b"nothing"]), r"images\[0\]"),
    "a missing file": (row(images=["gone.png"]), "gone.png"),
    "a placeholder too few": (row(images=[png(), png()]), "1 <image> places for 2 images"),
    "an empty answer": (row([QUESTIONS[1], {"from": "gpt", "value": " "}]), "turn 1 is empty"),
    "broken JSON": ({**row(), "conversations": '[{"from"'}, "conversations cannot be read"),
    "an unknown speaker": (row([{"from": "narrator", "value": "x"}]), "narrator"),
    "two questions in a row": (row([QUESTIONS[1], QUESTIONS[3]]), "in alternation"),
    "special tokens": (row([QUESTIONS[1], {"from": "gpt", "value": "<|mdm_mask|>"}]), r"<\|mdm_mask\|>"),
}


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_bad_rows_are_counted_named_and_left_out(build, tmp_path, kind):
    """The rows around it stay, and nothing takes its place."""
    bad, message = BAD_ROWS[kind]
    good = row(images=None) if isinstance(bad["images"][0], bytes) else row(images=["a.png"])
    (tmp_path / "a.png").write_bytes(png())
    write(tmp_path / "0.parquet", [good, good])
    write(tmp_path / "1.parquet", [good, bad])
    dataset, _ = build({"path": str(tmp_path)}, max_bad_share=0.3)
    report = dataset.report[0]
    assert (report["records"], report["bad"], len(dataset)) == (4, 1, 3)
    assert report["bad_records"][0].startswith(f"{tmp_path / '1.parquet'}, row 1: ")
    assert re.search(message, report["bad_records"][0])
    with pytest.raises(ValueError, match=r"1 of the first 4 records .*max_bad_share"):
        build({"path": str(tmp_path)}, max_bad_share=0.01)


def test_sets_that_are_missing_or_have_other_columns_are_refused(build, tmp_path):
    with pytest.raises(FileNotFoundError, match="absent"):
        build({"path": str(tmp_path / "absent")})
    write(tmp_path / "a.parquet", [{"text": "x", "images": [png()]}])
    with pytest.raises(ValueError, match=r"columns \['text', 'images'\]; accepted: conversations"):
        build({"path": str(tmp_path)})


def test_the_length_limit_cuts_answers_and_never_images(build, base, tmp_path):
    """An answer is cut to whole multiples of slots; without room for any, the sample is left out and counted."""
    long = [QUESTIONS[1], {"from": "gpt", "value": "red " * 60}]
    write(tmp_path / "a.parquet", [row(long), row([{"from": "human", "value": "<image>" + "blue " * 90}, long[1]])])
    room = 60  # of which the first question takes less than half
    dataset, collator = build({"path": str(tmp_path)}, max_length=room)
    assert (dataset.report[0]["too_long"], dataset.report[0]["cut"], len(dataset)) == (1, 1, 1)
    batch = collator([dataset[0]])
    image_id = base[1].tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    assert (batch["input_ids"] == image_id).sum() == 16
    assert batch["labels"].shape[1] % 8 == 0
    assert room - 8 < batch["input_ids"].shape[1] + batch["labels"].shape[1] <= room
    assert dataset.lengths.tolist() == [batch["input_ids"].shape[1] + batch["labels"].shape[1]]
    assert (batch["labels"] != base[0].end_of_turn_token_id).all()  # a cut answer does not end


def test_lengths_are_those_of_the_batch(build, tmp_path):
    turns = [{"from": "human", "value": "Is <image> like <image>?"}, {"from": "gpt", "value": "no"}]
    write(tmp_path / "a.parquet", [row(), row(OPENAI, []), row(turns, [png(), png(size=(300, 100))])])
    dataset, collator = build({"path": str(tmp_path), "turns": "all"}, {"noise_copies": 2})
    for index, length in enumerate(dataset.lengths):
        batch = collator([dataset[index]])
        assert length == batch["input_ids"].shape[1] + batch["labels"].numel()


def test_markers_models_train_answers_of_their_own_length(tiny_model, tiny_processor, tmp_path):
    """As the released base model does: answer and end of turn, no slots behind them."""
    model = tiny_model(region_conditioning="none", attention_layout="full", supervise_markers=True)
    processor = tiny_processor(model)
    write(tmp_path / "a.parquet", [row()])
    data, loss = (
        DataConfig([SourceConfig("conversations", path=str(tmp_path), turns="all")]),
        LossConfig(noise_copies=1),
    )
    dataset = build_dataset(data, loss, processor, model.config, tmp_path / "cache")
    batch = AnswerCollator.build(data, loss, processor, model.config)([dataset[0], dataset[1]])
    texts = [processor.tokenizer.decode(labels[labels != -100]) for labels in batch["labels"]]
    assert texts == ["two<|eot_id|>", "a red one and a blue one<|eot_id|>"]
    assert batch["answer_masked"].shape[1] == batch["labels"].shape[1] + 2
    assert torch.isfinite(model(**batch).loss)


@pytest.mark.parametrize("streaming", [True, False])
def test_parquet_files_cut_anywhere_are_refused_by_name(build, tmp_path, streaming):
    write(tmp_path / "a.parquet", [row()] * 5)
    whole = (tmp_path / "a.parquet").read_bytes()
    for share in (0, 0.01, 0.5, 0.9, 0.999):
        (tmp_path / "a.parquet").write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(ValueError, match=r"a\.parquet is no parquet file, or was cut short"):
            build({"path": str(tmp_path), "streaming": streaming})


def test_a_set_with_a_damaged_part_is_refused_by_name(build, tmp_path):
    write(tmp_path / "a.parquet", [row()] * 50)
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    start = pq.read_metadata(tmp_path / "a.parquet").row_group(0).column(0).data_page_offset
    content[start : start + 30] = b"\xff" * 30
    (tmp_path / "a.parquet").write_bytes(bytes(content))
    with pytest.raises(ValueError, match=f"{tmp_path} cannot be read"):
        build({"path": str(tmp_path)})


def test_whatever_turns_hold_they_are_good_or_counted(build, tmp_path):
    """Turns with one value replaced by something else, at any depth."""
    dice = random.Random(0)
    junk = [None, True, 3, 1e308, "", "abc", "\ud800", [], {}, [[]], {"a": 1}, "<image>", "<|eot_id|>", 10**30]

    def spoiled(value, depth):
        if depth == 0 or not isinstance(value, (dict, list)) or not value:
            return dice.choice(junk)
        value = value.copy()
        key = dice.choice(list(value) if isinstance(value, dict) else range(len(value)))
        value[key] = spoiled(value[key], depth - 1)
        return value

    entries = [row(spoiled(dice.choice((QUESTIONS, OPENAI)), dice.randrange(3)) or [0], []) for _ in range(300)]
    for text in ("[" * 100_000, "{", "\x00", "NaN", ""):
        entries.append({**row(images=[]), "conversations": text})
    write(tmp_path / "a.parquet", entries)
    for turns in ("one", "all", "all_in_one"):
        dataset, collator = build({"path": str(tmp_path), "turns": turns}, max_bad_share=1.0)
        assert dataset.report[0]["records"] == 305
        assert dataset.report[0]["bad"] > 200
        for index in range(0, len(dataset), 3):
            collator([dataset[index]])


# --- several turns in one sequence ----------------------------------------------------------------------------------

THREE = [
    {"from": "human", "value": "<image>\nHow many cats?"},
    {"from": "gpt", "value": "two"},
    {"from": "human", "value": "Like <image>?"},
    {"from": "gpt", "value": "a red one and a blue one"},
    {"from": "human", "value": "Why?"},
    {"from": "gpt", "value": "so"},
]


def noised(batch, mask_id: int) -> torch.Tensor:
    """What the model denoises."""
    hidden = batch["answer_masked"] & (batch["labels"] != -100)
    return batch["labels"].masked_fill(hidden, mask_id)


def test_turns_of_one_sequence_are_what_each_would_be_alone(build, tiny_model, tmp_path):
    """Logits of every answer equal those of a sequence that ends with its turn; nobody sees a later turn."""
    write(tmp_path / "a.parquet", [row(THREE, [png(), png("blue", (90, 40))]), row(OPENAI, [])])
    dataset, collator = build({"path": str(tmp_path), "turns": "all_in_one"})
    model = tiny_model(region_conditioning="none")
    batch = collator([dataset[1], dataset[0]])  # padded beside a single turn
    assert (len(dataset), len(batch["labels"])) == (2, 4)
    answers = noised(batch, model.config.mask_token_id)
    with torch.no_grad():
        together = model(**batch).logits[1:]
        for turn in range(3):
            kept = batch["region_ids"][1] <= turn
            kept &= batch["attention_mask"][1] == 1
            images = int(batch["tile_grids"].shape[0] if turn else 1)
            tiles = int(
                batch["tile_grids"][:images].prod(dim=1).sum() + (batch["tile_grids"][:images].prod(1) > 1).sum()
            )
            slots = int((batch["labels"][1 + turn] != -100).sum())
            alone = model(
                input_ids=batch["input_ids"][1:, kept],
                token_roles=batch["token_roles"][1:, kept],
                region_ids=batch["region_ids"][1:, kept] - turn,  # this turn alone is asked
                pixel_values=batch["pixel_values"][:tiles],
                tile_grids=batch["tile_grids"][:images],
                image_sizes=batch["image_sizes"][:images],
                answer_ids=answers[1 + turn : 2 + turn, :slots],
            ).logits[0]
            torch.testing.assert_close(together[turn, :slots], alone, atol=2e-4, rtol=1e-4)


def test_the_first_turn_of_many_is_the_single_turn_of_today(build, tiny_model, tmp_path):
    write(tmp_path / "0.parquet", [row(THREE, [png(), png("blue", (90, 40))])])
    many, collator = build({"path": str(tmp_path), "turns": "all_in_one"})
    single, _ = build({"path": str(tmp_path), "turns": "all"})
    model = tiny_model(region_conditioning="none")
    batch, first = collator([many[0]]), collator([single[0]])
    assert torch.equal(batch["labels"][0, : first["labels"].shape[1]], first["labels"][0])
    first["mask_probability"], first["answer_masked"] = batch["mask_probability"][:1], batch["answer_masked"][:1, :8]
    with torch.no_grad():
        found, expected = model(**batch).logits[0, :8], model(**first).logits[0]
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)


def test_a_row_of_turns_has_the_length_that_was_measured_and_drops_late_turns(build, tmp_path):
    write(tmp_path / "a.parquet", [row(THREE, [png(), png()])])
    dataset, collator = build({"path": str(tmp_path), "turns": "all_in_one"}, {"noise_copies": 2})
    batch = collator([dataset[0]])
    tokens = batch["input_ids"].shape[1] + int((batch["labels"] != -100).sum())
    assert dataset.lengths.tolist() == [tokens]
    report = build({"path": str(tmp_path), "turns": "all"}, {"noise_copies": 2})[0]
    assert tokens < sum(report.lengths)  # the prompt is paid once
    shorter, _ = build({"path": str(tmp_path), "turns": "all_in_one"}, {"noise_copies": 2}, max_length=tokens - 1)
    assert shorter[0]["answers"] == ["two", "a red one and a blue one"]
    assert shorter.report[0]["too_long"] == 1


def test_turns_in_one_sequence_need_isolated_attention(tiny_model, tiny_processor, tmp_path):
    write(tmp_path / "a.parquet", [row()])
    model = tiny_model(region_conditioning="none", attention_layout="full")
    data = DataConfig([SourceConfig("conversations", path=str(tmp_path), turns="all_in_one")])
    with pytest.raises(ValueError, match="'all_in_one' needs attention_layout 'isolated'"):
        build_dataset(data, LossConfig(), tiny_processor(model), model.config, tmp_path / "cache")
