"""Sets of explicit pairs: queries with their positives and negatives, and what is searched."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch

from ._common import torch_generator
from .pair_items import ItemBuilder, PairItems, Spec
from .pair_labels import same_number
from .ragged import Ragged
from .rows import BrokenRow

# The text, the names of the picture files and the instruction of an item.
RawItem: TypeAlias = tuple[str, Sequence[str], str]
# Bits of the modalities of an item, as in UNITE.
MODALITIES = {"text": 1, "image": 2, "video": 4}


@dataclass
class PairSet:
    """Queries with their positives and negatives, all of which are rows of ``items``.

    :func:`open_pairs` reads one from files. Equal items have the same row, and the positives of
    equal queries of one task are together in one query.

    Examples:
        >>> import json, pathlib, tempfile
        >>> from mmfused.data import open_pairs
        >>> rows = [{"qry": "mug", "pos_text": text} for text in ("Red mug", "Blue mug")]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "train.json")
        ...     size = path.write_text(json.dumps(rows))
        ...     pairs = open_pairs(path)
        >>> len(pairs), [pairs.texts[row] for row in pairs.positives[0]]
        (1, ['Red mug', 'Blue mug'])
        >>> pairs.queries.tolist(), pairs.candidates.tolist(), pairs.task_names
        ([0], [1, 2], ['train'])
    """

    items: PairItems
    queries: np.ndarray  # (Q,) int64
    positives: Ragged  # Q lists, each of at least one row
    negatives: Ragged  # Q lists, which may be empty
    tasks: np.ndarray  # (Q,) int64, the task of each query
    task_names: list[str]
    # How often a query is visited in an epoch on average, for each task.
    task_weights: np.ndarray
    # (Q,) int64: the modalities that the positives are said to have, a sum of MODALITIES; 0: none
    # are given.
    targets: np.ndarray
    candidates: np.ndarray  # (C,) int64, the items that are searched
    corpora: np.ndarray  # (C,) int64, the corpus of each candidate
    corpus_names: list[str]
    # Number of corpora that the data give; the others are the positives and negatives of a task.
    given_corpora: int
    task_corpora: list[list[int]]  # the corpora that the queries of each task search
    # (N,) int64: items with the same number are the same product, and no negatives of each other.
    products: np.ndarray
    skipped: list[str] = field(default_factory=list)  # why rows or items were left out

    def __len__(self) -> int:
        return len(self.queries)

    @property
    def texts(self) -> Sequence[str]:
        """The text of each item."""
        return self.items.texts

    @property
    def lost(self) -> list[str]:
        """A sentence about each picture that could not be decoded when it was needed."""
        return self.items.lost

    @property
    def weights(self) -> np.ndarray:
        """How often each query is visited in an epoch on average, (Q,) float64."""
        return self.task_weights[self.tasks]

    @property
    def digest(self) -> str:
        """SHA-256 of all that the set holds; of picture files, their names and sizes."""
        names = [self.items.digest, self.task_names, self.corpus_names, self.task_corpora]
        total = hashlib.sha256(json.dumps(names).encode())
        for lists in (self.positives, self.negatives):
            for numbers in lists.arrays:
                total.update(np.ascontiguousarray(numbers).data)
        numbers = (self.queries, self.tasks, self.targets, self.candidates, self.corpora)
        for part in (*numbers, self.products, self.task_weights):
            total.update(np.ascontiguousarray(part).data)
        return total.hexdigest()

    def select(self, rows: Sequence[int] | np.ndarray) -> PairSet:
        """Return a set of the queries ``rows``, with all items, candidates and tasks.

        Raises:
            ValueError: there are no rows, or a row is not one of the set.
        """
        chosen = np.asarray(rows)
        is_row = chosen.ndim == 1 and len(chosen) and chosen.dtype.kind in "iu"
        if not is_row or chosen.min() < 0 or chosen.max() >= len(self):
            raise ValueError(
                f"rows: got {str(rows):.80}, expected one or more integers from 0 to "
                f"{len(self) - 1}"
            )
        return replace(
            self,
            queries=self.queries[chosen],
            positives=self.positives.take(chosen),
            negatives=self.negatives.take(chosen),
            tasks=self.tasks[chosen],
            targets=self.targets[chosen],
        )

    def split(self, fraction: float) -> tuple[PairSet, PairSet]:
        """Return the set in two parts, the second with ``fraction`` of the queries, at least one.

        Equal sets are split alike. The sentences of ``skipped`` stay with the first part. If a task
        searches the positives and negatives of its queries, the second part has only those of its
        own queries.

        Raises:
            ValueError: the fraction is not between 0 and 1, or the set has only one query.
        """
        if not isinstance(fraction, (int, float)) or not 0 < fraction < 1:
            raise ValueError(f"fraction: got {fraction!r}, expected a number between 0 and 1")
        if len(self) < 2:
            raise ValueError("fraction: got a set of one query, expected at least two to split")
        count = min(max(round(fraction * len(self)), 1), len(self) - 1)
        order = torch.randperm(len(self), generator=torch_generator(25)).numpy()
        second = replace(self.select(np.sort(order[:count])), skipped=[])
        return self.select(np.sort(order[count:])), second._narrowed()

    def _narrowed(self) -> PairSet:
        """Return the set without candidates that belong to no query and are in no given corpus."""
        corpus = np.array([corpora[0] for corpora in self.task_corpora])
        found = [
            corpus[self.tasks[lists.owners]] * len(self.items) + lists.values
            for lists in (self.positives, self.negatives)
        ]
        keys = self.corpora * len(self.items) + self.candidates
        kept = (self.corpora < self.given_corpora) | np.isin(keys, np.concatenate(found))
        return replace(self, candidates=self.candidates[kept], corpora=self.corpora[kept])

    @property
    def searched_items(self) -> np.ndarray:
        """The rows of ``items`` that are queries or candidates, in order."""
        return np.union1d(self.queries, self.candidates)


class PairBuilder:
    """Collects the rows of a set of pairs.

    Args:
        where: the file or folder, for messages.
    """

    def __init__(self, where: Path) -> None:
        self.where = where
        self.items: ItemBuilder = ItemBuilder()
        self.skipped: list[str] = []
        self.task_names: list[str] = []
        self.task_weights: list[float] = []
        # The corpora that each task searches; None: its own positives and negatives.
        self.task_corpora: list[list[int] | None] = []
        self.corpus_names: list[str] = []
        self.prefix = ""  # of the names of tasks and of sentences
        self.weight = 1.0  # of the following tasks
        self._rows = {name: array("q") for name in ("query", "task", "target")}
        self._positives = array("q"), array("q")  # the rows of the items, and how many each row has
        self._negatives = array("q"), array("q")
        self._candidates = array("q"), array("q")  # the rows of the items, and their corpora
        self._products: dict[str, int] = {}  # an item of each product
        self._same = array("q"), array("q")  # items, and the first item of the same product

    @property
    def count(self) -> int:
        """The number of rows."""
        return len(self._rows["query"])

    def task(self, name: str, corpora: list[int] | None = None) -> int:
        """Return the number of a new task.

        Its queries search ``corpora``; None: the positives and negatives of the task.
        """
        self.task_names.append(self.prefix + name)
        self.task_corpora.append(corpora)
        self.task_weights.append(self.weight)
        return len(self.task_names) - 1

    def corpus(self, name: str) -> int:
        """Return the number of a new corpus."""
        self.corpus_names.append(self.prefix + name)
        return len(self.corpus_names) - 1

    def _own_corpus(self, task: int) -> int:
        self.corpus_names.append(self.task_names[task])
        return len(self.corpus_names) - 1

    def candidate(self, spec: Spec, corpus: int) -> int:
        """Add an item to a corpus, and return its row."""
        row = self.items.row(spec)
        self._candidates[0].append(row)
        self._candidates[1].append(corpus)
        return row

    def product(self, row: int, name: str) -> None:
        """Say which product an item is."""
        self._same[0].append(row)
        self._same[1].append(self._products.setdefault(self.prefix + name, row))

    def skip(self, where: str, reason: object) -> None:
        """Add a sentence about a row, or about an item of it, that is left out."""
        self.skipped.append(f"{self.prefix}{where}: {reason}")

    def pair(
        self,
        query: Spec,
        positives: Iterable[int],
        negatives: Iterable[int] = (),
        task: int = 0,
        target: int = 0,
    ) -> None:
        """Add a query with the rows of its positives, at least one, and negatives."""
        numbers = (self.items.row(query), task, target)
        for column, number in zip(self._rows.values(), numbers, strict=True):
            column.append(number)
        for (rows, counts), items in zip(
            (self._positives, self._negatives), (positives, negatives), strict=True
        ):
            before = len(rows)
            rows.extend(items)
            counts.append(len(rows) - before)

    def finish(self) -> PairSet:
        """Return the set; raise ValueError if it has no pair."""
        query, task, target = (np.array(column) for column in self._rows.values())
        if not len(query):
            first = f"; the first row: {self.skipped[0]}" if self.skipped else ""
            raise ValueError(f"{self.where} has no usable pair{first}")
        items = self.items.finish()
        first, owner = _first_and_owner(task * len(items) + query)
        positives = _lists(self._positives, owner, len(first))
        negatives = self._true_negatives(positives, _lists(self._negatives, owner, len(first)))
        tasks = task[first]
        given_corpora = len(self.corpus_names)
        candidates, corpora, task_corpora = self._searched(tasks, positives, negatives)
        return PairSet(
            items,
            query[first],
            positives,
            negatives,
            tasks,
            self.task_names,
            np.array(self.task_weights),
            target[first],
            candidates,
            corpora,
            self.corpus_names,
            given_corpora,
            task_corpora,
            same_number(len(items), *(np.array(column, np.int64) for column in self._same)),
            self.skipped,
        )

    def _searched(
        self,
        tasks: np.ndarray,
        positives: Ragged,
        negatives: Ragged,
    ) -> tuple[np.ndarray, np.ndarray, list[list[int]]]:
        """Return the candidates, their corpora, and the corpora that each task searches."""
        task_corpora = [
            [self._own_corpus(task)] if corpora is None else corpora
            for task, corpora in enumerate(self.task_corpora)
        ]
        is_own = np.array([corpora is None for corpora in self.task_corpora])
        corpus = np.array([corpora[0] for corpora in task_corpora])
        keys = []
        for lists in (positives, negatives):
            task = tasks[lists.owners]
            keys.append((corpus[task] * len(self.items) + lists.values)[is_own[task]])
        own_corpora, own = np.divmod(np.unique(np.concatenate(keys)), len(self.items))
        candidates, corpora = (np.array(column, np.int64) for column in self._candidates)
        candidates = np.concatenate([candidates, own])
        return candidates, np.concatenate([corpora, own_corpora]), task_corpora

    def _true_negatives(self, positives: Ragged, negatives: Ragged) -> Ragged:
        """Return the negatives without those that are positives of the same query."""
        most = len(self.items)
        wrong = np.isin(
            negatives.owners * most + negatives.values, positives.owners * most + positives.values
        )
        if wrong.any():
            count = np.count_nonzero(wrong)
            self.skipped.append(f"{count} negatives are also positives of their query: left out")
        kept = ~wrong
        return Ragged.grouped(negatives.owners[kept], negatives.values[kept], len(negatives))


def _first_and_owner(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the first row of each key in order, and for each row the place of its key there."""
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    order = np.argsort(first)
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    return first[order], place[inverse.reshape(-1)]


