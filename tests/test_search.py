"""Search in blocks against explicit sorting of all dot products."""

import pytest
import torch

from mmfused.training import search
from mmfused.training.retrieval_metrics import retrieval_scores
from mmfused.training.search import CUTOFFS, SameLabel, found_in_first, rank_of_first


def whole_numbers(rows, width=3, high=3):
    """Return embeddings of small whole numbers, whose dot products are exact and often equal."""
    return torch.randint(-high, high + 1, (rows, width)).float()


def sorted_candidates(scores, relevant, excluded=-1):
    """Return the candidates in order: irrelevant before relevant ones of equal score."""
    order = sorted(range(len(scores)), key=lambda j: (-scores[j], relevant[j], j))
    return [j for j in order if j != excluded]


@pytest.mark.parametrize("candidates", [5, 38])
@pytest.mark.parametrize("size", [1, 7, 1000])
def test_ranks_and_nearest_equal_explicit_sorting(size, candidates, monkeypatch):
    monkeypatch.setattr(search, "SCORES", size * candidates)
    monkeypatch.setattr(search, "COLUMNS", 4)
    query, candidate = whole_numbers(19), whole_numbers(candidates)
    excluded = torch.randint(-1, candidates, (19,))
    relevance = torch.rand(19, candidates) < 0.2
    relevance[torch.arange(19), (excluded + 1) % candidates] = True
    relevance[torch.arange(19), excluded] &= excluded < 0

    ranks, nearest = rank_of_first(query, candidate, lambda i, j: relevance[i:j], excluded)
    first, found = found_in_first(query, candidate, lambda i, j: relevance[i:j])
    scores = (query.double() @ candidate.double().T).tolist()
    for i, row in enumerate(relevance.tolist()):
        order = sorted_candidates(scores[i], row, int(excluded[i]))
        assert ranks[i] == 1 + [row[j] for j in order].index(True)
        assert nearest[i] == min(order, key=lambda j: (-scores[i][j], j))
        hits = [row[j] for j in sorted_candidates(scores[i], row)]
        assert first[i] == 1 + hits.index(True)
        assert found[i].tolist() == [sum(hits[:k]) for k in CUTOFFS]


def test_many_candidates_and_many_relevant_ones():
    # More columns than fit into the bytes of one word, and more relevant ones than the cutoffs.
    query, candidate = whole_numbers(3, high=2), whole_numbers(3 * 8 * 255 + 5, high=2)
    relevance = torch.rand(3, len(candidate)) < torch.tensor([[0.3], [0.001], [0.9]])
    relevance[:, 17] = True

    def relevant(first, last):
        return relevance[first:last].nonzero(as_tuple=True)

    ranks, nearest = rank_of_first(query, candidate, relevant)
    first, found = found_in_first(query, candidate, relevant)
    by_mask = rank_of_first(query, candidate, lambda first, last: relevance[first:last])
    assert first.equal(ranks) and first.equal(by_mask[0])
    for i, (scores, row) in enumerate(zip((query @ candidate.T).tolist(), relevance, strict=True)):
        order = sorted_candidates(scores, row.tolist())
        hits = [bool(row[j]) for j in order]
        assert ranks[i] == 1 + hits.index(True)
        assert nearest[i] == scores.index(max(scores))
        assert found[i].tolist() == [sum(hits[:k]) for k in CUTOFFS]


@pytest.mark.parametrize("dense", [0, 1])
def test_the_same_label_is_relevant_except_for_the_query_itself(dense, monkeypatch):
    monkeypatch.setattr(search, "DENSE", dense)
    labels, candidate_labels = torch.tensor([7, 3, 9, 3]), torch.tensor([3, 7, 3, 3, 5, 7])
    own = torch.tensor([1, -1, -1, 0])
    mask = labels[:, None] == candidate_labels
    mask[0, 1] = mask[3, 0] = False
    relevant = SameLabel(labels, candidate_labels, own)
    assert relevant.counts.tolist() == mask.sum(1).tolist()
    for first, last in ((0, 4), (1, 3)):
        assert as_mask(relevant(first, last), last - first).equal(mask[first:last])
    kept = relevant.select(torch.tensor([False, True, False, True]))
    assert as_mask(kept(1, 2), 1).equal(mask[3:]) and kept.labels.tolist() == [3, 3]


