"""Conversation sets: parquet files or Hub datasets with rows of images and turns, as the base model's stages use them.

Columns are `conversations`, a list of turns (or that list as JSON) `{"from": "human" | "gpt" | "system", "value"}` or
`{"role": "user" | "assistant" | "system", "content"}`, and, unless a set is text alone, `images`: encoded bytes,
structs of `bytes` and `path`, or paths. `<image>` in a user's turn says where an image stands.
"""

import glob
import json
import random
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq
from PIL import Image
from transformers.utils.chat_template_utils import render_jinja_template

from perceptiondlm.prompting_perceptiondlm import END_OF_TURN, IMAGE_TOKEN
from perceptiondlm.training.data.data_config import SourceConfig
from perceptiondlm.training.data.sources import (
    AnswerFormat,
    BadRecord,
    Measured,
    Source,
    file_state,
    image_root,
    open_image,
)


PLACEHOLDER = "<image>"
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


@dataclass
class Turn:
    """One answer of a conversation and the rendered chat before it, in which images stand as IMAGE_TOKEN."""

    prompt: str
    answer: str
    num_images: int


class ConversationSource(Source):
    """Rows of a conversation set in random access. Of a row's answers one is drawn per epoch, or each is a sample."""

    def __init__(self, config: SourceConfig, answers: AnswerFormat, key: str):
        self.config, self.answers, self.key = config, answers, key
        self.files = parquet_files(config.path) if config.path else []
        self.rows = load_rows(config, self.files)
        self.ends = list(accumulate(pq.read_metadata(file).num_rows for file in self.files))

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def fingerprint(self) -> Sequence[Any]:
        return [self.key, len(self), *map(file_state, self.files)]

    def place(self, record: int) -> str:
        if not self.files:
            return f"{self.config.name}, row {record}"
        file = bisect_right(self.ends, record)
        return f"{self.files[file]}, row {record - (self.ends[file - 1] if file else 0)}"

    def measure(self, record: int) -> Measured:
        return measure_row(self.rows[record], self.config, self.answers)

    def sample(self, record: int, unit: int, seed: str) -> dict[str, Any]:
        return row_sample(self.rows[record], unit, seed, self.config, self.answers)


def parquet_files(path: str) -> list[str]:
    """The parquet files of a folder (in its subfolders, too), a glob, or a file, in order of their names."""
    pattern = str(Path(path) / "**" / "*.parquet") if Path(path).is_dir() else path
    files = sorted(glob.glob(pattern, recursive=True))
    if not files:
        raise FileNotFoundError(f"no parquet files at {path}; accepted: a folder, a glob or a file")
    return files


def load_rows(config: SourceConfig, files: list[str]) -> Any:
    """The set as `datasets` loads it (a `Dataset`, or an `IterableDataset` when streaming), images left encoded."""
    if files:
        rows = datasets.load_dataset("parquet", data_files={"train": files}, split="train", streaming=config.streaming)
    else:
        rows = datasets.load_dataset(config.hub, config.subset, split=config.split, streaming=config.streaming)
    columns = rows.column_names or []
    if "conversations" not in columns:
        raise ValueError(f"{config.name} has the columns {columns}; accepted: conversations and, if any, images")
    rows = rows.select_columns([name for name in ("conversations", "images") if name in columns])
    images = (rows.features or {}).get("images")
    if isinstance(getattr(images, "feature", None), datasets.Image):
        rows = rows.cast_column("images", datasets.List(datasets.Image(decode=False)))
    return rows


def measure_row(row: dict[str, Any], config: SourceConfig, answers: AnswerFormat) -> Measured:
    """Read a row as training will and measure its samples."""
    images, turns = read_row(row, config, answers)
    lengths = prompt_lengths(images, turns, answers)
    rooms = [answers.room(length) for length in lengths]
    fitting = sum(room > 0 for room in rooms)
    slots = [min(answers.slots(turn.answer)[0], room) for turn, room in zip(turns, rooms, strict=True)]
    cut = sum(answers.num_tokens(turn.answer) > room for turn, room in zip(turns[:fitting], rooms, strict=False))
    found = [length + n * answers.copies for length, n in zip(lengths[:fitting], slots, strict=False)]
    if config.turns == "one":
        return Measured([max(found)] if found else [], int(not found), min(cut, 1))
    return Measured(found, len(turns) - fitting, cut)


