"""Exact search among embeddings by dot product, in blocks of queries."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import TypeAlias

import torch
from torch import Tensor

# Largest number of scores in memory; a block has at least one query.
SCORES = 2**24
# Columns whose maximum is found at a time.
COLUMNS = 512
# Number of comparisons, each one byte, that are added up before a byte overflows.
BYTES = 255
CUTOFFS = (1, 5, 10, 20, 50, 100)

# ``relevant(first, last)`` returns the relevant candidates of the queries from ``first`` to
# ``last - 1``: a (last - first, C) bool mask, or its ``nonzero(as_tuple=True)`` in any order.
Relevant: TypeAlias = Callable[[int, int], "Tensor | tuple[Tensor, Tensor]"]
# Above this fraction of relevant candidates, a mask is faster.
DENSE = 1 / 16


def rank_of_first(
    query: Tensor,
    candidate: Tensor,
    relevant: Relevant,
    excluded: Tensor | None = None,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """Return, for each query, the rank of its first relevant candidate and its nearest candidate.

    Candidates are ranked by dot product. Ranks count from 1. Irrelevant candidates rank before
    relevant candidates of equal dot product. Memory is bounded: the dot products of some queries
    are computed at a time.

    Args:
        query: (Q, D) embeddings.
        candidate: (C, D) embeddings.
        relevant: ``relevant(first, last)`` returns the relevant candidates of the queries from
            ``first`` to ``last - 1``: a (last - first, C) bool mask, or its
            ``nonzero(as_tuple=True)`` in any order. None of them is excluded.
        excluded: (Q,) int64, a candidate that each query ignores, -1 for none; None for all -1.
        device: where to search; None is the device of ``query``.

    Returns:
        Two (Q,) int64 CPU tensors: the ranks, and the indices of the nearest candidates. Among
        candidates of equal dot product, the first is the nearest.

    Raises:
        ValueError: a query has no relevant candidate.

    Examples:
        >>> import torch
        >>> from mmfused.training.search import rank_of_first
        >>> query, candidate = torch.eye(2), torch.tensor([[0.9, 0.1], [0.2, 0.3], [0.4, 0.8]])
        >>> relevance = torch.tensor([[True, False, False], [False, True, False]])
        >>> rank_of_first(query, candidate, lambda first, last: relevance[first:last])
        (tensor([1, 2]), tensor([0, 2]))
    """
    ranks: list[Tensor] = []
    nearest: list[Tensor] = []
    for first, score in _blocks(query, candidate, excluded, device):
        found = relevant(first, first + len(score))
        if isinstance(found, Tensor):
            best, equal = _best_of_mask(score, found.to(score.device))
        else:
            rows, columns = (x.to(score.device) for x in found)
            best, equal = _best_of_pairs(score, rows, score[rows, columns])
        ranks.append((1 + _count_from(score, best) - equal).cpu())
        nearest.append(_first_maximum(score).cpu())
    return torch.cat(ranks), torch.cat(nearest)


def found_in_first(
    query: Tensor,
    candidate: Tensor,
    relevant: Relevant,
    excluded: Tensor | None = None,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the rank of each query's first relevant candidate, and how many of them rank high.

    Arguments, order and errors are those of :func:`rank_of_first`.

    Returns:
        Two int64 CPU tensors: the ranks (Q,), and (Q, 6), the numbers of relevant candidates among
        the first 1, 5, 10, 20, 50 and 100 candidates.

    Examples:
        >>> import torch
        >>> from mmfused.training.search import found_in_first
        >>> query, candidate = torch.ones(1, 1), torch.arange(9.0)[:, None]
        >>> relevant = lambda first, last: (torch.tensor([0, 0]), torch.tensor([3, 6]))
        >>> found_in_first(query, candidate, relevant)
        (tensor([3]), tensor([[0, 1, 2, 2, 2, 2]]))
    """
    ranks: list[Tensor] = []
    found: list[Tensor] = []
    for first, score in _blocks(query, candidate, excluded, device):
        pairs = relevant(first, first + len(score))
        pairs = pairs.nonzero(as_tuple=True) if isinstance(pairs, Tensor) else pairs
        rows, columns = (x.to(score.device) for x in pairs)
        values = score[rows, columns]
        best, equal = _best_of_pairs(score, rows, values)
        ranks.append((1 + _count_from(score, best) - equal).cpu())
        score[rows, columns] = float("-inf")
        found.append(_found(score, rows, values).cpu())
    return torch.cat(ranks), torch.cat(found)


class SameLabel:
    """The candidates with the label of the query, for :func:`rank_of_first`.

    Candidates are sorted by label, so that those of a query are a range.

    Args:
        labels: (Q,) int64, labels of the queries.
        candidate_labels: (C,) int64.
        own: (Q,) int64, the candidate that is the query itself, which is not relevant; -1 for none.
    """

    def __init__(self, labels: Tensor, candidate_labels: Tensor, own: Tensor) -> None:
        self.labels = labels
        self.candidate_labels = candidate_labels
        self.own = own
        sorted_labels, self.order = candidate_labels.sort(stable=True)
        self.start: Tensor = torch.searchsorted(sorted_labels, labels)
        self.end: Tensor = torch.searchsorted(sorted_labels, labels, right=True)

    @property
    def counts(self) -> Tensor:
        """Number of relevant candidates of each query, (Q,) int64."""
        return self.end - self.start - (self.own >= 0).long()

    def select(self, queries: Tensor) -> SameLabel:
        """Return the same for some of the queries.

        Args:
            queries: (Q,) bool.
        """
        kept = copy.copy(self)
        for name in ("labels", "own", "start", "end"):
            setattr(kept, name, getattr(self, name)[queries])
        return kept

    def __call__(self, first: int, last: int) -> Tensor | tuple[Tensor, Tensor]:
        """Return the relevant candidates of some queries; see :func:`rank_of_first`."""
        size = (last - first) * len(self.order)
        if self.counts[first:last].sum() > DENSE * size:
            mask = self.labels[first:last, None] == self.candidate_labels
            rows = (self.own[first:last] >= 0).nonzero()[:, 0]
            mask[rows, self.own[first:last][rows]] = False
            return mask
        rows, places = ranges(self.start[first:last], self.end[first:last])
        columns = self.order[places]
        kept = columns != self.own[first:last][rows]
        return rows[kept], columns[kept]


