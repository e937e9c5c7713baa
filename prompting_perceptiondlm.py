"""Prompts: the chat format, text to token ids, and the sequence that holds an image's regions.

A user's text stays text: special tokens in it are encoded in pieces, so that they cannot open a turn or stand for an
image. `guarded` marks where such tokens must be broken; `encode` breaks them, and drops the marks.

Ids and roles are documented in processing_perceptiondlm.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from .configuration_perceptiondlm import LAYOUTS, PerceptionDLMConfig, num_tiles
from .sequence_perceptiondlm import ROI, SEPARATOR, SHARED


IMAGE_TOKEN, IMAGE_START, IMAGE_END = "<IMG_CONTEXT>", "<img>", "</img>"
ROI_TOKEN, CAPTION_TOKEN, PROMPT_TOKEN = "<|reserved_token_{}|>", "<|Mask_Cap_{}|>", "<Prompt{}>"
MASK_TOKEN, END_OF_TURN, END_OF_TEXT = "<|mdm_mask|>", "<|eot_id|>", "<|endoftext|>"
GUARD = "\ufdd0"  # a code point that Unicode keeps out of texts
IMAGE_SOURCES = ("image", "url", "path", "base64")  # keys of an image part
Offsets = list[tuple[int, int]]

# LLaDA's chat format. Images stand where the message puts them; an assistant header is opened on request. `generation`
# marks what the assistant says: `return_assistant_tokens_mask` and training find the answers by it. The variants of
# other checkpoints are built in checkpoints/.
CHAT_TEMPLATE = (
    "{% macro body(content) %}{% if content is string %}{{ content }}{% else %}{% for part in content %}"
    "{% if part['type'] == 'image' %}{{ '<img><IMG_CONTEXT></img>' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{% endmacro %}"
    "{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>{{ '\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ body(message['content']) }}<|eot_id|>{% endgeneration %}"
    "{% else %}{{ body(message['content']) }}<|eot_id|>{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>{{ '\\n' }}{% endif %}"
)


def special_tokens(tokenizer) -> re.Pattern:
    """Whatever a tokenizer recognises as one token before it looks at words."""
    tokens = sorted((token for token in tokenizer.added_tokens_encoder if len(token) > 1), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, tokens)) or "(?!)")


def guarded(text: str, tokenizer) -> str:
    """A text with a mark inside every special token."""
    tokens, pieces, start = special_tokens(tokenizer), [], 0
    text = text.replace(GUARD, "")
    while found := tokens.search(text, start):
        pieces.append(text[start : found.start() + 1])
        start = found.start() + 1
    return GUARD.join((*pieces, text[start:]))


def encode(text: str, tokenizer) -> tuple[list[int], Offsets]:
    """Token ids of a text, broken at its marks, and the characters (start, end) that each token stands for."""
    ids: list[int] = []
    offsets: Offsets = []
    start = 0
    for piece in text.split(GUARD):
        encoded = tokenizer(piece, add_special_tokens=False, return_offsets_mapping=True)
        ids += encoded["input_ids"]
        offsets += [(start + first, start + last) for first, last in encoded["offset_mapping"]]
        start += len(piece) + len(GUARD)
    return ids, offsets


def is_rendered(text: str, tokenizer) -> bool:
    """Whether a text is a prompt that a chat template has written: it begins with a special token."""
    return special_tokens(tokenizer).match(text) is not None


def expand_images(
    encoded: tuple[list[int], Offsets],
    grids: Sequence[tuple[int, int]],
    config: PerceptionDLMConfig,
    tokenizer,
    name: str,
) -> tuple[list[int], Offsets]:
    """Repeat every image placeholder for each token of its tiles."""
    image_token = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    places = encoded[0].count(image_token)
    if places != len(grids):
        raise ValueError(f"{name} has {places} image placeholders ({IMAGE_TOKEN}) for {len(grids)} images")
    sizes = iter(config.image_tokens(num_tiles(grid)) for grid in grids)
    repeats = [next(sizes) if token == image_token else 1 for token in encoded[0]]
    pairs = [pair for pair, count in zip(zip(*encoded, strict=True), repeats, strict=True) for _ in range(count)]
    return [token for token, _ in pairs], [place for _, place in pairs]


def shared_row(ids: list[int]) -> dict[str, Any]:
    """Tokens that belong to no region, with their roles and region ids."""
    return {"ids": ids, "roles": [SHARED] * len(ids), "regions": [-1] * len(ids), "num_regions": 0}


def region_row(
    head: list[int], after: list[int], prompt_ids: Sequence[int], config: PerceptionDLMConfig, tokenizer
) -> dict[str, Any]:
    """Shared tokens with the regions' RoI spans between them: ids, roles and region ids."""
    ids, roles, regions = list(head), [SHARED] * len(head), [-1] * len(head)
    newline = encode("\n", tokenizer)[0]
    layout, size = LAYOUTS[config.attention_layout], config.roi_size**2
    numbers = range(len(prompt_ids)) if layout.numbered_by_place else prompt_ids
    for region, number in enumerate(numbers if config.use_roi_replay else ()):
        place = number if config.region_conditioning == "vision" else 0
        ids += [tokenizer.convert_tokens_to_ids(ROI_TOKEN.format(place))] * size + newline
        roles += [ROI] * size + [SEPARATOR] * len(newline)
        regions += [region] * (size + len(newline))
    if config.use_roi_replay and layout.last_separator_shared:
        roles[-len(newline) :], regions[-len(newline) :] = [SHARED] * len(newline), [-1] * len(newline)
    ids, roles, regions = ids + after, roles + [SHARED] * len(after), regions + [-1] * len(after)
    return {"ids": ids, "roles": roles, "regions": regions, "num_regions": len(prompt_ids)}


