import csv
import json
import math

import pytest
import torch
from PIL import Image

import mmfused.library
from mmfused.data import GeneratedProducts
from mmfused.training import (
    TrainConfig,
    drop_modalities,
    evaluate,
    learning_rate,
    load_data,
    load_run,
    macro_f1,
    make_batches,
    train,
)

FILES = {"metrics.jsonl", "model.safetensors", "config.json", "summary.json", "curves.png", "tokenizer"}


def write_products(folder, split, size):
    (folder / "images").mkdir(parents=True)
    products = GeneratedProducts(split, size=size)
    with open(folder / "metadata.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "text", "label"])
        for row in range(size):
            item, name = products[row], f"images/{row}.png"
            Image.fromarray(item["image"].permute(1, 2, 0).numpy()).save(folder / name)
            writer.writerow([name if item["image_present"] or not item["text"] else "", item["text"], item["label"] % 5])
    return str(folder)


@pytest.fixture(scope="module")
def products(tmp_path_factory):
    folder = tmp_path_factory.mktemp("products")
    return {"data": write_products(folder / "train", "train", 48), "val": write_products(folder / "val", "val", 32)}


def options(products, out, **changes):
    return {
        **products,
        "out": str(out),
        "steps": 4,
        "batch_size": 16,
        "backend": "composed",
        "progress": False,
        **changes,
    }


def losses(out):
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if "loss" in record]


def test_a_run_leaves_every_file_whole(products, tmp_path):
    summary = train(TrainConfig(**options(products, tmp_path / "run", val_every=2)))
    assert {path.name for path in (tmp_path / "run").iterdir()} == FILES
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    training = [record for record in records if "loss" in record]
    validation = [record for record in records if "accuracy" in record]
    assert [record["step"] for record in training] == [1, 2, 3, 4]
    assert all({"ce", "contrastive", "moe", "lr", "seconds"} <= record.keys() for record in training)
    assert [record["step"] for record in validation] == [2, 4]
    assert summary["accuracy"] == validation[-1]["accuracy"] and summary["macro_f1"] == validation[-1]["macro_f1"]
    assert summary["steps"] == 4 and summary["peak_memory"] > 2**20
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == summary
    with Image.open(tmp_path / "run" / "curves.png") as picture:
        assert picture.format == "PNG"


def test_a_loaded_run_gives_the_recorded_accuracy(products, tmp_path):
    config = TrainConfig(**options(products, tmp_path / "run"))
    summary = train(config)
    model, tokenizer = load_run(tmp_path / "run")
    _, val_batches = make_batches(config, *load_data(config), tokenizer, size=32)
    result = evaluate(model, val_batches)
    assert result["accuracy"] == summary["accuracy"]
    assert result["val_loss"] == pytest.approx(summary["val_loss"], rel=1e-5)


def test_the_same_seed_gives_the_same_curve_bit_for_bit(products, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(TrainConfig(**options(products, tmp_path / name, seed=seed, swap_text=0.3, drop_image=0.1, drop_text=0.3)))
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert losses(tmp_path / "a") != losses(tmp_path / "c")


@pytest.mark.parametrize("modalities", ["both", "image", "text"])
def test_reference_and_composed_give_the_same_curve(products, tmp_path, modalities):
    for backend in ("reference", "composed"):
        train(TrainConfig(**options(products, tmp_path / backend, backend=backend, modalities=modalities)))
    assert losses(tmp_path / "reference") == pytest.approx(losses(tmp_path / "composed"), rel=1e-4)


def test_training_lowers_the_loss(products, tmp_path):
    train(TrainConfig(**options(products, tmp_path / "run", steps=30, batch_size=48, augment=False)))
    curve = losses(tmp_path / "run")
    assert sum(curve[-5:]) < 0.8 * sum(curve[:5])


def test_a_failed_run_leaves_nothing_half_written(products, tmp_path, monkeypatch):
    def fail(*args):
        raise RuntimeError("disk full")

    monkeypatch.setattr("mmfused.run_folder.draw_curves", fail)
    with pytest.raises(RuntimeError, match="disk full"):
        train(TrainConfig(**options(products, tmp_path / "run", steps=1)))
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert left == {"metrics.jsonl", "tokenizer", "model.safetensors"}
    with pytest.raises(FileNotFoundError, match="no finished run"):
        load_run(tmp_path / "run")


def test_another_run_is_refused_unless_overwritten(products, tmp_path):
    train(TrainConfig(**options(products, tmp_path / "run", steps=1)))
    before = (tmp_path / "run" / "model.safetensors").read_bytes()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="already holds a run"):
        train(TrainConfig(**options(products, tmp_path / "run", steps=1, seed=1)))
    with pytest.raises(FileNotFoundError):
        train(TrainConfig(**options({**products, "data": str(tmp_path / "none")}, tmp_path / "run", overwrite=True)))
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == before
    train(TrainConfig(**options(products, tmp_path / "run", steps=1, seed=1, overwrite=True)))
    assert (tmp_path / "run" / "model.safetensors").read_bytes() != before
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "resnet"}, "model: got 'resnet', takes 'fluid'"),
        ({"modalities": "sound"}, "modalities: got 'sound'"),
        ({"steps": 0}, "steps: got 0"),
        ({"lr": -1.0}, "lr: got -1.0"),
        ({"swap_text": 1.5}, "swap_text: got 1.5"),
        ({"backend": "fast"}, "fast"),
        ({"val": None}, "val: got nothing"),
        ({"batch_size": 64}, None),
    ],
)
def test_bad_settings_are_refused_before_a_file_is_touched(products, tmp_path, changes, message):
    if message is None:
        train(TrainConfig(**options(products, tmp_path / "run", steps=1, **changes)))  # fewer rows than a batch: one smaller batch
        return
    with pytest.raises(ValueError, match=message):
        train(TrainConfig(**options(products, tmp_path / "run", **changes)))
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="fused runs on this machine's GPU")
def test_fused_is_refused_at_once_without_a_gpu(products, tmp_path, monkeypatch):
    monkeypatch.setattr(mmfused.library, "INTERPRETED", False)  # conftest turns the interpreter on
    with pytest.raises(ValueError, match="backend: 'fused' cannot run on cpu"):
        train(TrainConfig(**options(products, tmp_path / "run", backend="fused")))
    with pytest.raises(ValueError, match="device: got 'cuda'"):
        train(TrainConfig(**options(products, tmp_path / "run", device="cuda")))


