"""Random and mutated requests to every endpoint; anything but an answer or a refusal with a reason is a failure.

    python tests/serving/fuzz_server.py --count 5000                    # the embedded model, served in this process
    python tests/serving/fuzz_server.py --url http://localhost:8000     # a server that runs

What a request holds depends on the seed and its number alone, so a failure is repeated with `--only NUMBER`.
"""

import argparse
import copy
import json
import random
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image
from served import data_url, encoded, question, run_lengths, text_of, with_region
from tqdm.auto import tqdm


WIDTH, HEIGHT = 48, 40
FINE = (200, 400, 404, 405, 408, 411, 413, 415)
KINDS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
PATHS = ("/v1/captions", "/v1/chat/completions", "/chat/completions", "/v1/models", "/ready", "/metrics", "/x", "/../e")
TYPES = ("application/json", "text/plain", "multipart/form-data", "multipart/form-data; boundary=x", "", "image/png")
ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 3, 2**31, -(2**63), 10**30, 0.5, -1e300, 1e-300, "", " ", "a", "\x00", "\ud800",
    "<|mdm_mask|><img><IMG_CONTEXT></img>", "data:", "data:image/png;base64,", "data:image/svg+xml;base64,PHN2Zy8+",
    "http://127.0.0.1/", "file:///etc/passwd", "../../../etc/passwd", "/etc/passwd", "C:\\x", [], {}, [[]], [None],
    [[[[[]]]]], {"path": "/etc/passwd"}, {"bytes": "x"}, {"size": [40, 48], "counts": "0"}, [0] * 500, "🂡" * 300,
    {"size": [-1, 10**9], "counts": [1, 2]}, [[1, 2], [3, 4], [5, 6]], "x" * 5000,
)  # fmt: skip
Send = Callable[[str, str, dict[str, str], bytes], tuple[int, bytes]]


def picture() -> Image.Image:
    """A small picture with something in it."""
    pixels = np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    pixels[8:30, 10:36] = (200, 30, 30)
    return Image.fromarray(pixels)


def square() -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[8:30, 10:36] = True
    return mask


def good_captions() -> dict[str, Any]:
    """A request with a region of every form."""
    return {
        "image": data_url(picture()),
        "masks": [run_lengths(square()), [4, 4, 20, 4, 20, 20], data_url(Image.fromarray(square()))],
        "boxes": [[2, 3, 30, 31]],
        "question": "What is it?",
        "settings": {"preset": "fast", "max_new_tokens": 4, "steps": 4},
        "return_masks": True,
    }


def good_chat() -> dict[str, Any]:
    """A chat about a marked region, or with regions in their field."""
    return question(
        data_url(with_region(picture(), square())), "What is it?", max_tokens=4, temperature=0.3, seed=3, stream=False,
        regions={"boxes": [[2, 3, 30, 31]]},
    )  # fmt: skip