def ranges(start: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    """Return the numbers of several ranges one after another, and before them their ranges.

    Args:
        start: (R,) int64, the first number of each range.
        end: (R,) int64, the number after the last.

    Returns:
        Two int64 tensors of equal length: the index of the range, and the number.

    Examples:
        >>> import torch
        >>> from mmfused.training.search import ranges
        >>> ranges(torch.tensor([5, 0]), torch.tensor([7, 1]))
        (tensor([0, 0, 1]), tensor([5, 6, 0]))
    """
    counts = end - start
    index = torch.repeat_interleave(counts)
    return index, torch.arange(len(index)) + (start - (counts.cumsum(0) - counts))[index]


def _blocks(
    query: Tensor,
    candidate: Tensor,
    excluded: Tensor | None,
    device: torch.device | str | None,
) -> Iterator[tuple[int, Tensor]]:
    """Yield the index of the first query of each block and the dot products (B, C) of the block.

    The dot products of excluded candidates are -inf. The next block overwrites the tensor.
    """
    device = query.device if device is None else torch.device(device)
    columns = candidate.to(device).T
    size = max(1, min(len(query), SCORES // columns.shape[1]))
    buffer = query.new_empty(size, columns.shape[1], device=device)
    for first in range(0, len(query), size):
        block = query[first : first + size].to(device)
        score = torch.mm(block, columns, out=buffer[: len(block)])
        if excluded is not None:
            ignored = excluded[first : first + size].to(device)
            rows = (ignored >= 0).nonzero()[:, 0]
            score[rows, ignored[rows]] = float("-inf")
        yield first, score


def _best_of_pairs(score: Tensor, rows: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest dot product of a relevant candidate, and how many have it, both (B,).

    Args:
        score: (B, C) dot products.
        rows: rows of the relevant candidates.
        values: dot products of the relevant candidates.
    """
    _check_found(torch.bincount(rows, minlength=len(score)) > 0)
    best = score.new_full((len(score),), float("-inf")).scatter_reduce_(0, rows, values, "amax")
    return best, torch.bincount(rows[values == best[rows]], minlength=len(score))


def _best_of_mask(score: Tensor, relevant: Tensor) -> tuple[Tensor, Tensor]:
    """Return the same for a mask ``relevant``, (B, C) bool."""
    found = score.masked_fill(~relevant, float("-inf"))
    best = found.amax(1)
    _check_found(best > float("-inf"))
    return best, _count_from(found, best)


def _check_found(found: Tensor) -> None:
    if not found.all():
        raise ValueError(
            "query: got a row without a relevant candidate, expected at least one for each row"
        )


def _count_from(score: Tensor, least: Tensor) -> Tensor:
    """Return how many elements of each row are at least ``least``, (B,) int64.

    Torch adds bools one by one as int64; eight bytes at a time are four times faster.
    """
    words = -(-score.shape[1] // (8 * BYTES))
    bits = torch.zeros(len(score), words * 8 * BYTES, dtype=torch.bool, device=score.device)
    torch.ge(score, least[:, None], out=bits[:, : score.shape[1]])
    sums = bits.view(torch.int64).view(len(score), words, BYTES).sum(2)
    return sums.view(torch.uint8).sum(1)


def _first_maximum(score: Tensor) -> Tensor:
    """Return the first column of the largest element of each row; faster than argmax on CPUs."""
    count = score.shape[1]
    if count <= COLUMNS:
        return score.argmax(1)
    whole = count // COLUMNS
    maxima = score[:, : whole * COLUMNS].unflatten(1, (whole, COLUMNS)).amax(2)
    if count % COLUMNS:
        maxima = torch.cat([maxima, score[:, whole * COLUMNS :].amax(1, keepdim=True)], 1)
    # The last columns are searched together with those before, which are smaller.
    start = (maxima.argmax(1) * COLUMNS).clamp(max=count - COLUMNS)
    columns = start[:, None] + torch.arange(COLUMNS, device=score.device)
    return start + score.gather(1, columns).argmax(1)


def _found(score: Tensor, rows: Tensor, values: Tensor) -> Tensor:
    """Return how many relevant candidates are among the first ``CUTOFFS``, (B, 6) int64.

    Args:
        score: (B, C) dot products of the irrelevant candidates; -inf for the relevant ones.
        rows: rows of the relevant candidates.
        values: dot products of the relevant candidates.
    """
    order = values.argsort(descending=True, stable=True)
    order = order[rows[order].argsort(stable=True)]
    rows, values = rows[order], values[order]
    counts = torch.bincount(rows, minlength=len(score))
    # Number of better relevant candidates of the same row.
    before = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows]
    kept = before < CUTOFFS[-1]
    rows, values, before = rows[kept], values[kept], before[kept]
    top = score.topk(min(CUTOFFS[-1], score.shape[1]), 1).values
    worse = torch.searchsorted(-top[rows], -values[:, None], right=True)[:, 0]
    rank = 1 + before + worse
    found = [torch.bincount(rows[rank <= k], minlength=len(score)) for k in CUTOFFS]
    return torch.stack(found, 1)
