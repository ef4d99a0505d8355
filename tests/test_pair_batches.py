"""Batches of explicit pairs: order, weights, negatives and labels."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from pair_folders import mmeb_row, picture, text_set, texts_of, write

from mmfused.data import Collate, train_tokenizer
from mmfused.data.pair_batches import PairSetBatches
from mmfused.data.pair_formats import open_pairs
from mmfused.data.pair_labels import batch_labels
from mmfused.data.ragged import Ragged


def processor(items):
    """Return the lengths of the texts and the sums of the pictures, like a model's inputs."""
    lengths = [len(item.get("text", "")) for item in items]
    pictures = [int(picture.sum()) for item in items for picture in item.get("image", [])]
    code = [("text" in item) + 2 * ("image" in item) for item in items]
    found = {"input_ids": torch.tensor(lengths)[:, None], "code": torch.tensor(code)}
    return found | ({"pixel_values": torch.tensor(pictures)} if pictures else {})


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """Three tasks of 7, 5 and 4 queries with weights 1, 2.5 and 0.5."""
    root = tmp_path_factory.mktemp("mixture")
    sources = []
    for name, count, weight in (("a", 7, 1), ("b", 5, 2.5), ("c", 4, 0.5)):
        rows = [
            (f"{name} query {i}", f"{name} {i}", f"{name} not {i}" * (i % 2)) for i in range(count)
        ]
        rows += [(rows[0][0], f"{name} other", "")]
        text_set(root / name, {"task": rows})
        sources.append({"data": name, "weight": weight})
    (root / "mixture.json").write_text(json.dumps({"sources": sources}))
    return open_pairs(root / "mixture.json")


@pytest.mark.parametrize("one_task", [True, False])
@pytest.mark.parametrize("batch_size", [1, 3, 4, 100])
def test_an_epoch_visits_queries_as_often_as_their_weights_say(mixture, batch_size, one_task):
    batches = PairSetBatches(mixture, processor, batch_size, one_task=one_task, seed=3)
    counts = []
    for epoch in range(4):
        visited = [batches.plan.rows(epoch, batch) for batch in range(len(batches))]
        counts.append(Counter(np.concatenate(visited).tolist()))
        assert max(map(len, visited)) <= batch_size
        if one_task:
            for rows in visited:
                assert len(set(mixture.tasks[rows])) == 1
        if batch_size <= 4:  # then the queries of weight 2.5 need not meet themselves
            assert all(len(set(rows)) == len(rows) for rows in visited)
    for row, task in enumerate(mixture.tasks):
        found = [count[row] for count in counts]
        expected = {0: {1}, 1: {2, 3}, 2: {0, 1}}[int(task)]
        assert set(found) <= expected and sum(found) == pytest.approx(
            4 * mixture.weights[row], abs=1
        )
    assert [sum(count.values()) for count in counts] == [7 + 12 + 2] * 4
    assert sum(counts[0][row] != counts[1][row] for row in range(12, 16)) == 4  # others each time


def test_batches_of_tasks_are_mixed_and_nearly_equal_in_size(mixture):
    batches = PairSetBatches(mixture, processor, 4)
    assert len(batches) == 2 + 3 + 1
    orders = []
    for epoch in range(5):
        tasks = [mixture.tasks[batches.plan.rows(epoch, batch)] for batch in range(6)]
        orders.append([int(task[0]) for task in tasks])
        sizes = [(int(task[0]), len(task)) for task in tasks]
        assert sorted(sizes) == [(0, 3), (0, 4), (1, 4), (1, 4), (1, 4), (2, 2)]
    assert len(set(map(tuple, orders))) > 1


def test_batches_depend_only_on_position_and_seed_and_ranks_split_them(mixture):
    def make(**options):
        return PairSetBatches(mixture, processor, 4, seed=1, num_negatives=2, **options)

    stream = make().stream()
    expected = [next(stream) for _ in range(14)]  # more than two epochs
    for position in (0, 5, 6, 13):
        stream = make().stream(position)
        for at in range(position, min(position + 2, 14)):
            found = next(stream)
            assert found.keys() == expected[at].keys() == {"query", "candidate", "negative"}
            for role, items in found.items():
                assert all(torch.equal(items[key], expected[at][role][key]) for key in items)
    for world in (2, 4):
        streams = [make(rank=rank, world=world).stream(7) for rank in range(world)]
        for at in range(7, 14):
            parts = [next(stream) for stream in streams]
            for role in parts[0]:
                for key in ("code", "labels"):
                    found = torch.cat([part[role][key] for part in parts])
                    assert torch.equal(found, expected[at][role][key])
    assert min(len(part["query"]["labels"]) for part in parts) == 0  # the last batch has two rows
    other = PairSetBatches(mixture, processor, 4, seed=2, num_negatives=2)
    assert [other.plan.rows(0, i).tolist() for i in range(6)] != [
        make().plan.rows(0, i).tolist() for i in range(6)
    ]


