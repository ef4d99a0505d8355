"""Scores of explicit relevant candidates against sorting in float64, and embeddings of items."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mmfused.training import search
from mmfused.training.pair_metrics import (
    Relevance,
    embed_pair_items,
    evaluate_pairs,
    pair_scores,
)

TASKS, CORPORA = ("text", "mm", "other", "unused"), ("mm", "text", "spare")


def random_case(queries, candidates, seed):
    draw = random.Random(seed)
    positives = [
        draw.sample(range(candidates), draw.choice([0, 1, 1, 2, 5])) for _ in range(queries)
    ]
    tasks = [draw.randrange(3) for _ in range(queries)]
    corpora = [draw.randrange(3) for _ in range(candidates)]
    return positives, tasks, corpora


def make_relevance(positives, tasks, corpora, task_names=TASKS, corpus_names=CORPORA):
    sizes = torch.tensor([0, *map(len, positives)])
    return Relevance(
        sizes.cumsum(0),
        torch.tensor([j for found in positives for j in found]),
        torch.tensor(tasks),
        task_names,
        torch.tensor(corpora),
        corpus_names,
    )


def by_sorting(scores, positives, queries, candidates):
    """Return the scores of a search in some candidates, as the issue's definitions say."""
    results = []
    for i in queries:
        wanted = [j for j in positives[i] if j in candidates]
        order = sorted(candidates, key=lambda j: (-scores[i][j], j in wanted, j))
        if wanted:
            results.append([j in wanted for j in order])
    expected = {
        "queries": len(results),
        "candidates": len(candidates),
        "unanswerable": len(queries) - len(results),
    }
    if not results:
        return expected

    def mean(values):
        return sum(values) / len(results)

    ranks = [1 + hits.index(True) for hits in results]
    for k in (1, 5, 10):
        expected[f"recall_at_{k}"] = mean(rank <= k for rank in ranks)
    for k in (1, 5, 10, 20, 50, 100):
        expected[f"true_recall_at_{k}"] = mean(sum(hits[:k]) / sum(hits) for hits in results)
    expected["mrr"] = mean(1 / rank for rank in ranks)
    expected["mrr_at_10"] = mean((rank <= 10) / rank for rank in ranks)
    expected["chance"] = mean(sum(hits) / len(hits) for hits in results)
    return expected


@pytest.mark.parametrize("seed", range(3))
def test_scores_equal_sorting(seed, monkeypatch):
    monkeypatch.setattr(search, "SCORES", 400)
    positives, tasks, corpora = random_case(47, 131, seed)
    query, candidate = (torch.randint(-3, 4, (rows, 3)).float() for rows in (47, 131))
    found = pair_scores(query, candidate, make_relevance(positives, tasks, corpora))
    scores = (query.double() @ candidate.double().T).tolist()

    def of(numbers, number):
        return [i for i, other in enumerate(numbers) if other == number]

    everything = range(131)
    expected = {"all": (range(47), everything)}
    expected |= {
        "text->all": (of(tasks, 0), everything),
        "text->text": (of(tasks, 0), of(corpora, 1)),
    }
    expected |= {"mm->all": (of(tasks, 1), everything), "mm->mm": (of(tasks, 1), of(corpora, 0))}
    expected |= {"other->all": (of(tasks, 2), everything)}
    assert list(found["searches"]) == list(expected)
    for name, chosen in expected.items():
        got = found["searches"][name]
        got["chance"] = got["chance"]["recall_at_1"]
        assert got == pytest.approx(by_sorting(scores, positives, *chosen)), name
    whole = found["searches"]["all"]
    assert found == {name: whole[name] for name in found if name != "searches"} | {
        "searches": found["searches"]
    }
    assert found["recall_at_5"] != found["true_recall_at_5"]


def test_one_corpus_or_task_has_no_searches_of_its_own():
    relevance = make_relevance([[0], [1]], [0, 0], [0, 0], ("all pairs",), ("all pairs",))
    assert list(pair_scores(torch.eye(2), torch.eye(2), relevance)["searches"]) == ["all"]


def test_a_task_whose_corpus_has_none_of_its_candidates_is_unanswerable():
    relevance = make_relevance([[0], [1]], [0, 1], [1, 1])
    found = pair_scores(torch.eye(2), torch.eye(2), relevance)["searches"]
    assert found["mm->mm"] == {"queries": 0, "candidates": 0, "unanswerable": 1}
    with pytest.raises(ValueError, match="data: got no query with a relevant candidate"):
        pair_scores(torch.eye(2), torch.eye(2), make_relevance([[], []], [0, 1], [1, 1]))


