"""Compact lists of lists and of strings, and random draws below different limits."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
import torch


@dataclass(frozen=True)
class Ragged:
    """Lists of integers: list i is ``values[offsets[i] : offsets[i + 1]]``."""

    values: np.ndarray
    offsets: np.ndarray  # (lists + 1,) int64

    @classmethod
    def grouped(
        cls,
        groups: np.ndarray,
        values: np.ndarray,
        count: int,
    ) -> Ragged:
        """Return ``count`` lists: list g has the different values whose group is g.

        Args:
            groups: (n,) int64, the group of each value.
            values: (n,) int64.
            count: number of lists.
        """
        order = np.lexsort((values, groups))
        groups, values = groups[order], values[order]
        first = np.ones(len(values), dtype=bool)
        first[1:] = (groups[1:] != groups[:-1]) | (values[1:] != values[:-1])
        sizes = np.bincount(groups[first], minlength=count)
        return cls(values[first], offsets_of(sizes))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        return self.values[self.offsets[index] : self.offsets[index + 1]]

    @property
    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """The values and the offsets."""
        return self.values, self.offsets

    @property
    def sizes(self) -> np.ndarray:
        """The length of each list."""
        return np.diff(self.offsets)

    def sizes_of(self, rows: np.ndarray) -> np.ndarray:
        """Return the lengths of the lists ``rows``."""
        return self.offsets[rows + 1] - self.offsets[rows]

    @property
    def owners(self) -> np.ndarray:
        """The list of each value, (values,) int64."""
        return np.repeat(np.arange(len(self)), self.sizes)

    def take(self, rows: np.ndarray) -> Ragged:
        """Return the lists ``rows`` in this order."""
        sizes = self.sizes_of(rows)
        offsets = offsets_of(sizes)
        shift = np.repeat(self.offsets[rows] - offsets[:-1], sizes)
        return Ragged(self.values[np.arange(offsets[-1]) + shift], offsets)


def offsets_of(sizes: np.ndarray) -> np.ndarray:
    """Return the offsets of lists of ``sizes``."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes, dtype=np.int64)])


def draw_below(limits: np.ndarray, generator: torch.Generator) -> np.ndarray:
    """Return a random integer from 0 to ``limit - 1`` for each limit of at least 1."""
    random = torch.rand(limits.shape, dtype=torch.float64, generator=generator).numpy()
    return np.minimum((random * limits).astype(np.int64), limits - 1)  # a product may round up


def draw_distinct(
    limits: np.ndarray,
    count: int,
    generator: torch.Generator,
) -> np.ndarray:
    """Return ``count`` random integers from 0 to ``limit - 1`` for each limit, (B, count) int64.

    They are different unless the limit is smaller than ``count``. Every set of integers is equally
    likely (Floyd's algorithm, CACM 30(9), 1987).
    """
    drawn = np.empty((len(limits), count), dtype=np.int64)
    for step in range(count):
        last = limits - count + step
        value = draw_below(np.where(last < step, limits, last + 1), generator)
        is_taken = (drawn[:, :step] == value[:, None]).any(1)
        drawn[:, step] = np.where(is_taken & (last >= step), last, value)
    return drawn


def share_of(
    count: int,
    rank: int,
    world: int,
) -> slice:
    """Return the part of ``count`` rows that a rank gets; the parts are nearly equal."""
    return slice(rank * count // world, (rank + 1) * count // world)


class PackedStrings(Sequence[str]):
    """Strings that are stored as the bytes of one buffer; they can be added, but not changed."""

    def __init__(self) -> None:
        self._bytes = bytearray()
        self._ends = array("q", [0])

    def add(self, data: bytes) -> None:
        """Add a string, given as UTF-8."""
        self._bytes += data
        self._ends.append(len(self._bytes))

    @property
    def buffers(self) -> tuple[bytearray, array[int]]:
        """The bytes of all strings, and the offsets of the strings in them."""
        return self._bytes, self._ends

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        return self._bytes[self._ends[index] : self._ends[index + 1]].decode()
