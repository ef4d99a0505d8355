"""Read the rows of a JSONL file, and find out why rows are broken."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .lines import Lines, too_long
from .picture_files import FilePictures
from .rows import BrokenRow, Builder, Names, Numbered, Table, check_found, fault_of, joined

# Digits of an integer; longer ones are no labels, and may not fit a float.
MAX_DIGITS = 300


def read_jsonl(path: Path, names: Names) -> Table:
    """Return the rows of a JSONL file (UTF-8), one object per line.

    Image and text are strings or null, which is like "". Labels are strings, integers, floats or
    booleans. A line that is not empty and not such an object is a broken row.

    Args:
        path: the file; pictures are files below its folder.
        names: the columns to read.

    Raises:
        ValueError: the file cannot be read, or no row has a column of ``names.needed``.
    """
    rows = ObjectRows(names)
    with Lines(path) as lines:
        while line := lines.take():
            if not line.strip():
                continue
            rows.builder.numbers.append(lines.taken)
            try:
                reason = too_long(line) or fault_of(line)
                if reason is not None:
                    raise BrokenRow(reason)
                rows.add(parse_object(line))
            except BrokenRow as error:
                rows.builder.add_broken(rows.image, str(error))
    columns = rows.finish(path)
    return Table(
        path.name,
        columns,
        FilePictures(path.parent, columns["image"]),
        Numbered(f"{path.name} line", rows.builder.numbers),
        rows.builder.broken,
    )


class ObjectRows:
    """Rows that are objects, each with keys of its own.

    Args:
        names: the columns to read.
        sparse: whether a row without a field for its image or text is one without image or text.
    """

    def __init__(self, names: Names, sparse: bool = False) -> None:
        self.names = names
        self._sparse = sparse
        self.builder: Builder = Builder()
        self.image = ""  # of the last row, as far as it was read
        self._found: dict[str, None] = {}  # columns of the first row, and others that are read
        self._is_noted = False
        self._without_coarse_label: list[int] = []

    def add(self, fields: Mapping[str, Any]) -> None:
        """Add a row; raise BrokenRow, and add none, if a field is missing or invalid."""
        names, self.image = self.names, ""
        self.note([key for key in names.all() if key in fields] if self._is_noted else fields)
        self._is_noted = True
        self.image = self._text_in(fields, names.image) if names.image else ""
        text = joined([self._text_in(fields, part) for part in names.text])
        has_label = names.label in names.needed or fields.get(names.label) is not None
        label = label_in(fields, names.label) if has_label and names.label else ""
        coarse = ""
        if names.coarse_label in fields or names.coarse_label in names.needed:
            coarse = label_in(fields, names.coarse_label)
        else:
            self._without_coarse_label.append(len(self.builder))
        self.builder.add(self.image, text, label, coarse)

    def note(self, keys: Iterable[str]) -> None:
        """Remember that the source has these columns."""
        self._found.update(dict.fromkeys(keys))

    def _text_in(self, fields: Mapping[str, Any], name: str) -> str:
        value = None if self._sparse and name not in fields else _value_in(fields, name)
        if value is None:
            return ""
        if not isinstance(value, str):
            raise BrokenRow(f"{name}: got {_shown(value)}, expected a string")
        return value.strip()

    def finish(self, source: object) -> Any:
        """Return the columns; raise ValueError if no row has a column that is needed."""
        if self._found:
            check_found(source, list(self._found), self.names)
        has_coarse_labels = self.names.coarse_label in self._found
        if has_coarse_labels:
            for row in self._without_coarse_label:
                self.builder.broken[row] = f"it has no field {self.names.coarse_label!r}"
        return self.builder.columns(has_coarse_labels)


def parse_object(text: str) -> dict[str, Any]:
    """Return the JSON object in a text; raise BrokenRow if it is none."""
    try:
        value = _decode(text)
    except BrokenRow:
        raise
    except json.JSONDecodeError as error:
        raise BrokenRow(
            f"it is not JSON: {error.msg.removesuffix(' at')} at character {error.pos + 1}"
        ) from error
    except RecursionError as error:
        raise BrokenRow("it is not JSON that can be read: it is nested too deeply") from error
    if not isinstance(value, dict):
        raise BrokenRow("it is JSON, but not an object")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        doubled = next(key for key in keys if keys.count(key) > 1)
        raise BrokenRow(f"it has the key {doubled!a:.80} twice")
    return value


def _refuse(constant: str) -> None:
    raise BrokenRow(f"it holds {constant}, which is not JSON")


def _int(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise BrokenRow(f"it holds a number of {len(digits)} digits")
    return int(digits)


# Made once, because that takes longer than to decode a line.
_decode = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse, parse_int=_int).decode


def _value_in(fields: Mapping[str, Any], name: str) -> Any:
    if name not in fields:
        raise BrokenRow(f"it has no field {name!r}")
    value = fields[name]
    if isinstance(value, str):
        # The line is UTF-8, so that a surrogate comes from an escape such as "\\ud800".
        if fault_of(value) is not None:
            raise BrokenRow("it holds a zero byte or a lone surrogate")
    return value


def label_in(fields: Mapping[str, Any], name: str) -> str:
    """Return a label as a string; raise BrokenRow if it is missing, or not a single value."""
    value = _value_in(fields, name)
    if isinstance(value, str):
        return value
    if type(value) is int:
        return str(value)
    is_number = isinstance(value, (int, float)) and math.isfinite(value)
    if not is_number:
        raise BrokenRow(f"{name}: got {_shown(value)}, expected a string or a number")
    return json.dumps(value)


def _shown(value: object) -> str:
    """Return the start of a value as JSON writes it, in ASCII."""
    if isinstance(value, (dict, list)):
        return "an object" if isinstance(value, dict) else "a list"
    return json.dumps(value)[:80]
