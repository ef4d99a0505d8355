"""Streamed product folders: the same batches as from memory, in threads that come and go."""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import os
import pickle
import signal
import tarfile
import threading
import time
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from mmfused.data import Batches, Collate, ProductFolder, load_picture, swap_texts, train_tokenizer
from mmfused.data import folder as folder_module
from mmfused.data import items as items_module
from mmfused.data.items import Items, StreamedItems, make_items
from mmfused.data.pictures import BrokenPicture

ROWS = 23
WORDS = "red blue green mug plate bowl of old white clay with a handle".split()


def picture(seed, kind="JPEG"):
    rng = np.random.default_rng(seed)
    height, width = rng.integers(20, 70, 2)
    file = BytesIO()
    Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(file, kind)
    return file.getvalue()


def write(root, rows=ROWS):
    """Write a folder in which each fifth row has no picture and each seventh has no text."""
    lines = ["file_name,text,label"]
    for row in range(rows):
        name = "" if row % 5 == 1 else f"{row}.jpg"
        if name:
            (root / name).write_bytes(picture(row, ("JPEG", "PNG")[row % 2]))
        text = "" if row % 7 == 3 else " ".join(WORDS[: 1 + row % len(WORDS)])
        lines.append(f"{name},{text},{row % 3}")
    (root / "metadata.csv").write_text("\n".join(lines))
    return root


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write(tmp_path_factory.mktemp("products"))


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([" ".join(WORDS)], vocab_size=200)


def assert_equal(batches, expected):
    batches, expected = list(batches), list(expected)
    assert len(batches) == len(expected) > 0
    for batch, other in zip(batches, expected, strict=True):
        assert batch.keys() == other.keys()
        for key, value in batch.items():
            assert value.dtype == other[key].dtype and torch.equal(value, other[key]), key


def pictures_threads():
    return [t for t in threading.enumerate() if t.name.startswith("mmfused-pictures")]


def wait_for_no_threads():
    deadline = time.monotonic() + 10
    while pictures_threads() and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.01)
    return not pictures_threads()


@pytest.mark.parametrize("augment", ["none", "light", "strong"])
@pytest.mark.parametrize(
    ("resize", "size", "workers"),
    [("crop", 16, 1), ("stretch", 16, 4), ("shortest", 16, 3), ("crop", 21, 4), ("crop", 40, 2)],
)
def test_streamed_batches_are_those_from_memory(root, tokenizer, augment, resize, size, workers):
    collate = Collate(tokenizer, 16, 8, augment=augment, seed=3, resize=resize)
    memory, streamed = (
        Batches(
            ProductFolder(root, image_size=size, resize=resize, stream=stream),
            collate,
            6,
            shuffle=True,
            seed=1,
            drop_last=False,
            workers=workers,
        )
        for stream in (False, True)
    )
    assert type(memory.items) is Items and isinstance(streamed.items, StreamedItems)
    for epoch in (0, 2):
        memory.set_epoch(epoch), streamed.set_epoch(epoch)
        assert_equal(streamed, memory)


