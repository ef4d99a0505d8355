"""Draw negatives for the queries of a set of explicit pairs."""

from __future__ import annotations

import numpy as np
import torch

from .pair_sets import PairSet
from .ragged import Ragged, draw_below, draw_distinct, offsets_of

# How often a negative is drawn again because it is a positive, before all others are looked up.
ATTEMPTS = 8


class NegativeDraws:
    """Draws negatives from those of a query, and from the positives of other queries of its task.

    Args:
        pairs: the set.
        given: whether the set's negatives are used.
    """

    def __init__(self, pairs: PairSet, given: bool) -> None:
        self.pairs = pairs
        self.given = given
        positives, products = pairs.positives, pairs.products
        owners = np.concatenate([positives.owners, np.arange(len(pairs))])
        items = np.concatenate([positives.values, pairs.queries])
        # The products of each query and of its positives, none of which is a negative.
        self.own: Ragged = Ragged.grouped(owners, products[items], len(pairs))
        self.given_values: np.ndarray = np.append(pairs.negatives.values, -1)
        # The positives by task.
        task = pairs.tasks[positives.owners]
        self.pool: np.ndarray = positives.values[np.argsort(task, kind="stable")]
        self.starts: np.ndarray = offsets_of(np.bincount(task, minlength=len(pairs.task_names)))

    def check(self, number: int) -> None:
        """Raise ValueError if a query has too few negatives and no other positive can be one."""
        is_positive = np.zeros(len(self.pairs.items), dtype=bool)
        is_positive[self.pairs.products[self.pool]] = True
        used = Ragged(is_positive[self.own.values].astype(np.int64), self.own.offsets)
        counts = np.bincount(used.owners, used.values, len(used))
        is_full = counts == np.count_nonzero(is_positive)
        if self.given:
            is_full &= self.pairs.negatives.sizes < number
        full = np.flatnonzero(is_full)
        if len(full):
            text = self.pairs.items.texts[int(self.pairs.queries[full[0]])]
            raise ValueError(
                f"pair_set: got a query that all positives belong to ({text!r:.80}), "
                "expected another positive, which is its negative"
            )

    def draw(
        self,
        rows: np.ndarray,
        number: int,
        generator: torch.Generator,
    ) -> np.ndarray:
        """Return ``number`` items for each row of the set, (B, number) int64."""
        negatives = self.pairs.negatives
        found = np.full((len(rows), number), -1, dtype=np.int64)
        if self.given and number:
            sizes = negatives.sizes_of(rows)
            places = draw_distinct(np.maximum(sizes, 1), number, generator)
            # Of a row with fewer negatives, all are taken.
            is_short = sizes < number
            places[is_short] = np.arange(number)
            # Places beyond the negatives of a row are not used, but must be within the array.
            places = negatives.offsets[rows][:, None] + places
            values = self.given_values[np.minimum(places, len(negatives.values))]
            found = np.where(np.arange(number) < sizes[:, None], values, found)
        for column in range(number):
            missing = np.flatnonzero(found[:, column] < 0)
            others = found[missing, :column]
            found[missing, column] = self._other_positives(rows[missing], others, generator)
        return found

    def _other_positives(
        self,
        rows: np.ndarray,
        taken: np.ndarray,
        generator: torch.Generator,
    ) -> np.ndarray:
        """Return a positive of another query for each row, if possible not one of ``taken``."""
        task = self.pairs.tasks[rows]
        start, end = self.starts[task], self.starts[task + 1]
        found = np.full(len(rows), -1, dtype=np.int64)
        for _ in range(ATTEMPTS):
            item = self.pool[start + draw_below(end - start, generator)]
            is_wrong = self._is_own(rows, item) | (taken == item[:, None]).any(1)
            found = np.where((found < 0) & ~is_wrong, item, found)
        for place in np.flatnonzero(found < 0):
            found[place] = self._looked_up(int(rows[place]), taken[place], generator)
        return found

    def _looked_up(
        self,
        row: int,
        taken: np.ndarray,
        generator: torch.Generator,
    ) -> int:
        """Return a random item out of all that are possible; of other tasks if there is none."""
        task = self.pairs.tasks[row]
        of_task = self.pool[self.starts[task] : self.starts[task + 1]]
        own = self.own[row]
        options = np.empty(0, np.int64)
        for pool, avoided in ((of_task, taken), (of_task, taken[:0]), (self.pool, taken[:0])):
            options = pool[~np.isin(self.pairs.products[pool], own) & ~np.isin(pool, avoided)]
            if len(options):
                break
        return int(options[draw_below(np.array(len(options)), generator)])

    def _is_own(self, rows: np.ndarray, items: np.ndarray) -> np.ndarray:
        """Return whether the product of each item is one of the row's own."""
        own, product = self.own, self.pairs.products[items]
        low, end = own.offsets[rows].copy(), own.offsets[rows + 1]
        high = end.copy()
        while (low < high).any():  # a binary search in the sorted list of each row
            middle = (low + high) // 2
            is_active = low < high
            is_less = own.values[np.minimum(middle, len(own.values) - 1)] < product
            low = np.where(is_active & is_less, middle + 1, low)
            high = np.where(is_active & ~is_less, middle, high)
        return (low < end) & (own.values[np.minimum(low, len(own.values) - 1)] == product)
