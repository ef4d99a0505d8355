"""Files of embeddings against numpy's and pyarrow's own functions; damaged files; the commands."""

import json
import os
import re
import sys
import weakref
import zipfile
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from mmfused.cli import embedding_files, main, model_source
from mmfused.cli.embedding_files import VIEWS, read_embeddings, write_npz, write_parquet
from mmfused.data.ragged import Ragged
from mmfused.training.pair_metrics import Pairs, pair_scores
from mmfused.training.retrieval_metrics import mean_scores, retrieval_scores

NAMES = ["a.jpg", "", "föö/长.png", "b", "c", "d", "e"]
SKIPPED = ["line 4: no picture"]


def make_items(rows=7, width=3):
    draw = torch.Generator().manual_seed(rows)
    views = {
        view: torch.randint(-9, 9, (rows, width), generator=draw).float()
        for view in ("image", "text", "both")
    }
    has = {name: torch.arange(rows) % n > 0 for name, n in (("has_image", 3), ("has_text", 4))}
    return {**views, **has, "labels": torch.arange(rows) % 3}


class PartsOf:
    """Items in parts of some rows; counts the parts that are in memory."""

    def __init__(self, items, size):
        rows = len(items["has_image"])
        self.slices = [slice(i, min(i + size, rows)) for i in range(0, rows, size)]
        self.items = items
        self.alive = weakref.WeakSet()
        self.most = 0

    def __len__(self):
        return len(self.slices)

    def __getitem__(self, index):
        return {name: self.column(name, index) for name in self.items}

    def column(self, name, index):
        copy = self.items[name][self.slices[index]].clone()
        self.alive.add(copy)
        self.most = max(self.most, len(self.alive))
        return copy


@pytest.mark.parametrize("size", [3, 7])
def test_npz_equals_that_of_numpy(tmp_path, size, monkeypatch):
    monkeypatch.setattr(embedding_files, "NAMES", 2)
    items, parts = make_items(), PartsOf(make_items(), size)
    whole = {name: x.numpy() for name, x in items.items()}
    whole |= {"file_names": np.array(NAMES), "skipped": np.array(json.dumps(SKIPPED))}
    pairs = {"task_names": np.array(["one", "other"])}
    np.savez(tmp_path / "whole.npz", **whole, **pairs)
    for name in ("a.npz", "b.npz"):
        write_npz(tmp_path / name, parts, 7, NAMES, SKIPPED, pairs)
    with np.load(tmp_path / "whole.npz") as expected, np.load(tmp_path / "a.npz") as found:
        assert found.files == expected.files
        for name in expected.files:
            assert found[name].dtype == expected[name].dtype
            assert np.array_equal(found[name], expected[name])
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.npz") as archive:
        assert {info.date_time[0] for info in archive.infolist()} == {1980}


def test_parquet_has_a_row_per_item_and_a_row_group_per_part(tmp_path):
    items = make_items()
    write_parquet(tmp_path / "a.parquet", PartsOf(items, 3), NAMES, SKIPPED)
    file = pq.ParquetFile(tmp_path / "a.parquet")
    groups = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    assert groups == [3, 3, 1]
    table = file.read()
    assert json.loads(table.schema.metadata[b"skipped"]) == SKIPPED
    assert str(table.schema.field("both").type) == "fixed_size_list<element: float>[3]"
    expected = {name: x.tolist() for name, x in items.items() if name != "labels"}
    assert table.to_pydict() == {**expected, "label": items["labels"].tolist(), "file_name": NAMES}


@pytest.mark.parametrize("suffix", ["npz", "parquet"])
def test_parts_are_joined_one_at_a_time(tmp_path, suffix):
    parts = PartsOf(make_items(rows=60), 1)
    names = [""] * 60
    path = tmp_path / f"a.{suffix}"
    if suffix == "npz":
        write_npz(path, parts, 60, names, SKIPPED)
    else:
        write_parquet(path, parts, names, SKIPPED)
    # A part has six tensors; 60 parts have 360.
    assert parts.most <= 3 * len(parts.items)