def test_streamed_pictures_without_image_size_get_the_size_of_the_batches(root, tokenizer):
    collate = Collate(tokenizer, 16, 8, resize="stretch", resample="bicubic")
    streamed = make_items(ProductFolder(root, stream=True), collate)
    memory = Items(ProductFolder(root, image_size=16, resize="stretch"), collate)
    rows = torch.tensor([4, 0, 1, 22])
    assert_equal([streamed.batch(rows)], [memory.batch(rows)])


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize(("padding", "truncation"), [("left", "left"), ("right", "right")])
def test_tokens_are_those_of_the_texts_of_the_batch(root, monkeypatch, cached, padding, truncation):
    if not cached:
        monkeypatch.setattr(items_module, "TOKENISED", ROWS - 1)
    monkeypatch.setattr(items_module, "BLOCK", 5)
    tokenizer = train_tokenizer([" ".join(WORDS)], vocab_size=200)
    tokenizer.padding_side = padding
    collate = Collate(
        tokenizer, 16, 9, format_text=lambda text: f"a {text}", truncation_side=truncation
    )
    data = ProductFolder(root, image_size=16, stream=True)
    items = make_items(data, collate)
    for rows in ([2, 0], [2, 5, 12, 12], [22, 1, 3, 20], []):
        batch = items.batch(torch.tensor(rows, dtype=torch.int64))
        if rows:
            texts = [f"a {data.texts[row]}" for row in rows]
            tokenizer.truncation_side = truncation
            out = tokenizer(texts, padding=True, truncation=True, max_length=9, return_tensors="pt")
            assert torch.equal(batch["input_ids"], out["input_ids"])
            assert torch.equal(batch["attention_mask"], out["attention_mask"])
        assert batch["input_ids"].dtype == batch["attention_mask"].dtype == torch.int64
        assert len(batch["input_ids"]) == len(batch["pixel_values"]) == len(rows)


def test_a_streamed_set_reads_like_one_in_memory(root):
    memory, streamed = (ProductFolder(root, image_size=16, stream=s) for s in (False, True))
    assert streamed.streamed and not memory.streamed and streamed.lost == []
    assert len(streamed) == ROWS and streamed.texts == memory.texts
    assert streamed.labels == memory.labels and streamed.present == memory.present
    assert len(streamed.images) == ROWS
    for row in (0, 1, 7, -1):
        item, expected = streamed[row], memory[row]
        assert torch.equal(item.pop("image"), expected.pop("image")) and item == expected
        assert torch.equal(streamed.images[row], memory.images[row])
    assert torch.equal(torch.stack(streamed.images[2:9:3]), memory.images[2:9:3])
    assert torch.equal(
        streamed.load_image(3, 11, "stretch", "bilinear"),
        load_picture(root / "3.jpg", 11, resize="stretch", resample="bilinear"),
    )
    with pytest.raises(BrokenPicture, match="the row has no picture"):
        streamed.load_image(1, 11)
    with pytest.raises(IndexError):
        streamed.images[ROWS]


def test_pictures_of_more_than_the_limit_are_streamed(root, monkeypatch):
    monkeypatch.setattr(folder_module, "IN_MEMORY", ROWS * 3 * 16**2)
    assert not ProductFolder(root, image_size=16).streamed
    assert ProductFolder(root, image_size=17).streamed
    assert not ProductFolder(root).streamed
    assert not ProductFolder(root, image_size=17, stream=False).streamed
    monkeypatch.setattr(folder_module, "physical_memory", lambda: 10)
    assert ProductFolder(root, image_size=17).streamed
    with pytest.raises(ValueError, match="got 23 rows, which need 0.0 GiB at image_size 17"):
        ProductFolder(root, image_size=17, stream=False)


@pytest.mark.parametrize("position", [0, 1, 3, 4, 9])
def test_a_stream_resumes_at_any_position(root, tokenizer, position):
    collate = Collate(tokenizer, 16, 8, augment="strong")
    data = ProductFolder(root, image_size=16, stream=True)
    batches = Batches(
        data, collate, 6, shuffle=True, seed=5, drop_last=False, spread=True, workers=2
    )
    whole, later = batches.stream(), batches.stream(position)
    expected = [next(whole) for _ in range(position + 6)][position:]
    assert_equal([next(later) for _ in range(6)], expected)


def test_the_fingerprint_is_that_of_the_same_files_in_both_modes(tmp_path):
    write(tmp_path, 6)
    memory, streamed = (ProductFolder(tmp_path, image_size=8, stream=s) for s in (False, True))
    assert memory.fingerprint == streamed.fingerprint == streamed.digest != memory.digest
    seen = {streamed.digest}
    (tmp_path / "3.jpg").write_bytes(picture(99))
    seen.add(ProductFolder(tmp_path, stream=True).digest)
    table = (tmp_path / "metadata.csv").read_text()
    for old, new in (("red blue", "red bluE"), (",2", ",1"), ("2.jpg", "0.jpg")):
        (tmp_path / "metadata.csv").write_text(table.replace(old, new))
        seen.add(ProductFolder(tmp_path, stream=True).digest)
    assert len(seen) == 5


