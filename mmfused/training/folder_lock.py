"""Distinguish the files of a run from foreign files, and lock a run's folder for one process.

The folder of a run contains a marker file, `.mmfused-run`. A folder without the marker counts as
the folder of a run only if the settings in it name a version of mmfused. In any other folder, files
with the names of a run's files are foreign files, made by another program. Foreign files are not
replaced or removed.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import IO, Any, TextIO

MARKER = ".mmfused-run"
MARKER_TEXT = (
    "This folder contains an mmfused run. The process that writes the run locks this file.\n"
)
# Names that `temporary_path` makes.
TEMPORARY_NAME = re.compile(r"\.(.+)\.\d+\.tmp")
FOLDERS = ("tokenizer", "adapter", "checkpoints")
STEP_NAME = re.compile(r"step-(\d{8,18})")
CHECKPOINT_FILES = ("model.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json")
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
# Files that the tokenizers' `save_pretrained` writes.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "sentencepiece.bpe.model",
    "sentencepiece.model",
    "spiece.model",
    "spm.model",
    "tokenizer.model",
    "bpe.codes",
    "emoji.json",
    "chat_template.jinja",
)
LOCKS_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
logger: logging.Logger = logging.getLogger(__name__)


# ---- the lock ------------------------------------------------------------------------------------


class Lock:
    """A lock on the marker file of ``folder``, held until :meth:`release`.

    A missing marker is created; ``had_marker`` tells whether the marker existed before. The
    operating system releases the lock when the process ends or is killed.

    Raises:
        FileExistsError: another process holds the lock, or the marker is not a regular file.
    """

    def __init__(self, folder: Path) -> None:
        self.path: Path = folder / MARKER
        self.file: TextIO | None = None
        self.had_marker: bool = is_regular_file(self.path)
        self.take()

    def take(self) -> None:
        """Lock the marker that is now in the folder; a missing marker is created."""
        self.release()
        # A marker that was removed between opening and locking is created again.
        while self.file is None or not same_file(self.path, self.file):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = _open_marker(self.path)
            try:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self.release()
                raise FileExistsError(
                    f"out: another process is writing to {self.path.parent}; "
                    "wait for it, or choose another folder"
                ) from None
            except OSError as error:
                # Some network file systems do not support locks.
                if error.errno not in LOCKS_UNSUPPORTED:
                    self.release()
                    raise
                logger.warning(
                    "out: %s cannot be locked (%s): make sure that only one process writes to it",
                    self.path.parent,
                    error.strerror,
                )
        if self.file.tell() == 0:
            self.file.write(MARKER_TEXT)
            self.file.flush()

    def is_in_place(self) -> bool:
        """Return whether the locked marker is still in the folder."""
        return self.file is not None and same_file(self.path, self.file)

    def release(self) -> None:
        """Release the lock if it is held."""
        if self.file is not None:
            self.file.close()
            self.file = None

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()


def _open_marker(path: Path) -> TextIO:
    """Open the marker for appending, without following links or blocking on pipes.

    Raises:
        FileExistsError: ``path`` is not a regular file.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        descriptor = os.open(path, flags, 0o666)
    except OSError as error:
        if os.path.lexists(path) and not is_regular_file(path):
            raise FileExistsError(f"out: {path} is not a file of a run; move it") from error
        raise
    file = open(descriptor, "a", encoding="utf-8")
    if not is_regular_file(path):
        file.close()
        raise FileExistsError(f"out: {path} is not a file of a run; move it")
    return file


def is_regular_file(path: Path) -> bool:
    """Return whether ``path`` is a regular file, and not a link to one."""
    return path.is_file() and not path.is_symlink()


def same_file(path: Path, file: IO[Any]) -> bool:
    """Return whether the file at ``path`` is the open ``file``."""
    try:
        return os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(file.fileno()))
    except (FileNotFoundError, NotADirectoryError):
        return False


