"""The data sets that the settings of a run name: formats, splits, names of classes, refusals."""

import argparse
import json

import pytest
import torch
from published_data import picture, write_glami, write_mmeb, write_webqa

from mmfused.cli.data_options import check_for_pairs, parse_columns
from mmfused.data import load_picture, train_tokenizer
from mmfused.models import UniCAConfig, UNITEConfig, UNITEProcessor
from mmfused.training import initial
from mmfused.training.config import TrainConfig
from mmfused.training.datasets import check_rows, load_data, rows_digest
from mmfused.training.resume import find_start
from mmfused.training.run import prepare, train
from mmfused.training.run_folder import read_settings

SMALL = {"batch_size": 4, "threads": 1, "progress": False, "modalities": "text", "steps": 1}


def products(folder, rows):
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f",{text},{label}" for text, label in rows]
    (folder / "metadata.csv").write_text("\n".join(["file_name,text,label", *lines]) + "\n")
    return str(folder)


def named(folder, names="abcb"):
    return products(folder, [(f"text {row} of {name}", name) for row, name in enumerate(names)])


def config(folder, model="fluid", **changes):
    small = SMALL if model == "fluid" else {**SMALL, "modalities": "both"}
    return TrainConfig(str(folder / "run"), model=model, **{**small, **changes})


def test_names_of_classes_are_those_of_the_training_data(tmp_path):
    data, val = named(tmp_path / "data", "bcab"), named(tmp_path / "val", "cxa")
    train_set, val_set, _ = load_data(config(tmp_path, data=data, val=val))
    assert train_set.class_names == ["a", "b", "c"] and list(train_set.labels) == [1, 2, 0, 1]
    assert list(val_set.labels) == [2, 0]
    assert val_set.skipped == [
        "metadata.csv line 3 (no file_name): label: got 'x', which is none of the 3 classes of "
        "the training data"
    ]


def test_a_run_keeps_the_names_of_its_classes(tmp_path):
    data = named(tmp_path / "data", "bcab" * 3)
    settings = config(tmp_path, data=data, val=data)
    train(settings)
    assert read_settings(tmp_path / "run")["class_names"] == ["a", "b", "c"]
    fewer = named(tmp_path / "fewer", "ccbb")
    again = config(tmp_path, data=fewer, val=fewer, init=str(tmp_path / "run"))
    task = prepare(again, None).task
    assert sorted(task.batches.items.labels.tolist()) == [1, 1, 2, 2]


def test_damaged_names_of_classes_are_refused(tmp_path):
    data = named(tmp_path / "data", "abab")
    train(config(tmp_path, data=data, val=data))
    path = tmp_path / "run" / "config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, "class_names": ["a", 1]}))
    with pytest.raises(ValueError, match="is corrupt: class_names is not a list of strings"):
        read_settings(tmp_path / "run")


def test_sets_that_are_searched_together_share_their_labels(tmp_path):
    data, val = named(tmp_path / "data", "bcab"), named(tmp_path / "val", "cdc")
    catalogue = named(tmp_path / "catalogue", "edcba")
    settings = config(tmp_path, "uniecs", data=data, val=val, products=catalogue)
    sets = load_data(settings)
    names = [[one.class_names[label] for label in one.labels] for one in sets]
    assert names == [list("bcab"), list("cdc"), list("edcba")]
    assert sets[0].class_names == sets[2].class_names and sets[0].num_classes == 5
    numbers = products(tmp_path / "numbers", [("one", 1), ("two", 2)])
    with pytest.raises(ValueError, match="data: got labels that are numbers, expected names as in"):
        load_data(config(tmp_path, "uniecs", data=numbers, val=val, products=catalogue))


