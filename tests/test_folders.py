"""Tests that training changes only the run's own files and locks the run's folder.

Training must also fail if a file of the run is missing at the end.
"""

import errno
import os
import shutil

import pytest
import training_runs
from training_runs import (
    assert_same_run,
    contents_of,
    in_step,
    small_run,
)

from mmfused.cli import main
from mmfused.training import loop as training
from mmfused.training import run as training_run
from mmfused.training.folder_lock import MARKER, Lock, is_run_folder
from mmfused.training.run import train
from mmfused.training.run_folder import load_run

few_products = training_runs.few_products
stopped_run = training_runs.stopped_run
whole_run = training_runs.whole_run

# Which files belong to a run

FOREIGN = {
    "another trainer's checkpoints": {
        "checkpoints/epoch-17.pt": "weights",
        "metrics.jsonl": '{"epoch": 17}\n',
    },
    "checkpoints of the same name": {"checkpoints/step-00000007/model.safetensors": "weights"},
    "a model of transformers": {
        "config.json": '{"model_type": "bert"}',
        "model.safetensors": "weights",
    },
    "a tokenizer": {"tokenizer/tokenizer.json": "{}"},
    "records": {"metrics.jsonl": "{}\n"},
    "a file called checkpoints": {"checkpoints": "text"},
    "a picture": {"curves.png": "picture"},
    "settings that cannot be parsed": {"config.json": "[" * 100_000},
}


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize(
    "changes", [{}, {"overwrite": True}, {"resume": True}], ids=["plain", "overwrite", "resume"]
)
def test_training_rejects_a_folder_with_files_that_no_run_made(tmp_path, name, changes):
    out = tmp_path / "out"
    for file, text in FOREIGN[name].items():
        (out / file).parent.mkdir(parents=True, exist_ok=True)
        (out / file).write_text(text)
    before = contents_of(out)
    with pytest.raises(FileExistsError, match=r"out: .* holds files that no run made \(.*\)"):
        train(small_run(out, **changes))
    assert contents_of(out) == before


@pytest.mark.parametrize(
    "place",
    [
        "checkpoints/notes.txt",
        "checkpoints/step-00000009/notes.txt",
        "tokenizer/notes.txt",
        "checkpoints/best",
    ],
)
def test_overwrite_never_removes_files_that_were_added_to_a_run(tmp_path, whole_run, place):
    out = shutil.copytree(whole_run, tmp_path / "run")
    if place.endswith("best"):
        (out / place).symlink_to("step-00000009")
    else:
        (out / place).write_text("mine")
    before = contents_of(out)
    with pytest.raises(FileExistsError, match=f"no run made .{place}."):
        train(small_run(out, overwrite=True))
    assert contents_of(out) == before
    (out / place).unlink()
    (out / "notes.txt").write_text("mine")
    train(small_run(out, overwrite=True))
    assert_same_run(out, whole_run)
    assert (out / "notes.txt").read_text() == "mine"


def test_old_checkpoint_with_added_files_is_not_removed(tmp_path, monkeypatch, caplog, whole_run):
    out = tmp_path / "run"
    notes = out / "checkpoints" / "step-00000002" / "notes.txt"
    with monkeypatch.context() as patch:
        in_step(patch, 3, lambda: notes.write_text("mine"))
        train(small_run(out, save_every=2, keep=1))
    assert (
        notes.read_text() == "mine"
        and "step-00000002 is not removed: it holds notes.txt" in caplog.text
    )
    assert sorted(path.name for path in notes.parent.parent.iterdir()) == [
        "step-00000002",
        "step-00000009",
    ]
    assert_same_run(out, whole_run)


def test_resume_rejects_a_broken_checkpoint_with_added_files(tmp_path, stopped_run):
    out = shutil.copytree(stopped_run, tmp_path / "run")
    later = shutil.copytree(
        out / "checkpoints" / "step-00000004", out / "checkpoints" / "step-00000008"
    )
    (later / "model.safetensors").unlink()
    (later / "notes.txt").write_text("mine")
    with pytest.raises(
        FileExistsError,
        match="step-00000008 is damaged, and holds files that the run did not make; move it",
    ):
        train(small_run(out, resume=True))
    assert (later / "notes.txt").exists()


