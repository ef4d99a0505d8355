import csv
import json
import math

import pytest
import torch
from PIL import Image

import mmfused.library
import mmfused.training.loop
import mmfused.training.tasks
from mmfused.data import Batches, Collate, GeneratedProducts, train_tokenizer
from mmfused.training.datasets import load_data
from mmfused.training.folder_lock import MARKER
from mmfused.training.gradients import add_gradients
from mmfused.training.initial import build_model
from mmfused.training.metrics import class_scores, count, evaluate_classifier, scores
from mmfused.training.optimizer import learning_rate
from mmfused.training.run import TrainConfig, load_run, train
from mmfused.training.setup import make_batches
from mmfused.training.tasks import drop_modalities

FILES = {
    "checkpoints",
    "metrics.jsonl",
    "model.safetensors",
    "config.json",
    "summary.json",
    "curves.png",
    "tokenizer",
    MARKER,
}
SCORES = {"accuracy", "macro_precision", "macro_recall", "macro_f1"}


def write_products(folder, split, size):
    (folder / "images").mkdir(parents=True)
    products = GeneratedProducts(split, size=size)
    with open(folder / "metadata.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "text", "label"])
        for row in range(size):
            item, name = products[row], f"images/{row}.png"
            Image.fromarray(item["image"].permute(1, 2, 0).numpy()).save(folder / name)
            writer.writerow(
                [
                    name if item["image_present"] or not item["text"] else "",
                    item["text"],
                    item["label"] % 5,
                ]
            )
    return str(folder)


@pytest.fixture(scope="module")
def products(tmp_path_factory):
    folder = tmp_path_factory.mktemp("products")
    return {
        "data": write_products(folder / "train", "train", 48),
        "val": write_products(folder / "val", "val", 32),
    }


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


def test_a_run_writes_all_files(products, tmp_path):
    summary = train(TrainConfig(**options(products, tmp_path / "run", val_every=2)))
    assert {path.name for path in (tmp_path / "run").iterdir()} == FILES
    records = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    training = [record for record in records if "loss" in record]
    validation = [record for record in records if "accuracy" in record]
    assert [record["step"] for record in training] == [1, 2, 3, 4]
    assert all(
        {"ce", "contrastive", "moe", "lr", "seconds"} <= record.keys() for record in training
    )
    assert [record["step"] for record in validation] == [2, 4]
    assert all(record.keys() == {"step", "val_loss", *SCORES} for record in validation)
    assert all(summary[name] == validation[-1][name] for name in ("val_loss", *SCORES))
    assert summary["steps"] == 4 and summary["peak_memory"] > 2**20
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == summary
    with Image.open(tmp_path / "run" / "curves.png") as picture:
        assert picture.format == "PNG"


def test_a_loaded_run_gives_the_recorded_accuracy(products, tmp_path):
    config = TrainConfig(**options(products, tmp_path / "run"))
    summary = train(config)
    model, tokenizer = load_run(tmp_path / "run")
    _, val_batches = make_batches(config, *load_data(config)[:2], tokenizer, 32, model.config)
    result = evaluate_classifier(model, val_batches)
    assert result["accuracy"] == summary["accuracy"]
    assert result["val_loss"] == pytest.approx(summary["val_loss"], rel=1e-5)


def test_the_same_seed_gives_bitwise_equal_losses(products, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(
            TrainConfig(
                **options(
                    products,
                    tmp_path / name,
                    seed=seed,
                    swap_text=0.3,
                    drop_image=0.1,
                    drop_text=0.3,
                )
            )
        )
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert losses(tmp_path / "a") != losses(tmp_path / "c")


@pytest.mark.parametrize("modalities", ["both", "image", "text"])
def test_reference_and_composed_give_close_losses(products, tmp_path, modalities):
    for backend in ("reference", "composed"):
        train(
            TrainConfig(
                **options(products, tmp_path / backend, backend=backend, modalities=modalities)
            )
        )
    assert losses(tmp_path / "reference") == pytest.approx(losses(tmp_path / "composed"), rel=1e-4)


def test_training_lowers_the_loss(products, tmp_path):
    train(
        TrainConfig(**options(products, tmp_path / "run", steps=30, batch_size=48, augment=False))
    )
    curve = losses(tmp_path / "run")
    assert sum(curve[-5:]) < 0.8 * sum(curve[:5])


def test_a_run_that_fails_at_the_end_can_be_resumed_but_not_loaded(products, tmp_path, monkeypatch):
    def fail(*args):
        raise RuntimeError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr("mmfused.training.run_folder.draw_curves", fail)
        with pytest.raises(RuntimeError, match="disk full"):
            train(TrainConfig(**options(products, tmp_path / "run", steps=1)))
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert left == {"checkpoints", "metrics.jsonl", "tokenizer", "model.safetensors", MARKER}
    with pytest.raises(FileNotFoundError, match="no finished run"):
        load_run(tmp_path / "run")
    train(TrainConfig(**options(products, tmp_path / "run", steps=1, resume=True)))
    load_run(tmp_path / "run")
    assert {path.name for path in (tmp_path / "run").iterdir()} == FILES


def test_an_existing_run_is_replaced_only_with_overwrite(products, tmp_path):
    train(TrainConfig(**options(products, tmp_path / "run", steps=1)))
    before = (tmp_path / "run" / "model.safetensors").read_bytes()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="already holds a run"):
        train(TrainConfig(**options(products, tmp_path / "run", steps=1, seed=1)))
    with pytest.raises(FileNotFoundError):
        train(
            TrainConfig(
                **options(
                    {**products, "data": str(tmp_path / "none")}, tmp_path / "run", overwrite=True
                )
            )
        )
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == before
    train(TrainConfig(**options(products, tmp_path / "run", steps=1, seed=1, overwrite=True)))
    assert (tmp_path / "run" / "model.safetensors").read_bytes() != before
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model": "resnet"},
            "model: got 'resnet', expected one of fluid, uniecs, unica, moon2, unite",
        ),
        ({"modalities": "sound"}, "modalities: got 'sound'"),
        ({"amp": "fp16"}, "amp: got 'fp16', expected one of auto, bf16, off"),
        ({"accumulate": 0}, "accumulate: got 0"),
        ({"save_every": 0}, "save_every: got 0"),
        ({"keep": 0}, "keep: got 0"),
        ({"steps": 0}, "steps: got 0"),
        ({"lr": -1.0}, "lr: got -1.0"),
        ({"swap_text": 1.5}, "swap_text: got 1.5"),
        ({"backend": "fast"}, "fast"),
        ({"val": None}, "val is required"),
        (
            {"image_encoder": "x", "modalities": "text"},
            "image_encoder: got 'x' with modalities 'text'",
        ),
        (
            {"text_encoder": "x", "modalities": "image"},
            "text_encoder: got 'x' with modalities 'image'",
        ),
        (
            {"image_encoder": "x", "patch_size": 8},
            "patch_size: got 8 with image_encoder, expected no patch_size",
        ),
        ({"batch_size": 64}, None),
    ],
)
def test_bad_settings_are_refused_before_a_file_is_written(products, tmp_path, changes, message):
    if message is None:
        # A batch size above the number of rows is allowed.
        train(TrainConfig(**options(products, tmp_path / "run", steps=1, **changes)))
        return
    with pytest.raises(ValueError, match=message):
        train(TrainConfig(**options(products, tmp_path / "run", **changes)))
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="fused is refused only without a GPU")
def test_fused_is_refused_before_training_without_a_gpu(products, tmp_path, monkeypatch):
    monkeypatch.setattr(mmfused.library, "KERNELS_ON_CPU", False)  # conftest enables them
    with pytest.raises(ValueError, match="backend: 'fused' cannot run on cpu"):
        train(TrainConfig(**options(products, tmp_path / "run", backend="fused")))
    with pytest.raises(ValueError, match="device: got 'cuda'"):
        train(TrainConfig(**options(products, tmp_path / "run", device="cuda")))


