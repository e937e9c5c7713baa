"""Doors of the ecosystem: chats with images, transformers' image-text-to-text pipeline, datasets' cache."""

import base64
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from transformers import AutoModel, AutoProcessor, pipeline

from perceptiondlm.checkpoints.folder import export, register_auto_classes
from perceptiondlm.generation_perceptiondlm import ended


ROOT = Path(__file__).parents[2]
DRAWN = {"subfolder": "drawn/model", "trust_remote_code": True}  # the embedded model that reads whole images


@pytest.fixture(scope="module")
def embedded():
    return AutoModel.from_pretrained(ROOT, **DRAWN).eval()


@pytest.fixture(scope="module")
def embedded_processor():
    return AutoProcessor.from_pretrained(ROOT, **DRAWN)


@pytest.fixture(scope="module")
def picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))


def chat(part, question="What is in the image?"):
    return [{"role": "user", "content": [part, {"type": "text", "text": question}]}]


def batch_of(processor, messages, **keywords):
    return processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", **keywords
    )


# --- chats ------------------------------------------------------------------------------------------------------------


def test_every_source_of_an_image_part_gives_the_same_batch(picture, processor, tmp_path):
    picture.save(tmp_path / "picture.png")
    stored = (tmp_path / "picture.png").read_bytes()
    text = base64.b64encode(stored).decode()
    parts = [
        {"type": "image", "image": picture},
        {"type": "image", "image": np.asarray(picture)},
        {"type": "image", "path": str(tmp_path / "picture.png")},
        {"type": "image", "url": str(tmp_path / "picture.png")},
        {"type": "image", "url": f"data:image/png;base64,{text}"},
        {"type": "image", "base64": text},
        {"type": "image", "base64": f"data:image/png;base64,{text}"},
        {"type": "image", "image": {"bytes": stored, "path": None}},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{text}"}},
    ]
    first, *others = [batch_of(processor, chat(part)) for part in parts]
    for other in others:
        assert set(other) == set(first)
        assert all(torch.equal(other[name], first[name]) for name in first)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"type": "image", "base64": "no base64!"}, "cannot be read"),
        ({"type": "image", "path": "absent.png"}, "no file absent.png"),
        ({"type": "image", "path": "a.png", "url": "b.png"}, "'url', 'path'"),
        ({"type": "image"}, "1 image placeholders.*0 images"),
        ({"type": "video", "url": "a.mp4"}, "type 'video'.*accepted: text, image"),
        ({"type": "text"}, "type 'text'.*accepted"),
    ],
)
def test_parts_that_cannot_be_read_are_refused(part, message, processor):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        batch_of(processor, chat(part))


@pytest.mark.parametrize("tokenize", [True, False])
@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "conversation is empty"),
        ("Is there a cat?", "conversation is a str"),
        ([[], []], "accepted: a list of messages"),
        (["Is there a cat?"], "message 0 is 'Is there a cat.'; accepted: a dict with role and content"),
        ([{"content": "Is there a cat?"}], "message 0.*role and content"),
        ([{"role": "user"}], "message 0 has content None"),
        ([{"role": "user", "content": [3]}], "a part of a message is a int"),
    ],
)
def test_conversations_that_are_none_are_refused(messages, message, tokenize, processor):
    with pytest.raises((ValueError, TypeError), match=message):
        processor.apply_chat_template(messages, tokenize=tokenize)


def test_messages_are_left_as_they_were(picture, processor):
    part = {"type": "image", "base64": base64.b64encode(png(picture)).decode()}
    messages = chat(part, "Is <|eot_id|> a token?")
    before = [{**message, "content": [dict(piece) for piece in message["content"]]} for message in messages]
    batch_of(processor, messages)
    assert messages == before


def png(picture):
    buffer = BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()


