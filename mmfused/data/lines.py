"""Read the lines of a text file one after the other, whatever its size and its bytes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

MAX_BYTES = 2**36
# Largest number of characters of a line; the rest of a longer line is not kept.
MAX_LINE = 2**22


class Lines:
    """The lines of a UTF-8 file, split at LF, CRLF and CR only; they keep their line ends.

    Bytes that are not UTF-8 become lone surrogates. Lines can be looked at before they are taken.

    Args:
        path: the file; one of more than ``MAX_BYTES`` bytes is refused.

    Raises:
        ValueError: the file cannot be read, is too large, or is UTF-16.
    """

    def __init__(self, path: Path) -> None:
        self.taken = 0  # number of lines that were taken
        self._ahead: list[str] = []
        try:
            size = path.stat().st_size
            if size > MAX_BYTES:
                raise ValueError(f"{path}: got {size} bytes, expected at most {MAX_BYTES}")
            with open(path, "rb") as file:
                mark = file.read(2)
            if mark in (b"\xff\xfe", b"\xfe\xff"):
                raise ValueError(f"{path}: got UTF-16, expected UTF-8: save it as UTF-8")
            # Spreadsheet programs write a byte order mark, which is not part of the first line.
            self._file: TextIO = open(
                path, encoding="utf-8-sig", errors="surrogateescape", newline=""
            )
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror}") from error

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def take(self) -> str:
        """Return the next line, or "" at the end."""
        line = self._ahead.pop(0) if self._ahead else self._read()
        if line:
            self.taken += 1
        return line

    def put_back(self, line: str) -> None:
        """Undo a ``take``."""
        self._ahead.insert(0, line)
        self.taken -= 1

    def look(self, most: int) -> Iterator[str]:
        """Yield at most ``most`` of the next lines without taking them."""
        for index in range(most):
            if index == len(self._ahead):
                line = self._read()
                if not line:
                    return
                self._ahead.append(line)
            yield self._ahead[index]

    def drop(self, count: int) -> list[str]:
        """Take ``count`` lines that were looked at."""
        lines = self._ahead[:count]
        del self._ahead[:count]
        self.taken += count
        return lines

    def _read(self) -> str:
        line = self._file.readline(MAX_LINE)
        if len(line) == MAX_LINE and line[-1] not in "\r\n":
            rest = self._file.readline(MAX_LINE)
            while len(rest) == MAX_LINE and rest[-1] not in "\r\n":
                rest = self._file.readline(MAX_LINE)
        return line


def too_long(line: str) -> str | None:
    """Return the reason why a row with this line is broken, or None."""
    if len(line) < MAX_LINE:
        return None
    return f"it has a line of more than {MAX_LINE} characters"
