"""Where a training starts: at step 0, at a checkpoint, or, if it is finished, not at all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from mmfused.models import MODELS
from mmfused.training import checkpoint as checkpoints
from mmfused.training.config import TrainConfig
from mmfused.training.datasets import NO_SIZE, check_rows, load_catalogue, load_data
from mmfused.training.files import check_fields, inside, read_json, shown
from mmfused.training.folder_lock import is_marked, not_run_files
from mmfused.training.records import is_number
from mmfused.training.run_folder import (
    RUN_FILES,
    check_out,
    clean_out,
    clear_out,
    is_finished,
    read_settings,
)

FINISHED: Literal["finished"] = "finished"
# Fields of every summary; those of SCORES are added by task.
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
    """A checkpoint's folder and its ``state.json``."""

    path: Path
    state: dict[str, Any]


def find_start(config: TrainConfig, out: Path) -> Checkpoint | Literal["finished"] | None:
    """Return the checkpoint to resume from, FINISHED, or None to start at step 0.

    Raises:
        FileExistsError: ``out`` holds another run, or files that no run made.
        ValueError: every checkpoint is broken, or has other settings.
    """
    if not config.resume:
        check_out(out, config.overwrite)
        return None
    if is_finished(out):
        return FINISHED
    marked = is_marked(out)
    foreign = not_run_files(out, RUN_FILES) if marked else []
    if foreign:
        raise FileExistsError(
            f"out: {out} holds links or the like in the place of a run's files "
            f"({shown(foreign)}); move them"
        )
    found = checkpoints.newest(out / "checkpoints") if marked else None
    if found is None:
        check_out(out, config.overwrite, resume=True)
        return None
    path, state = found
    check_fields(state["settings"], {"rows": dict}, path / "state.json")
    config.check_same(state["settings"]["training"], path)
    return Checkpoint(path, state)


def finished_summary(config: TrainConfig, out: Path) -> dict[str, Any]:
    """Return the summary of the finished run in ``out``.

    Raises:
        ValueError: its settings or data are not those of ``config``.
    """
    settings = read_settings(out)
    check_fields(settings, {"rows": dict}, out / "config.json")
    config.check_same(settings["training"], out)
    # The digests are of the picture files, so the size of the decoded pictures does not matter.
    train_set, val_set = load_data(config, NO_SIZE)
    check_rows(config, settings["rows"], train_set, val_set, load_catalogue(config, NO_SIZE))
    summary = read_json(inside(out, "summary.json"))
    scores = dict.fromkeys(SCORES[MODELS[config.model].task], float)
    check_fields(summary, {**SUMMARY, **scores}, out / "summary.json")
    _check_numbers(summary, out / "summary.json")
    return summary


def _check_numbers(summary: Mapping[str, Any], path: Path) -> None:
    for name, value in summary.items():
        if type(value) in (int, float) and not is_number(value):
            raise ValueError(f"{path} is corrupt: {name} is {value!r:.40}")


def begin(
    config: TrainConfig,
    out: Path,
    found: Checkpoint | None,
    step: int,
    was_marked: bool,
) -> None:
    """Prepare the folder for the step after ``step``.

    ``out`` is checked again: another training may have written to it before it was locked.
    """
    if found is None:
        check_out(out, config.overwrite, config.resume)
        clear_out(out)
    if was_marked:
        clean_out(out)
    checkpoints.keep_until(out / "checkpoints", step)