@pytest.mark.parametrize("model", ["fluid", "uniecs"])
def test_a_fraction_of_the_data_becomes_the_validation_set(tmp_path, model):
    data = named(tmp_path / "data", "aabbccddee" * 2)
    fraction = "0.4" if model == "uniecs" else "0.25"
    train_set, val_set, _ = load_data(config(tmp_path, model, data=data, val=fraction))
    assert sorted([*train_set.texts, *val_set.texts]) == sorted(
        f"text {row} of {name}" for row, name in enumerate("aabbccddee" * 2)
    )
    assert len(val_set) == (8 if model == "uniecs" else 5)
    shared = {*train_set.labels} & {*val_set.labels}
    assert not shared if model == "uniecs" else {*train_set.labels} == {0, 1, 2, 3, 4}
    with pytest.raises(ValueError, match="^val: "):
        load_data(config(tmp_path, model, data=named(tmp_path / "one", "a"), val="0.5"))
    if model == "uniecs":
        with pytest.raises(ValueError, match="^val: got 0.25, which leaves items of one label for"):
            load_data(config(tmp_path, model, data=data, val="0.25"))
        assert len(load_data(config(tmp_path, model, data=data, val="0.25", products=data))[1]) == 4


def test_a_part_of_pairs_searches_its_own_candidates(tmp_path):
    """The positives and negatives of its queries, but all of a corpus that the data give."""
    pairs = load_data(config(tmp_path, "unica", data=str(write_mmeb(tmp_path)), val="0.25"))[1]
    own = {*pairs.positives.values.tolist(), *pairs.negatives.values.tolist()}
    assert {*pairs.candidates.tolist()} == own and len(pairs) == 4 and len(pairs.items) > 12
    assert {*pairs.searched_items.tolist()} == own | {*pairs.queries.tolist()}
    webqa = str(write_webqa(tmp_path / "webqa"))
    part = load_data(config(tmp_path, "unica", data=webqa, val="0.25"))[1]
    assert len(part) == 2 and len(part.candidates) == 16


@pytest.mark.parametrize("val", ["0", "1", "1.5", "-0.1", "nan"])
def test_a_number_that_is_no_fraction_is_refused(tmp_path, val):
    with pytest.raises(ValueError, match="^val: got .*, expected a folder, or a fraction above 0"):
        config(tmp_path, data="somewhere", val=val)


def test_a_validation_set_is_required_where_the_data_has_none(tmp_path):
    data = named(tmp_path / "data")
    with pytest.raises(
        ValueError, match="^val is required: a validation set, or the fraction of data"
    ):
        load_data(config(tmp_path, data=data))
    glami = write_glami(tmp_path / "glami")
    train_set, val_set, _ = load_data(config(tmp_path, data=str(glami)))
    assert (len(train_set), len(val_set), train_set.class_names) == (18, 6, ["7", "1532", "20117"])
    assert val_set.texts[0] == 'Šaty red červené, "krásné" mens-sneakers'
    webqa = write_webqa(tmp_path / "webqa")
    with pytest.raises(ValueError, match="^val is required"):  # only val_query.jsonl
        load_data(config(tmp_path, "unica", data=str(webqa)))
    (webqa / "train_query.jsonl").write_text(
        json.dumps({"q_text": "new", "positive": ["mm0"], "type": "mm_it"})
    )
    pairs = load_data(config(tmp_path, "unica", data=str(webqa)))
    assert [len(split) for split in pairs[:2]] == [1, 8] and pairs[2] is None


