"""Where a training begins: anew, at a checkpoint, or, if it is finished, not at all."""

from __future__ import annotations

import json
from pathlib import Path

from mmfused.models import MODELS
from mmfused.training.ownership import is_marked, misplaced
from mmfused.training.run_folder import (
    RUN_FILES,
    check_fields,
    check_out,
    clean_out,
    clear_out,
    inside,
    is_finished,
    read_json,
    read_settings,
    shown,
)
from mmfused.training.setup import NO_SIZE, check_rows, load_catalogue, load_data

from . import checkpoint as checkpoints

FINISHED = "finished"
SUMMARY = {  # what every run's has; the scores are those of its task
    **dict.fromkeys(("model", "backend", "device", "amp", "modalities"), str),
    **dict.fromkeys(("parameters", "train_rows", "val_rows", "steps", "peak_memory"), int),
    **dict.fromkeys(("train_loss", "step_seconds", "seconds"), float),
    "skipped": list,
}
SCORES = {
    "classification": ("val_loss", "accuracy", "macro_precision", "macro_recall", "macro_f1"),
    "retrieval": ("recall_at_1", "recall_at_5", "mrr"),
}


def find_start(config, out: Path) -> tuple[Path, dict] | str | None:
    """The checkpoint to go on from, and its state; FINISHED; or None: from the beginning. Raises
    where ``out`` cannot be used.
    """
    if not config.resume:
        check_out(out, config.overwrite)
        return None
    if is_finished(out):
        return FINISHED
    elsewhere = misplaced(out, RUN_FILES) if is_marked(out) else []
    if elsewhere:
        raise FileExistsError(
            f"out: {out} holds links or the like in the place of a run's files ({shown(elsewhere)}); move them"
        )
    found = checkpoints.newest(out / "checkpoints") if is_marked(out) else None
    if found is None:
        check_out(out, config.overwrite, resume=True)
    else:
        check_fields(found[1]["settings"], {"rows": dict}, found[0] / "state.json")
        config.check_same(found[1]["settings"]["training"], found[0])
    return found


def finished_summary(config, out: Path) -> dict:
    """What the finished run in ``out`` measured. Raises ValueError where its settings or data are
    not those of ``config``.
    """
    settings = read_settings(out)
    check_fields(settings, {"rows": dict}, out / "config.json")
    config.check_same(settings["training"], out)
    splits = (
        *load_data(config, NO_SIZE),
        load_catalogue(config, NO_SIZE),
    )  # the digests are of the files
    check_rows(config, settings["rows"], *splits)
    summary = read_json(inside(out, "summary.json"))
    check_fields(
        summary,
        SUMMARY | {name: float for name in SCORES[MODELS[config.model].task]},
        out / "summary.json",
    )
    for name, value in summary.items():
        if type(value) in (int, float) and not is_number(value):
            raise ValueError(f"{out / 'summary.json'} is corrupt: {name} is {value!r:.40}")
    return summary


def begin(config, out: Path, found: tuple[Path, dict] | None, step: int, was_marked: bool) -> None:
    """The folder as the first step needs it. Looked at once more: another training may have come
    before the lock.
    """
    if found is None:
        check_out(out, config.overwrite, config.resume)
        clear_out(out)
    if was_marked:
        clean_out(out)
    checkpoints.keep_until(out / "checkpoints", step)


def is_number(value) -> bool:
    """Finite, and not beyond what can be drawn."""
    return type(value) in (int, float) and abs(value) < 1e300


def as_line(record: dict) -> bytes:
    return json.dumps(record).encode() + b"\n"


def is_due(step: int, every: int, steps: int) -> bool:
    return step > 0 and (step % every == 0 or step == steps)


def check_history(
    history: dict,
    step: int,
    steps: int,
    log_every: int,
    val_every: int,
    path: Path,
) -> None:
    """Raises ValueError where these are not the records of a run up to ``step``."""
    logged = step // log_every + (step == steps and step % log_every > 0)
    validated = step // val_every + (step == steps and step % val_every > 0)
    # A signal may have come before the validation that was due.
    missing = len(history["val"]) == validated - 1 and is_due(step, val_every, steps)
    if len(history["train"]) != logged or not (len(history["val"]) == validated or missing):
        found = (
            f"{len(history['train'])} records of training and {len(history['val'])} of validation"
        )
        raise ValueError(
            f"resume: {path} holds {found} at step {step}, expected {logged} and {validated}; put it back"
        )


def read_history(path: Path, length: int, scores: tuple[str, ...]) -> dict:
    """The records in the first ``length`` bytes of ``metrics.jsonl``, under "train" and "val",
    which have the ``scores``.

    Raises ValueError where there are fewer, or other than a training writes.
    """
    data = b""
    if path.is_file():
        with inside(path.parent, path.name).open("rb") as file:
            data = file.read(length)
    if len(data) < length:
        raise ValueError(
            f"resume: {path} holds {len(data)} bytes, but {length} at the checkpoint; put it back or overwrite the run"
        )
    try:
        records = [json.loads(line) for line in data.splitlines()]
        for record in records:
            numbers = ("step", "loss", "seconds") if "loss" in record else ("step", *scores)
            if not all(is_number(record[name]) for name in numbers):
                raise TypeError(f"{' or '.join(numbers)} is no number")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(
            f"resume: {path} is truncated or corrupt: {error}; put it back or overwrite the run"
        ) from error
    return {
        "train": [r for r in records if "loss" in r],
        "val": [r for r in records if "loss" not in r],
    }
