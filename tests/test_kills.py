"""Tests that train and embed, killed and resumed, give the results of uninterrupted commands.

Run as a script, this file starts and kills the commands.
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
KILLS = 16  # four at each of the four moments
FOREIGN = {
    "notes.txt": "mine",
    "runs/checkpoints/epoch-17.pt": "another's",
    ".metrics.jsonl.swp": "an editor's",
}


@pytest.fixture
def run_script(tmp_path):
    """Return a function that runs this file as a script and returns the JSON that it prints."""

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


def test_killed_training_gives_the_results_of_an_uninterrupted_training(run_script, tmp_path):
    counts = run_script("kill_training")
    assert (
        counts["killed"] == KILLS and counts["half_written"] >= 3 and len(set(counts["steps"])) >= 5
    ), counts
    assert counts["terminated"] == 128 + signal.SIGTERM
    assert_same_run(tmp_path / "killed", tmp_path / "whole")
    assert len(records(tmp_path / "whole")) == 60 + 6
    assert {name: (tmp_path / "killed" / name).read_text() for name in FOREIGN} == FOREIGN


def test_killed_embed_gives_the_results_of_an_uninterrupted_embed(run_script, tmp_path):
    counts = run_script("kill_embedding")
    assert counts["killed"] == KILLS and counts["parts"] >= 5, counts
    with np.load(tmp_path / "whole.npz") as whole, np.load(tmp_path / "killed.npz") as killed:
        assert whole.files == killed.files and len(whole["labels"]) == 60
        assert all(np.array_equal(whole[name], killed[name]) for name in whole.files)
    left = {path.name for path in tmp_path.iterdir()} - {"data", "run"}
    assert left == {"whole.npz", "killed.npz", "killed.npz.backup", "notes.txt"}


def kill_training(folder: Path):
    """Kill training at random moments.

    This process forks the children, so it must not compute gradients: autograd does not work in a
    fork of a process that has used autograd.
    """
    import timm.models.vision_transformer  # noqa: F401 (so that no child has to import it)
    from transformers import BertModel  # noqa: F401

    sys.modules["mmfused.training.setup"].product_data.GeneratedProducts = smaller_data()
    rng, out, counts = (
        random.Random(0),
        folder / "killed",
        {"killed": 0, "half_written": 0, "steps": []},
    )
    for name, text in FOREIGN.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(text)
    options = {"steps": 60, "val_every": 10}
    wait(fork(lambda: train(small_run(folder / "whole", **options))))
    resume_training = partial(train, small_run(out, resume=True, save_every=1, **options))
    terminated = fork(lambda: run_command_line(out, options))
    wait_for(terminated, lambda: len(saved(out / "checkpoints")) > 1)
    os.kill(terminated, signal.SIGTERM)
    counts["terminated"] = os.waitstatus_to_exitcode(os.waitpid(terminated, 0)[1])
    while counts["killed"] < KILLS:
        child, before = fork(resume_training), steps_saved(out)
        if counts["killed"] % 4 == 3:
            time.sleep(rng.uniform(0, 0.3))  # possibly before the first step
        else:
            wait_for(child, lambda before=before: steps_saved(out)[-1:] > before[-1:])
            if counts["killed"] % 2:
                time.sleep(rng.uniform(0, 0.05))
            else:
                wait_for(child, lambda: any((out / "checkpoints").glob(".step-*.tmp")))
        if kill(child):
            counts["killed"] += 1
            counts["half_written"] += any((out / "checkpoints").glob(".step-*.tmp"))
            counts["steps"] += steps_saved(out)[-1:]
    wait(fork(resume_training))
    print(json.dumps(counts))


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
    rng, counts, parts = random.Random(1), {"killed": 0}, folder / "killed.npz.parts"
    result = folder / "killed.npz"
    seen = {0}
    for name in ("killed.npz.backup", "notes.txt"):
        (folder / name).write_text("mine")
    while counts["killed"] < KILLS:
        child = fork(command(*embed, folder / "killed.npz"))
        before = len(list(parts.glob("*.safetensors")))
        if counts["killed"] % 4 == 3:
            time.sleep(rng.uniform(0, 0.5))  # possibly before the first part
        else:
            wait_for(
                child,
                lambda before=before: (
                    len(list(parts.glob("*.safetensors"))) > before or result.exists()
                ),
            )
            time.sleep(rng.uniform(0, 0.003))
        if kill(child):
            counts["killed"] += 1
            seen.add(len(list(parts.glob("*.safetensors"))))
        result.unlink(missing_ok=True)  # of a child that finished before the kill
    wait(fork(command(*embed, folder / "killed.npz")))
    print(json.dumps({**counts, "parts": len(seen)}))


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


def run_command_line(out, options):
    """Run ``mmfused train`` with settings for which the command has no options."""
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
    # The child must not return into the parent's code.
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
    assert code == 0, f"a child exited with code {code}"


def wait_for(child: int, condition):
    for _ in range(200_000):
        if condition():
            return
        assert os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None, (
            "the child exited before the condition was met"
        )
        time.sleep(0.0003)
    raise AssertionError("the condition was never met")


if __name__ == "__main__":
    {"kill_training": kill_training, "kill_embedding": kill_embedding}[sys.argv[1]](
        Path(sys.argv[2])
    )