@pytest.fixture(params=["npz", "parquet"])
def path(request, tmp_path):
    return write(tmp_path / f"a.{request.param}", make_items())


def write(path, items, **pairs):
    names = [""] * len(items["has_image"])
    if path.suffix == ".npz":
        write_npz(path, PartsOf(items, 4), len(names), names, SKIPPED, pairs)
    else:
        write_parquet(path, PartsOf(items, 4), names, SKIPPED)
    return path


def test_files_are_read_as_they_were_written(path):
    found = read_embeddings(path, "embeddings")
    assert found.skipped == SKIPPED and found.pairs is None and found.width == 3
    assert found.items.keys() == make_items().keys()
    for name, x in make_items().items():
        assert found.items[name].dtype == x.dtype and found.items[name].equal(x)


def test_truncated_and_missing_files_are_refused(path):
    for size in (os.path.getsize(path) - 9, 200, 3, 0):
        os.truncate(path, size)
        with pytest.raises(ValueError, match=r"^embeddings: .* is truncated, corrupt or no \."):
            read_embeddings(path, "embeddings")
    with pytest.raises(FileNotFoundError, match="embeddings: got .* expected an existing file"):
        read_embeddings(path.with_stem("none"), "embeddings")
    with pytest.raises(ValueError, match="embeddings: got .*, expected an .npz or .parquet file"):
        read_embeddings(path.with_suffix(".csv"), "embeddings")


def test_a_damaged_byte_is_found(path):
    data = bytearray(path.read_bytes())
    at = data.find(make_items()["both"].numpy().tobytes()[:24])
    data[at + 1] ^= 1
    path.write_bytes(data)
    if path.suffix == ".npz":  # Parquet files have no checksums by default
        with pytest.raises(ValueError, match="is truncated, corrupt or no"):
            read_embeddings(path, "embeddings")


@pytest.mark.parametrize(
    ("at", "change"),
    # The flag of encryption, the method of compression, and compressed data.
    [(b"PK\x01\x02", (8, 1)), (b"PK\x01\x02", (10, 3)), (b"PK\x03\x04", (90, 255))],
)
def test_other_zip_files_are_refused(tmp_path, at, change):
    whole = {key: x.numpy() for key, x in make_items(rows=99).items()}
    np.savez_compressed(tmp_path / "a.npz", **whole, skipped=np.array("[]"))
    data = bytearray((tmp_path / "a.npz").read_bytes())
    data[data.find(at) + change[0]] ^= change[1]
    (tmp_path / "a.npz").write_bytes(data)
    with pytest.raises(ValueError, match="is truncated, corrupt or no .npz file"):
        read_embeddings(tmp_path / "a.npz", "embeddings")


@pytest.mark.parametrize(
    ("name", "column", "message"),
    [
        ("label", pa.array(["0"] * 7), "column label: got string, expected int64"),
        ("label", pa.array([None] * 7, pa.int64()), "column label: got rows without a value"),
        ("both", pa.array([[1.0]] * 7), "column both: got list<.*, expected a list of fixed size"),
        ("has_text", None, "it lacks the columns has_text"),
    ],
)
def test_other_parquet_files_are_refused(tmp_path, name, column, message):
    write(tmp_path / "a.parquet", make_items())
    table = pq.read_table(tmp_path / "a.parquet").drop_columns(name)
    if column is not None:
        table = table.append_column(name, column)
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=message):
        read_embeddings(tmp_path / "a.parquet", "embeddings")


WRONG = {
    "image: got embeddings that are not finite": {"image": torch.full((7, 3), torch.nan)},
    "text: got 2 features, expected 3": {"text": torch.zeros(7, 2)},
    "lacks the arrays labels|lacks the columns label": {"labels": None},
    "lacks the (arrays|columns) both": {"image": None, "text": None, "both": None},
}


