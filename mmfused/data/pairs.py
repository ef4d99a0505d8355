"""Batches for retrieval from labelled products: pairs of one label, and hard negatives."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from ._common import LabelledRows, check_int, check_ranks, torch_generator
from .batches import Batch, Collate, Items

ROLES = ("query", "candidate", "negative")


class PairBatches:
    """Batches ``{"query": items, "candidate": items, "negative": items}``; row i is a triplet.

    Items are as :class:`Collate` makes them. A pair is two items of one label: a row of
    ``dataset``, and one of ``products`` (a catalogue) or, without products, another row of
    ``dataset``. The hard negative is drawn from the same set as the candidate. It shares the pair's
    coarse label but not its label; if there is none, it only has another label.

    Labels are drawn in proportion to their number of rows. None is drawn twice in a batch unless
    the batch has more rows than there are labels, so the other rows of a batch are true negatives.
    Rows without a partner are never drawn.

    An epoch has as many batches as the rows fill. Batch i depends only on ``seed``, the epoch
    and i.

    Args:
        dataset: the queries.
        collate: how batches are made.
        batch_size: of all ranks together.
        products: the candidates; None takes the queries.
        negatives: add hard negatives.
        seed: of the draws.
        rank: of this process, which gets its own rows of every batch.
        world: number of ranks.

    Raises:
        ValueError: no label has a pair, all pairs have one label, or ``batch_size`` is no multiple
            of ``world``.
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
        # Whether candidates come from the queries.
        self.own: bool = products is None
        pool = dataset if products is None else products
        self.rows: dict[int, np.ndarray] = rows_by_label(dataset.labels)
        self.partners: dict[int, np.ndarray] = rows_by_label(pool.labels)
        least = 2 if self.own else 1
        self.labels: list[int] = [
            label for label in self.rows if len(self.partners.get(label, ())) >= least
        ]
        if not self.labels:
            raise ValueError(
                "dataset: got no row with another row, or a product, of its label, "
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
        """Yield batches without end, from batch ``position`` on, counted from epoch 0.

        No batch before it is made.
        """
        position = check_int("position", position, 0)
        while True:
            epoch, batch = divmod(position, len(self))
            yield self.batch(epoch, batch)
            position += 1

    def batch(self, epoch: int, batch: int) -> dict[str, Batch]:
        """Return one batch of an epoch."""
        drawn = self.draw(torch_generator(self.seed, epoch, batch + 1))
        share = self.batch_size // self.world
        mine = slice(self.rank * share, (self.rank + 1) * share)
        generator = torch_generator(self.collate.seed, epoch, batch + 1, self.rank + 1)
        sources = {"query": self.queries, "candidate": self.candidates, "negative": self.candidates}
        return {role: sources[role].batch(rows[mine], generator) for role, rows in drawn.items()}

    def draw(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Draw the rows of the queries, of their candidates and of their negatives."""
        whole, rest = divmod(self.batch_size, len(self.labels))
        picks = [torch.randperm(len(self.labels), generator=generator) for _ in range(whole)]
        if rest:
            picks.append(torch.multinomial(self.odds, rest, generator=generator))
        roles = ("query", "candidate") if self.negatives is None else tuple(ROLES)
        rows: dict[str, list[int]] = {role: [] for role in roles}
        for label in (self.labels[pick] for pick in torch.cat(picks).tolist()):
            query = _one_of(self.rows[label], generator)
            partners = self.partners[label]
            if self.own:
                partners = partners[partners != query]
            rows["query"].append(query)
            rows["candidate"].append(_one_of(partners, generator))
            if self.negatives is not None:
                rows["negative"].append(_one_of(self.negatives[label], generator))
        return {role: torch.tensor(found) for role, found in rows.items()}


def rows_by_label(labels: Sequence[int]) -> dict[int, np.ndarray]:
    """Return the rows of each label, in order."""
    values = np.asarray(labels, dtype=np.int64)
    order = np.argsort(values, kind="stable")
    found, starts = np.unique(values[order], return_index=True)
    return dict(zip(found.tolist(), np.split(order, starts[1:]), strict=True))


def hard_negatives(
    labels: Sequence[int],
    pool: LabelledRows,
    partners: dict[int, np.ndarray],
) -> dict[int, np.ndarray]:
    """Return, for each label, the rows of ``pool`` with its coarse label but not its label.

    If there are none, the rows of all other labels. ``partners`` are the rows of ``pool`` by label.
    """
    if len(partners) < 2:
        raise ValueError(
            "dataset: got rows of one label, expected at least two: a negative has another label"
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


def _one_of(rows: np.ndarray, generator: torch.Generator) -> int:
    return int(rows[int(torch.randint(len(rows), (), generator=generator))])
