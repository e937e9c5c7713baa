"""The model class that lmms-eval runs, and the paper's sixteen general benchmarks (Table 1).

    pip install "perceptiondlm[lmms-eval]"
    lmms-eval --model perceptiondlm --model_args pretrained=models/base --tasks mmstar,chartqa --batch_size 8

lmms-eval finds the class through the entry point `lmms_eval.models`. This module needs lmms-eval; nothing else in the
package imports it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from tqdm.auto import tqdm
from transformers import AutoModel, AutoProcessor


# Decoding of the paper's evaluation (released configuration): an option's letter or yes/no in 2 tokens, a short answer
# in 128, and reasoning in 256 tokens from left to right, one at a time.
LETTER = {"max_new_tokens": 2, "steps": 2}
SHORT_ANSWER = {"max_new_tokens": 128, "steps": 128}
REASONING = {"max_new_tokens": 256, "steps": 256, "sampler": "left_to_right"}
# Tasks that are not among the sixteen: as many steps as tokens, in blocks.
DEFAULT_TOKENS = 64
BLOCK_LENGTH = 64

SETTINGS = ("max_new_tokens", "steps", "block_length", "sampler", "threshold", "entropy_bound", "temperature", "seed")
IGNORED = ("do_sample", "num_beams", "top_p", "top_k", "image_aspect_ratio", "until")  # `until` is applied to the text


@dataclass(frozen=True)
class GeneralBenchmark:
    """One of the sixteen: its row in Table 1, lmms-eval's task and metric, and how answers are decoded.

    `pattern` matches the names of all tasks that are decoded like it (a group's members, other prompts).
    """

    row: str
    task: str
    metric: str
    settings: dict[str, Any]
    pattern: str


BENCHMARKS = (
    GeneralBenchmark("MMStar", "mmstar", "average", LETTER, "mmstar"),
    GeneralBenchmark("SeedBench", "seedbench", "seed_image", LETTER, "seedbench"),
    GeneralBenchmark("MMBench", "mmbench_en_dev", "gpt_eval_score", LETTER, "mmbench_en_dev*"),
    GeneralBenchmark("MMMU", "mmmu_val", "mmmu_acc", LETTER, "mmmu_val"),
    GeneralBenchmark("MathVista", "mathvista_testmini_format", "llm_as_judge_eval", REASONING, "mathvista_test*"),
    GeneralBenchmark(
        "MathVerse (Vision Only)", "mathverse_testmini_vision_only", "gpt_eval_score", REASONING, "mathverse_test*"
    ),
    GeneralBenchmark("AI2D", "ai2d", "exact_match", LETTER, "ai2d*"),
    GeneralBenchmark("ChartQA", "chartqa", "relaxed_overall", SHORT_ANSWER, "chartqa*"),
    GeneralBenchmark("DocVQA", "docvqa_val", "anls", SHORT_ANSWER, "docvqa*"),
    GeneralBenchmark("InfoVQA", "infovqa_val", "anls", SHORT_ANSWER, "infovqa*"),
    GeneralBenchmark("MMVP", "mmvp", "mmvp_accuracy", LETTER, "mmvp"),
    GeneralBenchmark("BLINK", "blink", "blink_acc", LETTER, "blink*"),
    GeneralBenchmark("RealWorldQA", "realworldqa", "exact_match", LETTER, "realworldqa"),
    GeneralBenchmark("CV-Bench-2D", "cv_bench_2d", "cv_bench_acc", LETTER, "cv_bench*"),
    GeneralBenchmark("HallusionBench", "hallusion_bench_image", "aAcc", LETTER, "hallusion_bench*"),
    GeneralBenchmark("V*", "vstar_bench", "vstar_overall_acc", LETTER, "vstar_bench*"),
)


def manifest() -> ModelManifest:
    """What the entry point registers."""
    return ModelManifest(model_id="perceptiondlm", chat_class_path=f"{__name__}.{PerceptionDLM.__name__}")


def task_settings(task: str, task_kwargs: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """How a task's answers are decoded: the paper's way where it has one, else the task's length in blocks.

    Args:
        task: lmms-eval's name of it.
        task_kwargs: its `generation_kwargs`; keywords of autoregressive decoding are left aside.
        overrides: settings given in `--model_args`; they come first.
    Raises:
        ValueError: a keyword that is neither a setting nor known to mean nothing here, or more than one beam.
    """
    unknown = sorted(set(task_kwargs) - set(SETTINGS) - set(IGNORED))
    if unknown:
        raise ValueError(f"task {task} asks for generation keywords {unknown}; known are {[*SETTINGS, *IGNORED]}")
    if (task_kwargs.get("num_beams") or 1) > 1:
        raise ValueError(f"task {task} asks for {task_kwargs['num_beams']} beams; there is no beam search")
    paper = next((benchmark.settings for benchmark in BENCHMARKS if fnmatch(task, benchmark.pattern)), None)
    if paper is not None:
        return {**paper, **overrides}
    given = {name: task_kwargs[name] for name in SETTINGS if task_kwargs.get(name) is not None}
    tokens = overrides.get("max_new_tokens", given.get("max_new_tokens", DEFAULT_TOKENS))
    block = overrides.get("block_length", given.get("block_length", min(tokens, BLOCK_LENGTH)))
    tokens = -(-tokens // block) * block  # whole blocks
    return {"steps": tokens, **given, **overrides, "max_new_tokens": tokens, "block_length": block}


def cut(text: str, until: str | Sequence[str] | None) -> str:
    """The text before the first of the stop strings."""
    stops = [until] if isinstance(until, str) else until or ()
    ends = [text.find(stop) for stop in stops if stop and stop in text]
    return text[: min(ends)] if ends else text


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
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.device = self.accelerator.device if device is None or self._world_size > 1 else torch.device(device)
        self.processor = AutoProcessor.from_pretrained(pretrained, trust_remote_code=True)
        self.processor.max_tiles = max_tiles or self.processor.max_tiles
        model = AutoModel.from_pretrained(pretrained, trust_remote_code=True, dtype=dtype)
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
