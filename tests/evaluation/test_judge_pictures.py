"""Judges that look: crops and masks are encoded once, sent whole, and kept no longer than they are needed."""

import base64
import io
import json
import tracemalloc
from collections.abc import Mapping

import numpy as np
import pytest
from judge_server import JudgeServer
from PIL import Image

from perceptiondlm.evaluation.judges import pictures as judge_pictures
from perceptiondlm.evaluation.judges.registry import make_judge
from perceptiondlm.evaluation.questions import question_prompt, recognition_question
from perceptiondlm.evaluation.scoring import JudgeRequest, score_captions


QUESTION = {
    "question": 'Which "part" is {red}?',
    "choices": [["The door.", 1], ["None \\ no part.", -1]],
    "type": "positive",
}
IMAGE = Image.fromarray(np.arange(20 * 30 * 3, dtype=np.uint8).reshape(20, 30, 3))
MASK = np.eye(20, 30, dtype=bool)


def _judge(server, folder, **options):
    return make_judge("openai:fake", base_url=server.base_url, cache=folder / "answers.jsonl", **options)


def _requests(caption="a red house", image=IMAGE, mask=MASK, region_id="1_0"):
    questions = (recognition_question("house"), QUESTION)
    return [JudgeRequest(region_id, caption, question, image, mask) for question in questions]


@pytest.fixture
def encoded(monkeypatch):
    """The pictures encoded so far."""
    made = []
    encode = judge_pictures._picture_part
    monkeypatch.setattr(judge_pictures, "_picture_part", lambda image: made.append(image) or encode(image))
    return made


def test_the_pixels_arrive_and_the_text_is_data(tmp_path):
    caption = 'red"}]}], "model": "other", "messages": [{"content": "{image}\n\ud800'
    with JudgeServer() as server:
        _judge(server, tmp_path)(_requests(caption))
    for body in server.bodies:
        (message,) = body["messages"]
        parts = message["content"]
        assert (body["model"], message["role"], len(parts)) == ("fake", "user", 5)
        crop, mask = (
            Image.open(io.BytesIO(base64.b64decode(parts[k]["image_url"]["url"].partition(",")[2]))) for k in (1, 3)
        )
        assert (np.asarray(crop) == np.asarray(IMAGE)).all()
        assert (np.asarray(mask) == 255 * MASK).all()
    asked = {body["messages"][0]["content"][-1]["text"] for body in server.bodies}
    assert asked == {question_prompt(caption, request.question, with_image=True) for request in _requests()}


def test_pictures_are_encoded_once_a_region_and_not_for_answers_that_are_known(tmp_path, encoded):
    requests = [request for index in range(4) for request in _requests(region_id=f"1_{index}", image=IMAGE.copy())]
    with JudgeServer(latency=0.01) as server:
        answers = _judge(server, tmp_path, concurrency=8)(requests)
        assert len(encoded) == 2  # the same pixels are the same question
        again = _judge(server, tmp_path)(requests)
        others = [
            request
            for index in range(4)
            for request in _requests(f"house {index}", region_id=f"1_{index}", image=IMAGE.copy())
        ]
        encoded.clear()
        _judge(server, tmp_path, concurrency=8)(others)
    assert again == answers
    assert len(encoded) == 2 * 4


def test_requests_about_one_region_may_show_different_pictures(tmp_path):
    black = Image.new("RGB", IMAGE.size)
    with JudgeServer() as server:
        _judge(server, tmp_path)([*_requests(), *_requests(image=black), *_requests(image=None, mask=None)])
    assert server.asked.total() == 6


def test_keys_of_paid_answers_stay_what_they_are(tmp_path):
    """A change of these keys would ask every question that was ever judged anew."""
    with JudgeServer() as server:
        judge = _judge(server, tmp_path)
        judge([_requests()[0], _requests(image=None, mask=None)[0]])
    records = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert {record["key"] for record in records} == {
        "5e8fe1f70397ac9d2a8972086faf2faf874c50a583e6051163fc70cfa362117f",
        "a07069268a048b85c6cf0d09aa258b5b0967ceba59cc18358a75bc00930cf8c4",
    }


class _NoisyCrops(Mapping):
    """A crop of noise for every region, made when looked up."""

    def __init__(self, region_ids):
        self.region_ids = region_ids

    def __getitem__(self, region_id):
        noise = np.random.default_rng(int(region_id)).integers(0, 256, (160, 160, 3), dtype=np.uint8)
        return Image.fromarray(noise), noise[..., 0] > 127

    def __iter__(self):
        return iter(self.region_ids)

    def __len__(self):
        return len(self.region_ids)


def _peak(server, folder, num_regions):
    """Peak of the memory that Python allocates while so many regions are judged, in bytes."""
    regions = [str(number) for number in range(num_regions)]
    judge = _judge(server, folder, concurrency=4)
    tracemalloc.start()
    score_captions(
        {region: f"house {num_regions} {region}" for region in regions},
        {region: [QUESTION] for region in regions},
        dict.fromkeys(regions, "house"),
        judge,
        crops=_NoisyCrops(regions),
        batch_size=8,
    )
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_memory_does_not_grow_with_the_number_of_regions(tmp_path):
    with JudgeServer() as server:
        _peak(server, tmp_path, 8)  # connections, modules
        few, many = (_peak(server, tmp_path, number) for number in (16, 64))
    assert many < 1.5 * few
