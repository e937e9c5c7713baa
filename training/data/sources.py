"""What a part of a mixture is: records on disk or drawn, each giving one or more samples; and what all of them share.

A sample is a dict, of regions, of a turn to answer, or of several turns in one sequence::

    image      anything `load_image` takes      images     list of them
    masks      regions of the image             prompt     question or rendered chat, <img> where an image stands
    captions   one per region                   answer     text of the turn

    turn_prompts, turn_images, answers     per turn: what its prompt adds to the turn before, and the answer

and `rendered` where the prompt is a rendered chat. To these the mixture adds `noise_seed`, `coarse` and `filler`. The
collator makes batches of them.
"""

import base64
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from io import BytesIO
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError

from perceptiondlm.configuration_perceptiondlm import PerceptionDLMConfig
from perceptiondlm.images_perceptiondlm import UNREADABLE, load_image
from perceptiondlm.processing_perceptiondlm import PerceptionDLMProcessor
from perceptiondlm.prompting_perceptiondlm import END_OF_TURN
from perceptiondlm.training.data.bad_records import BadRecord, retried
from perceptiondlm.training.data.data_config import DataConfig, LossConfig, SourceConfig


DATA_URL = re.compile(r"data:[^,]*;base64,")


@dataclass
class Measured:
    """What a look at a record found.

    Args:
        lengths: tokens of each of its samples, answers and their noised copies included.
        too_long: samples left out because the limit leaves no room for an answer.
        cut: answers that are shortened.
        dropped: regions that are left out, with what is wrong with them.
    """

    lengths: list[int]
    too_long: int = 0
    cut: int = 0
    dropped: dict[int, str] = field(default_factory=dict)


class Source(ABC):
    """Records of one kind, read by number; the same record and seed always give the same sample.

    Args:
        key: of the source in the seeds of its samples.
        dropped: by record, regions that the survey found bad.
    """

    key: str
    dropped: Mapping[int, Sequence[int]] = MappingProxyType({})

    @abstractmethod
    def __len__(self) -> int:
        """Number of records."""

    @abstractmethod
    def place(self, record: int) -> str:
        """File and row of a record, for messages."""

    @abstractmethod
    def measure(self, record: int) -> Measured:
        """Read a record as training will and measure its samples; raises `BadRecord`."""

    @abstractmethod
    def sample(self, record: int, unit: int, seed: str) -> dict[str, Any]:
        """Sample `unit` of a record. `seed` names record and epoch; raises `BadRecord`."""

    @property
    def fingerprint(self) -> Sequence[Any]:
        """What changes when the records do, as JSON."""
        return [self.key, len(self)]


@dataclass
class AnswerFormat:
    """How answers become slots, and how many fit.

    Args:
        processor: tokenizes, and knows the tokens of images and regions.
        num_slots, slot_limit, copies: of `LossConfig`; `own_length` replaces `num_slots` by an answer's own length.
        max_length: tokens of a sequence.
    """

    processor: PerceptionDLMProcessor
    num_slots: int
    slot_limit: int
    copies: int
    own_length: bool
    max_length: int

    @classmethod
    def build(
        cls, data: DataConfig, loss: LossConfig, processor: PerceptionDLMProcessor, config: PerceptionDLMConfig
    ) -> "AnswerFormat":
        """The format of a run. A sequence is never longer than the model's positions."""
        limit = min(data.max_length, config.text_config.max_position_embeddings)
        slots = 1 if config.supervise_markers else loss.num_slots
        return cls(processor, slots, loss.slot_limit, loss.noise_copies, config.supervise_markers, limit)

    def encode(self, answers: Sequence[str], slot_limit: int, in_regions: bool) -> torch.Tensor:
        """Targets (A, G) of a sample's answers, cut at `slot_limit`; -100 behind the end of shorter ones.

        Under `own_length` a caption's block is ended by the model, so its slots hold the caption alone.
        """
        targets = self.processor.encode_answers(answers, self.num_slots, slot_limit, cut=True)
        if self.own_length and in_regions:
            end = self.processor.tokenizer.convert_tokens_to_ids(END_OF_TURN)
            targets = targets.masked_fill(targets == end, -100)
        return targets

    def room(self, prompt_tokens: int) -> int:
        """Slots left for the answer behind a prompt: whole multiples of `num_slots`, at most `slot_limit`, or 0."""
        left = (self.max_length - prompt_tokens) // self.copies
        return max(0, min(left // self.num_slots * self.num_slots, self.slot_limit))

    def num_tokens(self, text: str) -> int:
        """Tokens of a text."""
        return len(self.processor.tokenizer(text, add_special_tokens=False)["input_ids"])

    def slots(self, answer: str) -> tuple[int, bool]:
        """Slots that an answer takes, and whether it is cut."""
        tokens = self.num_tokens(answer)
        return min(-(-(tokens + 1) // self.num_slots) * self.num_slots, self.slot_limit), tokens > self.slot_limit

    def check_text(self, text: Any, name: str) -> None:
        """Refuse what is no text, is empty or would be read as special tokens."""
        if not isinstance(text, str):
            raise BadRecord(f"{name} is {text!r:.60}; accepted: text")
        if not text.strip():
            raise BadRecord(f"{name} is empty")
        try:
            text.encode()
        except UnicodeEncodeError as error:  # half of a surrogate pair, as JSON can hold
            raise BadRecord(f"{name} is no Unicode text: {error.reason} at {error.start}") from error
        if found := self._special_tokens.search(text):
            raise BadRecord(f"{name} contains the special token {found.group()}")

    @cached_property
    def _special_tokens(self) -> re.Pattern[str]:
        return re.compile("|".join(re.escape(token) for token in self.processor.tokenizer.all_special_tokens))


def image_root(config: SourceConfig) -> Path:
    """Folder that the image paths of a set are relative to."""
    path = Path(config.path or ".")
    return Path(config.image_root) if config.image_root else path if path.is_dir() else path.parent


def open_image(value: Any, root: Path, name: str) -> Image.Image:
    """An image of a record: encoded bytes, a struct of bytes or path, a `data:` URL, or a path under `root`.

    Raises:
        BadRecord: if it is missing or cannot be read.
    """
    try:
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, str) and (prefix := DATA_URL.match(value[:100])):
            value = base64.b64decode(value[prefix.end() :], validate=True)
        elif isinstance(value, str):
            value = retried((root / value).read_bytes)
        return load_image(Image.open(BytesIO(value)) if isinstance(value, bytes) else value, name=name)
    except UnidentifiedImageError as error:
        raise BadRecord(f"{name} is no image ({len(value)} bytes)") from error
    except (*UNREADABLE, TypeError) as error:
        raise BadRecord(f"{name} cannot be read: {error}") from error