def test_assistant_masks_mark_what_the_assistant_says(picture, processor):
    answers = ["a red cat", "no, <|eot_id|> is text"]
    short = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "because"}]
    messages = chat({"type": "image", "image": picture})
    messages += [{"role": "assistant", "content": answers[0]}, {"role": "user", "content": "And a dog?"}]
    messages += [{"role": "assistant", "content": [{"type": "text", "text": answers[1]}]}]
    batch = processor.apply_chat_template(
        [messages, short], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    assert batch["assistant_masks"].shape == batch["input_ids"].shape
    said = [ids[mask.bool()] for ids, mask in zip(batch["input_ids"], batch["assistant_masks"], strict=True)]
    assert processor.batch_decode(said) == ["".join(f"{answer}<|eot_id|>" for answer in answers), "because<|eot_id|>"]
    plain = processor.apply_chat_template([messages, short], tokenize=True, return_dict=True)
    assert torch.equal(plain["input_ids"], batch["input_ids"])


# --- pipeline("image-text-to-text") -----------------------------------------------------------------------------------


def test_the_image_text_to_text_pipeline_answers_a_chat(embedded, embedded_processor, scene, tmp_path):
    """Loaded by name; its answer is `generate`'s."""
    register_auto_classes()
    export(embedded, embedded_processor, tmp_path / "model", torch.float32)
    pipe = pipeline("image-text-to-text", model=str(tmp_path / "model"), trust_remote_code=True)
    messages = chat({"type": "image", "image": scene.image}, "Describe the image.")
    (result,) = pipe(text=messages)
    answer = result["generated_text"][-1]
    inputs = batch_of(pipe.processor, messages)
    expected = pipe.processor.post_process_image_text_to_text(pipe.model.generate(**inputs))
    assert answer["role"] == "assistant"
    assert answer["content"].strip() == expected[0]
    assert expected[0]
    assert pipe(text=messages, return_full_text=False)[0]["generated_text"].strip() == expected[0]
    tokens = pipe(text=messages, return_tensors=True, max_new_tokens=8)[0]["generated_token_ids"]
    assert len(tokens) == inputs["input_ids"].shape[1] + 8
    fast = pipe(text=[messages, messages], generate_kwargs={"steps": 4, "do_sample": False}, return_full_text=False)
    assert len(fast) == 2
    assert fast[0] == fast[1]
    (asked,) = pipe(images=scene.image, text="Describe the image.", return_full_text=False)
    assert asked["generated_text"].strip() == expected[0]


def test_the_usual_way_to_decode_reads_well(embedded, embedded_processor, scene):
    inputs = batch_of(embedded_processor, chat({"type": "image", "image": scene.image}, "Describe the image."))
    expected = embedded_processor.post_process_image_text_to_text(embedded.generate(**inputs))
    out = embedded.generate(**inputs, do_sample=False, num_beams=1, return_dict_in_generate=False)
    answers = out[:, inputs["input_ids"].shape[1] :]
    assert torch.equal(out[:, : inputs["input_ids"].shape[1]], inputs["input_ids"])
    assert embedded_processor.decode(answers[0], skip_special_tokens=True).strip() == expected[0]
    assert [text.strip() for text in embedded_processor.batch_decode(answers, skip_special_tokens=True)] == expected
    assert [text.strip() for text in embedded_processor.post_process_image_text_to_text(answers)] == expected
    assert [text.strip() for text in embedded_processor.post_process_image_text_to_text(answers[0].numpy())] == expected


def test_nothing_stands_behind_the_end_of_an_answer():
    ids = torch.tensor([[5, 1, 7, 2], [5, 6, 7, 8], [2, 5, 1, 5]])
    assert ended(ids, end_of_turn=1, end_of_text=2).tolist() == [[5, 1, 2, 2], [5, 6, 7, 8], [2, 2, 2, 2]]


# --- datasets.map -----------------------------------------------------------------------------------------------------

HASH = """
import pickletools, sys
from datasets.fingerprint import Hasher
from datasets.utils._dill import dumps
from transformers import AutoImageProcessor, AutoProcessor
processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
processor(text="Is it used?")
alone = AutoImageProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
for one in (processor, alone):
    found = [argument for code, argument, _ in pickletools.genops(dumps(one)) if isinstance(argument, str)]
    assert "_create_type" not in found and "_create_function" not in found  # by reference
print(Hasher.hash(processor), Hasher.hash(alone))
print(Hasher.hash(lambda row: processor(images=row["image"], boxes=row["boxes"])))
"""


def test_a_processor_hashes_alike_in_every_process():
    """Its class is found again, and not pickled function by function, which need not end."""
    run = [sys.executable, "-W", "ignore", "-c", HASH, str(ROOT)]
    first, second = (subprocess.run(run, capture_output=True, text=True, timeout=600) for _ in range(2))
    assert first.returncode == 0, first.stderr[-2000:]
    assert len(set(first.stdout.split())) == 3
    assert first.stdout == second.stdout


def test_maps_with_a_processor_are_cached(processor, tiny_processor, model, picture, tmp_path):
    dataset = Dataset.from_list([{"x": 0}, {"x": 5}])
    dataset.to_parquet(tmp_path / "rows.parquet")
    dataset = Dataset.from_parquet(str(tmp_path / "rows.parquet"), cache_dir=str(tmp_path))

    def length(of):
        return lambda row: {"length": of(images=picture, boxes=[[row["x"], 0, 20, 20]])["input_ids"].shape[1]}

    once, again = dataset.map(length(processor)), dataset.map(length(processor))
    assert once.cache_files == again.cache_files
    other = dataset.map(length(tiny_processor(model, region_question="What?")))
    assert other.cache_files != once.cache_files
    assert other["length"] != once["length"]
