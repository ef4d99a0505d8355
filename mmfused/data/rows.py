"""The rows of a product set as Arrow columns, and which columns of a source they are read from."""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from mmfused.extras import from_extra

ROLES = ("image", "text", "label", "coarse_label")
# Rows and characters of a chunk of Arrow columns.
CHUNK_ROWS = 2**16
CHUNK_LETTERS = 2**26


class BrokenRow(ValueError):
    """A row cannot be used; the message gives the reason."""


class Pictures(Protocol):
    """The picture files of a table; row i has at most one."""

    def read(self, row: int) -> bytes:
        """Return the bytes of the picture file of a row that has one; thread-safe.

        Raises:
            BrokenPicture: the file is missing, unreadable or too large.
        """
        ...

    def fingerprint(self, row: int) -> bytes:
        """Return bytes that change with the contents of the file, without reading all of it.

        Raises:
            BrokenPicture: the file is missing, not a regular file, empty, too large, or its first
                bytes are not those of a picture.
        """
        ...


@dataclass
class Table:
    r"""The rows of a product set.

    ``columns`` is a pyarrow Table of strings with the columns "image" (name of the picture file,
    "" if there is none), "text", "label" (as written) and, if the source has it, "coarse_label".
    Strings have no white space at their ends. Broken rows are in it too, so that rows keep their
    numbers.

    Examples:
        >>> import pathlib, tempfile
        >>> from mmfused.data import open_table
        >>> rows = "file_name,text,label\n,red mug,0\n,blue, plate,1\n"
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     size = pathlib.Path(folder, "metadata.csv").write_text(rows)
        ...     table = open_table(folder)
        >>> table.where(1), table.broken[1][:37]
        ('metadata.csv line 3', 'it has 4 fields, but the header has 3')
    """

    source: str  # name for messages, such as "metadata.csv"
    columns: Any  # pyarrow.Table
    pictures: Pictures
    where: Callable[[int], str]  # of a row, for messages, such as "metadata.csv line 6"
    broken: Mapping[int, str] = field(default_factory=dict)  # rows that cannot be used, and why
    # True if labels are names of classes, False if they are indices, None if that is not known.
    named_labels: bool | None = None
    class_names: list[str] | None = None  # in the source's order, if it defines one


@dataclass
class Numbered:
    """Names rows by the numbers of their lines; ``numbers`` None counts rows from 0."""

    prefix: str  # such as "metadata.csv line"
    numbers: Sequence[int] | None = None

    def __call__(self, row: int) -> str:
        """Return the name of a row."""
        return f"{self.prefix} {row if self.numbers is None else self.numbers[row]}"


class Names(NamedTuple):
    """The columns of a source that are read; "" if none is read."""

    image: str
    text: tuple[str, ...]  # joined by a space
    label: str
    coarse_label: str
    needed: tuple[str, ...]  # columns that the source must have

    def all(self) -> tuple[str, ...]:
        """Return each column that is read, once, the optional ones included."""
        names = (self.image, *self.text, self.label, self.coarse_label)
        return tuple(dict.fromkeys(name for name in names if name))

    def with_image(self, image: str) -> Names:
        """Return the same columns, but for that of the pictures."""
        needed = tuple(image if name == self.image else name for name in self.needed)
        return self._replace(image=image, needed=needed)


def choose_names(
    columns: Mapping[str, str] | None,
    defaults: Mapping[str, str],
    needs_label: bool,
) -> Names:
    """Return the columns to read.

    Args:
        columns: the caller's choice by role, see :func:`mmfused.data.tables.open_table`.
        defaults: the format's columns by role.
        needs_label: whether a source without labels is refused.

    Raises:
        ValueError: ``columns`` has another role, or an invalid name.
    """
    chosen = dict(columns or {})
    for role, name in chosen.items():
        if role not in ROLES:
            raise ValueError(f"columns: got {role!r:.80}, expected {', '.join(ROLES)}")
        if not isinstance(name, str):
            raise ValueError(f"columns: got {role}={name!r:.80}, expected the name of a column")
    names = {role: chosen.get(role, defaults.get(role, "")).strip() for role in ROLES}
    parts = tuple(part.strip() for part in names["text"].split("+")) if names["text"] else ()
    if "" in parts:
        raise ValueError(f"columns: got text={names['text']!r:.80}, expected names joined by '+'")
    if not names["image"] and not parts:
        raise ValueError("columns: got neither image nor text, expected at least one")
    if needs_label and not names["label"]:
        raise ValueError("columns: got no label, expected the name of a column")
    roles = ["image", *(["label"] if needs_label or "label" in chosen else [])]
    roles += ["coarse_label"] if "coarse_label" in chosen else []
    needed = (names["image"], *parts, *(names[role] for role in roles[1:]))
    return Names(
        names["image"],
        parts,
        names["label"],
        names["coarse_label"],
        tuple(dict.fromkeys(name for name in needed if name)),
    )


