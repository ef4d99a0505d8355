"""A run that is stopped or killed goes on as if nothing had happened. Run as a script, this file is the one that kills."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

import mmfused
from mmfused import tasks, training
from mmfused.checkpoint import Stopped, newest, saved, stop_on_signals
from mmfused.data import GeneratedProducts
from mmfused.training import TrainConfig, train

ROOT = Path(mmfused.__file__).parent.parent
KILLS = 20
SMALL = {"dim": 16, "num_queries": 2, "num_heads": 2, "gate_hidden": (8,), "image_dim": 16, "text_dim": 16, "dropout": 0.1}
ENCODERS = {
    "image": {"depth": 1, "num_heads": 1},
    "text": {"num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 16},
}


def small_run(out, **changes) -> TrainConfig:
    """Every source of chance is in it: shuffling, augmentation, hidden modalities, dropout; several epochs, too."""
    options = {
        "model_options": {**SMALL, **ENCODERS},
        "steps": 9,
        "batch_size": 8,
        "accumulate": 2,
        "augment": True,
        "drop_text": 0.3,
        "drop_image": 0.2,
        "val_every": 4,
        "backend": "composed",
        "threads": 1,
        "progress": False,
    }
    return TrainConfig(out=str(out), **{**options, **changes})


def smaller_data():
    return partial(GeneratedProducts, size=60)


def records(out):
    found = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in record.items() if name != "seconds"} for record in found]


def assert_same_run(one, other):
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    assert records(one) == records(other)
    assert not [path for path in one.rglob(".*") if path.name.endswith(".tmp")]


def steps_saved(out):
    return [int(path.name[5:]) for path in saved(out / "checkpoints")]


@pytest.fixture(scope="module", autouse=True)
def few_products():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mmfused.train_setup.product_data.GeneratedProducts", smaller_data())
        yield


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    train(small_run(out))
    return out


def stop_in_step(monkeypatch, number, signum=signal.SIGTERM):
    """The signal comes while step ``number`` of this process is being made."""
    made, update = [], training.update

    def interrupted(*args):
        made.append(1)
        if len(made) == number:
            os.kill(os.getpid(), signum)
        return update(*args)

    monkeypatch.setattr(training, "update", interrupted)


def fail_in_step(monkeypatch, number):
    made, update = [], training.update

    def failing(*args):
        made.append(1)
        if len(made) == number:
            raise OSError("the power went")
        return update(*args)

    monkeypatch.setattr(training, "update", failing)
    return update


# Killed


def test_killed_twenty_times_it_ends_as_if_never_killed(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, __file__, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["killed"] == KILLS and told["half_written"] >= 3 and len(set(told["steps"])) >= 5, told
    assert told["terminated"] == 128 + signal.SIGTERM
    assert_same_run(tmp_path / "killed", tmp_path / "whole")
    assert len(records(tmp_path / "whole")) == 60 + 6


def kill_again_and_again(folder: Path):
    """Children are forked from here, where torch is imported and no gradient was ever computed: that cannot be forked."""
    import timm.models.vision_transformer  # noqa: F401 (so that no child has to import it)
    from transformers import BertModel  # noqa: F401

    sys.modules["mmfused.train_setup"].product_data.GeneratedProducts = smaller_data()
    chance, out, told = random.Random(0), folder / "killed", {"killed": 0, "half_written": 0, "steps": []}
    options = {"steps": 60, "val_every": 10}
    wait(fork(lambda: train(small_run(folder / "whole", **options))))
    go_on = partial(train, small_run(out, resume=True, save_every=1, **options))
    terminated = fork(lambda: command_line(out, options))
    wait_for(terminated, lambda: len(saved(out / "checkpoints")) > 1)
    os.kill(terminated, signal.SIGTERM)
    told["terminated"] = os.waitstatus_to_exitcode(os.waitpid(terminated, 0)[1])
    while told["killed"] < KILLS:
        child, before = fork(go_on), steps_saved(out)
        if told["killed"] % 4 == 3:
            time.sleep(chance.uniform(0, 0.3))  # maybe before the first step
        else:
            wait_for(child, lambda before=before: steps_saved(out)[-1:] > before[-1:])
            if told["killed"] % 2:
                time.sleep(chance.uniform(0, 0.05))
            else:
                wait_for(child, lambda: any((out / "checkpoints").glob(".step-*.tmp")))
        os.kill(child, signal.SIGKILL)
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL:
            told["killed"] += 1
            told["half_written"] += any((out / "checkpoints").glob(".step-*.tmp"))
            told["steps"] += steps_saved(out)[-1:]
    wait(fork(go_on))
    print(json.dumps(told))


def command_line(out, options):
    """What ``mmfused train`` makes of the signal, for a model that only Python can ask for."""
    from mmfused.cli import main

    config = small_run(out, save_every=1, **options)
    training.TrainConfig = lambda **_: config
    os._exit(main(["train", "--data", "generated", "--out", str(out)]))


def fork(work) -> int:
    child = os.fork()
    if child:
        return child
    try:
        work()
        os._exit(0)
    except BaseException:  # nothing may get past the fork, back into the parent's tests; the exit code tells the parent
        import traceback

        traceback.print_exc()
        os._exit(1)


def wait(child: int):
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code == 0, f"a child ended with {code}"


def wait_for(child: int, condition):
    for _ in range(200_000):
        if condition():
            return
        assert os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None, "the child ended by itself"
        time.sleep(0.0003)
    raise AssertionError("waited in vain")


# Stopped


@pytest.fixture(autouse=True)
def heard_interrupts():
    """A shell's background job is born with SIGINT ignored, and the suite may run in one."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("step", [3, 8, 9])  # between validations, at one, at the end
