"""Retrieval scores of embeddings, for each pair of a query view and a candidate view."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from itertools import product
from typing import Any, TypeAlias

import torch
from torch import Tensor

from mmfused.models.retrieval import VIEWS, evaluating
from mmfused.training.metrics import scores
from mmfused.training.search import SameLabel, rank_of_first

KS = (1, 5, 10)

Items: TypeAlias = dict[str, Tensor]


def ranking_scores(ranks: Tensor) -> dict[str, float]:
    """Return Recall@k and MRR of the ranks from :func:`~mmfused.training.search.rank_of_first`.

    Recall@k is the fraction of queries with a relevant candidate among the first k, and MRR is the
    mean of 1 / rank.

    Args:
        ranks: (Q,) int64, counted from 1.

    Returns:
        "recall_at_1", "recall_at_5", "recall_at_10" and "mrr", from 0 to 1.

    Examples:
        >>> import torch
        >>> from mmfused.training.retrieval_metrics import ranking_scores
        >>> ranking_scores(torch.tensor([1, 2, 4, 20]))
        {'recall_at_1': 0.25, 'recall_at_5': 0.75, 'recall_at_10': 0.75, 'mrr': 0.45}
    """
    recalls = {f"recall_at_{k}": float((ranks <= k).double().mean()) for k in KS}
    return {**recalls, "mrr": float((1 / ranks.double()).mean())}


def chance(relevant: int, candidates: int) -> dict[str, float]:
    """Return the expected :func:`ranking_scores` of one query, for candidates in random order.

    Args:
        relevant: number of relevant candidates.
        candidates: number of all candidates.

    Examples:
        >>> from mmfused.training.retrieval_metrics import chance
        >>> chance(relevant=1, candidates=100)["recall_at_5"]
        0.05
    """
    recalls: dict[str, float] = {}
    for k in KS:
        ways = math.comb(candidates, k)
        # With fewer candidates than k, one of them is relevant in any case.
        missed = math.comb(candidates - relevant, k)
        recalls[f"recall_at_{k}"] = (ways - missed) / ways if ways else 1.0
    places = torch.arange(1, candidates - relevant + 2, dtype=torch.float64)
    left = candidates + 1 - places  # number of candidates that are not ranked better
    # The probability that all better places have irrelevant candidates.
    irrelevant = torch.cat([places.new_ones(1), (1 - relevant / left).cumprod(0)[:-1]])
    return {**recalls, "mrr": float((irrelevant * relevant / left / places).sum())}


@torch.no_grad()
def embed_items(
    model: Any,
    batches: Iterable[Items],
    views: tuple[str, ...] = VIEWS,
    amp: bool = False,
    stopped: Callable[[], object] = lambda: False,
) -> Items | None:
    """Embed all items in evaluation mode.

    Args:
        model: a retrieval model.
        batches: at least one batch.
        views: the views to embed.
        amp: compute under bfloat16 autocast.
        stopped: called before each batch; if it returns true, `embed_items` returns None.

    Returns:
        A dict of CPU tensors: (N, D) float32 embeddings for each view, (N,) ``labels``, and
        ``has_image`` and ``has_text``, (N,) bool.

    Raises:
        RuntimeError: an embedding is not finite.

    Examples:
        >>> from mmfused.data import Batches, Collate, GeneratedProducts, train_tokenizer
        >>> from mmfused.models import UniECS, UniECSConfig
        >>> from mmfused.training.retrieval_metrics import embed_items
        >>> products = GeneratedProducts(size=10, image_size=64)
        >>> tokenizer = train_tokenizer(products.texts)
        >>> model = UniECS(UniECSConfig.preset("tiny", vocab_size=len(tokenizer)))
        >>> collate = Collate(tokenizer, image_size=64, max_length=16)
        >>> batches = Batches(products, collate, batch_size=4, shuffle=False, drop_last=False)
        >>> embeddings = embed_items(model, batches, views=("image", "both"))
        >>> embeddings["both"].shape
        torch.Size([10, 128])
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
            for view in views:
                check_finite(part[view], f"the embeddings of view {view!r}")
            part["labels"] = batch["labels"]
            part["has_image"] = batch["image_present"]
            part["has_text"] = batch["attention_mask"].sum(1) > 2
            parts.append(part)
    # The parts of a view are released before the next view is joined.
    return {name: torch.cat([part.pop(name) for part in parts]) for name in list(parts[0])}