def as_mask(relevant, rows):
    assert isinstance(relevant, torch.Tensor) == (search.DENSE == 0)
    if isinstance(relevant, torch.Tensor):
        return relevant
    mask = torch.zeros(rows, 6, dtype=torch.bool)
    mask[relevant] = True
    return mask


def items(count, labels):
    """Return items of whole numbers, some without a picture or a text."""
    views = {view: whole_numbers(count) for view in ("image", "text", "both")}
    has = {name: torch.rand(count) < 0.8 for name in ("has_image", "has_text")}
    return {**views, **has, "labels": torch.tensor(labels)[torch.randint(len(labels), (count,))]}


def dense_scores(queries, candidates, query_view, candidate_view):
    """Return the scores of a pair of views from the whole matrices of dot products and labels."""
    searched = queries if candidates is None else candidates
    present = [
        {"image": x["has_image"], "text": x["has_text"], "both": x["has_image"] | x["has_text"]}
        for x in (queries, searched)
    ]
    rows, columns = present[0][query_view], present[1][candidate_view]
    relevant = queries["labels"][:, None] == searched["labels"]
    allowed = rows[:, None] & columns
    if candidates is None:
        allowed &= ~torch.eye(len(rows), dtype=torch.bool)
    score = (queries[query_view].double() @ searched[candidate_view].double().T).masked_fill(
        ~allowed, -torch.inf
    )
    relevant &= allowed
    found = relevant.any(1)
    best = score.masked_fill(~relevant, -torch.inf).amax(1, keepdim=True)
    ranks = 1 + ((score >= best) & allowed & ~relevant).sum(1)[found]
    predicted, actual = searched["labels"][score.argmax(1)][found], queries["labels"][found]
    classes = {*predicted.tolist(), *actual.tolist()}
    f1 = [
        2
        * float(((predicted == c) & (actual == c)).sum())
        / float((predicted == c).sum() + (actual == c).sum())
        for c in classes
    ]
    counts = zip(relevant.sum(1)[found].tolist(), allowed.sum(1)[found].tolist(), strict=True)
    return {
        "queries": int(found.sum()),
        "candidates": int(columns.sum()),
        "unanswerable": int((rows & ~found).sum()),
        **{f"recall_at_{k}": float((ranks <= k).double().mean()) for k in (1, 5, 10)},
        "mrr": float((1 / ranks).mean()),
        "accuracy": float((predicted == actual).double().mean()),
        "macro_f1": sum(f1) / len(f1),
        "chance": sum(r / c for r, c in counts) / int(found.sum()),
    }


@pytest.mark.parametrize("labels", [[4, 4, 4, 4, 4, 7, 2**40], range(25)])
@pytest.mark.parametrize("within_queries", [False, True])
def test_scores_equal_those_of_whole_matrices(labels, within_queries, monkeypatch):
    monkeypatch.setattr(search, "SCORES", 200)
    queries = items(41, labels)
    candidates = None if within_queries else items(29, labels)
    pairs = retrieval_scores(queries, candidates)
    assert len(pairs) == 9
    for name, pair in pairs.items():
        expected = dense_scores(queries, candidates, *name.split("->"))
        pair["chance"] = pair["chance"]["recall_at_1"]
        assert pair == pytest.approx(expected, rel=1e-6), name


def test_views_that_were_not_embedded_have_no_pairs():
    queries, candidates = items(9, [0, 1]), items(8, [0, 1])
    del queries["image"], queries["both"], candidates["text"]
    assert list(retrieval_scores(queries, candidates)) == ["text->image", "text->both"]


def test_no_block_has_more_scores_than_allowed(monkeypatch):
    sizes, mm = [], torch.mm
    monkeypatch.setattr(search, "SCORES", 64)
    monkeypatch.setattr(
        torch, "mm", lambda *args, out: sizes.append(out.numel()) or mm(*args, out=out)
    )
    relevant = SameLabel(torch.zeros(11), torch.zeros(20), torch.full((11,), -1))
    rank_of_first(whole_numbers(11), whole_numbers(20), relevant)
    assert sizes == [60, 60, 60, 40]
