"""Decide where training starts: at step 0, at a checkpoint, or not at all in a finished run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from mmfused.models import MODELS
from mmfused.training import checkpoint as checkpoints
from mmfused.training.config import TrainConfig
from mmfused.training.datasets import UNUSED_SIDE, check_rows, load_data, resuming
from mmfused.training.files import check_fields, join_names, path_inside, read_json
from mmfused.training.folder_lock import is_run_folder, wrong_kind_files
from mmfused.training.initial import fixed_classes
from mmfused.training.records import is_number
from mmfused.training.run_folder import (
    RUN_FILES,
    check_out,
    clear_out,
    is_finished,
    read_settings,
    remove_half_written,
)

FINISHED: Literal["finished"] = "finished"
# Types of the fields of a summary. A summary also has the scores of its task, see SCORES.
SUMMARY: dict[str, type] = {
    **dict.fromkeys(("model", "backend", "device", "amp", "modalities"), str),
    **dict.fromkeys(("parameters", "train_rows", "val_rows", "steps", "peak_memory"), int),
    **dict.fromkeys(("train_loss", "step_seconds", "seconds"), float),
    "skipped": list,
}
SCORES = {
    "classification": ("val_loss", "accuracy", "macro_precision", "macro_recall", "macro_f1"),
    "retrieval": ("recall_at_1", "recall_at_5", "mrr"),
}


class Checkpoint(NamedTuple):
    """The folder of a checkpoint and the contents of its ``state.json``."""

    path: Path
    state: dict[str, Any]


def find_start(config: TrainConfig, out: Path) -> Checkpoint | Literal["finished"] | None:
    """Return the checkpoint to resume from, FINISHED, or None to start at step 0.

    Raises:
        FileExistsError: ``out`` holds files that no run made, or a run that must not be replaced.
        ValueError: all checkpoints are damaged, the newest intact checkpoint has other settings, or
            training would start from the run that it replaces.
    """
    if config.overwrite:
        _check_sources(config, out)
    if not config.resume:
        check_out(out, config.overwrite)
        return None
    if is_finished(out):
        return FINISHED
    is_run = is_run_folder(out)
    foreign = wrong_kind_files(out, RUN_FILES) if is_run else []
    if foreign:
        raise FileExistsError(
            f"out: {out} holds links, pipes or folders with the names of a run's files "
            f"({join_names(foreign)}); move them"
        )
    found = checkpoints.newest(out / "checkpoints") if is_run else None
    if found is None:
        check_out(out, config.overwrite, resume=True)
        return None
    path, state = found
    check_fields(state["settings"], {"rows": dict}, path / "state.json")
    config.check_same(state["settings"]["training"], path)
    if "stream" not in state["settings"]["training"]:
        raise ValueError(
            f"resume: {path} was written by an earlier version, which drew batches in another "
            "order; init starts a new run with its weights"
        )
    return Checkpoint(path, state)


def resumed_settings(out: Path) -> dict[str, Any] | None:
    """Return the settings of the run in ``out`` that would be resumed, or None if there is none.

    Raises:
        ValueError: all checkpoints are damaged, or a file of the finished run is.
    """
    if is_finished(out):
        return read_settings(out)
    found = checkpoints.newest(out / "checkpoints")
    return found[1]["settings"] if found else None


def _check_sources(config: TrainConfig, out: Path) -> None:
    """Raise ValueError if a folder that training starts from is in ``out``, which is replaced."""
    for name in ("init", "host", "adapter", "image_encoder", "text_encoder", "tokenizer"):
        source = getattr(config, name)
        if source is None or not Path(source).exists():  # such as a name on the hub
            continue
        if Path(source).resolve().is_relative_to(out.resolve()):
            raise ValueError(
                f"{name}: got {source!r} in {out}, which overwrite removes, "
                "expected another folder for one of the two"
            )


def finished_summary(config: TrainConfig, out: Path) -> dict[str, Any]:
    """Return the summary of the finished run in ``out``.

    Raises:
        ValueError: the settings or data of the run are not those in ``config``, or a file is
            corrupt.
    """
    settings = read_settings(out)
    check_fields(settings, {"rows": dict}, out / "config.json")
    config.check_same(settings["training"], out)
    # `check_rows` compares digests of the picture files, so pictures may have any size here.
    num_classes = fixed_classes(config, settings["model"])
    data = load_data(
        resuming(config, settings),
        UNUSED_SIDE,
        num_classes,
        class_names=settings.get("class_names"),
    )
    check_rows(config, settings, *data)
    summary = read_json(path_inside(out, "summary.json"))
    scores = dict.fromkeys(SCORES[MODELS[config.model].task], float)
    check_fields(summary, {**SUMMARY, **scores}, out / "summary.json")
    _check_numbers(summary, out / "summary.json")
    return summary


def _check_numbers(summary: Mapping[str, Any], path: Path) -> None:
    for name, value in summary.items():
        if type(value) in (int, float) and not is_number(value):
            raise ValueError(f"{path} is corrupt: {name} is {value!r:.40}")


def prepare_folder(
    config: TrainConfig,
    out: Path,
    found: Checkpoint | None,
    step: int,
    was_marked: bool,
) -> None:
    """Prepare the locked folder ``out`` for training from ``step``.

    Args:
        config: the settings.
        out: the folder of the run.
        found: the checkpoint to resume from, or None.
        step: step of the checkpoint, or 0.
        was_marked: whether the folder had a marker before it was locked.
    """
    # Checked again, because another process may have written to the folder before the lock.
    if found is None:
        check_out(out, config.overwrite, config.resume)
        clear_out(out)
    if was_marked:
        remove_half_written(out)
    checkpoints.remove_after(out / "checkpoints", step)
