"""Batches of a set of explicit pairs."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ._common import Batch, check_choice, check_int, check_ranks, torch_generator
from .batches import Collate, read_ahead
from .items import Items, make_items
from .pair_labels import batch_labels
from .pair_negatives import NegativeDraws
from .pair_sets import PairSet
from .pairs import dealt
from .ragged import draw_below, offsets_of, share_of
from .sequence_items import Processor, SequenceItems

Negatives: TypeAlias = Literal["given", "drawn", "none"]


class PairSetBatches:
    """Batches of queries, candidates and hard negatives of a :class:`PairSet`.

    A batch is ``{"query": items, "candidate": items, "negative": items}``. The candidate of a query
    is one of its positives, drawn at random. Its negatives are rows ``i * num_negatives`` and
    following of "negative". The items of a role are a batch of :class:`Collate`, or what a
    processor returns for complete sequences, with "labels". If the set states the modalities of a
    query's positives, they are the "code" of its candidate.

    In an epoch, a query is the query of one row or, if its task has another weight than 1, of
    ``weight`` rows on average: with 2.5, of two or three; with 0.5, of one row in every other
    epoch. The sizes of the batches of a task differ by at most one.

    Rows whose candidates are positives of each other's queries have equal labels, so that a model
    does not use them as negatives, see `mmfused.data.pair_labels.batch_labels`.

    The rows of batch i depend only on ``seed``, the epoch and i. Each rank gets its own share of
    every batch; it may be empty. The number of rows of a task is rounded to a whole number.

    Args:
        pair_set: the pairs.
        reader: makes the batches: a :class:`Collate`, which takes the first picture of an item, or
            a processor such as `mmfused.models.UNITEProcessor`.
        batch_size: largest number of queries per batch, before the batch is split over ranks.
        negatives: "given" takes the negatives of the set; what a query lacks is drawn from the
            positives of other queries of its task. If the set has none, batches have no
            negatives. "drawn" draws all, and "none" gives none.
        num_negatives: number of negatives of a query.
        one_task: whether all queries of a batch have the same task.
        seed: seed of the random draws.
        rank: rank of this process.
        world: number of ranks.
        workers: number of threads that read pictures; None takes one for each core, at most 8.

    Raises:
        ValueError: an argument is invalid, ``batch_size`` is not a multiple of ``world``, or the
            positives of a query are all there are, so that it can have no negative.

    Examples:
        >>> import json, pathlib, tempfile
        >>> from mmfused.data import Collate, train_tokenizer
        >>> from mmfused.data.pair_batches import PairSetBatches
        >>> from mmfused.data.pair_formats import open_pairs
        >>> rows = [{"qry": f"mug {i}", "pos_text": f"Mug no. {i}"} for i in range(5)]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "train.json")
        ...     size = path.write_text(json.dumps(rows))
        ...     pairs = open_pairs(path)
        >>> collate = Collate(train_tokenizer(pairs.items.texts), image_size=32, max_length=16)
        >>> batches = PairSetBatches(pairs, collate, batch_size=3, negatives="drawn")
        >>> [len(batches.batch(0, i)["query"]["labels"]) for i in range(len(batches))]
        [3, 2]
    """

    def __init__(
        self,
        pair_set: PairSet,
        reader: Collate | Processor,
        batch_size: int,
        *,
        negatives: Negatives = "given",
        num_negatives: int = 1,
        one_task: bool = True,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        workers: int | None = None,
    ) -> None:
        self.batch_size: int = check_int("batch_size", batch_size, 1)
        self.num_negatives: int = check_int("num_negatives", num_negatives, 1)
        self.seed: int = check_int("seed", seed, 0)
        check_choice("negatives", negatives, Negatives)
        check_ranks(batch_size, world)
        self.rank = rank
        self.world = world
        self.pair_set = pair_set
        self.reader = reader
        self.draws: NegativeDraws = NegativeDraws(pair_set, negatives == "given")
        has_given = bool(len(pair_set.negatives.values))
        self.has_negatives: bool = negatives == "drawn" or (negatives == "given" and has_given)
        if self.has_negatives:
            self.draws.check(num_negatives)
        self.plan: PairPlan = PairPlan(pair_set, batch_size, one_task, self.seed)
        self.items: Items | SequenceItems = make_items(
            pair_set.items, reader, workers, -(-batch_size // world)
        )

    def __len__(self) -> int:
        return len(self.plan)

    def stream(self, position: int = 0) -> Iterator[dict[str, Batch]]:
        """Yield batches of one epoch after another, without end.

        Args:
            position: index of the first batch to yield, counted from the start of epoch 0.
        """
        first = check_int("position", position, 0)
        places = (divmod(position, len(self)) for position in count(first))
        return read_ahead(places, self._start, self._finish, self.items.ahead)

    def batch(self, epoch: int, batch: int) -> dict[str, Batch]:
        """Return this rank's share of one batch of an epoch."""
        return self._finish((epoch, batch), self._start((epoch, batch)))

    def draw(self, epoch: int, batch: int) -> dict[str, Any]:
        """Return the rows of one batch, before the batch is split over ranks.

        Returns:
            "rows" (B,), the queries as rows of the set, and for each role a pair of the rows of
            items and their labels: (B,) or, of "negative", (B * num_negatives,).
        """
        generator = torch_generator(self.seed, epoch, batch + 1)
        pairs, rows = self.pair_set, self.plan.rows(epoch, batch)
        positives = pairs.positives
        drawn = draw_below(positives.sizes_of(rows), generator)
        query, candidate = pairs.queries[rows], positives.values[positives.offsets[rows] + drawn]
        number = self.num_negatives if self.has_negatives else 0
        negative = self.draws.draw(rows, number, generator)
        label, of_negative = batch_labels(
            self.draws.own.take(rows), *(pairs.products[x] for x in (query, candidate, negative))
        )
        found: dict[str, Any] = {"query": (query, label), "candidate": (candidate, label)}
        if self.has_negatives:
            found["negative"] = (negative.reshape(-1), of_negative.reshape(-1))
        return {"rows": rows, **found}

    def _start(self, place: tuple[int, int]) -> tuple[np.ndarray, dict[str, Any]]:
        drawn = self.draw(*place)
        rows = drawn.pop("rows")
        share = share_of(len(rows), self.rank, self.world)
        started = {}
        for role, (items, labels) in drawn.items():
            each = self.num_negatives if role == "negative" else 1
            mine = slice(share.start * each, share.stop * each)
            found: Tensor = torch.from_numpy(items[mine])
            started[role] = self.items.start(found), torch.from_numpy(labels[mine])
        return rows[share], started

    def _finish(
        self,
        place: tuple[int, int],
        started: tuple[np.ndarray, dict[str, Any]],
    ) -> dict[str, Batch]:
        epoch, batch = place
        rows, parts = started
        seed = getattr(self.reader, "seed", self.seed)
        generator = torch_generator(seed, epoch, batch + 1, self.rank + 1)
        found = {
            role: {**self.items.finish(items, generator), "labels": labels}
            for role, (items, labels) in parts.items()
        }
        if "code" in found["candidate"]:
            target = torch.from_numpy(self.pair_set.targets[rows])
            code = found["candidate"]["code"]
            found["candidate"]["code"] = torch.where(target > 0, target, code)
        return found