def test_a_signal_saves_and_resume_goes_on(tmp_path, monkeypatch, whole_run, signum, step):
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        stop_in_step(patch, step, signum)
        with pytest.raises(Stopped, match=f"stopped by {signum.name} after step {step}, saved in .*step-0000000{step}; .*--resume"):
            train(small_run(tmp_path / "run"))
    assert handlers == (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))
    assert steps_saved(tmp_path / "run")[-1] == step
    train(small_run(tmp_path / "run", resume=True))
    assert_same_run(tmp_path / "run", whole_run)


def test_a_signal_ends_a_validation(tmp_path, monkeypatch, whole_run):
    evaluate = tasks.evaluate

    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*args)

    with monkeypatch.context() as patch:
        patch.setattr(tasks, "evaluate", interrupted)
        with pytest.raises(Stopped, match="after step 4"):
            train(small_run(tmp_path / "run"))
    assert all("accuracy" not in record for record in records(tmp_path / "run"))
    train(small_run(tmp_path / "run", resume=True))
    assert_same_run(tmp_path / "run", whole_run)


def test_a_second_signal_acts_at_once():
    with pytest.raises(KeyboardInterrupt), stop_on_signals() as stop:
        assert not stop()
        os.kill(os.getpid(), signal.SIGINT)
        assert stop() and stop.signum == signal.SIGINT
        os.kill(os.getpid(), signal.SIGINT)


def test_ignored_signals_and_other_threads_are_left_alone():
    import threading

    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stop_on_signals() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert not stop() and signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
    finally:
        signal.signal(signal.SIGINT, before)
    found = []

    def elsewhere():
        with stop_on_signals():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert found == [signal.getsignal(signal.SIGTERM)]


# Checkpoints


def test_only_the_newest_are_kept_and_each_is_whole(tmp_path):
    train(small_run(tmp_path / "run", save_every=2, keep=3))
    assert steps_saved(tmp_path / "run") == [6, 8, 9]
    path, state = newest(tmp_path / "run" / "checkpoints")
    files = {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()}
    weights = {f"{name}.safetensors" for name in ("model", "optimizer", "rng")}
    assert weights | {"state.json", "tokenizer/tokenizer.json"} <= files and files - {"state.json"} == state["sha256"].keys()
    assert (state["step"], state["next_batch"]) == (9, {"epoch": 2, "batch": 4})  # 18 batches of 8, 7 an epoch of 60 rows
    assert (path / "model.safetensors").read_bytes() == (tmp_path / "run" / "model.safetensors").read_bytes()


