"""Files of runs: atomic writes, JSON objects, and safetensors read without trust."""

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
from mmfused.training.folder_lock import strangers_at, temporary

with from_extra("models"):
    import safetensors.torch

MAX_JSON_BYTES = 2**26


# ---- writing -------------------------------------------------------------------------------------


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Call ``write(temporary path)``, then rename the result to ``path``.

    An existing folder at ``path`` is removed first, since no rename replaces a folder that holds
    files; for a moment there is none.

    Raises:
        FileExistsError: that folder holds files that no run made.
    """
    draft = temporary(path)
    try:
        write(draft)
        sync(draft)
        if path.is_dir():
            foreign = [inner.name for inner in strangers_at(path)]
            if foreign:
                raise FileExistsError(
                    f"out: {path} holds files that no run made ({shown(foreign)}); move them"
                )
            remove(path)
        os.replace(draft, path)
        sync_entry(path.parent)
    finally:
        remove(draft)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object, indented."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write ``tensors`` as a safetensors file."""
    path.write_bytes(safetensors.torch.save(tensors))


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict of ``model`` as contiguous tensors on the CPU."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}


def sync(path: Path) -> None:
    """Wait until the file, or the folder with everything in it, is on the disk."""
    if path.is_dir():
        for inner in path.iterdir():
            sync(inner)
    sync_entry(path)


def sync_entry(path: Path) -> None:
    """Wait until this one file or folder entry is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it exists."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# ---- reading -------------------------------------------------------------------------------------


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in ``path``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no JSON object, or is larger than ``MAX_JSON_BYTES``.
    """
    return read_object(path, MAX_JSON_BYTES)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors in ``path``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a whole safetensors file.
    """
    with _open_tensors(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors in ``path``, from its header; raises as `read_tensors`."""
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
        raise ValueError(f"{path} is truncated, corrupt or no safetensors file: {error}") from error


def load_weights(model: nn.Module, path: Path) -> None:
    """Load the weights in ``path`` into ``model``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a whole safetensors file, or a tensor in it does not fit the model;
            the message names the first one.
    """
    got = read_tensors(path)
    expected = model.state_dict()
    check_shapes(path, _shapes(got), _shapes(expected))
    model.load_state_dict(got)


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def check_shapes(
    path: Path,
    got: Mapping[str, tuple[int, ...]],
    expected: Mapping[str, tuple[int, ...]],
) -> None:
    """Raise ValueError naming the first tensor whose shape in ``path`` is not the expected one."""
    for name in [*expected, *got]:
        theirs, ours = (shapes.get(name, "no such tensor") for shapes in (got, expected))
        if theirs != ours:
            raise ValueError(
                f"{path} holds the weights of another model: {name}: got {theirs}, expected {ours}"
            )


def check_fields(value: Mapping[str, Any], kinds: Mapping[str, type], path: Path) -> None:
    """Raise ValueError unless ``value`` has all fields in ``kinds``, each of its type.

    An int passes for a float.
    """
    for name, kind in kinds.items():
        if name not in value:
            raise ValueError(f"{path} lacks {name}")
        found = type(value[name])
        if found is not kind and not (kind is float and found is int):
            raise ValueError(
                f"{path} is corrupt: {name} is of type {found.__name__}, expected {kind.__name__}"
            )


def inside(folder: Path, name: str) -> Path:
    """Return ``folder / name``.

    Raises:
        ValueError: that path leads outside the folder, by ``..`` or by a link.
    """
    path = folder / name
    if "\0" in name or not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(
            f"{folder} names {name!r}, which leads outside of it; only files in the folder are read"
        )
    return path


def sha256(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file."""
    total = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            total.update(block)
    return total.hexdigest()


def shown(names: Sequence[str], most: int = 3) -> str:
    """Return the first ``most`` names as text, and the number of the others."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
