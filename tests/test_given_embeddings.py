"""Embeddings and classes whose labels are names, or missing, are scored as what they are."""

import csv
import json

import numpy as np
import pytest

from mmfused.cli import main
from mmfused.cli.embedding_files import read_embeddings

STEPS = ["--steps", "1", "--batch-size", "4", "--threads", "1"]


def run(*command):
    assert main([str(part) for part in command]) == 0


def write(folder, rows):
    folder.mkdir()
    with open(folder / "metadata.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("file_name", "text", "label"), *rows])
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("given")
    run("train", "--model", "uniecs", "--data", "generated", *STEPS, "--out", root / "run")
    # Alphabetically, the classes of the two sets have other numbers.
    queries = [("", f"{name} {row}", name) for row in range(3) for name in ("zebra", "mug", "ant")]
    write(root / "queries", queries)
    write(root / "products", [("", f"a {name}", name) for name in ("zebra", "kiwi", "mug")])
    numbered = [("", f"thing {row}", row % 3) for row in range(6)]
    write(root / "numbered", numbered)
    write(root / "gaps", [*numbered, ("", "thing", ""), ("", "thing", "")])
    for name in ("queries", "products", "numbered", "gaps"):
        for suffix in ("npz", "parquet"):
            out = root / f"{name}.{suffix}"
            run("embed", "--checkpoint", root / "run", "--data", root / name, "--out", out)
    return root


def scores(root, *options):
    run("eval", *options, "--out", root / "scores.json")
    return json.loads((root / "scores.json").read_text())


@pytest.mark.parametrize("suffix", ["npz", "parquet"])
def test_names_of_two_files_are_the_same_classes(root, suffix):
    sets = ("--data", root / "queries", "--products", root / "products")
    model = scores(root, "--checkpoint", root / "run", *sets)
    files = (root / f"queries.{suffix}", root / f"products.{suffix}")
    given = scores(root, "--embeddings", files[0], "--products-embeddings", files[1])
    assert given["pairs"] == model["pairs"]
    # Of the classes zebra, mug and ant, the products lack one.
    assert given["pairs"]["text->text"]["queries"] == 6 and len(given["unknown_labels"]) == 1
    found = read_embeddings(files[0], "embeddings")
    assert found.class_names == ["ant", "mug", "zebra"]
    assert found.items["labels"].tolist() == [2, 1, 0] * 3


def test_names_and_numbers_are_no_labels_of_each_other(root, capsys):
    command = ["eval", "--embeddings", str(root / "queries.npz")]
    assert main([*command, "--products-embeddings", str(root / "numbered.npz")]) == 2
    assert "products_embeddings: got labels that are numbers, expected names" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize("suffix", ["npz", "parquet"])
def test_items_without_a_label_are_not_the_same_product(root, suffix, tmp_path, capsys):
    expected = scores(root, "--embeddings", root / f"numbered.{suffix}")
    given = scores(root, "--embeddings", root / f"gaps.{suffix}")
    assert given["pairs"] == expected["pairs"] and given["rows"] == 6
    assert given["skipped"] == ["2 items have no label"]
    if suffix == "npz":
        arrays = dict(np.load(root / "gaps.npz"))
        np.savez(tmp_path / "none.npz", **{**arrays, "labels": np.full(8, -1)})
        assert main(["eval", "--embeddings", str(tmp_path / "none.npz")]) == 2
        assert "embeddings: got only items without a label" in capsys.readouterr().err


def test_labels_beyond_the_names_are_refused(root, tmp_path):
    arrays = dict(np.load(root / "queries.npz"))
    for names, message in (('["a"]', "labels: got 2, expected numbers below 1"), ("3", "JSON")):
        np.savez(tmp_path / "bad.npz", **{**arrays, "class_names": np.array(names)})
        with pytest.raises(ValueError, match=message):
            read_embeddings(tmp_path / "bad.npz", "embeddings")


def test_names_of_data_are_no_classes_of_a_model_without_names(root, capsys):
    run("train", "--data", "generated", *STEPS, "--out", root / "fluid")
    command = ["eval", "--checkpoint", str(root / "fluid"), "--data", str(root / "queries")]
    assert main(command) == 2
    assert "label: got 'zebra', expected an integer from 0 to 15" in capsys.readouterr().err
    assert main([*command, "--labels", "name"]) == 2
    assert "labels: got 'name' with" in capsys.readouterr().err
    assert main([*command[:4], str(root / "numbered")]) == 0


@pytest.mark.parametrize("suffix", ["npz", "parquet"])
def test_embeddings_of_two_models_are_not_compared(root, suffix, capsys):
    other = root / "other"
    if not other.exists():
        seed = ["--seed", "1", *STEPS]
        run("train", "--model", "uniecs", "--data", "generated", *seed, "--out", other)
    file = root / f"other.{suffix}"
    run("embed", "--checkpoint", other, "--data", root / "products", "--out", file)
    assert read_embeddings(file, "embeddings").model
    both = ["--embeddings", root / f"queries.{suffix}", "--products-embeddings"]
    assert main([str(part) for part in ("eval", *both, file)]) == 2
    assert "of another model than" in capsys.readouterr().err
    assert main([str(part) for part in ("eval", *both, root / f"products.{suffix}")]) == 0