def chats_of(conversation: Any) -> tuple[list[Any], bool]:
    """One conversation or a list of them as a list, and whether it was a list of them."""
    conversation = getattr(conversation, "messages", conversation)
    if not isinstance(conversation, (list, tuple)) or not conversation:
        found = "empty" if isinstance(conversation, (list, tuple)) else f"a {type(conversation).__name__}"
        raise ValueError(f"the conversation is {found}; accepted: a list of messages, or a list of such lists")
    batched = isinstance(conversation[0], (list, tuple)) or hasattr(conversation[0], "messages")
    return (list(conversation) if batched else [conversation]), batched


def chat_messages(conversation: Any, write: Callable[[str], str]) -> list[dict[str, Any]]:
    """A conversation for the template: every image part with one source that `load_image` reads.

    Args:
        write: what is made of every text, such as `guarded` of it.
    """
    conversation = getattr(conversation, "messages", conversation)
    if not isinstance(conversation, (list, tuple)) or not conversation:
        raise ValueError(f"a conversation is {conversation!r:.80}; accepted: a list of messages, one at least")
    messages = []
    for index, message in enumerate(map(_as_dict, conversation)):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(f"message {index} is {message!r:.80}; accepted: a dict with role and content")
        content = message.get("content")
        if isinstance(content, str):
            content = write(content)
        elif isinstance(content, (list, tuple)):
            content = [_part(part, write) for part in content]
        else:
            raise ValueError(f"message {index} has content {content!r:.80}; accepted: a text or a list of parts")
        messages.append({**message, "role": write(message["role"]), "content": content})
    return messages


def _as_dict(value: Any) -> Any:
    """The dict of a message or part that is an object: a dataclass or a pydantic model."""
    if is_dataclass(value) and not isinstance(value, type):
        return {item.name: getattr(value, item.name) for item in fields(value)}
    return value.model_dump() if hasattr(value, "model_dump") else value


def _part(part: Any, write: Callable[[str], str]) -> dict[str, Any]:
    part = _as_dict(part)
    if not isinstance(part, Mapping):
        raise TypeError(f"a part of a message is a {type(part).__name__}; accepted: dicts with a type")
    kind = part.get("type")
    if kind == "text" and isinstance(part.get("text"), str):
        return {**part, "text": write(part["text"])}
    if kind == "image_url":  # as other chat interfaces write it
        source = part.get("image_url")
        return {"type": "image", "image": source.get("url") if isinstance(source, Mapping) else source}
    if kind != "image":
        raise ValueError(f"a part of a message has type {kind!r} and {sorted(map(str, part))}; accepted: text, image")
    given = [key for key in IMAGE_SOURCES if part.get(key) is not None]
    if len(given) > 1:
        raise ValueError(f"an image part has {given}; accepted: one of {IMAGE_SOURCES}, or none with images beside")
    source = part[given[0]] if given else None
    if given == ["base64"] and isinstance(source, str) and not source.lower().startswith("data:"):
        source = f"data:;base64,{source}"
    return {"type": "image", "image": source} if given else {"type": "image"}