WRONG = {
    "indptr: got numbers that fall": {"indptr": [0, 2, 1]},
    "indptr: got 2 at the end, expected 1": {"indptr": [0, 1, 2]},
    "tasks: got 1 tasks, expected 2": {"tasks": [0]},
    "tasks: got 0 to 4, expected numbers from 0 to 3": {"tasks": [0, 4]},
    "indices: got 3 to 3, expected numbers from 0 to 2": {"indices": [3]},
    "corpora: got -1 to 0, expected": {"corpora": [-1, 0, 0]},
    "indices: got a candidate twice": {"indptr": [0, 0, 2], "indices": [2, 2]},
}


@pytest.mark.parametrize("message", WRONG)
def test_tensors_that_do_not_fit_together_are_refused(message):
    fields = {"indptr": [0, 1, 1], "indices": [2], "tasks": [0, 0], "corpora": [0, 0, 0]}
    tensors = {name: torch.tensor(x) for name, x in {**fields, **WRONG[message]}.items()}
    with pytest.raises(ValueError, match=message):
        Relevance(**tensors, task_names=TASKS, corpus_names=CORPORA)


def test_embeddings_of_another_number_of_rows_are_refused():
    relevance = make_relevance([[0], [1]], [0, 0], [0, 0, 0])
    with pytest.raises(ValueError, match="query: got 3 rows, expected 2"):
        pair_scores(torch.eye(3), torch.eye(3), relevance)
    with pytest.raises(ValueError, match="candidate: got 2 rows, expected 3"):
        pair_scores(torch.eye(2), torch.eye(2), relevance)


class Model(torch.nn.Linear):
    """A model whose embeddings are the view, the picture and the text."""

    def embed(self, views, pixel_values, input_ids, image_present):
        (view,) = views
        number = torch.full_like(pixel_values, VIEWS.index(view))
        return {view: torch.stack([number, pixel_values, input_ids.double()], 1)}


VIEWS = ("image", "text", "both")
HAS_IMAGE, HAS_TEXT = [True, False, True, False, True], [True, True, False, False, True]
ITEMS = {
    "pixel_values": torch.arange(5.0).double(),
    "input_ids": torch.arange(5) + 10,
    "image_present": torch.tensor(HAS_IMAGE),
    "labels": torch.zeros(5),
}
EMBEDDED = [[2.0, 0, 10], [1, 1, 11], [0, 2, 12], [2, 3, 13], [2, 4, 14]]


def batches(size):
    return [{name: x[i : i + size] for name, x in ITEMS.items()} for i in range(0, 5, size)]


@pytest.mark.parametrize("size", [1, 2, 5])
def test_each_item_is_embedded_in_the_view_that_it_has(size):
    found = embed_pair_items(Model(1, 1), batches(size), HAS_TEXT)
    assert found.tolist() == EMBEDDED and found.dtype == torch.float32


def test_sequences_go_through_embed_sequences():
    def embed_sequences(input_ids, code):
        return input_ids.double() / code[:, None]

    model = torch.nn.Linear(1, 1)
    model.embed_sequences = embed_sequences
    batch = {"input_ids": torch.tensor([[6.0], [8.0]]), "code": torch.tensor([3, 2])}
    found = embed_pair_items(model, [{**batch, "labels": torch.zeros(2)}], [True, False])
    assert found.tolist() == [[2.0], [4.0]] and found.dtype == torch.float32
    batch["input_ids"][0] = torch.inf
    with pytest.raises(RuntimeError, match="the embeddings are not all finite"):
        embed_pair_items(model, [batch], [True, False])
    assert embed_pair_items(model, [batch], [True, False], stopped=lambda: True) is None


def test_evaluation_of_a_pair_set():
    pairs = SimpleNamespace(
        items=SimpleNamespace(texts=["text" * has for has in HAS_TEXT]),
        queries=np.array([2, 4]),
        candidates=np.array([1, 0, 3]),
        positives=SimpleNamespace(values=np.array([1, 0, 2]), offsets=np.array([0, 1, 3])),
        tasks=np.array([0, 0]),
        task_names=["one"],
        corpora=np.array([0, 0, 0]),
        corpus_names=["one"],
    )
    sides = (torch.tensor([EMBEDDED[i] for i in rows]).float() for rows in ([2, 4], [1, 0, 3]))
    relevance = make_relevance([[1], [0, 2]], [0, 0], [0, 0, 0], ["one"], ["one"])
    found = evaluate_pairs(Model(1, 1), batches(2), pairs)
    assert found == pair_scores(*sides, relevance) and found["mrr"] < 1
    assert evaluate_pairs(Model(1, 1), batches(2), pairs, stopped=lambda: True) is None