def row_sample(row: dict[str, Any], unit: int, seed: str, config: SourceConfig, answers: AnswerFormat) -> dict:
    """Answer `unit` of a row, or, with `turns: one`, an answer drawn by the seed out of those that fit."""
    images, turns = read_row(row, config, answers)
    if config.turns == "one":
        lengths = prompt_lengths(images, turns, answers)
        unit = random.Random(f"turn/{seed}").randrange(sum(answers.room(length) > 0 for length in lengths))
    turn = turns[unit]
    return {"images": images[: turn.num_images], "prompt": turn.prompt, "answer": turn.answer}


def prompt_lengths(images: list[Image.Image], turns: list[Turn], answers: AnswerFormat) -> list[int]:
    """Tokens of the prompt of every turn; they grow from turn to turn."""
    tokens = [answers.processor.prompt_length(image.size, 0) - 1 for image in images]  # a placeholder is one already
    return [answers.num_tokens(turn.prompt) + sum(tokens[: turn.num_images]) for turn in turns]


def read_row(row: dict[str, Any], config: SourceConfig, answers: AnswerFormat) -> tuple[list[Image.Image], list[Turn]]:
    """Images and answers of a row, all checked; raises `BadRecord`."""
    root = image_root(config)
    values = row.get("images") or []
    messages = read_messages(row["conversations"], answers)
    places = sum(part["type"] == "image" for message in messages for part in message["content"])
    if places != len(values):
        raise BadRecord(f"the turns have {places} {PLACEHOLDER} places for {len(values)} images")
    images = [open_image(value, root, f"images[{index}]") for index, value in enumerate(values)]
    return images, split_turns(messages, answers.processor.chat_template)


def read_messages(value: Any, answers: AnswerFormat) -> list[dict[str, Any]]:
    """Turns in the form of a chat template: user and assistant in alternation, after at most one system turn."""
    try:
        turns = json.loads(value) if isinstance(value, str) else value
        pairs = [(_first(turn, "from", "role"), _first(turn, "value", "content")) for turn in turns]
        roles = [ROLES.get(name, name) for name, _ in pairs]
        contents = [read_content(text, role) for role, (_, text) in zip(roles, pairs, strict=True)]
    except (json.JSONDecodeError, AttributeError, TypeError, KeyError) as error:
        raise BadRecord(f"conversations cannot be read ({type(error).__name__}: {error})") from error
    for index, (_, text) in enumerate(pairs):
        answers.check_text(text, f"turn {index}")
    spoken = roles[1:] if roles[:1] == ["system"] else roles
    expected = ["user", "assistant"] * len(spoken)
    if len(spoken) < 2 or spoken != expected[: len(spoken)]:
        raise BadRecord(f"turns are by {roles}; accepted: user and assistant in alternation, at most one system first")
    return [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]


def _first(turn: dict[str, Any], *names: str) -> Any:
    """The first of two columns that a turn fills."""
    return turn[names[0]] if turn.get(names[0]) is not None else turn[names[1]]


def read_content(text: str, role: str) -> list[dict[str, str]]:
    """Text and images of a turn in their order; a line break between an image and its text is the template's matter."""
    parts = text.split(PLACEHOLDER) if role != "assistant" else [text]
    content = []
    for index, part in enumerate(parts):
        if index:
            content.append({"type": "image"})
            part = part.removeprefix("\n")
        if part:
            content.append({"type": "text", "text": part})
    return content


def split_turns(messages: list[dict[str, Any]], chat_template: str) -> list[Turn]:
    """Every answer and what stands before it, found by the chat template's assistant mask (`{% generation %}`)."""
    rendered, spans = render_jinja_template([messages], chat_template=chat_template, return_assistant_tokens_mask=True)
    text, answers = rendered[0], sum(message["role"] == "assistant" for message in messages)
    if len(spans[0]) != answers:
        raise ValueError(
            f"the chat template marks {len(spans[0])} of {answers} answers: it must put each into {{% generation %}}"
        )
    return [
        Turn(text[:start], text[start:end].removesuffix(END_OF_TURN), text[:start].count(IMAGE_TOKEN))
        for start, end in spans[0]
    ]
