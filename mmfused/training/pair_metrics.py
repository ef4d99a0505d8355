"""Retrieval scores of queries with explicit relevant candidates, tasks and corpora."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmfused.models.retrieval import evaluating
from mmfused.training.retrieval_metrics import check_finite, mean_chance, ranking_scores
from mmfused.training.search import CUTOFFS, found_in_first, ranges


@dataclass
class Relevance:
    """Which of C candidates are relevant to each of Q queries, with their tasks and corpora.

    Args:
        indptr: (Q + 1,) int64; the relevant candidates of query i are
            ``indices[indptr[i] : indptr[i + 1]]``.
        indices: (P,) int64, candidates, from 0 to C - 1, different ones for each query.
        tasks: (Q,) int64, the task of each query, an index into ``task_names``.
        task_names: names of the tasks.
        corpora: (C,) int64, the corpus of each candidate, an index into ``corpus_names``.
        corpus_names: names of the corpora.

    Raises:
        ValueError: the tensors do not fit together.

    Examples:
        >>> import torch
        >>> from mmfused.training.pair_metrics import Relevance, pair_scores
        >>> numbers = {"indptr": torch.tensor([0, 2, 3]), "indices": torch.tensor([0, 3, 1])}
        >>> tasks = {"tasks": torch.tensor([0, 1]), "task_names": ["text", "image"]}
        >>> corpora = {"corpora": torch.tensor([0, 1, 1, 0]), "corpus_names": ["text", "image"]}
        >>> relevance = Relevance(**numbers, **tasks, **corpora)
        >>> candidates = torch.tensor([[0.9, 0.1], [0.2, 0.3], [0.4, 0.8], [0.1, 0.1]])
        >>> scores = pair_scores(torch.eye(2), candidates, relevance)
        >>> scores["recall_at_1"], scores["mrr"], scores["true_recall_at_1"]
        (0.5, 0.75, 0.25)
        >>> list(scores["searches"])
        ['all', 'text->all', 'text->text', 'image->all', 'image->image']
        >>> scores["searches"]["text->text"]["true_recall_at_5"]
        1.0
    """

    indptr: Tensor
    indices: Tensor
    tasks: Tensor
    task_names: Sequence[str]
    corpora: Tensor
    corpus_names: Sequence[str]

    def __post_init__(self) -> None:
        for name in ("indptr", "indices", "tasks", "corpora"):
            setattr(self, name, getattr(self, name).long())
        steps = self.indptr.diff()
        if not len(self.indptr) or self.indptr[0] != 0 or (steps < 0).any():
            raise ValueError("indptr: got numbers that fall, expected numbers that rise from 0")
        if self.indptr[-1] != len(self.indices):
            raise ValueError(
                f"indptr: got {int(self.indptr[-1])} at the end, expected {len(self.indices)}, the "
                "number of indices"
            )
        if len(self.tasks) != len(steps):
            raise ValueError(f"tasks: got {len(self.tasks)} tasks, expected {len(steps)}")
        for name, limit in (
            ("indices", len(self.corpora)),
            ("tasks", len(self.task_names)),
            ("corpora", len(self.corpus_names)),
        ):
            numbers = getattr(self, name)
            if len(numbers) and not 0 <= int(numbers.min()) <= int(numbers.max()) < limit:
                raise ValueError(
                    f"{name}: got {int(numbers.min())} to {int(numbers.max())}, expected numbers "
                    f"from 0 to {limit - 1}"
                )
        keys = torch.repeat_interleave(steps) * len(self.corpora) + self.indices
        if len(keys.unique()) < len(keys):
            raise ValueError("indices: got a candidate twice for a query, expected different ones")


@dataclass
class _Search:
    """The results of some queries in some candidates."""

    queries: Tensor  # (A,) int64, the queries with a relevant candidate
    relevant: Tensor  # (A,) int64, number of relevant candidates
    ranks: Tensor  # (A,) int64, rank of the first relevant candidate
    found: Tensor  # (A, 6) int64, number of relevant candidates among the first `CUTOFFS`
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
        all_candidates = torch.full_like(self.relevant, self.candidates)
        return {**scores, "chance": mean_chance(self.relevant, all_candidates)}


def pair_scores(
    query: Tensor,
    candidate: Tensor,
    relevance: Relevance,
    device: torch.device | str | None = None,
) -> dict[str, Any]:
    """Return the scores of queries with explicit relevant candidates.

    In "searches", "all" has the scores of all queries among all candidates. With several tasks,
    "task->all" has those of the queries of a task, and "task->task" those in the corpus with the
    name of the task, if there are several corpora. The scores of a search are

    * recall_at_k: fraction of queries with a relevant candidate among the first k = 1, 5, 10;
    * true_recall_at_k: mean fraction of a query's relevant candidates that are among the first k =
      1, 5, 10, 20, 50, 100, Recall@k of VISTA (Zhou et al., ACL 2024), whose report on WebQA has
      the searches "all" and "task->task";
    * mrr, the mean of 1 / rank of the first relevant candidate, and mrr_at_10, where ranks above 10
      count as 0;
    * chance: the expected recall_at_k and mrr for candidates in random order.

    Queries without a relevant candidate in a search are excluded; "unanswerable" is their number.
    "queries" is the number of those that remain. Irrelevant candidates rank before relevant ones of
    equal dot product. The item of a query is not excluded from the candidates.

    Args:
        query: (Q, D) embeddings.
        candidate: (C, D) embeddings.
        relevance: the relevant candidates.
        device: where to search; None is the device of ``query``.

    Returns:
        The scores of "all", and "searches".

    Raises:
        ValueError: no query has a relevant candidate, or the numbers of rows differ from those of
            ``relevance``.
    """
    for name, rows, expected in (
        ("query", len(query), len(relevance.tasks)),
        ("candidate", len(candidate), len(relevance.corpora)),
    ):
        if rows != expected:
            raise ValueError(f"{name}: got {rows} rows, expected {expected}, as in relevance")

    def search(queries: Tensor, candidates: Tensor) -> _Search:
        return _search(query, candidate, relevance, queries, candidates, device)

    whole = search(torch.arange(len(query)), torch.arange(len(candidate)))
    searches = {"all": whole.scores()}
    if not len(whole.queries):
        raise ValueError("data: got no query with a relevant candidate, expected at least one")
    for number, name in enumerate(relevance.task_names):
        of_task = relevance.tasks == number
        if not of_task.any():
            continue
        if len(relevance.task_names) > 1:
            searches[f"{name}->all"] = whole.of(of_task).scores()
        if len(relevance.corpus_names) > 1 and name in relevance.corpus_names:
            of_corpus = relevance.corpora == list(relevance.corpus_names).index(name)
            found = search(of_task.nonzero()[:, 0], of_corpus.nonzero()[:, 0])
            searches[f"{name}->{name}"] = found.scores()
    top = {name: x for name, x in searches["all"].items() if isinstance(x, float)}
    return {**top, "searches": searches}


def _search(
    query: Tensor,
    candidate: Tensor,
    relevance: Relevance,
    queries: Tensor,
    candidates: Tensor,
    device: torch.device | str | None,
) -> _Search:
    """Search some queries (q,) int64 in some candidates (c,) int64."""
    column_of = torch.full((len(candidate),), -1)
    column_of[candidates] = torch.arange(len(candidates))
    rows, places = ranges(relevance.indptr[queries], relevance.indptr[queries + 1])
    columns = column_of[relevance.indices[places]]
    rows, columns = rows[columns >= 0], columns[columns >= 0]
    counts = torch.bincount(rows, minlength=len(queries))
    answerable = counts > 0
    counts, kept = counts[answerable], queries[answerable]
    rows = (answerable.cumsum(0) - 1)[rows]
    starts = [0, *counts.cumsum(0).tolist()]

    def relevant(first: int, last: int) -> tuple[Tensor, Tensor]:
        part = slice(starts[first], starts[last])
        return rows[part] - first, columns[part]

    results = (counts, counts.new_zeros(0, len(CUTOFFS)))
    if len(kept):
        results = found_in_first(query[kept], candidate[candidates], relevant, device)
    return _Search(kept, counts, *results, len(candidates), len(queries) - len(kept))


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
    batches: Iterable[Mapping[str, Tensor]],
    pairs: Any,
    amp: bool = False,
    stopped: Callable[[], object] = lambda: False,
) -> dict[str, Any] | None:
    """Return :func:`pair_scores` of a model, or None if ``stopped()`` becomes true.

    Args:
        model: a retrieval model.
        batches: batches of all items of ``pairs``, in order.
        pairs: a `mmfused.data.PairSet`.
        amp: compute under bfloat16 autocast.
        stopped: called before each batch.
    """
    has_text = [bool(text) for text in pairs.items.texts]
    embeddings = embed_pair_items(model, batches, has_text, amp, stopped)
    if embeddings is None:
        return None
    device = next(model.parameters()).device
    queries, candidates = torch.as_tensor(pairs.queries), torch.as_tensor(pairs.candidates)
    return pair_scores(embeddings[queries], embeddings[candidates], relevance_of(pairs), device)


def relevance_of(pairs: Any) -> Relevance:
    """Return the relevance of a `mmfused.data.PairSet`."""
    return Relevance(
        indptr=torch.as_tensor(pairs.positives.offsets),
        indices=torch.as_tensor(pairs.positives.values),
        tasks=torch.as_tensor(pairs.tasks),
        task_names=pairs.task_names,
        corpora=torch.as_tensor(pairs.corpora),
        corpus_names=pairs.corpus_names,
    )
