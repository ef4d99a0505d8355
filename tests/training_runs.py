"""A small training run that uses all sources of randomness, and functions to compare two runs."""

import json
import os
import shutil
import signal
from functools import partial
from pathlib import Path

import pytest

from mmfused.data import GeneratedProducts
from mmfused.training import loop as training
from mmfused.training.checkpoint import saved
from mmfused.training.run import TrainConfig, train

SIZES = {
    "dim": 16,
    "num_queries": 2,
    "num_heads": 2,
    "gate_hidden": (8,),
    "image_dim": 16,
    "text_dim": 16,
    "dropout": 0.1,
}
ENCODERS = {
    "image": {"depth": 1, "num_heads": 1},
    "text": {"num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 16},
}
SMALL_RUN = {  # shuffling, augmentation, hidden modalities, dropout, several epochs
    "model_options": {**SIZES, **ENCODERS},
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


def small_run(out, **changes) -> TrainConfig:
    return TrainConfig(out=str(out), **{**SMALL_RUN, **changes})


def smaller_data():
    return partial(GeneratedProducts, size=60)


@pytest.fixture(scope="module", autouse=True)
def few_products():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mmfused.training.setup.product_data.GeneratedProducts", smaller_data())
        yield


def records(out):
    found = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in record.items() if name != "seconds"} for record in found
    ]


def assert_same_run(one, other):
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    assert records(one) == records(other)
    assert not [path for path in one.rglob(".*") if path.name.endswith(".tmp")]


def steps_saved(out):
    return [int(path.name[5:]) for path in saved(out / "checkpoints")]


def in_step(monkeypatch, number, act):
    """Call ``act`` just before the update of training step ``number``, counted in this process."""
    made, update = [], training.update

    def acting(*args):
        made.append(1)
        if len(made) == number:
            act()
        return update(*args)

    monkeypatch.setattr(training, "update", acting)


def stop_in_step(monkeypatch, number, signum=signal.SIGTERM):
    in_step(monkeypatch, number, lambda: os.kill(os.getpid(), signum))


def fail_in_step(monkeypatch, number):
    def fail():
        raise OSError("power failure")

    in_step(monkeypatch, number, fail)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    train(small_run(out))
    return out


@pytest.fixture(scope="module")
def stopped_run(tmp_path_factory):
    """Return a run that failed in step 6 of 9, after the checkpoint of step 4."""
    out = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.MonkeyPatch.context() as patch:
        fail_in_step(patch, 6)
        with pytest.raises(OSError, match="power failure"):
            train(small_run(out))
    return out


def contents_of(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def assert_resumes(settings, first, folder, monkeypatch, **changes) -> None:
    """Require that a run from the run ``first`` resumes bit for bit from its own checkpoint.

    ``settings`` makes a TrainConfig of a folder and of changes. The runs are "whole" and "resumed"
    in ``folder``.
    """
    shutil.copytree(first, folder / "init")
    changes = {"init": str(folder / "init"), "steps": 3, **changes}
    train(settings(folder / "whole", **changes))
    with monkeypatch.context() as patch:
        fail_in_step(patch, 3)
        with pytest.raises(OSError, match="power failure"):
            train(settings(folder / "resumed", **changes))
    shutil.rmtree(folder / "init")
    train(settings(folder / "resumed", **changes, resume=True))
    assert_same_run(folder / "whole", folder / "resumed")
