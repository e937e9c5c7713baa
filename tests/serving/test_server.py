"""The endpoints: regions and questions in, what the pipeline gives out, in every form that clients send."""

import asyncio
import json
import threading

import numpy as np
import pytest
from model_batches import masks_of


reason = 'the server is an extra: pip install "perceptiondlm[serve]"'
pytest.importorskip("fastapi", reason=reason)
pytest.importorskip("multipart", reason=reason)

from PIL import Image  # noqa: E402
from served import (  # noqa: E402
    SETTINGS,
    client_of,
    data_url,
    encoded,
    events_of,
    question,
    run_lengths,
    text_of,
    with_region,
)

from perceptiondlm.pipeline_perceptiondlm import RegionCaptioningPipeline  # noqa: E402
from perceptiondlm.serving.engine import Engine  # noqa: E402
from perceptiondlm.serving.found import FoundRegion  # noqa: E402
from perceptiondlm.serving.server.app import create_app  # noqa: E402
from perceptiondlm.serving.server.limits import Limits  # noqa: E402


@pytest.fixture(scope="module")
def client(model, processor):
    with client_of(model, processor) as client:
        yield client


@pytest.fixture(scope="module")
def expected(model, processor, scene):
    """What the pipeline says of the scene's regions."""
    pipe = RegionCaptioningPipeline(model=model, processor=processor, **SETTINGS)
    return pipe(scene.image, masks=masks_of(scene))


@pytest.fixture(scope="module")
def body(scene):
    return {"image": data_url(scene.image), "masks": [run_lengths(mask) for mask in masks_of(scene)]}


def captions_of(reply) -> list[tuple]:
    assert reply.status_code == 200, reply.text
    return [(region["caption"], region["box"]) for region in reply.json()["regions"]]


def pairs(expected) -> list[tuple]:
    return [(region["caption"], region["box"]) for region in expected]


def test_captions_are_the_pipelines_in_every_form(client, body, scene, expected):
    """Run lengths and pictures as base64, files of a form; scores and sizes come, too."""
    reply = client.post("/v1/captions", json=body)
    assert captions_of(reply) == pairs(expected)
    found = reply.json()
    assert [r["score"] for r in found["regions"]] == pytest.approx([e["score"] for e in expected], abs=1e-5)
    assert (found["width"], found["height"]) == scene.image.size
    assert (found["model"], found["regions_found"]) == ("tiny", len(expected))
    pictures = [encoded(Image.fromarray(mask.astype(np.uint8) * 255)) for mask in masks_of(scene)]
    plain = {"image": text_of(encoded(scene.image)), "masks": [text_of(content) for content in pictures]}
    assert captions_of(client.post("/v1/captions", json=plain)) == pairs(expected)
    files = [("image", ("../../etc/passwd", encoded(scene.image))), *(("masks", ("m.png", p)) for p in pictures)]
    assert captions_of(client.post("/v1/captions", files=files)) == pairs(expected)
    mixed = {"request": json.dumps({"masks": body["masks"][:1], "return_masks": True})}
    reply = client.post("/v1/captions", files=[files[0], *files[2:]], data=mixed)
    assert captions_of(reply) == pairs(expected)
    assert [region["segmentation"] for region in reply.json()["regions"]] == body["masks"]
    assert reply.json()["usage"]["image_was_known"]


def test_boxes_settings_and_questions_reach_the_model(client, model, processor, body, scene):
    pipe = RegionCaptioningPipeline(model=model, processor=processor, **SETTINGS)
    boxes = [[4, 6, 40, 50], [10.5, 10, 60, 61]]
    asked = {"image": body["image"], "boxes": boxes, "question": "What is it?", "settings": {"steps": 2}}
    found = client.post("/v1/captions", json=asked)
    assert captions_of(found) == pairs(pipe(scene.image, boxes=boxes, text="What is it?", steps=2))
    polygon = [[10, 10, 60, 10, 60, 60, 10, 60], [[5, 5, 30, 5, 30, 30], [40, 40, 60, 40, 60, 60]]]
    regions = [[polygon[0]], polygon[1]]
    found = client.post("/v1/captions", json={"image": body["image"], "masks": polygon})
    assert captions_of(found) == pairs(pipe(scene.image, masks=regions))