def test_a_label_above_those_of_the_training_data_is_refused(products, tmp_path):
    metadata = tmp_path / "val" / "metadata.csv"
    metadata.parent.mkdir()
    metadata.write_text("file_name,text,label\n,a red mug,7\n")
    with pytest.raises(ValueError, match="val: got the label 7, expected labels from 0 to 4"):
        train(TrainConfig(**options({**products, "val": str(metadata.parent)}, tmp_path / "run")))


def test_skipped_rows_are_counted_and_logged(products, tmp_path, caplog):
    metadata = tmp_path / "val" / "metadata.csv"
    metadata.parent.mkdir()
    metadata.write_text("file_name,text,label\n,a red mug,1\nnone.jpg,a mug,1\n,blue mug,x\n")
    summary = train(
        TrainConfig(**options({**products, "val": str(metadata.parent)}, tmp_path / "run", steps=1))
    )
    assert len(summary["skipped"]) == 2 and summary["val_rows"] == 1
    assert "val: 2 rows skipped" in caplog.text and "none.jpg" in caplog.text


def test_learning_rate_warms_up_and_decays():
    rates = [learning_rate(step, 100, 1.0, 0.1) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == 1.0 and rates[99] == pytest.approx(0.0)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[54] == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.5)))


def scores_in_loops(predictions, labels):
    """Compute the scores as scikit-learn defines them; a division by 0 gives 0."""
    per_class = []
    for label in sorted({*predictions, *labels}):
        pairs = list(zip(predictions, labels, strict=True))
        hits = sum(p == label and t == label for p, t in pairs)
        precision = hits / max(1, sum(p == label for p, _ in pairs))
        recall = hits / max(1, sum(t == label for _, t in pairs))
        f1 = 2 * precision * recall / (precision + recall) if hits else 0.0
        per_class.append((precision, recall, f1))
    means = [sum(column) / len(per_class) for column in zip(*per_class, strict=True)]
    right = sum(p == t for p, t in zip(predictions, labels, strict=True))
    return {
        "accuracy": right / len(labels),
        "macro_precision": means[0],
        "macro_recall": means[1],
        "macro_f1": means[2],
    }