def test_positives_and_given_negatives_are_drawn_from_those_of_the_query(mixture):
    batches = PairSetBatches(mixture, processor, 16, num_negatives=2, one_task=False)
    positives, fillers = Counter(), Counter()
    for epoch in range(300):
        for batch in range(len(batches)):
            drawn = batches.draw(epoch, batch)
            negative = drawn["negative"][0].reshape(-1, 2)
            for i, row in enumerate(drawn["rows"]):
                candidate, found = int(drawn["candidate"][0][i]), negative[i].tolist()
                own, given = mixture.positives[row], mixture.negatives[row]
                assert candidate in own and len(set(found)) == 2
                assert set(given) <= set(found)  # each query has at most one
                same_task = mixture.positives.take(
                    np.flatnonzero(mixture.tasks == mixture.tasks[row])
                )
                assert set(found) - set(given) <= set(same_task.values) - set(own)
                if row == 0:
                    positives[mixture.items.texts[candidate]] += 1
                    fillers.update(texts_of(mixture, found))
    assert positives.keys() == {"a 0", "a other"} and min(positives.values()) > 110
    assert len(fillers) == 6 and min(fillers.values()) > 60


def test_all_given_negatives_are_equally_likely(tmp_path):
    rows = [("q", "p", ["n1", "n2", "n3", "n4"]), ("r", "s", ["m1", "m2"])]
    for row in rows:
        row[2].sort()
    path = write(
        tmp_path / "a.json", [mmeb_row(q, p, n, ("", "", [""] * len(n))) for q, p, n in rows]
    )
    pairs = open_pairs(path)
    batches = PairSetBatches(pairs, processor, 2, num_negatives=3)
    found = Counter()
    for epoch in range(200):
        drawn = batches.draw(epoch, 0)
        negative = drawn["negative"][0].reshape(2, 3)
        texts = {int(row): texts_of(pairs, negative[i]) for i, row in enumerate(drawn["rows"])}
        assert sorted(texts[1]) == ["m1", "m2", "p"]  # and the only positive of another query
        found[tuple(sorted(texts[0]))] += 1
    assert len(found) == 4 and min(found.values()) > 25


def test_kinds_of_negatives(mixture, tmp_path):
    assert "negative" not in PairSetBatches(mixture, processor, 4, negatives="none").batch(0, 0)
    drawn = PairSetBatches(mixture, processor, 16, negatives="drawn", one_task=False).draw(0, 0)
    given = set(mixture.negatives.values.tolist())
    assert not given & set(drawn["negative"][0].tolist())
    pairs = open_pairs(text_set(tmp_path / "plain", {"a": [("q", "1"), ("r", "2")]}))
    assert "negative" not in PairSetBatches(pairs, processor, 2).batch(0, 0)
    batch = PairSetBatches(pairs, processor, 2, negatives="drawn", num_negatives=2).batch(0, 0)
    assert len(batch["negative"]["labels"]) == 4
    # Tasks with one positive take those of other tasks.
    pairs = open_pairs(text_set(tmp_path / "two", {"a": [("q", "1")], "b": [("r", "2")]}))
    drawn = PairSetBatches(pairs, processor, 2, negatives="drawn", one_task=False).draw(0, 0)
    assert sorted(texts_of(pairs, drawn["negative"][0])) == ["1", "2"]
    assert (drawn["negative"][0] != drawn["candidate"][0]).all()


