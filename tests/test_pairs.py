"""Batches of pairs and hard negatives for retrieval."""

import numpy as np
import pytest
import torch

from mmfused.data import Collate, PairBatches, train_tokenizer
from mmfused.data.pairs import hard_negatives, rows_by_label


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
    assert len(batches) == 2  # label 2 has one row and no pair, so ten rows make two batches
    stream, seen = batches.stream(), set()
    for _ in range(60):
        batch = next(stream)
        labels = batch["query"]["labels"]
        assert labels.unique().numel() == 4 and 2 not in labels  # labels are unique
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


def test_a_batch_larger_than_the_number_of_labels_repeats_all_labels_equally(collate):
    batch = next(PairBatches(Rows(LABELS, COARSE), collate, 8).stream())
    assert batch["query"]["labels"].bincount().tolist() == [2, 2, 0, 2, 2]


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
    halves = [next(make(rank=rank, world=2).stream(4)) for rank in (0, 1)]
    for role in ("query", "candidate", "negative"):
        assert torch.equal(
            torch.cat([rows_of(half[role]) for half in halves]), rows_of(expected[4][role])
        )
    other = next(PairBatches(Rows(LABELS, COARSE), collate, 4, seed=4).stream())
    assert not torch.equal(rows_of(other["query"]), rows_of(expected[0]["query"]))


def test_negatives_false_gives_only_pairs(collate):
    assert next(PairBatches(Rows(LABELS), collate, 4, negatives=False).stream()).keys() == {
        "query",
        "candidate",
    }


def test_labels_are_drawn_in_proportion_to_their_rows(collate):
    batches = PairBatches(Rows([0] * 6 + [1] * 2), collate, 1)
    drawn = torch.cat(
        [batch["query"]["labels"] for _, batch in zip(range(400), batches.stream(), strict=False)]
    )
    assert drawn.float().mean() == pytest.approx(0.25, abs=0.07)


def test_data_that_cannot_make_pairs_is_refused(collate):
    with pytest.raises(ValueError, match="got no row with another row, or a product, of the same"):
        PairBatches(Rows([0, 1, 2]), collate, 2)
    with pytest.raises(ValueError, match="got rows of one label, expected at least two"):
        PairBatches(Rows([0, 0]), collate, 2)
    with pytest.raises(ValueError, match="batch_size: got 3, expected a multiple of 2"):
        PairBatches(Rows(LABELS), collate, 3, world=2)


def test_rows_by_label_and_hard_negatives():
    found = rows_by_label([5, 2, 5, 2, 9])
    assert {label: rows.tolist() for label, rows in found.items()} == {2: [1, 3], 5: [0, 2], 9: [4]}
    negatives = hard_negatives([2], Rows([5, 2, 5, 2, 9], [1, 1, 1, 1, 2]), found)
    assert np.array_equal(negatives[2], [0, 2])
