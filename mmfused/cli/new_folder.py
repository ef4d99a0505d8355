"""Write a folder at once, and know it again later: for ``mmfused export`` and ``convert``."""

from __future__ import annotations

import argparse
import fcntl
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def add_out_arguments(parser: argparse.ArgumentParser, command: str) -> None:
    """Add the options of ``command`` that name the new folder."""
    parser.add_argument(
        "--out",
        required=True,
        metavar="DIR",
        help="the new folder",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help=f"replace DIR, if mmfused {command} wrote it",
    )


def record_name(command: str) -> str:
    """Return the name of the file by which a folder of ``command`` is known.

    The file lists the other files of the folder.
    """
    return f"{command}.json"


def check_out(out: Path, command: str, overwrite: bool) -> None:
    """Raise an error unless ``command`` can write the folder ``out``, or replace it.

    Args:
        out: the folder.
        command: name of the subcommand, which is in the messages and in `record_name`.
        overwrite: whether a folder that ``command`` wrote may be replaced.
    """
    from mmfused.training.files import join_names

    if not out.parent.is_dir():
        expected = f"a new folder in an existing one, and {out.parent} does not exist"
        raise ValueError(f"out: got {str(out)!r}, expected {expected}")
    if not os.path.lexists(out):
        return
    foreign = _foreign_files(out, command)
    if foreign:
        raise FileExistsError(
            f"out: {out} holds files that mmfused {command} did not write ({join_names(foreign)}); "
            "choose another folder, or move them"
        )
    if not overwrite:
        raise FileExistsError(f"out: {out} already exists; choose another name or overwrite it")


def _foreign_files(out: Path, command: str) -> list[str]:
    """Return the files in ``out`` that are not in its record, or ``out`` if it is no folder."""
    from mmfused.training.files import read_json

    if out.is_symlink() or not out.is_dir():
        return [out.name]
    try:
        own = read_json(out / record_name(command))["files"]
    except (ValueError, KeyError, FileNotFoundError):
        return [path.name for path in sorted(out.iterdir())]
    known = [record_name(command)]
    known += [name for name in own if isinstance(name, str)] if isinstance(own, list) else []
    folders = {str(parent) for name in known for parent in Path(name).parents}

    def foreign(folder: Path) -> Iterator[str]:
        for path in sorted(folder.iterdir()):
            name = path.relative_to(out).as_posix()
            if name in folders and path.is_dir() and not path.is_symlink():
                yield from foreign(path)
            elif name not in known or path.is_symlink() or not path.is_file():
                yield name

    return list(foreign(out))


@contextmanager
def new_folder(
    out: Path,
    command: str,
    record: Mapping[str, Any],
    overwrite: bool,
) -> Iterator[Path]:
    """Yield a temporary folder to write to, which becomes ``out`` if no error is raised.

    The record lists the files, also those in folders. Temporary folders that killed processes left
    beside ``out`` are removed. A replaced folder is moved aside before it is removed, so that
    ``out`` is never half of either.
    """
    from mmfused.training.files import remove, sync, sync_entry, write_json
    from mmfused.training.folder_lock import temporary_path

    remove_abandoned(out, command)
    temporary, old = temporary_path(out), temporary_path(out.with_name(f"{out.name}.old"))
    temporary.mkdir()
    own_record = temporary / record_name(command)
    write_json(own_record, record)
    lock = os.open(temporary, os.O_RDONLY)
    try:
        _try_lock(lock)
        yield temporary
        written = [path for path in sorted(temporary.rglob("*")) if path.is_file()]
        files = [path.relative_to(temporary).as_posix() for path in written if path != own_record]
        write_json(own_record, {**record, "files": files})
        for name in files:  # safetensors lets only the owner read its files
            (temporary / name).chmod(own_record.stat().st_mode)
        sync(temporary)
        # Checked again, because another process may have written the folder in the meantime.
        check_out(out, command, overwrite)
        if out.exists():
            os.replace(out, old)
        os.replace(temporary, out)
        sync_entry(out.parent)
    finally:
        if old.exists() and not out.exists():
            os.replace(old, out)
        os.close(lock)
        remove(temporary)
        remove(old)


def remove_abandoned(out: Path, command: str) -> None:
    """Remove the temporary folders beside ``out`` that no living process has locked.

    If a process was killed while it replaced ``out``, the old folder is moved back.
    """
    from mmfused.training.files import remove
    from mmfused.training.folder_lock import TEMPORARY_NAME

    for path in out.parent.glob(".*.tmp"):
        name = TEMPORARY_NAME.fullmatch(path.name)
        if not name or name[1] not in (out.name, f"{out.name}.old") or path.is_symlink():
            continue
        if (path / record_name(command)).is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                if _try_lock(descriptor) and name[1] != out.name and not out.exists():
                    os.replace(path, out)
                elif _try_lock(descriptor):
                    remove(path)
            finally:
                os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    """Lock an open folder until it is closed; return False if it is locked or cannot be locked."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
