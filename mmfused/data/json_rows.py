"""Read the entries of a JSON list, of JSON lines or of a Parquet file one after the other."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from mmfused.json_files import one_line

from .rows import BrokenRow

# Number of characters that are read at once, and the largest number of an entry.
CHUNK = 2**22
MAX_ENTRY = 2**26
# Where in a cut text the decoder finds the error: at most so many characters before its end,
# unless a string is cut.
NEAR_END = 16
UNTERMINATED = "Unterminated string"
ROWS = 1024  # rows of Parquet that are Python objects at a time


def json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield where each entry of a file is, such as "line 3", and the entry.

    In place of an entry that cannot be read, a BrokenRow with the reason is yielded. Blank lines
    are left out. After an error of syntax in a list, nothing more is read.

    Args:
        path: a JSON list, JSON lines (an object in each line), or a file named ``*.parquet``.

    Raises:
        ValueError: the file cannot be read, or is neither of these.
    """
    if path.suffix == ".parquet":
        yield from _parquet_rows(path)
        return
    try:
        if not path.is_file():
            raise ValueError(f"{path} is not a file")
        with open(path, "rb") as file:
            if file.read(2) in (b"\xff\xfe", b"\xfe\xff"):
                raise ValueError(f"{path}: got UTF-16, expected UTF-8: save it as UTF-8")
        # Bytes that are not UTF-8 become lone surrogates, so that only their rows are broken.
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="\n") as file:
            start = first_letter(file)
            file.seek(0)
            if start not in ("[", "{"):
                raise ValueError(f"{path}: got no JSON list and no JSON object in its first line")
            yield from _list_entries(file) if start == "[" else _lines(file)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error


def first_letter(file: TextIO) -> str:
    """Return the first character of a file that is no white space; "" if there is none."""
    while text := file.read(CHUNK):
        if text := text.lstrip():
            return text[0]
    return ""


def _lines(file: TextIO) -> Iterator[tuple[str, Any]]:
    number = 0
    while line := file.readline(MAX_ENTRY):
        number += 1
        where = f"line {number}"
        if len(line) == MAX_ENTRY and line[-1] != "\n":
            while len(rest := file.readline(MAX_ENTRY)) == MAX_ENTRY and rest[-1] != "\n":
                pass
            yield where, BrokenRow(f"it has more than {MAX_ENTRY} characters")
        elif line.strip():
            try:
                yield where, json.loads(line)
            except (ValueError, RecursionError) as error:
                yield where, BrokenRow(f"it is not valid JSON: {one_line(error)}")


def _list_entries(file: TextIO) -> Iterator[tuple[str, Any]]:
    text = _Text(file)
    text.skip("[")
    number = 0
    while text.peek() != "]":
        number += 1
        where = f"entry {number}"
        try:
            entry = text.entry()
        except BrokenRow as error:
            yield where, error
            return
        yield where, entry
        if text.peek() == ",":
            text.skip(",")
        elif text.peek() != "]":
            problem = "a comma is missing" if text.peek() else "the file is cut"
            yield f"after {where}", BrokenRow(f"{problem}, so the rest of the list is not read")
            return


class _Text:
    """A text of which only a part is in memory."""

    def __init__(self, file: TextIO) -> None:
        self.file = file
        self.part = ""
        self.place = 0
        self.is_end = False
        self.decode = json.JSONDecoder().raw_decode

    def peek(self) -> str:
        """Return the next character that is no white space; "" at the end."""
        while True:
            while self.place < len(self.part):
                if not (letter := self.part[self.place]).isspace():
                    return letter
                self.place += 1
            if self.is_end:
                return ""
            self._read()

    def skip(self, letter: str) -> None:
        """Move behind the next character, which is ``letter``."""
        if self.peek() == letter:
            self.place += 1

    def entry(self) -> Any:
        """Return the next value; raise BrokenRow if it is cut or not valid."""
        if self.peek() == "":
            raise BrokenRow("the file is cut, so the rest of the list is not read")
        while True:
            try:
                value, place = self.decode(self.part, self.place)
            except json.JSONDecodeError as error:
                is_cut = error.msg.startswith(UNTERMINATED)
                if not is_cut and error.pos < len(self.part.rstrip()) - NEAR_END:
                    raise self._broken(error) from error
                if self.is_end:
                    reason = "the file is cut in it, so the rest of the list is not read"
                    raise BrokenRow(reason) from error
                if len(self.part) - self.place > MAX_ENTRY:
                    raise self._broken(f"it has more than {MAX_ENTRY} characters") from error
            except (ValueError, RecursionError) as error:
                raise self._broken(error) from error
            else:
                # A number near the end of the part may go on in the next one.
                if place + NEAR_END < len(self.part) or self.is_end:
                    self.place = place
                    return value
            self._read()

    def _read(self) -> None:
        more = self.file.read(max(CHUNK, len(self.part) - self.place))
        self.part, self.place = self.part[self.place :] + more, 0
        self.is_end = not more

    def _broken(self, error: object) -> BrokenRow:
        reason = f"it is not valid JSON: {one_line(error)}"
        return BrokenRow(f"{reason}; the rest of the list is not read")


def parquet_columns(path: Path) -> list[str]:
    """Return the names of the columns of a Parquet file.

    Raises:
        ValueError: the file cannot be read.
    """
    with _parquet_file(path) as file:
        return file.schema_arrow.names


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    number = 0
    with _parquet_file(path) as file:
        import pyarrow

        try:
            for batch in file.iter_batches(ROWS):
                for row in batch.to_pylist():
                    number += 1
                    yield f"row {number}", row
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            reason = f"the rest of the file cannot be read: {one_line(error)}"
            yield f"after row {number}", BrokenRow(reason)


def _parquet_file(path: Path) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise ValueError(f"{path}: reading it needs pyarrow: pip install datasets") from error
    try:
        return pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise ValueError(f"{path} is not a readable Parquet file: {one_line(error)}") from error
