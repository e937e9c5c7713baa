"""A judge of any provider that LiteLLM knows: Anthropic, Gemini, Bedrock, Vertex and others (extra ``litellm``)."""

import json
import os
from collections.abc import Mapping
from typing import Any

from perceptiondlm.evaluation.judges.asking import AskingJudge, TryAgain, checked_text, refusal, retry_after
from perceptiondlm.evaluation.judges.cache import Answer
from perceptiondlm.evaluation.judges.chat import Prompt


INSTALL = "pip install 'perceptiondlm[litellm]'"


class LiteLLMJudge(AskingJudge):
    """Asks by way of `litellm.completion`; see `AskingJudge` for retries and the other arguments.

    Settings that a model does not know are left out by LiteLLM (``drop_params``), which also renames ``max_tokens``.

    Args:
        model: LiteLLM's name of it, such as ``anthropic/claude-sonnet-4-5``; keys are read from the environment.
        base_url: of a server of one's own.
        max_tokens: longest answer, in tokens; 300 as published.
        extra_body: further arguments of ``litellm.completion``, part of the settings; None removes one.

    Raises:
        ImportError: LiteLLM is not installed.
    """

    def __init__(
        self,
        model: str,
        *,
        base_url: str | None = None,
        max_tokens: int = 300,
        extra_body: Mapping[str, Any] | None = None,
        **asking: Any,
    ) -> None:
        os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # importing it fetches nothing
        try:
            import litellm
            import openai
        except ImportError as error:
            raise ImportError(f"judge litellm:{model} needs LiteLLM: {INSTALL}") from error
        if max_tokens <= 0:
            raise ValueError(f"max_tokens must be positive, got {max_tokens}")
        settings = {"model": model, "max_tokens": max_tokens, "temperature": 0.0, **(extra_body or {})}
        settings = {name: value for name, value in settings.items() if value is not None}
        super().__init__(settings, base_url or f"litellm:{model}", **asking)
        self.base_url = base_url
        self._completion, self._failure = litellm.completion, openai.APIError  # LiteLLM's errors are kinds of these

    def _send(self, prompt: Prompt) -> Answer:
        content: Any = prompt.text
        if prompt.pictures is not None:
            content = [*json.loads(b"[%b]" % prompt.pictures.message_parts()), {"type": "text", "text": prompt.text}]
        once = {"num_retries": 0, "max_retries": 0, "timeout": self.timeout, "drop_params": True}
        try:
            reply = self._completion(
                messages=[{"role": "user", "content": content}], base_url=self.base_url, **once, **self.settings
            )
        except self._failure as error:
            raise self._meaning(error) from error
        choice = reply.choices[0]
        text = checked_text(choice.message.content, choice.finish_reason, str(reply))
        usage = getattr(reply, "usage", None)
        return Answer(text, getattr(usage, "prompt_tokens", 0) or 0, getattr(usage, "completion_tokens", 0) or 0)

    def _meaning(self, error: Any) -> Exception:
        """Whether a failure may pass: without a status of the provider's own, it is the connection's."""
        status, said = getattr(error, "status_code", None), f"{type(error).__name__}: {str(error)[:300]}"
        response = getattr(error, "response", None)
        headers = {} if response is None else response.headers
        if status is None or type(error).__name__ in ("APIConnectionError", "Timeout"):
            return TryAgain(said)
        pause = retry_after(headers.get("Retry-After", ""))
        return refusal(status, getattr(error, "code", None), said, self.place, "the environment", pause)
