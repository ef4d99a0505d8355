"""Sets of pairs: distinct items, merged queries, selections, digests."""

import json
import re

import numpy as np
import pytest
import torch
from pair_folders import mmeb_row, picture, text_set, texts_of, write

from mmfused.data.pair_formats import open_pairs
from mmfused.data.pair_items import without_marks
from mmfused.data.pair_labels import same_number
from mmfused.data.pictures import BrokenPicture
from mmfused.data.ragged import PackedStrings, Ragged


@pytest.fixture
def pairs(tmp_path):
    for number in range(3):
        picture(tmp_path / f"images/{number}.png", 50 * number, (8 + number, 6))
    two = ["images/0.png", "images/1.png"]
    rows = [
        {"query": {"text": "<|IMAGE|> or <|IMAGE|>?", "image": two}, "candidate": {"text": "é"}},
        {"query": {"text": "<|image_1|>\nWhat?", "image": two[0]}, "candidate": {"text": "mug"}},
        {"query": {"image": two[1]}, "candidate": {"text": "mug"}, "instruction": "Find it."},
        {"query": {"text": "two <|IMAGE|>", "image": two}, "candidate": {"image": two[::-1]}},
        {"query": {"text": "plate <|VIDEO|>"}, "candidate": {"image": {"image": two[0]}}},
    ]
    return open_pairs(write(tmp_path / "rows.json", rows))


def test_texts_and_sequences(pairs):
    items = pairs.items
    queries = pairs.queries.tolist()
    texts = texts_of(pairs, queries)
    assert texts == ["or ?", "What?", "Find it.", "two", "plate"]
    assert items.texts[-1] == items.texts[len(items) - 1] and items.texts[1:3] == ["é", "What?"]
    sequences = [items.sequence_item(row) for row in queries]
    found = [{key: item[key] for key in item if key != "image"} for item in sequences]
    assert found == [
        {"text": "<|IMAGE|> or <|IMAGE|>?"},
        {"text": "<|IMAGE|>\nWhat?"},
        {"instruction": "Find it."},
        {"text": "two"},  # one mark for two pictures: they precede the text
        {"text": "plate"},
    ]
    shapes = [[tuple(image.shape) for image in item.get("image", [])] for item in sequences]
    assert shapes == [[(3, 6, 8), (3, 6, 9)], [(3, 6, 8)], [(3, 6, 9)], shapes[0], []]
    assert sequences[0]["image"][1].unique().tolist() == [50]


def test_items_are_distinct_and_pictures_are_read_on_demand(pairs, tmp_path):
    items = pairs.items
    assert len(items) == 9 and len(items.files.names) == 2  # "mug" is one item
    assert pairs.positives[1].tolist() == pairs.positives[2].tolist()
    assert items.present.tolist() == [bool(items.files_of(row)) for row in range(9)]
    row = int(pairs.queries[2])
    assert items.files_of(row) == ["images/1.png"]
    assert items[row]["image"].shape == (3, 6, 9) and items[row]["image_present"] is True
    assert items.load_image(row, 4).shape == (3, 4, 4)
    missing = int(pairs.positives[0][0])
    assert items[missing]["image_present"] is False and items[missing]["text"] == "é"
    with pytest.raises(BrokenPicture, match="the item has no picture"):
        items.load_image(missing, 4)
    (tmp_path / "images/1.png").write_bytes(b"no picture")
    with pytest.raises(BrokenPicture, match=r"^images/1.png: it is not a picture"):
        items.load_image(row, 4)
    (tmp_path / "images/1.png").unlink()
    (tmp_path / "images/1.png").symlink_to("/etc/hostname")
    with pytest.raises(BrokenPicture, match=r"^images/1.png: it leads outside the folder"):
        items.sequence_item(row)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<|image_1|>\nWhat?", "What?"),
        ("a\n<|IMAGE|>\nb", "a\nb"),
        ("like <|image_12|> but", "like but"),
        ("<|IMAGE|><|VIDEO|>", ""),
        ("<|im_start|> a", "<|im_start|> a"),
        ("  a<|IMAGE|>", "a"),
    ],
)
def test_marks_are_removed(text, expected):
    assert without_marks(text) == expected


