"""A stopped run that is resumed gives the same results as an uninterrupted run."""

import json
import os
import shutil
import signal
from functools import partial

import pytest
import torch
import training_runs
from training_runs import (
    assert_same_run,
    fail_in_step,
    records,
    small_run,
    steps_saved,
    stop_in_step,
)

from mmfused.data import GeneratedProducts
from mmfused.training import checkpoint, tasks
from mmfused.training.checkpoint import newest
from mmfused.training.run import train
from mmfused.training.signals import Stopped, stop_on_signals

pytestmark = pytest.mark.usefixtures("default_sigint_handler")
few_products = training_runs.few_products
whole_run = training_runs.whole_run


@pytest.fixture(autouse=True)
def restored_thread_count():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# Signals


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("step", [3, 8, 9])  # between validations, at a validation, at the end
def test_a_signal_saves_a_checkpoint_and_resume_continues_from_it(
    tmp_path, monkeypatch, whole_run, signum, step
):
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        stop_in_step(patch, step, signum)
        with pytest.raises(
            Stopped,
            match=f"stopped by {signum.name} after step {step}, saved in .*step-0000000{step}; "
            ".*--resume",
        ):
            train(small_run(tmp_path / "run"))
    assert handlers == (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))
    assert steps_saved(tmp_path / "run")[-1] == step
    train(small_run(tmp_path / "run", resume=True))
    assert_same_run(tmp_path / "run", whole_run)


def test_a_signal_during_a_validation_stops_the_run(tmp_path, monkeypatch, whole_run):
    evaluate = tasks.evaluate_classifier

    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*args)

    with monkeypatch.context() as patch:
        patch.setattr(tasks, "evaluate_classifier", interrupted)
        with pytest.raises(Stopped, match="after step 4"):
            train(small_run(tmp_path / "run"))
    assert all("accuracy" not in record for record in records(tmp_path / "run"))
    train(small_run(tmp_path / "run", resume=True))
    assert_same_run(tmp_path / "run", whole_run)


def test_a_second_signal_interrupts_immediately():
    with pytest.raises(KeyboardInterrupt), stop_on_signals() as stop:
        assert not stop()
        os.kill(os.getpid(), signal.SIGINT)
        assert stop() and stop.signum == signal.SIGINT
        os.kill(os.getpid(), signal.SIGINT)


def test_ignored_signals_stay_ignored_and_other_threads_change_no_handler():
    import threading

    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stop_on_signals() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert not stop() and signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
    finally:
        signal.signal(signal.SIGINT, before)
    found = []

    def in_another_thread():
        with stop_on_signals():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=in_another_thread)
    thread.start()
    thread.join()
    assert found == [signal.getsignal(signal.SIGTERM)]


# Checkpoints


def test_only_the_newest_checkpoints_are_kept_and_all_are_complete(tmp_path):
    train(small_run(tmp_path / "run", save_every=2, keep=3))
    assert steps_saved(tmp_path / "run") == [6, 8, 9]
    path, state = newest(tmp_path / "run" / "checkpoints")
    files = {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()}
    weights = {f"{name}.safetensors" for name in ("model", "optimizer", "rng")}
    assert (
        weights | {"state.json", "tokenizer/tokenizer.json"} <= files
        and files - {"state.json"} == state["sha256"].keys()
    )
    # The run read 18 batches; an epoch of 60 rows has 8 batches of 7 or 8 rows.
    assert (state["step"], state["next_batch"]) == (
        9,
        {"epoch": 2, "batch": 2},
    )
    assert (path / "model.safetensors").read_bytes() == (
        tmp_path / "run" / "model.safetensors"
    ).read_bytes()


def test_a_failed_write_leaves_no_partial_checkpoint(tmp_path, monkeypatch):
    """The write of step 6 fails after the weights; the checkpoint of step 3 stays intact."""
    write_json = checkpoint.write_json

    def fill_disk_in_step_6(path, value):
        assert (path.parent / "model.safetensors").is_file()
        if value["step"] == 6:
            path.write_text("{")
            raise OSError("disk full")
        write_json(path, value)

    monkeypatch.setattr(checkpoint, "write_json", fill_disk_in_step_6)
    with pytest.raises(OSError, match="disk full"):
        train(small_run(tmp_path / "run", save_every=3, keep=1))
    (path,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert path.name == "step-00000003"
    assert newest(path.parent)[1]["step"] == 3


@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json", "tokenizer"],
)
def test_resume_uses_the_older_checkpoint_if_the_newest_is_damaged(
    tmp_path, monkeypatch, whole_run, caplog, name
):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        fail_in_step(patch, 9)
        with pytest.raises(OSError, match="power failure"):
            train(small_run(out, save_every=3))
    assert steps_saved(out) == [3, 6]
    damaged = out / "checkpoints" / "step-00000006" / name
    if damaged.is_dir():
        shutil.rmtree(damaged)
    else:
        damaged.write_bytes(damaged.read_bytes()[:-20])
    half = out / "checkpoints" / ".step-00000009.1.tmp"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    train(small_run(out, save_every=3, resume=True))
    assert "checkpoint step-00000006 is ignored" in caplog.text and name in caplog.text
    assert_same_run(out, whole_run)


