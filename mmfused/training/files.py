"""Write the files of a run atomically, and read JSON and safetensors files that may be damaged."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mmfused.extras import from_extra
from mmfused.json_files import read_object
from mmfused.training.folder_lock import foreign_paths, temporary_path

with from_extra("models"):
    import safetensors.torch

MAX_JSON_BYTES = 2**26


# ---- writing -------------------------------------------------------------------------------------


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call ``write(temporary path)``, then rename the result to ``path``.

    An existing folder at ``path`` is removed first, because a rename cannot replace a folder that
    holds files.

    Raises:
        FileExistsError: the folder at ``path`` holds files that no run made.
    """
    temporary = temporary_path(path)
    try:
        write(temporary)
        sync(temporary)
        if path.is_dir():
            foreign = [inner.name for inner in foreign_paths(path)]
            if foreign:
                raise FileExistsError(
                    f"out: {path} holds files that no run made ({join_names(foreign)}); move them"
                )
            remove(path)
        os.replace(temporary, path)
        sync_entry(path.parent)
    finally:
        remove(temporary)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write ``value`` as an indented JSON object."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write ``tensors`` as a safetensors file."""
    path.write_bytes(safetensors.torch.save(tensors))


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict of ``model`` as contiguous tensors on the CPU."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}


def sync(path: Path) -> None:
    """Flush a file, or a folder and everything in it, to disk."""
    if path.is_dir():
        for inner in path.iterdir():
            sync(inner)
    sync_entry(path)


def sync_entry(path: Path) -> None:
    """Flush one file, or the list of entries of one folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove the file or the folder at ``path``, if there is one."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# ---- reading -------------------------------------------------------------------------------------


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in ``path``.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not a JSON object, or is larger than ``MAX_JSON_BYTES``.
    """
    return read_object(path, MAX_JSON_BYTES)


def read_tensors(path: Path, only: str | None = None) -> dict[str, Tensor]:
    """Return the tensors in ``path`` by name, or only one of them.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not a complete safetensors file, or lacks the tensor.
    """
    with _open_tensors(path) as file:
        return {name: file.get_tensor(name) for name in ([only] if only else file.keys())}


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors in ``path`` by name; raise like `read_tensors`.

    Only the header of the file is read.
    """
    with _open_tensors(path) as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}


@contextmanager
def _open_tensors(path: Path) -> Iterator[Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    try:
        with safetensors.safe_open(path, "pt") as file:
            yield file
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{path} is truncated, corrupt or not a safetensors file: {error}"
        ) from error


def load_weights(
    model: nn.Module,
    path: Path,
    skipped: tuple[str, ...] = (),
    got: Mapping[str, Tensor] | None = None,
) -> None:
    """Load the weights in ``path`` into ``model``.

    Args:
        model: the model.
        path: a safetensors file.
        skipped: beginnings of the names that are left out.
        got: the weights, if they have been read from ``path`` before.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not a complete safetensors file, or the names or shapes of its
            tensors are not those of the model.
    """
    got = read_tensors(path) if got is None else got
    expected = model.state_dict()
    check_shapes(path, _shapes(got), _shapes(expected), skipped)
    kept = {name: tensor for name, tensor in got.items() if not name.startswith(skipped)}
    model.load_state_dict({**expected, **kept})


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def check_shapes(
    path: Path,
    got: Mapping[str, tuple[int, ...]],
    expected: Mapping[str, tuple[int, ...]],
    skipped: tuple[str, ...] = (),
) -> None:
    """Raise ValueError unless the tensors in ``path`` have the expected names and shapes.

    Args:
        path: the file, for the error message.
        got: shapes of the tensors in the file, by name.
        expected: shapes of the model's tensors, by name.
        skipped: beginnings of names that are not compared.
    """
    for name in [*expected, *got]:
        if name.startswith(skipped):
            continue
        found, wanted = (
            f"shape {shapes[name]}" if name in shapes else "no tensor" for shapes in (got, expected)
        )
        if found != wanted:
            raise ValueError(
                f"{path} holds the weights of another model: {name}: got {found}, expected {wanted}"
            )


def check_fields(value: Mapping[str, Any], kinds: Mapping[str, type], path: Path) -> None:
    """Raise ValueError unless ``value`` has each field in ``kinds``, with the type in ``kinds``.

    If the type is float, an int is also accepted.
    """
    for name, kind in kinds.items():
        if name not in value:
            raise ValueError(f"{path} lacks {name}")
        found = type(value[name])
        if found is not kind and not (kind is float and found is int):
            raise ValueError(
                f"{path} is corrupt: {name} is of type {found.__name__}, expected {kind.__name__}"
            )


def path_inside(folder: Path, name: str) -> Path:
    """Return ``folder / name``.

    Raises:
        ValueError: the path leads outside the folder, through ``..`` or a link.
    """
    path = folder / name
    if "\0" in name or not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(
            f"{folder}: {name!r} leads outside the folder; only files in the folder are read"
        )
    return path


def sha256(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file."""
    total = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            total.update(block)
    return total.hexdigest()


def join_names(names: Sequence[str], most: int = 3) -> str:
    """Return the first ``most`` names and the number of further names: "a, b, c and 4 more"."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