def check_finite(embeddings: Tensor, name: str) -> None:
    """Raise RuntimeError unless all embeddings are finite."""
    if not embeddings.isfinite().all():
        raise RuntimeError(f"{name} are not all finite; the weights may have diverged")


def _has_view(items: Items, view: str) -> Tensor:
    """Return an (N,) bool mask of the items that have an input of ``view``."""
    image = items["has_image"]
    text = items["has_text"]
    return {"image": image, "text": text, "both": image | text}[view]


def retrieval_scores(
    queries: Items,
    candidates: Items | None = None,
    device: torch.device | str | None = None,
) -> dict[str, dict[str, Any]]:
    """Return the scores of each pair of views, by names such as "image->both".

    A candidate is relevant if it has the label of the query. The scores of a pair are
    :func:`ranking_scores`, and the accuracy and macro F1 of predicting the label of the nearest
    candidate. "chance" has the expected :func:`ranking_scores` for candidates in random order.

    Items that lack the input of a view are excluded from the pairs with this view. Queries without
    a relevant candidate are also excluded; "unanswerable" is their number. "queries" and
    "candidates" are the numbers of items that remain. A pair without queries has no scores.

    Args:
        queries: from :func:`embed_items`; views that it lacks have no pairs.
        candidates: from :func:`embed_items`; if None, each query searches the other queries.
        device: where to search; None is the device of the embeddings.
    """
    pairs = product(
        [view for view in VIEWS if view in queries],
        [view for view in VIEWS if view in (queries if candidates is None else candidates)],
    )
    return {
        f"{query_view}->{candidate_view}": _pair_scores(
            queries, candidates, query_view, candidate_view, device
        )
        for query_view, candidate_view in pairs
    }


def _pair_scores(
    queries: Items,
    candidates: Items | None,
    query_view: str,
    candidate_view: str,
    device: torch.device | str | None,
) -> dict[str, Any]:
    search_queries = candidates is None
    candidates = queries if candidates is None else candidates
    rows = _has_view(queries, query_view).nonzero()[:, 0]
    columns = _has_view(candidates, candidate_view).nonzero()[:, 0]
    candidate_labels = candidates["labels"][columns]
    # The column of each query itself, which it does not search; -1 if it is none of the columns.
    own = torch.full((len(queries["labels"]),), -1)
    if search_queries:
        own[columns] = torch.arange(len(columns))
    relevant = SameLabel(queries["labels"][rows], candidate_labels, own[rows])
    answerable = relevant.counts > 0
    rows, relevant = rows[answerable], relevant.select(answerable)
    pair: dict[str, Any] = {
        "queries": len(rows),
        "candidates": len(columns),
        "unanswerable": int((~answerable).sum()),
    }
    if len(rows):
        query = queries[query_view][rows]
        candidate = candidates[candidate_view][columns]
        ranks, nearest = rank_of_first(query, candidate, relevant, relevant.own, device)
        label_scores = scores(candidate_labels[nearest], relevant.labels)
        pair |= ranking_scores(ranks)
        pair |= {"accuracy": label_scores["accuracy"], "macro_f1": label_scores["macro_f1"]}
        pair["chance"] = mean_chance(relevant.counts, len(columns) - (relevant.own >= 0).long())
    return pair


def mean_chance(relevant: Tensor, candidates: Tensor) -> dict[str, float]:
    """Return the mean of :func:`chance` over queries.

    Args:
        relevant: (Q,) number of relevant candidates of each query.
        candidates: (Q,) number of all candidates of each query.
    """
    numbers, counts = torch.stack([relevant, candidates]).unique(dim=1, return_counts=True)
    chances = [chance(*pair) for pair in numbers.T.tolist()]
    shares = (counts / counts.sum()).tolist()
    return {
        name: sum(share * expected[name] for share, expected in zip(shares, chances, strict=True))
        for name in chances[0]
    }


def mean_scores(pairs: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Return the mean of each score over the pairs that have scores.

    Raises:
        ValueError: no pair has scores.
    """
    measured = [pair for pair in pairs.values() if "mrr" in pair]
    if not measured:
        raise ValueError(
            "data: got no query with a candidate of the same label, expected at least one"
        )
    names = [*(f"recall_at_{k}" for k in KS), "mrr", "accuracy", "macro_f1"]
    return {name: sum(pair[name] for pair in measured) / len(measured) for name in names}