def test_the_digest_of_a_set_in_memory_is_that_of_earlier_versions(tmp_path):
    write(tmp_path, 4)
    total = hashlib.sha256()
    for row, text in enumerate(["red", "red blue", "red blue green", ""]):
        file = tmp_path / f"{row}.jpg"
        digest = hashlib.sha256(file.read_bytes()).hexdigest() if row != 1 else None
        total.update(json.dumps([text, row % 3, 0, digest]).encode())
    assert ProductFolder(tmp_path).digest == total.hexdigest()


def test_rows_without_a_usable_file_are_skipped_at_the_start(tmp_path):
    write(tmp_path, 3)
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "note.jpg").write_text("no picture at all")
    (tmp_path / "folder.jpg").mkdir()
    names = ["0.jpg", "gone.jpg", "empty.jpg", "note.jpg", "folder.jpg", "../x.jpg", "gone.jpg"]
    table = "".join(f"{name},tea {row},{row}\n" for row, name in enumerate(names))
    (tmp_path / "metadata.csv").write_text("file_name,text,label\n" + table)
    memory, streamed = (ProductFolder(tmp_path, image_size=8, stream=s) for s in (False, True))
    assert streamed.skipped == memory.skipped and len(streamed.skipped) == 6
    assert streamed.skipped[0] == (
        "metadata.csv line 3 (gone.jpg): the image cannot be read: the file does not exist"
    )
    assert streamed.texts == ["tea 0"] and streamed.num_classes == 1
    for stream in (False, True):
        with pytest.raises(ValueError) as caught:
            ProductFolder(tmp_path, image_size=8, stream=stream, strict=True)
        assert str(caught.value) == streamed.skipped[0]


def test_each_file_is_checked_once(tmp_path, monkeypatch):
    write(tmp_path, 1)
    (tmp_path / "metadata.csv").write_text("file_name,text,label\n" + "0.jpg,tea,0\n" * 50)
    calls = []
    check = folder_module.FilePictures.fingerprint
    monkeypatch.setattr(
        folder_module.FilePictures,
        "fingerprint",
        lambda self, row: calls.append(row) or check(self, row),
    )
    assert len(ProductFolder(tmp_path, image_size=8, stream=True)) == 50 and calls == [0]


def test_pictures_of_one_name_in_two_tars_are_two_pictures(tmp_path):
    digests = set()
    for seed in (1, 3):
        for tar, number in (("a.tar", 0), ("b.tar", seed)):
            with tarfile.open(tmp_path / tar, "w") as file:
                for name, data in (("x.jpg", picture(number)), ("x.txt", b"tea"), ("x.cls", b"0")):
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    file.addfile(member, BytesIO(data))
        data = ProductFolder(tmp_path, image_size=16, stream=True)
        for row, number in enumerate((0, seed)):
            assert torch.equal(data[row]["image"], load_picture(picture(number), 16))
        digests.add(data.digest)
    assert len(digests) == 2


