"""If train and embed are killed at any moment, they resume as if nothing had happened.

As a script, this file starts and kills them.
"""

import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from training_runs import assert_same_run, records, small_run, smaller_data, steps_saved

import mmfused
from mmfused.training import run as training_run
from mmfused.training.checkpoint import saved
from mmfused.training.run import train

ROOT = Path(mmfused.__file__).parent.parent
KILLS = 25
FOREIGN = {
    "notes.txt": "mine",
    "runs/checkpoints/epoch-17.pt": "another's",
    ".metrics.jsonl.swp": "an editor's",
}


@pytest.fixture
def killer(tmp_path):
    """Return a function that runs one of the functions below in a separate process.

    It returns the JSON that the process prints.
    """

    def run(name):
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        environment.pop("TRITON_INTERPRET", None)
        command = [sys.executable, __file__, name, str(tmp_path)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run


def test_a_killed_training_ends_as_if_never_killed(killer, tmp_path):
    told = killer("kill_training")
    assert told["killed"] == KILLS and told["half_written"] >= 3 and len(set(told["steps"])) >= 5, (
        told
    )
    assert told["terminated"] == 128 + signal.SIGTERM
    assert_same_run(tmp_path / "killed", tmp_path / "whole")
    assert len(records(tmp_path / "whole")) == 60 + 6
    assert {name: (tmp_path / "killed" / name).read_text() for name in FOREIGN} == FOREIGN


def test_a_killed_embed_ends_as_if_never_killed(killer, tmp_path):
    told = killer("kill_embedding")
    assert told["killed"] == KILLS and told["parts"] >= 5, told
    with np.load(tmp_path / "whole.npz") as whole, np.load(tmp_path / "killed.npz") as killed:
        assert whole.files == killed.files and len(whole["labels"]) == 60
        assert all(np.array_equal(whole[name], killed[name]) for name in whole.files)
    left = {path.name for path in tmp_path.iterdir()} - {"data", "run"}
    assert left == {"whole.npz", "killed.npz", "killed.npz.backup", "notes.txt"}


def kill_training(folder: Path):
    """Kill training at random moments.

    The children are forked from this process, which has imported torch but has never computed a
    gradient: after that, it could not be forked.
    """
    import timm.models.vision_transformer  # noqa: F401 (so that no child has to import it)
    from transformers import BertModel  # noqa: F401

    sys.modules["mmfused.training.setup"].product_data.GeneratedProducts = smaller_data()
    chance, out, told = (
        random.Random(0),
        folder / "killed",
        {"killed": 0, "half_written": 0, "steps": []},
    )
    for name, text in FOREIGN.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(text)
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
            time.sleep(chance.uniform(0, 0.3))  # possibly before the first step
        else:
            wait_for(child, lambda before=before: steps_saved(out)[-1:] > before[-1:])
            if told["killed"] % 2:
                time.sleep(chance.uniform(0, 0.05))
            else:
                wait_for(child, lambda: any((out / "checkpoints").glob(".step-*.tmp")))
        if kill(child):
            told["killed"] += 1
            told["half_written"] += any((out / "checkpoints").glob(".step-*.tmp"))
            told["steps"] += steps_saved(out)[-1:]
    wait(fork(go_on))
    print(json.dumps(told))


def kill_embedding(folder: Path):
    import timm.models.vision_transformer  # noqa: F401
    from transformers import BertModel  # noqa: F401

    from mmfused.cli import main

    def command(*arguments):
        return lambda: sys.exit(main([*map(str, arguments), "--device", "cpu", "--threads", "1"]))

    write_products(folder / "data")
    sizes = [
        "--steps",
        1,
        "--batch-size",
        4,
        "--image-size",
        32,
        "--max-length",
        12,
        "--backend",
        "composed",
    ]
    data = ["--data", folder / "data"]
    wait(
        fork(
            command(
                "train",
                "--model",
                "uniecs",
                *data,
                "--val",
                folder / "data",
                "--out",
                folder / "run",
                *sizes,
            )
        )
    )
    embed = ["embed", "--checkpoint", folder / "run", *data, "--batch-size", 1, "--out"]
    wait(fork(command(*embed, folder / "whole.npz")))
    chance, told, parts = random.Random(1), {"killed": 0}, folder / "killed.npz.parts"
    seen = {0}
    for name in ("killed.npz.backup", "notes.txt"):
        (folder / name).write_text("mine")
    while told["killed"] < KILLS:
        child = fork(command(*embed, folder / "killed.npz"))
        before = len(list(parts.glob("*.safetensors")))
        if told["killed"] % 4 == 3:
            time.sleep(chance.uniform(0, 0.5))  # possibly before the first part
        else:
            wait_for(child, lambda before=before: len(list(parts.glob("*.safetensors"))) > before)
            time.sleep(chance.uniform(0, 0.003))
        if kill(child):
            told["killed"] += 1
            seen.add(len(list(parts.glob("*.safetensors"))))
    wait(fork(command(*embed, folder / "killed.npz")))
    print(json.dumps({**told, "parts": len(seen)}))


def write_products(folder: Path):
    from PIL import Image

    folder.mkdir()
    noise = np.random.default_rng(0)
    with open(folder / "metadata.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "text", "label"])
        for row in range(60):
            Image.fromarray(noise.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(
                folder / f"{row}.png"
            )
            writer.writerow([f"{row}.png", f"thing number {row}", row % 6])


def command_line(out, options):
    """Run ``mmfused train`` until the signal, with a model that only Python can configure."""
    from mmfused.cli import main

    config = small_run(out, save_every=1, **options)
    training_run.TrainConfig = lambda **_: config
    sys.exit(main(["train", "--data", "generated", "--out", str(out)]))


def fork(work) -> int:
    child = os.fork()
    if child:
        return child
    try:
        work()
        os._exit(0)
    except SystemExit as end:
        os._exit(end.code)
    # The child must never return into the parent's tests; the parent sees the exit code.
    except BaseException:
        import traceback

        traceback.print_exc()
        os._exit(1)


def kill(child: int) -> bool:
    """Kill the child; return whether it was still running."""
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def wait(child: int):
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code == 0, f"a child ended with {code}"


def wait_for(child: int, condition):
    for _ in range(200_000):
        if condition():
            return
        assert os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None, (
            "the child ended by itself"
        )
        time.sleep(0.0003)
    raise AssertionError("the condition was never met")


if __name__ == "__main__":
    {"kill_training": kill_training, "kill_embedding": kill_embedding}[sys.argv[1]](
        Path(sys.argv[2])
    )