def test_equal_queries_of_a_task_have_all_positives(tmp_path):
    rows = [("a", "1", "x"), ("b", "1"), ("a", "2", "y"), ("a", "1", "x"), ("a", "3", "2")]
    pairs = open_pairs(text_set(tmp_path, {"one": rows, "two": [("a", "4")]}))
    assert pairs.task_names == ["one", "two"] and pairs.tasks.tolist() == [0, 0, 1]
    assert texts_of(pairs, pairs.queries) == ["a", "b", "a"]
    assert [sorted(texts_of(pairs, found)) for found in pairs.positives] == [
        ["1", "2", "3"],
        ["1"],
        ["4"],
    ]
    # "2" is a positive of the query that has it as a negative.
    assert [sorted(texts_of(pairs, found)) for found in pairs.negatives] == [["x", "y"], [], []]
    assert pairs.skipped == ["1 negatives are also positives of their query: left out"]
    found = zip(texts_of(pairs, pairs.candidates), pairs.corpora.tolist(), strict=True)
    assert set(found) == {*((text, 0) for text in "123xy"), ("4", 1)}
    assert pairs.corpus_names == ["one", "two"] and pairs.task_corpora == [[0], [1]]


def test_queries_are_in_the_order_of_their_first_rows(tmp_path):
    rows = [("a", "b"), ("c", "d"), ("b", "e"), ("c", "a"), ("a", "f")]
    pairs = open_pairs(text_set(tmp_path, {"one": rows}))
    assert texts_of(pairs, pairs.queries) == ["a", "c", "b"]
    found = [sorted(texts_of(pairs, positives)) for positives in pairs.positives]
    assert found == [["b", "f"], ["a", "d"], ["e"]]


def test_items_differ_if_their_texts_are_divided_otherwise(tmp_path):
    rows = [
        {"query": {"text": text}, "candidate": {"text": "p"}, "instruction": instruction}
        for text, instruction in (("ab", "c"), ("a", "bc"), ("a", "bc"))
    ]
    pairs = open_pairs(write(tmp_path / "rows.json", rows))
    assert texts_of(pairs, pairs.queries) == ["c\nab", "bc\na"]


def test_selections_and_splits(tmp_path):
    rows = [(f"q{i}", f"p{i % 7}", f"n{i}") for i in range(20)]
    pairs = open_pairs(text_set(tmp_path, {"task": [*rows, ("", "x")]}))
    some = pairs.select([5, 2])
    assert texts_of(some, some.queries) == ["q5", "q2"]
    assert [texts_of(some, found) for found in some.positives] == [["p5"], ["p2"]]
    assert [texts_of(some, found) for found in some.negatives] == [["n5"], ["n2"]]
    assert len(some.candidates) == len(pairs.candidates) == 27
    first, second = pairs.split(0.3)
    assert len(first) == 14 and len(second) == 6 and len(first.skipped) == 1
    queries = [*texts_of(first, first.queries), *texts_of(second, second.queries)]
    assert sorted(queries) == sorted(row[0] for row in rows) and not second.skipped
    again = open_pairs(tmp_path).split(0.3)[1]
    assert texts_of(again, again.queries) == texts_of(second, second.queries)
    assert len(pairs.split(0.001)[1]) == 1 and len(pairs.split(0.999)[0]) == 1
    for rows in ([], [20], [-1], [0.5], [[1]]):
        with pytest.raises(ValueError, match=r"^rows: got .*, expected one or more integers from"):
            pairs.select(rows)
    for fraction in (0, 1, float("nan"), "half"):
        with pytest.raises(ValueError, match=r"^fraction: got .*, expected a number between"):
            pairs.split(fraction)
    with pytest.raises(ValueError, match=r"^fraction: got a set of one query"):
        some.select([0]).split(0.5)


