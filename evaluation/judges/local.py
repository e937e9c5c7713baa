"""A local chat model as judge, such as Qwen3 or Llama, through transformers; it reads text alone."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from perceptiondlm.evaluation.judges.cache import Answer
from perceptiondlm.evaluation.judges.chat import ChatJudge, Prompt


class TransformersJudge(ChatJudge):
    """Answers greedily, in batches; the model is loaded when the first question is not in the cache.

    Args:
        path: folder or Hub id of a chat model.
        cache, prices: see `ChatJudge`.
        batch_size: questions at once.
        max_tokens: longest answer, in tokens.
        device: such as ``"cuda:1"``; default: the first GPU, else the CPU.
        dtype: of the weights, such as ``"bfloat16"``; default: as stored.
        revision: commit, tag or branch on the Hub.
    """

    def __init__(
        self,
        path: str,
        *,
        cache: str | Path | None = None,
        prices: tuple[float, float] | None = None,
        batch_size: int = 16,
        max_tokens: int = 300,
        device: str | None = None,
        dtype: str = "auto",
        revision: str | None = None,
    ) -> None:
        for name, value in {"batch_size": batch_size, "max_tokens": max_tokens}.items():
            if value <= 0:
                raise ValueError(f"{name} must be positive, got {value}")
        settings = {"model": path, "revision": revision, "max_tokens": max_tokens, "temperature": 0.0, "dtype": dtype}
        super().__init__(settings, cache, prices)
        self.batch_size = batch_size
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer, padding on the left."""
        tokenizer = AutoTokenizer.from_pretrained(
            self.settings["model"], revision=self.settings["revision"], padding_side="left"
        )
        if tokenizer.chat_template is None:
            raise ValueError(f"{self.settings['model']} has no chat template: it is not a chat model")
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    @cached_property
    def model(self) -> Any:
        """The model, in eval mode on its device."""
        loaded = AutoModelForCausalLM.from_pretrained(
            self.settings["model"], revision=self.settings["revision"], dtype=self.settings["dtype"]
        )
        return loaded.to(self.device).eval()

    def try_out(self, show_image: bool = False) -> None:
        """Load the tokenizer: the path is right, and it is a chat model's."""
        _ = self.tokenizer

    def _ask(self, prompts: Sequence[Prompt]) -> None:
        for start in tqdm(range(0, len(prompts), self.batch_size), desc="local judge", leave=False):
            batch = prompts[start : start + self.batch_size]
            with self.cache.claim(*(prompt.key for prompt in batch)):
                batch = [prompt for prompt in batch if self.cache.get(prompt.key) is None]
                for prompt, answer in zip(batch, self._generate(batch), strict=True):
                    self._store(prompt, answer)

    @torch.inference_mode()
    def _generate(self, prompts: Sequence[Prompt]) -> list[Answer]:
        """Greedy answers to one batch."""
        if not prompts:
            return []
        chats = [[{"role": "user", "content": self._as_text(prompt.text)}] for prompt in prompts]
        inputs = self.tokenizer.apply_chat_template(
            chats,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            padding=True,
            enable_thinking=False,  # Qwen3's template reads it, others do not
        ).to(self.device)
        output = self.model.generate(
            **inputs,
            max_new_tokens=self.settings["max_tokens"],
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=self.tokenizer.pad_token_id,
        )  # (batch, prompt + answer)
        answers = output[:, inputs["input_ids"].shape[1] :]
        return [
            Answer(text, int(mask.sum()), int((ids != self.tokenizer.pad_token_id).sum()))
            for text, mask, ids in zip(
                self.tokenizer.batch_decode(answers, skip_special_tokens=True),
                inputs["attention_mask"],
                answers,
                strict=True,
            )
        ]

    def _as_text(self, text: str) -> str:
        """The text with special tokens spelled out in it taken apart, so that a caption cannot end the turn."""
        for token in self.tokenizer.all_special_tokens:
            text = text.replace(token, " ".join(token))
        return text
