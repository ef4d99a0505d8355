"""Read JSON objects from untrusted files, with a limit on their size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MAX_CONFIG_BYTES = 4 << 20


def read_object(path: Path, most: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not a JSON object, or is larger than ``most`` bytes.
    """
    return parse_object(read_text(path, most), path)


def read_text(path: Path, most: int = MAX_CONFIG_BYTES) -> str:
    """Return the text of a UTF-8 file of at most ``most`` bytes."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    with open(path, "rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"{path} is larger than {most} bytes, the largest size that is read")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is truncated or corrupt: {one_line(error)}") from error


def parse_object(text: str, path: Path) -> dict[str, Any]:
    """Return the JSON object in ``text``; error messages name ``path``."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is truncated or corrupt: {one_line(error)}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds {type(value).__name__}, expected an object")
    return value


def one_line(error: object, most: int = 200) -> str:
    """Return the text of ``error`` on one line, cut after ``most`` characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= most else text[:most] + "..."