def test_what_pairs_do_not_have_is_refused(tmp_path):
    data = str(write_mmeb(tmp_path))
    with pytest.raises(ValueError, match="data: got .* which holds pairs, with model 'fluid', exp"):
        load_data(config(tmp_path, data=data, val="0.2"))
    for name, value in (
        ("columns", {"text": "title"}),
        ("text_column", "title"),
        ("labels", "name"),
        ("products", data),
        ("swap_text", 0.5),
        ("stream", False),
    ):
        with pytest.raises(ValueError, match=f"^{name}: got .* which holds pairs, expected prod"):
            load_data(config(tmp_path, "unica", data=data, val="0.2", **{name: value}))
    shop = named(tmp_path / "shop")
    with pytest.raises(ValueError, match="^val: got .*, which holds no pairs, expected pairs"):
        load_data(config(tmp_path, "unica", data=data, val=shop))
    with pytest.raises(ValueError, match="^products: got .*, which holds pairs, expected products"):
        load_data(config(tmp_path, "unica", data=shop, val=shop, products=data))
    for drop in ("drop_image", "drop_text"):
        with pytest.raises(ValueError, match=f"^{drop}: got 0.5 with pairs and model 'unite', exp"):
            prepare(config(tmp_path, "unite", data=data, val="0.2", **{drop: 0.5}), None)
    args = argparse.Namespace(data=data, columns=None, text_column="title", labels=None)
    with pytest.raises(ValueError, match="^text_column: got 'title' with .*, which holds pairs"):
        check_for_pairs(args)
    check_for_pairs(argparse.Namespace(data=data, stream=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "csv"}, "data: format: got 'csv', expected metadata, arrow,"),
        ({"columns": {"title": "text"}}, "columns: got 'title', expected some of image, text, lab"),
        ({"columns": {"text": " "}}, "columns: text: got ' ', expected the name of a column"),
        ({"columns": {"text": "a"}, "text_column": "b"}, "text_column: got 'b' with columns that"),
        ({"columns": {"text": "title"}}, "data: .*got a header line without title"),
        ({"labels": "number"}, "labels: got 'number', expected one of auto, index, name"),
        ({"num_negatives": 2}, "num_negatives: got 2 with model 'fluid', expected unica or unite"),
        ({"data": "nowhere"}, "data: got 'nowhere', expected a folder with images and metadata"),
    ],
)
def test_wrong_settings_are_refused(tmp_path, changes, message):
    data = named(tmp_path / "data")
    with pytest.raises((ValueError, FileNotFoundError), match=f"^{message}"):
        load_data(config(tmp_path, **{"data": data, "val": data, **changes}))


@pytest.mark.parametrize("name", ["format", "columns", "labels", "stream", "text_column"])
def test_the_generated_set_takes_no_settings_of_files(tmp_path, name):
    value = {"columns": {"text": "title"}, "stream": True}.get(name, "name")
    with pytest.raises(ValueError, match=f"^{name}: got .* with the generated set, expected"):
        load_data(config(tmp_path, **{name: value}))


def test_columns_of_the_command_line():
    assert parse_columns(None) is None
    assert parse_columns("image=path,text=title+body") == {"image": "path", "text": "title+body"}
    with pytest.raises(ValueError, match="columns: got 'image', expected NAME=COLUMN,.."):
        parse_columns("image")
    with pytest.raises(ValueError, match="columns: got text twice in 'text=a,text=b'"):
        parse_columns("text=a,text=b")


def test_rows_are_compared_however_pictures_are_read(tmp_path):
    rows = ["file_name,text,label", *(f"{row}.png,text {row},{row % 2}" for row in range(4))]
    for row in range(4):
        picture(tmp_path / "data" / f"{row}.png", row)
    (tmp_path / "data" / "metadata.csv").write_text("\n".join(rows))
    data = str(tmp_path / "data")
    both = [
        load_data(config(tmp_path, data=data, val=data, stream=stream)) for stream in (True, False)
    ]
    streamed, decoded = (sets[0] for sets in both)
    assert streamed.streamed and not decoded.streamed
    assert rows_digest(streamed) == rows_digest(decoded) != decoded.digest
    settings = {"rows": {"data": rows_digest(decoded), "val": rows_digest(decoded)}}
    check_rows(config(tmp_path, data=data, val=data), settings, *both[0])
    old = {"rows": {"data": decoded.digest, "val": decoded.digest}}  # of an earlier version
    check_rows(config(tmp_path, data=data, val=data), old, *both[1])
    picture(tmp_path / "data" / "2.png", 7)
    changed = load_data(config(tmp_path, data=data, val=data, stream=True))
    with pytest.raises(ValueError, match="^resume: data: the texts, labels or pictures of"):
        check_rows(config(tmp_path, data=data, val=data), settings, *changed)


def test_an_unfinished_run_of_an_earlier_version_is_refused(tmp_path):
    data = named(tmp_path / "data", "abab")
    settings = config(tmp_path, data=data, val=data, resume=True)
    train(settings)
    for name in ("config.json", "summary.json"):
        (tmp_path / "run" / name).unlink()
    (path,) = (tmp_path / "run" / "checkpoints").glob("*/state.json")
    assert find_start(settings, tmp_path / "run") is not None
    state = json.loads(path.read_text())
    del state["settings"]["training"]["stream"]
    path.write_text(json.dumps(state))
    with pytest.raises(ValueError, match="was written by an earlier version, which drew batches"):
        find_start(settings, tmp_path / "run")