def test_scores_of_a_small_example():
    labels, predictions = torch.tensor([0, 0, 1, 3]), torch.tensor([0, 1, 1, 2])
    expected = {
        "accuracy": 1 / 2,
        "macro_precision": (1 + 1 / 2) / 4,
        "macro_recall": (1 / 2 + 1) / 4,
        "macro_f1": (2 / 3 + 2 / 3) / 4,
    }
    assert scores(predictions, labels) == pytest.approx(expected)
    values = class_scores(count(predictions, labels))
    assert values["precision"].tolist() == [1, 0.5, 0, 0] and values["recall"].tolist() == [
        0.5,
        1,
        0,
        0,
    ]


def test_scores_of_large_labels_need_no_more_memory():
    labels, predictions = torch.tensor([2**31 - 2, 5, 5]), torch.tensor([2**31 - 2, 5, 2**31 - 2])
    assert scores(predictions, labels) == scores(torch.tensor([1, 0, 1]), torch.tensor([1, 0, 0]))


@pytest.mark.parametrize("label", [10**6, 2**31 - 1])
def test_a_label_that_is_too_large_is_refused_before_memory_is_allocated(products, tmp_path, label):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "metadata.csv").write_text(f"file_name,text,label\n,a red mug,{label}\n")
    with pytest.raises(
        ValueError, match=f"data: got the label {label}, expected labels below 1000000"
    ):
        train(
            TrainConfig(**options({**products, "data": str(tmp_path / "data")}, tmp_path / "run"))
        )


@pytest.mark.parametrize("seed", range(5))
def test_scores_equal_scores_in_loops(seed):
    generator = torch.Generator().manual_seed(seed)
    # Classes 0 to 2 are never true, and classes 9 to 11 are predicted only if they are true.
    labels = torch.randint(0, 9, (40,), generator=generator) + 3
    predictions = torch.where(
        torch.rand(40, generator=generator) < 0.5,
        labels,
        torch.randint(0, 9, (40,), generator=generator),
    )
    assert scores(predictions, labels) == pytest.approx(
        scores_in_loops(predictions.tolist(), labels.tolist())
    )


def text_model_and_batches(products, tmp_path, batch_size):
    """Return a model in which samples are independent, and its batches.

    The model has one modality, no dropout, and cross-entropy as its only loss.
    """
    without_dropout = {"hidden_dropout_prob": 0.0}
    model_options = {"loss_weights": (1, 0, 0), "text": without_dropout}
    changes = {"modalities": "text", "batch_size": batch_size, "model_options": model_options}
    config = TrainConfig(**options(products, tmp_path / "run", **changes))
    data = load_data(config)[:2]
    tokenizer = train_tokenizer(data[0].texts)
    torch.manual_seed(0)
    model = build_model(config, data[0].num_classes, tokenizer)
    return model, make_batches(config, *data, tokenizer, 32, model.config)[0]


