"""The same products in each format are read as the same rows and pictures."""

import io
import json
import os
import pickle
import tarfile

import format_folders as folders
import pytest

from mmfused.data.pictures import BrokenPicture
from mmfused.data.tables import FORMATS, detect_format, open_table

CLASSES = ("shoes", "7", "bags")


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    """Parquet is copied to the cache of datasets."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def rows_of(table):
    return list(
        zip(
            [bool(name) for name in table.columns["image"].to_pylist()],
            table.columns["text"].to_pylist(),
            table.columns["label"].to_pylist(),
            strict=True,
        )
    )


@pytest.mark.parametrize("classes", [("0", "1", "2"), CLASSES[::2]])
@pytest.mark.parametrize("kind", folders.WRITERS)
def test_each_format_gives_the_same_rows_and_pictures(tmp_path, kind, classes):
    products = folders.make_products(17, classes)
    root = folders.WRITERS[kind](tmp_path / "folder", products)
    table = open_table(root)
    assert detect_format(root) == {"csv": "metadata", "tsv": "metadata", "jsonl": "metadata"}.get(
        kind, kind
    )
    assert dict(table.broken) == {} and rows_of(table) == [
        (product.picture is not None, product.text, product.label) for product in products
    ]
    assert len({table.where(row) for row in range(17)}) == 17
    copy = pickle.loads(pickle.dumps(table.pictures))
    prints = []
    for row, product in enumerate(products):
        if product.picture is None:
            with pytest.raises(BrokenPicture, match="the row has no picture|does not exist"):
                table.pictures.read(row)
            continue
        assert table.pictures.read(row) == copy.read(row) == product.picture
        prints.append(table.pictures.fingerprint(row))
    assert len(set(prints)) == len(prints) and {len(value) for value in prints} == {16}
    first = open_table(folders.write_csv(tmp_path / "other", products)).pictures
    assert prints == [first.fingerprint(row) for row in range(17) if products[row].picture]


def test_a_sub_folder_for_each_class(tmp_path):
    products = folders.make_products(7, CLASSES, gaps=False)
    root = folders.write_classes(tmp_path, products)
    (root / "0.png").write_bytes(products[1].picture)
    (root / "bags" / "deep").mkdir()
    (root / "bags" / "deep" / "1.JPG").write_bytes(products[0].picture)
    (root / "bags" / "notes.txt").write_text("no picture")
    (root / "bags" / ".hidden.png").write_text("no picture")
    (root / "empty").mkdir()
    table = open_table(root)
    assert detect_format(root) == "classes" and table.class_names == sorted(CLASSES)
    names = ["0.png"] + [f"7/{row:04d}.{products[row].suffix}" for row in (1, 4)]
    names += [f"bags/{row:04d}.{products[row].suffix}" for row in (2, 5)] + ["bags/deep/1.JPG"]
    names += [f"shoes/{row:04d}.{products[row].suffix}" for row in (0, 3, 6)]
    assert table.columns["image"].to_pylist() == names and table.named_labels is True
    fault = "it is not directly in the folder of a class"
    assert table.broken == {0: fault, 5: fault}
    assert table.columns["label"].to_pylist()[1:5] == ["7", "7", "bags", "bags"]
    assert table.pictures.read(8) == products[6].picture


def test_links_and_odd_names_among_the_folders_of_classes(tmp_path):
    root, picture = tmp_path / "root", folders.make_products(1)[0].picture
    for folder in ("root/a", "root/b", "outside"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "0.jpg").write_bytes(picture)
    os.symlink(root / "b", root / "a" / "cycle")
    os.symlink(root / "a", root / "b" / "cycle")
    os.symlink(root / "a", root / "c")
    os.symlink(tmp_path / "outside", root / "d")
    with open(os.fsencode(root) + b"/b/\xff.jpg", "wb") as file:
        file.write(picture)
    table = open_table(root)
    assert table.columns["image"].to_pylist() == [
        "a/0.jpg",
        "b/0.jpg",
        "b/?.jpg",
        "c/0.jpg",
        "d/0.jpg",
    ]
    assert table.broken == {2: "its name is not UTF-8"}
    assert [table.pictures.read(row) for row in (0, 1, 3)] == [picture] * 3
    with pytest.raises(BrokenPicture, match="it leads outside the folder"):
        table.pictures.read(4)


def test_the_layout_of_glami(tmp_path):
    products = folders.make_products(6, ("7", "20117"), gaps=False)
    root = folders.write_glami(tmp_path, products)
    folders.write_glami(tmp_path, products[:2], "test")
    assert len(open_table(root).columns) == 6 and open_table(root).named_labels is True
    assert len(open_table(root, split="test").columns) == 2
    table = open_table(root / "GLAMI-1M-test.csv", columns={"text": "name", "label": "geo"})
    assert rows_of(table) == [(True, "product", "cz")] * 2
    (root / "GLAMI-1M-test.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no GLAMI-1M-test.csv$"):
        open_table(root, split="test")
    with pytest.raises(ValueError, match="split: got 'val', expected 'train' or 'test'"):
        open_table(root, split="val")


def test_class_labels_of_datasets_are_names_in_their_order(tmp_path):
    import datasets

    label = datasets.ClassLabel(names=["zebra", "ant"])
    dataset = datasets.Dataset.from_dict(
        {"text": ["a", "b", "c", None], "label": [1, 0, -1, None], "coarse_label": [5, 6, 7, 8]}
    ).cast_column("label", label)
    datasets.DatasetDict(train=dataset, test=dataset.select([1])).save_to_disk(tmp_path / "d")
    table = open_table(tmp_path / "d", columns={"image": ""})
    assert table.class_names == ["zebra", "ant"] and table.named_labels is True
    assert rows_of(table)[:2] == [(False, "a", "ant"), (False, "b", "zebra")]
    assert table.columns["coarse_label"].to_pylist() == ["5", "6", "7", "8"]
    assert table.broken == {
        2: "label: got -1, expected an integer from 0 to 1",
        3: "label: got null, expected an integer from 0 to 1",
    }
    assert len(open_table(tmp_path / "d", columns={"image": ""}, split="test").columns) == 1
    with pytest.raises(ValueError, match=r"split: got 'val', expected one of .*'train', 'test'"):
        open_table(tmp_path / "d", columns={"image": ""}, split="val")


def test_pictures_of_arrow_may_be_bytes_or_files(tmp_path):
    import pyarrow
    import pyarrow.parquet

    products = folders.make_products(4, gaps=False)
    names = folders.write_pictures(tmp_path, products)
    (tmp_path / "secret.png").write_bytes(products[1].picture)
    (tmp_path / "in").mkdir()
    os.symlink(tmp_path / "pictures", tmp_path / "in" / "out")
    rest = {
        "title": ["a ", "\0", "c", " d "],
        "more": ["", "x", None, "y"],
        "label": [1.5, 2, 3, 4],
    }
    data = [product.picture for product in products]
    structs = [{"bytes": None, "path": name} for name in names]
    structs[0] = {"bytes": data[0], "path": None}
    unnamed = [{"bytes": picture, "path": None} for picture in data]
    columns = {"text": "title+more", "image": "photo"}
    photos_by_name = {"bytes": data, "names": names, "structs": structs, "unnamed": unnamed}
    for name, photos in photos_by_name.items():
        pyarrow.parquet.write_table(
            pyarrow.table({"photo": photos, **rest}), tmp_path / f"{name}.parquet"
        )
        table = open_table(tmp_path / f"{name}.parquet", columns=columns)
        assert [table.pictures.read(row) for row in range(4)] == data
        assert len({table.pictures.fingerprint(row) for row in range(4)}) == 4
        assert rows_of(table)[::2] == [(True, "a", "1.5"), (True, "c", "3.0")]
        assert rows_of(table)[3][1] == "d y" and table.broken == {1: "it holds a zero byte"}
    outside = [{"bytes": None, "path": path} for path in ("../secret.png", "out/0000.jpg")]
    outside += [{"bytes": None, "path": str(tmp_path / "secret.png")}, {"bytes": b"", "path": None}]
    pyarrow.parquet.write_table(
        pyarrow.table({"photo": outside, **rest}), tmp_path / "in" / "x.parquet"
    )
    table = open_table(tmp_path / "in", columns=columns)
    reasons = []
    for row in range(4):
        with pytest.raises(BrokenPicture) as caught:
            table.pictures.fingerprint(row)
        reasons.append(str(caught.value))
    assert reasons[:3] == ["it leads outside the folder"] * 3 and "not a picture" in reasons[3]


def test_dictionaries_nulls_and_names_of_files_in_parquet(tmp_path):
    import pyarrow
    import pyarrow.parquet

    products = folders.make_products(3, gaps=False)
    table = pyarrow.table(
        {
            "file_name": folders.write_pictures(tmp_path, products),
            "text": pyarrow.array(["a", "b", "a"]).dictionary_encode(),
            "more": pyarrow.nulls(3),
            "label": pyarrow.array(["x", None, " y"]).dictionary_encode(),
        }
    )
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    pyarrow.parquet.write_table(table.slice(0, 1), tmp_path / ".hidden.parquet")
    table = open_table(tmp_path, columns={"text": "more+text"})
    assert rows_of(table)[::2] == [(True, "a", "x"), (True, "a", "y")]
    assert table.broken == {1: "label: got null, expected a string or a number"}
    assert table.pictures.read(2) == products[2].picture
    assert not open_table(tmp_path, needs_label=False).broken


def test_a_parquet_file_that_was_written_again_is_read_again(tmp_path):
    import pyarrow
    import pyarrow.parquet

    for text in ("old", "new"):
        table = pyarrow.table({"text": [text], "label": [0]})
        pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
        read = open_table(tmp_path / "a.parquet", columns={"image": ""})
        assert read.columns["text"].to_pylist() == [text]


def test_parquet_files_called_like_splits(tmp_path):
    products = folders.make_products(9, gaps=False)
    tmp_path = tmp_path / "a[1]*"  # a pattern to datasets
    folders.write_parquet(tmp_path / "data", products)
    folders.dataset_of(products[:2]).to_parquet(str(tmp_path / "data" / "test-0.parquet"))
    assert len(open_table(tmp_path).columns) == 9
    assert len(open_table(tmp_path, split="test").columns) == 2
    with pytest.raises(ValueError, match=r"split: got 'val', expected one of .*: test, train"):
        open_table(tmp_path, split="val")


def test_the_columns_of_tars_are_members_or_fields(tmp_path):
    products = folders.make_products(3, gaps=False)
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for row, product in enumerate(products):
            fields = {"title": f"t{row}", "brand": "b", "image": {"width": 12}, "class": row}
            folders.add_member(tar, f"x/{row}.left.{product.suffix}", product.picture)
            folders.add_member(tar, f"x/{row}.caption.TXT", b"\xef\xbb\xbfcaption\n")
            folders.add_member(tar, f"x/{row}.json", json.dumps(fields).encode())
            folders.add_member(tar, "x/.DS_Store", b"")
    columns = {"image": "left.png", "text": "brand+title", "label": "class"}
    table = open_table(tmp_path / "a.tar", columns=columns)
    assert rows_of(table) == [(False, "b t0", "0"), (True, "b t1", "1"), (False, "b t2", "2")]
    assert table.pictures.read(1) == products[1].picture
    table = open_table(tmp_path, columns={**columns, "text": "caption.txt"})
    assert [row[1] for row in rows_of(table)] == ["caption"] * 3
    with pytest.raises(
        ValueError, match="no column image, text, only left.jpg, caption.txt, json, title, b"
    ):
        open_table(tmp_path, columns={"label": "class"})


def test_labels_may_be_missing_where_none_are_needed(tmp_path):
    (tmp_path / "a.csv").write_text("file_name,text\n,mug\n")
    (tmp_path / "a.jsonl").write_text('{"file_name": null, "text": "mug"}\n')
    table = open_table(tmp_path / "a.jsonl", columns={"label": ""}, needs_label=False)
    assert rows_of(table) == [(False, "mug", "")]
    (tmp_path / "b.jsonl").write_text('{"file_name": null, "text": "mug", "label": null}\n')
    assert not open_table(tmp_path / "b.jsonl", needs_label=False).broken
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        folders.add_member(tar, "0.txt", b"mug")
        folders.add_member(tar, "0.jpg", b"mug")
    for name in ("a.csv", "a.jsonl", "a.tar"):
        table = open_table(tmp_path / name, needs_label=False)
        assert rows_of(table) == [(name == "a.tar", "mug", "")] and not table.broken
        with pytest.raises(ValueError, match=r"label.*(file_name|txt), (text|jpg)") as caught:
            open_table(tmp_path / name)
        assert "\n" not in str(caught.value)
        with pytest.raises(ValueError, match="without kind|no column kind"):
            open_table(tmp_path / name, columns={"label": "kind"}, needs_label=False)


def test_the_format_is_detected_or_refused(tmp_path):
    assert set(FORMATS) == {"metadata", "arrow", "parquet", "webdataset", "classes", "glami"}
    with pytest.raises(ValueError, match="format: got 'coco', expected metadata, arrow, parquet"):
        open_table(tmp_path, format="coco")
    with pytest.raises(FileNotFoundError, match="gone does not exist, expected a folder with im"):
        open_table(tmp_path / "gone")
    with pytest.raises(ValueError, match="got none of the known files, expected a folder with im"):
        open_table(tmp_path)
    product = folders.make_products(1)[0]
    for name in ("images", "more"):
        (tmp_path / name / "deep").mkdir(parents=True)
        (tmp_path / name / "deep" / "0.jpg").write_bytes(product.picture)
        (tmp_path / name / "0.jpg").write_bytes(product.picture)
        if name == "images":
            with pytest.raises(ValueError, match="got none of the known files"):
                detect_format(tmp_path)
    assert detect_format(tmp_path) == "classes"
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(ValueError, match="got none of the known files"):
        detect_format(tmp_path)
    with pytest.raises(ValueError, match="a.json: got a file of an unknown format, expected a fol"):
        open_table(tmp_path / "a.json")
    (tmp_path / "b.tar").touch()
    (tmp_path / "b.parquet").touch()
    with pytest.raises(ValueError, match="got files of parquet and webdataset, expected the forma"):
        open_table(tmp_path)
    (tmp_path / "metadata.csv").write_text("file_name,text,label\n")
    assert detect_format(tmp_path) == "metadata"
    (tmp_path / "metadata.jsonl").touch()
    with pytest.raises(ValueError, match="got metadata.csv and metadata.jsonl, expected one of th"):
        open_table(tmp_path)


@pytest.mark.parametrize("format", FORMATS)
def test_a_folder_without_the_files_of_the_format(tmp_path, format):
    for path in (tmp_path, tmp_path / "gone", tmp_path / "file.txt"):
        if path.suffix:
            path.write_text("text")
        with pytest.raises((ValueError, FileNotFoundError)) as caught:
            table = open_table(path, format=format)
            raise ValueError(f"{path.name} {table.broken[0]}")  # of a tar that is none
        assert str(path.name) in str(caught.value) and "\n" not in str(caught.value)
        assert type(caught.value) in (ValueError, FileNotFoundError)


def compressed(tar):
    import gzip

    return gzip.compress(tar)


def test_compressed_tars_are_refused(tmp_path):
    folders.write_tars(tmp_path, folders.make_products(3), 1)
    data = (tmp_path / "part-0000.tar").read_bytes()
    (tmp_path / "part-0000.tar").write_bytes(compressed(data))
    with pytest.raises(ValueError, match="got a compressed tar, expected one without compression"):
        open_table(tmp_path)


def test_a_tar_that_is_cut_anywhere_is_read_up_to_there(tmp_path):
    products = folders.make_products(4, size=8)
    folders.write_tars(tmp_path, products, 1)
    path = tmp_path / "part-0000.tar"
    data = path.read_bytes()
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        members = [(int(m.name[4:8]), m.offset_data + m.size) for m in tar]
    ends = [max(end for row, end in members if row == index) for index in range(4)]
    end = 512 * -(-ends[-1] // 512)
    folders.write_tars(tmp_path / "more", products[:1], 1)
    (tmp_path / "more" / "part-0000.tar").rename(tmp_path / "z.tar")
    for cut in [*range(0, end + 1024, 512), *ends, ends[1] - 1]:
        path.write_bytes(data[:cut])
        table = open_table(tmp_path, needs_label=False)
        is_whole = cut >= end + 512
        # A row without a picture or a text may have lost it, unless another row follows.
        good = sum(cut >= value for value in ends)
        lost = next((row for row in (good - 1,) if row >= 0 and not is_whole), None)
        if lost is not None and (products[lost].picture is None or not products[lost].text):
            following = [position for row, position in members if row == lost + 1]
            good -= not (following and cut >= following[0])
        found = [row for row in range(len(table.columns)) if row not in table.broken]
        assert len(found) == good + 1, cut
        for row, index in zip(found, [*range(good), 0], strict=True):
            assert rows_of(table)[row] == (
                products[index].picture is not None,
                products[index].text,
                products[index].label,
            )
            if products[index].picture is not None:
                assert table.pictures.read(row) == products[index].picture
        assert len(table.broken) == (0 if is_whole else 1)
        if not is_whole:
            assert table.where(good) == "part-0000.tar" and "tar is cut" in table.broken[good]
