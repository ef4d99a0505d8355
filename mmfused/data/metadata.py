"""The rows of a metadata.csv: each one whole, or named with its line and what is wrong with it."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

UNCLOSED = "a quote is opened and not closed in it"
MOST_BYTES = 2**30
MOST_LINES = 1000  # of one row; a quote that is not closed would else be looked for up to the end


class BrokenRow(ValueError):
    """One row of metadata.csv that cannot be used; its message is the sentence for the user."""


class Row(NamedTuple):
    line: int  # on which it starts, from 1
    fields: dict[str, str]  # by column; of a broken row what is known of it
    broken: str | None = None


def read_rows(
    root: Path,
    text_column: str = "text",
    optional: tuple[str, ...] = (),
) -> Iterator[Row]:
    """The rows of ``root/metadata.csv``, UTF-8, in their order; ``optional`` columns are read where
    there are any.

    A quoted text may have several lines. Where a quote is not closed, its first line alone is a
    broken row: reading goes on with the next. So it does where the quote is closed by another,
    stray one, and lines in between are whole rows by themselves.

    Raises FileNotFoundError where there is no such file, and ValueError where no column can be told
    from another."""
    path = root / "metadata.csv"
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is no folder with a metadata.csv")
    if not path.is_file():
        raise FileNotFoundError(f"{root} has no metadata.csv")
    if not path.resolve().is_relative_to(root.resolve()):
        raise ValueError(f"{path} leads outside of the folder")
    lines = split_lines(read_text(path))
    columns, start = read_header(path, lines, ("file_name", text_column, "label"), optional)
    return parse(root, lines, start, columns)


def read_text(path: Path) -> str:
    """Bytes that are not UTF-8 become lone surrogates, by which their rows are known."""
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ValueError(f"{path} takes at most {MOST_BYTES} bytes, got {path.stat().st_size}")
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise ValueError(f"{path} takes UTF-8 text, got UTF-16: save it as UTF-8")
    # Spreadsheet programs write a byte order mark, which would become part of the first column's
    # name.
    return data.decode("utf-8-sig", errors="surrogateescape")


def split_lines(text: str) -> list[str]:
    """Lines with their ends: \\n, \\r\\n or \\r, and not the many others at which `str.splitlines`
    splits.
    """
    return re.findall(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+", text)


def read_header(
    path: Path,
    lines: list[str],
    needed: tuple[str, ...],
    optional: tuple[str, ...],
) -> tuple[list[str], int]:
    """The columns' names, and the number of the first line after them."""
    try:
        first = next((i for i, line in enumerate(lines) if line.strip()), 0)
        header, start = parse_record(lines, first) if lines else ([], 0)
        header = [name.strip() for name in header]
    except csv.Error as error:
        raise ValueError(
            f"{path} takes a header line with {', '.join(needed)}, got one that cannot be read: {error}"
        ) from error
    expected = f"{', '.join(needed[:-1])} and {needed[-1]}"
    missing = [column for column in needed if column not in header]
    if missing:
        found = ", ".join(header)[:200].encode("utf-8", "replace").decode() or "nothing"
        raise ValueError(
            f"{path} takes a header line with {expected}, got one without {', '.join(missing)}: {found}"
        )
    doubled = [column for column in (*needed, *optional) if header.count(column) > 1]
    if doubled:
        raise ValueError(f"{path} takes each column once, got {doubled[0]} twice")
    return header, start


def parse(root: Path, lines: list[str], start: int, columns: list[str]) -> Iterator[Row]:
    while start < len(lines):
        line, broken = start + 1, None
        try:
            values, end = parse_record(lines, start)
            if end - start > 1 and swallows_rows(root, lines[start:end], columns):
                broken = UNCLOSED
        except csv.Error:
            broken, end = why_broken(lines[start]), start + 1
            values = parse_leniently(lines[start])
        if broken is not None:
            values, end = parse_leniently(lines[start]), start + 1
        start = end
        if not values:
            continue
        whole = "".join(values)
        if broken is None and len(values) != len(columns):
            broken = f"it has {len(values)} fields and the header {len(columns)}, an unquoted comma perhaps"
        if "\0" in whole:
            broken = "it holds a zero byte"
        if not whole.isascii() and any("\udc80" <= letter <= "\udcff" for letter in whole):
            broken = "it holds bytes that are not UTF-8"
        yield Row(line, dict(zip(columns, values, strict=False)), broken)


def why_broken(line: str) -> str | None:
    """Of a line that does not begin a well-formed record; None where only what follows a closing
    quote is odd, as in "a" b.
    """
    try:
        next(csv.reader([line], strict=True), None)
    except csv.Error as error:
        if "expected after" in str(error):
            return None
        return UNCLOSED if "unexpected end" in str(error) else f"it cannot be read: {error}"
    return UNCLOSED


def parse_record(lines: list[str], start: int) -> tuple[list[str], int]:
    """The values of the record that starts with ``lines[start]``, and the number of the line after
    it. Raises csv.Error.
    """
    reader = csv.reader(
        (lines[i] for i in range(start, min(start + MOST_LINES, len(lines)))), strict=True
    )
    values = next(reader)
    return values, start + reader.line_num


def parse_leniently(line: str) -> list[str]:
    try:
        return next(csv.reader([line]), [])
    except csv.Error:  # too long a field: what it begins with tells which row it is
        return line[:1000].split(",")


def swallows_rows(root: Path, record: list[str], columns: list[str]) -> bool:
    """Whether the lines of a well-formed record are rows of their own: then its quote was not meant
    to go on so far.

    They are if the first reads as one but for its quote, and if one within names a picture that is
    there, or if all read as one."""
    first, *others = record
    if not is_whole_row(first.replace('"', ""), columns):
        return False
    within = [text for text in others[:-1] if is_whole_row(text, columns)]
    return any(names_a_file(root, text, columns) for text in within) or all(
        is_whole_row(text, columns) for text in others
    )


def is_whole_row(text: str, columns: list[str]) -> bool:
    values = parse_leniently(text)
    if len(values) != len(columns):
        return False
    label = dict(zip(columns, values, strict=True))["label"].strip()
    return label.isascii() and label.isdigit()


def names_a_file(root: Path, text: str, columns: list[str]) -> bool:
    name = dict(zip(columns, parse_leniently(text), strict=True))["file_name"].strip()
    try:
        return bool(name) and (root / name).is_file()
    except (OSError, ValueError):
        return False


def parse_label(column: str, value: str, limit: int) -> int:
    digits = value.strip()
    # isdigit alone lets through digits of other scripts, and int() alone "1_0"; 18 digits always
    # fit an int64.
    if not (digits.isascii() and digits.isdigit() and len(digits) <= 18 and int(digits) < limit):
        raise BrokenRow(f"{column} takes an integer from 0 to {limit - 1}, got {value!r:.40}")
    return int(digits)
