"""Rows of prompts, tiles and regions become a batch of tensors, whose keys processing_perceptiondlm documents."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature

from .sequence_perceptiondlm import SHARED


PADDINGS = (True, False, "longest", "max_length", "do_not_pad")
# Keywords of tokenizers that change nothing here under these values; others are refused.
SETTLED: dict[str, tuple] = {
    "padding_side": (None, "right"),
    "add_special_tokens": (None, False),
    "return_attention_mask": (None, True),
    "is_split_into_words": (None, False),
    "split_special_tokens": (None, False),
    "return_token_type_ids": (None, False),
    "return_mm_token_type_ids": (None, False),
    "return_text_replacement_offsets": (None, False, True),
    "return_tensors": ("pt",),
}
WHY = {
    "padding_side": "an answer follows its row's last token, wherever padding stands",
    "add_special_tokens": "the chat template writes them",
}
GROUPS = ("text_kwargs", "images_kwargs")


@dataclass(frozen=True)
class TextOptions:
    """How rows are brought to one length.

    Args:
        padding: True or `"longest"` (to the longest row), `"max_length"`, or False: rows must have one length.
        max_length: most tokens of a row; longer ones are refused, since a prompt that is cut asks something else.
        truncation: accepted for what it says about rows that fit.
        pad_to_multiple_of: the length becomes a multiple of it.
        return_offsets_mapping: keep the characters of the prompt that each token stands for.
    """

    padding: bool | str | None = True
    max_length: int | None = None
    truncation: bool | str | None = None
    pad_to_multiple_of: int | None = None
    return_offsets_mapping: bool = False

    def __post_init__(self):
        if self.padding not in (None, *PADDINGS):
            raise ValueError(f"padding must be one of {PADDINGS}, got {self.padding!r}")
        for name in ("max_length", "pad_to_multiple_of"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
        if self.padding == "max_length" and self.max_length is None:
            raise ValueError("padding='max_length' needs max_length")

    def length(self, lengths: list[int]) -> int:
        """The length of every row, given those of their tokens."""
        longest = max(lengths)
        if self.max_length is not None and longest > self.max_length:
            raise ValueError(
                f"row {lengths.index(longest)} has {longest} tokens, max_length is {self.max_length}; a prompt is "
                "never truncated: shorten the text, lower max_tiles, or split regions with max_regions_per_pass"
            )
        if self.padding in (False, "do_not_pad") and len(set(lengths)) > 1:
            raise ValueError(f"rows have {lengths} tokens; tensors need padding=True")
        length = (self.max_length or longest) if self.padding == "max_length" else longest
        multiple = self.pad_to_multiple_of or 1
        return -(-length // multiple) * multiple


def grouped(keywords: dict[str, Any]) -> dict[str, Any]:
    """Keywords with those of `text_kwargs` and `images_kwargs` beside them, and of `common_kwargs` where not given."""
    flat = {name: value for name, value in keywords.items() if name not in (*GROUPS, "common_kwargs")}
    for group in GROUPS:
        for name, value in (keywords.get(group) or {}).items():
            if name in flat:
                raise ValueError(f"{name} was passed twice: {flat[name]!r} and, in {group}, {value!r}")
            flat[name] = value
    return {**(keywords.get("common_kwargs") or {}), **flat}


def split_options(keywords: dict[str, Any]) -> tuple[TextOptions, dict[str, Any]]:
    """What tokenizers call for and what is left; refuses by name what cannot be obeyed."""
    for name, accepted in SETTLED.items():
        if name in keywords and not any(keywords[name] is value or keywords[name] == value for value in accepted):
            reason = f" ({WHY[name]})" if name in WHY else ""
            raise ValueError(f"{name} must be {' or '.join(map(repr, accepted))}{reason}, got {keywords[name]!r}")
    absent = {name for name in ("videos", "audio") if keywords.get(name) is None}  # named by apply_chat_template
    left = {name: value for name, value in keywords.items() if name not in {*SETTLED, *absent}}
    known = TextOptions.__dataclass_fields__
    return TextOptions(**{n: v for n, v in left.items() if n in known}), {
        n: v for n, v in left.items() if n not in known
    }


def collate(rows: list[dict], pad_id: int, options: TextOptions) -> BatchFeature:
    """Pad the rows' sequences on the right and concatenate everything else."""
    length = options.length([len(row["ids"]) for row in rows])

    def padded(name: str, fill: int) -> torch.Tensor:
        return torch.tensor([row[name] + [fill] * (length - len(row[name])) for row in rows])

    data: dict[str, Any] = {
        "input_ids": padded("ids", pad_id),
        "attention_mask": torch.tensor([[1] * len(r["ids"]) + [0] * (length - len(r["ids"])) for r in rows]),
        "token_roles": padded("roles", SHARED),
        "region_ids": padded("regions", -1),
        "num_regions": torch.tensor([row["num_regions"] for row in rows]),
        "sample_ids": torch.tensor([row["sample_id"] for row in rows]),
    }
    if any(row["grids"] for row in rows):
        data |= _images(rows)
    for key, name in (
        ("boxes", "region_boxes"),
        ("coverage", "region_coverage"),
        ("crops", "region_crops"),
        ("crop_boxes",) * 2,
        ("appearance", "region_appearance"),
        ("prompt_coverage",) * 2,
        ("prompt_ids",) * 2,
        ("order", "region_order"),
    ):
        if found := [row[key] for row in rows if key in row]:
            data[name] = torch.from_numpy(np.concatenate(found))
    if options.return_offsets_mapping:
        ends = [row["offsets"][-1][1] for row in rows]  # padding stands for no character
        data["offset_mapping"] = [
            row["offsets"] + [(end, end)] * (length - len(row["ids"])) for row, end in zip(rows, ends, strict=True)
        ]
    return BatchFeature(data)


def _images(rows: list[dict]) -> dict[str, torch.Tensor]:
    """Tiles, grids and sizes of every image once, and which rows share one."""
    data = {}
    first = _first_rows_of_images(rows)
    if len(set(first)) < len(rows):
        data["image_ids"] = torch.tensor(first).unique(return_inverse=True)[1]
    pictured = [rows[place] for place in sorted(set(first))]
    if tiles := [row["tiles"] for row in pictured if row["tiles"] is not None]:
        data["pixel_values"] = torch.from_numpy(np.concatenate(tiles))
    data["tile_grids"] = torch.tensor([grid for row in pictured for grid in row["grids"]])
    data["image_sizes"] = torch.tensor([size for row in pictured for size in row["sizes"]])
    return data


def _first_rows_of_images(rows: list[dict]) -> list[int]:
    """For every row the first one that shows the same image: groups of an image's regions share their tiles."""
    if not all(len(row["grids"]) == 1 and row["num_regions"] and row["tiles"] is not None for row in rows):
        return list(range(len(rows)))
    first: dict[int, int] = {}
    return [first.setdefault(id(row["tiles"]), place) for place, row in enumerate(rows)]
