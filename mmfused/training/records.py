"""The records of training and validation in ``metrics.jsonl``, one JSON object per line."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeAlias

from mmfused.training.files import path_inside
from mmfused.training.folder_lock import same_file

Record: TypeAlias = dict[str, Any]
Kind: TypeAlias = Literal["train", "val"]
History: TypeAlias = dict[Kind, list[Record]]

logger: logging.Logger = logging.getLogger(__name__)


class Records:
    """The records of a run, which rank 0 also writes to ``metrics.jsonl``.

    Args:
        path: path of ``metrics.jsonl``.
        main: whether this process is rank 0; other ranks keep the records in memory only.
    """

    def __init__(self, path: Path, main: bool) -> None:
        self.path = path
        self.main = main
        self.history: History = {"train": [], "val": []}
        self.size = 0  # bytes of the file, including those that earlier processes wrote
        self._file: BinaryIO | None = None

    @property
    def last_val(self) -> Record | None:
        """The newest validation record, or None."""
        return self.history["val"][-1] if self.history["val"] else None

    def open(self) -> None:
        """Open the file for appending, and cut off the records after the checkpoint."""
        self._file = open(self.path if self.main else os.devnull, "ab")
        if self.main:
            self._file.truncate(self.size)

    def add(self, kind: Kind, record: Record) -> None:
        """Append a record to the history and to the file."""
        assert self._file is not None
        self.history[kind].append(record)
        line = _as_line(record)
        self._file.write(line)
        self._file.flush()
        self.size += len(line)

    def sync(self) -> None:
        """Flush the records to disk."""
        assert self._file is not None
        os.fsync(self._file.fileno())

    def write_again(self) -> None:
        """Write all records to a new file if ``metrics.jsonl`` was removed during training.

        Raises:
            FileExistsError: another file has the path of ``metrics.jsonl``.
        """
        assert self._file is not None
        if same_file(self.path, self._file):
            return
        if self.path.exists():
            raise FileExistsError(
                f"out: {self.path} was replaced while the run wrote to it, and is left unchanged"
            )
        logger.warning(
            "out: %s was removed while the run wrote to it; all its records are written again",
            self.path,
        )
        records = [*self.history["train"], *self.history["val"]]
        records.sort(key=lambda record: record["step"])
        self._file.close()
        self._file = open(self.path, "xb")
        self._file.write(b"".join(map(_as_line, records)))
        self._file.flush()

    def close(self) -> None:
        """Close the file if it is open."""
        if self._file is not None:
            self._file.close()


def is_due(step: int, every: int, steps: int) -> bool:
    """Return whether an action that runs every ``every`` steps, and at the end, is due."""
    return step > 0 and (step % every == 0 or step == steps)


def check_history(
    history: History,
    step: int,
    steps: int,
    log_every: int,
    val_every: int,
    path: Path,
) -> None:
    """Raise ValueError unless ``history`` has as many records as a run writes up to ``step``.

    Args:
        history: the records in ``path``.
        step: step of the checkpoint.
        steps: number of all steps of the run.
        log_every: number of steps between training records.
        val_every: number of steps between validations.
        path: path of ``metrics.jsonl``, for the error message.
    """
    logged = step // log_every + (step == steps and step % log_every > 0)
    validated = step // val_every + (step == steps and step % val_every > 0)
    # If a signal interrupted the validation at ``step``, the record of that validation is missing.
    postponed = len(history["val"]) == validated - 1 and is_due(step, val_every, steps)
    val_fits = len(history["val"]) == validated or postponed
    if len(history["train"]) != logged or not val_fits:
        raise ValueError(
            f"resume: {path}: got {len(history['train'])} training records and "
            f"{len(history['val'])} validation records at step {step}, "
            f"expected {logged} and {validated}; restore the file"
        )


def read_history(path: Path, length: int, scores: tuple[str, ...]) -> History:
    """Return the records in the first ``length`` bytes of ``metrics.jsonl``.

    Args:
        path: path of ``metrics.jsonl``.
        length: size of the file at the checkpoint, in bytes.
        scores: names of the scores that each validation record must have.

    Raises:
        ValueError: the file is shorter than ``length``, or a line is not a record.
    """
    data = b""
    if path.is_file():
        with path_inside(path.parent, path.name).open("rb") as file:
            data = file.read(length)
    if len(data) < length:
        raise ValueError(
            f"resume: {path}: got {len(data)} bytes, "
            f"expected at least {length}, its size at the checkpoint; "
            "restore the file or overwrite the run"
        )
    try:
        records = [_parse_record(line, scores) for line in data.splitlines()]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(
            f"resume: {path} is truncated or corrupt: {error}; "
            "restore the file or overwrite the run"
        ) from error
    return {
        "train": [record for record in records if "loss" in record],
        "val": [record for record in records if "loss" not in record],
    }


def _parse_record(line: bytes, scores: tuple[str, ...]) -> Record:
    record = json.loads(line)
    numbers = ("step", "loss", "seconds") if "loss" in record else ("step", *scores)
    if not all(is_number(record[name]) for name in numbers):
        raise TypeError(f"{' or '.join(numbers)} is not a finite number")
    return record


def is_number(value: object) -> bool:
    """Return whether ``value`` is a finite number, small enough to be plotted."""
    return type(value) in (int, float) and abs(value) < 1e300  # type: ignore[arg-type]


def _as_line(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record).encode() + b"\n"