@pytest.mark.parametrize("message", WRONG)
def test_unfit_arrays_are_refused(tmp_path, message):
    items = {name: x for name, x in {**make_items(), **WRONG[message]}.items() if x is not None}
    whole = {name: x.numpy() for name, x in items.items()}
    np.savez(tmp_path / "a.npz", **whole, skipped=np.array("[]"))
    with pytest.raises(ValueError, match=message):
        read_embeddings(tmp_path / "a.npz", "embeddings")
    if "labels" in items:
        write(tmp_path / "a.parquet", items)
        with pytest.raises(ValueError, match=message):
            read_embeddings(tmp_path / "a.parquet", "embeddings")


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("labels", np.zeros(6, np.int64), "labels: got 6 rows, expected 7, as has_image"),
        ("labels", np.zeros(7), "labels: got float64 with 1 dimensions, expected integers with 1"),
        ("both", np.zeros(7, np.float32), "both: got float32 with 1 dimensions, expected floats"),
        ("skipped", np.array("{"), "skipped: expected a JSON list of strings"),
        ("skipped", np.array([{}]), "is truncated, corrupt or no .npz file"),
    ],
)
def test_arrays_of_another_kind_are_refused(tmp_path, name, array, message):
    whole = {key: x.numpy() for key, x in make_items().items()} | {"skipped": np.array("[]")}
    np.savez(tmp_path / "a.npz", **{**whole, name: array})
    with pytest.raises(ValueError, match=message):
        read_embeddings(tmp_path / "a.npz", "embeddings")


def test_other_numbers_are_converted_and_other_arrays_are_refused(tmp_path):
    whole = {key: x.numpy() for key, x in make_items().items()} | {"skipped": np.array("[]")}
    other = {"both": whole["both"].astype(np.float16), "labels": whole["labels"].astype(np.int32)}
    np.savez(tmp_path / "a.npz", **{**whole, **other})
    found = read_embeddings(tmp_path / "a.npz", "embeddings").items
    assert all(found[name].dtype == x.dtype for name, x in make_items().items())
    np.savez(tmp_path / "a.npz", **{key: x[:0] if x.ndim else x for key, x in whole.items()})
    with pytest.raises(ValueError, match="a.npz has no items"):
        read_embeddings(tmp_path / "a.npz", "embeddings")
    np.save(tmp_path / "a.npy", whole["both"])
    os.replace(tmp_path / "a.npy", tmp_path / "a.npz")
    with pytest.raises(ValueError, match="corrupt or no .npz file of .*: File is not a zip"):
        read_embeddings(tmp_path / "a.npz", "embeddings")


def measure(tmp_path, *arguments):
    code = main(["eval", "--device", "cpu", *map(str, arguments), "--out", f"{tmp_path}/s.json"])
    return json.loads((tmp_path / "s.json").read_text()) if code == 0 else code


def test_eval_measures_the_embeddings_in_files(path, tmp_path, capsys):
    found = measure(tmp_path, "--embeddings", path)
    assert found["pairs"] == (expected := retrieval_scores(make_items()))
    assert found["recall_at_1"] == mean_scores(expected)["recall_at_1"]
    assert (found["rows"], found["without_image"], found["without_text"]) == (7, 3, 2)
    assert "image->both" in (output := capsys.readouterr().out) and "7 rows, 1 skipped" in output
    products = make_items(rows=8)
    products["labels"] = products["labels"].clamp(max=1)
    other = write(tmp_path / "products.npz", products)
    found = measure(tmp_path, "--embeddings", path, "--products-embeddings", other)
    assert found["pairs"] == retrieval_scores(make_items(), products)
    assert found["unknown_labels"] == [2] and found["skipped"] == 2 * SKIPPED
    assert f"searched in {other}" in capsys.readouterr().out