def is_run_folder(folder: Path) -> bool:
    """Return whether ``folder`` has the marker, or settings that name a version of mmfused.

    A copy of a run may lack the marker, which is a hidden file.
    """
    if is_regular_file(folder / MARKER):
        return True
    paths = (folder / "config.json", *sorted(folder.glob("checkpoints/step-*/state.json")))
    return any(map(_names_mmfused, paths))


def _names_mmfused(path: Path) -> bool:
    try:
        if not path.is_file() or path.stat().st_size >= 2**24:
            return False
        value = json.loads(path.read_text(encoding="utf-8"))
        return isinstance(value, dict) and "mmfused" in value.get("settings", value)
    except (ValueError, TypeError, RecursionError, OSError):
        return False


# ---- foreign files: those that no run made -------------------------------------------------------


def foreign_files(folder: Path, names: Collection[str]) -> list[str]:
    """Return the foreign files among ``names``, and inside the folders among ``names``.

    Args:
        folder: the folder to search.
        names: names of a run's files and folders, as in ``RUN_FILES``.

    Returns:
        Paths relative to ``folder``.
    """
    if not is_run_folder(folder):
        return [name for name in names if os.path.lexists(folder / name)]
    return [
        path.relative_to(folder).as_posix()
        for name in names
        for path in foreign_paths(folder / name)
    ]


def foreign_paths(path: Path) -> Iterator[Path]:
    """Yield ``path`` if it is foreign; otherwise yield the foreign files in the folder ``path``."""
    if not os.path.lexists(path):
        return
    name = _final_name(path)
    if _is_wrong_kind(path, name):
        yield path
    elif name == "checkpoints":
        for inner in sorted(path.iterdir()):
            if (
                not STEP_NAME.fullmatch(_final_name(inner))
                or not inner.is_dir()
                or inner.is_symlink()
            ):
                yield inner
            else:
                yield from foreign_in_checkpoint(inner)
    elif name in ("tokenizer", "adapter"):
        names = TOKENIZER_FILES if name == "tokenizer" else ADAPTER_FILES
        for inner in sorted(path.iterdir()):
            if _is_foreign(inner, names):
                yield inner


def foreign_in_checkpoint(path: Path) -> list[Path]:
    """Return the foreign files in the folder of a checkpoint."""
    found: list[Path] = []
    for inner in sorted(path.iterdir()):
        if inner.name == "tokenizer":
            found.extend(foreign_paths(inner))
        elif _is_foreign(inner, CHECKPOINT_FILES):
            found.append(inner)
    return found


def wrong_kind_files(folder: Path, names: Collection[str]) -> list[str]:
    """Return the ``names`` that are in ``folder``, but not as the regular file or folder of a run.

    In a run, the names in ``FOLDERS`` are folders, and all other names are regular files.
    """
    return [
        name
        for name in names
        if os.path.lexists(folder / name) and _is_wrong_kind(folder / name, name)
    ]


def _is_wrong_kind(path: Path, name: str) -> bool:
    is_folder = name in FOLDERS or STEP_NAME.fullmatch(name)
    return path.is_symlink() or not (path.is_dir() if is_folder else path.is_file())


def _is_foreign(path: Path, names: Collection[str]) -> bool:
    return path.name not in names or path.is_symlink() or not path.is_file()


# ---- temporary files -----------------------------------------------------------------------------


def temporary_path(path: Path) -> Path:
    """Return the path to which this process writes before it renames the result to ``path``."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def _final_name(path: Path) -> str:
    """Return the name of ``path``; for a temporary file, the name it would be renamed to."""
    match = TEMPORARY_NAME.fullmatch(path.name)
    return match[1] if match else path.name


def half_written(folder: Path, names: Collection[str]) -> list[Path]:
    """Return temporary files for ``names`` that killed processes left in ``folder``."""
    found = [path for path in folder.glob(".*.tmp") if TEMPORARY_NAME.fullmatch(path.name)]
    return [path for path in found if _final_name(path) in names and not any(foreign_paths(path))]
