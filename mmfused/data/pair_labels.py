"""Which items belong together: the labels of the rows of a batch of pairs."""

from __future__ import annotations

import numpy as np

from .ragged import Ragged


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


def batch_labels(
    own: Ragged,
    query: np.ndarray,
    candidate: np.ndarray,
    negative: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the labels of the rows of a batch (B,), and of their negatives (B, n).

    A model does not use a candidate as a negative of the queries with the same label. So rows have
    the same label if the candidate of one, or a negative in the batch, is a positive of the other,
    and so on from row to row. A negative that is a positive of another row has the label of that
    row, but if this is also the label of its own row, it has a label of its own.

    Args:
        own: B lists, the products of each query and of its positives.
        query: (B,) int64, the product of each query.
        candidate: (B,) int64, the product of each candidate, one of ``own``.
        negative: (B, n) int64, the products of the negatives of each row.
    """
    rows = len(query)
    compared = np.unique(np.concatenate([candidate, negative.reshape(-1)]))
    products = np.union1d(compared, query)
    # Links between rows and products, which are numbered after the rows.
    owner, product = own.owners, own.values
    place = np.minimum(np.searchsorted(products, product), len(products) - 1)
    is_linked = (products[place] == product) & (
        np.isin(product, compared) | (product == query[owner])
    )
    owner, place = owner[is_linked], place[is_linked] + rows
    number = same_number(rows + len(products), owner, place)
    label = number[:rows]
    node = np.searchsorted(products, negative) + rows
    of_negative = number[node]
    links = owner * (rows + len(products)) + place
    is_own = np.isin(np.arange(rows)[:, None] * (rows + len(products)) + node, links)
    alone = (of_negative == label[:, None]) & ~is_own
    return label, np.where(alone, node + len(products), of_negative)