def test_a_tokenizer_is_trained_on_some_of_many_texts(monkeypatch):
    seen = []

    def spy(texts, vocab_size):
        seen.append(list(texts))
        return train_tokenizer(seen[-1], vocab_size)

    monkeypatch.setattr("mmfused.data.train_tokenizer", spy)
    texts = argparse.Namespace(texts=[f"text {row}" for row in range(10)])
    few = argparse.Namespace(texts=["one", "two"])
    initial.train_tokenizer(TrainConfig("unused"), texts, few)
    assert seen.pop() == [*texts.texts, "one", "two"]
    monkeypatch.setattr(initial, "TOKENIZER_TEXTS", 4)
    initial.train_tokenizer(TrainConfig("unused"), texts, few)
    assert seen == [["text 0", "text 3", "text 6", "text 9", "one", "two"]]


def test_sequences_are_cut_with_or_without_their_pictures():
    tokenizer = UNITEConfig.prepare_tokenizer(train_tokenizer(["red mug and blue plate"]))
    model_config = UNITEConfig.preset("tiny", **UNITEConfig.of_tokenizer(tokenizer))
    image = torch.zeros(3, 64, 64, dtype=torch.uint8)
    item = {"text": "red mug " * 30, "image": image}
    lengths = {}
    for count in (True, False):
        processor = UNITEProcessor(
            tokenizer, model_config, max_length=50, count_pictures=count, picture_tokens=(4, 16)
        )
        lengths[count] = processor([item])["input_ids"].shape[1]
    assert lengths == {True: 50, False: 50 + 16}


@pytest.mark.parametrize("size", [(48, 96), (700, 300), (31, 500), (16, 16)])
def test_a_picture_that_was_resized_before_gives_the_same_patches(size):
    tokenizer = UNITEConfig.prepare_tokenizer(train_tokenizer(["red mug"]))
    model_config = UNITEConfig.preset("tiny", **UNITEConfig.of_tokenizer(tokenizer))
    processor = UNITEProcessor(tokenizer, model_config, picture_tokens=(4, 64))
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8)
    small = processor.resize_picture(image)
    assert small.shape != image.shape or size == (48, 96)
    expected, found = processor([{"image": image}]), processor([{"image": small}])
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    with pytest.raises(ValueError, match="image: got 1 x 201 pixels, expected sides whose ratio"):
        processor.resize_picture(torch.zeros(3, 1, 201, dtype=torch.uint8))


def test_ids_are_names_where_those_of_the_training_data_are(tmp_path):
    data = products(tmp_path / "data", [("one", 70), ("two", 900), ("three", 70)])
    settings = {"data": data, "val": data, "products": data, "labels": "name"}
    sets = load_data(config(tmp_path, "uniecs", **settings))
    assert all(one.class_names == ["70", "900"] for one in sets)
    glami = write_glami(tmp_path / "glami")
    catalogue = products(tmp_path / "catalogue", [("bag", 1532), ("lamp", 5)])
    sets = load_data(config(tmp_path, "uniecs", data=str(glami), products=catalogue))
    assert sets[2].class_names == sets[0].class_names == ["7", "1532", "20117", "5"]
    assert list(sets[2].labels) == [1, 3]


def test_pictures_of_pairs_are_read_as_the_model_resizes_them(tmp_path):
    data = str(write_webqa(tmp_path))
    task = prepare(config(tmp_path, "unica", data=data, val="0.25", image_size=32), None).task
    picture_row = int(task.val_set.items.present.argmax())
    found = task.val_batches.items.batch(torch.tensor([picture_row]))["pixel_values"][0]
    name = task.val_set.items.files_of(picture_row)[0]
    resize, resample = UniCAConfig.preset("tiny").resize, UniCAConfig.preset("tiny").resample
    pixels = load_picture(tmp_path / "images" / name, 32, resize=resize, resample=resample)
    collate = task.val_batches.collate
    expected = (pixels / 255 - collate.mean[:, None, None]) / collate.std[:, None, None]
    assert torch.allclose(found, expected, atol=1e-6) and resample == "bicubic"
