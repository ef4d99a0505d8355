"""A training writes and removes only what it made, one at a time, and ends well only where all of it is there."""

import errno
import json
import logging
import os
import shutil
import signal

import pytest
import safetensors.torch
import torch
from training_runs import SMALL_RUN, assert_same_run, fail_in_step, few_products, in_step, small_run, stop_in_step  # noqa: F401

from mmfused import training
from mmfused.cli import main
from mmfused.ownership import MARK, Lock, is_marked
from mmfused.run_folder import load_run, read_json, sha256, write_json
from mmfused.training import TrainConfig, train


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    train(small_run(out))
    return out


@pytest.fixture(scope="module")
def stopped_run(tmp_path_factory):
    """After the checkpoint of step 4 of 9."""
    out = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.MonkeyPatch.context() as patch:
        fail_in_step(patch, 6)
        with pytest.raises(OSError, match="the power went"):
            train(small_run(out))
    return out


def everything(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


# Whose files they are

FOREIGN = {
    "another trainer's checkpoints": {"checkpoints/epoch-17.pt": "weights", "metrics.jsonl": '{"epoch": 17}\n'},
    "checkpoints of the same name": {"checkpoints/step-00000007/model.safetensors": "weights"},
    "a model of transformers": {"config.json": '{"model_type": "bert"}', "model.safetensors": "weights"},
    "a tokenizer": {"tokenizer/tokenizer.json": "{}"},
    "records": {"metrics.jsonl": "{}\n"},
    "a file called checkpoints": {"checkpoints": "none yet"},
    "a picture": {"curves.png": "picture"},
    "settings that are none": {"config.json": "[" * 100_000},
}


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("changes", [{}, {"overwrite": True}, {"resume": True}], ids=["plain", "overwrite", "resume"])
def test_what_no_run_made_is_left_alone(tmp_path, name, changes):
    out = tmp_path / "out"
    for file, text in FOREIGN[name].items():
        (out / file).parent.mkdir(parents=True, exist_ok=True)
        (out / file).write_text(text)
    before = everything(out)
    with pytest.raises(FileExistsError, match=r"out: .* holds files that no run made \(.*\)"):
        train(small_run(out, **changes))
    assert everything(out) == before


@pytest.mark.parametrize(
    "place", ["checkpoints/notes.txt", "checkpoints/step-00000009/notes.txt", "tokenizer/notes.txt", "checkpoints/best"]
)
def test_what_was_put_into_a_run_is_not_removed_with_it(tmp_path, whole_run, place):
    out = shutil.copytree(whole_run, tmp_path / "run")
    if place.endswith("best"):
        (out / place).symlink_to("step-00000009")
    else:
        (out / place).write_text("mine")
    before = everything(out)
    with pytest.raises(FileExistsError, match=f"no run made .{place}."):
        train(small_run(out, overwrite=True))
    assert everything(out) == before
    (out / place).unlink()
    (out / "notes.txt").write_text("mine")
    train(small_run(out, overwrite=True))
    assert_same_run(out, whole_run)
    assert (out / "notes.txt").read_text() == "mine"


def test_a_checkpoint_that_something_was_put_into_outlives_its_time(tmp_path, monkeypatch, caplog, whole_run):
    out = tmp_path / "run"
    notes = out / "checkpoints" / "step-00000002" / "notes.txt"
    with monkeypatch.context() as patch:
        in_step(patch, 3, lambda: notes.write_text("mine"))
        train(small_run(out, save_every=2, keep=1))
    assert notes.read_text() == "mine" and "step-00000002 is not removed: it holds notes.txt" in caplog.text
    assert sorted(path.name for path in notes.parent.parent.iterdir()) == ["step-00000002", "step-00000009"]
    assert_same_run(out, whole_run)


def test_a_broken_checkpoint_with_foreign_files_is_said_before_the_first_step(tmp_path, stopped_run):
    out = shutil.copytree(stopped_run, tmp_path / "run")
    later = shutil.copytree(out / "checkpoints" / "step-00000004", out / "checkpoints" / "step-00000008")
    (later / "model.safetensors").unlink()
    (later / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="step-00000008 is broken, and holds files that the run did not make; move it"):
        train(small_run(out, resume=True))
    assert (later / "notes.txt").exists()


def test_what_only_looks_half_written_is_left_alone(tmp_path, whole_run):
    out = tmp_path / "run"
    (out / ".tokenizer.77.tmp").mkdir(parents=True)
    (out / ".tokenizer.77.tmp" / "notes.txt").write_text("mine")
    (out / ".config.json.77.tmp").write_text("mine")
    train(small_run(out))
    assert (out / ".config.json.77.tmp").read_text() == "mine"  # it was there before the folder was a run's
    train(small_run(out, overwrite=True))
    assert (out / ".tokenizer.77.tmp" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_a_mark_that_is_none_is_refused(tmp_path, kind):
    out, victim = tmp_path / "run", tmp_path / "victim"
    out.mkdir()
    mark = out / MARK
    {"link": lambda: mark.symlink_to(victim), "pipe": lambda: os.mkfifo(mark), "folder": mark.mkdir}[kind]()
    with pytest.raises(FileExistsError, match=f"out: .*{MARK} is no file of a run; move it"):
        train(small_run(out, steps=1))
    assert not victim.exists() and [path.name for path in out.iterdir()] == [MARK]


def test_a_run_without_its_mark_is_known_by_its_settings(tmp_path, stopped_run, whole_run):
    for run, changes in ((stopped_run, {"resume": True}), (whole_run, {"overwrite": True})):
        out = shutil.copytree(run, tmp_path / run.parent.name)
        (out / MARK).unlink()
        assert is_marked(out)
        train(small_run(out, **changes))
        assert_same_run(out, whole_run)


def test_an_out_that_is_no_folder_is_refused(tmp_path, capsys):
    for out in ("", " "):
        for command in (["train", "--data", "generated"], ["ablate", "--data", "generated"], ["demo"]):
            assert main([*command, "--out", out]) == 2
            assert f"out: got {out!r}, takes a text that is not empty" in capsys.readouterr().err
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="out: .*file is a file, takes a folder"):
        train(small_run(tmp_path / "file", overwrite=True))


# One at a time


@pytest.mark.parametrize("changes", [{"overwrite": True}, {"resume": True}], ids=["overwrite", "resume"])
def test_a_folder_that_another_training_writes_to_is_refused(tmp_path, stopped_run, changes):
    out = shutil.copytree(stopped_run, tmp_path / "run")
    with Lock(out):
        before = everything(out)
        with pytest.raises(FileExistsError, match="out: another process is writing to .*run; wait for it"):
            train(small_run(out, **changes))
        assert everything(out) == before
    train(small_run(out, **changes))


def test_a_file_system_without_locks_is_said_and_trained_on(tmp_path, monkeypatch, caplog, whole_run):
    def no_locks(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("mmfused.ownership.fcntl.flock", no_locks)
    train(small_run(tmp_path / "run"))
    assert "cannot be locked (No locks available): see that one process writes to it" in caplog.text
    assert_same_run(tmp_path / "run", whole_run)


def test_what_came_between_the_first_look_and_the_first_step_is_seen(tmp_path, monkeypatch, whole_run):
    """The folder was empty when the second looked; then the first began, and maybe finished, in it."""
    prepare, out = training.prepare, tmp_path / "run"

    def prepared_while(act):
        def preparing(*args):
            monkeypatch.setattr(training, "prepare", prepare)
            made = prepare(*args)
            act()
            return made

        monkeypatch.setattr(training, "prepare", preparing)

    held = []
    prepared_while(lambda: held.append(Lock(out)))
    with pytest.raises(FileExistsError, match="another process is writing"):
        train(small_run(out))
    held[0].release()
    out = tmp_path / "other"
    prepared_while(lambda: train(small_run(out)))
    with pytest.raises(FileExistsError, match="already holds a run"):
        train(small_run(out))
    assert_same_run(out, whole_run)


# Removed meanwhile


@pytest.mark.parametrize("step", [1, 3, 5, 9])
def test_a_run_outlives_the_removal_of_its_folder(tmp_path, monkeypatch, caplog, whole_run, step):
    out = tmp_path / "deep" / "run"
    with monkeypatch.context() as patch:
        in_step(patch, step, lambda: shutil.rmtree(out.parent))
        train(small_run(out))
    assert "metrics.jsonl was removed while the run wrote it; it is made again" in caplog.text
    assert_same_run(out, whole_run)
    load_run(out)
    with Lock(out):
        pass


def test_records_alone_come_back_too_and_others_are_not_replaced(tmp_path, monkeypatch, whole_run):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        in_step(patch, 6, (out / "metrics.jsonl").unlink)
        train(small_run(out))
    assert_same_run(out, whole_run)

    def replace():
        (out / "metrics.jsonl").unlink()
        (out / "metrics.jsonl").write_text("mine")

    with monkeypatch.context() as patch:
        in_step(patch, 6, replace)
        with pytest.raises(FileExistsError):
            train(small_run(out, overwrite=True))
    assert (out / "metrics.jsonl").read_text() == "mine"


def test_a_folder_that_another_run_has_taken_since_is_left_to_it(tmp_path, monkeypatch):
    out, held = tmp_path / "run", []

    def taken():
        shutil.rmtree(out)
        held.append(Lock(out))

    in_step(monkeypatch, 3, taken)
    with pytest.raises(FileExistsError, match="another process is writing"):
        train(small_run(out))
    assert [path.name for path in out.iterdir()] == [MARK]
    held[0].release()


@pytest.mark.parametrize("name", ["summary.json", "model.safetensors", "tokenizer", "checkpoints", "metrics.jsonl"])
def test_what_is_missing_at_the_end_is_said(tmp_path, monkeypatch, name):
    save_run = training.save_run

    def removed(out, *args):
        save_run(out, *args)
        shutil.rmtree(out / name) if (out / name).is_dir() else (out / name).unlink()

    monkeypatch.setattr(training, "save_run", removed)
    with pytest.raises(RuntimeError, match=f"out: .* lacks {name}, which the run wrote"):
        train(small_run(tmp_path / "run"))


def test_missing_files_end_the_command_with_an_error(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(training, "save_run", lambda *args: None)
    monkeypatch.setattr(training, "TrainConfig", lambda **given: small_run(given["out"]))
    assert main(["train", "--data", "generated", "--out", str(tmp_path / "run")]) == 2
    assert "lacks config.json" in capsys.readouterr().err


# Damaged state


def change(source, **values):
    write_json(source, {**read_json(source), **values})


def resummed(step):
    """The checkpoint as if it had been written so: the sums fit again."""
    files = [path for path in step.rglob("*") if path.is_file() and path.name != "state.json"]
    change(step / "state.json", sha256={path.relative_to(step).as_posix(): sha256(path) for path in files})


def change_tensors(path, act):
    tensors = act(safetensors.torch.load_file(path))
    path.write_bytes(safetensors.torch.save(tensors))
    resummed(path.parent)


def change_settings(step, **values):
    state = read_json(step / "state.json")
    for name, value in values.items():
        if value is None:
            del state["settings"][name]
        else:
            state["settings"][name] = value
    write_json(step / "state.json", state)


def other_optimizer(tensors):
    name = next(name for name in tensors if name.endswith("exp_avg"))
    return {**tensors, name: torch.zeros(1)}


DAMAGE = {
    "step is a text": (lambda s: change(s / "state.json", step="7"), "step is of type str, takes int"),
    "step is a fraction": (lambda s: change(s / "state.json", step=1e9), "step is of type float, takes int"),
    "step is true": (lambda s: change(s / "state.json", step=True), "step is of type bool, takes int"),
    "step is beyond the last": (lambda s: change(s / "state.json", step=10**9), "of step 1000000000, takes at most 9"),
    "step is negative": (lambda s: change(s / "state.json", step=-1), "out of range"),
    "step is immense": (lambda s: change(s / "state.json", step=10**30), "out of range"),
    "seconds is no number": (lambda s: change(s / "state.json", seconds=float("nan")), "out of range"),
    "settings is a list": (lambda s: change(s / "state.json", settings=[]), "settings is of type list, takes dict"),
    "settings lack the model": (lambda s: change_settings(s, model=None), "state.json lacks model"),
    "settings lack the rows": (lambda s: change_settings(s, rows=None), "state.json lacks rows"),
    "rows of another type": (lambda s: change_settings(s, rows=[]), "rows is of type list"),
    "a training of another kind": (
        lambda s: change_settings(s, training={"out": "x", "lr": "much"}),
        "lr: got 'much', takes a finite number",
    ),
    "a training with more": (
        lambda s: change_settings(s, training={"out": "x", "exec": 1}),
        "exec: a training has no such setting",
    ),
    "sums is a text": (lambda s: change(s / "state.json", sha256="x"), "sha256 is of type str"),
    "no sums": (lambda s: change(s / "state.json", sha256={}), "its SHA-256 is not the one in state.json"),
    "a sum of what is outside": (
        lambda s: change(s / "state.json", sha256={"../../../secret": "0"}),
        "leads outside|its SHA-256",
    ),
    "state is a list": (lambda s: (s / "state.json").write_text("[]"), "holds list, takes an object"),
    "state is deep": (lambda s: (s / "state.json").write_text("[" * 200_000), "truncated or corrupt"),
    "state is no text": (lambda s: (s / "state.json").write_bytes(b"\xff\xfe\x00"), "truncated or corrupt"),
    "state is cut": (lambda s: os.truncate(s / "state.json", 40), "truncated or corrupt"),
    "another shape in the optimizer": (
        lambda s: change_tensors(s / "optimizer.safetensors", other_optimizer),
        "AdamW has no such state",
    ),
    "a stranger in the optimizer": (
        lambda s: change_tensors(s / "optimizer.safetensors", lambda t: {**t, "x.exp_avg": torch.zeros(1)}),
        "holds x.exp_avg, and the model has no such parameter",
    ),
    "no random state": (
        lambda s: change_tensors(s / "rng.safetensors", lambda t: {"torch.cpu": t["torch.cpu"]}),
        "lacks the state of the random generator drop",
    ),
    "a random state that is none": (
        lambda s: change_tensors(s / "rng.safetensors", lambda t: {**t, "drop": torch.zeros(3, dtype=torch.uint8)}),
        "holds no state of the random generator drop",
    ),
    "another model's weights": (
        lambda s: change_tensors(s / "model.safetensors", lambda t: dict(list(t.items())[1:])),
        "holds the weights of another model",
    ),
    "weights that are none": (
        lambda s: ((s / "model.safetensors").write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00{}      "), resummed(s)),
        "holds the weights of another model|no safetensors file",
    ),
    "a length that no file has": (
        lambda s: ((s / "rng.safetensors").write_bytes(b"\xff" * 8 + b"{}"), resummed(s)),
        "truncated, corrupt or no safetensors file",
    ),
    "records cut": (lambda s: os.truncate(s.parent.parent / "metrics.jsonl", 10), "holds 10 bytes, but"),
    "records of another kind": (
        lambda s: (s.parent.parent / "metrics.jsonl").write_bytes(b"[]\n" * 10_000),
        "metrics.jsonl is truncated or corrupt",
    ),
    "records without numbers": (
        lambda s: (s.parent.parent / "metrics.jsonl").write_bytes(b'{"step": 1, "loss": null, "seconds": 1}\n' * 1000),
        "metrics.jsonl is truncated or corrupt",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_state_is_one_sentence_and_stays_as_it_is(tmp_path, stopped_run, name):
    out = shutil.copytree(stopped_run, tmp_path / "run")
    (tmp_path / "secret").write_text("secret")
    damage, message = DAMAGE[name]
    damage(out / "checkpoints" / "step-00000004")
    before = everything(out)
    with pytest.raises(ValueError, match=message) as caught:
        train(small_run(out, resume=True))
    assert "\n" not in str(caught.value)
    assert everything(out) == before


@pytest.mark.parametrize("name", ["summary.json", "config.json"])
@pytest.mark.parametrize("text", ["{}", "[]", "{", '{"skipped": 3}', "[" * 100_000])
def test_a_finished_run_with_damaged_files_is_one_sentence(tmp_path, whole_run, name, text):
    out = shutil.copytree(whole_run, tmp_path / "run")
    (out / name).write_text(text)
    with pytest.raises(ValueError, match=name) as caught:
        train(small_run(out, resume=True))
    assert "\n" not in str(caught.value)


def first_key(tensors, kind):
    return next(name for name in tensors if name.endswith(kind))


DAMAGE_OF_OPTIMIZERS = {
    "without a moment": lambda t: {name: value for name, value in t.items() if name != first_key(t, "exp_avg_sq")},
    "of whole numbers": lambda t: {name: value.to(torch.int8) for name, value in t.items()},
    "that never stepped": lambda t: {**t, first_key(t, "step"): torch.tensor(-1.0)},
    "not finite": lambda t: {**t, first_key(t, "exp_avg"): t[first_key(t, "exp_avg")] * float("nan")},
    "empty": lambda t: {},
}


@pytest.mark.parametrize("name", DAMAGE_OF_OPTIMIZERS)
def test_an_optimizer_s_state_is_whole_or_refused(tmp_path, stopped_run, name):
    out = shutil.copytree(stopped_run, tmp_path / "run")
    change_tensors(out / "checkpoints" / "step-00000004" / "optimizer.safetensors", DAMAGE_OF_OPTIMIZERS[name])
    with pytest.raises(ValueError, match="optimizer.safetensors holds no (whole )?state of AdamW"):
        train(small_run(out, resume=True))


@pytest.mark.parametrize("lost", ["all", "a validation's", "one of training"])
def test_records_that_are_not_of_the_checkpoint_s_step_are_refused(tmp_path, stopped_run, lost):
    out = shutil.copytree(stopped_run, tmp_path / "run")
    lines = (out / "metrics.jsonl").read_bytes().splitlines(keepends=True)[:5]
    kept = {"all": [], "a validation's": lines[:4] + lines[3:4], "one of training": lines[1:]}[lost]
    (out / "metrics.jsonl").write_bytes(b"".join(kept))
    change(out / "checkpoints" / "step-00000004" / "state.json", metrics_bytes=len(b"".join(kept)))
    with pytest.raises(ValueError, match="metrics.jsonl holds [0-9] records of training and [01] of validation at step 4"):
        train(small_run(out, resume=True))


@pytest.mark.parametrize("name", ["checkpoints", "metrics.jsonl", "tokenizer"])
@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_resume_follows_no_link_and_waits_for_no_pipe(tmp_path, stopped_run, name, kind):
    out = shutil.copytree(stopped_run, tmp_path / "run")
    if os.path.lexists(out / name):
        (out / name).rename(tmp_path / name)
    if kind == "link":
        (out / name).symlink_to(tmp_path / name)
    else:
        os.mkfifo(out / name)
    before = everything(tmp_path)
    with pytest.raises(FileExistsError, match=f"links or the like in the place of a run's files .{name}.; move them"):
        train(small_run(out, resume=True))
    assert everything(tmp_path) == before


def test_data_may_have_moved_and_must_be_the_same(tmp_path):
    for name in ("data", "val"):
        (tmp_path / name).mkdir()
        rows = "".join(f",thing {row} of {name},{row % 2}\n" for row in range(16))
        (tmp_path / name / "metadata.csv").write_text("file_name,text,label\n" + rows)
    given = {
        "data": str(tmp_path / "data"),
        "val": str(tmp_path / "val"),
        "modalities": "text",
        "drop_image": 0.0,
        "drop_text": 0.0,
    }
    train(small_run(tmp_path / "run", **given))
    (tmp_path / "data").rename(tmp_path / "moved")
    given["data"] = str(tmp_path / "moved")
    assert train(small_run(tmp_path / "run", resume=True, **given))["steps"] == 9
    with pytest.raises(ValueError, match="resume: data: the texts, labels or pictures of .*val are not those"):
        train(small_run(tmp_path / "run", resume=True, **{**given, "data": given["val"]}))


# What is said


def test_a_lowered_batch_size_is_said(tmp_path, caplog):
    train(small_run(tmp_path / "run", batch_size=64, steps=1))
    assert "batch_size: 64 is lowered to 60: there are 60 rows" in caplog.text
    assert read_json(tmp_path / "run" / "config.json")["training"]["batch_size"] == 64


@pytest.mark.parametrize(
    "command",
    [
        *([*"train --data generated --out x".split(), option, ""] for option in ("--init", "--tokenizer", "--host", "--val")),
        [*"eval --checkpoint x --data x --products".split(), ""],
        [*"eval --data x --checkpoint".split(), ""],
        [*"embed --checkpoint x --data x --out x.npz --views".split(), " "],
        [*"ablate --data generated --out x --only".split(), ""],
    ],
    ids=" ".join,
)
def test_an_empty_value_is_not_taken_for_none(capsys, command):
    assert main(command) == 2
    name = command[-2].removeprefix("--")
    assert f"mmfused: error: {name}: got {command[-1]!r}, takes a text that is not empty" in capsys.readouterr().err
    if command[0] == "train":
        with pytest.raises(ValueError, match=f"{name}: got '', takes a text that is not empty"):
            TrainConfig(out="x", **{name: ""})


def test_ablate_and_demo_replace_only_what_they_made(tmp_path, capsys):
    for name, command in (("ablation.json", ["ablate", "--data", "generated", "--overwrite"]), ("demo.json", ["demo"])):
        (tmp_path / name).write_text("mine")
        assert main([*command, "--out", str(tmp_path)]) == 2
        assert f"{name} is another program's; choose another folder, or move it" in capsys.readouterr().err
        assert (tmp_path / name).read_text() == "mine"
        (tmp_path / name).unlink()
    (tmp_path / "demo.png").write_text("mine")
    assert main(["demo", "--out", str(tmp_path)]) == 2 and (tmp_path / "demo.png").read_text() == "mine"


def test_a_signal_ends_ablate_as_it_ends_train(tmp_path, monkeypatch, capsys):
    stop_in_step(monkeypatch, 1)
    command = ["ablate", "--data", "generated", "--steps", "2", "--batch-size", "8", "--device", "cpu", "--out", str(tmp_path)]
    assert main(command) == 128 + signal.SIGTERM
    assert "mmfused: stopped by SIGTERM after step 1, saved in" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--epochs", "1e30"], "epochs: got 1e+30, which are"),
        (["--val", "x"], "val: got 'x' with the generated set, takes none"),
        (["--init", "nowhere"], "init: got 'nowhere', takes the folder of a run or checkpoint"),
        (["--tokenizer", "./nowhere"], "tokenizer takes a tokenizer folder or a hub name, got './nowhere'"),
        (["--device", "hpu"], "device: got 'hpu', takes auto, cpu"),
        (["--seed", str(2**70)], "seed: got 1180591620717411303424, takes an integer from 0"),
        (["--seed", "-1"], "seed: got -1, takes an integer from 0"),
        (["--lr", "inf"], "lr: got inf, takes a finite number"),
        (["--weight-decay", "nan"], "weight_decay: got nan, takes a finite number"),
        (["--epochs", "1e400"], "epochs: got inf"),
        (["--threads", "1000000"], "threads: got 1000000, takes an integer from 1 to 4096"),
        (["--max-length", "1"], "max_length: got 1"),
        (["--preset", "big"], "preset: got 'big', takes"),
        (["--data", "nowhere"], "data: got 'nowhere', takes a folder with images and metadata.csv"),
        (["--device", "abacus"], "device: got 'abacus'"),
    ],
)
def test_bad_arguments_are_named_as_they_were_given(tmp_path, capsys, given, message):
    assert main(["train", "--data", "generated", "--out", str(tmp_path / "run"), *given]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_settings_of_another_type_are_refused():
    for changes, takes in (
        ({"steps": 1.5}, "steps: got 1.5, takes an integer from 1 to 1000000000000 or None"),
        ({"lr": True}, "lr: got True, takes a finite number"),
        ({"betas": [0.9]}, "betas: got .0.9., takes 2 finite numbers"),
        ({"model_options": []}, "model_options: got .., takes an object"),
    ):
        with pytest.raises(ValueError, match=takes):
            TrainConfig(out="x", **changes)
    config = TrainConfig(out="x", betas=(0.8, 0.9))
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_nothing_is_logged_where_all_is_well(tmp_path, caplog):
    caplog.set_level(logging.WARNING, "mmfused")
    train(small_run(tmp_path / "run", steps=SMALL_RUN["accumulate"]))
    assert caplog.text == ""
