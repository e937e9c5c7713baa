"""Conversation sets: parquet files or Hub datasets with rows of images and turns, as the base model's stages use them.

Columns are `conversations`, a list of turns (or that list as JSON) `{"from": "human" | "gpt" | "system", "value"}` or
`{"role": "user" | "assistant" | "system", "content"}`, and, unless a set is text alone, `images`: encoded bytes,
structs of `bytes` and `path`, or paths. `<image>` in a user's turn says where an image stands.
"""

import json
import random
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetGenerationError
from PIL import Image
from transformers.utils.chat_template_utils import render_jinja_template

from perceptiondlm.prompting_perceptiondlm import END_OF_TURN, IMAGE_TOKEN
from perceptiondlm.training.data.bad_records import BadRecord
from perceptiondlm.training.data.columns import file_content
from perceptiondlm.training.data.data_config import SourceConfig
from perceptiondlm.training.data.parquet_rows import parquet_files, row_groups
from perceptiondlm.training.data.sources import AnswerFormat, Measured, Source, image_root, open_image


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

    def __init__(self, config: SourceConfig, answers: AnswerFormat, key: str, cache_dir: Path):
        self.config, self.answers, self.key = config, answers, key
        self.files = parquet_files(config.path) if config.path else []
        self.ends: list[int] = []
        if self.files:
            groups = row_groups(self.files, cache_dir)
            counts = (int(groups.rows[groups.file == file].sum()) for file in range(len(self.files)))
            self.ends = list(accumulate(counts))
        self.rows = load_rows(config, self.files)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def fingerprint(self) -> Sequence[Any]:
        return [self.key, len(self), *map(file_content, self.files)]

    def place(self, record: int) -> str:
        if not self.files:
            return f"{self.config.name}, row {record}"
        file = bisect_right(self.ends, record)
        return f"{self.files[file]}, row {record - (self.ends[file - 1] if file else 0)}"

    def measure(self, record: int) -> Measured:
        return measure_row(self.rows[record], self.config, self.answers)

    def sample(self, record: int, unit: int, seed: str) -> dict[str, Any]:
        return row_sample(self.rows[record], unit, seed, self.config, self.answers)


def load_rows(config: SourceConfig, files: list[str]) -> datasets.Dataset:
    """The set as `datasets` loads it, images left encoded.

    Raises:
        ValueError: naming the set when a file of it cannot be read, or lacks the columns.
    """
    try:
        if files:
            rows = datasets.load_dataset("parquet", data_files={"train": files}, split="train")
        else:
            rows = datasets.load_dataset(config.hub, config.subset, split=config.split)
    except DatasetGenerationError as error:
        raise ValueError(f"{config.name} cannot be read: {error.__cause__ or error}") from error
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
    if config.turns == "all_in_one":
        return measure_turns(turns, lengths, answers)
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
    if config.turns == "all_in_one":
        lengths = prompt_lengths(images, turns, answers)
        return turns_sample(images, turns[: fitting_turns(turns, lengths, answers)])
    if config.turns == "one":
        lengths = prompt_lengths(images, turns, answers)
        unit = random.Random(f"turn/{seed}").randrange(sum(answers.room(length) > 0 for length in lengths))
    turn = turns[unit]
    return {"images": images[: turn.num_images], "prompt": turn.prompt, "rendered": True, "answer": turn.answer}


def fitting_turns(turns: list[Turn], lengths: list[int], answers: AnswerFormat) -> int:
    """How many turns of a row, from the first, fit in one sequence. The first may be cut to fit."""
    tokens = 0
    for number, (turn, length) in enumerate(zip(turns, lengths, strict=True)):
        tokens += answers.copies * answers.slots(turn.answer)[0]
        if length + tokens > answers.max_length:
            return number or int(answers.room(length) > 0)
    return len(turns)


def measure_turns(turns: list[Turn], lengths: list[int], answers: AnswerFormat) -> Measured:
    """A row whose turns share one sequence."""
    count = fitting_turns(turns, lengths, answers)
    if count == 0:
        return Measured([], len(turns))
    slots, cut = zip(*(answers.slots(turn.answer) for turn in turns[:count]), strict=True)
    if count == 1:
        room = answers.room(lengths[0])
        slots, cut = (min(slots[0], room),), (answers.num_tokens(turns[0].answer) > room,)
    return Measured([lengths[count - 1] + answers.copies * sum(slots)], len(turns) - count, sum(cut))


def turns_sample(images: list[Image.Image], turns: list[Turn]) -> dict[str, Any]:
    """Turns of a row in one sequence: each with the piece of the prompt, and the images, that the one before lacks."""
    before = [Turn("", "", 0), *turns]
    pieces = [turn.prompt[len(last.prompt) :] for last, turn in zip(before, turns, strict=False)]
    groups = [images[last.num_images : turn.num_images] for last, turn in zip(before, turns, strict=False)]
    return {"turn_images": groups, "turn_prompts": pieces, "answers": [turn.answer for turn in turns]}


def filler() -> dict[str, Any]:
    """A sample without anything to learn."""
    return {"images": [], "prompt": ".", "answer": ".", "noise_seed": "filler", "coarse": False, "filler": True}


def prompt_lengths(images: list[Image.Image], turns: list[Turn], answers: AnswerFormat) -> list[int]:
    """Tokens of the prompt of every turn; they grow from turn to turn."""
    tokens = [answers.processor.prompt_length(image.size, 0) - 1 for image in images]  # a placeholder is one already
    return [answers.num_tokens(turn.prompt) + sum(tokens[: turn.num_images]) for turn in turns]


def read_row(row: dict[str, Any], config: SourceConfig, answers: AnswerFormat) -> tuple[list[Image.Image], list[Turn]]:
    """Images and answers of a row, all checked; raises `BadRecord`."""
    root = image_root(config)
    values = row.get("images") or []
    if not isinstance(values, list):
        raise BadRecord(f"images is a {type(values).__name__}; accepted: a list")
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
    except (json.JSONDecodeError, AttributeError, TypeError, KeyError, RecursionError) as error:
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