class Corners:
    """A segmenter: a square at every point, everything is two squares."""

    name = "corners"

    def everything(self, image):
        return self.at_points(image, [(0, 0), (20, 20)])

    def at_boxes(self, image, boxes):
        return [self._square(image, *box[:2]) for box in boxes]

    def at_points(self, image, points, labels=None):
        places = [point[0] if isinstance(point[0], (list, tuple)) else point for point in points]
        return [self._square(image, *place) for place in places]

    def named(self, image, text):
        return [FoundRegion(self._square(image, 8, 8).mask, (8, 8, 18, 18), 0.5, text)]

    @staticmethod
    def _square(image, x, y):
        mask = np.zeros((image.height, image.width), dtype=bool)
        mask[int(y) : int(y) + 10, int(x) : int(x) + 10] = True
        found = FoundRegion.of_mask(mask)
        assert found is not None
        return found


def test_a_segmenter_takes_points_texts_and_everything(model, processor, body):
    with client_of(model, processor, segmenter=Corners(), limits=Limits(max_regions=2)) as client:
        for prompt, corners in (
            ({"points": [[3, 4], [30, 31]]}, [(3, 4), (30, 31)]),
            ({"points": [[[3, 4], [5, 6]]]}, [(3, 4)]),
            ({"everything": True}, [(0, 0), (20, 20)]),
            ({"text": "a thing"}, [(8, 8)]),
        ):
            found = client.post("/v1/captions", json={"image": body["image"], **prompt})
            assert [(box["xmin"], box["ymin"]) for _, box in captions_of(found)] == corners
        labelled = found.json()["regions"][0]
        assert (labelled["label"], labelled["found_score"]) == ("a thing", 0.5)


def test_points_without_a_segmenter_are_refused(client, body):
    reply = client.post("/v1/captions", json={"image": body["image"], "points": [[3, 4]]})
    assert reply.status_code == 400
    assert "needs a segmenter" in reply.json()["error"]["message"]


def test_drafts_are_streamed_and_the_result_comes_last(client, body, expected):
    with client.stream("POST", "/v1/captions", json={**body, "stream": True}) as reply:
        assert reply.headers["content-type"].startswith("text/event-stream")
        events = events_of("".join(reply.iter_text()))
    names = [name for name, _ in events]
    assert names[-1] == "result"
    assert set(names[:-1]) == {"draft"}
    assert [(r["caption"], r["box"]) for r in events[-1][1]["regions"]] == pairs(expected)
    assert len(events[0][1]["regions"]) == len(expected)
    bad = {**body, "settings": {"block_length": 5}, "stream": True}  # found out when it is decoded
    with client.stream("POST", "/v1/captions", json=bad) as reply:
        text = "".join(reply.iter_text())
    assert "block_length" in text


