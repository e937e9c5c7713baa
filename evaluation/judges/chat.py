"""What judges that are language models share: prompts, cached answers, and counts of questions and tokens."""

import re
import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.constants import HF_HOME

from perceptiondlm.evaluation.judges.cache import Answer, AnswerCache, answer_key
from perceptiondlm.evaluation.judges.errors import JudgeError
from perceptiondlm.evaluation.judges.pictures import Pictures
from perceptiondlm.evaluation.questions import question_prompt
from perceptiondlm.evaluation.scoring import JudgeRequest


DEFAULT_CACHE = Path(HF_HOME) / "perceptiondlm" / "judge_answers.jsonl"

_THINKING = re.compile(r"^\s*<think>.*?</think>", re.DOTALL)


@dataclass(frozen=True)
class Prompt:
    """What a judge is asked.

    Attributes:
        region_id: for messages.
        text: see `questions.question_prompt`.
        pictures: the region's crop and mask, if the judge is to see them.
        key: the answer's key in the cache.
    """

    region_id: str
    text: str
    pictures: Pictures | None
    key: str


@dataclass
class JudgeUsage:
    """What judging took.

    Attributes:
        answers: different questions answered.
        prompt_tokens, completion_tokens: what they took, whenever they were asked.
        new_answers: those among them that were asked now and not taken from the cache.
        new_prompt_tokens, new_completion_tokens: what these took.
    """

    answers: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    new_answers: int = 0
    new_prompt_tokens: int = 0
    new_completion_tokens: int = 0


class ChatJudge(ABC):
    """A language model as judge: one message per question, every answer cached the moment it arrives.

    A subclass asks the questions that are not in the cache.

    Args:
        settings: what determines an answer beside prompt and images, JSON-ready; "model" among it.
        cache: file of answers, see ``answer_cache.py``; default `DEFAULT_CACHE`.
        prices: price of a million prompt tokens and of a million completion tokens, in any currency.
    """

    sees_image = False

    def __init__(
        self,
        settings: Mapping[str, Any],
        cache: str | Path | None = None,
        prices: tuple[float, float] | None = None,
    ) -> None:
        self.settings = dict(settings)
        self.cache = AnswerCache(cache or DEFAULT_CACHE)
        self.prices = prices
        self.usage = JudgeUsage()
        self._counted: set[str] = set()
        self._counting = threading.Lock()

    @abstractmethod
    def _ask(self, prompts: Sequence[Prompt]) -> None:
        """Get the answer to each of these different questions into the cache, each claimed before it is asked."""

    def __call__(self, requests: Sequence[JudgeRequest]) -> list[str]:
        """Answer every request, from the cache where it can.

        Raises:
            JudgeError: the model cannot be asked, or gives no answer.
        """
        return self._answers(self._prompts(requests))

    def try_out(self, show_image: bool = False) -> None:  # noqa: B027
        """Find out cheaply whether the judge can be asked at all, before what it judges is made.

        Raises:
            JudgeError, ValueError: it cannot, and why.
        """

    def answer_texts(
        self, texts: Sequence[str], names: Sequence[str], pictures: Sequence[Pictures | None] | None = None
    ) -> list[str]:
        """Answers to free prompts, as a call gives them; messages say `names` for region ids.

        Args:
            pictures: what is shown with each; default: nothing.

        Raises:
            ValueError: there are pictures, and the model reads text alone.
        """
        shown = [None] * len(texts) if pictures is None else pictures
        if any(shown) and not self.sees_image:
            raise ValueError(f"{self.settings['model']} reads text alone, and is to be shown pictures")
        return self._answers([self._prompt(*one) for one in zip(names, texts, shown, strict=True)])

    def _answers(self, prompts: Sequence[Prompt]) -> list[str]:
        missing = {prompt.key: prompt for prompt in prompts if self.cache.get(prompt.key) is None}
        if missing:
            self._ask(list(missing.values()))
        return [self._answer(prompt) for prompt in prompts]

    def report(self) -> dict[str, Any]:
        """Settings, counts and, where prices are known, costs; JSON-ready."""
        usage = self.usage
        costs = {}
        if self.prices is not None:
            costs["cost"] = self._cost(usage.prompt_tokens, usage.completion_tokens)
            costs["new_cost"] = self._cost(usage.new_prompt_tokens, usage.new_completion_tokens)
        return {**self.settings, **vars(usage), **costs}

    def _cost(self, prompt_tokens: int, completion_tokens: int) -> float:
        per_prompt, per_completion = self.prices or (0.0, 0.0)
        return (prompt_tokens * per_prompt + completion_tokens * per_completion) / 1_000_000

    def _prompts(self, requests: Sequence[JudgeRequest]) -> list[Prompt]:
        """The requests as prompts; those with the same image and mask share them."""
        shared: dict[tuple[int, int], Pictures | None] = {}
        prompts = []
        for request in requests:
            pair = (id(request.image), id(request.mask))
            if pair not in shared:
                shared[pair] = self._pictures(request)
            text = question_prompt(request.caption, request.question, with_image=shared[pair] is not None)
            prompts.append(self._prompt(request.region_id, text, shared[pair]))
        return prompts

    def _prompt(self, region_id: str, text: str, pictures: Pictures | None) -> Prompt:
        key = answer_key(settings=self.settings, text=text, images=[] if pictures is None else pictures.hashes)
        return Prompt(region_id, text, pictures, key)

    def _pictures(self, request: JudgeRequest) -> Pictures | None:
        if request.image is None or request.mask is None:
            return None
        if not self.sees_image:
            raise ValueError(f"region {request.region_id!r} comes with an image, but this judge reads text alone")
        return Pictures(request.image, request.mask)

    def _answer(self, prompt: Prompt) -> str:
        """The cached answer, without what a reasoning model thought aloud; counts it."""
        answer = self.cache.get(prompt.key)
        if answer is None:
            raise JudgeError(f"no answer about region {prompt.region_id!r} has reached {self.cache.path}")
        if prompt.key not in self._counted:
            self._counted.add(prompt.key)
            self.usage.answers += 1
            self.usage.prompt_tokens += answer.prompt_tokens
            self.usage.completion_tokens += answer.completion_tokens
        return without_thinking(answer.text)

    def _store(self, prompt: Prompt, answer: Answer) -> None:
        """Keep a new answer."""
        self.cache.add(prompt.key, answer, self.settings["model"])
        with self._counting:
            self.usage.new_answers += 1
            self.usage.new_prompt_tokens += answer.prompt_tokens
            self.usage.new_completion_tokens += answer.completion_tokens


def without_thinking(text: str) -> str:
    """An answer without a leading ``<think> … </think>``."""
    return _THINKING.sub("", text).strip()
