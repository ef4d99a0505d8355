"""The folder of a training run: what it may replace, and how it is written and read.

``config.json`` is written last and removed first: a folder that has one holds a finished run.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from mmfused import data as product_data
from mmfused.extras import from_extra
from mmfused.models import MODELS
from mmfused.models.config import shapes_of
from mmfused.training.config import TrainConfig
from mmfused.training.files import (
    check_fields,
    check_shapes,
    inside,
    load_weights,
    model_tensors,
    read_json,
    read_shapes,
    remove,
    save_tensors,
    sha256,
    shown,
    write_json,
    write_whole,
)
from mmfused.training.folder_lock import half_written, strangers
from mmfused.training.records import History

with from_extra("models"):
    from matplotlib.figure import Figure

RUN_FILES = (
    "config.json",
    "checkpoints",
    "metrics.jsonl",
    "model.safetensors",
    "summary.json",
    "curves.png",
    "tokenizer",
)
# The score in the progress bar and in curves.png, by task.
SCORE_OF_TASK = {
    "classification": "accuracy",
    "retrieval": "recall_at_1",
}
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
CHECKPOINT_TENSORS = ("model.safetensors", "optimizer.safetensors", "rng.safetensors")


# ---- before and after a run ----------------------------------------------------------------------


def check_out(out: Path, overwrite: bool, resume: bool = False) -> None:
    """Raise FileExistsError if ``out`` holds a run, or files named like a run's that no run made.

    Args:
        out: the folder of the run to come.
        overwrite: accept a run there.
        resume: accept a run that ended before its first checkpoint.
    """
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"out: {out} is a file, expected a folder")
    foreign = strangers(out, RUN_FILES)
    if foreign:
        raise FileExistsError(
            f"out: {out} holds files that no run made ({shown(foreign)}); "
            "choose another folder, or move them"
        )
    ignored = ("checkpoints", "metrics.jsonl") if resume else ()
    held = [name for name in RUN_FILES if (out / name).exists() and name not in ignored]
    if held and not overwrite:
        raise FileExistsError(
            f"out: {out} already holds a run ({', '.join(held)}); "
            "choose another folder or overwrite it"
        )


def check_replaceable(path: Path, key: str, replace: bool) -> None:
    """Raise FileExistsError unless a JSON file may be written to ``path``.

    An existing file must be a JSON object with ``key``, which shows that this command wrote it,
    and ``replace`` must be set.
    """
    if not os.path.lexists(path):
        return
    try:
        ours = not path.is_symlink() and path.is_file() and key in read_json(path)
    except ValueError:
        ours = False
    if not ours:
        raise FileExistsError(
            f"out: {path} is another program's; choose another folder, or move it"
        )
    if not replace:
        raise FileExistsError(
            f"out: {path} exists already; choose another folder, resume or overwrite it"
        )


def clear_out(out: Path) -> None:
    """Remove the files of a run; call :func:`check_out` first."""
    for name in RUN_FILES:
        remove(out / name)


def clean_out(out: Path) -> None:
    """Remove files that a killed process had half written."""
    for path in half_written(out, RUN_FILES):
        remove(path)


def check_complete(out: Path, metrics_bytes: int) -> None:
    """Raise RuntimeError naming what a finished run should hold and does not."""
    missing = [name for name in RUN_FILES if not (out / name).exists()]
    if missing:
        raise RuntimeError(
            f"out: {out} lacks {', '.join(missing)}, which the run wrote: removed meanwhile?"
        )
    found = (out / "metrics.jsonl").stat().st_size
    if found != metrics_bytes:
        raise RuntimeError(
            f"out: {out / 'metrics.jsonl'} holds {found} bytes, but the run wrote {metrics_bytes}"
        )


def is_finished(out: Path) -> bool:
    """Return whether ``out`` holds a finished run."""
    names = ("config.json", "summary.json", "model.safetensors")
    return all((out / name).exists() for name in names)


# ---- writing -------------------------------------------------------------------------------------


def save_run(
    out: Path,
    settings: Mapping[str, Any],
    model: nn.Module,
    tokenizer: Any,
    summary: Mapping[str, Any],
    history: History,
) -> None:
    """Write the result of a run, each file under a temporary name first."""
    training = settings["training"]
    score = SCORE_OF_TASK[MODELS[training["model"]].task]
    curves = {training["backend"]: history}
    write_whole(out / "tokenizer", lambda path: tokenizer.save_pretrained(path))
    write_whole(out / "model.safetensors", lambda path: save_tensors(path, model_tensors(model)))
    write_whole(out / "curves.png", lambda path: draw_curves(curves, path, score))
    write_whole(out / "summary.json", lambda path: write_json(path, summary))
    write_whole(out / "config.json", lambda path: write_json(path, settings))


def draw_curves(runs: Mapping[str, History], path: Path, score: str = "accuracy") -> None:
    """Plot training loss and a validation score of each named history, side by side, as PNG."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, history in runs.items():
        train, val = history["train"], history["val"]
        left.plot(
            [record["step"] for record in train],
            [record["loss"] for record in train],
            label=name,
            linewidth=1,
        )
        right.plot(
            [record["step"] for record in val],
            [record[score] for record in val],
            label=name,
            marker="o",
        )
    left.set(xlabel="step", ylabel="training loss")
    right.set(xlabel="step", ylabel=f"validation {score.replace('_', ' ')}", ylim=(0, 1))
    left.legend()
    figure.savefig(path, format="png", dpi=120)


