"""Batches for retrieval, made of pairs of items with the same label and of hard negatives."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

import numpy as np
import torch
from torch import Tensor

from ._common import Batch, LabelledRows, check_int, check_ranks, torch_generator
from .batches import Collate, read_ahead
from .items import Items, make_items
from .ragged import draw_below, draw_distinct, share_of

ROLES = ("query", "candidate", "negative")


class PairBatches:
    """Batches of queries, candidates and hard negatives for retrieval.

    A batch is ``{"query": items, "candidate": items, "negative": items}``, in which the items of
    each role are a batch of :class:`Collate`. The query in row i is an item of ``dataset``. Its
    candidate has the same label, and is an item of ``products``, or another item of ``dataset`` if
    ``products`` is None. Its hard negatives are rows ``i * num_negatives`` and following of
    "negative". They are drawn from the same set as the candidate, and have another label but the
    candidate's coarse label. If there is no such item, any items with another label are drawn. The
    negatives of a query differ if there are enough of them.

    In an epoch, each item that has a candidate is the query of one row. The sizes of batches differ
    by at most one. If no label has more queries than there are batches, all labels in a batch
    differ, so the candidates of other rows are true negatives. Otherwise, each label occurs almost
    equally often in all batches.

    The rows of batch i depend only on ``seed``, the epoch and i. Each rank gets its own share of
    every batch; it may be empty.

    Args:
        dataset: the queries.
        collate: makes the batches.
        batch_size: largest number of queries per batch, before the batch is split over ranks.
        products: the candidates; None takes candidates from ``dataset``.
        negatives: whether batches have hard negatives.
        num_negatives: number of hard negatives of a query.
        seed: seed of the random draws.
        rank: rank of this process.
        world: number of ranks.
        workers: number of threads that decode the pictures of a streamed dataset.

    Raises:
        ValueError: no item has a candidate, all candidates have one label and there are
            ``negatives``, or ``batch_size`` is not a multiple of ``world``.

    Examples:
        >>> import torch
        >>> from mmfused.data import Collate, GeneratedProducts, PairBatches, train_tokenizer
        >>> products = GeneratedProducts(size=64, image_size=32)
        >>> collate = Collate(train_tokenizer(products.texts), image_size=32, max_length=16)
        >>> batches = PairBatches(products, collate, batch_size=8)
        >>> batch = next(batches.stream())  # model(**batch) gives the loss of a retrieval model
        >>> query, candidate = batch["query"]["labels"], batch["candidate"]["labels"]
        >>> torch.equal(query, candidate), (query == batch["negative"]["labels"]).any().item()
        (True, False)
    """

    def __init__(
        self,
        dataset: LabelledRows,
        collate: Collate,
        batch_size: int,
        *,
        products: LabelledRows | None = None,
        negatives: bool = True,
        num_negatives: int = 1,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        workers: int | None = None,
    ) -> None:
        self.batch_size: int = check_int("batch_size", batch_size, 1)
        self.num_negatives: int = check_int("num_negatives", num_negatives, 1)
        self.seed: int = check_int("seed", seed, 0)
        self.rank = rank
        self.world = world
        check_ranks(batch_size, world)
        self.collate = collate
        self.negatives: bool = negatives
        labels = np.asarray(dataset.labels, dtype=np.int64)
        self.pool: Pool = Pool(dataset if products is None else products)
        self.partners: Partners = Partners(labels, self.pool, products is None)
        if negatives and not self.pool.has_two_labels:
            raise ValueError(
                "dataset: got rows of one label, "
                "expected at least two labels: a negative has another label"
            )
        self.plan: EpochPlan = EpochPlan(labels, self.partners.rows, batch_size, self.seed)
        share = -(-batch_size // world)
        self.queries: Items = make_items(dataset, collate, workers, share)
        self.candidates: Items = self.queries
        if products is not None:
            self.candidates = make_items(products, collate, workers, share)

    def __len__(self) -> int:
        return self.plan.batches

    def stream(self, position: int = 0) -> Iterator[dict[str, Batch]]:
        """Yield batches of one epoch after another, without end.

        Args:
            position: index of the first batch to yield, counted from the start of epoch 0.
        """
        first = check_int("position", position, 0)
        places = (divmod(position, len(self)) for position in count(first))
        ahead = max(self.queries.ahead, self.candidates.ahead)
        return read_ahead(places, self._start, self._finish, ahead)

    def batch(self, epoch: int, batch: int) -> dict[str, Batch]:
        """Return this rank's share of one batch of an epoch."""
        return self._finish((epoch, batch), self._start((epoch, batch)))

    def draw(self, epoch: int, batch: int) -> dict[str, Tensor]:
        """Return the rows of one batch by role, before the batch is split over ranks."""
        generator = torch_generator(self.seed, epoch, batch + 1)
        queries = self.plan.rows(epoch, batch)
        candidates = self.partners.draw(queries, generator)
        rows = {"query": queries, "candidate": candidates}
        if self.negatives:
            drawn = self.pool.draw_negatives(candidates, self.num_negatives, generator)
            rows["negative"] = drawn.reshape(-1)
        return {role: torch.from_numpy(found) for role, found in rows.items()}

    def _start(self, place: tuple[int, int]) -> dict[str, Tensor]:
        drawn = self.draw(*place)
        share = share_of(len(drawn["query"]), self.rank, self.world)
        started = {}
        for role, rows in drawn.items():
            each = self.num_negatives if role == "negative" else 1
            mine = rows[share.start * each : share.stop * each]
            started[role] = self._items(role).start(mine)
        return started

    def _finish(
        self,
        place: tuple[int, int],
        started: dict[str, Tensor],
    ) -> dict[str, Batch]:
        epoch, batch = place
        generator = torch_generator(self.collate.seed, epoch, batch + 1, self.rank + 1)
        return {role: self._items(role).finish(rows, generator) for role, rows in started.items()}

    def _items(self, role: str) -> Items:
        return self.queries if role == "query" else self.candidates