class PairPlan:
    """Which queries are in each batch of an epoch.

    Args:
        pairs: the set.
        batch_size: largest number of queries per batch.
        one_task: whether the queries of a batch have one task.
        seed: seed of the orders.
    """

    def __init__(
        self,
        pairs: PairSet,
        batch_size: int,
        one_task: bool,
        seed: int,
    ) -> None:
        self.one_task = one_task
        self.seed = seed
        tasks = np.unique(pairs.tasks)
        self.queries: list[np.ndarray] = [np.flatnonzero(pairs.tasks == task) for task in tasks]
        self.weights: list[float] = pairs.task_weights[tasks].tolist()
        visits = [
            _visits(len(rows), weight)
            for rows, weight in zip(self.queries, self.weights, strict=True)
        ]
        sizes = visits if one_task else [sum(visits)]
        self.batches: np.ndarray = np.array([-(-size // batch_size) for size in sizes])
        self._planned: tuple[int, list[np.ndarray], np.ndarray] | None = None

    def __len__(self) -> int:
        return int(self.batches.sum())

    def rows(self, epoch: int, batch: int) -> np.ndarray:
        """Return the queries of a batch, as rows of the set."""
        if self._planned is None or self._planned[0] != epoch:
            self._planned = epoch, *self._dealt(epoch)
        _, orders, places = self._planned
        firsts = offsets_of(self.batches)
        task = int(np.searchsorted(firsts, places[batch], side="right")) - 1
        return orders[task][places[batch] - firsts[task] :: self.batches[task]]

    def _dealt(self, epoch: int) -> tuple[list[np.ndarray], np.ndarray]:
        """Return the queries of each task in the order in which they are dealt to batches."""
        generator = torch_generator(self.seed, epoch)
        visited = []
        for number, (rows, weight) in enumerate(zip(self.queries, self.weights, strict=True)):
            # The same order in all epochs, in which each epoch goes on where the last one stopped.
            fixed = torch_generator(self.seed, number + 1, 0, 1)
            order = torch.randperm(len(rows), generator=fixed).numpy()
            size = _visits(len(rows), weight)
            places = (epoch * size + np.arange(size)) % len(rows)
            visited.append(rows[order[places]])
        visited = visited if self.one_task else [np.concatenate(visited)]
        groups = max(int(rows.max()) for rows in self.queries) + 1
        orders = [rows[dealt(rows, groups, generator)] for rows in visited]
        return orders, torch.randperm(len(self), generator=generator).numpy()


def _visits(queries: int, weight: float) -> int:
    """Return the number of rows of an epoch that the queries of a task have."""
    return max(1, round(queries * weight))
