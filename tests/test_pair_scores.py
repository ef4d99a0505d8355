"""Scores of explicit relevant candidates against sorting in float64, and embeddings of items."""

import random
from itertools import accumulate
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mmfused.data.ragged import Ragged
from mmfused.training import search
from mmfused.training.pair_metrics import (
    Pairs,
    embed_pair_items,
    evaluate_pairs,
    pair_scores,
)

TASKS, CORPORA = ("text", "mm", "other", "unused"), ("mm", "text", "spare")


def random_case(seed, queries=47, items=131, candidates=150):
    """Return pairs of random items; some candidates are in two corpora, some positives in none."""
    draw = random.Random(seed)
    found = [draw.sample(range(items), draw.choice([0, 1, 1, 2, 5])) for _ in range(queries)]
    return make_pairs(
        found,
        [draw.randrange(3) for _ in range(queries)],
        [draw.randrange(3) for _ in range(candidates)],
        queries=[draw.randrange(items) for _ in range(queries)],
        candidates=[draw.randrange(items) for _ in range(candidates)],
    )


def make_pairs(positives, tasks, corpora, task_names=TASKS, corpus_names=CORPORA, **items):
    """Return pairs; by default, the queries and the candidates are the first items."""
    numbers = {
        "queries": range(len(tasks)),
        "positives_indptr": [0, *accumulate(map(len, positives))],
        "positives_indices": [j for found in positives for j in found],
        "tasks": tasks,
        "candidates": range(len(corpora)),
        "corpora": corpora,
    }
    tensors = {name: torch.tensor(list(x)).long() for name, x in {**numbers, **items}.items()}
    return Pairs(**tensors, task_names=task_names, corpus_names=corpus_names)


def by_sorting(scores, positives, items, queries, candidates):
    """Return the scores of a search in some candidates, by their definitions."""
    results = []
    for i in queries:
        wanted = [j for j in positives[i] if j in candidates]
        searched = [j for j in candidates if j != items[i] or j in wanted]
        order = sorted(searched, key=lambda j: (-scores[i][j], j in wanted, j))
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
    pairs, embeddings = random_case(seed), torch.randint(-3, 4, (131, 3)).float()
    found = pair_scores(embeddings, pairs)
    embeddings = embeddings.double()
    scores = (embeddings[pairs.queries] @ embeddings.T).tolist()
    splits = pairs.positives_indptr.diff().tolist()
    items = pairs.queries.tolist()
    positives = [x.tolist() for x in pairs.positives_indices.split(splits)]

    def queries(task):
        return [i for i, number in enumerate(pairs.tasks) if number == task]

    def candidates(*corpora):
        numbers = zip(pairs.candidates.tolist(), pairs.corpora, strict=True)
        return {item for item, corpus in numbers if corpus in corpora}

    expected = {"all": (range(47), candidates(0, 1, 2))}
    expected |= {"text->all": (queries(0), candidates(0, 1, 2))}
    expected |= {"text->text": (queries(0), candidates(1))}
    expected |= {"mm->all": (queries(1), candidates(0, 1, 2))}
    expected |= {"mm->mm": (queries(1), candidates(0))}
    expected |= {"other->all": (queries(2), candidates(0, 1, 2))}
    assert list(found["searches"]) == list(expected)
    whole = {**found["searches"]["all"]}
    for name, chosen in expected.items():
        got = found["searches"][name]
        got["chance"] = got["chance"]["recall_at_1"]
        assert got == pytest.approx(by_sorting(scores, positives, items, *chosen)), name
    assert {*whole} - {*found} == {"queries", "candidates", "unanswerable", "chance"}
    assert {*found} - {*whole} == {"searches"}
    assert all(found[name] == whole[name] for name in found if name != "searches")
    assert whole["unanswerable"] > 0


def test_rank_10_is_among_the_first_10():
    pairs = make_pairs([[9], [10]], [0, 0], [0] * 12, ["a"], ["a"], queries=[12, 12])
    found = pair_scores(torch.tensor([*range(12, 0, -1), 1.0])[:, None], pairs)
    assert found["mrr_at_10"] == found["true_recall_at_10"] / 10 == 0.05
    assert found["mrr"] == pytest.approx((1 / 10 + 1 / 11) / 2)