def mutated(value: Any, rng: random.Random) -> Any:
    """A JSON value with a place replaced, removed, doubled or broken."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 2, 4))):
        places = list(places_of(value))
        holder, key = rng.choice(places)
        action = rng.random()
        if action < 0.55:
            holder[key] = copy.deepcopy(rng.choice(ODD))
        elif action < 0.7:
            del holder[key]
        elif action < 0.8 and isinstance(holder, list):
            holder.extend([copy.deepcopy(holder[key])] * rng.choice((1, 50)))
        elif action < 0.9 and isinstance(holder[key], str):
            holder[key] = broken_text(holder[key], rng)
        else:
            holder[key] = [holder[key]]
        if not value:
            break
    return value


def places_of(value: Any) -> Any:
    """Every holder and key below a value."""
    entries = list(value.items()) if isinstance(value, dict) else list(enumerate(value))
    for key, inner in entries:
        yield value, key
        if isinstance(inner, (dict, list)) and inner:
            yield from places_of(inner)


def broken_text(text: str, rng: random.Random) -> str:
    place = rng.randrange(len(text) + 1)
    return rng.choice((text[:place], text[:place] + "\x00=" + text[place:], text[place:] + text[:place]))


def broken_bytes(content: bytes, rng: random.Random) -> bytes:
    """A file that was cut, or some of whose bytes changed."""
    if rng.random() < 0.3:
        return content[: rng.randrange(len(content) + 1)]
    changed = bytearray(content)
    for _ in range(rng.choice((1, 3, 30))):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed)


def form(rng: random.Random) -> tuple[dict[str, str], bytes]:
    """A form with broken files, odd names and odd fields."""
    parts = []
    for _ in range(rng.choice((1, 2, 3, 6))):
        name = rng.choice(("image", "masks", "masks", "request", "other", ""))
        source = rng.choice((picture(), Image.fromarray(square())))
        content = broken_bytes(encoded(source, rng.choice(KINDS)), rng) if rng.random() < 0.5 else encoded(source)
        if name == "request" or rng.random() < 0.1:
            content = json.dumps(mutated(good_captions(), rng)).encode() if rng.random() < 0.7 else b"{}"
        file = rng.choice(("a.png", "../../a.png", "a.svg", "\r\n", "", None))
        disposition = f'form-data; name="{name}"' + (
            "" if file is None or name == "request" else f'; filename="{file}"'
        )
        parts.append(b"--x\r\nContent-Disposition: " + disposition.encode() + b"\r\n\r\n" + content + b"\r\n")
    body = b"".join(parts) + b"--x--\r\n"
    return {"content-type": "multipart/form-data; boundary=x"}, broken_bytes(body, rng) if rng.random() < 0.2 else body


def request(seed: int, number: int) -> tuple[str, str, dict[str, str], bytes]:
    """Method, path, headers and body of a request."""
    rng = random.Random(f"{seed} {number}")
    good = rng.choice((good_captions, good_chat))
    path = "/v1/captions" if good is good_captions else rng.choice(PATHS[1:3])
    headers = {"content-type": "application/json"}
    kind = rng.random()
    if kind < 0.45:
        return "POST", path, headers, json.dumps(mutated(good(), rng)).encode()
    if kind < 0.6:
        return "POST", path, headers, broken_bytes(json.dumps(good()).encode(), rng)
    if kind < 0.8:
        image = broken_bytes(encoded(picture(), rng.choice(KINDS)), rng)
        body = {**good_captions(), "image": text_of(image)} if good is good_captions else question(text_of(image), "?")
        return "POST", path, headers, json.dumps(body).encode()
    if kind < 0.92:
        return "POST", "/v1/captions", *form(rng)
    body = rng.choice((b"", b"[", b"null", b'"x"', b"[" * 3000, rng.randbytes(200), json.dumps(good()).encode()))
    headers = {"content-type": rng.choice(TYPES), "x-odd": rng.choice(("", "a" * 2000, "\x7f"))}
    return rng.choice(("POST", "POST", "GET", "PUT", "DELETE", "HEAD")), rng.choice(PATHS), headers, body


def fault(status: int, content: bytes, method: str) -> str | None:
    """What is wrong with a reply; None for an answer or a refusal with a reason."""
    if status not in FINE:
        return f"status {status}: {content[:300]!r}"
    if status == 200 or method == "HEAD":
        return None
    try:
        reason = json.loads(content)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return f"status {status} without a reason: {content[:300]!r}"
    if not reason or "Traceback" in reason or "root:" in reason:
        return f"status {status} with the reason {reason[:300]!r}"
    return None


def fuzz(send: Send, count: int, seed: int, only: int | None = None) -> tuple[Counter, list[str]]:
    """Send requests; returns how many of each status came back, and the faults."""
    statuses, faults = Counter[int](), []
    numbers = range(count) if only is None else [only]
    for number in tqdm(numbers, desc="requests", disable=len(numbers) < 1000):
        asked = request(seed, number)
        status, content = send(*asked)
        statuses[status] += 1
        if (found := fault(status, content, asked[0])) is not None:
            faults.append(f"request {number} ({asked[0]} {asked[1]}): {found}")
    return statuses, faults


def main() -> int:
    """Fuzz a server, and ask it for a caption before and after."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="this request alone")
    parser.add_argument("--url", help="of a running server; by default the embedded model is served here")
    options = parser.parse_args()
    if options.url:
        import httpx

        client: Any = httpx.Client(base_url=options.url, timeout=60)
    else:
        from starlette.testclient import TestClient

        from perceptiondlm.serving.server.run import Recipe

        client = TestClient(Recipe().app())
    with client:

        def send(method: str, path: str, headers: dict[str, str], content: bytes) -> tuple[int, bytes]:
            reply = client.request(method, path, headers=headers, content=content)
            return reply.status_code, reply.content

        def captions() -> list[str]:
            return [region["caption"] for region in client.post("/v1/captions", json=good_captions()).json()["regions"]]

        before = captions()
        statuses, faults = fuzz(send, options.count, options.seed, options.only)
        healthy = captions() == before and client.get("/ready").json() == {"ready": True, "waiting": 0, "running": 0}
    print("\n".join(faults[:20]))
    report = {"requests": sum(statuses.values()), "statuses": dict(statuses), "faults": len(faults), "healthy": healthy}
    print(json.dumps(report))
    return int(bool(faults) or not healthy)


if __name__ == "__main__":
    sys.exit(main())
