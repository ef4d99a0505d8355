"""JSON objects from files that may say anything: bounded in size, and each fault in one sentence."""

from __future__ import annotations

import json
from pathlib import Path

MOST_BYTES = 4 << 20  # of a config; the largest that are published have a hundredth of it


def read_object(path: Path, most: int = MOST_BYTES) -> dict:
    """The object in the file. FileNotFoundError without a file, ValueError where it is no JSON
    object or too large.
    """
    return parse_object(read_text(path, most), path)


def read_text(path: Path, most: int = MOST_BYTES) -> str:
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


def parse_object(text: str, path: Path) -> dict:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is truncated or corrupt: {one_line(error)}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds {type(value).__name__}, expected an object")
    return value


def one_line(error: object, most: int = 200) -> str:
    """What an error says, as part of a sentence."""
    said = " ".join(str(error).split()) or type(error).__name__
    return said if len(said) <= most else said[:most] + "..."
