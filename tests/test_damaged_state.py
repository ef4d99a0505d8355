"""Tests that resuming from damaged or changed files raises a one-line error."""

import os
import shutil

import pytest
import safetensors.torch
import torch
import training_runs
from training_runs import (
    contents_of,
    small_run,
)

from mmfused.training.files import read_json, sha256, write_json
from mmfused.training.run import train

few_products = training_runs.few_products
stopped_run = training_runs.stopped_run
whole_run = training_runs.whole_run


def change_json(path, **values):
    write_json(path, {**read_json(path), **values})


def rewrite_checksums(step):
    """Recompute the checksums of a checkpoint after a change of its files."""
    files = [path for path in step.rglob("*") if path.is_file() and path.name != "state.json"]
    change_json(
        step / "state.json",
        sha256={path.relative_to(step).as_posix(): sha256(path) for path in files},
    )


def change_tensors(path, change):
    tensors = change(safetensors.torch.load_file(path))
    path.write_bytes(safetensors.torch.save(tensors))
    rewrite_checksums(path.parent)


def change_settings(step, **values):
    state = read_json(step / "state.json")
    for name, value in values.items():
        if value is None:
            del state["settings"][name]
        else:
            state["settings"][name] = value
    write_json(step / "state.json", state)


def with_wrong_moment_shape(tensors):
    name = next(name for name in tensors if name.endswith("exp_avg"))
    return {**tensors, name: torch.zeros(1)}


