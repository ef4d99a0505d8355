"""The rows of a metadata.csv: each complete, or broken with its line and the reason."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

UNCLOSED = "a quote is opened and not closed in it"
MAX_BYTES = 2**30
# Of one row: without a limit, the end of an unclosed quote would be searched in the whole file.
MAX_LINES = 1000


class BrokenRow(ValueError):
    """A row of metadata.csv that cannot be used; the message is a sentence for the user."""


class Row(NamedTuple):
    """A row of metadata.csv."""

    line: int  # its first line, from 1
    fields: dict[str, str]  # by column; of a broken row those that could be read
    broken: str | None = None  # the reason


def read_rows(
    root: Path,
    text_column: str = "text",
    optional: tuple[str, ...] = (),
) -> Iterator[Row]:
    """Yield the rows of ``root/metadata.csv`` (UTF-8) in order.

    A quoted text may have several lines. If a quote is not closed, its first line alone is a broken
    row, and reading continues with the next line; likewise if another stray quote closes it, and
    the lines between are complete rows.

    Args:
        root: the folder.
        text_column: the column with the texts.
        optional: columns that may be missing.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read, or columns are missing or occur twice.
    """
    path = root / "metadata.csv"
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is no folder with a metadata.csv")
    if not path.is_file():
        raise FileNotFoundError(f"{root} has no metadata.csv")
    if not path.resolve().is_relative_to(root.resolve()):
        raise ValueError(f"{path} leads outside of the folder")
    lines = _split_lines(_read_text(path))
    columns, start = _read_header(path, lines, ("file_name", text_column, "label"), optional)
    return _parse(root, lines, start, columns)


def _read_text(path: Path) -> str:
    """Return the file's text; bytes that are not UTF-8 become lone surrogates."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(
                f"{path}: got {path.stat().st_size} bytes, expected at most {MAX_BYTES}"
            )
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise ValueError(f"{path}: got UTF-16, expected UTF-8: save it as UTF-8")
    # Spreadsheet programs write a byte order mark, which must not become part of a name.
    return data.decode("utf-8-sig", errors="surrogateescape")


def _split_lines(text: str) -> list[str]:
    """Split at LF, CRLF and CR only, unlike `str.splitlines`; lines keep their ends."""
    return re.findall(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+", text)


def _read_header(
    path: Path,
    lines: list[str],
    needed: tuple[str, ...],
    optional: tuple[str, ...],
) -> tuple[list[str], int]:
    """Return the names of the columns, and the index of the first line after them."""
    try:
        first = next((i for i, line in enumerate(lines) if line.strip()), 0)
        header, start = _parse_record(lines, first) if lines else ([], 0)
        header = [name.strip() for name in header]
    except csv.Error as error:
        raise ValueError(
            f"{path}: got a header line that cannot be read ({error}), "
            f"expected one with {', '.join(needed)}"
        ) from error
    expected = f"{', '.join(needed[:-1])} and {needed[-1]}"
    missing = [column for column in needed if column not in header]
    if missing:
        found = ", ".join(header)[:200].encode("utf-8", "replace").decode() or "nothing"
        raise ValueError(
            f"{path}: got a header line without {', '.join(missing)}: {found}, "
            f"expected one with {expected}"
        )
    doubled = [column for column in (*needed, *optional) if header.count(column) > 1]
    if doubled:
        raise ValueError(f"{path}: got column {doubled[0]} twice, expected each column once")
    return header, start


def _parse(root: Path, lines: list[str], start: int, columns: list[str]) -> Iterator[Row]:
    while start < len(lines):
        line, broken = start + 1, None
        try:
            values, end = _parse_record(lines, start)
            if end - start > 1 and _swallows_rows(root, lines[start:end], columns):
                broken = UNCLOSED
        except csv.Error:
            broken, end = _why_broken(lines[start]), start + 1
            values = _parse_leniently(lines[start])
        if broken is not None:
            values, end = _parse_leniently(lines[start]), start + 1
        start = end
        if not values:
            continue
        broken = _bad_content(values, len(columns), broken)
        yield Row(line, dict(zip(columns, values, strict=False)), broken)


def _bad_content(values: list[str], columns: int, broken: str | None) -> str | None:
    """Return what is wrong with the values; ``broken`` is what is known already."""
    text = "".join(values)
    if not text.isascii() and any("\udc80" <= letter <= "\udcff" for letter in text):
        return "it holds bytes that are not UTF-8"
    if "\0" in text:
        return "it holds a zero byte"
    if broken is None and len(values) != columns:
        return f"it has {len(values)} fields and the header {columns}, an unquoted comma perhaps"
    return broken


def _why_broken(line: str) -> str | None:
    """Return why a line does not begin a well-formed record.

    None if only text follows a closing quote, as in "a" b.
    """
    try:
        next(csv.reader([line], strict=True), None)
    except csv.Error as error:
        if "expected after" in str(error):
            return None
        return UNCLOSED if "unexpected end" in str(error) else f"it cannot be read: {error}"
    return UNCLOSED


def _parse_record(lines: list[str], start: int) -> tuple[list[str], int]:
    """Return the record that starts at ``lines[start]``, and the index of the line after it.

    Raises:
        csv.Error: it is not well-formed.
    """
    stop = min(start + MAX_LINES, len(lines))
    reader = csv.reader((lines[index] for index in range(start, stop)), strict=True)
    values = next(reader)
    return values, start + reader.line_num


def _parse_leniently(line: str) -> list[str]:
    try:
        return next(csv.reader([line]), [])
    except csv.Error:
        # A field is too long; its beginning identifies the row.
        return line[:1000].split(",")


def _swallows_rows(root: Path, record: list[str], columns: list[str]) -> bool:
    """Return whether the lines of a well-formed record are rows of their own.

    Then its quote was not meant to span them. They are if the first is a complete row without its
    quote, and one of the inner lines names an existing picture, or all are complete rows.
    """
    first, *others = record
    if not _is_whole_row(first.replace('"', ""), columns):
        return False
    inner = [text for text in others[:-1] if _is_whole_row(text, columns)]
    if any(_names_a_file(root, text, columns) for text in inner):
        return True
    return all(_is_whole_row(text, columns) for text in others)


def _is_whole_row(text: str, columns: list[str]) -> bool:
    values = _parse_leniently(text)
    if len(values) != len(columns):
        return False
    label = dict(zip(columns, values, strict=True))["label"].strip()
    return label.isascii() and label.isdigit()


def _names_a_file(root: Path, text: str, columns: list[str]) -> bool:
    name = dict(zip(columns, _parse_leniently(text), strict=True))["file_name"].strip()
    try:
        return bool(name) and (root / name).is_file()
    except (OSError, ValueError):
        return False


def parse_label(column: str, value: str, limit: int) -> int:
    """Return a label from 0 to ``limit`` - 1; raise BrokenRow for any other text."""
    digits = value.strip()
    # isdigit alone accepts digits of other scripts, and int() alone "1_0". 18 digits fit an int64.
    if not (digits.isascii() and digits.isdigit() and len(digits) <= 18 and int(digits) < limit):
        raise BrokenRow(f"{column}: got {value!r:.40}, expected an integer from 0 to {limit - 1}")
    return int(digits)