@pytest.mark.parametrize("workers", [1, 4])
def test_a_picture_that_breaks_later_becomes_a_missing_one(tmp_path, tokenizer, workers, caplog):
    write(tmp_path)
    data = ProductFolder(tmp_path, image_size=16, stream=True)
    part = data.select(range(ROWS))
    broken = [row for row in range(10, ROWS) if data.present[row]]
    for row in broken:
        cut = (tmp_path / f"{row}.jpg").read_bytes()[:200]
        (tmp_path / f"{row}.jpg").write_bytes(cut)
    collate = Collate(tokenizer, 16, 8, augment="light")
    batches = Batches(part, collate, 6, shuffle=False, drop_last=False, workers=workers)
    with caplog.at_level(logging.WARNING):
        first, second = list(batches), list(batches)
    assert_equal(first, second)
    present = torch.cat([batch["image_present"] for batch in first])
    pixels = torch.cat([batch["pixel_values"] for batch in first])
    assert present.tolist() == [has and row not in broken for row, has in enumerate(data.present)]
    assert not pixels[~present].any() and pixels[present].flatten(1).any(1).all()
    assert torch.equal(batches.items.present, present)
    texts = tokenizer(list(data.texts), truncation=True, max_length=8)["input_ids"]
    lengths = torch.cat([batch["attention_mask"].sum(1) for batch in first])
    assert lengths.tolist() == [len(ids) for ids in texts]
    # Shared with the set of which it is a part, each row once.
    assert data.lost == part.lost and len(data.lost) == len(broken) == 10
    lines = sorted(int(sentence.split()[2]) for sentence in data.lost)
    assert lines == [row + 2 for row in broken]
    sentence = next(s for s in data.lost if "(10.jpg)" in s)
    assert sentence.startswith("metadata.csv line 12 (10.jpg): the image cannot be read: ")
    logged = [record.getMessage() for record in caplog.records]
    assert len(logged) == 6 and set(logged[:5]) < set(data.lost)
    assert data[10]["image_present"] is False and not data[10]["image"].any()


def test_an_error_in_a_thread_is_raised_as_itself(root, tokenizer, monkeypatch):
    data = ProductFolder(root, image_size=16, stream=True)
    batches = Batches(data, Collate(tokenizer, 16, 8), 6, shuffle=False, drop_last=False)
    read = data._pictures.read

    def fails(row):
        if row == 14:
            raise OSError(5, "the disk is on fire")
        return read(row)

    monkeypatch.setattr(data._pictures, "read", fails)
    stream = iter(batches)
    assert len(next(stream)["labels"]) == len(next(stream)["labels"]) == 6
    with pytest.raises(OSError, match="the disk is on fire"):
        next(stream)
    assert data.lost == [] and wait_for_no_threads()


def test_threads_end_with_the_iterator_and_read_ahead_is_bounded(root, tokenizer, monkeypatch):
    data = ProductFolder(root, image_size=16, stream=True)
    batches = Batches(data, Collate(tokenizer, 16, 8), 2, shuffle=False, drop_last=False, workers=3)
    before = threading.active_count()
    stream = batches.stream()
    started = []
    start = batches.items.start
    monkeypatch.setattr(batches.items, "start", lambda rows: started.append(rows) or start(rows))
    for _ in range(5):
        next(stream)
    assert len(started) == 5 + 4 and 1 <= len(pictures_threads()) <= 3
    del stream
    assert wait_for_no_threads() and threading.active_count() == before
    list(batches), batches.items.batch(torch.arange(7))  # also after a whole epoch
    assert wait_for_no_threads() and threading.active_count() == before


@pytest.fixture
def blocked(root, tokenizer, monkeypatch):
    """Return items whose only thread waits in its first read, the rows read, and the event."""
    data = ProductFolder(root, image_size=16, stream=True)
    read, go, calls = data._pictures.read, threading.Event(), []

    def slow(row):
        calls.append(row)
        assert go.wait(10)
        return read(row)

    monkeypatch.setattr(data._pictures, "read", slow)
    return StreamedItems(data, Collate(tokenizer, 16, 8), workers=1), calls, go


def test_waiting_pictures_are_dropped_with_the_iterator(blocked):
    items, calls, go = blocked
    reading = [items.start(torch.arange(5)) for _ in range(3)]
    while not calls:
        time.sleep(0.001)
    del reading
    go.set()
    assert wait_for_no_threads() and calls == [0]


