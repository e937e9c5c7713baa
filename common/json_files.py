"""JSON files, read with errors that name the file and written at once."""

import json
import os
from pathlib import Path
from typing import Any


def read_json(path: Path) -> Any:
    """A JSON file's content, with or without a byte order mark; refuses a missing or broken file by name."""
    if not path.is_file():
        raise FileNotFoundError(f"no file at {path}")
    return parsed_json(path.read_bytes(), str(path))


def parsed_json(content: bytes, name: str) -> Any:
    """What JSON holds; refuses what is broken, under the name given."""
    try:
        return json.loads(content)
    except ValueError as error:  # its syntax, its encoding, or a number of thousands of digits
        raise ValueError(f"{name} is not JSON: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{name} is JSON nested too deeply to be read") from error


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file at once: a reader sees the old file or the new one, never half of it. Makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(part, path)


def report_json(content: Any, path: Path | None) -> None:
    """Print a result as one line of JSON, and write it to a file where one is wanted."""
    print(json.dumps(content))
    if path:
        write_json(path, content)