def test_sets_without_a_negative_are_refused(tmp_path):
    pairs = open_pairs(text_set(tmp_path, {"a": [("q", "1", "n"), ("r", "1", "m")]}))
    batches = PairSetBatches(pairs, processor, 2)  # all are given
    drawn = batches.draw(0, 0)
    assert sorted(texts_of(pairs, drawn["negative"][0])) == ["m", "n"]
    for options in ({"negatives": "drawn"}, {"num_negatives": 2}):
        with pytest.raises(
            ValueError, match=r"^pair_set: got a query that all positives belong to"
        ):
            PairSetBatches(pairs, processor, 2, **options)
    for options, message in (
        ({"negatives": "hard"}, "^negatives: got 'hard', expected 'given' or 'drawn' or 'none'"),
        ({"num_negatives": 0}, "^num_negatives: got 0, expected an integer of at least 1"),
        ({"world": 3}, "^batch_size: got 2, expected a multiple of 3"),
        ({"workers": 0}, "^workers: got 0, expected an integer of at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            PairSetBatches(pairs, processor, 2, **options)


def expected_labels(own, query, candidate, negative):
    """Return which rows have equal labels, and for each negative the rows with its label."""
    rows = range(len(query))
    compared = {*candidate.tolist(), *negative.reshape(-1).tolist()}

    def is_linked(i, j):
        shared = own[i] & own[j] & compared
        return bool(shared) or query[i] == query[j] or query[i] in own[j] & compared

    linked = [[i == j or is_linked(i, j) or is_linked(j, i) for j in rows] for i in rows]
    for k in rows:  # paths through k
        linked = [[linked[i][j] or (linked[i][k] and linked[k][j]) for j in rows] for i in rows]
    of_negative = {}
    for i in rows:
        for n in negative[i].tolist():
            owners = {j for j in rows if n in own[j]}
            found = {j for owner in owners for j in rows if linked[owner][j]}
            of_negative[i, n] = found if i in owners or i not in found else set()
    return linked, of_negative


def test_labels_are_those_of_a_search_through_all_pairs_of_rows():
    rng = np.random.default_rng(0)
    seen = Counter()
    for trial in range(400):
        rows, number, items = int(rng.integers(1, 7)), int(rng.integers(0, 3)), 12 + trial % 20
        query, candidate = rng.integers(0, items, (2, rows))
        negative = rng.integers(0, items, (rows, number))
        own = [
            {int(q), int(c), *rng.integers(0, items, rng.integers(0, 3)).tolist()}
            for q, c in zip(query, candidate, strict=True)
        ]
        groups = np.repeat(np.arange(rows), [len(x) for x in own])
        lists = Ragged.grouped(groups, np.array([x for one in own for x in one]), rows)
        label, of_negative = batch_labels(lists, query, candidate, negative)
        linked, expected = expected_labels(own, query, candidate, negative)
        assert np.array_equal(label[:, None] == label, linked)
        for i in range(rows):
            for n, found in zip(negative[i].tolist(), of_negative[i], strict=True):
                same = {j for j in range(rows) if label[j] == found}
                assert same == expected[i, n]
                seen[n in own[i], bool(same), i in same] += 1
    assert len(seen) == 3  # own, of another row, and of no row or of the same class


def test_labels_of_products_and_swapped_pairs(tmp_path):
    keys = (
        "item_id_1",
        "item_title_1",
        "item_image_1",
        "item_id_2",
        "item_title_2",
        "item_image_2",
    )
    rows = [(1, "a", "", 2, "b", ""), (2, "bb", "", 1, "a", ""), (3, "c", "", 4, "d", "")]
    rows = [dict(zip(keys, row, strict=True)) for row in rows]
    pairs = open_pairs(write(tmp_path / "m.jsonl", rows))
    drawn = PairSetBatches(pairs, processor, 3).draw(0, 0)
    label = dict(zip(drawn["rows"].tolist(), drawn["query"][1].tolist(), strict=True))
    assert label[0] == label[1] != label[2]
    assert drawn["candidate"][1] is drawn["query"][1]


@pytest.fixture
def with_pictures(tmp_path):
    rows = []
    for number in range(6):
        picture(tmp_path / f"images/{number}.png", number + 1)
        row = {"query": {"text": f"query {number}"}, "candidate": {"image": f"images/{number}.png"}}
        rows.append(
            {**row, "target_modal": "image, text" if number == 3 else "", "instruction": "Find"}
        )
    return open_pairs(write(tmp_path / "rows.json", rows))


def test_batches_of_a_processor(with_pictures, caplog):
    batches = PairSetBatches(with_pictures, processor, 6, workers=2)
    batch, rows = batches.batch(0, 0), batches.plan.rows(0, 0)
    assert batch["query"]["input_ids"].tolist() == [[7]] * 6
    assert batch["candidate"]["pixel_values"].tolist() == [(row + 1) * 8 * 6 * 3 for row in rows]
    assert batch["candidate"]["code"].tolist() == [3 if row == 3 else 2 for row in rows]
    assert torch.equal(batch["query"]["labels"], batch["candidate"]["labels"])
    # A picture that is lost after the set was opened.
    name = with_pictures.items.files.names[2]
    (with_pictures.items.files.roots[0] / name).unlink()
    lost = batches.batch(0, 0)["candidate"]["pixel_values"].tolist()
    assert lost == [0 if row == 2 else (row + 1) * 8 * 6 * 3 for row in rows]
    message = "images/2.png: the image cannot be read: the file does not exist"
    assert with_pictures.lost == [f"{message}; the item is used without it"]
    assert caplog.messages == [f"{message}; the item is used without it"]


def test_batches_of_a_collate(with_pictures):
    collate = Collate(train_tokenizer(["query find 0"]), 4, 8, mean=(0, 0, 0), std=(1, 1, 1))
    batches = PairSetBatches(with_pictures, collate, 4, negatives="drawn", num_negatives=3)
    batch, drawn = batches.batch(1, 0), batches.draw(1, 0)
    for role, items in batch.items():
        rows = drawn[role][0]
        expected = [with_pictures.items[int(row)] for row in rows]
        values = [int(item["image"][0, 0, 0]) for item in expected]
        assert (items["pixel_values"][:, 0, 0, 0] * 255).round().tolist() == values
        assert items["image_present"].tolist() == [item["image_present"] for item in expected]
        assert items["labels"].tolist() == drawn[role][1].tolist()
    assert len(batch["negative"]["labels"]) == 9 and len(batch["query"]["labels"]) == 3
