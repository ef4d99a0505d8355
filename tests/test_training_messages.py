"""Messages of train, ablate, eval, embed and demo: errors, warnings and stops by a signal."""

import json
import logging
import signal

import pytest
import training_runs
from training_runs import (
    SMALL_RUN,
    small_run,
    stop_in_step,
)

from mmfused.cli import main
from mmfused.training.files import read_json
from mmfused.training.run import TrainConfig, train

few_products = training_runs.few_products


def test_a_lowered_batch_size_is_logged(tmp_path, caplog):
    train(small_run(tmp_path / "run", batch_size=64, steps=1))
    assert "batch_size: 64 is lowered to 60, because there are only 60 rows" in caplog.text
    assert read_json(tmp_path / "run" / "config.json")["training"]["batch_size"] == 64


@pytest.mark.parametrize(
    "command",
    [
        *(
            [*"train --data generated --out x".split(), option, ""]
            for option in ("--init", "--tokenizer", "--host", "--val")
        ),
        [*"eval --checkpoint x --data x --products".split(), ""],
        [*"eval --data x --checkpoint".split(), ""],
        [*"embed --checkpoint x --data x --out x.npz --views".split(), " "],
        [*"ablate --data generated --out x --only".split(), ""],
    ],
    ids=" ".join,
)
def test_an_empty_value_is_refused(capsys, command):
    assert main(command) == 2
    name = command[-2].removeprefix("--")
    assert (
        f"mmfused: error: {name}: got {command[-1]!r}, expected a non-empty string"
        in capsys.readouterr().err
    )
    if command[0] == "train":
        with pytest.raises(ValueError, match=f"{name}: got '', expected a non-empty string"):
            TrainConfig(out="x", **{name: ""})


def test_ablate_and_demo_do_not_overwrite_files_of_other_programs(tmp_path, capsys):
    for name, command in (
        ("ablation.json", ["ablate", "--data", "generated", "--overwrite"]),
        ("demo.json", ["demo"]),
    ):
        (tmp_path / name).write_text("mine")
        assert main([*command, "--out", str(tmp_path)]) == 2
        assert (
            f"{name} was written by another program; choose another folder, or move it"
            in capsys.readouterr().err
        )
        assert (tmp_path / name).read_text() == "mine"
        (tmp_path / name).unlink()
    (tmp_path / "demo.png").write_text("mine")
    assert (
        main(["demo", "--out", str(tmp_path)]) == 2
        and (tmp_path / "demo.png").read_text() == "mine"
    )


def test_a_signal_stops_ablate(tmp_path, monkeypatch, capsys):
    stop_in_step(monkeypatch, 1)
    command = [
        "ablate",
        "--data",
        "generated",
        "--steps",
        "2",
        "--batch-size",
        "8",
        "--device",
        "cpu",
        "--out",
        str(tmp_path),
    ]
    assert main(command) == 128 + signal.SIGTERM
    assert "mmfused: stopped by SIGTERM after step 1, saved in" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--epochs", "1e30"], "epochs: got 1e+30, which make"),
        (["--val", "x"], "val: got 'x' with the generated set, expected no folder"),
        (["--init", "nowhere"], "init: got 'nowhere', expected the folder of a run or checkpoint,"),
        (
            ["--tokenizer", "./nowhere"],
            "tokenizer: got './nowhere', expected a tokenizer folder or a hub name",
        ),
        (["--device", "hpu"], "device: got 'hpu', expected auto, cpu"),
        (["--seed", str(2**70)], "seed: got 1180591620717411303424, expected an integer from 0"),
        (["--seed", "-1"], "seed: got -1, expected an integer from 0"),
        (["--lr", "inf"], "lr: got inf, expected a finite number"),
        (["--weight-decay", "nan"], "weight_decay: got nan, expected a finite number"),
        (["--epochs", "1e400"], "epochs: got inf"),
        (["--threads", "1000000"], "threads: got 1000000, expected an integer from 1 to 4096"),
        (["--max-length", "1"], "max_length: got 1"),
        (["--preset", "big"], "preset: got 'big', expected one of"),
        (
            ["--data", "nowhere"],
            "data: got 'nowhere', expected a folder with images and metadata.csv",
        ),
        (["--device", "abacus"], "device: got 'abacus'"),
    ],
)
def test_bad_arguments_are_refused_by_name(tmp_path, capsys, given, message):
    assert main(["train", "--data", "generated", "--out", str(tmp_path / "run"), *given]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_settings_of_the_wrong_type_are_refused():
    for changes, message in (
        ({"steps": 1.5}, "steps: got 1.5, expected an integer from 1 to 1000000000000 or None"),
        ({"lr": True}, "lr: got True, expected a finite number"),
        ({"betas": [0.9]}, "betas: got .0.9., expected 2 finite numbers"),
        ({"model_options": []}, "model_options: got .., expected an object"),
    ):
        with pytest.raises(ValueError, match=message):
            TrainConfig(out="x", **changes)
    config = TrainConfig(out="x", betas=(0.8, 0.9))
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_normal_run_logs_no_warning(tmp_path, caplog):
    caplog.set_level(logging.WARNING, "mmfused")
    train(small_run(tmp_path / "run", steps=SMALL_RUN["accumulate"]))
    assert caplog.text == ""
