"""Folders of pictures: decoding in threads, memory, digests and unsafe file names."""

import os
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from mmfused.data import Collate, ProductFolder, load_picture, swap_texts, train_tokenizer
from mmfused.data.batches import Items
from mmfused.data.pictures import BrokenPicture


def saved(picture, kind, **options):
    file = BytesIO()
    Image.fromarray(picture).save(file, kind, **options)
    return file.getvalue()


def noise(height=48, width=64, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def test_all_threads_refuse_truncated_pictures(monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    whole, cut = saved(noise(400, 400), "PNG"), saved(noise(400, 400), "PNG")[:300_000]

    def refused(_):
        load_picture(whole)
        with pytest.raises(BrokenPicture):
            load_picture(cut)
        return True

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(refused, range(60)))
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


def test_a_refused_folder_leaves_no_file_open(tmp_path):
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    for _ in range(30):
        with pytest.raises(BrokenPicture, match="it is not a regular file"):
            load_picture(tmp_path)
    assert before == 0 or len(os.listdir("/proc/self/fd")) <= before + 2


def write_folder(folder, count=5, side=40, kind="JPEG"):
    lines = ["file_name,text,label"]
    for row in range(count):
        (folder / f"{row}.jpg").write_bytes(saved(noise(side, side + 10, seed=row), kind))
        lines.append(f"{row}.jpg,thing {row},{row % 2}")
    (folder / "metadata.csv").write_text("\n".join([*lines, ",no photo,1"]))
    return folder


def test_wrappers_of_a_product_folder_share_its_images(tmp_path):
    data = ProductFolder(write_folder(tmp_path), image_size=16)
    assert (
        data.images.shape == (6, 3, 16, 16)
        and not data.images[5].any()
        and data[5]["image_present"] is False
    )
    for row in range(5):
        assert torch.equal(data[row]["image"], load_picture(tmp_path / f"{row}.jpg", 16))
    tokenizer = train_tokenizer(data.texts)
    for dataset in (data, swap_texts(data, 0.5, 0)):
        for augment in (False, True):
            items = Items(dataset, Collate(tokenizer, 16, 8, augment=augment))
            assert items.images.data_ptr() == data.images.data_ptr() and len(items) == 6


def test_images_that_exceed_the_memory_are_refused_before_decoding(tmp_path, monkeypatch):
    monkeypatch.setattr("mmfused.data.folder.physical_memory", lambda: 10_000)
    with pytest.raises(
        ValueError,
        match="got 6 rows, which need 0.0 GiB at image_size 64, expected at most the 0.0 GiB",
    ):
        ProductFolder(write_folder(tmp_path), image_size=64)


def test_the_digest_depends_on_texts_labels_and_pictures(tmp_path):
    write_folder(tmp_path)
    digests = {ProductFolder(tmp_path, image_size=8).digest, ProductFolder(tmp_path).digest}
    assert len(digests) == 1  # the digest does not depend on image_size
    swapped = swap_texts(ProductFolder(tmp_path), 0.5, 0).digest
    assert (
        swapped
        == swap_texts(ProductFolder(tmp_path), 0.5, 0).digest
        != swap_texts(ProductFolder(tmp_path), 0.5, 1).digest
    )
    rows = (tmp_path / "metadata.csv").read_text()
    (tmp_path / "3.jpg").write_bytes(saved(noise(seed=9), "PNG"))
    digests.add(ProductFolder(tmp_path).digest)
    (tmp_path / "metadata.csv").write_text(rows.replace("thing 1", "thing one"))
    digests.add(ProductFolder(tmp_path).digest)
    (tmp_path / "metadata.csv").write_text(rows.replace("thing 1,1", "thing 1,0"))
    digests.add(ProductFolder(tmp_path).digest)
    assert len(digests | {swapped}) == 5


def test_file_names_that_lead_outside_the_folder_are_skipped(tmp_path):
    root = tmp_path / "data"
    root.mkdir()
    write_folder(root)
    (tmp_path / "secret.jpg").write_bytes(saved(noise(), "JPEG"))
    (root / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    (root / "near.jpg").symlink_to(root / "0.jpg")
    names = [
        "../secret.jpg",
        str(tmp_path / "secret.jpg"),
        "link.jpg",
        "a/../../secret.jpg",
        "near.jpg",
        "./1.jpg",
    ]
    (root / "metadata.csv").write_text(
        "file_name,text,label\n" + "".join(f"{name},a,0\n" for name in names)
    )
    (tmp_path / "alias").symlink_to(root)
    for folder in (root, tmp_path / "alias"):
        data = ProductFolder(folder, image_size=8)
        assert data.file_names == ["near.jpg", "./1.jpg"]
        assert (
            all("leads outside the folder" in sentence for sentence in data.skipped)
            and len(data.skipped) == 4
        )
