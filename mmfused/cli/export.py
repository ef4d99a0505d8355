"""``mmfused export``: write a trained model as a folder that transformers loads."""

from __future__ import annotations

import argparse
import fcntl
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

HELP = "write a trained unite or moon2 as a folder that transformers loads"
# The file by which an exported folder is known. It lists the other files.
RECORD = "export.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``mmfused export`` to ``parser``."""
    parser.add_argument(
        "checkpoint",
        metavar="RUN",
        help="folder of a run or of a checkpoint",
    )
    parser.add_argument(
        "--out",
        required=True,
        metavar="DIR",
        help="the new folder",
    )
    parser.add_argument(
        "--dtype",
        default="float32",
        help="type of the weights: float32 or bfloat16 (default: float32)",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace DIR, if mmfused export wrote it",
    )


def run(args: argparse.Namespace) -> int:
    """Load the run, write the folder and return the exit code."""
    import mmfused
    from mmfused.models.qwen_export import ExportDtype, check_exportable, save_host
    from mmfused.training.run_folder import load_saved, read_settings

    out, source = Path(args.out), Path(args.checkpoint)
    if args.dtype not in get_args(ExportDtype):
        raise ValueError(f"dtype: got {args.dtype!r}, expected float32 or bfloat16")
    check_out(out, args.overwrite)
    settings = read_settings(source)
    check_exportable(settings["training"]["model"], settings["model"].get("without"))
    model, tokenizer = load_saved(source, settings)
    name = settings["training"]["model"]
    record = {"mmfused": mmfused.__version__, "model": name, "config": model.config.to_dict()}
    with new_folder(out, record, args.overwrite) as folder:
        save_host(model, tokenizer, folder, args.dtype)
    print(f"{name} of {source} written to {out}")
    return 0


def check_out(out: Path, overwrite: bool) -> None:
    """Raise an error unless the folder ``out`` can be written, or replaced if ``overwrite``."""
    from mmfused.training.files import join_names

    if not out.parent.is_dir():
        raise ValueError(f"out: got {str(out)!r}, expected a new folder in an existing folder")
    if not os.path.lexists(out):
        return
    foreign = _foreign_files(out)
    if foreign:
        raise FileExistsError(
            f"out: {out} holds files that mmfused export did not write ({join_names(foreign)}); "
            "choose another folder, or move them"
        )
    if not overwrite:
        raise FileExistsError(f"out: {out} already exists; choose another name or overwrite it")


def _foreign_files(out: Path) -> list[str]:
    """Return the files in ``out`` that are not in its record, or ``out`` if it is no folder."""
    from mmfused.training.files import read_json

    if out.is_symlink() or not out.is_dir():
        return [out.name]
    try:
        own = read_json(out / RECORD)["files"]
    except (ValueError, KeyError, FileNotFoundError):
        return [path.name for path in sorted(out.iterdir())]
    known = [RECORD, *own] if isinstance(own, list) else []
    return [
        path.name
        for path in sorted(out.iterdir())
        if path.name not in known or path.is_symlink() or not path.is_file()
    ]


@contextmanager
def new_folder(out: Path, record: Mapping[str, Any], overwrite: bool) -> Iterator[Path]:
    """Yield a temporary folder to write to, which becomes ``out`` if no error is raised.

    The record lists the files. Temporary folders that killed processes left beside ``out`` are
    removed. A replaced folder is moved aside before it is removed, so that ``out`` is never half
    of either.
    """
    from mmfused.training.files import remove, sync, sync_entry, write_json
    from mmfused.training.folder_lock import temporary_path

    _remove_abandoned(out)
    temporary, old = temporary_path(out), temporary_path(out.with_name(f"{out.name}.old"))
    temporary.mkdir()
    write_json(temporary / RECORD, record)
    lock = os.open(temporary, os.O_RDONLY)
    try:
        _try_lock(lock)
        yield temporary
        names = sorted(path.name for path in temporary.iterdir() if path.name != RECORD)
        write_json(temporary / RECORD, {**record, "files": names})
        for name in names:  # safetensors lets only the owner read its files
            (temporary / name).chmod((temporary / RECORD).stat().st_mode)
        sync(temporary)
        # Checked again, because another process may have written the folder in the meantime.
        check_out(out, overwrite)
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


def _remove_abandoned(out: Path) -> None:
    """Remove the temporary folders beside ``out`` that no living process has locked.

    If a process was killed while it replaced ``out``, the old folder is moved back.
    """
    from mmfused.training.files import remove
    from mmfused.training.folder_lock import TEMPORARY_NAME

    for path in out.parent.glob(".*.tmp"):
        name = TEMPORARY_NAME.fullmatch(path.name)
        if not name or name[1] not in (out.name, f"{out.name}.old") or path.is_symlink():
            continue
        if (path / RECORD).is_file():
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
