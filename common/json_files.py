"""JSON files, read with errors that name the file and written at once."""

import json
import os
from pathlib import Path
from typing import Any


def read_json(path: Path) -> Any:
    """A JSON file's content, with or without a byte order mark; refuses a missing or broken file by name."""
    if not path.is_file():
        raise FileNotFoundError(f"no file at {path}")
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:  # its syntax, its encoding, or a number of thousands of digits
        raise ValueError(f"{path} is not JSON: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{path} is JSON nested too deeply to be read") from error


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file at once: a reader sees the old file or the new one, never half of it. Makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(part, path)
