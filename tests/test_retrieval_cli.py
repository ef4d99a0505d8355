"""Train, evaluate and ablate a retrieval model, and embed with it, from the command line."""

import csv
import json
import os
import shutil
import socket

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.multiprocessing as mp
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer

from mmfused.cli import embed, main
from mmfused.data import train_tokenizer
from mmfused.models import MODELS, qwen
from mmfused.models.presets import TINY_QWEN2_VL
from mmfused.training.files import read_json
from mmfused.training.folder_lock import MARKER
from mmfused.training.run import TrainConfig, train
from mmfused.training.run_folder import load_run

COLORS = ("red", "green", "blue", "white", "black", "brown")


def write(folder, rows):
    """Write a data set of rows (label, text) and return its folder.

    The color of a picture depends on its label and its row. If the text is None, the picture is
    broken.
    """
    (folder / "images").mkdir(parents=True)
    with open(folder / "metadata.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "title", "text", "label", "coarse_label"])
        for i, (label, text) in enumerate(rows):
            name = f"images/{i}.png"
            shade = np.full(
                (32, 32, 3), (40 * label % 256, 90 * label % 256, 7 * i % 256), np.uint8
            )
            Image.fromarray(shade).save(folder / name)
            if text is None:
                (folder / name).write_bytes(b"no picture")
            title = f"a {COLORS[label % 6]} thing" if text else ""
            writer.writerow([name, title, text or "", label, label // 2])
    return str(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("retrieval")
    rows = [(label, f"thing number {i} in {COLORS[label]}") for i in range(3) for label in range(6)]
    products = [(label, f"the {COLORS[label]} product") for label in range(6)]
    return {
        "data": write(root / "train", rows),
        "val": write(root / "val", [*rows[:8], (0, None), (9, "an unknown thing"), (1, "")]),
        "products": write(root / "products", products),
    }


def arguments(folders, out, *more):
    named = [part for name, folder in folders.items() for part in (f"--{name}", folder)]
    small = [
        "--steps",
        "2",
        "--batch-size",
        "4",
        "--image-size",
        "32",
        "--max-length",
        "12",
        "--backend",
        "composed",
    ]
    return [
        "train",
        "--model",
        "uniecs",
        *named,
        *small,
        "--device",
        "cpu",
        "--out",
        str(out),
        *more,
    ]


@pytest.fixture(scope="module")
def run(folders, tmp_path_factory):
    out = tmp_path_factory.mktemp("uniecs") / "run"
    assert (
        main(
            arguments(
                {**folders, "val": folders["data"]},
                out,
                "--text-column",
                "title",
                "--val-every",
                "1",
            )
        )
        == 0
    )
    return out


def test_a_run_records_scores_of_every_pair_of_views(run):
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "loss" in record] == [1, 2]
    validated = [record for record in records if "pairs" in record]
    assert [record["step"] for record in validated] == [1, 2] and len(validated[0]["pairs"]) == 9
    assert read_json(run / "summary.json")["recall_at_1"] == validated[1]["recall_at_1"]
    assert (run / "curves.png").stat().st_size > 1000


def test_eval_reports_skipped_rows_missing_modalities_and_unknown_labels(
    folders, run, tmp_path, capsys
):
    command = [
        "eval",
        "--checkpoint",
        str(run),
        "--backend",
        "composed",
        "--device",
        "cpu",
        "--out",
        str(tmp_path / "n.json"),
    ]
    assert main([*command, "--data", folders["val"], "--products", folders["products"]]) == 0
    output, found = capsys.readouterr().out, read_json(tmp_path / "n.json")
    assert (
        "10 rows, 1 skipped" in output
        and "0 rows without a picture, 1 without a text" in output
        and "without a product: 9" in output
    )
    assert "image->both" in output and "R@1" in output
    assert (
        found["rows"] == 10 and len(found["skipped"]) == 1 and "images/8.png" in found["skipped"][0]
    )
    assert found["unknown_labels"] == [9] and found["without_text"] == 1
    assert (
        found["pairs"]["image->image"] | {"queries": 9, "unanswerable": 1}
        == found["pairs"]["image->image"]
    )
    assert found["pairs"]["text->image"]["queries"] == 8
    assert found["pairs"]["image->image"]["chance"]["recall_at_1"] == pytest.approx(1 / 6)
    # Without products, each item is ranked among the other items.
    assert main([*command, "--data", folders["data"]]) == 0
    found = read_json(tmp_path / "n.json")
    assert found["pairs"]["image->image"]["candidates"] == 18
    assert found["pairs"]["image->image"]["chance"]["recall_at_1"] == pytest.approx(2 / 17)


def test_embed_continues_after_an_interruption(folders, run, tmp_path, capsys, monkeypatch):
    from mmfused.training import retrieval_metrics

    out = tmp_path / "items.npz"
    command = [
        "embed",
        "--checkpoint",
        str(run),
        "--data",
        folders["val"],
        "--out",
        str(out),
        "--batch-size",
        "4",
        "--device",
        "cpu",
    ]
    calls, embed_items = [], retrieval_metrics.embed_items

    def failing(*args):
        calls.append(1)
        if len(calls) == 3:
            raise OSError("power failure")
        return embed_items(*args)

    monkeypatch.setattr(retrieval_metrics, "embed_items", failing)
    assert main(command) == 2 and not out.exists()
    # Two of three batches exist already. One row of them is embedded again for comparison.
    assert main(command) == 0 and len(calls) == 5
    arrays = np.load(out)
    assert (
        arrays["image"].shape == arrays["both"].shape == (10, 128)
        and arrays["image"].dtype == np.float32
    )
    assert np.allclose(np.linalg.norm(arrays["both"], axis=1), 1, atol=1e-5)
    assert arrays["labels"].tolist()[-2:] == [9, 1] and arrays["file_names"][-1] == "images/10.png"
    assert arrays["has_text"].tolist() == [True] * 9 + [False] and "images/8.png" in str(
        arrays["skipped"]
    )
    assert not out.with_name("items.npz.parts").exists()
    assert main(command) == 2 and "already exists" in capsys.readouterr().err
    assert main([*command, "--overwrite", "--views", "text"]) == 0 and "image" not in np.load(out)
    with pytest.raises(SystemExit):
        main(["embed"])
    assert (
        main([*command, "--overwrite", "--views", "sound"]) == 2
        and "views: got sound, expected some of" in capsys.readouterr().err
    )


DAMAGED = {
    "another dtype": lambda image: image.to(torch.bfloat16),
    "a single number": lambda image: image.sum(),
    "another width": lambda image: image[:, :5].contiguous(),
    "not finite": lambda image: image * float("nan"),
}


@pytest.mark.parametrize("name", [*DAMAGED, "truncated"])
def test_embed_recomputes_a_damaged_part(folders, run, tmp_path, capsys, monkeypatch, caplog, name):
    out, part = tmp_path / "items.npz", tmp_path / "items.npz.parts" / "00000000.safetensors"
    command = [
        "embed",
        "--checkpoint",
        str(run),
        "--data",
        folders["val"],
        "--batch-size",
        "4",
        "--device",
        "cpu",
        "--out",
    ]
    assert main([*command, str(tmp_path / "whole.npz")]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(embed, "_join_parts", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            main([*command, str(out)])
    if name == "truncated":
        os.truncate(part, 100)
    else:
        tensors = safetensors.torch.load_file(part)
        part.write_bytes(
            safetensors.torch.save({**tensors, "image": DAMAGED[name](tensors["image"])})
        )
    assert main([*command, str(out)]) == 0 and "the batch is embedded again" in caplog.text
    with np.load(tmp_path / "whole.npz") as whole, np.load(out) as again:
        assert all(np.array_equal(whole[key], again[key]) for key in whole.files)


@pytest.mark.parametrize("changed", ["picture", "text"])
def test_embed_refuses_parts_of_changed_data(folders, run, tmp_path, capsys, monkeypatch, changed):
    data = shutil.copytree(folders["val"], tmp_path / "data")
    command = [
        "embed",
        "--checkpoint",
        str(run),
        "--data",
        str(data),
        "--batch-size",
        "4",
        "--device",
        "cpu",
    ]
    command += ["--out", str(tmp_path / "items.npz")]
    with monkeypatch.context() as patch:
        patch.setattr(embed, "_join_parts", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            main(command)
    if changed == "picture":
        shutil.copy(data / "images" / "1.png", data / "images" / "0.png")
    else:
        rows = (data / "metadata.csv").read_text()
        (data / "metadata.csv").write_text(rows.replace("thing number 0", "thing number nought"))
    assert (
        main(command) == 2
        and "or from other pictures or texts; remove or overwrite them" in capsys.readouterr().err
    )
    assert main([*command, "--overwrite"]) == 0


def test_a_lowered_batch_size_is_logged_for_retrieval_models(folders, tmp_path, caplog):
    sets = {**folders, "val": folders["data"]}
    assert main(arguments(sets, tmp_path / "run", "--batch-size", "64", "--steps", "1")) == 0
    assert "batch_size: 64 is lowered to 18, because there are only 18 rows" in caplog.text


def test_embed_refuses_parts_of_another_job(folders, run, tmp_path, capsys):
    parts = tmp_path / "items.npz.parts"
    parts.mkdir()
    (parts / "job.json").write_text("{}")
    (parts / MARKER).touch()
    command = [
        "embed",
        "--checkpoint",
        str(run),
        "--data",
        folders["val"],
        "--out",
        str(tmp_path / "items.npz"),
    ]
    assert (
        main(command) == 2 and "holds parts made with another checkpoint" in capsys.readouterr().err
    )


def test_a_resumed_run_is_bitwise_equal_to_an_uninterrupted_one(folders, tmp_path):
    options = dict(
        model="uniecs",
        **{**folders, "val": folders["data"]},
        steps=3,
        batch_size=4,
        image_size=32,
        max_length=12,
    )
    options |= dict(
        backend="composed", device="cpu", progress=False, save_every=1, val_every=3, grad_cache=3
    )
    whole = train(TrainConfig(out=str(tmp_path / "whole"), **options))
    train(TrainConfig(out=str(tmp_path / "other"), **options))
    for name in ("config.json", "summary.json", "model.safetensors"):
        (tmp_path / "other" / name).unlink()
    shutil.rmtree(sorted((tmp_path / "other" / "checkpoints").iterdir())[-1])
    resumed = train(TrainConfig(out=str(tmp_path / "other"), resume=True, **options))
    assert resumed["train_loss"] == whole["train_loss"]
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "other")]
    assert weights[0] == weights[1]


def test_init_loads_the_weights_of_the_first_stage(folders, tmp_path, capsys):
    sets = {**folders, "val": folders["data"]}
    unite = ["--model", "unite", "--option", 'query_views=["image"]']
    assert main(arguments(sets, tmp_path / "one", *unite, "--option", "stage=1")) == 0
    init = ["--init", str(tmp_path / "one"), "--lr", "1e-9", "--steps", "1"]
    assert main(arguments(sets, tmp_path / "two", *unite, "--option", "stage=2", *init)) == 0
    stages = [
        read_json(tmp_path / name / "config.json")["model"]["stage"] for name in ("one", "two")
    ]
    assert stages == [1, 2]
    first, second = (
        safetensors.torch.load_file(tmp_path / name / "model.safetensors")
        for name in ("one", "two")
    )
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=0, atol=1e-6)
    assert (
        main(arguments(sets, tmp_path / "three", *init)) == 2
        and "a run of 'unite', expected a run of 'uniecs'" in capsys.readouterr().err
    )
    assert main(arguments(sets, tmp_path / "three", *unite, "--option", "stage")) == 2
    assert "option: got 'stage', expected NAME=VALUE" in capsys.readouterr().err
    assert main(arguments(sets, tmp_path / "three", *unite, "--option", "stages=1")) == 2
    assert "UNITEConfig: got a field 'stages', expected host" in capsys.readouterr().err


def train_on_rank(rank, world, port, options):
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "MASTER_PORT": str(port),
    }
    os.environ |= {"MASTER_ADDR": "127.0.0.1"}
    torch.set_num_threads(1)
    train(TrainConfig(**options))


def test_two_ranks_give_the_same_losses_as_one_process(folders, tmp_path):
    without_dropout = {"text": {"hidden_dropout_prob": 0.0}}
    options = dict(
        model="uniecs",
        **{**folders, "val": folders["data"]},
        steps=3,
        batch_size=4,
        image_size=32,
        max_length=12,
    )
    options |= dict(
        backend="composed",
        device="cpu",
        progress=False,
        augment=False,
        model_options=without_dropout,
        lr=1e-2,
    )
    train(TrainConfig(out=str(tmp_path / "one"), **options))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(train_on_rank, (2, port, {**options, "out": str(tmp_path / "two")}), nprocs=2)
    curves = []
    for name in ("one", "two"):
        records = [
            json.loads(line)
            for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        ]
        curves.append([record["loss"] for record in records if "loss" in record])
    assert curves[1] == pytest.approx(curves[0], rel=1e-4) and len(curves[0]) == 3
    assert read_json(tmp_path / "two" / "summary.json")["recall_at_1"] > 0


def test_ablate_trains_the_model_without_each_named_part(folders, tmp_path, capsys):
    command = ["ablate", *arguments({**folders, "val": folders["data"]}, tmp_path)[1:]]
    assert main([*command, "--only", "clal,fusion"]) == 0
    assert "without clal" in capsys.readouterr().out
    summaries = read_json(tmp_path / "ablation.json")
    assert summaries.keys() == {"whole", "without clal", "without fusion"}
    assert read_json(tmp_path / "without-clal" / "config.json")["model"]["without"] == ["clal"]
    records = (tmp_path / "without-clal" / "metrics.jsonl").read_text()
    assert "ppm" not in records and "ppm" in (tmp_path / "whole" / "metrics.jsonl").read_text()
    assert (
        main([*command, "--only", "sound"]) == 2 and "only: got 'sound'" in capsys.readouterr().err
    )


def test_ablate_skips_parts_that_the_model_does_not_have(folders, tmp_path, capsys):
    command = [
        "ablate",
        *arguments(
            {**folders, "val": folders["data"]}, tmp_path, "--model", "unite", "--steps", "1"
        )[1:],
    ]
    assert main(command) == 0
    assert (
        "skipped: without: got 'dual' with stage 2, which already excludes it, expected stage 1"
        in capsys.readouterr().out
    )
    expected = {"whole", *(f"without {part}" for part in ("mamcl", "negatives", "fusion"))}
    assert read_json(tmp_path / "ablation.json").keys() == expected
    assert (
        main([*command, "--only", "dual", "--overwrite"]) == 2
        and "without: got 'dual' with stage 2" in capsys.readouterr().err
    )


def test_train_and_evaluate_with_qwens_own_tokenizer(folders, tmp_path):
    """Qwen's tokenizer adds no special tokens, so an empty text would have no tokens."""
    draft = Tokenizer(models.BPE())
    draft.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = {
        "initial_alphabet": sorted(pre_tokenizers.ByteLevel.alphabet()),
        "show_progress": False,
    }
    draft.train_from_iterator(
        ["a red thing"],
        trainers.BpeTrainer(vocab_size=270, special_tokens=["<|endoftext|>"], **alphabet),
    )
    found = json.loads(draft.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=found["vocab"], merges=[tuple(pair) for pair in found["merges"]]
    )
    assert tokenizer("")["input_ids"] == []
    options = {**TINY_QWEN2_VL, "text_config": {**TINY_QWEN2_VL["text_config"], "vocab_size": 300}}
    for part in (qwen.build_qwen2_vl(options), tokenizer):
        part.save_pretrained(tmp_path / "host")
    sets = {**folders, "val": folders["data"]}
    given = [
        "--model",
        "unite",
        "--host",
        str(tmp_path / "host"),
        "--steps",
        "1",
        "--max-length",
        "24",
        "--save-every",
        "1",
    ]
    assert main(arguments(sets, tmp_path / "run", *given)) == 0
    evaluated = [
        "eval",
        "--checkpoint",
        str(tmp_path / "run"),
        "--data",
        folders["val"],
        "--products",
        folders["products"],
    ]
    assert main([*evaluated, "--out", str(tmp_path / "n.json"), "--device", "cpu"]) == 0
    pairs = read_json(tmp_path / "n.json")["pairs"]
    # One text is empty and one label is unknown.
    assert pairs["text->image"]["queries"] == 8 and pairs["image->image"]["queries"] == 9
    _, loaded = load_run(tmp_path / "run")
    ids = loaded("red", add_special_tokens=True)["input_ids"]
    assert (ids[0], ids[-1]) == (loaded.cls_token_id, loaded.sep_token_id) and loaded.decode(
        ids[1:-1]
    ) == "red"


def test_training_starts_from_the_weights_of_the_host(folders, tmp_path):
    tokenizer = MODELS["unite"].config.prepare_tokenizer(train_tokenizer(["a thing", *COLORS]))
    options = {
        **TINY_QWEN2_VL,
        "text_config": {**TINY_QWEN2_VL["text_config"], "vocab_size": len(tokenizer)},
    }
    host = qwen.build_qwen2_vl(options)
    for part in (host, tokenizer):
        part.save_pretrained(tmp_path / "host")
    sets = {**folders, "val": folders["data"]}
    for name in ("unite", "moon2"):
        given = [
            "--model",
            name,
            "--host",
            str(tmp_path / "host"),
            "--lr",
            "1e-9",
            "--steps",
            "1",
            "--image-size",
            "32",
        ]
        assert main(arguments(sets, tmp_path / name, *given)) == 0
        trained = safetensors.torch.load_file(tmp_path / name / "model.safetensors")
        for key, tensor in host.state_dict().items():
            if name == "unite" or ".mlp." not in key or "visual" in key:
                torch.testing.assert_close(trained[f"host.{key}"], tensor, rtol=0, atol=1e-6)
            else:  # MOON2.0's experts are copies with a little noise
                key = key.replace("_proj.weight", "").replace("mlp.", "mlp.w_")
                for expert in trained[f"host.{key}"]:
                    assert (expert - tensor).norm() < 0.05 * tensor.norm()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model": "fluid", "products": "x"},
            "products: got 'x' with model 'fluid', expected a retrieval model",
        ),
        ({"model": "fluid", "grad_cache": 4}, "grad_cache: got 4 with model 'fluid'"),
        (
            {"model": "uniecs", "host": "x"},
            "host: got 'x' with model 'uniecs', expected moon2 or unite",
        ),
        ({"model": "unite", "text_encoder": "x"}, "text_encoder: got 'x' with model 'unite'"),
        (
            {"model": "unica", "modalities": "image"},
            "modalities: got 'image' with model 'unica', expected 'both'",
        ),
        (
            {"model": "unica", "grad_cache": 4, "accumulate": 2},
            "accumulate: got 2 with grad_cache, expected 1",
        ),
    ],
)
def test_settings_without_effect_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(out="x", **changes)


def test_unusable_data_and_data_settings_are_refused_before_training(folders, tmp_path, capsys):
    stranger = write(tmp_path / "stranger", [(9, "an unknown thing")])
    assert main(arguments({**folders, "val": stranger}, tmp_path / "run")) == 2
    assert (
        "val: got no row with a product of the same label, expected at least one"
        in capsys.readouterr().err
    )
    assert (
        main(
            [
                "train",
                "--model",
                "unica",
                "--data",
                "generated",
                "--text-column",
                "title",
                "--out",
                str(tmp_path / "run"),
            ]
        )
        == 2
    )
    assert "text_column: got 'title' with the generated set" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_embed_refuses_a_classifier(folders, tmp_path, capsys):
    sets = {"data": folders["data"], "val": folders["data"]}
    assert main(arguments(sets, tmp_path / "run", "--model", "fluid", "--steps", "1")) == 0
    command = [
        "embed",
        "--checkpoint",
        str(tmp_path / "run"),
        "--data",
        folders["val"],
        "--out",
        str(tmp_path / "items.npz"),
    ]
    assert (
        main(command) == 2
        and "holds fluid, a classifier, expected a retrieval model" in capsys.readouterr().err
    )
