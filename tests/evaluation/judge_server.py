"""A judge behind HTTP for tests: a real server on loopback that answers chat completions, and fails as told."""

import io
import random
import socket
import struct
import time
from collections import Counter

from perceptiondlm.studies.fake_judge import FakeJudge, FakeJudgeHandler


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


class _Handler(FakeJudgeHandler):
    def respond(self, body, text):
        judge = self.judge
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
                self.reply_answer(text)
        finally:
            with judge.lock:
                judge.at_once -= 1

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
        data = b'{"choices": [{"message": {"content": "A"}}]}'
        self.send_response(200)
        self.send_header("Content-Length", str(len(data) + 7))
        self.end_headers()
        self.wfile.write(data)
        self.close_connection = True

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


class JudgeServer(FakeJudge):
    """A fake judge that fails as told and remembers what it was asked.

    Args:
        latency: seconds before a reply.
        failure_rate: share of requests that fail.
        failures: the ways in which they fail, at random: names of methods of `_Handler`.
        stop_after: after so many answers, every request gets `stop_reply`.
        stop_reply: status and JSON body.
    """

    handler = _Handler

    def __init__(self, latency=0.0, failure_rate=0.0, failures=(), stop_after=None, stop_reply=(401, {}), seed=0):
        super().__init__(latency)
        self.failure_rate, self.failures = failure_rate, failures
        self.stop_after, self.stop_reply = stop_after, stop_reply
        self.dice = random.Random(seed)
        self.asked: Counter = Counter()  # prompt -> requests
        self.answered: Counter = Counter()  # prompt -> right answers sent
        self.bodies: list[dict] = []
        self.headers: list[dict] = []
        self.at_once = self.most_at_once = 0

    def settle(self):
        """Wait until no request is under way: those of a client that was killed go on without it."""
        while self.at_once:
            time.sleep(0.01)

    def failure(self):
        """The way in which the next request fails, or None."""
        with self.lock:
            return self.dice.choice(self.failures) if self.dice.random() < self.failure_rate else None