# ---- reading -------------------------------------------------------------------------------------


def load_run(folder: str | os.PathLike[str]) -> tuple[Any, Any]:
    """Return ``(model, tokenizer)`` of the run in ``folder``, or of one of its checkpoints.

    The model is on the CPU, in evaluation mode.

    Raises:
        FileNotFoundError: ``folder`` holds neither.
        ValueError: a file of it is truncated, corrupt, a pickle, or holds the weights of another
            model.
    """
    return load_saved(Path(folder), read_settings(Path(folder)))


def load_saved(folder: Path, settings: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return as :func:`load_run`, given the ``settings`` that `read_settings` has returned."""
    model = build_saved(settings, folder)
    load_weights(model, folder / "model.safetensors")
    # Prepared again: some tokenizer classes do not save what they add around texts.
    return model.eval(), model.config.prepare_tokenizer(load_own_tokenizer(folder))


def build_saved(settings: Mapping[str, Any], folder: Path) -> Any:
    """Return the model of the ``settings`` with random weights.

    The shapes in the folder's file of weights are checked before the model is allocated.
    """
    kind = MODELS[settings["training"]["model"]]
    try:
        config = kind.config.from_dict(settings["model"])
        shapes = shapes_of(kind, config)
    except ValueError as error:
        raise ValueError(
            f"{folder} holds the settings of no model of this mmfused: {error}"
        ) from error
    path = inside(folder, "model.safetensors")
    check_shapes(path, read_shapes(path), shapes)
    return kind.model(config)


def load_own_tokenizer(folder: Path) -> Any:
    """Return the tokenizer of the run or checkpoint in ``folder``.

    Raises:
        FileNotFoundError: there is none.
        ValueError: a file of it is a link that leads outside.
    """
    if not (folder / "tokenizer").is_dir():
        raise FileNotFoundError(f"{folder / 'tokenizer'} is missing")
    for path in (folder / "tokenizer").glob("*"):
        inside(folder, f"tokenizer/{path.name}")
    return product_data.load_tokenizer(inside(folder, "tokenizer"))


def read_settings(folder: Path) -> dict[str, Any]:
    """Return "mmfused", "model", "training" and "image_size" of a run or checkpoint.

    Raises as :func:`load_run`.
    """
    if (folder / "state.json").is_file():
        return read_checkpoint(folder)["settings"]
    _refuse_pickles(folder)
    if not (folder / "config.json").is_file():
        unfinished = any(folder.glob("checkpoints/step-*"))
        hint = " (it is not finished; use one of its checkpoints)" if unfinished else ""
        raise FileNotFoundError(f"{folder} holds no finished run: config.json is missing{hint}")
    settings = read_json(inside(folder, "config.json"))
    _check_settings(settings, folder / "config.json")
    return settings


def _check_settings(settings: Mapping[str, Any], path: Path) -> None:
    """Raise ValueError unless they are a training's; the model's config checks "model" itself."""
    kinds = {"mmfused": str, "training": dict, "model": dict, "image_size": int}
    check_fields(settings, kinds, path)
    try:
        TrainConfig.from_dict(settings["training"])
    except ValueError as error:
        raise ValueError(f"{path} holds settings of no training: {error}") from error


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Return ``state.json`` of a checkpoint, after comparing every file with its SHA-256.

    Raises:
        ValueError: a file is missing, or differs from what was written.
    """
    source = path / "state.json"
    if not source.is_file():
        raise ValueError(f"{source} is missing")
    state = read_json(inside(path, "state.json"))
    kinds = {"step": int, "metrics_bytes": int, "seconds": float, "settings": dict, "sha256": dict}
    check_fields(state, kinds, source)
    _check_settings(state["settings"], source)
    in_range = (
        1 <= state["step"] < 2**53
        and 0 <= state["metrics_bytes"] < 2**53
        and 0 <= state["seconds"] < 1e12
    )
    if not in_range:
        raise ValueError(f"{source} is corrupt: step, metrics_bytes or seconds is out of range")
    for name in (*CHECKPOINT_TENSORS, *state["sha256"]):
        if not inside(path, name).is_file():
            raise ValueError(f"{path / name} is missing")
        if sha256(path / name) != state["sha256"].get(name):
            raise ValueError(
                f"{path / name} is truncated or corrupt: its SHA-256 is not the one in state.json"
            )
    return state


def _refuse_pickles(path: Path) -> None:
    if path.is_file() and path.suffix not in PICKLES:
        raise ValueError(f"{path} is a file, expected the folder of a run or of a checkpoint")
    pickles = [path] if path.is_file() else sorted(path.glob("*"))
    pickles = [inner for inner in pickles if inner.suffix in PICKLES]
    if pickles and not (path / "model.safetensors").is_file():
        raise ValueError(
            f"{pickles[0]} is a pickle, which can run any code when opened; "
            "only safetensors are read"
        )
