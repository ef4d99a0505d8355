"""Batches for retrieval, made of pairs of items with the same label and of hard negatives."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from ._common import LabelledRows, check_int, check_ranks, torch_generator
from .batches import Batch, Collate, Items

ROLES = ("query", "candidate", "negative")


class PairBatches:
    """Batches of queries, candidates and hard negatives for retrieval.

    A batch is ``{"query": items, "candidate": items, "negative": items}``, in which the items of
    each role are a batch of :class:`Collate`. The query in row i is an item of ``dataset``. Its
    candidate has the same label, and is an item of ``products``, or another item of ``dataset`` if
    ``products`` is None. Its hard negative is drawn from the same set as the candidate, and has
    another label but the same coarse label. If there is no such item, the negative is any item with
    another label.

    Labels with more items are more likely to be drawn. If the batch size is not larger than the
    number of labels, all labels in a batch differ, so the candidates of other rows are true
    negatives. In a larger batch, each label occurs almost equally often. Items without a
    candidate are never queries.

    The rows of batch i depend only on ``seed``, the epoch and i.

    Args:
        dataset: the queries.
        collate: makes the batches.
        batch_size: number of rows per batch, before the batch is split over ranks.
        products: the candidates; None takes candidates from ``dataset``.
        negatives: whether batches have hard negatives.
        seed: seed of the random draws.
        rank: rank of this process; each rank gets its own share of every batch.
        world: number of ranks.

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
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.batch_size: int = check_int("batch_size", batch_size, 1)
        self.seed: int = check_int("seed", seed, 0)
        self.rank = rank
        self.world = world
        check_ranks(batch_size, world)
        self.collate = collate
        self.queries: Items = Items(dataset, collate)
        self.candidates: Items = self.queries if products is None else Items(products, collate)
        self.candidates_are_queries: bool = products is None
        pool = dataset if products is None else products
        self.rows: dict[int, np.ndarray] = rows_by_label(dataset.labels)
        self.partners: dict[int, np.ndarray] = rows_by_label(pool.labels)
        least = 2 if self.candidates_are_queries else 1
        self.labels: list[int] = [
            label for label in self.rows if len(self.partners.get(label, ())) >= least
        ]
        if not self.labels:
            raise ValueError(
                "dataset: got no row with another row, or a product, of the same label, "
                "expected at least one"
            )
        self.negatives: dict[int, np.ndarray] | None = None
        if negatives:
            self.negatives = hard_negatives(self.labels, pool, self.partners)
        sizes = [len(self.rows[label]) for label in self.labels]
        self.odds: Tensor = torch.tensor(sizes, dtype=torch.float64)

    def __len__(self) -> int:
        return max(1, int(self.odds.sum()) // self.batch_size)

    def stream(self, position: int = 0) -> Iterator[dict[str, Batch]]:
        """Yield batches of one epoch after another, without end.

        Args:
            position: index of the first batch to yield, counted from the start of epoch 0.
        """
        position = check_int("position", position, 0)
        while True:
            epoch, batch = divmod(position, len(self))
            yield self.batch(epoch, batch)
            position += 1

    def batch(self, epoch: int, batch: int) -> dict[str, Batch]:
        """Return this rank's share of one batch of an epoch."""
        drawn = self.draw(torch_generator(self.seed, epoch, batch + 1))
        share = self.batch_size // self.world
        part = slice(self.rank * share, (self.rank + 1) * share)
        generator = torch_generator(self.collate.seed, epoch, batch + 1, self.rank + 1)
        sources = {"query": self.queries, "candidate": self.candidates, "negative": self.candidates}
        return {role: sources[role].batch(rows[part], generator) for role, rows in drawn.items()}

    def draw(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Return the random rows of one batch by role, before the batch is split over ranks."""
        whole, rest = divmod(self.batch_size, len(self.labels))
        picks = [torch.randperm(len(self.labels), generator=generator) for _ in range(whole)]
        if rest:
            picks.append(torch.multinomial(self.odds, rest, generator=generator))
        roles = ("query", "candidate") if self.negatives is None else tuple(ROLES)
        rows: dict[str, list[int]] = {role: [] for role in roles}
        for label in (self.labels[pick] for pick in torch.cat(picks).tolist()):
            query = _one_of(self.rows[label], generator)
            partners = self.partners[label]
            if self.candidates_are_queries:
                partners = partners[partners != query]
            rows["query"].append(query)
            rows["candidate"].append(_one_of(partners, generator))
            if self.negatives is not None:
                rows["negative"].append(_one_of(self.negatives[label], generator))
        return {role: torch.tensor(found) for role, found in rows.items()}


def rows_by_label(labels: Sequence[int]) -> dict[int, np.ndarray]:
    """Return, for each label, its rows in ascending order."""
    values = np.asarray(labels, dtype=np.int64)
    order = np.argsort(values, kind="stable")
    found, starts = np.unique(values[order], return_index=True)
    return dict(zip(found.tolist(), np.split(order, starts[1:]), strict=True))


def hard_negatives(
    labels: Sequence[int],
    pool: LabelledRows,
    partners: dict[int, np.ndarray],
) -> dict[int, np.ndarray]:
    """Return, for each label, the rows of its hard negatives.

    A hard negative of a label has another label but the same coarse label. If there is no such row,
    all rows with another label are returned.

    Args:
        labels: labels of queries.
        pool: the dataset from which negatives are drawn.
        partners: rows of ``pool`` by label.
    """
    if len(partners) < 2:
        raise ValueError(
            "dataset: got rows of one label, "
            "expected at least two labels: a negative has another label"
        )
    pool_labels = np.asarray(pool.labels, dtype=np.int64)
    coarse = getattr(pool, "coarse_labels", None)
    coarse = None if coarse is None else np.asarray(coarse, dtype=np.int64)
    found = {}
    for label in labels:
        hard = np.empty(0, np.int64)
        if coarse is not None:
            hard = np.flatnonzero((coarse == coarse[partners[label][0]]) & (pool_labels != label))
        found[label] = hard if len(hard) else np.flatnonzero(pool_labels != label)
    return found


def _one_of(rows: np.ndarray, generator: torch.Generator) -> int:
    return int(rows[int(torch.randint(len(rows), (), generator=generator))])
