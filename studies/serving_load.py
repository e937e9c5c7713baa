"""A server under load: requests per second and latencies, and whether every answer is the offline one.

    python -m perceptiondlm.studies.serving_load --requests 200 --json studies/results/serving_load.json

Starts `perceptiondlm serve` on loopback and asks for captions of drawn scenes in mixed sizes: first one request at a
time, then from many clients at once, of which some send broken requests, some send slowly, and some go away; then the
server is told to stop (SIGTERM) under the same load. Every image is new to the server in every phase. Answers are
compared with the pipeline's on the same weights. The last line is one JSON object.
"""

import argparse
import asyncio
import base64
import io
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask
from tqdm.auto import tqdm
from transformers import Pipeline

from perceptiondlm.common.environment import environment
from perceptiondlm.common.json_files import write_json
from perceptiondlm.common.loading import DRAWN_MODEL, add_model_arguments, generate_settings, load_pipeline
from perceptiondlm.drawn.scenes import draw_scene


SCALES = (0.6, 1.0, 1.0, 2.0, 4.0)  # of drawn scenes, a few hundred pixels wide
STARTED = "Uvicorn running on http://127.0.0.1:"
BROKEN = ("cut", "box", "json", "picture")
SCORE_TOLERANCE = 1e-4
PIECES, PAUSE_SECONDS = 8, 0.05  # of a body that is sent slowly


@dataclass
class Ask:
    """A request and what the pipeline answers.

    Args:
        body: for `/v1/captions`, as JSON.
        expected: the pipeline's result.
        kind: `"plain"`, `"slow"` (its body comes in pieces), `"gone"` (the client leaves), or one of `BROKEN`.
    """

    body: bytes
    expected: list[dict[str, Any]]
    kind: str = "plain"


@dataclass
class Tally:
    """What came back in a phase.

    Args:
        seconds: of answers to plain requests; statuses: of all replies; `"refused"` where there was no connection,
            `"cut"` where it was closed without a reply, `"gone"` where the client left.
        wrong: descriptions of answers that are not the offline ones and of refusals without a reason.
        deviations: of scores from the offline ones.
    """

    seconds: list[float] = field(default_factory=list)
    statuses: Counter = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    deviations: list[float] = field(default_factory=list)
    answered: int = 0
    took: float = 0.0

    def report(self) -> dict[str, Any]:
        """Figures of the phase."""
        times = np.array(self.seconds or [float("nan")])
        return {
            "requests": sum(self.statuses.values()),
            "answered": self.answered,
            "statuses": {str(status): count for status, count in sorted(self.statuses.items(), key=str)},
            "wrong": self.wrong[:10],
            "largest_score_deviation": max(self.deviations, default=0.0),
            "seconds": round(self.took, 2),
            "answers_per_second": round(self.answered / self.took, 3),
            "p50_seconds": round(float(np.quantile(times, 0.5)), 3),
            "p95_seconds": round(float(np.quantile(times, 0.95)), 3),
        }


def asks(pipe: Pipeline, options: argparse.Namespace, phase: int, rng: random.Random) -> list[Ask]:
    """The plain requests of a phase, each about a scene of its own."""
    found, count, settings = [], options.requests, generate_settings(options)
    for number in tqdm(range(phase * count, (phase + 1) * count), desc="offline answers", disable=count < 20):
        scene, scale = draw_scene(11, number), rng.choice(options.scales)
        width, height = scene.image.size
        size = round(width * scale), round(height * scale)
        image = scene.image.resize(size, Image.Resampling.BICUBIC)
        masks = [
            np.asarray(Image.fromarray(item.mask).resize(size, Image.Resampling.NEAREST)) for item in scene.objects
        ]
        masks = [mask for mask in masks if mask.any()]
        packed = [coco_mask.encode(np.asfortranarray(mask.astype(np.uint8))) for mask in masks]
        stream = io.BytesIO()
        image.save(stream, "PNG")
        body = {
            "image": base64.b64encode(stream.getvalue()).decode(),
            "masks": [{"size": list(rle["size"]), "counts": rle["counts"].decode()} for rle in packed],
        }
        found.append(Ask(json.dumps(body).encode(), pipe(image, masks=masks, **settings)))
    return found


