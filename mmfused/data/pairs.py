"""Batches for retrieval from any labelled products: pairs of one label, and hard negatives that
nearly have it.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from ._common import check_int, torch_generator
from .batches import Collate, Items


class PairBatches:
    """``{"query": items, "candidate": items, "negative": items}``, as :class:`Collate` makes them;
    row i of each is a triplet.

    A pair is two items of one label: a row of ``dataset``, and one of ``products`` (a catalogue)
    or, without that, another row of ``dataset``. Its hard negative, from where candidates come
    from, shares the pair's coarse label but not its label; where nobody does, it only has another
    label. Labels are drawn by how many rows they have, and none twice in a batch unless the batch
    has
    more rows than there are labels: what else is in the batch is then a true negative. Rows without
    a partner are never drawn. Without ``negatives`` a batch has none.

    An epoch is as many batches as the rows fill. Batch i follows from ``seed``, the epoch and i
    alone. Over ``world`` ranks each makes its own rows of the one batch of ``batch_size``.

    Raises ValueError where no label has a pair, all pairs have one label, or ``batch_size`` does
    not divide among the ranks."""

    def __init__(
        self,
        dataset,
        collate: Collate,
        batch_size: int,
        *,
        products=None,
        negatives: bool = True,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
    ):
        self.batch_size = check_int("batch_size", batch_size, 1)
        self.seed, self.rank, self.world = check_int("seed", seed, 0), rank, world
        if batch_size % world:
            raise ValueError(f"batch_size takes a multiple of the {world} ranks, got {batch_size}")
        self.collate = collate
        self.queries = Items(dataset, collate)
        self.candidates = self.queries if products is None else Items(products, collate)
        self.own = products is None
        self.rows = rows_by_label(dataset.labels)
        self.partners = self.rows if self.own else rows_by_label(products.labels)
        least = 2 if self.own else 1
        self.labels = [label for label in self.rows if len(self.partners.get(label, ())) >= least]
        if not self.labels:
            raise ValueError(
                "dataset takes rows that have another row, or a product, of their label; got none"
            )
        self.negatives = (
            hard_negatives(self.labels, dataset if self.own else products, self.partners)
            if negatives
            else None
        )
        self.odds = torch.tensor(
            [len(self.rows[label]) for label in self.labels], dtype=torch.float64
        )

    def __len__(self) -> int:
        return max(1, int(self.odds.sum()) // self.batch_size)

    def stream(self, position: int = 0) -> Iterator[dict[str, dict]]:
        """Epoch 0 and all that follow, without end, from batch ``position`` of them on; no batch
        before it is made.
        """
        position = check_int("position", position, 0)
        while True:
            epoch, batch = divmod(position, len(self))
            yield self.batch(epoch, batch)
            position += 1

    def batch(self, epoch: int, batch: int) -> dict[str, dict]:
        drawn = self.draw(torch_generator(self.seed, epoch, batch + 1))
        share = self.batch_size // self.world
        mine = slice(self.rank * share, (self.rank + 1) * share)
        generator = torch_generator(self.collate.seed, epoch, batch + 1, self.rank + 1)
        sources = {"query": self.queries, "candidate": self.candidates, "negative": self.candidates}
        return {role: sources[role].batch(rows[mine], generator) for role, rows in drawn.items()}

    def draw(self, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Rows of the queries, of their candidates and of their negatives."""
        whole, rest = divmod(self.batch_size, len(self.labels))
        picks = [torch.randperm(len(self.labels), generator=generator) for _ in range(whole)]
        if rest:
            picks.append(torch.multinomial(self.odds, rest, generator=generator))
        rows = {"query": [], "candidate": []} | ({} if self.negatives is None else {"negative": []})
        for label in (self.labels[pick] for pick in torch.cat(picks).tolist()):
            query = one_of(self.rows[label], generator)
            partners = self.partners[label]
            rows["query"].append(query)
            rows["candidate"].append(
                one_of(partners[partners != query] if self.own else partners, generator)
            )
            if self.negatives is not None:
                rows["negative"].append(one_of(self.negatives[label], generator))
        return {role: torch.tensor(found) for role, found in rows.items()}


def rows_by_label(labels) -> dict[int, np.ndarray]:
    labels = np.asarray(labels, dtype=np.int64)
    order = np.argsort(labels, kind="stable")
    found, starts = np.unique(labels[order], return_index=True)
    return dict(zip(found.tolist(), np.split(order, starts[1:]), strict=True))


def hard_negatives(labels, pool, partners: dict[int, np.ndarray]) -> dict[int, np.ndarray]:
    """For each label the rows of ``pool`` that share its coarse label but not it, or else the rows
    of all other labels.
    """
    if len(partners) < 2:
        raise ValueError(
            "dataset takes rows of at least two labels, got one: nothing could be a negative"
        )
    own = np.asarray(pool.labels, dtype=np.int64)
    coarse = getattr(pool, "coarse_labels", None)
    family = None if coarse is None else np.asarray(coarse, dtype=np.int64)
    found = {}
    for label in labels:
        near = np.empty(0, np.int64)
        if family is not None:
            near = np.flatnonzero((family == family[partners[label][0]]) & (own != label))
        found[label] = near if len(near) else np.flatnonzero(own != label)
    return found


def one_of(rows: np.ndarray, generator: torch.Generator) -> int:
    return int(rows[int(torch.randint(len(rows), (), generator=generator))])
