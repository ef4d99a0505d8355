"""Reading JSON objects from untrusted files: bounded in size, one sentence for each fault."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MOST_BYTES = 4 << 20  # of a config; the largest published ones have a hundredth of that


def read_object(path: Path, most: int = MOST_BYTES) -> dict[str, Any]:
    """Return the object in the file.

    Raises ``FileNotFoundError``, or ``ValueError`` where the file is too large or holds no object.
    """
    return parse_object(read_text(path, most), path)


def read_text(path: Path, most: int = MOST_BYTES) -> str:
    """Return the text of a UTF-8 file of at most ``most`` bytes."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    with open(path, "rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"{path} is larger than {most} bytes, the most that is read")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is truncated or corrupt: {one_line(error)}") from error


def parse_object(text: str, path: Path) -> dict[str, Any]:
    """Return the JSON object in ``text``; ``path`` is for errors."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is truncated or corrupt: {one_line(error)}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds {type(value).__name__}, expected an object")
    return value


def one_line(error: object, most: int = 200) -> str:
    """Return the message of an error on one line of at most ``most`` characters."""
    said = " ".join(str(error).split()) or type(error).__name__
    return said if len(said) <= most else said[:most] + "..."