def with_trouble(asked: list[Ask], share: float, rng: random.Random) -> list[Ask]:
    """The requests, a share of them broken, and as many each sent slowly and given up."""
    kinds = ["broken", "slow", "gone", "plain"]
    chosen = rng.choices(kinds, [share, share, share, 1 - 3 * share], k=len(asked))
    return [Ask(*broken(ask, rng)) if kind == "broken" else Ask(ask.body, ask.expected, kind)
            for ask, kind in zip(asked, chosen, strict=True)]  # fmt: skip


def broken(ask: Ask, rng: random.Random) -> tuple[bytes, list, str]:
    """A request with something wrong."""
    kind, body = rng.choice(BROKEN), json.loads(ask.body)
    if kind == "cut":
        body["image"] = body["image"][: len(body["image"]) // 2 // 4 * 4]
    if kind == "box":
        body["boxes"] = [[10, 10, 5, 5]]
    if kind == "picture":
        body["image"] = base64.b64encode(b"<svg></svg>").decode()
    content = json.dumps(body).encode()
    return (content[:-9] if kind == "json" else content), [], kind


class Server:
    """`perceptiondlm serve` as a process of its own."""

    def __init__(self, arguments: list[str]):
        command = [sys.executable, "-m", "perceptiondlm.scripts.cli", "serve", "--port", "0", *arguments]
        self.log = Path(tempfile.mkdtemp()) / "server.log"
        with self.log.open("w") as stream:
            self.process = subprocess.Popen(command, stderr=stream)
        while STARTED not in (text := self.log.read_text()):
            if self.process.poll() is not None:
                raise OSError(f"the server did not start:\n{text[-2000:]}")
            time.sleep(0.1)
        self.port = int(text.split(STARTED)[1].split()[0])

    def megabytes(self) -> float:
        """Resident memory; 0 where the system does not tell."""
        path = Path(f"/proc/{self.process.pid}/status")
        lines = path.read_text().splitlines() if path.is_file() else []
        return sum(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))

    def wait(self, seconds: float) -> int:
        """Wait for its end; the exit status."""
        return self.process.wait(seconds)


async def phase(server: Server, asked: list[Ask], clients: int, stop_after: float | None = None) -> Tally:
    """Send all requests, so many at a time; with `stop_after` the server is told to stop after so many seconds."""
    tally, waiting = Tally(), list(reversed(asked))
    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}", timeout=600, limits=limits) as client:

        async def work() -> None:
            while waiting:
                await send(client, server.port, waiting.pop(), tally)

        async def stop() -> None:
            if stop_after is not None:
                await asyncio.sleep(stop_after)
                server.process.send_signal(signal.SIGTERM)

        start = time.perf_counter()
        await asyncio.gather(stop(), *(work() for _ in range(clients)))
        tally.took = time.perf_counter() - start
    return tally


async def send(client: httpx.AsyncClient, port: int, ask: Ask, tally: Tally) -> None:
    """Send a request in its way, and note what came back."""
    start = time.perf_counter()
    try:
        if ask.kind in ("slow", "gone"):
            status, content = await by_hand(port, ask)
        else:
            reply = await client.post("/v1/captions", content=ask.body, headers={"content-type": "application/json"})
            status, content = reply.status_code, reply.content
    except (httpx.ConnectError, ConnectionRefusedError):  # it has stopped to listen
        tally.statuses["refused"] += 1
        return
    except (httpx.HTTPError, OSError):
        tally.statuses["cut"] += 1
        return
    if ask.kind == "gone":
        tally.statuses["gone"] += 1
        return
    tally.statuses[status] += 1
    if status == 200 and ask.kind == "plain":
        tally.seconds.append(time.perf_counter() - start)
    compare(ask, status, content, tally)


