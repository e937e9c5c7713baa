"""The model class that lmms-eval runs; what it runs: `tasks.py`.

    pip install "perceptiondlm[lmms-eval]"
    lmms-eval --model perceptiondlm --model_args pretrained=models/base --tasks mmstar,chartqa --batch_size 8

lmms-eval finds the class through the entry point `lmms_eval.models`. This module needs lmms-eval; nothing else in the
package imports it.
"""

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from tqdm.auto import tqdm
from transformers import AutoModel, AutoProcessor

from perceptiondlm.common.loading import from_checkpoint
from perceptiondlm.evaluation.general.tasks import SETTINGS, cut, task_settings


def manifest() -> ModelManifest:
    """What the entry point registers."""
    return ModelManifest(model_id="perceptiondlm", chat_class_path=f"{__name__}.{PerceptionDLM.__name__}")


class PerceptionDLM(lmms):
    """Answers questions about images, in batches.

    Args (`--model_args`):
        pretrained: directory or Hub id.
        device, dtype: by default an accelerator if there is one, and the checkpoint's dtype.
        batch_size: questions answered together.
        max_tiles: tiles an image is cut into at most; by default the processor's.
        max_new_tokens, steps, block_length, sampler, ...: decoding of every task, instead of the paper's.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        device: str | None = None,
        dtype: str = "auto",
        batch_size: int | str = 1,
        max_tiles: int | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        unknown = sorted(set(settings) - set(SETTINGS) - {"max_batch_size"})
        if unknown:
            raise ValueError(f"unknown model_args {unknown}; settings are {SETTINGS}")
        self.batch_size = int(batch_size)
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.settings = {name: value for name, value in settings.items() if name in SETTINGS and value is not None}
        self.accelerator = Accelerator(cpu=not torch.accelerator.is_available())
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.device = self.accelerator.device if device is None or self._world_size > 1 else torch.device(device)
        self.processor = from_checkpoint(AutoProcessor, pretrained)
        self.processor.image_processor = self.processor.image_processor.with_settings(max_tiles=max_tiles)
        model = from_checkpoint(AutoModel, pretrained, dtype=dtype)
        self.model = model.to(self.device).eval()

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """One answer per request, in the order of the requests; requests decoded alike share batches."""
        answers: list[str] = [""] * len(requests)
        alike: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            _, _, kwargs, _, task, _ = request.args
            alike.setdefault(repr(sorted(task_settings(task, kwargs, self.settings).items())), []).append(index)
        with tqdm(total=len(requests), desc="answering", disable=self.rank != 0) as bar:
            for indices in alike.values():
                for start in range(0, len(indices), self.batch_size):
                    batch = indices[start : start + self.batch_size]
                    for index, text in zip(batch, self._answer([requests[i].args for i in batch]), strict=True):
                        answers[index] = text
                        context, _, kwargs, *_ = requests[index].args
                        self.cache_hook.add_partial("generate_until", (context, kwargs), text)
                    bar.update(len(batch))
        return answers

    def _answer(self, batch: Sequence[tuple]) -> list[str]:
        """Answers to a batch of requests that are decoded alike."""
        _, _, kwargs, _, task, _ = batch[0]
        conversations = [
            self._conversation(to_messages(self.task_dict[name][split][doc_id]), f"document {doc_id} of {name}")
            for _, to_messages, _, doc_id, name, split in batch
        ]
        inputs = self.processor.apply_chat_template(
            conversations, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        output = self.model.generate(**inputs.to(self.device), **task_settings(task, kwargs, self.settings))
        texts = self.processor.post_process_image_text_to_text(output)
        return [cut(text, request[2].get("until")) for text, request in zip(texts, batch, strict=True)]

    @staticmethod
    def _conversation(messages: Sequence[dict[str, Any]], name: str) -> list[dict[str, Any]]:
        """lmms-eval's messages as the chat template takes them."""

        def part(content: dict[str, Any]) -> dict[str, Any]:
            if content["type"] == "text":
                return {"type": "text", "text": content["text"]}
            if content["type"] == "image":
                return {"type": "image", "image": content["url"]}
            raise ValueError(f"{name} contains {content['type']}; accepted: text and images")

        return [
            {"role": message["role"], "content": [part(content) for content in message["content"]]}
            for message in messages
        ]

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Not defined: a diffusion model gives no exact likelihood of a text."""
        raise NotImplementedError("a diffusion model gives no exact likelihood: choose a task that generates answers")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Not offered: none of the sixteen benchmarks needs it."""
        raise NotImplementedError("tasks of several rounds are not supported")
