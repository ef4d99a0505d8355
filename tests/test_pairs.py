"""Batches of pairs and hard negatives for retrieval."""

from collections import Counter

import numpy as np
import pytest
import torch

from mmfused.data import Collate, PairBatches, train_tokenizer
from mmfused.data.pairs import EpochPlan, Pool
from mmfused.data.ragged import draw_distinct, share_of


class Rows:
    """A labeled data set; all pixels of the picture of row i have the value first + i."""

    def __init__(self, labels, coarse=None, first=0):
        self.labels, self.coarse_labels, self.first = labels, coarse, first
        self.texts = [f"product number {row}" for row in range(len(labels))]

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, row):
        image = torch.full((3, 4, 4), self.first + row, dtype=torch.uint8)
        return {
            "image": image,
            "image_present": True,
            "text": self.texts[row],
            "label": self.labels[row],
        }


LABELS = [0, 0, 0, 1, 1, 2, 3, 3, 3, 4, 4]
COARSE = [0, 0, 0, 0, 0, 0, 1, 1, 1, 2, 2]


@pytest.fixture(scope="module")
def collate():
    return Collate(
        train_tokenizer(["product number 0 1 2 3"]), 4, 16, mean=(0, 0, 0), std=(1, 1, 1)
    )


def rows_of(items):
    return (items["pixel_values"][:, 0, 0, 0] * 255).round().long()


def test_pairs_share_a_label_and_negatives_share_only_the_coarse_label(collate):
    batches = PairBatches(Rows(LABELS, COARSE), collate, 4)
    assert len(batches) == 3  # label 2 has one row and no pair, so ten rows make three batches
    stream, seen = batches.stream(), set()
    for _ in range(60):
        batch = next(stream)
        labels = batch["query"]["labels"]
        assert labels.unique().numel() == len(labels) and 2 not in labels  # labels are unique
        assert torch.equal(batch["candidate"]["labels"], labels)
        assert (rows_of(batch["query"]) != rows_of(batch["candidate"])).all()
        assert (batch["negative"]["labels"] != labels).all()
        for label, negative in zip(
            labels.tolist(), batch["negative"]["labels"].tolist(), strict=True
        ):
            assert (label, negative) in {(0, 1), (0, 2), (1, 0), (1, 2)} or label in (3, 4)
            seen.add((label, negative))
    assert {(0, 1), (0, 2), (1, 0), (1, 2)} <= seen and {n for label, n in seen if label == 3} == {
        0,
        1,
        2,
        4,
    }


def test_products_replace_rows_as_candidates(collate):
    products = Rows([0, 1, 2, 3, 5], [0, 0, 0, 1, 1], first=100)
    batches = PairBatches(Rows(LABELS), collate, 4, products=products)
    for _, batch in zip(range(20), batches.stream(), strict=False):
        labels = batch["query"]["labels"]
        assert 4 not in labels and (rows_of(batch["query"]) < 100).all()
        assert torch.equal(rows_of(batch["candidate"]) - 100, labels)
        assert (rows_of(batch["negative"]) >= 100).all()
        assert (batch["negative"]["labels"][labels == 3] == 5).all()


@pytest.mark.parametrize("batch_size", [1, 3, 4, 7, 10, 99])
def test_an_epoch_visits_each_row_with_a_candidate_once(collate, batch_size):
    batches = PairBatches(Rows(LABELS, COARSE), collate, batch_size)
    stream, orders = batches.stream(), []
    for _ in range(3):
        epoch = [rows_of(next(stream)["query"]) for _ in range(len(batches))]
        sizes = list(map(len, epoch))
        assert max(sizes) - min(sizes) <= 1 and max(sizes) <= batch_size
        orders.append(torch.cat(epoch).tolist())
        assert sorted(orders[-1]) == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10]
    assert orders[0] != orders[1] != orders[2]


