"""A judge behind HTTP on loopback that knows nothing and takes its time: what judging is measured against.

    python -m perceptiondlm.studies.fake_judge --latency 0.05

prints its base URL, serves until its standard input ends, and prints the number of requests.
"""

import argparse
import hashlib
import json
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


def fake_answer(text: str) -> str:
    """What the judge says to a prompt: a letter that depends on nothing but the prompt."""
    return "AB"[hashlib.sha256(text.encode(errors="surrogatepass")).digest()[0] % 2]


class FakeJudgeHandler(BaseHTTPRequestHandler):
    """One connection; `respond` decides what becomes of a request."""

    judge: "FakeJudge"
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_: object) -> None:
        """Print nothing."""

    def do_POST(self) -> None:
        """A chat completion."""
        length = int(self.headers["Content-Length"])
        data = self.rfile.read(length)
        if len(data) < length:
            raise ConnectionAbortedError("the client was killed while it asked")
        body = json.loads(data)
        content = body["messages"][0]["content"]
        self.respond(body, content if isinstance(content, str) else content[-1]["text"])

    def respond(self, body: Mapping[str, Any], text: str) -> None:
        """Reply to a request that asks `text`."""
        with self.judge.lock:
            self.judge.num_requests += 1
        time.sleep(self.judge.latency)
        self.reply_answer(text)

    def reply_answer(self, text: str) -> None:
        """The answer to a prompt."""
        usage = {"prompt_tokens": 10, "completion_tokens": 2}
        self.reply(200, {"choices": [{"message": {"content": fake_answer(text)}}], "usage": usage})

    def reply(self, status: int, body: Any, headers: Iterable[tuple[str, object]] = ()) -> None:
        """Send a body of bytes, or of JSON."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in (("Content-Type", "application/json"), ("Content-Length", len(data)), *headers):
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(data)


class FakeJudge:
    """The server, a thread for every connection; use as a context manager.

    Args:
        latency: seconds before a reply.

    Attributes:
        base_url: for `judges.openai.openai_endpoint`.
        num_requests: requests so far.
    """

    handler = FakeJudgeHandler

    def __init__(self, latency: float = 0.0) -> None:
        self.latency = latency
        self.num_requests = 0
        self.lock = threading.Lock()

    def __enter__(self) -> "FakeJudge":
        self._server = _Server(("127.0.0.1", 0), type("Handler", (self.handler,), {"judge": self}))
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        self.base_url = f"http://127.0.0.1:{self._server.server_port}/v1"
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up, or is killed, is nothing to report."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latency", type=float, default=0.05, help="seconds before a reply")
    with FakeJudge(parser.parse_args().latency) as judge:
        print(judge.base_url, flush=True)
        sys.stdin.read()
        print(judge.num_requests)


if __name__ == "__main__":
    main()