def test_the_digest_changes_with_each_part(tmp_path):
    def digest(rows):
        return open_pairs(write(tmp_path / "rows.json", rows)).digest

    picture(tmp_path / "a.png", 1)
    picture(tmp_path / "b.png", 2)
    base = mmeb_row("<|image_1|>q", "p", "n", ("a.png", "", ""))
    variants = [base, {**base, "qry": "q"}, {**base, "pos_text": "r"}, {**base, "neg_text": ""}]
    variants += [{**base, "qry_image_path": "b.png"}, {**base, "neg_text": "p", "pos_text": "n"}]
    found = [digest([row]) for row in variants]
    assert len(set(found)) == len(variants) and found[0] == digest([base])
    assert found[0] != digest([base, variants[1]])
    picture(tmp_path / "a.png", 1, (30, 40))
    assert digest([base]) != found[0]
    unite = {"query": {"text": "q"}, "candidate": {"text": "p"}}
    assert len({digest([{**unite, "target_modal": name}]) for name in ("", "text", "image")}) == 3
    assert digest([{**unite, "instruction": "q"}]) != digest([unite])


def test_lists_of_lists():
    lists = Ragged.grouped(np.array([2, 0, 2, 2, 0]), np.array([7, 5, 1, 7, 4]), 4)
    assert [found.tolist() for found in lists] == [[4, 5], [], [1, 7], []]
    assert lists.owners.tolist() == [0, 0, 2, 2] and lists.sizes.tolist() == [2, 0, 2, 0]
    assert [found.tolist() for found in lists.take(np.array([2, 1, 2]))] == [[1, 7], [], [1, 7]]
    strings = PackedStrings()
    for text in ("é", "", "mug"):
        strings.add(text.encode())
    assert list(strings) == ["é", "", "mug"] and strings[-1] == "mug" and strings[:2] == ["é", ""]
    with pytest.raises(IndexError):
        strings[3]


def test_linked_things_have_the_same_number():
    rng = np.random.default_rng(0)
    for _ in range(50):
        count = int(rng.integers(1, 30))
        left, right = rng.integers(0, count, (2, int(rng.integers(0, 30))))
        expected = list(range(count))
        for _ in range(count):  # paths of at most `count` links
            for a, b in zip(left, right, strict=True):
                expected[a] = expected[b] = min(expected[a], expected[b])
        assert same_number(count, left, right).tolist() == expected


def test_names_of_files_that_cannot_be_used(tmp_path):
    folder = tmp_path / "set"
    picture(folder / "good.png")
    (folder / "empty.png").touch()
    (folder / "dir.png").mkdir()
    picture(tmp_path / "outside.png")
    (folder / "link.png").symlink_to(tmp_path / "outside.png")
    (folder / "inner.png").symlink_to("good.png")
    names = ["good.png", "inner.png", "empty.png", "dir.png", "../outside.png", "link.png"]
    names += [str(tmp_path / "outside.png"), "a\0b.png", "no/x.png", "..", "good.png/x", "\ud800"]
    rows = [mmeb_row(f"q{i}", "", "", ("", name, "")) for i, name in enumerate(names)]
    path = folder / "rows.json"
    path.write_text(json.dumps(rows))
    pairs = open_pairs(path)
    assert texts_of(pairs, pairs.queries) == ["q0", "q1"]
    reasons = [re.sub(r"^.*cannot be read: .*?: ", "", text) for text in pairs.skipped]
    assert reasons == [
        "it has 0 bytes, expected 1 to 268435456",
        "it is not a regular file",
        *["it leads outside the folder"] * 3,
        "it is not a valid file name",
        "the file does not exist",
        "it is not the name of a file",
        "the file does not exist",
        "it is not a valid file name",
    ]
    assert all(text.isprintable() for text in pairs.skipped)


def test_items_make_batches_of_a_collate(pairs):
    from mmfused.data import Batches, Collate, train_tokenizer

    collate = Collate(train_tokenizer(pairs.items.texts), 4, 8, mean=(0, 0, 0), std=(1, 1, 1))
    batches = Batches(pairs.items, collate, 4, shuffle=False, drop_last=False)
    found = torch.cat([batch["pixel_values"][:, 0, 0, 0] * 255 for batch in batches])
    first = [pairs.items.files_of(row)[:1] for row in range(len(pairs.items))]
    assert found.round().tolist() == [50.0 * (names == ["images/1.png"]) for names in first]