def test_chat_answers_questions(client, model, processor, scene):
    batch = processor(images=scene.image, text="How many objects?")
    (answer,) = processor.post_process_image_text_to_text(model.generate(**batch, **SETTINGS))
    for path in ("/v1/chat/completions", "/chat/completions"):
        reply = client.post(path, json=question(data_url(scene.image), "How many objects?", model="tiny"))
        assert reply.status_code == 200, reply.text
        (choice,) = reply.json()["choices"]
        assert choice["message"] == {"role": "assistant", "content": answer}
        assert choice["finish_reason"] in ("stop", "length")
    usage = reply.json()["usage"]
    assert usage["prompt_tokens"] == batch["input_ids"].shape[1]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    words = {"messages": [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Is it red?"}]}
    assert client.post("/v1/chat/completions", json=words).status_code == 200
    few = question(None, "Is it red?", max_tokens=3)
    assert client.post("/v1/chat/completions", json=few).json()["usage"]["completion_tokens"] <= 3
    many = question(None, "Is it red?", max_tokens=512)  # an upper bound, not a wish
    assert client.post("/v1/chat/completions", json=many).json()["usage"]["completion_tokens"] <= 6


def test_chat_asks_a_model_that_sees_regions_alone_about_the_whole_picture(tiny_model, tiny_processor, scene):
    model = tiny_model(image_in_prompt=False)
    processor = tiny_processor(model)
    whole = np.ones((scene.image.height, scene.image.width), bool)
    pipe = RegionCaptioningPipeline(model=model, processor=processor, **SETTINGS)
    picture = data_url(scene.image)
    with client_of(model, processor) as client:
        for text in ("How many objects?", ""):
            reply = client.post("/v1/chat/completions", json=question(picture, text))
            assert reply.status_code == 200, reply.text
            choices = [(choice["message"]["content"], choice["box"]) for choice in reply.json()["choices"]]
            assert choices == pairs(pipe(scene.image, masks=[whole], text=text or None))
        assert client.post("/v1/chat/completions", json=question(None, "Is it red?")).status_code == 200
        (asked,), (again,) = question(picture, "What?")["messages"], question(None, "And?")["messages"]
        two = {"messages": [{**asked, "content": [*asked["content"], asked["content"][0]]}]}
        for messages in ({"messages": [asked, {"role": "assistant", "content": "A boat."}, again]}, two):
            reply = client.post("/v1/chat/completions", json=messages)
            assert reply.status_code == 400
            assert "sees regions alone" in reply.json()["error"]["message"]


def test_chat_takes_regions_in_the_form_of_other_servers(client, scene, expected):
    """An RGBA picture marks its region by alpha; several of one picture are several regions; a field names any."""
    marked = [data_url(with_region(scene.image, mask)) for mask in masks_of(scene)]
    for text in ("\nDescribe the masked region in detail.", "<image>\nDescribe the masked region in detail.", ""):
        reply = client.post("/chat/completions", json=question(marked[0], text, model="describe_anything_model"))
        assert reply.status_code == 200, reply.text
        (choice,) = reply.json()["choices"]
        assert (choice["message"]["content"], choice["box"]) == pairs(expected)[0]
    several = question(None, "")
    several["messages"][0]["content"] = [{"type": "image_url", "image_url": {"url": url}} for url in marked]
    reply = client.post("/v1/chat/completions", json=several).json()
    assert [(c["message"]["content"], c["box"]) for c in reply["choices"]] == pairs(expected)
    regions = {"masks": [run_lengths(mask) for mask in masks_of(scene)]}
    reply = client.post("/v1/chat/completions", json=question(data_url(scene.image), "", regions=regions)).json()
    assert [(c["message"]["content"], c["box"]) for c in reply["choices"]] == pairs(expected)


def test_chat_streams_pieces_that_make_the_answer(client, scene, expected):
    regions = {"masks": [run_lengths(mask) for mask in masks_of(scene)]}
    asked = question(data_url(scene.image), "", regions=regions, stream=True)
    for more in ({}, {"settings": {"sampler": "left_to_right"}}, {"settings": {"remasking": True}}):
        whole = client.post("/v1/chat/completions", json={**asked, **more, "stream": False}).json()["choices"]
        with client.stream("POST", "/v1/chat/completions", json={**asked, **more}) as reply:
            events = events_of("".join(reply.iter_text()))
        assert events[-1] == ("message", "[DONE]")
        texts, ends = [""] * len(whole), [None] * len(whole)
        for _, chunk in events[:-1]:
            for choice in chunk["choices"]:
                texts[choice["index"]] += choice["delta"].get("content", "")
                ends[choice["index"]] = choice["finish_reason"]
        assert texts == [choice["message"]["content"] for choice in whole]
        assert ends == [choice["finish_reason"] for choice in whole]


@pytest.mark.parametrize(
    ("change", "status", "message"),
    [
        ({"image": None}, 400, "give one image"),
        ({"image": 7}, 400, "image: "),
        ({"masks": None}, 400, "nothing says where the regions are"),
        ({"masks": [{"size": [3, 3], "counts": [9]}]}, 400, r"masks[0] (RLE size) is 3 x 3"),
        ({"boxes": [[0, 0, 5]]}, 400, "boxes.0"),
        ({"boxes": [[5, 5, 5, 9]]}, 400, "boxes[0]"),
        ({"everything": True}, 400, "everything finds regions by itself"),
        ({"settings": {"steps": 0}}, 400, "steps must be an integer of at least 1"),
        ({"settings": {"beams": 4}}, 400, "settings.beams"),
        ({"settings": {"max_new_tokens": 4096}}, 400, "max_new_tokens is 4096; accepted: 512"),
        ({"settings": {"max_new_tokens": -1}}, 400, "max_new_tokens must be"),
        ({"regions": []}, 400, "regions: "),
        ({"max_tiles": 0}, 400, "max_tiles"),
        ({"question": "a" * 9000}, 413, "9000 characters; accepted: 8000"),
    ],
)
def test_wrong_requests_get_a_reason(client, body, change, status, message):
    reply = client.post("/v1/captions", json={name: v for name, v in {**body, **change}.items() if v is not None})
    assert reply.status_code == status, reply.text
    assert message in reply.json()["error"]["message"]
    assert reply.json()["error"]["type"] == "invalid_request_error"


def test_wrong_chats_get_a_reason(client, scene):
    plain, marked = data_url(scene.image), data_url(with_region(scene.image, masks_of(scene)[0]))
    other = data_url(with_region(scene.image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), masks_of(scene)[0]))

    def pictures(*urls):
        return {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": url} for url in urls]}]}

    says = {"role": "assistant", "content": "A house."}
    for asked, status, message in (
        (question(plain, "What?", model="gpt"), 404, "there is no model 'gpt'"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [says]}, 400, "the last message is the assistant's"),
        (question(None, "What?", regions={"boxes": [[0, 0, 9, 9]]}), 400, "got 0 images"),
        (pictures(marked, plain), 400, "image 1 marks no region"),
        (pictures(marked, other), 400, "image 1 has other colours"),
        ({"messages": [*question(marked, "")["messages"], says, *question(None, "?")["messages"]]}, 400, "one turn"),
        (question(data_url(with_region(scene.image, masks_of(scene)[0] & False)), ""), 400, "marks no region"),
        (pictures(*[plain] * 9), 413, "9 images were given; accepted: 8"),
        (question(plain, "What?", n=3), 400, "n: "),
        (question(plain, "What?", num_beams=4), 400, "num_beams: "),
        (question(plain, "What?", logit_bias={}), 400, "logit_bias"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, 400, "needs the field text"),
    ):
        reply = client.post("/v1/chat/completions", json=asked)
        assert (reply.status_code, message in reply.json()["error"]["message"]) == (status, True), reply.text


def test_health_models_metrics_and_the_interface(client, body):
    assert client.get("/health").json() == {"status": "ok"}
    assert client.get("/ready").json()["ready"] is True
    assert client.get("/v1/models").json()["data"][0]["id"] == "tiny"
    client.post("/v1/captions", json=body)
    client.get("/no such path")
    figures = client.get("/metrics").text
    for line in (
        'perceptiondlm_requests_total{path="/v1/captions",status="200"}',
        'perceptiondlm_requests_total{path="other",status="404"}',
        "perceptiondlm_request_seconds_bucket",
        "perceptiondlm_passes_total",
        "perceptiondlm_cached_image_bytes",
        "perceptiondlm_waiting_requests 0.0",
    ):
        assert line in figures
    described = client.get("/openapi.json").json()
    sent = described["paths"]["/v1/captions"]["post"]["requestBody"]["content"]
    assert set(sent) == {"application/json", "multipart/form-data"}
    assert "masks" in described["components"]["schemas"]["CaptionRequest"]["properties"]
    assert set(described["components"]["schemas"]) >= {"ChatRequest", "RunLengths", "Settings", "Regions"}
    assert client.get("/docs").status_code == 200


class Connection:
    """An ASGI connection whose client can go away, or send its body as slowly as it likes."""

    def __init__(self, body: bytes, path: str = "/v1/captions", whole: bool = True):
        self.sent, self.gone, self.whole, self.body = [], asyncio.Event(), whole, body
        headers = [(b"content-type", b"application/json")]
        self.scope = {"type": "http", "method": "POST", "path": path, "headers": headers, "query_string": b""}
        self.scope |= {"http_version": "1.1", "scheme": "http", "raw_path": path.encode(), "root_path": ""}

    async def receive(self):
        if self.body is not None:
            body, self.body = self.body, None
            return {"type": "http.request", "body": body, "more_body": not self.whole}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message):
        self.sent.append(message)

    @property
    def status(self):
        return self.sent[0]["status"]