def _lists(
    columns: tuple[Any, Any],
    owner: np.ndarray,
    count: int,
) -> Ragged:
    """Return the items of each of ``count`` queries; ``owner`` (rows,) is the query of each row."""
    values, counts = (np.array(column, np.int64) for column in columns)
    return Ragged.grouped(np.repeat(owner, counts), values, count)


def read_items(
    builder: PairBuilder,
    where: str,
    field: str,
    raw: Sequence[RawItem | BrokenRow],
    needed: bool,
) -> list[Spec]:
    """Return the usable items of a field of a row, and skip the others.

    Args:
        builder: the set.
        where: the row, for sentences.
        field: the field, for sentences.
        raw: the items, or why they cannot be used.
        needed: whether the row cannot be used without any item.

    Raises:
        BrokenRow: no item is usable, and one is needed.
    """
    specs: list[Spec] = []
    reasons: list[BrokenRow] = []
    for item in raw:
        try:
            if isinstance(item, BrokenRow):
                raise item
            specs.append(builder.items.spec(*item))
        except BrokenRow as error:
            reasons.append(BrokenRow(f"{field}: {error}"))
    if needed and not specs:
        raise reasons[0] if reasons else BrokenRow(f"{field}: it is empty")
    for reason in reasons:
        builder.skip(where, reason)
    return specs
