"""Which files of a folder a run made, and the lock that lets one process at a time write them.

A folder that holds a run has a file `.mmfused-run`. Without it, and without settings that name the
mmfused that wrote them, whatever bears a name of a run's files is taken for another program's: it
is neither read, replaced nor removed. What such a folder holds beside the run is left alone."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path

MARK = ".mmfused-run"
TEXT = "The files of an mmfused run are in this folder; a run that writes them locks this one.\n"
TEMPORARY = re.compile(r"\.(.+)\.\d+\.tmp")  # see `temporary`
STEP = re.compile(r"step-(\d{8,18})")
TOKENIZER_FILES = (  # what `save_pretrained` of one tokenizer or another writes
    "tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json vocab.txt vocab.json merges.txt "
    "sentencepiece.bpe.model sentencepiece.model spiece.model spm.model tokenizer.model bpe.codes emoji.json "
    "chat_template.jinja"
).split()
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
STEP_FILES = ("model.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json")
logger = logging.getLogger(__name__)


class Lock:
    """The mark of ``folder``, made where it is missing (``was_there`` tells), and locked until
    :meth:`release`.

    The system lets go of it too when the process ends, however that happens. Raises FileExistsError
    where another process holds it.
    """

    def __init__(self, folder: Path):
        self.path = folder / MARK
        self.file = None
        self.was_there = is_mark(self.path)
        self.take()

    def take(self) -> None:
        """Locks the mark that is there now: after its removal, that is a new one."""
        self.release()
        while (
            not self.is_in_place()
        ):  # once, unless the mark was removed between the two lines below
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = open_mark(self.path)
            try:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self.release()
                message = f"out: another process is writing to {self.path.parent}; wait for it, or take another folder"
                raise FileExistsError(message) from None
            except OSError as error:  # some network file systems have no locks
                if error.errno not in NO_LOCKS:
                    self.release()
                    raise
                logger.warning(
                    "out: %s cannot be locked (%s): see that one process writes to it",
                    self.path.parent,
                    error.strerror,
                )
        if self.file.tell() == 0:
            self.file.write(TEXT)
            self.file.flush()

    def is_in_place(self) -> bool:
        return self.file is not None and same_file(self.path, self.file)

    def release(self) -> None:
        if self.file is not None:
            self.file.close()
            self.file = None

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *_) -> None:
        self.release()


def open_mark(path: Path):
    """For appending. Raises FileExistsError where something else bears its name: it is not
    followed, nor waited for.
    """
    try:
        descriptor = os.open(
            path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666
        )
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
    return path.is_file() and not path.is_symlink()


def same_file(path: Path, file) -> bool:
    """Whether the open ``file`` is the one at ``path``."""
    try:
        return os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(file.fileno()))
    except (FileNotFoundError, NotADirectoryError):
        return False


def is_marked(folder: Path) -> bool:
    """Whether a run is there: by its mark, or by settings that name an mmfused (a copy may lack
    hidden files).
    """
    if is_mark(folder / MARK):
        return True
    for path in (folder / "config.json", *sorted(folder.glob("checkpoints/step-*/state.json"))):
        try:
            if path.is_file() and path.stat().st_size < 2**24:
                value = json.loads(path.read_text(encoding="utf-8"))
                if isinstance(value, dict) and "mmfused" in value.get("settings", value):
                    return True
        except (ValueError, TypeError, RecursionError, OSError):
            continue
    return False


def strangers(folder: Path, names: tuple[str, ...]) -> list[str]:
    """Paths below ``folder`` at the places of a run's files, ``names``, that no run made."""
    if not is_marked(folder):
        return [name for name in names if os.path.lexists(folder / name)]
    return [
        path.relative_to(folder).as_posix()
        for name in names
        for path in strangers_at(folder / name)
    ]


def strangers_at(path: Path) -> Iterator[Path]:
    """``path``, if a run cannot have made it, or else the entries in it that a run cannot have
    made.
    """
    if not os.path.lexists(path):
        return
    draft = TEMPORARY.fullmatch(path.name)
    name = draft[1] if draft else path.name
    if is_misplaced(path, name):
        yield path
    elif name == "checkpoints":
        for inner in sorted(path.iterdir()):
            half_written = TEMPORARY.fullmatch(inner.name)
            if STEP.fullmatch(half_written[1] if half_written else inner.name):
                yield from (
                    strangers_in_step(inner)
                    if inner.is_dir() and not inner.is_symlink()
                    else [inner]
                )
            else:
                yield inner
    elif name == "tokenizer":
        yield from (
            inner for inner in sorted(path.iterdir()) if _is_strange(inner, TOKENIZER_FILES)
        )


def misplaced(folder: Path, names: tuple[str, ...]) -> list[str]:
    """Those of the ``names`` that are there, and are links, pipes, or folders in a file's place: a
    run makes none of these.
    """
    return [
        name
        for name in names
        if os.path.lexists(folder / name) and is_misplaced(folder / name, name)
    ]


def is_misplaced(path: Path, name: str) -> bool:
    is_folder = name in ("tokenizer", "checkpoints") or STEP.fullmatch(name)
    return path.is_symlink() or not (path.is_dir() if is_folder else path.is_file())


def strangers_in_step(path: Path) -> list[Path]:
    """What the checkpoint in ``path`` does not consist of."""
    found = []
    for inner in sorted(path.iterdir()):
        if inner.name == "tokenizer":
            found.extend(strangers_at(inner))
        elif _is_strange(inner, STEP_FILES):
            found.append(inner)
    return found


def _is_strange(path: Path, names) -> bool:
    return path.name not in names or path.is_symlink() or not path.is_file()


def temporary(path: Path) -> Path:
    """The name under which this process writes ``path`` until it is whole."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def half_written(folder: Path, names) -> list[Path]:
    """What killed processes left of files that were to be called one of ``names``."""
    found = [(path, TEMPORARY.fullmatch(path.name)) for path in folder.glob(".*.tmp")]
    left = [path for path, match in found if match and match[1] in names]
    return [path for path in left if not any(strangers_at(path))]
