import argparse
import builtins
import dataclasses
import functools
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

import mmfused
from mmfused.cli import main
from mmfused.training.config import TrainConfig

ROOT = Path(mmfused.__file__).parent.parent


def python_m(*arguments, cwd=ROOT):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        [sys.executable, "-m", "mmfused", *map(str, arguments)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
    )


def test_python_m_mmfused_lists_every_command():
    done = python_m("--help")
    assert done.returncode == 0, done.stderr
    for command in ("demo", "train", "eval", "bench", "inspect", "env"):
        assert command in done.stdout


def test_version_is_printed(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert (
        stop.value.code == 0 and capsys.readouterr().out.strip() == f"mmfused {mmfused.__version__}"
    )


@pytest.mark.parametrize("arguments", [[], ["fly"], ["train"], ["train", "--steps", "many"]])
def test_a_bad_command_line_exits_with_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2 and "usage: mmfused" in capsys.readouterr().err


def test_a_command_does_not_import_other_commands():
    code = (
        "import sys; from mmfused.cli import main; main(['env']); "
        "sys.exit('mmfused.cli.demo' in sys.modules or 'timm' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_env_prints_versions_and_ops(capsys):
    assert main(["env"]) == 0
    out = capsys.readouterr().out
    for word in (
        "mmfused",
        "python",
        "torch",
        "triton",
        "timm",
        "transformers",
        "CUDA",
        "query_pooling:",
    ):
        assert word in out
    assert "fused on" in out or "not fused: " in out
    with mmfused.backend("reference"):
        assert main(["env"]) == 0
    assert "query_pooling: reference on" in capsys.readouterr().out


def test_env_shows_variables_that_change_what_runs_and_no_others(capsys, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", "/somewhere")
    monkeypatch.setenv("ACCESS_TOKEN", "secret")
    assert main(["env"]) == 0
    output = capsys.readouterr().out
    assert "TRITON_CACHE_DIR" in output and "/somewhere" in output and "secret" not in output


def test_a_reader_that_stops_is_no_error():
    command = f"{sys.executable} -m mmfused env | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.returncode in (0, 141) and done.stdout.count("\n") == 1 and not done.stderr


def option_groups(command: str) -> dict[str, list[argparse.Action]]:
    parser = argparse.ArgumentParser()
    importlib.import_module(f"mmfused.cli.{command}").add_arguments(parser)
    return {group.title: group._group_actions for group in parser._action_groups}


def test_each_group_of_training_options_fits_a_screen(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    groups = capsys.readouterr().out.split("\n\n")
    assert len(groups) == 12  # usage, description, --help, eight groups, epilog
    assert max(group.count("\n") for group in groups) < 24


def test_the_help_of_training_states_the_defaults_of_the_config():
    """Names of options are those of TrainConfig's fields, except for two."""
    config = {entry.name: entry.default for entry in dataclasses.fields(TrainConfig)}
    config |= {"modalities": "image,text", "without": None, "option": None, "betas": "0.9,0.98"}
    actions = [action for group in option_groups("train").values() for action in group]
    for action in actions:
        if action.dest == "help":
            continue
        default = config[action.dest]
        stated = re.search(r"\(default: ([^()]*)\)$", action.help)
        if isinstance(default, bool):
            assert not stated
        elif isinstance(default, int | float):
            assert stated and float(stated[1]) == default, action.dest
        elif default is not None and default not in (dataclasses.MISSING, "auto", "generated"):
            assert stated and stated[1] == default, action.dest
        if default is dataclasses.MISSING or action.required:
            assert action.help.endswith("(required)")


def test_completion_names_the_package_that_it_needs(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["--print-completion", "bash"]) == 1
    assert capsys.readouterr().err == "mmfused: shtab is not installed: pip install shtab\n"


def test_completion_is_printed_if_shtab_is_installed(capsys):
    pytest.importorskip("shtab")
    with pytest.raises(SystemExit) as stop:
        main(["--print-completion", "bash"])
    assert stop.value.code == 0 and "--grad-cache" in capsys.readouterr().out


def folder(path, rows):
    path.mkdir()
    (path / "metadata.csv").write_text(
        "file_name,text,label\n" + "".join(f",{text},{label}\n" for text, label in rows)
    )
    return str(path)


@pytest.fixture
def mugs(tmp_path):
    rows = [
        (f"a {colour} {thing}", label)
        for label, thing in enumerate(("mug", "bowl"))
        for colour in ("red", "blue", "green")
    ]
    return [
        "--data",
        folder(tmp_path / "data", rows),
        "--val",
        folder(tmp_path / "val", [*rows[:2], ("a pot", "x")]),
    ]


def train_arguments(mugs, out, *more):
    return [
        "train",
        *mugs,
        "--modalities",
        "text",
        "--steps",
        "2",
        "--batch-size",
        "4",
        "--out",
        str(out),
        *more,
    ]


def test_train_prints_a_table_of_results(mugs, tmp_path, capsys):
    assert (
        main(
            train_arguments(
                mugs, tmp_path / "run", "--backend", "composed", "--lr", "0.002", "--seed", "3"
            )
        )
        == 0
    )
    captured = capsys.readouterr()
    scores = ("accuracy", "macro precision", "macro recall", "macro F1")
    for word in (*scores, "peak memory", "composed on", "autocast", "2 validation rows, 1 skipped"):
        assert word in captured.out
    config = json.loads((tmp_path / "run" / "config.json").read_text())["training"]
    assert (config["lr"], config["seed"], config["modalities"], config["steps"]) == (
        0.002,
        3,
        "text",
        2,
    )


def test_train_reports_an_error_in_one_line(mugs, tmp_path, capsys):
    def error_of(arguments):
        assert main(arguments) == 2
        error = capsys.readouterr().err.splitlines()
        assert len(error) == 1 and error[0].startswith("mmfused: error: ")
        return error[0]

    out = tmp_path / "run"
    nowhere = str(tmp_path / "nowhere")
    assert nowhere in error_of(["train", "--data", nowhere, "--val", nowhere, "--out", str(out)])
    assert "modalities: got 'smell'" in error_of(
        ["train", *mugs, "--modalities", "smell", "--out", str(out)]
    )
    assert "swap_text: got 2.0" in error_of(train_arguments(mugs, out, "--swap-text", "2"))
    assert "model: got 'bert'" in error_of(train_arguments(mugs, out, "--model", "bert"))
    assert "'huge'" in error_of(train_arguments(mugs, out, "--preset", "huge"))
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "metadata.csv").write_bytes(b"file_name,text,label\n\xff,\xfe,0\n")
    assert "metadata.csv" in error_of(
        [
            "train",
            "--data",
            str(tmp_path / "bad"),
            "--val",
            str(tmp_path / "bad"),
            "--out",
            str(out),
        ]
    )
    assert not out.exists()
    out.mkdir()
    (out / "model.safetensors").write_text("mine")
    assert "holds files that no run made (model.safetensors)" in error_of(
        train_arguments(mugs, out)
    )
    assert (out / "model.safetensors").read_text() == "mine"


def test_train_resumes_after_a_signal(mugs, tmp_path, capsys, monkeypatch):
    from mmfused.training import loop as training

    arguments = train_arguments(
        mugs,
        tmp_path / "run",
        "--accumulate",
        "2",
        "--save-every",
        "1",
        "--keep",
        "1",
        "--amp",
        "off",
    )
    update = training.update
    with monkeypatch.context() as patch:
        patch.setattr(
            training, "update", lambda *args: os.kill(os.getpid(), signal.SIGTERM) or update(*args)
        )
        assert main([*arguments, "--resume"]) == 143
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("mmfused: ")]
    assert (
        len(lines) == 1
        and "stopped by SIGTERM after step 1, saved in" in lines[0]
        and "--resume" in lines[0]
    )
    assert main([*arguments, "--lr", "0.5", "--resume"]) == 2
    assert "mmfused: error: resume: lr: got 0.5, expected" in capsys.readouterr().err
    assert main([*arguments, "--resume"]) == 0
    assert "run written to" in capsys.readouterr().out
    assert main([*arguments, "--resume"]) == 0
    assert "is already finished; nothing was done" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002"]


@pytest.fixture(scope="module")
def mug_run(tmp_path_factory):
    base = tmp_path_factory.mktemp("mugs")
    rows = [
        (f"a {colour} {thing}", label)
        for label, thing in enumerate(("mug", "bowl"))
        for colour in ("red", "blue", "green")
    ]
    data = folder(base / "data", rows)
    val = folder(base / "val", [*rows[:2], rows[4], ("a pot", "x")])
    training = [
        "--modalities",
        "text",
        "--steps",
        "4",
        "--save-every",
        "2",
        "--batch-size",
        "4",
        "--backend",
        "composed",
    ]
    assert main(["train", "--data", data, "--val", val, "--out", str(base / "run"), *training]) == 0
    return base / "run", val


def test_eval_matches_the_last_validation_of_the_run(mug_run, tmp_path, capsys):
    run, val = mug_run
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    arguments = [
        "eval",
        "--data",
        val,
        "--device",
        "cpu",
        "--backend",
        "composed",
        "--out",
        str(tmp_path / "numbers.json"),
    ]
    for checkpoint in (run, run / "checkpoints" / "step-00000004"):
        assert main([*arguments, "--checkpoint", str(checkpoint), "--per-class"]) == 0
        out = capsys.readouterr().out
        for word in (
            "3 rows, 1 skipped",
            "accuracy",
            "macro precision",
            "macro recall",
            "macro F1",
            "precision  recall",
        ):
            assert word in out
        found = json.loads((tmp_path / "numbers.json").read_text())
        assert found["loss"] == last["val_loss"]
        for name in ("accuracy", "macro_precision", "macro_recall", "macro_f1"):
            assert found[name] == last[name]
        assert sum(entry["rows"] for entry in found["classes"]) == found["rows"] == 3
        assert len(found["skipped"]) == 1 and "label: got" in found["skipped"][0]
    assert main([*arguments, "--checkpoint", str(run / "checkpoints" / "step-00000002")]) == 0
    assert "precision  recall" not in capsys.readouterr().out
    assert json.loads((tmp_path / "numbers.json").read_text())["loss"] != last["val_loss"]


def test_eval_on_generated_products_matches_the_validation(tmp_path, monkeypatch, capsys):
    from mmfused import data
    from mmfused.training.run import TrainConfig, train

    monkeypatch.setattr(
        data, "GeneratedProducts", functools.partial(data.GeneratedProducts, size=40)
    )
    summary = train(
        TrainConfig(
            out=str(tmp_path / "run"),
            steps=2,
            batch_size=8,
            backend="composed",
            device="cpu",
            progress=False,
        )
    )
    arguments = [
        "eval",
        "--checkpoint",
        str(tmp_path / "run"),
        "--data",
        "generated",
        "--backend",
        "composed",
        "--device",
        "cpu",
    ]
    assert main([*arguments, "--out", str(tmp_path / "numbers.json"), "--per-class"]) == 0
    assert "round cotton" in capsys.readouterr().out
    found = json.loads((tmp_path / "numbers.json").read_text())
    assert (found["loss"], found["macro_f1"]) == (summary["val_loss"], summary["macro_f1"])
    assert main([*arguments, "--out", str(tmp_path / "numbers.json"), "--batch-size", "7"]) == 0
    other = json.loads((tmp_path / "numbers.json").read_text())
    # With smaller batches, the contrastive loss has fewer negatives.
    assert other["accuracy"] == found["accuracy"] and other["loss"] != found["loss"]


def reshape_weights(run):
    weights = safetensors.torch.load_file(run / "model.safetensors")
    name = "moe.router.0.weight"
    weights[name] = weights[name][:, :5].contiguous()
    safetensors.torch.save_file(weights, run / "model.safetensors")


def rename_weights(run):
    safetensors.torch.save_file({"other.weight": torch.zeros(3)}, run / "model.safetensors")


def cut(name, kept=1000):
    return lambda run: (run / name).write_bytes((run / name).read_bytes()[:kept])


def only_a_pickle(run):
    (run / "model.safetensors").rename(run / "model.bin")
    (run / "config.json").unlink()


DAMAGE = {
    "no run": (
        lambda run: (run / "config.json").unlink(),
        "holds no finished run: config.json is missing (the run is not finished",
    ),
    "truncated": (
        cut("model.safetensors"),
        "model.safetensors is truncated, corrupt or not a safetensors file",
    ),
    "shorter": (
        cut("model.safetensors", -4),
        "model.safetensors is truncated, corrupt or not a safetensors file",
    ),
    "missing": (lambda run: (run / "model.safetensors").unlink(), "model.safetensors is missing"),
    "settings": (cut("config.json", 100), "config.json is truncated or corrupt"),
    "shapes": (
        reshape_weights,
        "moe.router.0.weight: got shape (128, 5), expected shape (128, 128)",
    ),
    "model": (rename_weights, "got no tensor, expected shape ("),
    "pickle": (
        only_a_pickle,
        "model.bin is a pickle, which can run any code when it is loaded; only",
    ),
    "zip": (
        lambda run: (run / "model.safetensors").write_bytes(b"PK\x03\x04" * 99),
        "not a safetensors file",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_eval_reports_a_damaged_run(mug_run, tmp_path, capsys, damage):
    run, val = shutil.copytree(mug_run[0], tmp_path / "run"), mug_run[1]
    damage_run, message = DAMAGE[damage]
    damage_run(run)
    (tmp_path / "numbers.json").write_text("mine")
    assert message in error_of_eval(
        capsys, "--checkpoint", run, "--data", val, "--out", tmp_path / "numbers.json"
    )
    assert (tmp_path / "numbers.json").read_text() == "mine"


def test_eval_reports_an_error_in_one_line(mug_run, tmp_path, capsys):
    run, val = mug_run
    data = folder(tmp_path / "data", [("a red pot", 2)])
    checkpoint = shutil.copytree(run / "checkpoints" / "step-00000004", tmp_path / "step-00000004")
    (tmp_path / "model.pt").write_bytes(b"PK")
    good = ("--checkpoint", run, "--data", val)
    with open(checkpoint / "model.safetensors", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x7f")
    flipped = error_of_eval(capsys, "--checkpoint", checkpoint, "--data", val)
    assert (
        "model.safetensors is truncated or corrupt: its SHA-256 is not the one in state.json"
        in flipped
    )
    wrong = error_of_eval(capsys, "--checkpoint", run, "--data", data)
    assert "no usable row" in wrong and "label: got '2', expected an integer from 0 to 1" in wrong
    assert "only safetensors are read" in error_of_eval(
        capsys, "--checkpoint", tmp_path / "model.pt", "--data", val
    )
    assert "is a file" in error_of_eval(
        capsys, "--checkpoint", run / "model.safetensors", "--data", val
    )
    nowhere = tmp_path / "nowhere"
    assert "nowhere holds no finished run" in error_of_eval(
        capsys, "--checkpoint", nowhere, "--data", val
    )
    assert f"data: got '{nowhere}', expected a folder with" in error_of_eval(
        capsys, "--checkpoint", run, "--data", nowhere
    )
    assert "batch_size: got 0" in error_of_eval(capsys, *good, "--batch-size", "0")
    assert "backend: got 'fast'" in error_of_eval(capsys, *good, "--backend", "fast")
    assert "out: got" in error_of_eval(capsys, *good, "--out", tmp_path)


def error_of_eval(capsys, *arguments):
    assert main(["eval", *map(str, arguments)]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("mmfused: ")]
    assert len(error) == 1 and error[0].startswith("mmfused: error: ")
    return error[0]


def test_train_names_a_missing_optional_package(mugs, tmp_path, capsys, monkeypatch):
    find = builtins.__import__

    def without_tqdm(name, *rest):
        if name.partition(".")[0] == "tqdm":
            raise ModuleNotFoundError("No module named 'tqdm'", name="tqdm")
        return find(name, *rest)

    monkeypatch.delitem(sys.modules, "mmfused.training.loop", raising=False)
    monkeypatch.delitem(sys.modules, "mmfused.training.run", raising=False)
    monkeypatch.setattr(builtins, "__import__", without_tqdm)
    assert main(train_arguments(mugs, tmp_path / "run")) == 1
    assert (
        capsys.readouterr().err == "mmfused: tqdm is not installed: pip install 'mmfused[models]'\n"
    )


def test_demo_compares_two_trainings_and_times_the_op(tmp_path):
    done = python_m("demo", "--steps", "2", "--repeats", "1", "--out", tmp_path / "demo")
    assert done.returncode == 0, done.stderr
    for words in (
        "accuracy",
        "macro F1",
        "time of a fast step",
        "peak memory",
        "loss curves",
        "nn.MHA",
        "saved for backward",
    ):
        assert words in done.stdout
    result = json.loads((tmp_path / "demo" / "demo.json").read_text())
    assert result["curve_max_difference"] < 1e-3 and result["steps"] == 2
    assert result["op_saved_ratio"] > 2 and result["op"]["seconds"]["ours"] > 0
    assert (tmp_path / "demo" / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_demo_fails_if_the_loss_curves_differ(tmp_path, monkeypatch, capsys):
    from mmfused.cli import demo

    def fake(backend, steps, out):
        out.mkdir(parents=True)
        loss = 1.0 if backend == "reference" else 1.5
        train = [{"step": 1, "loss": loss, "seconds": 1.0}]
        summary = dict.fromkeys(
            ("accuracy", "macro_f1", "val_loss", "step_seconds", "peak_memory", "seconds"), 1.0
        )
        return {"summary": {**summary, "device": "cpu"}, "history": {"train": train, "val": []}}

    monkeypatch.setattr(demo, "_train_in_process", fake)
    assert main(["demo", "--steps", "1", "--repeats", "1", "--out", str(tmp_path / "demo")]) == 1
    assert "FAILED: the mean difference of the loss curves is 0.5" in capsys.readouterr().out
    assert main(["demo", "--steps", "0"]) == 2
