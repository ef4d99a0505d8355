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
    raise NotImplementedError
