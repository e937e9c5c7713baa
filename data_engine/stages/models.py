"""Language models for stages by name, with all answers kept; the names are those of `evaluation.judges.registry`."""

from collections.abc import Mapping
from typing import Any

from perceptiondlm.evaluation.judges.chat import ChatJudge
from perceptiondlm.evaluation.judges.registry import make_judge


CHAT = ("openai", "azure", "litellm", "transformers")


def check_model(stage: str, spec: str, others: tuple[str, ...]) -> None:
    """Raise ValueError for a name that is neither one of `others` nor a chat model's."""
    kind, _, what = spec.partition(":")
    if spec not in others and not (kind in CHAT and what):
        accepted = ", ".join((*others, *(f"{kind}:MODEL" for kind in CHAT)))
        raise ValueError(f"{stage}: the model {spec!r} is none of {accepted}")


def chat_model(spec: str, options: Mapping[str, Any]) -> ChatJudge:
    """A chat model by name.

    Args:
        spec: such as ``"openai:Qwen3-8B"``.
        options: see `make_judge`: ``base_url``, ``cache``, ``concurrency``, ``max_tokens``, …

    Raises:
        ValueError, TypeError: the name or an option is wrong; a key is missing.
    """
    model = make_judge(spec, **options)
    if not isinstance(model, ChatJudge):
        raise ValueError(f"{spec!r} is no chat model; accepted: {', '.join(f'{kind}:MODEL' for kind in CHAT)}")
    return model