def listed(names: Iterable[str]) -> str:
    """Return "a, b and c"."""
    names = list(names)
    return f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else "".join(names)


def shown(names: Iterable[str]) -> str:
    """Return the start of a list of names of columns, as one printable line."""
    text = ", ".join(names)[:200].encode("utf-8", "replace").decode()
    return "".join(letter if letter.isprintable() else "?" for letter in text) or "nothing"


def check_found(source: object, found: Sequence[str], names: Names) -> None:
    """Raise ValueError unless the source has each column of ``names.needed``."""
    missing = [name for name in names.needed if name not in found]
    if missing:
        raise ValueError(
            f"{source}: got no column {', '.join(missing)}, only {shown(found)}, "
            f"expected {listed(names.needed)}"
        )


def arrow() -> Any:
    """Return pyarrow, which is imported only when rows are read."""
    with from_extra("models"):
        import pyarrow
    return pyarrow


class Builder:
    """Collects rows in chunks of Arrow columns, so that few Python strings exist at a time."""

    def __init__(self) -> None:
        self.broken: dict[int, str] = {}
        self.numbers: array[int] = array("q")  # of the rows' lines, if they have any
        self._values: tuple[list[str], ...] = ([], [], [], [])
        self._chunks: list[Any] = []
        self._rows = 0  # in the chunks
        self._letters = 0

    def add(self, image: str, text: str, label: str, coarse_label: str) -> None:
        """Add a row; the strings hold no lone surrogates."""
        images, texts, labels, coarse_labels = self._values
        images.append(image.strip())
        texts.append(text)
        labels.append(label.strip())
        coarse_labels.append(coarse_label.strip())
        self._letters += len(text)
        if len(images) >= CHUNK_ROWS or self._letters > CHUNK_LETTERS:
            self._flush()

    def add_broken(self, image: str, reason: str) -> None:
        """Add a row that cannot be used; ``image`` is the name of its picture, for messages."""
        self.broken[len(self)] = reason
        self.add(image.encode("utf-8", "replace").decode()[:200], "", "", "")

    def __len__(self) -> int:
        return self._rows + len(self._values[0])

    def _flush(self) -> None:
        pyarrow = arrow()
        # Large strings have 64-bit offsets: pyarrow cannot take rows of more than 2 GiB of others.
        arrays = [pyarrow.array(values, pyarrow.large_string()) for values in self._values]
        self._chunks.append(pyarrow.RecordBatch.from_arrays(arrays, list(ROLES)))
        self._rows += len(arrays[0])
        for values in self._values:
            values.clear()
        self._letters = 0

    def columns(self, coarse_labels: bool) -> Any:
        """Return the pyarrow Table of all rows."""
        pyarrow = arrow()
        self._flush()
        table = pyarrow.Table.from_batches(self._chunks)
        return table if coarse_labels else table.drop_columns(["coarse_label"])


# Lone surrogates, which stand for bytes that are not UTF-8, and zero bytes.
_faulty = re.compile("[\0\ud800-\udfff]").search


def fault_of(text: str) -> str | None:
    """Return the reason why a row with this text is broken, or None."""
    match = _faulty(text)
    if match is None:
        return None
    surrogates = [letter for letter in text if "\ud800" <= letter <= "\udfff"]
    if any("\udc80" <= letter <= "\udcff" for letter in surrogates):
        return "it holds bytes that are not UTF-8"
    return "it holds a lone surrogate" if surrogates else "it holds a zero byte"


def joined(parts: Iterable[str]) -> str:
    """Return the parts that are not empty, joined by a space."""
    return " ".join(part for part in map(str.strip, parts) if part)
