"""The rows of a product set, and why some of them cannot be used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from .labels import LabelKind, read_coarse_labels, read_labels
from .strings import Strings
from .tables import Table


class FolderRows:
    """The columns of a table, and the faults of its rows."""

    def __init__(
        self,
        table: Table,
        kind: LabelKind,
        class_names: Sequence[str] | None,
        num_classes: int | None,
        needs_label: bool,
    ) -> None:
        self.table = table
        columns = {name: Strings(table.columns[name]) for name in table.columns.column_names}
        blank = Strings([""] * table.columns.num_rows)
        self.images: Strings = columns.get("image", blank)
        self.texts: Strings = columns.get("text", blank)
        self.has_image: np.ndarray = ~self.images.empty()
        broken = np.zeros(len(blank), dtype=bool)
        broken[list(table.broken)] = True
        found = read_labels(
            columns.get("label", blank),
            broken,
            kind,
            named=table.named_labels,
            known=table.class_names,
            training=class_names,
            num_classes=num_classes,
            needed=needs_label,
        )
        self.labels: np.ndarray = found.values
        self.class_names: list[str] | None = found.class_names
        self.has_coarse_labels: bool = "coarse_label" in columns
        self.coarse_labels: np.ndarray = np.zeros(len(blank), dtype=np.int64)
        coarse_faults: dict[int, str] = {}
        if self.has_coarse_labels:
            coarse = read_coarse_labels(columns["coarse_label"], broken)
            self.coarse_labels, coarse_faults = coarse.values, coarse.faults
        # Of several faults of a row, the last of these dicts has the one that is reported.
        self.faults: dict[int, str] = {**coarse_faults, **found.faults, **table.broken}

    def find_empty(self, text_column: str) -> None:
        """Add the rows with neither a picture nor a text to the faults."""
        reason = f"{self._image_column()} and {text_column} are both empty, expected at least one"
        for row in np.flatnonzero(~self.has_image & self.texts.empty()).tolist():
            self.faults.setdefault(row, reason)

    def usable(self, before_faults: bool) -> np.ndarray:
        """Return the rows without a fault; with ``before_faults``, only those before the first."""
        is_usable = np.ones(len(self.texts), dtype=bool)
        is_usable[list(self.faults)] = False
        if before_faults and self.faults:
            is_usable[min(self.faults) :] = False
        return np.flatnonzero(is_usable)

    def sentence(self, row: int) -> str:
        """Return a sentence about the fault of a row."""
        name = self.images[row][:200] or f"no {self._image_column()}"
        return f"{self.table.where(row)} ({name}): {self.faults[row]}"

    def _image_column(self) -> str:
        return "file_name" if self.table.source == "metadata.csv" else "image"


def source_columns(columns: Mapping[str, str] | None, text_column: str) -> dict[str, str]:
    """Return ``columns`` with ``text_column`` as the column of texts.

    Raises:
        ValueError: both name a column of texts.
    """
    found = dict(columns or {})
    if text_column != "text":
        if "text" in found:
            raise ValueError(
                f"text_column: got {text_column!r} and columns with text={found['text']}, "
                "expected one of the two"
            )
        found["text"] = text_column
    return found


def shared_ints(values: np.ndarray) -> list[int]:
    """Return a list with one object for all equal integers, which saves memory."""
    distinct, places = np.unique(values, return_inverse=True)
    return distinct.astype(object)[places].tolist()
