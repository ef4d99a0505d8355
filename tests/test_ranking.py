"""Retrieval scores against explicit sorting, and chance levels against many random orders."""

import math
import random
from fractions import Fraction

import pytest
import torch

from mmfused.training.retrieval_metrics import (
    chance,
    mean_scores,
    ranking_scores,
    retrieval_scores,
)
from mmfused.training.search import rank_of_first


def ranks_by_sorting(query, candidate, labels, candidate_labels, within_queries):
    ranks, nearest = [], []
    for i, q in enumerate(query.tolist()):
        found = []
        for j, c in enumerate(candidate.tolist()):
            if not (within_queries and i == j):
                found.append(
                    (
                        -sum(a * b for a, b in zip(q, c, strict=True)),
                        labels[i] == candidate_labels[j],
                        j,
                    )
                )
        found.sort()  # among equal scores, irrelevant candidates come first
        ranks.append(
            next((place for place, (_, relevant, _) in enumerate(found, 1) if relevant), None)
        )
        nearest.append(candidate_labels[found[0][2]])
    return ranks, nearest


@pytest.mark.parametrize("within_queries", [False, True])
def test_scores_equal_ranks_by_sorting(within_queries, monkeypatch):
    monkeypatch.setattr("mmfused.training.search.SCORES", 40)
    n, c, labels = 11, 7, [0, 1, 2, 0, 1, 2, 3, 3, 4, 0, 5]
    queries = items(n, labels)
    candidate_labels = labels if within_queries else [0, 1, 2, 3, 0, 6, 2]
    candidates = queries if within_queries else items(c, candidate_labels)
    pairs = retrieval_scores(queries, None if within_queries else candidates)
    assert len(pairs) == 9
    for name, pair in pairs.items():
        query, candidate = (
            side[view] for side, view in zip((queries, candidates), name.split("->"), strict=True)
        )
        ranks, nearest = ranks_by_sorting(
            query, candidate, labels, candidate_labels, within_queries
        )
        kept = [rank for rank in ranks if rank is not None]
        assert pair["queries"] == len(kept) and pair["unanswerable"] == ranks.count(None) > 0
        for k in (1, 5, 10):
            assert pair[f"recall_at_{k}"] == pytest.approx(
                sum(rank <= k for rank in kept) / len(kept)
            )
        assert pair["mrr"] == pytest.approx(sum(1 / rank for rank in kept) / len(kept))
        right = sum(
            label == near
            for label, near, rank in zip(labels, nearest, ranks, strict=True)
            if rank is not None
        )
        assert pair["accuracy"] == pytest.approx(right / len(kept))
    means = mean_scores(pairs)
    assert means["mrr"] == pytest.approx(sum(pair["mrr"] for pair in pairs.values()) / 9)


def items(count, labels):
    views = {view: torch.randn(count, 3).round(decimals=1) for view in ("image", "text", "both")}
    present = torch.ones(count, dtype=torch.bool)
    return {**views, "labels": torch.tensor(labels), "has_image": present, "has_text": present}


def test_items_without_a_view_are_left_out_and_counted():
    queries, products = items(6, [0, 1, 2, 0, 1, 2]), items(3, [0, 1, 2])
    queries["has_text"] = torch.tensor([True, False, True, True, True, False])
    products["has_image"] = torch.tensor([True, True, False])
    pairs = retrieval_scores(queries, products)
    assert [pairs[f"text->{view}"]["queries"] for view in ("text", "both", "image")] == [4, 4, 3]
    assert pairs["image->image"]["unanswerable"] == 2 and pairs["image->image"]["candidates"] == 2
    assert pairs["both->text"]["queries"] == 6
    products["has_image"] = torch.zeros(3, dtype=torch.bool)
    pairs = retrieval_scores(queries, products)
    assert "mrr" not in pairs["text->image"] and pairs["text->image"]["unanswerable"] == 4
    assert mean_scores(pairs)["mrr"] > 0


def test_ties_count_against_the_relevant_candidate():
    query, one, none = torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64), torch.zeros(0).long()
    ranks, _ = rank_of_first(query, torch.randn(4, 2), lambda *_: (one, one), torch.tensor([3]))
    assert ranks.tolist() == [3]
    with pytest.raises(ValueError, match="query: got a row without a relevant candidate"):
        rank_of_first(query, torch.randn(2, 2), lambda *_: (none, none))


def exact_chance(relevant, candidates):
    """Return the chance as fractions, from the number of ways to place the relevant candidates."""
    ways = math.comb(candidates, relevant)
    first_at = [
        Fraction(math.comb(candidates - j, relevant - 1), ways) for j in range(1, candidates + 1)
    ]
    recalls = {f"recall_at_{k}": sum(first_at[:k]) for k in (1, 5, 10)}
    return {**recalls, "mrr": sum(p / j for j, p in enumerate(first_at, 1))}


@pytest.mark.parametrize(("relevant", "candidates"), [(1, 3), (2, 9), (7, 7), (90, 500), (1, 1)])
def test_chance_equals_exact_fractions(relevant, candidates):
    expected = {name: float(x) for name, x in exact_chance(relevant, candidates).items()}
    assert chance(relevant, candidates) == pytest.approx(expected, rel=1e-12)


def test_chance_of_many_relevant_candidates_is_fast():
    # The number of ways to place them has 15 051 digits.
    assert chance(5000, 50_000)["recall_at_1"] == 0.1
    assert chance(5000, 50_000)["mrr"] == pytest.approx(-0.1 * math.log(0.1) / 0.9, rel=1e-3)


@pytest.mark.parametrize(("relevant", "candidates"), [(1, 9), (3, 12), (12, 12), (1, 81)])
def test_chance_is_the_mean_over_random_orders(relevant, candidates):
    expected, draw = chance(relevant, candidates), random.Random(0)
    places = [min(draw.sample(range(1, candidates + 1), relevant)) for _ in range(20000)]
    for name, value in ranking_scores(torch.tensor(places)).items():
        assert expected[name] == pytest.approx(value, abs=0.015)
