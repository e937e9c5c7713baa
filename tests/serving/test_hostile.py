"""What strangers send to a server: bombs, floods, paths, addresses, noise. Each is refused with a reason."""

import json
import socket
import struct
import threading
import time
import zlib
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
from model_batches import masks_of


reason = 'the server is an extra: pip install "perceptiondlm[serve]"'
pytest.importorskip("fastapi", reason=reason)
pytest.importorskip("multipart", reason=reason)

from fuzz_server import fuzz, good_captions  # noqa: E402
from PIL import Image  # noqa: E402
from served import client_of, data_url, encoded, question, run_lengths, text_of  # noqa: E402

from perceptiondlm.serving.server import remote  # noqa: E402
from perceptiondlm.serving.server.limits import Limits, Refused  # noqa: E402


FUZZED = 200


@pytest.fixture(scope="module")
def client(model, processor):
    with client_of(model, processor) as client:
        yield client


@pytest.fixture
def body(scene):
    return {"image": data_url(scene.image), "masks": [run_lengths(masks_of(scene)[0])]}


def refusal(reply, status: int) -> str:
    assert reply.status_code == status, reply.text[:300]
    return reply.json()["error"]["message"]


def flat_png(width: int, height: int, rows: int) -> bytes:
    """A black picture of one bit a pixel that says it has `height` rows, in a few kilobytes."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    packer, row = zlib.compressobj(9), bytes((width + 7) // 8 + 1)
    pixels = b"".join(packer.compress(row * 100) for _ in range(rows // 100)) + packer.flush()
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(("width", "height", "rows"), [(10_000, 10_000, 10_000), (60_000, 60_000, 100)])
def test_bombs_and_pictures_of_100_megapixels_are_refused_by_their_header(client, body, width, height, rows):
    """The first is whole, the second says that it has 3.6 gigapixels."""
    text = text_of(flat_png(width, height, rows))
    for asked in ({**body, "image": text}, {**body, "masks": [text]}):
        assert "pixels" in refusal(client.post("/v1/captions", json=asked), 413)
    assert "pixels" in refusal(client.post("/v1/chat/completions", json=question(text, "?")), 413)


def test_many_large_masks_are_refused_before_they_are_decoded(model, processor, scene):
    mask = text_of(encoded(Image.fromarray(masks_of(scene)[0])))
    pixels = scene.image.width * scene.image.height
    with client_of(model, processor, Limits(max_mask_pixels=3 * pixels)) as client:
        asked = {"image": data_url(scene.image), "masks": [mask] * 3}
        assert client.post("/v1/captions", json=asked).status_code == 200
        asked["masks"].append(mask)
        message = refusal(client.post("/v1/captions", json=asked), 413)
        assert f"masks[3] have {4 * pixels} pixels together" in message


def test_floods_of_regions_outlines_and_bytes(model, processor, scene, body):
    limits = Limits(max_body_bytes=2_000_000, max_points=5_000, max_regions=100)
    with client_of(model, processor, limits) as client:
        many = {**body, "boxes": [[0, 0, 9, 9]] * 10_000}
        assert "10001 regions were given; accepted: 100" in refusal(client.post("/v1/captions", json=many), 413)
        chat = question(body["image"], "?", regions={"boxes": many["boxes"]})
        assert "10000 regions" in refusal(client.post("/v1/chat/completions", json=chat), 413)
        long = {**body, "masks": [[1, 1, 9, 1, 9, 9] * 1_000]}
        assert "6000 numbers; accepted: 5000" in refusal(client.post("/v1/captions", json=long), 413)
        huge = json.dumps({**body, "question": "a" * 3_000_000}).encode()
        headers = {"content-type": "application/json"}
        assert "2000000 bytes" in refusal(client.post("/v1/captions", content=huge, headers=headers), 413)
        pieces = (huge[start : start + 100_000] for start in range(0, len(huge), 100_000))  # without a declared length
        assert "2000000 bytes" in refusal(client.post("/v1/captions", content=pieces, headers=headers), 413)
        files = [("image", encoded(scene.image)), *[("masks", b"x")] * 200]
        assert "Too many files" in refusal(client.post("/v1/captions", files=files), 400)
        assert client.post("/v1/captions", json=body).status_code == 200


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 100_000, "not JSON"),
        (b'{"boxes": [[NaN, 0, 1, 1]]}', "NaN is no number of JSON"),
        (b'{"boxes": [[Infinity, 0, 1, 1]]}', "Infinity is no number"),
        (b'{"boxes": [[' + b"9" * 10_000 + b", 0, 1, 1]]}", "not JSON"),
        (b"\xff\xfe\x00", "not JSON"),
        (b"", "not JSON"),
        (b"[]", "the body: "),
    ],
)
def test_json_that_is_none(client, content, message):
    reply = client.post("/v1/captions", content=content, headers={"content-type": "application/json"})
    assert message in refusal(reply, 400)


@pytest.mark.parametrize(
    "content",
    [
        b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>',
        b"<!DOCTYPE html><html><body>hello</body></html>",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        b"%PDF-1.7\n",
        b"GIF89a",
        b"",
    ],
)
def test_what_is_no_raster_picture_is_refused_whatever_it_is_called(client, body, content):
    for asked in (
        {**body, "image": f"data:image/png;base64,{text_of(content)}"},
        {**body, "masks": [text_of(content)]},
    ):
        reply = client.post("/v1/captions", json=asked)
        assert reply.status_code in (400, 415), reply.text
    reply = client.post("/v1/captions", files=[("image", ("a.png", content, "image/png"))], data={"request": "{}"})
    assert refusal(reply, 415)


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "../../../../etc/passwd", "file:///etc/passwd", "/etc/hostname", "C:\\a"]
)
def test_paths_are_never_read(client, body, path):
    """Neither as images nor as masks, in no form that the readers of regions would take for a path."""
    for change in (
        {"image": path}, {"masks": [path]}, {"masks": [{"path": path}]}, {"masks": [{"bytes": None, "path": path}]},
        {"masks": path}, {"image": {"path": path}}, {"label_map": path},
    ):  # fmt: skip
        reply = client.post("/v1/captions", json={**body, **change})
        assert reply.status_code in (400, 415), reply.text
        assert "root:" not in reply.text
    assert refusal(client.post("/v1/chat/completions", json=question(path, "?")), 400)
    files = [("image", (path, encoded(Image.new("RGB", (40, 30))), "image/png"))]
    named = client.post("/v1/captions", files=files, data={"request": '{"boxes": [[1, 1, 9, 9]]}'})
    assert named.status_code == 200  # a name is only a name


def test_addresses_are_not_fetched_unless_allowed(client, body):
    asked = {**body, "image": "https://example.com/a.png"}
    assert "this server does not fetch" in refusal(client.post("/v1/captions", json=asked), 400)
    assert "does not fetch" in refusal(client.post("/v1/chat/completions", json=question(asked["image"], "?")), 400)


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1", "localhost", "0.0.0.0", "10.1.2.3", "192.168.0.1", "172.16.0.1", "169.254.169.254", "100.64.0.1",
        "[::1]", "[::]", "[fd00::1]", "[fe80::1]", "[::ffff:127.0.0.1]", "[2002:7f00:1::]", "2130706433", "0x7f.1",
        "224.0.0.1", "no-such-host.invalid", "",
    ],
)  # fmt: skip
def test_private_addresses_are_never_reached(host, monkeypatch):
    def connect(*_arguments, **_keywords):
        raise AssertionError("a private address was connected to")

    monkeypatch.setattr(remote.socket, "create_connection", connect)
    with pytest.raises(Refused) as refused:
        remote.fetch(f"http://{host}/a.png", "image", Limits(allow_urls=True))
    assert refused.value.status == 400
    for address in ("ftp://example.com/a", "http://user:word@1.1.1.1/a", "http://[1.1.1.1/", "http://1.1.1.1:99999/"):
        with pytest.raises(Refused):
            remote.fetch(address, "image", Limits(allow_urls=True))


class Pictures(BaseHTTPRequestHandler):
    """Serves a picture, and what servers of pictures should not do."""

    def do_GET(self) -> None:
        if self.path == "/inside":
            return self.redirect("http://127.0.0.1:1/a.png")
        if self.path == "/round":
            return self.redirect("/round")
        if self.path == "/missing":
            return self.send_error(404)
        self.send_response(200)
        self.end_headers()
        if self.path == "/large":
            self.wfile.write(bytes(300_000))
        elif self.path == "/slow":
            self.wfile.write(b"x")
            self.wfile.flush()
            self.server.gate.wait(20)
        else:
            self.wfile.write(encoded(Image.new("RGB", (40, 30), "red")))
        return None

    def redirect(self, target: str) -> None:
        self.send_response(302)
        self.send_header("Location", target)
        self.end_headers()

    def log_message(self, *_arguments) -> None:
        pass


@pytest.fixture
def pictures(monkeypatch):
    """The address of such a server, under a name that stands for a public address; everything else is as it is."""
    server = HTTPServer(("127.0.0.1", 0), Pictures)
    server.gate = threading.Event()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    check = remote.public_address
    monkeypatch.setattr(
        remote, "public_address", lambda host, *rest: "127.0.0.1" if host == "pictures.test" else check(host, *rest)
    )
    yield f"http://pictures.test:{server.server_port}"
    server.gate.set()
    server.shutdown()
    thread.join()
    server.server_close()


def test_allowed_addresses_are_fetched_within_bounds(pictures, model, processor):
    limits = Limits(allow_urls=True, max_body_bytes=200_000, url_seconds=1)
    with client_of(model, processor, limits) as client:
        asked = {"image": f"{pictures}/a.png", "boxes": [[1, 1, 9, 9]]}
        reply = client.post("/v1/captions", json=asked)
        assert (reply.status_code, reply.json()["width"]) == (200, 40)
        for path, status, message in (
            ("/inside", 400, "is not a public one"),
            ("/round", 400, "redirects more than 3 times"),
            ("/missing", 400, "answers with status 404"),
            ("/large", 413, "more than 200000 bytes"),
            ("/slow", 400, "pictures.test cannot be read"),
        ):
            start = time.perf_counter()
            reply = client.post("/v1/captions", json={**asked, "image": pictures + path})
            assert message in refusal(reply, status)
            assert time.perf_counter() - start < 10


def test_a_name_that_changes_its_meaning_is_asked_once(monkeypatch):
    """The connection goes to the address that was checked."""
    answers, reached = iter([["93.184.215.14"], ["127.0.0.1"]]), []
    monkeypatch.setattr(
        remote.socket, "getaddrinfo",
        lambda *_, **__: [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 80)) for address in next(answers)],
    )  # fmt: skip

    def connect(address, *_):
        reached.append(address)
        raise OSError("no network here")

    monkeypatch.setattr(remote.socket, "create_connection", connect)
    with pytest.raises(Refused, match="cannot be read"):
        remote.fetch("http://pictures.test/a.png", "image", Limits(allow_urls=True))
    assert reached == [("93.184.215.14", 80)]


def test_too_many_requests_at_a_time(model, processor, body):
    """One more than may be under way is told to come again."""
    with client_of(model, processor, Limits(max_requests=1)) as client:
        guard = client.app.middleware_stack
        while not hasattr(guard, "num_requests"):
            guard = guard.app
        guard.num_requests = 1
        reply = client.post("/v1/captions", json=body)
        assert "1 requests are under way already" in refusal(reply, 503)
        assert reply.headers["retry-after"] == "1"
        guard.num_requests = 0
        assert client.post("/v1/captions", json=body).status_code == 200


def test_what_the_server_does_wrong_is_kept_from_the_client(model, processor, body, monkeypatch, caplog):
    with client_of(model, processor) as client:
        client._transport.raise_server_exceptions = False
        monkeypatch.setattr(model.lm_head, "forward", lambda *_: 1 // 0)
        reply = client.post("/v1/captions", json=body)
    assert refusal(reply, 500) == "the server failed on this request"
    assert "ZeroDivisionError" in caplog.text


def test_fuzzed_requests_leave_the_server_healthy(client):
    """A few hundred here; tests/serving/fuzz_server.py sends thousands."""
    before = client.post("/v1/captions", json=good_captions()).json()["regions"]

    def send(method, path, headers, content):
        reply = client.request(method, path, headers=headers, content=content)
        return reply.status_code, reply.content

    statuses, faults = fuzz(send, FUZZED, seed=1)
    assert not faults, "\n".join(faults[:10])
    assert statuses[200] > FUZZED // 20
    assert statuses[400] > FUZZED // 4
    assert client.post("/v1/captions", json=good_captions()).json()["regions"] == before
    assert client.get("/ready").json() == {"ready": True, "waiting": 0, "running": 0}
    assert np.isfinite([region["score"] for region in before]).all()
