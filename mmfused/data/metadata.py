"""Read the rows of a CSV or TSV file, and find out why rows are broken."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from .lines import Lines, too_long
from .picture_files import FilePictures
from .rows import BrokenRow, Builder, Names, Numbered, Table, fault_of, joined, listed, shown

UNCLOSED = "it has an opening quote without a closing quote"
# Largest number of lines of a row; it limits the search for a closing quote.
MAX_LINES = 1000
# A shorter line without a quote has no field that is too long for the csv module.
MAX_PLAIN = 2**16


class Layout(NamedTuple):
    """What a row of a file looks like."""

    delimiter: str
    width: int  # number of columns
    image: int | None  # index of the column with the names of the pictures
    label: int | None
    exists: Callable[[str], bool]  # whether such a name is that of an existing picture


def find_metadata(root: Path, files: Sequence[str]) -> Path:
    """Return the one of ``files`` that is in the folder.

    Raises:
        FileNotFoundError: the folder or the file does not exist.
        ValueError: there are several, or the file leads outside the folder.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is not a folder with a metadata.csv")
    found = [name for name in files if (root / name).is_file()]
    if not found:
        raise FileNotFoundError(f"{root} has no metadata.csv")
    if len(found) > 1:
        raise ValueError(f"{root}: got {listed(found)}, expected one of them")
    path = root / found[0]
    if not path.resolve().is_relative_to(root.resolve()):
        raise ValueError(f"{path} leads outside the folder")
    return path


def picture_exists(root: Path, template: str = "{}") -> Callable[[str], bool]:
    """Return a function that tells whether a name in a row is that of a file below ``root``."""

    def exists(name: str) -> bool:
        try:
            return bool(name) and (root / template.format(name)).is_file()
        except (OSError, ValueError):
            return False

    return exists


def read_table(
    path: Path,
    names: Names,
    delimiter: str = ",",
    template: str = "{}",
) -> Table:
    """Return the rows of a CSV or TSV file (UTF-8) with a header line.

    A quoted text may span several lines. If a quote is not closed within ``MAX_LINES`` lines, the
    line with the quote is a broken row, and reading continues with the next line. A quote also
    counts as unclosed if the quoted text contains complete rows: lines with the right number of
    fields and, if the row's label is an integer, an integer as label, else an existing picture.

    Args:
        path: the file; pictures are files below its folder.
        names: the columns to read.
        delimiter: the character between two fields.
        template: the picture file of a name, such as "images/{}.jpg".

    Raises:
        ValueError: the file cannot be read, or a column is missing or occurs twice.
    """
    builder = Builder()
    with Lines(path) as lines:
        header = _read_header(path, lines, names, delimiter)
        layout = _layout_of(header, names, delimiter, picture_exists(path.parent, template))
        has_coarse_labels = names.coarse_label in header
        # Columns that are not read are the empty string after the last value.
        image, label, coarse, *text = (
            header.index(name) if name in header else len(header)
            for name in (names.image, names.label, names.coarse_label, *names.text)
        )
        for line, values, broken in _records(lines, layout):
            builder.numbers.append(line)
            values.append("")
            if broken is None:
                name = values[image].strip()
                name = template.format(name) if name else ""
                written = values[text[0]].strip() if len(text) == 1 else _join(values, text)
                builder.add(name, written, values[label], values[coarse])
            else:
                builder.add_broken(values[image] if image < len(values) else "", broken)
    columns = builder.columns(has_coarse_labels)
    return Table(
        path.name,
        columns,
        FilePictures(path.parent, columns["image"]),
        Numbered(f"{path.name} line", builder.numbers),
        builder.broken,
    )


def _join(values: list[str], columns: list[int]) -> str:
    return joined([values[column] for column in columns])


def _read_header(path: Path, lines: Lines, names: Names, delimiter: str) -> list[str]:
    """Return the names of the columns; the lines continue after the header."""
    expected = f"expected a header line with {listed(names.needed)}"
    try:
        line = lines.take()
        while line and not line.strip():
            line = lines.take()
        header: list[str] = []
        if line:
            lines.put_back(line)
            header, count = _look_at_record(lines, delimiter)
            lines.drop(count)
        header = [name.strip() for name in header]
    except csv.Error as error:
        raise ValueError(
            f"{path}: got a header line that cannot be read ({error}), {expected}"
        ) from error
    missing = [column for column in names.needed if column not in header]
    if missing:
        raise ValueError(
            f"{path}: got a header line without {', '.join(missing)}: {shown(header)}, {expected}"
        )
    doubled = [column for column in names.all() if header.count(column) > 1]
    if doubled:
        raise ValueError(f"{path}: got column {doubled[0]} twice, expected each column once")
    return header