DAMAGE = {
    "step is a string": (
        lambda s: change_json(s / "state.json", step="7"),
        "step is of type str, expected int",
    ),
    "step is a float": (
        lambda s: change_json(s / "state.json", step=1e9),
        "step is of type float, expected int",
    ),
    "step is true": (
        lambda s: change_json(s / "state.json", step=True),
        "step is of type bool, expected int",
    ),
    "step is beyond the last": (
        lambda s: change_json(s / "state.json", step=10**9),
        "got step 1000000000, expected at most 9",
    ),
    "step is negative": (lambda s: change_json(s / "state.json", step=-1), "out of range"),
    "step is huge": (lambda s: change_json(s / "state.json", step=10**30), "out of range"),
    "seconds is NaN": (
        lambda s: change_json(s / "state.json", seconds=float("nan")),
        "out of range",
    ),
    "settings is a list": (
        lambda s: change_json(s / "state.json", settings=[]),
        "settings is of type list, expected dict",
    ),
    "settings lack the model": (lambda s: change_settings(s, model=None), "state.json lacks model"),
    "settings lack the rows": (lambda s: change_settings(s, rows=None), "state.json lacks rows"),
    "rows is a list": (lambda s: change_settings(s, rows=[]), "rows is of type list"),
    "a training setting of the wrong type": (
        lambda s: change_settings(s, training={"out": "x", "lr": "much"}),
        "lr: got 'much', expected a finite number",
    ),
    "an unknown training setting": (
        lambda s: change_settings(s, training={"out": "x", "exec": 1}),
        "unknown settings: exec",
    ),
    "sha256 is a string": (
        lambda s: change_json(s / "state.json", sha256="x"),
        "sha256 is of type str",
    ),
    "sha256 is empty": (
        lambda s: change_json(s / "state.json", sha256={}),
        "its SHA-256 is not the one in state.json",
    ),
    "a checksum of a file outside the checkpoint": (
        lambda s: change_json(s / "state.json", sha256={"../../../secret": "0"}),
        "leads outside|its SHA-256",
    ),
    "state is a list": (
        lambda s: (s / "state.json").write_text("[]"),
        "holds list, expected an object",
    ),
    "state is deeply nested": (
        lambda s: (s / "state.json").write_text("[" * 200_000),
        "truncated or corrupt",
    ),
    "state is not UTF-8": (
        lambda s: (s / "state.json").write_bytes(b"\xff\xfe\x00"),
        "truncated or corrupt",
    ),
    "state is truncated": (lambda s: os.truncate(s / "state.json", 40), "truncated or corrupt"),
    "another shape in the optimizer": (
        lambda s: change_tensors(s / "optimizer.safetensors", with_wrong_moment_shape),
        "which is not a state that AdamW has",
    ),
    "an unknown parameter in the optimizer": (
        lambda s: change_tensors(
            s / "optimizer.safetensors", lambda t: {**t, "x.exp_avg": torch.zeros(1)}
        ),
        "holds x.exp_avg, but the model has no parameter x",
    ),
    "a missing random state": (
        lambda s: change_tensors(s / "rng.safetensors", lambda t: {"torch.cpu": t["torch.cpu"]}),
        "lacks the state of the random generator drop",
    ),
    "an invalid random state": (
        lambda s: change_tensors(
            s / "rng.safetensors", lambda t: {**t, "drop": torch.zeros(3, dtype=torch.uint8)}
        ),
        "holds an invalid state of the random generator drop",
    ),
    "another model's weights": (
        lambda s: change_tensors(s / "model.safetensors", lambda t: dict(list(t.items())[1:])),
        "holds the weights of another model",
    ),
    "a weights file without tensors": (
        lambda s: (
            (s / "model.safetensors").write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00{}      "),
            rewrite_checksums(s),
        ),
        "holds the weights of another model|not a safetensors file",
    ),
    "an impossible header length": (
        lambda s: ((s / "rng.safetensors").write_bytes(b"\xff" * 8 + b"{}"), rewrite_checksums(s)),
        "truncated, corrupt or not a safetensors file",
    ),
    "records are truncated": (
        lambda s: os.truncate(s.parent.parent / "metrics.jsonl", 10),
        "got 10 bytes, expected",
    ),
    "records are lists": (
        lambda s: (s.parent.parent / "metrics.jsonl").write_bytes(b"[]\n" * 10_000),
        "metrics.jsonl is truncated or corrupt",
    ),
    "records without numbers": (
        lambda s: (s.parent.parent / "metrics.jsonl").write_bytes(
            b'{"step": 1, "loss": null, "seconds": 1}\n' * 1000
        ),
        "metrics.jsonl is truncated or corrupt",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_resume_rejects_damaged_state_and_changes_no_file(tmp_path, stopped_run, name):
    out = shutil.copytree(stopped_run, tmp_path / "run")
    (tmp_path / "secret").write_text("secret")
    damage, message = DAMAGE[name]
    damage(out / "checkpoints" / "step-00000004")
    before = contents_of(out)
    with pytest.raises(ValueError, match=message) as caught:
        train(small_run(out, resume=True))
    assert "\n" not in str(caught.value)
    assert contents_of(out) == before


@pytest.mark.parametrize("name", ["summary.json", "config.json"])
@pytest.mark.parametrize("text", ["{}", "[]", "{", '{"skipped": 3}', "[" * 100_000])
def test_resume_rejects_a_finished_run_with_a_damaged_file(tmp_path, whole_run, name, text):
    out = shutil.copytree(whole_run, tmp_path / "run")
    (out / name).write_text(text)
    with pytest.raises(ValueError, match=name) as caught:
        train(small_run(out, resume=True))
    assert "\n" not in str(caught.value)


def first_key(tensors, kind):
    return next(name for name in tensors if name.endswith(kind))


OPTIMIZER_DAMAGE = {
    "without a moment": lambda t: {
        name: value for name, value in t.items() if name != first_key(t, "exp_avg_sq")
    },
    "of integers": lambda t: {name: value.to(torch.int8) for name, value in t.items()},
    "with a negative step": lambda t: {**t, first_key(t, "step"): torch.tensor(-1.0)},
    "with NaN": lambda t: {
        **t,
        first_key(t, "exp_avg"): t[first_key(t, "exp_avg")] * float("nan"),
    },
    "empty": lambda t: {},
}


@pytest.mark.parametrize("name", OPTIMIZER_DAMAGE)
def test_resume_rejects_an_incomplete_or_invalid_optimizer_state(tmp_path, stopped_run, name):
    out = shutil.copytree(stopped_run, tmp_path / "run")
    change_tensors(
        out / "checkpoints" / "step-00000004" / "optimizer.safetensors", OPTIMIZER_DAMAGE[name]
    )
    with pytest.raises(
        ValueError, match="optimizer.safetensors holds no (complete )?state of AdamW"
    ):
        train(small_run(out, resume=True))


@pytest.mark.parametrize("lost", ["all", "validation record", "training record"])
def test_resume_rejects_records_that_do_not_match_the_step(tmp_path, stopped_run, lost):
    out = shutil.copytree(stopped_run, tmp_path / "run")
    lines = (out / "metrics.jsonl").read_bytes().splitlines(keepends=True)[:5]
    kept = {"all": [], "validation record": lines[:4] + lines[3:4], "training record": lines[1:]}[
        lost
    ]
    (out / "metrics.jsonl").write_bytes(b"".join(kept))
    change_json(
        out / "checkpoints" / "step-00000004" / "state.json", metrics_bytes=len(b"".join(kept))
    )
    with pytest.raises(
        ValueError,
        match="metrics.jsonl: got [0-9] training records and [01] validation records at step 4",
    ):
        train(small_run(out, resume=True))


@pytest.mark.parametrize("name", ["checkpoints", "metrics.jsonl", "tokenizer"])
@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_resume_rejects_links_and_pipes(tmp_path, stopped_run, name, kind):
    out = shutil.copytree(stopped_run, tmp_path / "run")
    if os.path.lexists(out / name):
        (out / name).rename(tmp_path / name)
    if kind == "link":
        (out / name).symlink_to(tmp_path / name)
    else:
        os.mkfifo(out / name)
    before = contents_of(tmp_path)
    with pytest.raises(
        FileExistsError,
        match=f"links, pipes or folders with the names of a run's files .{name}.; move them",
    ):
        train(small_run(out, resume=True))
    assert contents_of(tmp_path) == before


def test_resume_accepts_moved_data_and_rejects_changed_data(tmp_path):
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
    with pytest.raises(
        ValueError, match="resume: data: the texts, labels or pictures of .*val are not those"
    ):
        train(small_run(tmp_path / "run", resume=True, **{**given, "data": given["val"]}))