def test_temporary_files_that_the_run_did_not_write_are_kept(tmp_path, whole_run):
    out = tmp_path / "run"
    (out / ".tokenizer.77.tmp").mkdir(parents=True)
    (out / ".tokenizer.77.tmp" / "notes.txt").write_text("mine")
    (out / ".config.json.77.tmp").write_text("mine")
    train(small_run(out))
    assert (out / ".config.json.77.tmp").read_text() == "mine"  # older than the run
    train(small_run(out, overwrite=True))
    assert (out / ".tokenizer.77.tmp" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_training_rejects_a_marker_that_is_not_a_file(tmp_path, kind):
    out, victim = tmp_path / "run", tmp_path / "victim"
    out.mkdir()
    marker = out / MARKER
    {
        "link": lambda: marker.symlink_to(victim),
        "pipe": lambda: os.mkfifo(marker),
        "folder": marker.mkdir,
    }[kind]()
    with pytest.raises(FileExistsError, match=f"out: .*{MARKER} is not a file of a run; move it"):
        train(small_run(out, steps=1))
    assert not victim.exists() and [path.name for path in out.iterdir()] == [MARKER]


def test_run_without_a_marker_is_recognised_by_its_settings(tmp_path, stopped_run, whole_run):
    for run, changes in ((stopped_run, {"resume": True}), (whole_run, {"overwrite": True})):
        out = shutil.copytree(run, tmp_path / run.parent.name)
        (out / MARKER).unlink()
        assert is_run_folder(out)
        train(small_run(out, **changes))
        assert_same_run(out, whole_run)


def test_out_must_be_a_folder(tmp_path, capsys):
    for out in ("", " "):
        for command in (
            ["train", "--data", "generated"],
            ["ablate", "--data", "generated"],
            ["demo"],
        ):
            assert main([*command, "--out", out]) == 2
            assert f"out: got {out!r}, expected a non-empty string" in capsys.readouterr().err
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="out: .*file is a file, expected a folder"):
        train(small_run(tmp_path / "file", overwrite=True))


# One run at a time


@pytest.mark.parametrize(
    "changes", [{"overwrite": True}, {"resume": True}], ids=["overwrite", "resume"]
)
def test_training_rejects_a_locked_folder(tmp_path, stopped_run, changes):
    out = shutil.copytree(stopped_run, tmp_path / "run")
    with Lock(out):
        before = contents_of(out)
        with pytest.raises(
            FileExistsError, match="out: another process is writing to .*run; wait for it"
        ):
            train(small_run(out, **changes))
        assert contents_of(out) == before
    train(small_run(out, **changes))


def test_training_warns_if_the_file_system_has_no_locks(tmp_path, monkeypatch, caplog, whole_run):
    def no_locks(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("mmfused.training.folder_lock.fcntl.flock", no_locks)
    train(small_run(tmp_path / "run"))
    assert (
        "cannot be locked (No locks available): make sure that only one process writes to it"
        in caplog.text
    )
    assert_same_run(tmp_path / "run", whole_run)


def test_training_rejects_a_folder_that_another_run_uses_after_the_check(
    tmp_path, monkeypatch, whole_run
):
    """After the check of the empty folder, another run locks the folder, or starts and finishes."""
    prepare, out = training_run.prepare, tmp_path / "run"

    def act_after_prepare(act):
        def preparing(*args):
            monkeypatch.setattr(training_run, "prepare", prepare)
            made = prepare(*args)
            act()
            return made

        monkeypatch.setattr(training_run, "prepare", preparing)

    held = []
    act_after_prepare(lambda: held.append(Lock(out)))
    with pytest.raises(FileExistsError, match="another process is writing"):
        train(small_run(out))
    held[0].release()
    out = tmp_path / "other"
    act_after_prepare(lambda: train(small_run(out)))
    with pytest.raises(FileExistsError, match="already holds a run"):
        train(small_run(out))
    assert_same_run(out, whole_run)


# Files removed during a run


@pytest.mark.parametrize("step", [1, 3, 5, 9])
def test_run_finishes_after_its_folder_was_removed(tmp_path, monkeypatch, caplog, whole_run, step):
    out = tmp_path / "deep" / "run"
    with monkeypatch.context() as patch:
        in_step(patch, step, lambda: shutil.rmtree(out.parent))
        train(small_run(out))
    assert "metrics.jsonl was removed while the run wrote to it; all its records" in caplog.text
    assert_same_run(out, whole_run)
    load_run(out)
    with Lock(out):
        pass


def test_run_restores_removed_records_but_replaces_no_foreign_records(
    tmp_path, monkeypatch, whole_run
):
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


def test_run_stops_if_its_removed_folder_was_recreated_and_locked(tmp_path, monkeypatch):
    out, held = tmp_path / "run", []

    def replace_and_lock():
        shutil.rmtree(out)
        held.append(Lock(out))

    in_step(monkeypatch, 3, replace_and_lock)
    with pytest.raises(FileExistsError, match="another process is writing"):
        train(small_run(out))
    assert [path.name for path in out.iterdir()] == [MARKER]
    held[0].release()


@pytest.mark.parametrize(
    "name", ["summary.json", "model.safetensors", "tokenizer", "checkpoints", "metrics.jsonl"]
)
def test_files_missing_at_the_end_raise(tmp_path, monkeypatch, name):
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