@pytest.mark.usefixtures("default_sigint_handler")
def test_an_interrupt_ends_the_wait_for_pictures(blocked):
    items, calls, go = blocked

    def interrupt():
        while not calls:
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        items.batch(torch.arange(5))
    go.set()
    assert wait_for_no_threads() and calls == [0]


def test_few_large_batches_are_read_ahead(root, tokenizer):
    data = ProductFolder(root, image_size=512, stream=True)
    collate = Collate(tokenizer, 512, 8)

    def ahead(batch_size):
        return StreamedItems(data, collate, batch_size=batch_size).ahead

    # 2**28 bytes are 341 pictures of this size.
    assert [ahead(size) for size in (1, 85, 86, 170, 171, 1000)] == [4, 4, 3, 2, 1, 1]
    for workers in (0, -1):
        with pytest.raises(ValueError, match=f"workers: got {workers}, expected an integer of"):
            StreamedItems(data, collate, workers)


def test_swapped_texts_of_a_streamed_set_are_streamed(root, tokenizer):
    collate = Collate(tokenizer, 16, 8, augment="strong")
    batches = [
        Batches(
            swap_texts(ProductFolder(root, image_size=16, stream=stream), 0.5, seed=1).select(
                [3, 1, 4, 15, 9, 2]
            ),
            collate,
            4,
            shuffle=True,
            drop_last=False,
        )
        for stream in (False, True)
    ]
    assert isinstance(batches[1].items, StreamedItems)
    assert_equal(batches[1], batches[0])
    swapped = swap_texts(ProductFolder(root, stream=True), 0.5, seed=1)
    part = swapped.select([3, 1, 4, 15, 9, 2])
    assert part.texts == [swapped.texts[row] for row in (3, 1, 4, 15, 9, 2)]
    assert 0 < len(part.swapped) == len(part.donors) < 6
    for row, donor in zip(part.swapped, part.donors, strict=True):
        assert part[row]["text"] == swapped.dataset.texts[donor]
    assert part.labels == part.dataset.labels and len(part) == 6
    assert part.fingerprint != part.dataset.fingerprint != swapped.fingerprint


def test_only_pictures_that_are_there_start_threads(root, tokenizer):
    items = make_items(ProductFolder(root, stream=True), Collate(tokenizer, 16, 8))
    reading = items.start(torch.tensor([1, 6, 1]))
    assert not pictures_threads()
    assert items.finish(reading)["image_present"].tolist() == [False] * 3


def test_strict_reading_stops_at_the_first_fault(tmp_path, monkeypatch):
    write(tmp_path, 1)
    lines = ["file_name,text,label", *["0.jpg,tea,0"] * 200]
    reads = []
    read = folder_module.FilePictures.read
    monkeypatch.setattr(
        folder_module.FilePictures, "read", lambda self, row: reads.append(row) or read(self, row)
    )
    for fault in ("gone.jpg,tea,0", "0.jpg,tea,-1"):
        lines[4] = fault
        (tmp_path / "metadata.csv").write_text("\n".join(lines))
        reads.clear()
        with pytest.raises(ValueError, match="metadata.csv line 5"):
            ProductFolder(tmp_path, strict=True)
        assert len(reads) <= 3 + 4 * 8 + 1  # what the threads read in advance
    assert sorted(reads) == [0, 1, 2]


def test_a_streamed_set_can_be_pickled(root):
    data = ProductFolder(root, image_size=16, stream=True)
    again = pickle.loads(pickle.dumps(data.select([2, 5])))
    assert again.texts == [data.texts[2], data.texts[5]]
    assert torch.equal(again[1]["image"], data[5]["image"])


def test_a_derived_class_makes_its_own_items(root, tokenizer):
    class Loud(ProductFolder):
        def __getitem__(self, index):
            return {**super().__getitem__(index), "label": 7}

    items = Items(Loud(root, image_size=16), Collate(tokenizer, 16, 8))
    assert items.batch(torch.tensor([0, 4]))["labels"].tolist() == [7, 7]
