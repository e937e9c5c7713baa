"""An append-only file of judges' answers, content-addressed, shared by threads and processes.

One JSON record per line: ``{"key", "text", "model", "prompt_tokens", "completion_tokens", "time"}``. The key is a hash
of everything that determines the answer, so a record never becomes wrong; none is ever changed or deleted. An answer is
on disk before it is used. A process that is killed while writing leaves a line without its end: readers ignore such a
line, and the next writer cuts it off.
"""

import hashlib
import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock


# Questions are claimed by the first bits of their keys. Two questions with the same claim merely wait for each other.
NUM_CLAIMS = 1024


@dataclass(frozen=True)
class Answer:
    """A judge's answer.

    Attributes:
        text: what it said, not empty.
        prompt_tokens, completion_tokens: what it took, as the endpoint counts; 0 where it does not tell.
    """

    text: str
    prompt_tokens: int = 0
    completion_tokens: int = 0


def answer_key(**parts: Any) -> str:
    """A hash of JSON-ready parts (model, settings, prompt, hashes of images), 64 hexadecimal digits."""
    canonical = json.dumps(parts, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(canonical.encode("utf-8", errors="surrogatepass")).hexdigest()


class AnswerCache:
    """Answers by key, in memory and in a file.

    To ask every question once, whatever number of threads and processes share the file:

        with cache.claim(key):
            if cache.get(key) is None:
                cache.add(key, ask(), model)

    Args:
        path: the file; it and its folder are made when needed. Lock files stand beside it, in ``NAME.locks/``.

    Raises:
        ValueError: a line of the file that has its end is not a record, naming the line.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._locks = self.path.with_name(f"{self.path.name}.locks")
        self._locks.mkdir(parents=True, exist_ok=True)
        self._answers: dict[str, Answer] = {}
        self._offset = self._num_lines = 0
        self._reading = threading.Lock()
        self._writing = threading.Lock()
        self._refresh()

    def __len__(self) -> int:
        """Number of answers known."""
        return len(self._answers)

    def get(self, key: str) -> Answer | None:
        """The answer, or None; sees what other processes have added."""
        if key not in self._answers:
            self._refresh()
        return self._answers.get(key)

    @contextmanager
    def claim(self, *keys: str) -> Iterator[None]:
        """Hold questions, so that no other thread or process asks them; waits while another holds one.

        The system ends the claims of a process that is killed.
        """
        numbers = sorted({int(key, 16) * NUM_CLAIMS >> 4 * len(key) for key in keys})  # one order: no deadlock
        with ExitStack() as held:
            for number in numbers:
                held.enter_context(FileLock(self._locks / f"claim-{number:04d}").acquire(poll_interval=0.01))
            yield

    def add(self, key: str, answer: Answer, model: str) -> None:
        """Store an answer; it is on disk when this returns."""
        record = {
            "key": key,
            "text": answer.text,
            "model": model,
            "prompt_tokens": answer.prompt_tokens,
            "completion_tokens": answer.completion_tokens,
            "time": round(time.time(), 3),
        }
        line = (json.dumps(record) + "\n").encode("ascii")
        file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            with self._writing, FileLock(self._locks / "write").acquire(poll_interval=0.001):
                end = _end_of_last_line(file)
                os.ftruncate(file, end)
                _write_all(file, line, end)
            os.fsync(file)
        finally:
            os.close(file)
        self._answers[key] = answer

    def _refresh(self) -> None:
        """Read the lines added since the last time; a last line without its end is left for later.

        What is new is read at once: a line read in two pieces could begin with what a writer cuts off in between, and
        end with what it writes there.
        """
        with self._reading:
            if not self.path.exists():
                return
            with self.path.open("rb", buffering=0) as file:
                added = os.pread(file.fileno(), max(0, os.fstat(file.fileno()).st_size - self._offset), self._offset)
            for line in added[: added.rfind(b"\n") + 1].splitlines(keepends=True):
                self._num_lines += 1
                self._read_record(line)
                self._offset += len(line)

    def _read_record(self, line: bytes) -> None:
        try:
            record = json.loads(line)
            answer = Answer(record["text"], record["prompt_tokens"], record["completion_tokens"])
            self._answers[record["key"]] = answer
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"line {self._num_lines} of {self.path} is not a record of an answer; remove the line to go on"
            ) from error


def _end_of_last_line(file: int, block: int = 4096) -> int:
    """Offset behind the last line break of an open file, 0 without any."""
    stop = os.fstat(file).st_size
    while stop > 0:
        start = max(stop - block, 0)
        found = os.pread(file, stop - start, start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        stop = start
    return 0


def _write_all(file: int, data: bytes, offset: int) -> None:
    while data:
        written = os.pwrite(file, data, offset)
        data, offset = data[written:], offset + written
