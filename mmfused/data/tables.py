"""The rows of a product set in any format, before a picture is decoded."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias

Split: TypeAlias = Literal["train", "test"]


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
    """The rows of a product set.

    ``columns`` is a pyarrow Table of strings with the columns "image" (name of the picture file,
    "" if there is none), "text", "label" (as written) and, if the source has it, "coarse_label".
    Broken rows are in it too, so that rows keep their numbers.
    """

    source: str  # name for messages, such as "metadata.csv"
    columns: Any  # pyarrow.Table
    pictures: Pictures
    where: Callable[[int], str]  # of a row, for messages, such as "metadata.csv line 6"
    broken: Mapping[int, str] = field(default_factory=dict)  # rows that cannot be used, and why
    # True if labels are names of classes, False if they are indices, None if that is not known.
    named_labels: bool | None = None
    class_names: list[str] | None = None  # in the source's order, if it defines one


def open_table(
    path: str | os.PathLike[str],
    *,
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
    split: Split = "train",
) -> Table:
    """Return the rows of a product set.

    Args:
        path: a folder or a file.
        format: name of the format; None detects it.
        columns: names of the source's columns by "image", "text", "label" and "coarse_label".
        split: the part to read of a format that publishes several in one folder.
    """
    from pathlib import Path

    import pyarrow

    from .metadata import read_rows
    from .picture_files import FilePictures

    text = (columns or {}).get("text", "text")
    rows = list(read_rows(Path(path), text, ("coarse_label",)))
    kinds = ["file_name", text, "label"]
    if any("coarse_label" in row.fields for row in rows):
        kinds.append("coarse_label")
    found = {
        name: [row.fields.get(kind, "").strip().encode("utf-8", "replace").decode() for row in rows]
        for name, kind in zip(("image", "text", "label", "coarse_label"), kinds)
    }
    arrow = pyarrow.table({k: pyarrow.array(v, pyarrow.string()) for k, v in found.items()})
    return Table(
        "metadata.csv",
        arrow,
        FilePictures(Path(path), arrow["image"]),
        Numbered("metadata.csv line", [row.line for row in rows]),
        {i: row.broken for i, row in enumerate(rows) if row.broken is not None},
    )


class Numbered:
    def __init__(self, prefix, numbers):
        self.prefix, self.numbers = prefix, numbers

    def __call__(self, row):
        return f"{self.prefix} {self.numbers[row]}"
