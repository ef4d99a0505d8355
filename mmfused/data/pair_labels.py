"""Which items belong together: the labels of the rows of a batch of pairs."""

from __future__ import annotations

import numpy as np


def same_number(
    count: int,
    left: np.ndarray,
    right: np.ndarray,
) -> np.ndarray:
    """Return a number for each of ``count`` things; those that are linked have the same number.

    Things are linked if a chain of pairs (left[i], right[i]) leads from one to the other. The
    number is the smallest index of the linked things. In each round, every thing takes the number
    of a linked thing if it is smaller, and numbers are followed to their ends.
    """
    number = np.arange(count)
    while True:
        low = np.minimum(number[left], number[right])
        before = number.copy()
        np.minimum.at(number, before[left], low)
        np.minimum.at(number, before[right], low)
        while (number[number] != number).any():
            number = number[number]
        if np.array_equal(before, number):
            return number