def test_one_corpus_or_task_has_no_searches_of_its_own():
    pairs = make_pairs([[0], [1]], [0, 0], [0, 0], ("all pairs",), ("all pairs",))
    assert list(pair_scores(torch.eye(2), pairs)["searches"]) == ["all"]


def test_a_task_whose_corpus_has_none_of_its_candidates_is_unanswerable():
    found = pair_scores(torch.eye(2), make_pairs([[0], [1]], [0, 1], [1, 1]))["searches"]
    assert found["mm->mm"] == {"queries": 0, "candidates": 0, "unanswerable": 1}
    with pytest.raises(ValueError, match="data: got no query with a relevant candidate"):
        pair_scores(torch.eye(2), make_pairs([[], []], [0, 1], [1, 1]))


WRONG = {
    "positives_indptr: got numbers that fall": {"positives_indptr": [0, 2, 1]},
    "positives_indptr: got 2 numbers, expected 3": {"positives_indptr": [0, 1]},
    "positives_indices: got 1 numbers, expected 2": {"positives_indptr": [0, 1, 2]},
    "tasks: got 1 numbers, expected 2": {"queries": [0, 1], "tasks": [0]},
    "tasks: got 0 to 4, expected numbers from 0 to 3": {"tasks": [0, 4]},
    "corpora: got 2 numbers, expected 3": {"corpora": [0, 0], "candidates": [0, 1, 2]},
    "corpora: got -1 to 0, expected": {"corpora": [-1, 0, 0]},
    "positives_indices: got an item twice": {
        "positives_indptr": [0, 0, 2],
        "positives_indices": [2, 2],
    },
}


@pytest.mark.parametrize("message", WRONG)
def test_tensors_that_do_not_fit_together_are_refused(message):
    numbers = {"positives": [[2], []], "tasks": [0, 0], "corpora": [0, 0, 0]}
    with pytest.raises(ValueError, match=message):
        make_pairs(**{**numbers, **WRONG[message]})


@pytest.mark.parametrize("name", ["queries", "candidates", "positives_indices"])
def test_items_without_embedding_are_refused(name):
    pairs = make_pairs([[0], [1]], [0, 0], [0, 0])
    setattr(pairs, name, torch.tensor([0, 2]))
    with pytest.raises(ValueError, match=f"{name}: got 0 to 2, expected numbers from 0 to 1"):
        pair_scores(torch.eye(2), pairs)


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


class PairTexts:
    def __init__(self, texts):
        self.texts = texts

    def __len__(self):
        return len(self.texts)


class Batches:
    """Batches of ITEMS, which record the rows that are read."""

    batch_size = 2
    ahead = 1

    def __init__(self):
        self.items, self.read = self, []

    def start(self, rows):
        self.read += rows.tolist()
        return rows

    def finish(self, rows):
        return {name: x[rows] for name, x in ITEMS.items()}


@pytest.mark.parametrize("unused", [False, True])
def test_evaluation_of_a_pair_set(unused):
    """An item that is neither a query nor a candidate is not embedded, even if it is positive."""
    candidates = [0, 3] if unused else [1, 0, 3]
    pairs = SimpleNamespace(
        items=PairTexts(["text" * has for has in HAS_TEXT]),
        queries=np.array([2, 4]),
        candidates=np.array(candidates),
        positives=Ragged(np.array([0, 1, 3]), np.array([0, 1, 3])),
        tasks=np.array([0, 0]),
        task_names=["one"],
        corpora=np.zeros(len(candidates), np.int64),
        corpus_names=["one"],
        searched_items=np.union1d([2, 4], candidates),
    )
    expected = make_pairs(
        [[0], [3] if unused else [1, 3]],
        [0, 0],
        [0] * len(candidates),
        ["one"],
        ["one"],
        queries=[2, 4],
        candidates=candidates,
    )
    batches = Batches()
    found = evaluate_pairs(Model(1, 1), pairs, batches)
    assert found == pair_scores(torch.tensor(EMBEDDED), expected) and found["mrr"] <= 1
    assert batches.read == ([0, 2, 3, 4] if unused else [0, 1, 2, 3, 4])
    assert evaluate_pairs(Model(1, 1), pairs, Batches(), stopped=lambda: True) is None
