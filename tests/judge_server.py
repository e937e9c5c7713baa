"""A judge behind HTTP for tests: a real server on loopback that answers chat completions, and fails as told."""

import hashlib
import io
import json
import random
import socket
import struct
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


WRONG_CONTENTS = (
    b"",
    b"[]",
    b"null",
    b"<html>ok</html>",
    b"\xff\xfe",
    b'{"choices": []}',
    b'{"choices": [["message"]]}',
    b'{"choices": [{"message": "A"}]}',
    b'{"choices": [{"message": {"content": 1}}]}',
    b'{"error": {"message": "overloaded"}}',
)


def right_answer(text: str) -> str:
    """What the judge says to a prompt: a letter that depends on nothing but the prompt."""
    return "AB"[hashlib.sha256(text.encode(errors="surrogatepass")).digest()[0] % 2]


class JudgeServer:
    """Use as a context manager; `base_url` is for `openai_endpoint`.

    Args:
        latency: seconds before a reply.
        failure_rate: share of requests that fail.
        failures: the ways in which they fail, at random: names of methods of `_Handler`.
        stop_after: after so many answers, every request gets `stop_reply`.
        stop_reply: status and JSON body.
    """

    def __init__(self, latency=0.0, failure_rate=0.0, failures=(), stop_after=None, stop_reply=(401, {}), seed=0):
        self.latency, self.failure_rate, self.failures = latency, failure_rate, failures
        self.stop_after, self.stop_reply = stop_after, stop_reply
        self.dice = random.Random(seed)
        self.lock = threading.Lock()
        self.asked: Counter = Counter()  # prompt -> requests
        self.answered: Counter = Counter()  # prompt -> right answers sent
        self.bodies: list[dict] = []
        self.headers: list[dict] = []
        self.at_once = self.most_at_once = 0

    def __enter__(self):
        handler = type("Handler", (_Handler,), {"judge": self})
        self.server = _Server(("127.0.0.1", 0), handler)
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()
        self.base_url = f"http://127.0.0.1:{self.server.server_port}/v1"
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def settle(self):
        """Wait until no request is under way: those of a client that was killed go on without it."""
        while self.at_once:
            time.sleep(0.01)

    def failure(self):
        """The way in which the next request fails, or None."""
        with self.lock:
            return self.dice.choice(self.failures) if self.dice.random() < self.failure_rate else None


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request, client_address):
        """A client that hangs up, or is killed, is what some tests are about; anything else is printed."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    judge: JudgeServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_):
        pass

    def do_POST(self):
        judge = self.judge
        data = self.rfile.read(int(self.headers["Content-Length"]))
        if len(data) < int(self.headers["Content-Length"]):
            raise ConnectionAbortedError("the client was killed while it asked")
        body = json.loads(data)
        content = body["messages"][0]["content"]
        text = content if isinstance(content, str) else content[-1]["text"]
        with judge.lock:
            judge.asked[text] += 1
            judge.bodies = [*judge.bodies[-9:], {"path": self.path, **body}]
            judge.headers = [*judge.headers[-9:], dict(self.headers)]
            judge.at_once += 1
            judge.most_at_once = max(judge.most_at_once, judge.at_once)
            stopped = judge.stop_after is not None and judge.answered.total() >= judge.stop_after
        try:
            time.sleep(judge.latency)
            failure = judge.failure()
            if stopped:
                self.reply(*judge.stop_reply)
            elif failure is not None:
                getattr(self, failure)()
            else:
                with judge.lock:
                    judge.answered[text] += 1
                usage = {"prompt_tokens": 10, "completion_tokens": 2}
                self.reply(200, {"choices": [{"message": {"content": right_answer(text)}}], "usage": usage})
        finally:
            with judge.lock:
                judge.at_once -= 1

    def reply(self, status, body, headers=(), cut=0):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in (("Content-Type", "application/json"), ("Content-Length", len(data)), *headers):
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(data[: len(data) - cut])
        self.close_connection = bool(cut)

    # Ways to fail.

    def too_many(self):
        self.reply(429, {"error": {"message": "slow down", "code": "rate_limit_exceeded"}}, [("Retry-After", 0.01)])

    def broken_server(self):
        self.reply(500, b"<html>Internal Server Error</html>")

    def hang(self):
        time.sleep(0.6)
        self.close_connection = True

    def truncated_json(self):
        self.reply(200, b'{"choices": [{"message": {"content": "A"')

    def truncated_body(self):
        self.reply(200, {"choices": [{"message": {"content": "A"}}]}, cut=7)

    def wrong_content(self):
        with self.judge.lock:
            wrong = self.judge.dice.choice(WRONG_CONTENTS)
        self.reply(200, wrong)

    def empty_answer(self):
        self.reply(200, {"choices": [{"message": {"content": ""}, "finish_reason": "stop"}]})

    def reset(self):
        linger = struct.pack("ii", 1, 0)  # closing sends RST
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.connection.close()
        self.close_connection = True
        self.wfile = io.BytesIO()
