"""Parts of product folders, and epochs that visit each row once."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from mmfused.data import Batches, Collate, ProductFolder, train_tokenizer
from mmfused.data.items import Items
from mmfused.data.reading import SelectedImages


def write(root, labels):
    """Write a folder whose row i has a picture of the colour (i, 0, 0) and the text "row i"."""
    lines = ["file_name,text,label,coarse_label"]
    for row, label in enumerate(labels):
        Image.new("RGB", (9, 9), (row, 0, 0)).save(root / f"{row}.png")
        lines.append(f"{row}.png,row {row},{label},{label // 2}")
    (root / "metadata.csv").write_text("\n".join(lines))
    return root


def rows_of(data):
    return [int(text.split()[1]) for text in data.texts]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["row 0 1 2 3 4 5 6 7 8 9"], vocab_size=60)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("image_size", [4, None])
def test_a_selection_has_the_items_of_its_rows(tmp_path, stream, image_size):
    data = ProductFolder(write(tmp_path, [0, 1, 2, 3, 4]), image_size=image_size, stream=stream)
    part = data.select([3, 1, 4]).select(np.array([2, 0]))
    assert rows_of(part) == [4, 3] and part.file_names == ["4.png", "3.png"]
    assert (part.labels, part.coarse_labels, part.present) == ([4, 3], [2, 1], [True] * 2)
    assert part.num_classes == 5 and part.streamed is stream and len(part) == len(part.images) == 2
    for row, image in zip((4, 3), part.images, strict=True):
        assert image[0].unique().tolist() == [row] and not image[1:].any()
    assert part[1]["text"] == "row 3" and torch.equal(part[1]["image"], part.images[1])
    loaded = part.load_image(0, 5)
    assert loaded.shape == (3, 5, 5) and (loaded[0] == 4).all() and not loaded[1:].any()
    digests = [x.digest for x in (data, part, data.select([4, 3]), data.select([3, 4]))]
    assert len(set(digests)) == 4 == len({data.fingerprint, *(digests[2:]), part.fingerprint})
    assert data.select([4, 3]).digest == digests[2]


def test_a_selection_shares_the_tensor_of_the_images(tmp_path, tokenizer):
    data = ProductFolder(write(tmp_path, [0] * 6), image_size=4)
    part = data.select([5, 2, 0])
    assert isinstance(part.images, SelectedImages) and part.images[1:].rows.tolist() == [2, 0]
    collate = Collate(tokenizer, 4, 8, mean=(0, 0, 0), std=(1, 1, 1))
    items = Items(part, collate)
    assert items.images.data_ptr() == data.images.data_ptr() and len(items) == 3
    reds = items.batch(torch.tensor([2, 0]))["pixel_values"][:, 0, 0, 0] * 255
    assert reds.round().tolist() == [0, 5]
    # At another size, only the images of the part are resized.
    small = Items(part, Collate(tokenizer, 2, 8, mean=(0, 0, 0), std=(1, 1, 1)))
    assert small.images.shape == (3, 3, 2, 2)
    assert (small.batch(torch.tensor([0]))["pixel_values"][0, 0] * 255).round().unique() == 5


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], r"rows: got \[\], expected at least one row number"),
        ([0.5], "rows: got .*, expected at least one row number"),
        ([0, 5], "rows: got 5, expected rows from 0 to 4"),
        ([-1], "rows: got -1, expected rows from 0 to 4"),
    ],
)
def test_invalid_rows_are_refused(tmp_path, rows, message):
    data = ProductFolder(write(tmp_path, [0] * 5))
    with pytest.raises(ValueError, match=message):
        data.select(rows)


@pytest.fixture(scope="module")
def long_tail(tmp_path_factory):
    counts = [41, 20, 11, 7, 3, 2, 1, 1]
    labels = np.repeat(np.arange(8), counts)
    labels = labels[np.random.default_rng(0).permutation(len(labels))].tolist()
    return ProductFolder(write(tmp_path_factory.mktemp("tail"), labels), image_size=4)


@pytest.mark.parametrize("fraction", [0.05, 0.1, 0.37, 0.5, 0.9])
def test_a_split_by_row_takes_the_same_fraction_of_each_label(long_tail, fraction):
    rest, part = long_tail.split(fraction)
    assert sorted(rows_of(rest) + rows_of(part)) == list(range(86))
    assert rows_of(part) == sorted(rows_of(part)) and rows_of(rest) == sorted(rows_of(rest))
    counts, taken = Counter(long_tail.labels), Counter(part.labels)
    for label, count in counts.items():
        assert taken[label] < count
        assert taken[label] == count - 1 or abs(taken[label] - count * fraction) < 1
    if fraction < 0.9:
        assert len(part) == round(fraction * 86)


@pytest.mark.parametrize("fraction", [0.05, 0.2, 0.5, 0.9])
def test_a_split_by_label_moves_whole_labels(long_tail, fraction):
    rest, part = long_tail.split(fraction, by="label")
    assert sorted(rows_of(rest) + rows_of(part)) == list(range(86))
    assert not set(rest.labels) & set(part.labels)
    # One label more or less would not come closer than half the largest label.
    assert abs(len(part) - fraction * 86) <= 41 / 2 + 1 and len(rest) > 0


def test_a_split_by_label_takes_random_labels_of_the_right_number(tmp_path):
    data = ProductFolder(write(tmp_path, list(range(40)) * 2))
    rest, part = data.split(0.25, by="label")
    assert len(set(part.labels)) == 10 and len(part) == 20 and len(rest) == 60
    assert set(part.labels) not in ({*range(10)}, {*range(30, 40)})


def test_a_split_is_the_same_each_time_and_keeps_the_skipped_rows_on_one_side(tmp_path):
    write(tmp_path, [0, 1] * 20)
    with (tmp_path / "metadata.csv").open("a") as file:
        file.write("\ngone.png,row 40,0,0")
    first, second = (ProductFolder(tmp_path).split(0.3) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert rows_of(one) == rows_of(other) and one.digest == other.digest
    assert rows_of(first[1]) != list(range(12)) and set(np.diff(rows_of(first[1]))) != {2}
    assert len(first[0].skipped) == 1 and first[1].skipped == []


@pytest.mark.parametrize(
    ("labels", "arguments", "message"),
    [
        ([0] * 9, (0.01,), "got 0.01 by row of 9 items with 1 labels, which leaves no item for"),
        ([0, 1, 2], (0.5,), "got 0.5 by row of 3 items with 3 labels, which leaves no item for"),
        ([0] * 9, (0.5, "label"), "got 0.5 by label of 9 items with 1 labels, which leaves no"),
        ([0] * 9, (0.0,), "fraction: got 0.0, expected a number between 0 and 1"),
        ([0] * 9, (1,), "fraction: got 1.0, expected a number between 0 and 1"),
        ([0] * 9, (0.5, "rows"), "by: got 'rows', expected 'row' or 'label'"),
    ],
)
def test_a_split_with_an_empty_part_is_refused(tmp_path, labels, arguments, message):
    data = ProductFolder(write(tmp_path, labels))
    with pytest.raises(ValueError, match=message):
        data.split(*arguments)


class Numbers:
    """A data set without pictures in which the label of an item is its row."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, row):
        image = torch.zeros(3, 1, 1, dtype=torch.uint8)
        return {"image": image, "image_present": False, "text": "row", "label": row}