def test_eval_refuses_what_does_not_go_with_files(path, tmp_path, capsys):
    wide = write(tmp_path / "wide.npz", make_items(width=5))
    for arguments, message in (
        (["--embeddings", path, "--checkpoint", "run"], "checkpoint: got 'run' with embeddings"),
        (["--embeddings", path, "--image-size", "0"], "image_size: got 0 with embeddings"),
        (["--embeddings", path, "--per-class"], "per_class: got True with embeddings"),
        (["--products-embeddings", path], "products_embeddings: got .* without embeddings"),
        (["--embeddings", path, "--device", "none"], "device: got 'none'"),
        (["--checkpoint", "run"], "data: got None without embeddings"),
        (
            ["--embeddings", path, "--products-embeddings", wide],
            "products_embeddings: got 5 features in .*, expected 3, as in ",
        ),
    ):
        assert measure(tmp_path, *arguments) == 2
        assert re.search(message, capsys.readouterr().err)


class Things:
    """The items of a pair set: a picture's name is that of its row."""

    texts = ("query", "", "cup", "mug", "")
    present = (False, True, True, False, True)

    def __len__(self):
        return 5

    def files_of(self, row):
        return [f"{row}.png", "more.png"] if self.present[row] else []


THINGS = SimpleNamespace(
    items=Things(),
    queries=np.array([0, 2]),
    positives=Ragged(np.array([1, 3, 4]), np.array([0, 2, 3])),
    tasks=np.array([0, 1]),
    task_names=["text", "mm"],
    candidates=np.array([1, 3, 4]),
    corpora=np.array([0, 0, 1]),
    corpus_names=["text", "mm"],
    searched_items=np.arange(5),
    skipped=SKIPPED,
    lost=[],
    digest="digest",
)


class Model(torch.nn.Linear):
    """A model whose embeddings are unit vectors on a circle, turned further for each view."""

    config = SimpleNamespace()

    def embed(self, views, pixel_values, image_present, input_ids, attention_mask):
        angles = {view: pixel_values + VIEWS.index(view) for view in views}
        return {view: torch.stack([x.sin(), x.cos()], 1) for view, x in angles.items()}


class Items:
    """The batches of the pair set, which are read ahead."""

    ahead = 2

    def __init__(self):
        self.started = []

    def __len__(self):
        return 5

    def start(self, rows):
        self.started.append(rows.tolist())
        return rows

    def finish(self, rows):
        return {
            "pixel_values": rows.float() ** 2,
            "image_present": torch.tensor(Things.present)[rows],
            "input_ids": rows,
            "attention_mask": torch.ones(len(rows), 3),
            "labels": rows // 2,
        }


class Batches:
    batch_size = 2

    def __init__(self):
        self.items = Items()

    def __len__(self):
        return 3

    def __iter__(self):
        return (self.items.finish(rows) for rows in torch.arange(5).split(2))


@pytest.fixture
def trained(monkeypatch):
    """A model for the commands; the data set is THINGS or, with the name "products", its items."""
    products = SimpleNamespace(file_names=list("abcde"), skipped=SKIPPED, digest="products")
    load_set = {"products": products, "webqa": THINGS, "other": products}.__getitem__
    made = SimpleNamespace(
        model=Model(1, 1).eval(),
        amp=False,
        task="retrieval",
        name="uniecs",
        device="cpu",
        identity={"checkpoint": "0"},
        settings={"training": {}},
        load_set=lambda data, *_, **__: load_set(data),
        batches_of=lambda *_: Batches(),
        batches=lambda data, *_, **__: (load_set(data), Batches()),
        check_is_retrieval_model=lambda _: None,
    )
    monkeypatch.setattr(model_source, "load_model", lambda _: made)
    return made


def pairs_of(**changes):
    return Pairs.of(SimpleNamespace(**{**vars(THINGS), **changes}))