async def by_hand(port: int, ask: Ask) -> tuple[int, bytes]:
    """Send a request over a socket: in pieces, or whole and gone at once."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST /v1/captions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {len(ask.body)}\r\n"
    try:
        writer.write(head.encode() + b"content-type: application/json\r\n\r\n")
        pieces = 1 if ask.kind == "gone" else PIECES
        size = -(-len(ask.body) // pieces)
        for start in range(0, len(ask.body), size):
            writer.write(ask.body[start : start + size])
            await writer.drain()
            await asyncio.sleep(PAUSE_SECONDS)
        if ask.kind == "gone":
            return 0, b""
        reply = await reader.read()
    finally:
        writer.close()
    if not reply:
        raise ConnectionError("closed without a reply")
    start_line, _, rest = reply.partition(b"\r\n")
    return int(start_line.split()[1]), rest.partition(b"\r\n\r\n")[2]


def compare(ask: Ask, status: int, content: bytes, tally: Tally) -> None:
    """Note whether a reply is the offline answer, or a refusal with a reason where one is due."""
    reply = json.loads(content)
    if ask.kind in BROKEN:
        if not (400 <= status < 500 and reply["error"]["message"]):
            tally.wrong.append(f"{ask.kind}: status {status}")
        return
    if status != 200:
        if status != 503:  # at shutdown
            tally.wrong.append(f"{ask.kind}: status {status}, {reply}")
        return
    tally.answered += 1
    found = [(region["caption"], region["box"]) for region in reply["regions"]]
    if found != [(region["caption"], region["box"]) for region in ask.expected]:
        tally.wrong.append(f"{ask.kind}: other captions {found}")
        return
    pairs = zip(reply["regions"], ask.expected, strict=True)
    tally.deviations += [abs(region["score"] - expected["score"]) for region, expected in pairs]
    if tally.deviations and max(tally.deviations) > SCORE_TOLERANCE:
        tally.wrong.append(f"{ask.kind}: scores deviate by {max(tally.deviations)}")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All phases."""
    rng, settings = random.Random(options.seed), generate_settings(options)
    pipe = load_pipeline(options)
    alone = asks(pipe, options, 0, rng)
    crowd = with_trouble(asks(pipe, options, 1, rng), options.trouble, rng)
    last = with_trouble(asks(pipe, options, 2, rng), options.trouble, rng)
    where = environment(pipe.device)
    del pipe
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    arguments += [f"--model={options.model}"]
    arguments += [f"--device={options.device}"] if options.device else []
    server = Server([*arguments, f"--dtype={options.dtype}"])
    try:
        before = server.megabytes()
        one = asyncio.run(phase(server, alone, 1))
        many = asyncio.run(phase(server, crowd, options.clients))
        after = server.megabytes()
        stopped = asyncio.run(phase(server, last, options.clients, stop_after=options.stop_after))
        status = server.wait(120)
    finally:
        if server.process.poll() is None:
            server.process.kill()
    return {
        "clients": options.clients,
        "scales": list(options.scales),
        "settings": settings,
        "one_at_a_time": one.report(),
        "many_clients": many.report(),
        "stopped_under_load": {**stopped.report(), "exit_status": status},
        "server_megabytes": {"before": round(before), "after": round(after)},
        "tracebacks": server.log.read_text().count("Traceback"),
        "environment": where,
    }


def main(arguments: list[str] | None = None) -> int:
    """Measure, and keep the numbers; status 1 where an answer was wrong or the server crashed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=200, help="of each phase")
    parser.add_argument("--scales", type=float, nargs="+", default=SCALES, help="sizes of the scenes, times their own")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--trouble", type=float, default=0.05, help="share of broken, slow and given-up requests each")
    parser.add_argument("--stop-after", type=float, default=3.0, help="seconds into the last phase")
    parser.add_argument("--json", type=Path, help="where the figures are kept")
    add_model_arguments(parser)
    options = parser.parse_args(arguments)
    options.seed, options.model = options.seed or 0, options.model or str(DRAWN_MODEL)
    result = measure(options)
    if options.json:
        write_json(options.json, result)
    print(json.dumps(result))
    phases = [result[name] for name in ("one_at_a_time", "many_clients", "stopped_under_load")]
    return int(any(one["wrong"] for one in phases) or result["tracebacks"] > 0 or phases[2]["exit_status"] != 0)


if __name__ == "__main__":
    sys.exit(main())