def epochs(tokenizer, count, batch_size, world, **options):
    """Return the labels of batches [epoch][batch][rank] of two epochs."""
    ranks = []
    for rank in range(world):
        batches = Batches(
            Numbers(count),
            Collate(tokenizer, 1, 4),
            batch_size,
            shuffle=True,
            seed=7,
            rank=rank,
            world=world,
            **options,
        )
        found = []
        for epoch in (0, 1):
            batches.set_epoch(epoch)
            found.append([batch["labels"].tolist() for batch in batches])
            assert len(found[-1]) == len(batches)
        ranks.append(found)
    return [list(zip(*(rank[epoch] for rank in ranks), strict=True)) for epoch in (0, 1)]


@pytest.mark.parametrize(
    ("count", "batch_size", "world"),
    [
        (23, 5, 1),
        (1, 4, 1),
        (64, 64, 1),
        (65, 64, 1),
        (7, 100, 1),
        (31, 6, 3),
        (29, 4, 4),
        (5, 2, 2),
    ],
)
def test_a_spread_epoch_visits_each_row_once(tokenizer, count, batch_size, world):
    first, second = epochs(tokenizer, count, batch_size, world, drop_last=False, spread=True)
    left_out = []
    for epoch in (first, second):
        assert len(epoch) == -(-(count - count % world) // batch_size)
        seen = [row for batch in epoch for rank in batch for row in rank]
        assert len(seen) == len(set(seen)) == count - count % world
        left_out.append(set(range(count)) - set(seen))
        sizes = [[len(rank) for rank in batch] for batch in epoch]
        each = [size[0] for size in sizes]
        assert all(size == [size[0]] * world for size in sizes)
        assert max(each) - min(each) <= 1 and max(each) * world <= batch_size and min(each) > 0
    if count > batch_size:
        assert first != second
    if count % world:
        assert left_out[0] != left_out[1]


@pytest.mark.parametrize(("count", "world"), [(30, 1), (36, 3)])
def test_spread_batches_of_full_size_are_those_without_spread(tokenizer, count, world):
    spread = epochs(tokenizer, count, 6, world, drop_last=False, spread=True)
    assert spread == epochs(tokenizer, count, 6, world, drop_last=True)


def test_a_stream_of_spread_batches_goes_on_from_any_batch(tokenizer):
    batches = Batches(
        Numbers(23), Collate(tokenizer, 1, 4), 5, shuffle=True, drop_last=False, spread=True
    )
    stream = batches.stream()
    expected = [next(stream)["labels"].tolist() for _ in range(15)]
    assert sorted(sum(expected[:5], [])) == sorted(sum(expected[5:10], [])) == list(range(23))
    for position in range(11):
        later = batches.stream(position)
        assert [next(later)["labels"].tolist() for _ in range(4)] == expected[position:][:4]


def test_spread_contradicts_drop_last_and_an_order_without_shuffling(tokenizer):
    collate = Collate(tokenizer, 1, 4)
    for shuffle, drop_last in ((True, True), (False, False)):
        with pytest.raises(ValueError, match=f"spread: got True with drop_last={drop_last} and"):
            Batches(Numbers(9), collate, 3, shuffle=shuffle, drop_last=drop_last, spread=True)
    with pytest.raises(ValueError, match="dataset: got 2 rows for a batch_size of 3, expected at"):
        Batches(Numbers(2), collate, 3, shuffle=True, drop_last=False, spread=True, world=3, rank=0)