@pytest.mark.parametrize("batch_size", [3, 16, 50])
def test_labels_repeat_in_a_batch_only_as_often_as_they_must(batch_size):
    labels = np.random.default_rng(1).integers(0, 30, 200)
    plan = EpochPlan(labels, np.arange(200), batch_size, seed=5)
    most = Counter()
    for batch in range(plan.batches):
        for label, repeats in Counter(labels[plan.rows(2, batch)].tolist()).items():
            most[label] = max(most[label], repeats)
    for label, rows in Counter(labels.tolist()).items():
        assert most[label] == -(-rows // plan.batches)


def test_the_first_batch_does_not_depend_on_labels_or_sizes():
    plan = EpochPlan(np.repeat(np.arange(100), [1] * 50 + [3] * 50), np.arange(200), 7, seed=0)
    first = np.concatenate([plan.rows(epoch, 0) for epoch in range(300)])
    counts = np.bincount(first, minlength=200) / len(first) * 200
    assert counts[:50].mean() == pytest.approx(1, abs=0.15)
    assert counts.min() > 0.2


def test_batches_depend_only_on_position_and_seed_and_ranks_split_them(collate):
    def make(**options):
        return PairBatches(Rows(LABELS, COARSE), collate, 4, seed=3, **options)

    stream = make().stream()
    expected = [next(stream) for _ in range(6)]
    for position in (0, 1, 5):
        got = next(make().stream(position))
        assert all(
            torch.equal(got[role][key], expected[position][role][key])
            for role in got
            for key in got[role]
        )
    whole = next(make(num_negatives=3).stream(4))
    for world in (2, 4):  # the batch has three rows, so that one of four ranks has none
        parts = [
            next(make(rank=rank, world=world, num_negatives=3).stream(4)) for rank in range(world)
        ]
        for role in ("query", "candidate", "negative"):
            found = [rows_of(part[role]) for part in parts]
            assert torch.equal(torch.cat(found), rows_of(whole[role]))
    other = next(PairBatches(Rows(LABELS, COARSE), collate, 4, seed=4).stream())
    assert not torch.equal(rows_of(other["query"]), rows_of(expected[0]["query"]))


def test_negatives_false_gives_only_pairs(collate):
    assert next(PairBatches(Rows(LABELS), collate, 4, negatives=False).stream()).keys() == {
        "query",
        "candidate",
    }


def test_candidates_and_negatives_are_uniform(collate):
    batches = PairBatches(Rows(LABELS, COARSE), collate, 10, num_negatives=2)
    candidates, negatives, others = Counter(), Counter(), Counter()
    for epoch in range(400):
        drawn = {role: rows.tolist() for role, rows in batches.draw(epoch, 0).items()}
        for i, query in enumerate(drawn["query"]):
            mine = drawn["negative"][2 * i : 2 * i + 2]
            assert len(set(mine)) == 2
            if query == 1:
                candidates[drawn["candidate"][i]] += 1
                negatives.update(mine)
            if query == 9:
                others.update(mine)
    assert candidates.keys() == {0, 2} and negatives.keys() == {3, 4, 5}
    assert others.keys() == set(range(9))  # no other label has the coarse label of label 4
    assert all(n / 400 == pytest.approx(1 / 2, abs=0.1) for n in candidates.values())
    assert all(n / 400 == pytest.approx(2 / 3, abs=0.1) for n in negatives.values())
    assert all(n / 400 == pytest.approx(2 / 9, abs=0.1) for n in others.values())


def test_negatives_are_those_of_a_search_through_all_rows():
    rng = np.random.default_rng(0)
    for _ in range(20):
        rows, labels = 23, rng.integers(0, 6, 23)
        # The rows of a label may have several coarse labels.
        coarse = rng.integers(0, 4, rows)
        pool = Pool(Rows(labels, coarse))
        drawn = pool.draw_negatives(np.arange(rows), 200, torch.Generator().manual_seed(1))
        for row in range(rows):
            is_other = labels != labels[row]
            is_hard = is_other & (coarse == coarse[row])
            expected = np.flatnonzero(is_hard if is_hard.any() else is_other)
            assert set(drawn[row]) == set(expected)


def test_distinct_draws():
    limits = np.array([1, 2, 3, 5])
    drawn = draw_distinct(np.repeat(limits, 1000), 3, torch.Generator().manual_seed(0))
    sets = [Counter(tuple(sorted(row)) for row in part) for part in np.split(drawn, 4)]
    assert sets[0] == {(0, 0, 0): 1000}
    assert {value for row in sets[1] for value in row} == {0, 1}  # with repeats: too few values
    assert sets[2] == {(0, 1, 2): 1000}
    assert len(sets[3]) == 10 and all(len(set(row)) == 3 for row in sets[3])
    assert min(sets[3].values()) > 60
    assert [share_of(5, rank, 3) for rank in range(3)] == [slice(0, 1), slice(1, 3), slice(3, 5)]


def test_data_that_cannot_make_pairs_is_refused(collate):
    with pytest.raises(ValueError, match="got no row with another row, or a product, of the same"):
        PairBatches(Rows([0, 1, 2]), collate, 2)
    with pytest.raises(ValueError, match="got rows of one label, expected at least two"):
        PairBatches(Rows([0, 0]), collate, 2)
    with pytest.raises(ValueError, match="batch_size: got 3, expected a multiple of 2"):
        PairBatches(Rows(LABELS), collate, 3, world=2)
    with pytest.raises(ValueError, match="num_negatives: got 0, expected an integer of at least 1"):
        PairBatches(Rows(LABELS), collate, 4, num_negatives=0)
