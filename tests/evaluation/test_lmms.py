"""The lmms-eval model class: decoding per task, batching, order, and what it refuses.

Where lmms-eval is not installed, the two names that the module takes from it are stood in for.
"""

import importlib
import importlib.util
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from perceptiondlm.drawn.scenes import draw_scene
from perceptiondlm.evaluation.general import tasks as general_benchmarks
from perceptiondlm.evaluation.reports.paper_tables import paper_table


ROOT = Path(__file__).parents[2]


@dataclass
class Manifest:
    """Stands in for lmms-eval's ModelManifest."""

    model_id: str
    chat_class_path: str | None = None


class Recorder:
    """Stands in for lmms-eval's cache hook."""

    def __init__(self):
        self.answers: list[str] = []

    def add_partial(self, _kind, _request, answer):
        self.answers.append(answer)


class Base:
    """Stands in for lmms-eval's base class."""

    def __init__(self):
        self._rank, self._world_size = 0, 1
        self.cache_hook = Recorder()
        self.task_dict: dict[str, Any] = {}

    @property
    def rank(self):
        return self._rank


@pytest.fixture(scope="module")
def lmms():
    """`perceptiondlm.evaluation.general.lmms`, with stand-ins for lmms-eval where it is not installed."""
    with pytest.MonkeyPatch.context() as patch:
        if importlib.util.find_spec("lmms_eval") is None:
            contents = {"": {}, ".api": {}, ".api.model": {"lmms": Base}, ".models": {}}
            contents[".models.registry_v2"] = {"ModelManifest": Manifest}
            for name, content in contents.items():
                module = types.ModuleType(f"lmms_eval{name}")
                vars(module).update(content)
                patch.setitem(sys.modules, module.__name__, module)
        yield importlib.import_module("perceptiondlm.evaluation.general.lmms")
        sys.modules.pop("perceptiondlm.evaluation.general.lmms")


@dataclass
class Request:
    """What lmms-eval hands over: context, messages of a document, generation keywords, document, task, split."""

    args: tuple


def messages(document: dict) -> list[dict]:
    images = [{"type": "image", "url": image} for image in document["images"]]
    return [{"role": "user", "content": [*images, {"type": "text", "text": document["question"]}]}]


SCENES = [draw_scene(4, index).image for index in range(4)]
DOCUMENTS = [
    {"images": [SCENES[0]], "question": "How many objects are in the image?"},
    {"images": [SCENES[1], SCENES[2]], "question": "Is there a house in the image?"},
    {"images": [SCENES[3]], "question": "List the objects in the image."},
    {"images": [], "question": "What color is the boat?"},
    {"images": [SCENES[2].convert("L")], "question": "How many objects are in the image?"},
]


def requests(task: str, **kwargs: Any) -> list[Request]:
    return [Request(("", messages, kwargs, index, task, "test")) for index in range(len(DOCUMENTS))]


@pytest.fixture(scope="module")
def runner(lmms):
    model = lmms.PerceptionDLM(str(ROOT / "drawn" / "model"), device="cpu", batch_size=1)
    model.task_dict = {name: {"test": DOCUMENTS} for name in ("own", "mmstar", "mathvista_testmini_format")}
    return model


def test_batches_answer_as_single_requests_do_and_in_order(runner):
    one_by_one = runner.generate_until(requests("own", max_new_tokens=16))
    assert len(set(one_by_one)) > 2  # the questions have different answers, so a wrong order would show
    runner.batch_size = 3
    runner.cache_hook = Recorder()
    assert runner.generate_until(requests("own", max_new_tokens=16)) == one_by_one
    assert runner.cache_hook.answers == one_by_one
    runner.batch_size = 1


def test_requests_of_different_tasks_keep_their_places(runner):
    short, long = requests("mmstar"), requests("own", max_new_tokens=16)
    mixed = [request for pair in zip(short, long, strict=True) for request in pair]
    answers = runner.generate_until(mixed)
    assert answers[0::2] == runner.generate_until(short)
    assert answers[1::2] == runner.generate_until(long)


