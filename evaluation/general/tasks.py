"""The paper's sixteen general benchmarks (Table 1): lmms-eval's tasks, and how their answers are decoded."""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any


# Decoding of the paper's evaluation (released configuration): an option's letter or yes/no in 2 tokens, a short answer
# in 128, and reasoning in 256 tokens from left to right, one at a time.
LETTER = {"max_new_tokens": 2, "steps": 2}
SHORT_ANSWER = {"max_new_tokens": 128, "steps": 128}
REASONING = {"max_new_tokens": 256, "steps": 256, "sampler": "left_to_right"}
# Tasks that are not among the sixteen: as many steps as tokens, in blocks.
DEFAULT_TOKENS = 64
BLOCK_LENGTH = 64

BLINK_CATEGORY = "blink_multi_view_reasoning"  # other tasks of such a name ask to think aloud
SETTINGS = ("max_new_tokens", "steps", "block_length", "sampler", "threshold", "entropy_bound", "temperature", "seed")
IGNORED = ("do_sample", "num_beams", "top_p", "top_k", "image_aspect_ratio", "until")  # `until` is applied to the text


@dataclass(frozen=True)
class GeneralBenchmark:
    """One of the sixteen: its row in Table 1, lmms-eval's task and metrics (several are averaged), how it is decoded.

    `pattern` matches the names of further tasks that are decoded like it (a group's members, other prompts).
    """

    row: str
    task: str
    metric: str
    settings: dict[str, Any]
    pattern: str


BENCHMARKS = (
    GeneralBenchmark("MMStar", "mmstar", "average", LETTER, "mmstar"),
    GeneralBenchmark("SeedBench", "seedbench", "seed_image", LETTER, "seedbench"),
    GeneralBenchmark("MMBench", "mmbench_en_dev", "gpt_eval_score", LETTER, "mmbench_en_dev_*"),
    GeneralBenchmark("MMMU", "mmmu_val", "mmmu_acc", LETTER, "mmmu_val"),
    GeneralBenchmark("MathVista", "mathvista_testmini_format", "llm_as_judge_eval", REASONING, "mathvista_test*"),
    GeneralBenchmark(
        "MathVerse (Vision Only)", "mathverse_testmini_vision_only", "gpt_eval_score", REASONING, "mathverse_test*"
    ),
    GeneralBenchmark("AI2D", "ai2d", "exact_match", LETTER, "ai2d_*"),
    GeneralBenchmark("ChartQA", "chartqa", "relaxed_overall", SHORT_ANSWER, "chartqa_*"),
    GeneralBenchmark("DocVQA", "docvqa_val", "anls", SHORT_ANSWER, "docvqa_*"),
    GeneralBenchmark("InfoVQA", "infovqa_val", "anls", SHORT_ANSWER, "infovqa_*"),
    GeneralBenchmark("MMVP", "mmvp", "mmvp_accuracy", LETTER, "mmvp"),
    GeneralBenchmark("BLINK", "blink", "blink_acc", LETTER, "blink_*"),
    GeneralBenchmark("RealWorldQA", "realworldqa", "exact_match", LETTER, "realworldqa"),
    GeneralBenchmark("CV-Bench-2D", "cv_bench_2d", "cv_bench_acc", LETTER, "cv_bench_*"),
    GeneralBenchmark("HallusionBench", "hallusion_bench_image", "aAcc, qAcc, fAcc", LETTER, "hallusion_bench_*"),
    GeneralBenchmark("V*", "vstar_bench", "vstar_overall_acc", LETTER, "vstar_bench_*"),
)


def find_benchmark(task: str) -> GeneralBenchmark | None:
    """The benchmark that a task of lmms-eval belongs to; None for others, and for prompts that ask to think aloud."""
    if task.endswith("_reasoning") and task != BLINK_CATEGORY:
        return None
    return next((one for one in BENCHMARKS if task == one.task or fnmatch(task, one.pattern)), None)


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
    benchmark = find_benchmark(task)
    if benchmark is not None:
        return {**benchmark.settings, **overrides}
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