def test_a_failed_write_leaves_the_older_ones(tmp_path, monkeypatch):
    from mmfused import checkpoint

    def full(path, value):
        raise OSError("disk full")

    train(small_run(tmp_path / "run", save_every=3, keep=1))
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_json", full)
        with pytest.raises(OSError, match="disk full"):
            train(small_run(tmp_path / "other", save_every=3))
    assert list((tmp_path / "other" / "checkpoints").iterdir()) == []
    assert steps_saved(tmp_path / "run") == [9]


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json", "tokenizer"])
def test_a_damaged_checkpoint_gives_way_to_the_older_one(tmp_path, monkeypatch, whole_run, caplog, name):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        fail_in_step(patch, 9)
        with pytest.raises(OSError, match="the power went"):
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


def test_nothing_but_damage_is_said_and_left_alone(tmp_path, monkeypatch):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        fail_in_step(patch, 5)
        with pytest.raises(OSError):
            train(small_run(out))
    (out / "checkpoints" / "step-00000004" / "rng.safetensors").unlink()
    with pytest.raises(ValueError, match="holds no whole checkpoint: .*rng.safetensors is missing; overwrite"):
        train(small_run(out, resume=True))
    assert steps_saved(out) == [4] and len(records(out)) == 5


# Resuming


def test_resume_without_anything_to_resume_begins(tmp_path, monkeypatch, whole_run):
    with monkeypatch.context() as patch:
        fail_in_step(patch, 2)
        with pytest.raises(OSError):
            train(small_run(tmp_path / "run", resume=True))
    assert len(records(tmp_path / "run")) == 1 and not steps_saved(tmp_path / "run")
    train(small_run(tmp_path / "run", resume=True))
    assert_same_run(tmp_path / "run", whole_run)


def test_resume_of_a_finished_run_touches_nothing(tmp_path, whole_run):
    out = shutil.copytree(whole_run, tmp_path / "run")
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in out.rglob("*")}
    assert train(small_run(out, resume=True, threads=2, keep=1)) == json.loads((out / "summary.json").read_text())
    assert before == {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in out.rglob("*")}
    with pytest.raises(ValueError, match="resume: lr is 0.5, but .*run was trained with 0.001; take that one"):
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
        ({"batch_size": 4}, "resume: batch_size is 4, but .*step-00000003 was trained with 8"),
        ({"seed": 1}, "resume: seed is 1"),
        ({"accumulate": 1}, "resume: accumulate is 1"),
        ({"amp": "bf16"}, "resume: amp is 'bf16'"),
        ({"steps": 20}, "resume: steps is 20"),
        ({"model_options": {}}, "resume: model_options is {}"),
        ({"overwrite": True}, "overwrite and resume: got both"),
    ],
)
def test_resume_with_other_settings_is_refused(stopped_run, changes, message):
    before = (stopped_run / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match=message):
        train(small_run(stopped_run, resume=True, **changes))
    assert (stopped_run / "metrics.jsonl").read_bytes() == before and steps_saved(stopped_run) == [3]


def test_resume_with_other_rows_is_refused(stopped_run, monkeypatch):
    monkeypatch.setattr("mmfused.train_setup.product_data.GeneratedProducts", partial(GeneratedProducts, size=60, seed=1))
    with pytest.raises(ValueError, match="resume: data: the rows of generated are not those"):
        train(small_run(stopped_run, resume=True))


def test_resume_without_its_records_is_refused(stopped_run, tmp_path):
    out = shutil.copytree(stopped_run, tmp_path / "run")
    (out / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="resume: .*metrics.jsonl holds 0 bytes, but [0-9]+ at the checkpoint"):
        train(small_run(out, resume=True))


def test_a_stopped_run_is_not_begun_anew_by_mistake(stopped_run):
    with pytest.raises(FileExistsError, match=r"already holds a run \(checkpoints, metrics.jsonl\)"):
        train(small_run(stopped_run))
    assert steps_saved(stopped_run) == [3]


if __name__ == "__main__":
    kill_again_and_again(Path(sys.argv[1]))
