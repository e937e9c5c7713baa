"""Records that cannot be trained on: what they raise, how they are counted over all readers, when they stop a run."""

import json
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from perceptiondlm.common.json_files import read_json, write_json


logger = logging.getLogger(__name__)

CONFIDENCE = 0.999  # that too large a share of a source is bad, before a run stops on the way
MIN_RECORDS = 100  # read before anything is judged on the way
MIN_SHARE = 0.01  # of a source, likewise: bad records come in clumps, such as a damaged file
RETRY_SECONDS = (0.2, 1.0, 3.0)  # waits after failed reads; an error that outlives them is no passing one
COUNTS = "counts"  # folder of what the readers of streams have counted
LASTING = (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)

Result = TypeVar("Result")


class BadRecord(ValueError):
    """A record that cannot be trained on; the message says what is wrong with it, in text that can be written."""

    def __init__(self, message: str):
        super().__init__(message.encode(errors="backslashreplace").decode())


def retried(read: Callable[[], Result]) -> Result:
    """What `read` returns; a passing I/O error (a network file system's, say) is tried again.

    Raises:
        OSError: that of the last try, or at once one that waiting does not heal, such as a missing file.
    """
    for seconds in RETRY_SECONDS:
        try:
            return read()
        except LASTING:
            raise
        except OSError:
            time.sleep(seconds)
    return read()


def surely_exceeds(bad: int, read: int, limit: float) -> bool:
    """Whether the lower confidence bound (Clopper and Pearson) of the share of bad records lies above `limit`.

    That is: were the true share `limit`, as many bad records as this would come with a probability below
    1 - `CONFIDENCE`.
    """
    if bad <= limit * read:
        return False
    if limit == 0:
        return True
    term = total = math.exp(
        math.lgamma(read + 1) - math.lgamma(bad + 1) - math.lgamma(read - bad + 1)
        + bad * math.log(limit) + (read - bad) * math.log1p(-limit)
    )  # fmt: skip
    for count in range(bad, read):  # terms of the binomial tail, falling from here on
        term *= (read - count) / (count + 1) * limit / (1 - limit)
        total += term
        if term < 1e-9 * total or total > 1 - CONFIDENCE:
            break
    return total < 1 - CONFIDENCE


def require_good(name: str, bad: int, read: int, total: int, limit: float, last: str) -> None:
    """Stop when more than the share `limit` of a source is bad.

    Once all its `total` records were read the share is known. Before, it takes `MIN_RECORDS` and `MIN_SHARE` of them
    (where most are bad, `MIN_RECORDS` alone) and a confidence of `CONFIDENCE`. `last` is one of the bad records.

    Raises:
        ValueError: with the numbers.
    """
    enough = MIN_RECORDS if 2 * bad > read else max(MIN_RECORDS, MIN_SHARE * total)
    stop = bad > limit * read if read >= total else read >= enough and surely_exceeds(bad, read, limit)
    if stop:
        raise ValueError(
            f"{bad} of the first {read} records of {name} are bad, data.max_bad_share={limit}; last: {last}"
        )


class Tally:
    """Records read and found bad by all readers of a stream, of whatever process and machine, in one folder.

    Every reader writes a file of its own and reads all of them; nobody waits for anybody. Readers on machines that
    share no folder count for themselves.

    Args:
        folder: of the counts and of `bad_records.jsonl`.
        run_id: of this start of a run; what was counted before it does not matter.
        reader: name of this reader's file.
    """

    def __init__(self, folder: Path, run_id: str, reader: str):
        self.log = folder / "bad_records.jsonl"
        self.counts = folder / COUNTS / run_id
        self.file = self.counts / f"{reader}.json"
        self.own: dict[str, list[int]] = read_json(self.file) if self.file.exists() else {}
        self.last: dict[str, str] = {}

    def add(self, name: str, read: int, bad: dict[str, str], total: int, limit: float, judge: bool = False) -> None:
        """Count some of a source's `total` records, the bad ones by place with what is wrong with them.

        Where some are bad, or to `judge` all the same, `require_good` is asked.
        """
        own = self.own.setdefault(name, [0, 0])
        own[0] += read
        own[1] += len(bad)
        for place, error in bad.items():
            self.last[name] = f"{place}: {error}"
            logger.warning("bad record skipped: %s", self.last[name])
        if bad:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            entries = ({"name": name, "place": place, "error": error} for place, error in bad.items())
            with open(self.log, "a", encoding="utf-8") as stream:  # a line break first: a killed process leaves half
                stream.writelines(f"\n{json.dumps(entry)}\n" for entry in entries)
        write_json(self.file, self.own)
        if bad or judge:
            counts = [content.get(name, (0, 0)) for content in map(read_json, self.counts.glob("[!.]*.json"))]
            all_read, all_bad = (sum(column) for column in zip(*counts, strict=True))
            require_good(name, all_bad, all_read, total, limit, self.last.get(name, f"see {self.log}"))


def logged(log: Path) -> list[dict[str, Any]]:
    """The entries of a log of bad records, each once; a line that a killed process left half written is passed over."""
    if not log.exists():
        return []
    entries = {}
    for line in log.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
            entries[entry["name"], entry["place"]] = entry
        except (json.JSONDecodeError, KeyError, TypeError):
            continue
    return [entries[key] for key in sorted(entries)]