class EpochPlan:
    """Which queries are in each batch of an epoch.

    The queries are sorted by label, with labels and the rows of a label in random order. They are
    dealt one by one to the batches, so that equal labels come to different batches. Then the
    batches are shuffled.

    Args:
        labels: (N,) int64, the label of each row.
        rows: (P,) int64, the rows that are queries, P >= 1.
        batch_size: largest number of queries per batch.
        seed: seed of the orders.
    """

    def __init__(
        self,
        labels: np.ndarray,
        rows: np.ndarray,
        batch_size: int,
        seed: int,
    ) -> None:
        found, group = np.unique(labels[rows], return_inverse=True)
        self.queries = rows
        self.group: np.ndarray = group.reshape(-1)  # numpy 2.0 returns the shape of the input
        self.groups: int = len(found)
        self.batches: int = -(-len(rows) // batch_size)
        self.seed = seed
        self._planned: tuple[int, np.ndarray, np.ndarray] | None = None

    def rows(self, epoch: int, batch: int) -> np.ndarray:
        """Return the rows of a batch."""
        if self._planned is None or self._planned[0] != epoch:
            generator = torch_generator(self.seed, epoch)
            order = dealt(self.group, self.groups, generator)
            columns = torch.randperm(self.batches, generator=generator).numpy()
            self._planned = epoch, self.queries[order], columns
        _, order, columns = self._planned
        return order[columns[batch] :: self.batches]


def dealt(
    group: np.ndarray,
    groups: int,
    generator: torch.Generator,
) -> np.ndarray:
    """Return a random order of the rows in which equal groups follow each other.

    If the rows are dealt one by one to n batches, a batch has a group twice only if the group has
    more than n rows.

    Args:
        group: (rows,) int64, from 0 to groups - 1.
        groups: number of groups.
        generator: draws the order of the groups, and of the rows in a group.
    """
    order = torch.randperm(len(group), generator=generator).numpy()
    place = torch.randperm(groups, generator=generator).numpy()[group[order]]
    return order[np.argsort(place, kind="stable")]


class Runs:
    """The runs of equal keys in a sorted list."""

    def __init__(self, *keys: np.ndarray) -> None:
        size = len(keys[0])
        is_start = np.zeros(size, dtype=bool)
        is_start[:1] = True
        for key in keys:
            is_start[1:] |= key[1:] != key[:-1]
        self.bounds: np.ndarray = np.append(np.flatnonzero(is_start), size)

    def around(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the start and the end of the run at each place."""
        run = np.searchsorted(self.bounds, places, side="right") - 1
        return self.bounds[run], self.bounds[run + 1]


class Pool:
    """The items from which candidates and negatives are drawn, in order of their labels.

    The memory is linear in the number of items.
    """

    def __init__(self, dataset: LabelledRows) -> None:
        labels = np.asarray(dataset.labels, dtype=np.int64)
        self.order: np.ndarray = np.argsort(labels, kind="stable")
        self.place: np.ndarray = _inverse(self.order)  # of a row in `order`
        self.sorted_labels: np.ndarray = labels[self.order]
        self.runs: Runs = Runs(self.sorted_labels)
        self.has_two_labels: bool = len(self.runs.bounds) > 2
        # Without coarse labels, all items have the same one.
        self.hard_order, self.hard_place = self.order, self.place
        self.outer, self.inner = Runs(np.zeros_like(labels)), self.runs
        coarse = getattr(dataset, "coarse_labels", None)
        if coarse is not None:
            coarse = np.asarray(coarse, dtype=np.int64)
            self.hard_order: np.ndarray = np.lexsort((labels, coarse))
            self.hard_place: np.ndarray = _inverse(self.hard_order)
            coarse, labels = coarse[self.hard_order], labels[self.hard_order]
            self.outer: Runs = Runs(coarse)
            self.inner: Runs = Runs(coarse, labels)

    def draw_negatives(
        self,
        candidates: np.ndarray,
        number: int,
        generator: torch.Generator,
    ) -> np.ndarray:
        """Return ``number`` hard negatives for each candidate, (B, number)."""
        place, all_place = self.hard_place[candidates], self.place[candidates]
        start, end = self.outer.around(place)
        skip, resume = self.inner.around(place)
        room = (end - start) - (resume - skip)
        all_skip, all_resume = self.runs.around(all_place)
        all_room = len(self.order) - (all_resume - all_skip)
        drawn = draw_distinct(np.where(room > 0, room, all_room), number, generator)
        hard = _stepped_over(start[:, None] + drawn, skip, resume)
        other = _stepped_over(drawn, all_skip, all_resume)
        # Of the two places, the unused one may be beyond the end.
        hard = self.hard_order[np.minimum(hard, len(self.order) - 1)]
        other = self.order[np.minimum(other, len(self.order) - 1)]
        return np.where(room[:, None] > 0, hard, other)


class Partners:
    """Draws a candidate of the same label for each query.

    Args:
        labels: (N,) int64, the labels of the dataset of queries.
        pool: the candidates.
        is_own: whether the pool is the dataset of queries; then no item is its own candidate.
    """

    def __init__(
        self,
        labels: np.ndarray,
        pool: Pool,
        is_own: bool,
    ) -> None:
        self.labels = labels
        self.pool = pool
        self.is_own = is_own
        start, end = self._run(np.arange(len(labels)))
        self.rows: np.ndarray = np.flatnonzero(end - start > is_own)  # the rows with a candidate
        if not len(self.rows):
            raise ValueError(
                "dataset: got no row with another row, or a product, of the same label, "
                "expected at least one"
            )

    def draw(self, queries: np.ndarray, generator: torch.Generator) -> np.ndarray:
        """Return the row of a random candidate for each query."""
        start, end = self._run(queries)
        drawn = start + draw_below(end - start - self.is_own, generator)
        if self.is_own:
            drawn += drawn >= self.pool.place[queries]
        return self.pool.order[drawn]

    def _run(self, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        labels, found = self.labels[queries], self.pool.sorted_labels
        return np.searchsorted(found, labels), np.searchsorted(found, labels, side="right")


def _stepped_over(
    places: np.ndarray,
    skip: np.ndarray,
    resume: np.ndarray,
) -> np.ndarray:
    """Return the places (B, n), those from ``skip`` (B,) on moved to ``resume`` and beyond."""
    skip, resume = skip[:, None], resume[:, None]
    return np.where(places >= skip, places + (resume - skip), places)


def _inverse(order: np.ndarray) -> np.ndarray:
    """Return the place of each index in a permutation."""
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    return place