def test_each_task_is_decoded_its_own_way(runner, monkeypatch):
    asked = []
    generate = runner.model.generate
    monkeypatch.setattr(
        runner.model,
        "generate",
        lambda **inputs: (
            asked.append({k: v for k, v in inputs.items() if k in general_benchmarks.SETTINGS}) or generate(**inputs)
        ),
    )
    for task in ("mmstar", "mathvista_testmini_format"):
        runner.generate_until(requests(task, max_new_tokens=1024, temperature=0, do_sample=False)[:1])
    assert asked == [
        {"max_new_tokens": 2, "steps": 2},
        {"max_new_tokens": 256, "steps": 256, "sampler": "left_to_right"},
    ]


def test_settings_of_other_tasks_and_overrides():
    settings = general_benchmarks.task_settings
    assert settings("own", {}, {}) == {"max_new_tokens": 64, "steps": 64, "block_length": 64}
    assert settings("own", {"max_new_tokens": 16}, {}) == {"max_new_tokens": 16, "steps": 16, "block_length": 16}
    assert settings("own", {"max_new_tokens": 100}, {}) == {"max_new_tokens": 128, "steps": 128, "block_length": 64}
    assert settings("own", {"max_new_tokens": 100}, {"steps": 32})["steps"] == 32
    assert settings("chartqa", {"max_new_tokens": 16}, {}) == {"max_new_tokens": 128, "steps": 128}
    assert settings("chartqa", {}, {"steps": 64}) == {"max_new_tokens": 128, "steps": 64}
    for category in ("blink_counting", "blink_multi_view_reasoning"):
        assert settings(category, {}, {})["max_new_tokens"] == 2
    assert settings("mathverse_testmini_vision_only", {}, {})["sampler"] == "left_to_right"
    for other in ("mmmu_pro_standard", "chartqapro", "ai2d_reasoning"):
        assert settings(other, {}, {})["max_new_tokens"] == 64
    with pytest.raises(ValueError, match="asks for 4 beams"):
        settings("own", {"num_beams": 4}, {})
    with pytest.raises(ValueError, match=r"generation keywords \['penalty'\]"):
        settings("own", {"penalty": 1}, {})


def test_text_ends_at_a_stop_string(runner):
    assert general_benchmarks.cut("two. And more", ["\n", "."]) == "two"
    assert general_benchmarks.cut("two", None) == "two"
    (whole,) = runner.generate_until(requests("own", max_new_tokens=16)[:1])
    (start,) = runner.generate_until(requests("own", max_new_tokens=16, until=[whole[1:]])[:1])
    assert start == whole[0]


def test_what_cannot_be_answered_is_refused_by_name(lmms, runner):
    def film(_document):
        return [{"role": "user", "content": [{"type": "video", "url": "a.mp4"}]}]

    with pytest.raises(ValueError, match="document 2 of own contains video"):
        runner.generate_until([Request(("", film, {}, 2, "own", "test"))])
    with pytest.raises(NotImplementedError, match="likelihood"):
        runner.loglikelihood([])
    with pytest.raises(NotImplementedError, match="several rounds"):
        runner.generate_until_multi_round([])
    with pytest.raises(ValueError, match=r"unknown model_args \['stepps'\]"):
        lmms.PerceptionDLM(str(ROOT), stepps=4)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        lmms.PerceptionDLM(str(ROOT), batch_size=0)


def test_entry_point_names_the_class(lmms):
    manifest = lmms.manifest()
    assert manifest.model_id == "perceptiondlm"
    module, _, name = manifest.chat_class_path.rpartition(".")
    found = getattr(importlib.import_module(module), name)
    assert found is lmms.PerceptionDLM
    assert found.is_simple is False  # lmms-eval then hands over messages
    declared = (ROOT / "pyproject.toml").read_text().partition('[project.entry-points."lmms_eval.models"]\n')[2]
    assert declared.startswith('perceptiondlm = "perceptiondlm.evaluation.general.lmms:manifest"\n')


def test_document_lists_every_benchmark_with_its_task_and_score():
    document = (ROOT / "docs" / "benchmarks.md").read_text()
    table = paper_table(1)
    assert [benchmark.row for benchmark in general_benchmarks.BENCHMARKS] == list(table.rows)
    for benchmark in general_benchmarks.BENCHMARKS:
        score = table.rows[benchmark.row][0]
        assert f"| {benchmark.row} | `{benchmark.task}` | `{benchmark.metric}` | {score} |" in document