def _layout_of(
    header: list[str], names: Names, delimiter: str, exists: Callable[[str], bool]
) -> Layout:
    image, label = (
        header.index(name) if name in header else None for name in (names.image, names.label)
    )
    return Layout(delimiter, len(header), image, label, exists)


def _records(lines: Lines, layout: Layout) -> Iterator[tuple[int, list[str], str | None]]:
    """Yield the number of the first line, the values, and the reason why a row is broken."""
    delimiter, width = layout.delimiter, layout.width
    while line := lines.take():
        number = lines.taken
        if '"' not in line and len(line) < MAX_PLAIN:
            # The csv module would split it alike, but is slower.
            text = line.rstrip("\r\n")
            if not text:
                continue
            values, broken = text.split(delimiter), fault_of(text)
        else:
            values, broken = _read_record(lines, line, layout)
            if not values:
                continue
            broken = fault_of("".join(values)) or broken
        if broken is None and len(values) != width:
            broken = (
                f"it has {len(values)} fields, but the header has {width}; "
                f"it may have an unquoted {'tab' if delimiter == chr(9) else 'comma'}"
            )
        yield number, values, broken


def _read_record(lines: Lines, line: str, layout: Layout) -> tuple[list[str], str | None]:
    """Return the values of the record that starts with ``line``, and why it is broken."""
    delimiter, broken = layout.delimiter, too_long(line)
    if broken is None:
        lines.put_back(line)
        try:
            values, count = _look_at_record(lines, delimiter)
            if count == 1 or not _has_stray_quote(list(lines.look(count)), layout):
                long = (too_long(line) for line in lines.drop(count))
                return values, next(filter(None, long), None)
            broken = UNCLOSED
        except csv.Error:
            broken = _why_broken(line, delimiter)
        lines.take()
    return _parse_leniently(line, delimiter), broken


def _look_at_record(lines: Lines, delimiter: str) -> tuple[list[str], int]:
    """Return the next record without taking its lines, and their number.

    Raises:
        csv.Error: the record is not well-formed.
    """
    reader = csv.reader(lines.look(MAX_LINES), delimiter=delimiter, strict=True)
    return next(reader), reader.line_num


def _why_broken(line: str, delimiter: str) -> str | None:
    """Return the reason why a line is not the start of a well-formed record.

    Return None if the only fault is text after a closing quote, as in "a" b.
    """
    try:
        next(csv.reader([line], delimiter=delimiter, strict=True), None)
    except csv.Error as error:
        if "expected after" in str(error):
            return None
        return UNCLOSED if "unexpected end" in str(error) else f"it cannot be read: {error}"
    return UNCLOSED


def _parse_leniently(line: str, delimiter: str) -> list[str]:
    try:
        return next(csv.reader([line], delimiter=delimiter), [])
    except csv.Error:
        # A field is too long for csv; the start of the line is enough to identify the row.
        return line[:1000].split(delimiter)


def _has_stray_quote(record: list[str], layout: Layout) -> bool:
    """Return whether a record of several lines consists of separate rows and a stray quote.

    The first line, without its quotes, must be a complete row. In addition, all other lines must be
    complete rows, or a line between the first and the last must be a complete row that names an
    existing file.
    """
    rows = [_parse_leniently(record[0].replace('"', ""), layout.delimiter)]
    rows += [_parse_leniently(line, layout.delimiter) for line in record[1:]]
    # Any text may be the name of a class, so that only a picture tells a row from other text.
    has_integers = len(rows[0]) == layout.width and _has_integer(rows[0], layout)

    def is_complete(row: list[str]) -> bool:
        if len(row) != layout.width:
            return False
        return _has_integer(row, layout) if has_integers else _names_a_file(row, layout)

    if not is_complete(rows[0]):
        return False
    if any(is_complete(row) and _names_a_file(row, layout) for row in rows[1:-1]):
        return True
    return all(is_complete(row) for row in rows[1:])


def _has_integer(row: list[str], layout: Layout) -> bool:
    label = "" if layout.label is None else row[layout.label].strip()
    return label.isascii() and label.isdigit()


def _names_a_file(row: list[str], layout: Layout) -> bool:
    return layout.image is not None and layout.exists(row[layout.image].strip())


def parse_label(column: str, value: str, limit: int) -> int:
    """Return ``value`` as an integer from 0 to ``limit`` - 1, or raise BrokenRow."""
    digits = value.strip()
    # `isdigit` alone would accept digits of other scripts, and `int` alone "1_0".
    if not (digits.isascii() and digits.isdigit() and len(digits) <= 18 and int(digits) < limit):
        raise BrokenRow(f"{column}: got {value!r:.40}, expected an integer from 0 to {limit - 1}")
    return int(digits)
