"""Retrieval scores of queries with explicit relevant candidates, tasks and corpora."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmfused.data.batches import Batches, read_ahead
from mmfused.models.retrieval import evaluating
from mmfused.training.retrieval_metrics import check_finite, mean_chance, ranking_scores
from mmfused.training.search import CUTOFFS, found_in_first, ranges


@dataclass
class Pairs:
    """Queries, their relevant candidates and what they search, as indices of items.

    Args:
        queries: (Q,) int64, the item of each query.
        positives_indptr: (Q + 1,) int64; the relevant items of query i are
            ``positives_indices[positives_indptr[i] : positives_indptr[i + 1]]``.
        positives_indices: (P,) int64, items, different ones for each query.
        tasks: (Q,) int64, the task of each query, an index into ``task_names``.
        candidates: (C,) int64, the item of each candidate.
        corpora: (C,) int64, the corpus of each candidate, an index into ``corpus_names``.
        task_names: names of the tasks.
        corpus_names: names of the corpora.

    Raises:
        ValueError: the tensors do not fit together.

    Examples:
        >>> import torch
        >>> from mmfused.training.pair_metrics import Pairs
        >>> one = torch.tensor([0])
        >>> pairs = Pairs(
        ...     queries=one,
        ...     positives_indptr=torch.tensor([0, 2]),
        ...     positives_indices=torch.tensor([1, 2]),
        ...     tasks=one,
        ...     candidates=torch.tensor([1, 2, 3]),
        ...     corpora=torch.zeros(3, dtype=torch.int64),
        ...     task_names=["text"],
        ...     corpus_names=["text"],
        ... )
        >>> len(pairs.queries), len(pairs.candidates)
        (1, 3)
    """

    queries: Tensor
    positives_indptr: Tensor
    positives_indices: Tensor
    tasks: Tensor
    candidates: Tensor
    corpora: Tensor
    task_names: Sequence[str]
    corpus_names: Sequence[str]

    def __post_init__(self) -> None:
        indptr, indices = self.positives_indptr, self.positives_indices
        if not len(indptr) or indptr[0] != 0 or (indptr.diff() < 0).any():
            raise ValueError(
                "positives_indptr: got numbers that fall, expected numbers that rise from 0"
            )
        for name, got, expected in (
            ("positives_indptr", len(indptr), len(self.queries) + 1),
            ("positives_indices", len(indices), int(indptr[-1])),
            ("tasks", len(self.tasks), len(self.queries)),
            ("corpora", len(self.corpora), len(self.candidates)),
        ):
            if got != expected:
                raise ValueError(f"{name}: got {got} numbers, expected {expected}")
        _check_below("tasks", self.tasks, len(self.task_names))
        _check_below("corpora", self.corpora, len(self.corpus_names))
        rows = torch.repeat_interleave(indptr.diff())
        if torch.stack([rows, indices]).unique(dim=1).shape[1] < len(indices):
            raise ValueError(
                "positives_indices: got an item twice for a query, expected different ones"
            )

    @classmethod
    def of(cls, pairs: Any, rows: Tensor | None = None) -> Pairs:
        """Return those of a `mmfused.data.PairSet`.

        Args:
            pairs: the set.
            rows: the items that are embedded, which are numbered in this order; among them all
                queries and candidates. None numbers all items.
        """
        place = torch.arange(len(pairs.items))
        if rows is not None:
            place = torch.full_like(place, -1)
            place[rows] = torch.arange(len(rows))
        positives = place[torch.as_tensor(pairs.positives.values)]
        owners = torch.as_tensor(pairs.positives.owners)[positives >= 0]
        counts = torch.bincount(owners, minlength=len(pairs.queries))
        return cls(
            queries=place[torch.as_tensor(pairs.queries)],
            positives_indptr=torch.cat([counts.new_zeros(1), counts.cumsum(0)]),
            positives_indices=positives[positives >= 0],
            tasks=torch.as_tensor(pairs.tasks),
            candidates=place[torch.as_tensor(pairs.candidates)],
            corpora=torch.as_tensor(pairs.corpora),
            task_names=pairs.task_names,
            corpus_names=pairs.corpus_names,
        )


def _check_below(name: str, numbers: Tensor, limit: int) -> None:
    if len(numbers) and not 0 <= int(numbers.min()) <= int(numbers.max()) < limit:
        raise ValueError(
            f"{name}: got {int(numbers.min())} to {int(numbers.max())}, expected numbers from 0 to "
            f"{limit - 1}"
        )


@dataclass
class _Search:
    """The results of some queries in some candidates."""

    queries: Tensor  # (A,) int64, the queries with a relevant candidate
    relevant: Tensor  # (A,) int64, number of relevant candidates
    ranks: Tensor  # (A,) int64, rank of the first relevant candidate
    found: Tensor  # (A, 6) int64, number of relevant candidates among the first `CUTOFFS`
    searched: Tensor  # (A,) int64, number of candidates of each query
    candidates: int
    unanswerable: int

    def of(self, queries: Tensor) -> _Search:
        """Return the results of some of the queries.

        Args:
            queries: (Q,) bool.
        """
        kept = queries[self.queries]
        return _Search(
            self.queries[kept],
            self.relevant[kept],
            self.ranks[kept],
            self.found[kept],
            self.searched[kept],
            self.candidates,
            int(queries.sum() - kept.sum()),
        )

    def scores(self) -> dict[str, Any]:
        """Return the scores; without queries, only the numbers of queries and candidates."""
        scores: dict[str, Any] = {
            "queries": len(self.queries),
            "candidates": self.candidates,
            "unanswerable": self.unanswerable,
        }
        if not len(self.queries):
            return scores
        scores |= ranking_scores(self.ranks)
        scores["mrr_at_10"] = float(((self.ranks <= 10) / self.ranks.double()).mean())
        shares = (self.found.double() / self.relevant[:, None]).mean(0).tolist()
        for k, share in zip(CUTOFFS, shares, strict=True):
            scores[f"true_recall_at_{k}"] = share
        return {**scores, "chance": mean_chance(self.relevant, self.searched)}


def pair_scores(
    embeddings: Tensor,
    pairs: Pairs,
    device: torch.device | str | None = None,
) -> dict[str, Any]:
    """Return the scores of queries with explicit relevant candidates.

    In "searches", "all" has the scores of all queries among all candidates. With several tasks,
    "task->all" has those of the queries of a task, and "task->task" those in the corpus with the
    name of the task, if there are several corpora. An item in several corpora is one candidate of
    "all". The scores of a search are

    * recall_at_k: fraction of queries with a relevant candidate among the first k = 1, 5, 10;
    * true_recall_at_k: mean fraction of a query's relevant candidates that are among the first k =
      1, 5, 10, 20, 50, 100, Recall@k of VISTA (Zhou et al., ACL 2024), whose report on WebQA has
      the searches "all" and "task->task";
    * mrr, the mean of 1 / rank of the first relevant candidate, and mrr_at_10, where ranks above 10
      count as 0;
    * chance: the expected recall_at_k and mrr for candidates in random order.

    Queries without a relevant candidate in a search are excluded; "unanswerable" is their number.
    "queries" is the number of those that remain. Irrelevant candidates rank before relevant ones of
    equal dot product. A query that is also a candidate does not find itself, unless it is relevant.

    Args:
        embeddings: (N, D) embeddings of the items.
        pairs: the queries and candidates.
        device: where to search; None is the device of ``embeddings``.

    Returns:
        The scores of "all", and "searches".

    Raises:
        ValueError: no query has a relevant candidate, or an item has no embedding.

    Examples:
        >>> import torch
        >>> from mmfused.training.pair_metrics import Pairs, pair_scores
        >>> embeddings = torch.tensor([[1, 0], [0, 1], [0.9, 0.1], [0.2, 0.3], [0.4, 0.8], [0, 0]])
        >>> pairs = Pairs(
        ...     queries=torch.tensor([0, 1]),
        ...     positives_indptr=torch.tensor([0, 2, 3]),
        ...     positives_indices=torch.tensor([2, 5, 3]),
        ...     tasks=torch.tensor([0, 1]),
        ...     candidates=torch.tensor([2, 3, 4, 5]),
        ...     corpora=torch.tensor([0, 1, 1, 0]),
        ...     task_names=["text", "image"],
        ...     corpus_names=["text", "image"],
        ... )
        >>> scores = pair_scores(embeddings, pairs)
        >>> scores["recall_at_1"], scores["mrr"], scores["true_recall_at_1"]
        (0.5, 0.75, 0.25)
        >>> list(scores["searches"])
        ['all', 'text->all', 'text->text', 'image->all', 'image->image']
        >>> scores["searches"]["text->text"]["true_recall_at_5"]
        1.0
    """
    for name in ("queries", "candidates", "positives_indices"):
        _check_below(name, getattr(pairs, name), len(embeddings))

    def search(queries: Tensor, candidates: Tensor) -> _Search:
        return _search(embeddings, pairs, queries, pairs.candidates[candidates].unique(), device)

    every_query = torch.ones(len(pairs.queries), dtype=torch.bool)
    whole = search(every_query, torch.ones(len(pairs.candidates), dtype=torch.bool))
    if not len(whole.queries):
        raise ValueError("data: got no query with a relevant candidate, expected at least one")
    searches = {"all": whole.scores()}
    corpus_names = list(pairs.corpus_names)
    for number, name in enumerate(pairs.task_names):
        of_task = pairs.tasks == number
        if not of_task.any():
            continue
        if len(pairs.task_names) > 1:
            searches[f"{name}->all"] = whole.of(of_task).scores()
        if len(corpus_names) > 1 and name in corpus_names:
            of_corpus = pairs.corpora == corpus_names.index(name)
            searches[f"{name}->{name}"] = search(of_task, of_corpus).scores()
    top = {name: x for name, x in searches["all"].items() if isinstance(x, float)}
    return {**top, "searches": searches}


def _search(
    embeddings: Tensor,
    pairs: Pairs,
    chosen: Tensor,
    candidates: Tensor,
    device: torch.device | str | None,
) -> _Search:
    """Search the queries ``chosen``, (Q,) bool, in the different items ``candidates``, (c,)."""
    column_of = torch.full((len(embeddings),), -1)
    column_of[candidates] = torch.arange(len(candidates))
    queries = chosen.nonzero()[:, 0]
    rows, places = ranges(pairs.positives_indptr[queries], pairs.positives_indptr[queries + 1])
    columns = column_of[pairs.positives_indices[places]]
    rows, columns = rows[columns >= 0], columns[columns >= 0]
    counts = torch.bincount(rows, minlength=len(queries))
    answerable = counts > 0
    counts, kept = counts[answerable], queries[answerable]
    rows = (answerable.cumsum(0) - 1)[rows]
    own = column_of[pairs.queries[kept]]  # the query itself; -1 if it is no candidate
    own[rows[columns == own[rows]]] = -1
    starts = [0, *counts.cumsum(0).tolist()]

    def relevant(first: int, last: int) -> tuple[Tensor, Tensor]:
        part = slice(starts[first], starts[last])
        return rows[part] - first, columns[part]

    results = (counts, counts.new_zeros(0, len(CUTOFFS)))
    if len(kept):
        query = embeddings[pairs.queries[kept]]
        results = found_in_first(query, embeddings[candidates], relevant, own, device)
    searched = len(candidates) - (own >= 0).long()
    return _Search(kept, counts, *results, searched, len(candidates), len(queries) - len(kept))


@torch.no_grad()
def embed_pair_items(
    model: Any,
    batches: Iterable[Mapping[str, Tensor]],
    has_text: Sequence[bool],
    amp: bool = False,
    stopped: Callable[[], object] = lambda: False,
) -> Tensor | None:
    """Embed each item in its own view, in evaluation mode.

    The view is "both" for an item with a picture and a text, else the one that it has; of an item
    with neither, it is "both". Complete sequences, which have "code", go through UNITE's
    ``embed_sequences``.

    Args:
        model: a retrieval model.
        batches: at least one batch; each has "image_present" or "code".
        has_text: whether each of the N items in ``batches`` has a text.
        amp: compute under bfloat16 autocast.
        stopped: called before each batch; if it returns true, `embed_pair_items` returns None.

    Returns:
        (N, D) float32 CPU embeddings.

    Raises:
        RuntimeError: an embedding is not finite.
    """
    device = next(model.parameters()).device
    parts: list[Tensor] = []
    first = 0
    with evaluating(model):
        for batch in batches:
            if stopped():
                return None
            items = {name: x.to(device) for name, x in batch.items() if name != "labels"}
            count = len(batch["input_ids"])
            text = torch.tensor(has_text[first : first + count], dtype=torch.bool)
            with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                if "code" in items:
                    part = model.embed_sequences(**items)
                else:
                    part = _own_views(model, items, batch["image_present"], text)
            part = part.float().cpu()
            check_finite(part, "the embeddings")
            parts.append(part)
            first += count
    return torch.cat(parts)


def _own_views(
    model: Any,
    items: Mapping[str, Tensor],
    image: Tensor,
    text: Tensor,
) -> Tensor:
    """Return the embeddings (B, D) of items with a picture, ``image``, or a text, (B,) bool."""
    views = {"image": image & ~text, "text": text & ~image, "both": image == text}
    rows_of = {view: rows.nonzero()[:, 0] for view, rows in views.items() if rows.any()}
    parts: list[Tensor] = []
    for view, rows in rows_of.items():
        chosen = {name: x[rows.to(x.device)] for name, x in items.items()}
        parts.append(model.embed(views=(view,), **chosen)[view])
    order = torch.cat(list(rows_of.values())).argsort()
    return torch.cat(parts)[order.to(parts[0].device)]


def evaluate_pairs(
    model: Any,
    pairs: Any,
    batches: Batches,
    amp: bool = False,
    stopped: Callable[[], object] = lambda: False,
) -> dict[str, Any] | None:
    """Return :func:`pair_scores` of a model, or None if ``stopped()`` becomes true.

    Only the items that are queries or candidates are embedded.

    Args:
        model: a retrieval model.
        pairs: a `mmfused.data.PairSet`.
        batches: batches of the items of ``pairs``.
        amp: compute under bfloat16 autocast.
        stopped: called before each batch.
    """
    rows = torch.from_numpy(pairs.searched_items)
    items = batches.items
    chosen = read_ahead(
        rows.split(batches.batch_size),
        items.start,
        lambda _, started: items.finish(started),
        items.ahead,
    )
    has_text = [bool(pairs.items.texts[row]) for row in rows.tolist()]
    embeddings = embed_pair_items(model, chosen, has_text, amp, stopped)
    if embeddings is None:
        return None
    return pair_scores(embeddings, Pairs.of(pairs, rows), next(model.parameters()).device)
