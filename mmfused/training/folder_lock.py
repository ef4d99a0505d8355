"""Which files of a folder a run made, and the lock that lets one process at a time write them.

A folder with a run has a file `.mmfused-run`, its mark. Without the mark, and without settings that
name the mmfused that wrote them, files with the names of a run's are another program's: they are
not read, replaced or removed. Other files beside the run are left alone.
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

MARK = ".mmfused-run"
TEXT = "The files of an mmfused run are in this folder; a run that writes them locks this one.\n"
# Names that `temporary` gives.
TEMPORARY = re.compile(r"\.(.+)\.\d+\.tmp")
STEP = re.compile(r"step-(\d{8,18})")
STEP_FILES = ("model.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json")
# Files that `save_pretrained` of the various tokenizers writes.
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
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
logger: logging.Logger = logging.getLogger(__name__)


# ---- the lock ------------------------------------------------------------------------------------


class Lock:
    """The lock on ``folder``: its mark, created if missing, and locked until :meth:`release`.

    ``was_there`` tells whether the mark existed before. The system releases the lock when the
    process ends in any way.

    Raises:
        FileExistsError: another process holds the lock.
    """

    def __init__(self, folder: Path) -> None:
        self.path: Path = folder / MARK
        self.file: TextIO | None = None
        self.was_there: bool = is_mark(self.path)
        self.take()

    def take(self) -> None:
        """Lock the mark that is there now; if it was removed, a new one is made."""
        self.release()
        # Once, unless the mark is removed between opening and locking it.
        while self.file is None or not same_file(self.path, self.file):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = _open_mark(self.path)
            try:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self.release()
                raise FileExistsError(
                    f"out: another process is writing to {self.path.parent}; "
                    "wait for it, or choose another folder"
                ) from None
            except OSError as error:
                # Some network file systems have no locks.
                if error.errno not in NO_LOCKS:
                    self.release()
                    raise
                logger.warning(
                    "out: %s cannot be locked (%s): make sure that only one process writes to it",
                    self.path.parent,
                    error.strerror,
                )
        if self.file.tell() == 0:
            self.file.write(TEXT)
            self.file.flush()

    def is_in_place(self) -> bool:
        """Return whether the locked mark is still in the folder."""
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


def _open_mark(path: Path) -> TextIO:
    """Open the mark for appending; links are not followed, and pipes do not block.

    Raises:
        FileExistsError: something other than a file has its name.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        descriptor = os.open(path, flags, 0o666)
    except OSError as error:
        if os.path.lexists(path) and not is_mark(path):
            raise FileExistsError(f"out: {path} is no file of a run; move it") from error
        raise
    file = open(descriptor, "a", encoding="utf-8")
    if not is_mark(path):
        file.close()
        raise FileExistsError(f"out: {path} is no file of a run; move it")
    return file


def is_mark(path: Path) -> bool:
    """Return whether ``path`` is a regular file."""
    return path.is_file() and not path.is_symlink()


def same_file(path: Path, file: IO[Any]) -> bool:
    """Return whether the open ``file`` is the one at ``path``."""
    try:
        return os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(file.fileno()))
    except (FileNotFoundError, NotADirectoryError):
        return False


def is_marked(folder: Path) -> bool:
    """Return whether ``folder`` has a run: its mark, or settings that name an mmfused.

    A copy of a run may lack the mark, which is a hidden file.
    """
    if is_mark(folder / MARK):
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


# ---- files that no run made ----------------------------------------------------------------------


def strangers(folder: Path, names: Collection[str]) -> list[str]:
    """Return paths below ``folder`` that no run made, at the places ``names`` of a run's files."""
    if not is_marked(folder):
        return [name for name in names if os.path.lexists(folder / name)]
    return [
        path.relative_to(folder).as_posix()
        for name in names
        for path in strangers_at(folder / name)
    ]


def strangers_at(path: Path) -> Iterator[Path]:
    """Yield ``path`` if no run can have made it, else the entries in it that no run made."""
    if not os.path.lexists(path):
        return
    name = _final_name(path)
    if _has_wrong_kind(path, name):
        yield path
    elif name == "checkpoints":
        for inner in sorted(path.iterdir()):
            if not STEP.fullmatch(_final_name(inner)) or not inner.is_dir() or inner.is_symlink():
                yield inner
            else:
                yield from strangers_in_step(inner)
    elif name == "tokenizer":
        for inner in sorted(path.iterdir()):
            if _is_strange(inner, TOKENIZER_FILES):
                yield inner


def strangers_in_step(path: Path) -> list[Path]:
    """Return the entries of a checkpoint's folder that do not belong to it."""
    found: list[Path] = []
    for inner in sorted(path.iterdir()):
        if inner.name == "tokenizer":
            found.extend(strangers_at(inner))
        elif _is_strange(inner, STEP_FILES):
            found.append(inner)
    return found


def not_run_files(folder: Path, names: Collection[str]) -> list[str]:
    """Return those of ``names`` that are links, pipes, or folders in the place of files.

    A run makes none of these.
    """
    return [
        name
        for name in names
        if os.path.lexists(folder / name) and _has_wrong_kind(folder / name, name)
    ]


def _has_wrong_kind(path: Path, name: str) -> bool:
    is_folder = name in ("tokenizer", "checkpoints") or STEP.fullmatch(name)
    return path.is_symlink() or not (path.is_dir() if is_folder else path.is_file())


def _is_strange(path: Path, names: Collection[str]) -> bool:
    return path.name not in names or path.is_symlink() or not path.is_file()


# ---- temporary files -----------------------------------------------------------------------------


def temporary(path: Path) -> Path:
    """Return the name under which this process writes ``path`` until it is complete."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def _final_name(path: Path) -> str:
    """Return the name that a temporary file will get, or the name of any other file."""
    draft = TEMPORARY.fullmatch(path.name)
    return draft[1] if draft else path.name


def half_written(folder: Path, names: Collection[str]) -> list[Path]:
    """Return temporary files of ``names`` that killed processes left."""
    found = [path for path in folder.glob(".*.tmp") if TEMPORARY.fullmatch(path.name)]
    return [path for path in found if _final_name(path) in names and not any(strangers_at(path))]