def test_resume_is_refused_if_the_only_checkpoint_is_damaged(tmp_path, monkeypatch):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        fail_in_step(patch, 5)
        with pytest.raises(OSError):
            train(small_run(out))
    (out / "checkpoints" / "step-00000004" / "rng.safetensors").unlink()
    with pytest.raises(
        ValueError, match="holds only damaged checkpoints: .*rng.safetensors is missing; overwrite"
    ):
        train(small_run(out, resume=True))
    assert steps_saved(out) == [4] and len(records(out)) == 5


# Resume


def test_resume_without_a_checkpoint_starts_from_step_1(tmp_path, monkeypatch, whole_run):
    with monkeypatch.context() as patch:
        fail_in_step(patch, 2)
        with pytest.raises(OSError):
            train(small_run(tmp_path / "run", resume=True))
    assert len(records(tmp_path / "run")) == 1 and not steps_saved(tmp_path / "run")
    train(small_run(tmp_path / "run", resume=True))
    assert_same_run(tmp_path / "run", whole_run)


def test_resume_of_a_finished_run_changes_no_file(tmp_path, whole_run):
    out = shutil.copytree(whole_run, tmp_path / "run")
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in out.rglob("*")}
    assert train(small_run(out, resume=True, threads=2, keep=1)) == json.loads(
        (out / "summary.json").read_text()
    )
    assert before == {
        path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in out.rglob("*")
    }
    with pytest.raises(
        ValueError, match="resume: lr: got 0.5, expected 0.001, with which .*run was trained"
    ):
        train(small_run(out, resume=True, lr=0.5))


@pytest.fixture(scope="module")
def stopped_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.MonkeyPatch.context() as patch:
        stop_in_step(patch, 3)
        with pytest.raises(Stopped):
            train(small_run(out))
    return out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 4}, "resume: batch_size: got 4, expected 8, with which .*step-00000003"),
        ({"seed": 1}, "resume: seed: got 1"),
        ({"accumulate": 1}, "resume: accumulate: got 1"),
        ({"amp": "bf16"}, "resume: amp: got 'bf16'"),
        ({"steps": 20}, "resume: steps: got 20"),
        ({"model_options": {}}, "resume: model_options: got {}"),
        ({"overwrite": True}, "overwrite and resume: got both"),
    ],
)
def test_resume_with_different_settings_is_refused(stopped_run, changes, message):
    before = (stopped_run / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match=message):
        train(small_run(stopped_run, resume=True, **changes))
    assert (stopped_run / "metrics.jsonl").read_bytes() == before and steps_saved(stopped_run) == [
        3
    ]


def test_resume_with_different_data_is_refused(stopped_run, monkeypatch):
    monkeypatch.setattr(
        "mmfused.training.setup.product_data.GeneratedProducts",
        partial(GeneratedProducts, size=60, seed=1),
    )
    with pytest.raises(
        ValueError, match="resume: data: the texts, labels or pictures of generated are not those"
    ):
        train(small_run(stopped_run, resume=True))


def test_resume_is_refused_if_metrics_are_missing(stopped_run, tmp_path):
    out = shutil.copytree(stopped_run, tmp_path / "run")
    (out / "metrics.jsonl").write_text("")
    with pytest.raises(
        ValueError, match="resume: .*metrics.jsonl: got 0 bytes, expected at least [0-9]+"
    ):
        train(small_run(out, resume=True))


def test_a_stopped_run_is_not_replaced_without_overwrite(stopped_run):
    with pytest.raises(
        FileExistsError, match=r"already holds a run \(checkpoints, metrics.jsonl\)"
    ):
        train(small_run(stopped_run))
    assert steps_saved(stopped_run) == [3]
