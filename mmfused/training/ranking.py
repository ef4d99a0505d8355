"""How good embeddings are for retrieval: every query view against every candidate view of a
labelled collection.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from itertools import product

import torch
from torch import Tensor

from mmfused.models.retrieval import VIEWS, evaluating
from mmfused.training.metrics import scores

KS = (1, 5, 10)
ROWS = 1024  # queries compared at a time


def rank_of_first(
    query: Tensor,
    candidate: Tensor,
    relevant: Callable[[int, int], Tensor],
) -> tuple[Tensor, Tensor]:
    """(rank from 1 of each query's best relevant candidate, the nearest candidate's row), (Q,)
    int64 each, by dot product.

    ``relevant(first, last)``: (rows, C) int8 for those queries: 1 relevant, 0 not, -1 leave out.
    Irrelevant candidates that score the same rank before. Raises ValueError where a query has no
    relevant candidate."""
    ranks, nearest = [], []
    for first in range(0, len(query), ROWS):
        kind = relevant(first, min(first + ROWS, len(query)))
        if not (kind == 1).any(1).all():
            raise ValueError("query takes rows that have a relevant candidate each")
        score = (query[first : first + ROWS] @ candidate.T).masked_fill(kind < 0, float("-inf"))
        best = score.masked_fill(kind != 1, float("-inf")).amax(1, keepdim=True)
        ranks.append(1 + ((score >= best) & (kind == 0)).sum(1))
        nearest.append(score.argmax(1))
    return torch.cat(ranks), torch.cat(nearest)


def ranking_scores(ranks: Tensor) -> dict[str, float]:
    """Recall@k, the share of queries with a relevant candidate among the first k, and MRR, the mean
    of 1 / rank of the first.
    """
    recalls = {f"recall_at_{k}": float((ranks <= k).double().mean()) for k in KS}
    return {**recalls, "mrr": float((1 / ranks.double()).mean())}


def chance(relevant: int, candidates: int) -> dict[str, float]:
    """What :func:`ranking_scores` gives in the mean where the order of the candidates is random."""
    ways = math.comb(candidates, relevant)
    # The first relevant one is at place j where the other relevant ones are all behind it.
    first = [
        math.comb(candidates - j, relevant - 1) / ways for j in range(1, candidates - relevant + 2)
    ]
    recalls = {f"recall_at_{k}": sum(first[:k]) for k in KS}
    return {**recalls, "mrr": sum(share / j for j, share in enumerate(first, 1))}


@torch.no_grad()
def embed_items(
    model,
    batches: Iterable[dict],
    views=VIEWS,
    amp: bool = False,
    stopped: Callable[[], object] = lambda: False,
):
    """``{view: (N, D) float32}`` on the CPU, `labels` (N,) and `has_image`, `has_text` (N,) bool;
    None as soon as ``stopped()``.
    """
    device = next(model.parameters()).device
    parts: list[dict[str, Tensor]] = []
    with evaluating(model):
        for batch in batches:
            if stopped():
                return None
            items = {
                name: value.to(device, non_blocking=True)
                for name, value in batch.items()
                if name != "labels"
            }
            with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                embedded = model.embed(views=views, **items)
            has = {
                "has_image": batch["image_present"],
                "has_text": batch["attention_mask"].sum(1) > 2,
            }
            parts.append(
                {name: value.float().cpu() for name, value in embedded.items()}
                | {"labels": batch["labels"], **has}
            )
    embeddings = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    for view in views:
        if not embeddings[view].isfinite().all():
            raise RuntimeError(
                f"the embeddings of view {view!r} are not all finite: the weights give numbers that are not"
            )
    return embeddings


def has_view(items: dict[str, Tensor], view: str) -> Tensor:
    """(N,) bool: the items that hold what a view shows; "both" takes items with either."""
    image, text = items["has_image"], items["has_text"]
    return {"image": image, "text": text, "both": image | text}[view]


def retrieval_scores(
    queries: dict[str, Tensor], candidates: dict[str, Tensor] | None = None
) -> dict[str, dict]:
    """For each pair "image->both" and so on: :func:`ranking_scores`, chance, accuracy and macro F1
    of the nearest one's label.

    Both from :func:`embed_items`; without ``candidates`` queries look among each other, and no item
    finds itself. Items without a view's modality, and queries that nobody can answer, are left out
    of a pair and counted: ``queries``, ``unanswerable``."""
    alone = candidates is None
    candidates = queries if alone else candidates
    result = {}
    for query_view, candidate_view in product(VIEWS, VIEWS):
        asks, offered = (
            has_view(queries, query_view).nonzero()[:, 0],
            has_view(candidates, candidate_view).nonzero()[:, 0],
        )
        labels, theirs = queries["labels"][asks], candidates["labels"][offered]
        itself = (
            asks[:, None] == offered
            if alone
            else torch.zeros(len(asks), len(offered), dtype=torch.bool)
        )
        kind = (labels[:, None] == theirs).to(torch.int8).masked_fill(itself, -1)
        answerable = (kind == 1).any(1)
        asks, labels, kind = asks[answerable], labels[answerable], kind[answerable]
        pair = {
            "queries": len(asks),
            "candidates": len(offered),
            "unanswerable": int((~answerable).sum()),
        }
        if len(asks):
            embedded = queries[query_view][asks], candidates[candidate_view][offered]
            ranks, nearest = rank_of_first(
                *embedded, lambda first, last, kind=kind: kind[first:last]
            )
            named = scores(theirs[nearest], labels)
            pair |= {
                **ranking_scores(ranks),
                "accuracy": named["accuracy"],
                "macro_f1": named["macro_f1"],
            }
            pair["chance"] = mean_chance((kind == 1).sum(1), (kind >= 0).sum(1))
        result[f"{query_view}->{candidate_view}"] = pair
    return result


def mean_chance(relevant: Tensor, candidates: Tensor) -> dict[str, float]:
    cases, counts = torch.stack([relevant, candidates]).unique(dim=1, return_counts=True)
    each = [chance(*case) for case in cases.T.tolist()]
    share = (counts / counts.sum()).tolist()
    return {
        name: sum(w * one[name] for w, one in zip(share, each, strict=True)) for name in each[0]
    }


def mean_scores(pairs: dict[str, dict]) -> dict[str, float]:
    """The mean of each score over the pairs that have it."""
    measured = [pair for pair in pairs.values() if "mrr" in pair]
    if not measured:
        raise ValueError("data takes queries that have a candidate of their label; got none")
    names = [*(f"recall_at_{k}" for k in KS), "mrr", "accuracy", "macro_f1"]
    return {name: sum(pair[name] for pair in measured) / len(measured) for name in names}
