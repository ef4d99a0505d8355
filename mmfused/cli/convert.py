"""``mmfused convert``: write the weights of a pickle as a folder of safetensors."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from mmfused.training.folder_lock import TOKENIZER_FILES

from .new_folder import add_out_arguments, check_out, new_folder

HELP = "write the weights of a .pth, .pt, .bin or .ckpt file as a folder of safetensors"
# The files beside the weights that are copied, besides those of a tokenizer.
SETTINGS = ("config.json", "open_clip_config.json", "preprocessor_config.json")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``mmfused convert`` to ``parser``."""
    parser.add_argument(
        "file",
        metavar="FILE",
        help="a pickle that torch.save wrote: a state dict, or a checkpoint that holds one; "
        "no code in it is run",
    )
    parser.add_argument(
        "--tokenizer",
        metavar="NAME",
        help="tokenizer folder or hub name (default: the tokenizer beside FILE, if there is one)",
    )
    add_out_arguments(parser, "convert")


def run(args: argparse.Namespace) -> int:
    """Read the file, write the folder and return the exit code."""
    import mmfused
    from mmfused.data import load_tokenizer
    from mmfused.models.published import check_pretrained
    from mmfused.training.files import join_names, sha256

    file, out = Path(args.file), Path(args.out)
    if not file.is_file():
        raise FileNotFoundError(f"file: got {args.file!r}, expected a file")
    check_out(out, "convert", args.overwrite)
    tokenizer = None if args.tokenizer is None else load_tokenizer(args.tokenizer, "tokenizer")
    record = {"mmfused": mmfused.__version__, "source": file.name, "sha256": sha256(file)}
    with new_folder(out, "convert", record, args.overwrite) as folder:
        found = read_pickle(file, folder / "model.safetensors")
        beside = tokenizer is None and _has_tokenizer(file.parent)
        for name in (*SETTINGS, *(TOKENIZER_FILES if beside else ())):
            if (file.parent / name).is_file():
                shutil.copyfile(file.parent / name, folder / name)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        try:
            parts = check_pretrained(folder, "file")
        except (ValueError, FileNotFoundError) as error:
            # The temporary folder is gone when the message is read.
            message = str(error)
            for path in (folder / "model.safetensors", folder):
                message = message.replace(str(path), str(file))
            raise ValueError(message) from error
    print(f"{found['tensors']} tensors of {file} written to {out}: {', '.join(parts)}")
    if found["dropped"]:
        print(f"left out: {join_names(found['dropped'], 8)}")
    complete = beside or tokenizer is not None or parts == ("image_encoder",)
    words = "" if complete else " --tokenizer NAME"
    path = shlex.quote(str(out))
    print(f"next: mmfused train {_options(parts)} {path}{words} --data DIR --val DIR --out DIR")
    return 0


def read_pickle(file: Path, out: Path) -> dict[str, Any]:
    """Write the weights in ``file`` to ``out`` in another process; see `unpickle.convert`.

    Raises:
        ValueError: the file is not such a pickle, or the process was killed.
    """
    import mmfused
    from mmfused.json_files import one_line

    # The process finds this library, but no modules that lie beside the file.
    places = [str(Path(mmfused.__file__).parents[1])]
    places += [os.path.abspath(x) for x in os.environ.get("PYTHONPATH", "").split(os.pathsep) if x]
    command = [sys.executable, "-m", f"{__package__}.unpickle", *map(os.path.abspath, (file, out))]
    done = subprocess.run(
        command,
        capture_output=True,
        cwd=out.parent,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(places)},
    )
    if done.returncode < 0:
        raise ValueError(
            f"file: {file}: signal {-done.returncode} ended the process that read it; "
            "is there enough memory?"
        )
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        reason = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise ValueError(f"file: {file}: the process that read it failed: {one_line(reason)}")
    found = json.loads(lines[-1])
    if "error" in found:
        raise ValueError(f"file: {file} cannot be converted: {found['error']}")
    return found


def _has_tokenizer(folder: Path) -> bool:
    """Return whether a folder has all files of a tokenizer."""
    from mmfused.data import load_tokenizer

    if any((folder / name).is_file() for name in TOKENIZER_FILES):
        with suppress(ValueError):
            return load_tokenizer(folder) is not None
    return False


def _options(parts: tuple[str, ...]) -> str:
    """Return the options of ``mmfused train`` that take a folder with these parts."""
    if "host" in parts:
        return "--model unite --host"
    if parts == ("image_encoder",):
        return "--model uniecs --image-encoder"
    if parts == ("text_encoder",):
        return "--model uniecs --text-encoder"
    return f"--model {'unica' if 'visual_proj' in parts else 'uniecs'} --preset code --init"
