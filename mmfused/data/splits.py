"""Split a data set into two parts by itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias, TypeVar

import numpy as np

from ._common import check_choice, check_fraction

# What a split keeps together, see `Splits.split`.
By: TypeAlias = Literal["row", "label"]
# Seed of all splits, so that runs with different seeds share their validation set.
SEED = 25
S = TypeVar("S", bound="Splits")


class Splits:
    """A data set that can be split; a subclass has ``labels`` and ``select``."""

    labels: Sequence[int]
    skipped: list[str]

    def select(self: S, rows: Sequence[int] | np.ndarray) -> S:
        """Return a data set with only the items ``rows``, in the order of ``rows``."""
        raise NotImplementedError

    def split(self: S, fraction: float, by: By = "row") -> tuple[S, S]:
        """Return the data set in two parts, the second with about ``fraction`` of the items.

        The parts depend only on the labels and the arguments, not on the seed of a training run.
        Items keep their order. The sentences of ``.skipped`` stay with the first part.

        Args:
            fraction: fraction of the items of the second part, between 0 and 1.
            by: "row" takes the same fraction of each label, rounded up or down, so that each label
                keeps at least one item in the first part; "label" takes whole labels, so that all
                items of a label stay together.

        Raises:
            ValueError: an argument is invalid, or a part would be empty.
        """
        fraction = check_fraction("fraction", fraction)
        if not 0 < fraction < 1:
            raise ValueError(f"fraction: got {fraction}, expected a number between 0 and 1")
        check_choice("by", by, By)
        is_part = (_rows_of_each if by == "row" else _whole_labels)(self.labels, fraction)
        if not is_part.any():
            raise ValueError(
                f"fraction: got {fraction} by {by} of {len(self.labels)} items with "
                f"{len(set(self.labels))} labels, which leaves no item for one of the parts, "
                "expected a fraction that gives each part an item"
            )
        rest = self.select(np.flatnonzero(~is_part))
        rest.skipped = self.skipped
        return rest, self.select(np.flatnonzero(is_part))


def _rows_of_each(labels: Sequence[int], fraction: float) -> np.ndarray:
    """Return which rows are in the part, (N,) bool, for a split by row.

    Each label gives ``fraction`` of its rows, rounded down; the labels with the largest remainders
    give one more, until the part has ``fraction`` of all rows.
    """
    rng = np.random.default_rng(SEED)
    _, places, counts = np.unique(labels, return_inverse=True, return_counts=True)
    wanted = counts * fraction
    taken = np.floor(wanted).astype(np.int64)
    missing = round(len(places) * fraction) - int(taken.sum())
    # Of equal remainders, random ones come first.
    order = np.lexsort((rng.random(len(counts)), taken - wanted))
    order = order[(taken < counts - 1)[order]]
    taken[order[: max(missing, 0)]] += 1
    # The rows of each label in random order; the first `taken` of them are in the part.
    shuffled = np.lexsort((rng.random(len(places)), places))
    ranks = np.arange(len(places)) - np.repeat(np.cumsum(counts) - counts, counts)
    is_part = np.zeros(len(places), dtype=bool)
    is_part[shuffled] = ranks < np.repeat(taken, counts)
    return is_part


def _whole_labels(labels: Sequence[int], fraction: float) -> np.ndarray:
    """Return which rows are in the part, (N,) bool, for a split by label.

    Labels in random order are in the part as long as this brings the number of its rows closer to
    ``fraction`` of all rows. Each side gets at least one label.
    """
    rng = np.random.default_rng(SEED)
    _, places, counts = np.unique(labels, return_inverse=True, return_counts=True)
    order = rng.permutation(len(counts))
    off = np.abs(np.cumsum(counts[order]) - len(places) * fraction)[:-1]
    is_part = np.zeros(len(counts), dtype=bool)
    if len(off):
        is_part[order[: int(off.argmin()) + 1]] = True
    return is_part[places]


def checked_rows(rows: Any, count: int) -> np.ndarray:
    """Return ``rows`` as (R,) int64; raise ValueError unless all are from 0 to ``count`` - 1."""
    found = np.asarray(rows)
    if found.ndim != 1 or not len(found) or found.dtype.kind not in "iu":
        raise ValueError(f"rows: got {rows!r:.80}, expected at least one row number")
    if found.min() < 0 or found.max() >= count:
        wrong = found[(found < 0) | (found >= count)][0]
        raise ValueError(f"rows: got {wrong}, expected rows from 0 to {count - 1}")
    return found.astype(np.int64)
