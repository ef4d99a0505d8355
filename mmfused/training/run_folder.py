"""Check, write and read the folder of a training run.

``config.json`` is written last and removed first, so a folder with a ``config.json`` holds a
finished run.
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
from mmfused.models.adapters import save_adapter
from mmfused.models.config import shapes_of
from mmfused.models.lora import add_lora, check_lora, lora_of
from mmfused.models.weights import PICKLES
from mmfused.training.config import TrainConfig
from mmfused.training.files import (
    check_fields,
    check_shapes,
    join_names,
    load_weights,
    model_tensors,
    path_inside,
    read_json,
    read_shapes,
    remove,
    save_tensors,
    sha256,
    write_atomically,
    write_json,
)
from mmfused.training.folder_lock import foreign_files, half_written
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
    "adapter",  # with LoRA only
)
# The score of each task that the progress bar shows and curves.png plots.
SCORE_OF_TASK = {
    "classification": "accuracy",
    "retrieval": "recall_at_1",
}
CHECKPOINT_TENSORS = ("model.safetensors", "optimizer.safetensors", "rng.safetensors")


# ---- before and after a run ----------------------------------------------------------------------


def check_out(out: Path, overwrite: bool, resume: bool = False) -> None:
    """Raise FileExistsError if a run in ``out`` would replace another run or foreign files.

    Args:
        out: the folder of the new run.
        overwrite: accept a folder that holds a run.
        resume: accept a folder that holds only checkpoints and ``metrics.jsonl``.
    """
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"out: {out} is a file, expected a folder")
    foreign = foreign_files(out, RUN_FILES)
    if foreign:
        raise FileExistsError(
            f"out: {out} holds files that no run made ({join_names(foreign)}); "
            "choose another folder, or move them"
        )
    ignored = ("checkpoints", "metrics.jsonl") if resume else ()
    held = [name for name in RUN_FILES if (out / name).exists() and name not in ignored]
    if held and not overwrite:
        raise FileExistsError(
            f"out: {out} already holds a run ({', '.join(held)}); "
            "choose another folder, or overwrite it (--overwrite) or go on with it (--resume)"
        )


def check_replaceable(path: Path, key: str, replace: bool) -> None:
    """Raise FileExistsError unless a command may write its JSON file to ``path``.

    Args:
        path: path of the file.
        key: a key of the command's JSON object. An existing file without this key is an error.
        replace: whether an existing file with this key may be replaced.
    """
    if not os.path.lexists(path):
        return
    try:
        ours = not path.is_symlink() and path.is_file() and key in read_json(path)
    except ValueError:
        ours = False
    if not ours:
        raise FileExistsError(
            f"out: {path} was written by another program; choose another folder, or move it"
        )
    if not replace:
        raise FileExistsError(
            f"out: {path} already exists; choose another folder, resume or overwrite it"
        )


def clear_out(out: Path) -> None:
    """Remove the files of the run in ``out``; call :func:`check_out` first."""
    for name in RUN_FILES:
        remove(out / name)


def remove_half_written(out: Path) -> None:
    """Remove the temporary files that killed processes left in ``out``."""
    for path in half_written(out, RUN_FILES):
        remove(path)


def check_complete(out: Path, metrics_bytes: int, adapter: bool = False) -> None:
    """Raise RuntimeError if a file of the run is missing, or ``metrics.jsonl`` has a wrong size.

    Args:
        out: the folder of the run.
        metrics_bytes: expected size of ``metrics.jsonl``.
        adapter: whether the run has the folder of an adapter.
    """
    names = [name for name in RUN_FILES if adapter or name != "adapter"]
    missing = [name for name in names if not (out / name).exists()]
    if missing:
        raise RuntimeError(
            f"out: {out} lacks {', '.join(missing)}, which the run wrote; "
            "another process may have removed them"
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
    """Write the result of a run to ``out``, each file atomically."""
    training = settings["training"]
    score = SCORE_OF_TASK[MODELS[training["model"]].task]
    curves = {training["backend"]: history}
    write_atomically(out / "tokenizer", lambda path: tokenizer.save_pretrained(path))
    write_atomically(
        out / "model.safetensors", lambda path: save_tensors(path, model_tensors(model))
    )
    if lora_of(model) is not None:
        write_atomically(out / "adapter", lambda path: save_adapter(path, model))
    write_atomically(out / "curves.png", lambda path: draw_curves(curves, path, score))
    write_atomically(out / "summary.json", lambda path: write_json(path, summary))
    write_atomically(out / "config.json", lambda path: write_json(path, settings))


def draw_curves(runs: Mapping[str, History], path: Path, score: str = "accuracy") -> None:
    """Plot the training loss and the validation ``score`` of each history to a PNG file.

    Args:
        runs: histories by the name in the legend.
        path: path of the PNG file.
        score: key of the score in the validation records.
    """
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
    r"""Return the model and the tokenizer of a finished run or of a checkpoint.

    The model is on the CPU, in evaluation mode.

    Args:
        folder: the folder of the run or of the checkpoint.

    Raises:
        FileNotFoundError: ``folder`` holds neither a finished run nor a checkpoint.
        ValueError: a file in ``folder`` is truncated, corrupt or a pickle, or holds the weights of
            another model.

    Examples:
        >>> import pathlib, tempfile
        >>> from mmfused.training.run import TrainConfig, load_run, train
        >>> rows = "file_name,text,label\n,red mug,0\n,blue plate,1\n"
        >>> options = dict(modalities="text", batch_size=2, steps=1, progress=False)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     size = pathlib.Path(folder, "metadata.csv").write_text(rows)
        ...     config = TrainConfig(f"{folder}/run", data=folder, val=folder, **options)
        ...     summary = train(config)
        ...     model, tokenizer = load_run(config.out)
        >>> model(**tokenizer(["a red mug"], return_tensors="pt")).logits.shape
        torch.Size([1, 2])
    """
    return load_saved(Path(folder), read_settings(Path(folder)))


def load_saved(folder: Path, settings: Mapping[str, Any]) -> tuple[Any, Any]:
    """Load like :func:`load_run`, with ``settings`` from :func:`read_settings`."""
    model = build_saved(settings, folder)
    load_weights(model, folder / "model.safetensors")
    # Some tokenizer classes do not save their rule for special tokens, so prepare them again.
    return model.eval(), model.config.prepare_tokenizer(load_own_tokenizer(folder))


def build_saved(settings: Mapping[str, Any], folder: Path) -> Any:
    """Return the model that ``settings`` describe, with random weights.

    Before the model is allocated, its shapes are compared with those in ``model.safetensors``.
    """
    kind, lora = MODELS[settings["training"]["model"]], settings.get("lora")
    try:
        config = kind.config.from_dict(settings["model"])
        shapes = shapes_of(kind, config, lora)
    except ValueError as error:
        raise ValueError(
            f"{folder} holds model settings that this version of mmfused cannot use: {error}"
        ) from error
    path = path_inside(folder, "model.safetensors")
    check_shapes(path, read_shapes(path), shapes)
    model = kind.model(config)
    return model if lora is None else add_lora(model, **lora)


def load_own_tokenizer(folder: Path) -> Any:
    """Return the tokenizer of the run or checkpoint in ``folder``.

    Raises:
        FileNotFoundError: the folder has no tokenizer.
        ValueError: a file of the tokenizer is a link that leads outside the folder.
    """
    if not (folder / "tokenizer").is_dir():
        raise FileNotFoundError(f"{folder / 'tokenizer'} is missing")
    for path in (folder / "tokenizer").glob("*"):
        path_inside(folder, f"tokenizer/{path.name}")
    return product_data.load_tokenizer(path_inside(folder, "tokenizer"), "tokenizer")


def read_settings(folder: Path) -> dict[str, Any]:
    """Return the settings of the finished run or checkpoint in ``folder``.

    The keys include "mmfused" (the version), "model", "training", "image_size", "class_names" (the
    names of a classifier's labels, or None) and, if the model has adapters, "lora" (the options of
    `add_lora`). Raises like :func:`load_run`.
    """
    if (folder / "state.json").is_file():
        return read_checkpoint(folder)["settings"]
    _refuse_pickles(folder)
    if not (folder / "config.json").is_file():
        unfinished = any(folder.glob("checkpoints/step-*"))
        hint = " (the run is not finished; use one of its checkpoints)" if unfinished else ""
        if not folder.is_dir():
            hint = " (there is no such folder)"
        raise FileNotFoundError(f"{folder} holds no finished run: config.json is missing{hint}")
    settings = read_json(path_inside(folder, "config.json"))
    _check_settings(settings, folder / "config.json")
    return settings


def _check_settings(settings: Mapping[str, Any], path: Path) -> None:
    """Raise ValueError unless ``settings`` are those of a run; fields in "model" are not checked.

    Args:
        settings: the settings.
        path: the file with the settings, for the error message.
    """
    kinds = {"mmfused": str, "training": dict, "model": dict, "image_size": int}
    check_fields(settings, kinds, path)
    try:
        TrainConfig.from_dict(settings["training"])
    except ValueError as error:
        raise ValueError(f"{path} holds invalid training settings: {error}") from error
    if settings.get("lora") is not None:
        try:
            check_lora(settings["lora"])
        except ValueError as error:
            raise ValueError(f"{path} is corrupt: {error}") from error
    names = settings.get("class_names")
    if names is not None and not (
        isinstance(names, list) and all(isinstance(name, str) for name in names)
    ):
        raise ValueError(f"{path} is corrupt: class_names is not a list of strings")


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Return the contents of a checkpoint's ``state.json``, after checking every file's SHA-256.

    Raises:
        ValueError: a file is missing or damaged.
    """
    source = path / "state.json"
    if not source.is_file():
        raise ValueError(f"{source} is missing")
    state = read_json(path_inside(path, "state.json"))
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
        if not path_inside(path, name).is_file():
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
            f"{pickles[0]} is a pickle, which can run any code when it is loaded; only safetensors "
            "are read, and mmfused convert writes them"
        )
