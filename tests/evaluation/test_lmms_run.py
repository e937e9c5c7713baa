"""A tiny task on local data through lmms-eval's own command, where it is installed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset

from perceptiondlm.drawn.scenes import draw_scene
from perceptiondlm.evaluation.general.strict_answers import read_samples
from perceptiondlm.evaluation.general.tasks import BENCHMARKS


pytest.importorskip("lmms_eval", reason="needs lmms-eval: pip install -e '.[lmms-eval]'")

ROOT = Path(__file__).parents[2]
TASK = """
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: {data}}}}}
task: tiny_count
test_split: test
output_type: generate_until
doc_to_visual: !function utils.pictures
doc_to_text: !function utils.question
doc_to_messages: !function utils.messages
doc_to_target: answer
process_results: !function utils.results
generation_kwargs: {{max_new_tokens: 32, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
UTILS = """
def pictures(doc):
    return [doc["image"].convert("RGB")]

def question(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]

def messages(doc, lmms_eval_specific_kwargs=None):
    image, text = {"type": "image", "url": pictures(doc)[0]}, {"type": "text", "text": doc["question"]}
    return [{"role": "user", "content": [image, text]}]

def results(doc, answers):
    return {"exact_match": float(answers[0] == doc["answer"])}
"""


def test_the_command_finds_the_model_runs_the_task_and_logs_what_the_strict_judge_reads(tmp_path):
    scenes = [draw_scene(4, index) for index in range(4)]
    question = "How many objects are in the image?"
    rows = [{"image": scene.image, "question": question, "answer": str(len(scene.objects))} for scene in scenes]
    Dataset.from_list(rows).to_parquet(tmp_path / "data.parquet")
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "tiny.yaml").write_text(TASK.format(data=tmp_path / "data.parquet"))
    (tmp_path / "task" / "utils.py").write_text(UTILS)
    command = [sys.executable, "-m", "lmms_eval", "--model", "perceptiondlm", "--tasks", "tiny_count"]
    command += ["--model_args", f"pretrained={ROOT},device=cpu", "--include_path", str(tmp_path / "task")]
    command += ["--batch_size", "2", "--log_samples", "--output_path", str(tmp_path / "out")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    (log,) = (tmp_path / "out").rglob("*_samples_tiny_count.jsonl")
    samples = read_samples(log)
    assert [sample.answers for sample in samples] == [[row["answer"]] for row in rows]
    assert all(sample.prediction for sample in samples)
    (results,) = (tmp_path / "out").rglob("*_results.json")
    score = json.loads(results.read_text())["results"]["tiny_count"]["exact_match,none"]
    assert score == sum(sample.prediction == sample.answers[0] for sample in samples) / len(samples)


def test_lmms_eval_knows_the_tasks_of_the_paper():
    from lmms_eval.tasks import TaskManager

    assert {benchmark.task for benchmark in BENCHMARKS} <= set(TaskManager().all_tasks)