def test_accumulated_gradients_equal_those_of_one_large_batch(products, tmp_path):
    gradients = {}
    for batch_size in (12, 48):
        model, batches = text_model_and_batches(products, tmp_path, batch_size)
        loss, terms = add_gradients(model, batches, len(batches))
        gradients[batch_size] = {
            name: p.grad for name, p in model.named_parameters() if p.grad is not None
        }
        gradients[batch_size]["loss"], gradients[batch_size]["ce"] = loss, terms["ce"]
        assert len(batches) == 48 // batch_size
    assert gradients[12].keys() == gradients[48].keys() and len(gradients[12]) > 20
    assert max(float(gradient.norm()) for gradient in gradients[48].values()) > 0.1
    for name, gradient in gradients[48].items():
        torch.testing.assert_close(gradients[12][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_a_step_accumulates_the_given_number_of_batches(products, tmp_path, monkeypatch):
    seen = []

    def spy(model, batch):
        seen.append(batch["labels"].tolist())
        return model_inputs(model, batch)

    model_inputs = mmfused.training.tasks.model_inputs
    monkeypatch.setattr(mmfused.training.tasks, "model_inputs", spy)
    summary = train(
        TrainConfig(
            **options(products, tmp_path / "run", steps=None, epochs=4, batch_size=8, accumulate=3)
        )
    )
    assert summary["steps"] == 8 and len(losses(tmp_path / "run")) == 8
    # An epoch has 6 batches. Each epoch has the same 48 labels in another order.
    epochs = [sum(seen[start : start + 6], []) for start in range(0, 24, 6)]
    assert (
        len(seen) == 24
        and all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs)
        and epochs[0] != epochs[1]
    )


def test_a_cpu_uses_bf16_autocast_only_if_requested(products, tmp_path, monkeypatch):
    found, original = [], mmfused.training.tasks.add_gradients

    def spy(model, batches, count, amp):
        hook = model.gate.mlp[0].register_forward_hook(
            lambda module, given, result: found.append(result.dtype)
        )
        loss, terms = original(model, batches, count, amp)
        hook.remove()
        found.extend([loss.dtype, *(term.dtype for term in terms.values())])
        return loss, terms

    monkeypatch.setattr(mmfused.training.tasks, "add_gradients", spy)
    curves = {}
    for amp in ("auto", "off", "bf16"):
        found.clear()
        summary = train(
            TrainConfig(
                **options(products, tmp_path / amp, steps=2, amp=amp, device="cpu", augment=False)
            )
        )
        curves[amp] = losses(tmp_path / amp)
        assert summary["amp"] == ("bf16" if amp == "bf16" else "off")
        assert found[0] == (torch.bfloat16 if amp == "bf16" else torch.float32)
        assert found[1:5] == [torch.float32] * 4
    assert curves["auto"] == curves["off"] != curves["bf16"]
    assert curves["bf16"] == pytest.approx(curves["off"], rel=0.05)
    model, _ = load_run(tmp_path / "bf16")
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_a_stream_from_the_middle_is_the_same_and_builds_no_earlier_batch(monkeypatch):
    data = GeneratedProducts("train", size=60)
    batches = Batches(
        data,
        Collate(train_tokenizer(data.texts), 32, 16, augment=True),
        8,
        shuffle=True,
        seed=3,
        drop_last=True,
    )
    built, make = [], batches.items.finish
    monkeypatch.setattr(batches.items, "finish", lambda *args: built.append(1) or make(*args))
    stream = batches.stream()
    expected = [next(stream) for _ in range(20)]
    for position in (0, 5, 7, 16):
        built.clear()
        got = next(batches.stream(position))
        assert len(built) == 1 and all(
            torch.equal(got[key], expected[position][key]) for key in got
        )
    batches.set_epoch(2)
    assert torch.equal(next(iter(batches))["pixel_values"], expected[14]["pixel_values"])


def test_weights_that_are_not_finite_are_not_saved(products, tmp_path, monkeypatch):
    update = mmfused.training.loop.update

    def poisoned(model, *args):
        result = update(model, *args)
        torch.nn.init.constant_(model.bottleneck.queries, float("nan"))
        return result

    monkeypatch.setattr(mmfused.training.loop, "update", poisoned)
    with pytest.raises(
        RuntimeError,
        match="bottleneck.queries is not finite after step 1, so no checkpoint was written",
    ):
        train(TrainConfig(**options(products, tmp_path / "run", save_every=1, val_every=4)))
    assert not (tmp_path / "run" / "checkpoints").exists()


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
