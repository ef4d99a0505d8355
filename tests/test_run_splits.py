"""The splits of a data set that training, eval and embed read, and what a run reads of pairs."""

import json

import numpy as np
import pytest
import torch
from format_folders import dataset_of, make_products
from published_data import picture, write_glami, write_mmeb
from test_run_data import config, named, products

from mmfused.cli import main
from mmfused.training.datasets import load_data, resuming
from mmfused.training.load import load_trained
from mmfused.training.run import prepare, train


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    """Return a DatasetDict of 12 rows for training, 8 for validation and 6 for test."""
    import datasets

    whole = dataset_of(make_products(26, gaps=False))
    parts = {"train": range(12), "validation": range(12, 20), "test": range(20, 26)}
    found = datasets.DatasetDict({name: whole.select(rows) for name, rows in parts.items()})
    path = tmp_path_factory.mktemp("splits") / "set"
    found.save_to_disk(str(path))
    return str(path)


def rows_of(*sets):
    return [len(one) for one in sets if one is not None]


def test_training_validates_with_a_split_of_the_data(tmp_path, splits):
    assert rows_of(*load_data(config(tmp_path, data=splits))) == [12, 8]
    assert rows_of(*load_data(config(tmp_path, data=splits, val=splits))) == [12, 8]
    data = named(tmp_path / "data", "0101")
    assert rows_of(*load_data(config(tmp_path, "uniecs", data=data, val=splits)))[1] == 8
    whole = load_data(config(tmp_path, data=splits, split="test", val="0.5"))
    assert rows_of(*whole) == [3, 3]
    with pytest.raises(ValueError, match="^val is required"):
        load_data(config(tmp_path, data=splits, split="test"))
    glami = str(write_glami(tmp_path / "glami"))
    assert rows_of(*load_data(config(tmp_path, data=glami, split="test", val="0.5"))) == [3, 3]


def test_a_split_that_is_not_there_is_refused(tmp_path, splits):
    data = named(tmp_path / "data")
    with pytest.raises(ValueError, match="^data: split: got 'dev' for .* expected none: it has no"):
        load_data(config(tmp_path, data=data, val=data, split="dev"))
    with pytest.raises(ValueError, match="got 'dev' for .*, expected one of train, validation, te"):
        load_data(config(tmp_path, data=splits, split="dev"))


def test_embed_and_eval_read_the_test_set_or_the_split_that_is_named(tmp_path, splits):
    run = str(tmp_path / "run")
    command = ["--steps", "1", "--batch-size", "4", "--threads", "1", "--image-size", "16"]
    assert main(["train", "--model", "uniecs", "--data", splits, *command, "--out", run]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["train_rows"], summary["val_rows"], summary["unreadable"]) == (12, 8, [])
    for split, rows in ((None, 6), ("train", 12), ("validation", 8)):
        out = str(tmp_path / f"{split}.npz")
        chosen = ["--split", split] if split else []
        embed = ["embed", "--checkpoint", run, "--data", splits, *chosen, "--out", out]
        assert main(embed) == 0 and len(np.load(out)["labels"]) == rows
    scores = str(tmp_path / "scores.json")
    evaluate = ["eval", "--checkpoint", run, "--data", splits, "--out", scores]
    assert main(evaluate) == 0 and json.loads(open(scores).read())["rows"] == 6


def test_a_catalogue_has_columns_of_its_own(tmp_path):
    data = named(tmp_path / "data", "abab")
    catalogue = tmp_path / "catalogue"
    catalogue.mkdir()
    (catalogue / "metadata.tsv").write_text("sku\ttitle\n1\tcup a\n2\tcup b\n")
    columns = {"image": "", "text": "title", "label": "sku"}
    settings = {"data": data, "val": data, "products": str(catalogue)}
    sets = load_data(config(tmp_path, "uniecs", **settings, products_columns=columns))
    assert list(sets[2].texts) == ["cup a", "cup b"] and sets[2].class_names[2:] == ["1", "2"]
    with pytest.raises(ValueError, match="^products: .*; columns gives other names$"):
        load_data(config(tmp_path, "uniecs", **settings))
    with pytest.raises(ValueError, match="^products_columns: got .*, expected products"):
        config(tmp_path, "uniecs", data=data, val=data, products_columns=columns)


