"""The embedded default's tokenizer: a byte-level BPE learned from the drawn world, in LLaDA's chat format.

It carries the special-token names of LLaDA and PerceptionDLM, so the processor treats it like the 8B one; only the ids
differ. Deterministic: the same scenes give the same merges.
"""

from collections.abc import Iterable

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from perceptiondlm.drawn.scenes import draw_scene, scene_conversation
from perceptiondlm.evaluation.photos.colours import COLOUR_WORDS
from perceptiondlm.evaluation.photos.layout import COLUMNS, ROWS, SIZES, place_words
from perceptiondlm.prompting_perceptiondlm import (
    CAPTION_TOKEN,
    CHAT_TEMPLATE,
    END_OF_TEXT,
    END_OF_TURN,
    IMAGE_END,
    IMAGE_START,
    IMAGE_TOKEN,
    MASK_TOKEN,
    PROMPT_TOKEN,
    ROI_TOKEN,
)


# What PerceptionDLM adds to LLaDA's tokenizer, in the order of the released ids (126349 to 126374).
VISION_TOKENS = (IMAGE_TOKEN, IMAGE_START, IMAGE_END)
REGION_TOKENS = (
    *(CAPTION_TOKEN.format(i) for i in range(16)),
    *(PROMPT_TOKEN.format(i) for i in range(6)),
    "<NO_Prompt>",
)
SPECIAL_TOKENS = (
    "<|startoftext|>",
    END_OF_TEXT,
    *(ROI_TOKEN.format(i) for i in range(16)),
    MASK_TOKEN,
    "<|start_header_id|>",
    "<|end_header_id|>",
    END_OF_TURN,
    *VISION_TOKENS,
    *REGION_TOKENS,
)


def scene_texts(seed: int, num_images: int) -> Iterable[str]:
    """Captions, questions and answers of drawn scenes, and the fixed turns of the region prompt."""
    yield "system\nYou are a helpful assistant.\nuser\nDescribe each masked region in detail.\nassistant\n"
    for index in range(num_images):
        scene = draw_scene(seed, index)
        yield from (item.caption for item in scene.objects)
        yield from (f"{question}\n{answer}" for question, answer in scene_conversation(scene))


def colour_texts(repeats: int = 100) -> Iterable[str]:
    """What captions of named regions say beside the name: colours, sizes and places, each word frequent enough to be
    a token of its own.
    """
    places = " ".join(place_words(row, column) for row in filter(None, ROWS) for column in filter(None, COLUMNS))
    sizes = " ".join(word for _, word in SIZES)
    text = f", {' and '.join(COLOUR_WORDS)}, {sizes}, {places}, in the middle"
    yield from (text for _ in range(repeats))


def special_token_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int | list[int]]:
    """The id fields of `PerceptionDLMConfig` as this tokenizer has them; region tokens it lacks are left out.

    Raises:
        ValueError: if it lacks a token that every model needs.
    """
    vocabulary = tokenizer.get_vocab()
    missing = [token for token in (IMAGE_TOKEN, MASK_TOKEN, END_OF_TURN, END_OF_TEXT) if token not in vocabulary]
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"]
    if missing or len(newline) != 1:
        raise ValueError(f"the tokenizer lacks {missing or 'a single token for the newline'}")
    ids: dict[str, int | list[int]] = {
        "image_token_id": vocabulary[IMAGE_TOKEN],
        "mask_token_id": vocabulary[MASK_TOKEN],
        "newline_token_id": newline[0],
        "end_of_turn_token_id": vocabulary[END_OF_TURN],
        "end_of_text_token_id": vocabulary[END_OF_TEXT],
    }
    for field, name in (("roi_token_ids", ROI_TOKEN), ("caption_token_ids", CAPTION_TOKEN)):
        tokens = [name.format(i) for i in range(16)]
        if all(token in vocabulary for token in tokens):
            ids[field] = [vocabulary[token] for token in tokens]
    return ids


def build_tokenizer(
    texts: Iterable[str], vocab_size: int, max_length: int, phrases: Iterable[str] = ()
) -> PreTrainedTokenizerFast:
    """Learn a byte-level BPE of at most `vocab_size` entries, special tokens included (they take the last ids).

    Args:
        phrases: each becomes one token behind those, whole words only. A name with its article is one: which name a
            caption begins with is then one decision among all of them, not first one between "a" and "an".
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.add_tokens([AddedToken(phrase, single_word=True, normalized=False) for phrase in phrases])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|startoftext|>",
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        mask_token=MASK_TOKEN,
        additional_special_tokens=[t for t in SPECIAL_TOKENS if t not in ("<|startoftext|>", END_OF_TEXT, MASK_TOKEN)],
        chat_template=CHAT_TEMPLATE,
        model_max_length=max_length,
    )
