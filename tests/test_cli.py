import builtins
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import mmfused
from mmfused.cli import main

ROOT = Path(mmfused.__file__).parent.parent


def python_m(*arguments, cwd=ROOT):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}  # users have no interpreter
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}  # spinning threads crawl on a busy machine
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
    for command in ("demo", "train", "bench", "inspect", "env"):
        assert command in done.stdout


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0 and capsys.readouterr().out.strip() == f"mmfused {mmfused.__version__}"


@pytest.mark.parametrize("arguments", [[], ["fly"], ["train"], ["train", "--steps", "many"]])
def test_a_bad_command_line_exits_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2 and "usage: mmfused" in capsys.readouterr().err


def test_a_command_imports_only_itself():
    code = (
        "import sys; from mmfused.cli import main; main(['env']); "
        "sys.exit('mmfused.cli.demo' in sys.modules or 'timm' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_env_names_versions_and_each_op(capsys):
    assert main(["env"]) == 0
    out = capsys.readouterr().out
    for word in ("mmfused", "python", "torch", "triton", "timm", "transformers", "CUDA", "query_pooling:"):
        assert word in out
    assert "fused on" in out or "not fused: " in out


def folder(path, rows):
    path.mkdir()
    (path / "metadata.csv").write_text("file_name,text,label\n" + "".join(f",{text},{label}\n" for text, label in rows))
    return str(path)


@pytest.fixture
def mugs(tmp_path):
    rows = [(f"a {colour} {thing}", label) for label, thing in enumerate(("mug", "bowl")) for colour in ("red", "blue", "green")]
    return ["--data", folder(tmp_path / "data", rows), "--val", folder(tmp_path / "val", [*rows[:2], ("a pot", "x")])]


def train_arguments(mugs, out, *more):
    return ["train", *mugs, "--modalities", "text", "--steps", "2", "--batch-size", "4", "--out", str(out), *more]


def test_train_ends_with_a_table(mugs, tmp_path, capsys):
    assert main(train_arguments(mugs, tmp_path / "run", "--backend", "composed", "--lr", "0.002", "--seed", "3")) == 0
    captured = capsys.readouterr()
    for word in ("accuracy", "macro F1", "peak memory", "composed on", "2 to validate, 1 skipped"):
        assert word in captured.out
    config = json.loads((tmp_path / "run" / "config.json").read_text())["training"]
    assert (config["lr"], config["seed"], config["modalities"], config["steps"]) == (0.002, 3, "text", 2)


def test_train_says_what_is_wrong_in_one_sentence(mugs, tmp_path, capsys):
    def error_of(arguments):
        assert main(arguments) == 2
        error = capsys.readouterr().err.splitlines()
        assert len(error) == 1 and error[0].startswith("mmfused: error: ")
        return error[0]

    out = tmp_path / "run"
    nowhere = str(tmp_path / "nowhere")
    assert nowhere in error_of(["train", "--data", nowhere, "--val", nowhere, "--out", str(out)])
    assert "modalities: got 'smell'" in error_of(["train", *mugs, "--modalities", "smell", "--out", str(out)])
    assert "swap_text: got 2.0" in error_of(train_arguments(mugs, out, "--swap-text", "2"))
    assert "model: got 'bert'" in error_of(train_arguments(mugs, out, "--model", "bert"))
    assert "'huge'" in error_of(train_arguments(mugs, out, "--preset", "huge"))
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "metadata.csv").write_bytes(b"file_name,text,label\n\xff,\xfe,0\n")
    assert "metadata.csv" in error_of(["train", "--data", str(tmp_path / "bad"), "--val", str(tmp_path / "bad"), "--out", str(out)])
    assert not out.exists()
    out.mkdir()
    (out / "model.safetensors").write_text("mine")
    assert "already holds a run" in error_of(train_arguments(mugs, out))
    assert (out / "model.safetensors").read_text() == "mine"


def test_a_missing_optional_package_is_named(mugs, tmp_path, capsys, monkeypatch):
    find = builtins.__import__

    def without_tqdm(name, *rest):
        if name.partition(".")[0] == "tqdm":
            raise ModuleNotFoundError("No module named 'tqdm'", name="tqdm")
        return find(name, *rest)

    monkeypatch.delitem(sys.modules, "mmfused.training", raising=False)
    monkeypatch.setattr(builtins, "__import__", without_tqdm)
    assert main(train_arguments(mugs, tmp_path / "run")) == 1
    assert capsys.readouterr().err == "mmfused: tqdm is not installed: pip install 'mmfused[models]'\n"


def test_demo_compares_two_trainings_and_times_the_op(tmp_path):
    done = python_m("demo", "--steps", "2", "--repeats", "1", "--out", tmp_path / "demo")
    assert done.returncode == 0, done.stderr
    for words in (
        "accuracy",
        "macro F1",
        "time of a step",
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


def test_demo_fails_when_the_curves_part(tmp_path, monkeypatch, capsys):
    from mmfused.cli import demo

    def fake(backend, steps, out):
        out.mkdir(parents=True)
        train = [{"step": 1, "loss": 1.0 if backend == "reference" else 1.5}]
        summary = dict.fromkeys(("accuracy", "macro_f1", "val_loss", "step_seconds", "peak_memory", "seconds"), 1.0)
        return {"summary": {**summary, "device": "cpu"}, "history": {"train": train, "val": []}}

    monkeypatch.setattr(demo, "train_apart", fake)
    assert main(["demo", "--steps", "1", "--repeats", "1", "--out", str(tmp_path / "demo")]) == 1
    assert "FAILED: the loss curves differ by 0.5" in capsys.readouterr().out
    assert main(["demo", "--steps", "0"]) == 2