def test_embed_and_eval_take_the_columns_of_the_training(tmp_path, capsys):
    data = tmp_path / "shop.tsv"
    rows = "".join(f"\tthing {row}\t{'ab'[row % 2]}\n" for row in range(8))
    data.write_text("path\ttitle\tclass\n" + rows)
    run = str(tmp_path / "run")
    train = ["train", "--model", "uniecs", "--data", str(data), "--val", str(data)]
    train += ["--columns", "image=path,text=title,label=class", "--steps", "1", "--threads", "1"]
    assert main([*train, "--image-size", "16", "--batch-size", "4", "--out", run]) == 0
    out = str(tmp_path / "items.npz")
    assert main(["embed", "--checkpoint", run, "--data", str(data), "--out", out]) == 0
    assert np.load(out)["labels"].tolist() == [0, 1] * 4
    assert main(["eval", "--checkpoint", run, "--data", str(data)]) == 0
    assert "text->text" in capsys.readouterr().out
    # Numbers of a catalogue are names where the labels of the queries are.
    trained = load_trained(run, device="cpu")
    numbers = products(tmp_path / "numbers", [("cup", 70), ("mug", 900)])
    named_set = trained.load_set(
        str(data), columns={"image": "", "text": "title", "label": "class"}
    )
    assert trained.load_set(numbers, like=named_set).class_names == ["70", "900"]
    assert trained.load_set(numbers).class_names is None


def test_a_run_of_an_earlier_version_decodes_all_pictures_at_the_start(tmp_path):
    settings = config(tmp_path, data="somewhere")
    assert resuming(settings, {"training": {}}).stream is False
    assert resuming(settings, {"training": {"stream": None}}) is settings
    streamed = config(tmp_path, data="somewhere", stream=True)
    assert resuming(streamed, {"training": {}}).stream is True


def test_unite_gets_sequences_and_the_settings_of_negatives(tmp_path):
    data = str(write_mmeb(tmp_path))
    settings = {"data": data, "val": "0.2", "image_size": 64, "num_negatives": 3}
    batches = prepare(config(tmp_path, "unite", **settings, mix_tasks=True), None).task.batches
    processor = batches.reader
    # A square of 64 pixels has 4 x 4 tokens of 16 pixels.
    assert processor.picture_pixels == {"min_pixels": 16 * 16**2, "max_pixels": 80 * 16**2}
    assert processor.count_pictures is False and processor.max_length == 64
    assert batches.num_negatives == 3 and batches.plan.one_task is False and batches.draws.given
    batch = batches.batch(0, 0)
    assert len(batch["negative"]["labels"]) == 3 * len(batch["query"]["labels"])
    other = prepare(config(tmp_path, "moon2", data=data, val="0.2"), None).task.batches
    assert other.plan.one_task and not other.draws.given and other.has_negatives
    none = prepare(config(tmp_path, "uniecs", data=data, val="0.2"), None).task.batches
    assert not none.has_negatives


def test_a_picture_that_sequences_cannot_hold_is_named(tmp_path):
    data = str(write_mmeb(tmp_path))
    picture(tmp_path / "images" / "2.jpg", 1, size=(601, 2))  # written again, 300 times as wide
    task = prepare(config(tmp_path, "unite", data=data, val="0.2"), None).task
    pairs = task.batches.pair_set
    rows = [row for row in range(len(pairs.items)) if "2.jpg" in str(pairs.items.files_of(row))]
    batch = task.batches.items.batch(torch.tensor(rows))
    assert len(batch["input_ids"]) == len(rows) == 2
    assert len(pairs.lost) == 1
    assert pairs.lost[0].startswith("images/2.jpg: the image cannot be used: image: got 2 x 601")


def test_a_set_without_texts_trains(tmp_path):
    data = products(tmp_path / "data", [("", 0)])
    rows = "".join(f"{row}.png,,{'ab'[row % 2]}\n" for row in range(4))
    for row in range(4):
        dataset_of(make_products(4, gaps=False))[row]["image"].save(tmp_path / f"data/{row}.png")
    (tmp_path / "data" / "metadata.csv").write_text("file_name,text,label\n" + rows)
    settings = config(tmp_path, data=data, val=data, modalities="image", image_size=16)
    training = prepare(settings, None)
    assert {"a", "b"} <= training.tokenizer.get_vocab().keys()


def test_a_run_tells_which_streamed_pictures_could_not_be_decoded(tmp_path):
    rows = "".join(f"{row}.png,text {row},{row % 2}\n" for row in range(4))
    for row in range(4):
        picture(tmp_path / "data" / f"{row}.png", row)
    (tmp_path / "data" / "metadata.csv").write_text("file_name,text,label\n" + rows)
    cut = tmp_path / "data" / "2.png"
    cut.write_bytes(cut.read_bytes()[:600])
    data = str(tmp_path / "data")
    summary = train(
        config(tmp_path, data=data, val=data, modalities="both", image_size=16, stream=True)
    )
    assert not summary["skipped"] and len(summary["unreadable"]) == 2  # of data and of val
    start = "metadata.csv line 4 (2.png): the image cannot be read: "
    assert all(sentence.startswith(start) for sentence in summary["unreadable"])
