"""Scores of embeddings for retrieval: each query view against each candidate view."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from itertools import product
from typing import Any, TypeAlias

import torch
from torch import Tensor

from mmfused.models.retrieval import VIEWS, evaluating
from mmfused.training.metrics import scores

KS = (1, 5, 10)
# Queries that are compared at a time.
ROWS = 1024

Items: TypeAlias = dict[str, Tensor]


def rank_of_first(
    query: Tensor,
    candidate: Tensor,
    relevant: Callable[[int, int], Tensor],
) -> tuple[Tensor, Tensor]:
    """Return each query's rank of its best relevant candidate, and its nearest candidate's row.

    Both are (Q,) int64, by dot product; ranks count from 1, and irrelevant candidates of the same
    score rank before the relevant one.

    Args:
        query: (Q, D).
        candidate: (C, D).
        relevant: ``relevant(first, last)`` returns (last - first, C) int8 for these queries: 1
            relevant, 0 irrelevant, -1 excluded.

    Raises:
        ValueError: a query has no relevant candidate.
    """
    ranks: list[Tensor] = []
    nearest: list[Tensor] = []
    for first in range(0, len(query), ROWS):
        kind = relevant(first, min(first + ROWS, len(query)))
        if not (kind == 1).any(1).all():
            raise ValueError(
                "query: got a row without a relevant candidate, expected one for each row"
            )
        score = (query[first : first + ROWS] @ candidate.T).masked_fill(kind < 0, float("-inf"))
        best = score.masked_fill(kind != 1, float("-inf")).amax(1, keepdim=True)
        ranks.append(1 + ((score >= best) & (kind == 0)).sum(1))
        nearest.append(score.argmax(1))
    return torch.cat(ranks), torch.cat(nearest)


def ranking_scores(ranks: Tensor) -> dict[str, float]:
    """Return Recall@k and MRR from :func:`rank_of_first`.

    Recall@k is the share of queries with a relevant candidate among the first k, MRR the mean of
    1 / rank.
    """
    recalls = {f"recall_at_{k}": float((ranks <= k).double().mean()) for k in KS}
    return {**recalls, "mrr": float((1 / ranks.double()).mean())}


def chance(relevant: int, candidates: int) -> dict[str, float]:
    """Return the expected :func:`ranking_scores` for candidates in random order."""
    ways = math.comb(candidates, relevant)
    # The first relevant one is at place j if the other relevant ones are all behind it.
    first = [
        math.comb(candidates - j, relevant - 1) / ways for j in range(1, candidates - relevant + 2)
    ]
    recalls = {f"recall_at_{k}": sum(first[:k]) for k in KS}
    return {**recalls, "mrr": sum(share / j for j, share in enumerate(first, 1))}


@torch.no_grad()
def embed_items(
    model: Any,
    batches: Iterable[Items],
    views: tuple[str, ...] = VIEWS,
    amp: bool = False,
    stopped: Callable[[], object] = lambda: False,
) -> Items | None:
    """Return embeddings of all items on the CPU, in evaluation mode.

    Args:
        model: a retrieval model.
        batches: at least one.
        views: the views to embed.
        amp: compute under bfloat16 autocast.
        stopped: called before each batch; once it is true, None is returned.

    Returns:
        For each view (N, D) float32, `labels` (N,), `has_image` and `has_text` (N,) bool.

    Raises:
        RuntimeError: an embedding is not finite.
    """
    device = next(model.parameters()).device
    parts: list[Items] = []
    with evaluating(model):
        for batch in batches:
            if stopped():
                return None
            items = {name: value for name, value in batch.items() if name != "labels"}
            items = {name: x.to(device, non_blocking=True) for name, x in items.items()}
            with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                embedded = model.embed(views=views, **items)
            part = {name: value.float().cpu() for name, value in embedded.items()}
            part["labels"] = batch["labels"]
            part["has_image"] = batch["image_present"]
            part["has_text"] = batch["attention_mask"].sum(1) > 2
            parts.append(part)
    embeddings = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    for view in views:
        if not embeddings[view].isfinite().all():
            raise RuntimeError(
                f"the embeddings of view {view!r} are not all finite: "
                "the weights give numbers that are not"
            )
    return embeddings


def _has_view(items: Items, view: str) -> Tensor:
    """(N,) bool: the items that have what a view shows; "both" takes items with either."""
    image = items["has_image"]
    text = items["has_text"]
    return {"image": image, "text": text, "both": image | text}[view]


def retrieval_scores(
    queries: Items,
    candidates: Items | None = None,
) -> dict[str, dict[str, Any]]:
    """Return the scores of each pair of views, named "image->both" and so on.

    A pair has :func:`ranking_scores`, their ``chance``, and accuracy and macro F1 of the nearest
    candidate's label. Items without a view's modality, and queries without a relevant candidate,
    are excluded from a pair; ``queries`` and ``unanswerable`` count them.

    Args:
        queries: from :func:`embed_items`.
        candidates: likewise; None takes the queries, and excludes each item from its own search.
    """
    return {
        f"{query_view}->{candidate_view}": _pair_scores(
            queries, candidates, query_view, candidate_view
        )
        for query_view, candidate_view in product(VIEWS, VIEWS)
    }


def _pair_scores(
    queries: Items,
    candidates: Items | None,
    query_view: str,
    candidate_view: str,
) -> dict[str, Any]:
    alone = candidates is None
    candidates = queries if candidates is None else candidates
    rows = _has_view(queries, query_view).nonzero()[:, 0]
    columns = _has_view(candidates, candidate_view).nonzero()[:, 0]
    labels = queries["labels"][rows]
    candidate_labels = candidates["labels"][columns]
    kind = (labels[:, None] == candidate_labels).to(torch.int8)
    if alone:
        kind = kind.masked_fill(rows[:, None] == columns, -1)
    answerable = (kind == 1).any(1)
    rows, labels, kind = rows[answerable], labels[answerable], kind[answerable]
    pair: dict[str, Any] = {
        "queries": len(rows),
        "candidates": len(columns),
        "unanswerable": int((~answerable).sum()),
    }
    if len(rows):
        query = queries[query_view][rows]
        candidate = candidates[candidate_view][columns]
        ranks, nearest = rank_of_first(query, candidate, lambda first, last: kind[first:last])
        named = scores(candidate_labels[nearest], labels)
        pair |= ranking_scores(ranks)
        pair |= {"accuracy": named["accuracy"], "macro_f1": named["macro_f1"]}
        pair["chance"] = _mean_chance((kind == 1).sum(1), (kind >= 0).sum(1))
    return pair


def _mean_chance(relevant: Tensor, candidates: Tensor) -> dict[str, float]:
    """Average :func:`chance` over queries with these numbers of candidates, (Q,) each."""
    cases, counts = torch.stack([relevant, candidates]).unique(dim=1, return_counts=True)
    each = [chance(*case) for case in cases.T.tolist()]
    share = (counts / counts.sum()).tolist()
    return {
        name: sum(w * one[name] for w, one in zip(share, each, strict=True)) for name in each[0]
    }


def mean_scores(pairs: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Return the mean of each score over the pairs that have scores."""
    measured = [pair for pair in pairs.values() if "mrr" in pair]
    if not measured:
        raise ValueError("data: got no query with a candidate of its label, expected at least one")
    names = [*(f"recall_at_{k}" for k in KS), "mrr", "accuracy", "macro_f1"]
    return {name: sum(pair[name] for pair in measured) / len(measured) for name in names}
