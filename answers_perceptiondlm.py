"""Answers on both sides of the model: texts to training targets, generated ids to texts with scores."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from .prompting_perceptiondlm import END_OF_TEXT, END_OF_TURN, encode


def encode_answers(
    answers: Sequence[str], tokenizer, num_slots: int, max_slots: int | None = None, cut: bool = False
) -> torch.Tensor:
    """Answers as training targets, each ended by the end-of-turn token and filled with end-of-text tokens.

    Args:
        num_slots: an answer takes the smallest multiple of this many slots that holds it and its end.
        max_slots: most slots of an answer, by default `num_slots`; one that fills them has no end.
        cut: shorten longer answers instead of refusing them.
    Returns:
        (A, G) ids, G the most slots of any answer; -100 behind the slots of the others.
    Raises:
        ValueError: naming an answer that is too long or empty.
    """
    limit = max_slots or num_slots
    end, fill = tokenizer.convert_tokens_to_ids([END_OF_TURN, END_OF_TEXT])
    targets = []
    for index, answer in enumerate(answers):
        ids, _ = encode(answer, tokenizer)
        if not ids or (len(ids) > limit and not cut):
            raise ValueError(f"answer {index} has {len(ids)} tokens, accepted are 1 to {limit}: {answer[:80]!r}")
        slots = min(-(-(len(ids) + 1) // num_slots) * num_slots, limit)
        ids = [*ids, end][:slots]
        targets.append(torch.tensor(ids + [fill] * (slots - len(ids))))
    return torch.nn.utils.rnn.pad_sequence(targets, batch_first=True, padding_value=-100)


def decode_answers(output, tokenizer, calibration: Sequence[float] | None = None) -> list[dict[str, Any]]:
    """Every answer's text up to its end token and its score, the mean probability of the tokens it is made of.

    Args:
        calibration: slope and intercept that bring the score's log-odds to those of the answer being true.
    Returns:
        one `{"text": str, "score": float in [0, 1], "sample": int}` per answer, in the output's order.
    """
    ends = set(tokenizer.convert_tokens_to_ids([END_OF_TURN, END_OF_TEXT]))
    answers = []
    for ids, confidences, sample in zip(
        output.sequences.tolist(), output.confidences.tolist(), output.sample_ids.tolist(), strict=True
    ):
        length = next((i for i, token in enumerate(ids) if token in ends), len(ids))
        used = confidences[: length + 1]  # the end token is part of the decision
        text = tokenizer.decode(ids[:length], skip_special_tokens=True).strip()
        score = calibrated(sum(used) / len(used), calibration)
        answers.append({"text": text, "score": score, "sample": sample})
    return answers


def calibrated(score: float, calibration: Sequence[float] | None) -> float:
    """A score in [0, 1] whose log-odds went through slope and intercept (Platt scaling)."""
    if calibration is None:
        return score
    slope, intercept = calibration
    return 1 / (1 + math.exp(-(slope * log_odds(score) + intercept)))


def log_odds(score: float, margin: float = 1e-6) -> float:
    """Of a score in [0, 1], finite."""
    inside = min(max(score, margin), 1 - margin)
    return math.log(inside / (1 - inside))