def test_items_of_pairs_are_embedded_as_they_are_and_measured_again(trained, tmp_path, capsys):
    out = tmp_path / "pairs.npz"
    command = ["embed", "--checkpoint", "run", "--data", "webqa", "--batch-size", "2"]
    assert main([*command, "--out", str(out)]) == 0
    assert "5 items embedded, 1 rows skipped" in capsys.readouterr().out
    angles = torch.tensor([0.0 + 1, 1, 4 + 2, 9 + 1, 16])
    embeddings = torch.stack([angles.sin(), angles.cos()], 1)
    with np.load(out) as found:
        assert np.allclose(found["embedding"], embeddings)
        assert found["is_query"].tolist() == [True, False, True, False, False]
        assert found["is_candidate"].tolist() == [False, True, False, True, True]
        assert found["file_names"].tolist() == ["", "1.png", "2.png", "", "4.png"]
        assert found["has_text"].tolist() == [True, False, True, True, False]
        assert found["has_image"].tolist() == list(Things.present)
    expected = pair_scores(embeddings, pairs_of())
    for arguments in (["--embeddings", out], ["--checkpoint", "run", "--data", "webqa"]):
        found = measure(tmp_path, *arguments)
        assert found["searches"] == expected["searches"] and found["mrr"] == expected["mrr"]
        assert found["rows"] == 5 and found["without_image"] == found["without_text"] == 2
        assert "mm->mm" in (output := capsys.readouterr().out) and "MRR@10" in output
    assert measure(tmp_path, "--embeddings", out, "--products-embeddings", out) == 2
    assert "which holds pairs, with two files, expected" in capsys.readouterr().err
    with np.load(out) as file:
        np.savez(tmp_path / "bad.npz", **{**file, "tasks": np.array([0, 2])})
    assert measure(tmp_path, "--embeddings", tmp_path / "bad.npz") == 2
    assert "tasks: got 0 to 2, expected numbers from 0 to 1" in capsys.readouterr().err


def test_options_that_pairs_do_not_have_are_refused(trained, tmp_path, capsys):
    command = ["embed", "--checkpoint", "run", "--data", "webqa", "--out"]
    assert main([*command, str(tmp_path / "a.npz"), "--views", "text"]) == 2
    assert "views: got 'text' with 'webqa', which holds pairs" in capsys.readouterr().err
    assert main([*command, str(tmp_path / "a.parquet")]) == 2
    assert "which holds pairs, expected an .npz file" in capsys.readouterr().err
    given = ["--checkpoint", "run", "--data", "webqa", "--products", "other"]
    assert measure(tmp_path, *given) == 2
    assert "products: got 'other' with 'webqa', which holds pairs" in capsys.readouterr().err


def test_products_are_embedded_alike_in_both_formats(trained, tmp_path, capsys, monkeypatch):
    found = {}
    for suffix in ("npz", "parquet"):
        out = tmp_path / f"a.{suffix}"
        command = ["embed", "--checkpoint", "run", "--data", "products", "--batch-size", "2"]
        command += ["--views", "both,image", "--out", str(out)]
        assert main(command) == 0 and main(command) == 2
        assert "already exists" in capsys.readouterr().err
        found[suffix] = read_embeddings(out, "embeddings")
    npz, parquet = found["npz"].items, found["parquet"].items
    assert npz.keys() == parquet.keys() >= {"both", "image"} and "text" not in npz
    assert all(npz[name].equal(parquet[name]) for name in npz)
    assert npz["labels"].tolist() == [0, 0, 1, 1, 2]
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    assert main([*command, "--overwrite"]) == 1
    assert "datasets is not installed: pip install 'mmfused[models]'" in capsys.readouterr().err
    assert main(["eval", "--embeddings", str(out)]) == 1
    assert "datasets is not installed" in capsys.readouterr().err


def test_missing_parts_are_read_ahead(tmp_path):
    from mmfused.cli.embedding_parts import Parts, embed_parts

    parts, batches, order = Parts(tmp_path), Batches(), []

    def embed(batch, rows):
        order.append(([*rows], len(batches.items.started)))
        return {"x": batch["pixel_values"]}

    embed_parts(batches, parts, embed)
    # Two further batches are started before the first is embedded.
    assert order == [([0, 1], 3), ([2, 3], 3), ([4], 3)]
    whole = parts.path(1).read_bytes()
    parts.path(1).unlink()
    embed_parts(batches, parts, embed)
    # Row 0 is embedded for the comparison with the parts that are there.
    assert order[3:] == [([0], 4), ([2, 3], 5)] and parts.path(1).read_bytes() == whole