def test_a_label_the_training_data_lack_is_out_of_range(products, tmp_path):
    metadata = tmp_path / "val" / "metadata.csv"
    metadata.parent.mkdir()
    metadata.write_text("file_name,text,label\n,a red mug,7\n")
    with pytest.raises(ValueError, match="val: label 7 is out of range, takes the labels 0 to 4"):
        train(TrainConfig(**options({**products, "val": str(metadata.parent)}, tmp_path / "run")))


def test_skipped_rows_are_counted_and_told(products, tmp_path, caplog):
    metadata = tmp_path / "val" / "metadata.csv"
    metadata.parent.mkdir()
    metadata.write_text("file_name,text,label\n,a red mug,1\nnone.jpg,a mug,1\n,blue mug,x\n")
    summary = train(TrainConfig(**options({**products, "val": str(metadata.parent)}, tmp_path / "run", steps=1)))
    assert len(summary["skipped"]) == 2 and summary["val_rows"] == 1
    assert "val: 2 rows skipped" in caplog.text and "none.jpg" in caplog.text


def test_learning_rate_warms_up_and_comes_down():
    rates = [learning_rate(step, 100, 1.0, 0.1) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == 1.0 and rates[99] == pytest.approx(0.0)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[54] == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.5)))


def test_macro_f1_by_hand():
    labels, predictions = torch.tensor([0, 0, 1, 3]), torch.tensor([0, 1, 1, 2])
    assert macro_f1(predictions, labels) == pytest.approx((2 / 3 + 2 / 3 + 0 + 0) / 4)


def test_modality_dropout_hides_one_modality_and_never_both(products, tmp_path):
    class Tokenizer:
        pad_token_id, cls_token_id, sep_token_id = 0, 2, 3

    rows = 2000
    batch = {
        "pixel_values": torch.ones(rows, 3, 2, 2),
        "image_present": torch.arange(rows) % 4 > 0,
        "input_ids": torch.tensor([2, 7, 8, 3]).repeat(rows, 1),
        "attention_mask": torch.ones(rows, 4, dtype=torch.int64),
        "labels": torch.zeros(rows, dtype=torch.int64),
    }
    out = drop_modalities(batch, 0.2, 0.4, torch.Generator().manual_seed(0), Tokenizer)
    no_text = out["attention_mask"].sum(1) == 2
    no_image = ~out["image_present"]
    assert not (no_text & no_image).any()
    assert not (no_text & ~batch["image_present"]).any()
    assert (out["input_ids"][no_text] == torch.tensor([2, 3, 0, 0])).all()
    assert (out["input_ids"][~no_text] == batch["input_ids"][~no_text]).all()
    assert (out["pixel_values"][no_image & batch["image_present"]] == 0).all()
    assert no_text.float().mean() == pytest.approx(0.75 * 0.4, abs=0.04)
    assert (no_image & batch["image_present"]).float().mean() == pytest.approx(0.75 * 0.2, abs=0.04)
    assert (batch["input_ids"] == torch.tensor([2, 7, 8, 3])).all() and batch["pixel_values"].all()