def served(model, processor, talk, limits=None):
    """Run `talk(app, engine)` on a server."""
    engine = Engine(model, processor, settings=SETTINGS)
    app = create_app(lambda: engine, limits, drain_seconds=10)

    async def run():
        async with app.router.lifespan_context(app):
            return await talk(app, engine)

    try:
        return asyncio.run(run())
    finally:
        engine.close()


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_takes_its_request_along(model, processor, body, monkeypatch, stream):
    async def talk(app, engine):
        gate, read = threading.Event(), engine.preparer.read
        monkeypatch.setattr(engine.preparer, "read", lambda ask: gate.wait(30) and read(ask))
        connection = Connection(json.dumps({**body, "stream": stream}).encode())
        task = asyncio.ensure_future(app(connection.scope, connection.receive, connection.send))
        while engine.counts.submitted == 0:
            await asyncio.sleep(0.01)
        connection.gone.set()
        await asyncio.wait_for(task, 30)
        gate.set()
        return connection, engine.counts.cancelled

    connection, cancelled = served(model, processor, talk)
    assert cancelled == 1
    assert connection.status == (200 if stream else 499)
    assert not any(b"event: result" in message.get("body", b"") for message in connection.sent)


def test_slow_bodies_and_slow_answers_are_ended(model, processor, body, monkeypatch):
    async def talk(app, engine):
        slow = Connection(b'{"image": "', whole=False)
        await asyncio.wait_for(app(slow.scope, slow.receive, slow.send), 30)
        gate, read = threading.Event(), engine.preparer.read
        monkeypatch.setattr(engine.preparer, "read", lambda ask: gate.wait(30) and read(ask))
        waiting = Connection(json.dumps(body).encode())
        await asyncio.wait_for(app(waiting.scope, waiting.receive, waiting.send), 30)
        gate.set()
        return slow, waiting, engine.counts.cancelled

    slow, waiting, cancelled = served(model, processor, talk, Limits(body_seconds=0.2, answer_seconds=0.3))
    assert (slow.status, waiting.status, cancelled) == (408, 504, 1)
    assert b"did not arrive within 0.2 s" in slow.sent[1]["body"]
    assert b"no answer within 0.3 s" in waiting.sent[1]["body"]


def test_shutdown_finishes_what_is_under_way_and_refuses_the_rest(model, processor, body):
    async def talk(app, engine):
        asked = json.dumps(body).encode()
        connections = [Connection(asked) for _ in range(4)]
        tasks = [asyncio.ensure_future(app(c.scope, c.receive, c.send)) for c in connections]
        while engine.counts.submitted < 4:
            await asyncio.sleep(0.01)
        closing = asyncio.ensure_future(asyncio.to_thread(engine.close))
        while engine.is_open:
            await asyncio.sleep(0.01)
        late = Connection(asked)
        await app(late.scope, late.receive, late.send)
        await asyncio.gather(*tasks)
        assert await closing
        return [connection.status for connection in connections], late

    statuses, late = served(model, processor, talk)
    assert statuses == [200] * 4
    assert late.status == 503
    assert b"shutting down" in late.sent[1]["body"]
