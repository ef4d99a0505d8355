"""Read the rows of a metadata.csv, and find out why rows are broken."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

UNCLOSED = "it has an opening quote without a closing quote"
MAX_BYTES = 2**30
# Largest number of lines of a row; it limits the search for a closing quote.
MAX_LINES = 1000


class BrokenRow(ValueError):
    """A row of metadata.csv cannot be used; the message gives the reason."""


class Row(NamedTuple):
    """A row of metadata.csv."""

    line: int  # number of the row's first line, counted from 1
    fields: dict[str, str]  # by column; a broken row may lack columns
    broken: str | None = None  # the reason why the row is broken


def read_rows(
    root: Path,
    text_column: str = "text",
    optional: tuple[str, ...] = (),
) -> Iterator[Row]:
    """Yield the rows of ``root/metadata.csv`` (UTF-8) in order.

    A quoted text may span several lines. If a quote is not closed within ``MAX_LINES`` lines, the
    line with the quote is a broken row, and reading continues with the next line. A quote also
    counts as unclosed if the quoted text contains complete rows.

    Args:
        root: the folder.
        text_column: name of the column with the texts.
        optional: columns that may be missing.

    Raises:
        FileNotFoundError: the folder or its metadata.csv does not exist.
        ValueError: metadata.csv cannot be read, or a column is missing or occurs twice.
    """
    path = root / "metadata.csv"
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is not a folder with a metadata.csv")
    if not path.is_file():
        raise FileNotFoundError(f"{root} has no metadata.csv")
    if not path.resolve().is_relative_to(root.resolve()):
        raise ValueError(f"{path} leads outside the folder")
    lines = _split_lines(_read_text(path))
    columns, start = _read_header(path, lines, ("file_name", text_column, "label"), optional)
    return _parse(root, lines, start, columns)


def _read_text(path: Path) -> str:
    """Return the text of a file; bytes that are not UTF-8 become lone surrogates."""
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
    # Spreadsheet programs write a byte order mark, which is not part of the first column's name.
    return data.decode("utf-8-sig", errors="surrogateescape")


def _split_lines(text: str) -> list[str]:
    """Split at LF, CRLF and CR only, unlike `str.splitlines`; lines keep their line ends."""
    return re.findall(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+", text)


def _read_header(
    path: Path,
    lines: list[str],
    needed: tuple[str, ...],
    optional: tuple[str, ...],
) -> tuple[list[str], int]:
    """Return the names of the columns, and the index of the line after the header."""
    try:
        first = next((i for i, line in enumerate(lines) if line.strip()), 0)
        header, start = _parse_record(lines, first) if lines else ([], 0)
        header = [name.strip() for name in header]
    except csv.Error as error:
        raise ValueError(
            f"{path}: got a header line that cannot be read ({error}), "
            f"expected a header line with {', '.join(needed)}"
        ) from error
    expected = f"{', '.join(needed[:-1])} and {needed[-1]}"
    missing = [column for column in needed if column not in header]
    if missing:
        found = ", ".join(header)[:200].encode("utf-8", "replace").decode() or "nothing"
        raise ValueError(
            f"{path}: got a header line without {', '.join(missing)}: {found}, "
            f"expected a header line with {expected}"
        )
    doubled = [column for column in (*needed, *optional) if header.count(column) > 1]
    if doubled:
        raise ValueError(f"{path}: got column {doubled[0]} twice, expected each column once")
    return header, start


def _parse(
    root: Path,
    lines: list[str],
    start: int,
    columns: list[str],
) -> Iterator[Row]:
    while start < len(lines):
        line, broken = start + 1, None
        try:
            values, end = _parse_record(lines, start)
            if end - start > 1 and _has_stray_quote(root, lines[start:end], columns):
                broken = UNCLOSED
        except csv.Error:
            broken, end = _why_broken(lines[start]), start + 1
            values = _parse_leniently(lines[start])
        if broken is not None:
            values, end = _parse_leniently(lines[start]), start + 1
        start = end
        if not values:
            continue
        broken = _find_fault(values, len(columns), broken)
        yield Row(line, dict(zip(columns, values, strict=False)), broken)


def _find_fault(values: list[str], columns: int, broken: str | None) -> str | None:
    """Return the reason why a row is broken, or None.

    Args:
        values: the values of the row.
        columns: number of columns.
        broken: a reason that is already known, or None.
    """
    text = "".join(values)
    if not text.isascii() and any("\udc80" <= letter <= "\udcff" for letter in text):
        return "it holds bytes that are not UTF-8"
    if "\0" in text:
        return "it holds a zero byte"
    if broken is None and len(values) != columns:
        return (
            f"it has {len(values)} fields, but the header has {columns}; "
            "it may have an unquoted comma"
        )
    return broken


def _why_broken(line: str) -> str | None:
    """Return the reason why a line is not the start of a well-formed record.

    Return None if the only fault is text after a closing quote, as in "a" b.
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
        csv.Error: the record is not well-formed.
    """
    stop = min(start + MAX_LINES, len(lines))
    reader = csv.reader((lines[index] for index in range(start, stop)), strict=True)
    values = next(reader)
    return values, start + reader.line_num


def _parse_leniently(line: str) -> list[str]:
    try:
        return next(csv.reader([line]), [])
    except csv.Error:
        # A field is too long for csv; the start of the line is enough to identify the row.
        return line[:1000].split(",")


def _has_stray_quote(root: Path, record: list[str], columns: list[str]) -> bool:
    """Return whether a record of several lines consists of separate rows and a stray quote.

    The first line, without its quotes, must be a complete row. In addition, all other lines must be
    complete rows, or a line between the first and the last must be a complete row that names an
    existing file.
    """
    first, *others = record
    if not _is_complete_row(first.replace('"', ""), columns):
        return False
    inner = [text for text in others[:-1] if _is_complete_row(text, columns)]
    if any(_names_a_file(root, text, columns) for text in inner):
        return True
    return all(_is_complete_row(text, columns) for text in others)


def _is_complete_row(text: str, columns: list[str]) -> bool:
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
    """Return ``value`` as an integer from 0 to ``limit`` - 1, or raise BrokenRow."""
    digits = value.strip()
    # `isdigit` alone would accept digits of other scripts, and `int` alone "1_0".
    if not (digits.isascii() and digits.isdigit() and len(digits) <= 18 and int(digits) < limit):
        raise BrokenRow(f"{column}: got {value!r:.40}, expected an integer from 0 to {limit - 1}")
    return int(digits)
