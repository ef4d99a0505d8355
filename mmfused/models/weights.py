"""The safetensors of a pretrained folder."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import takewhile
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmfused.extras import from_extra
from mmfused.json_files import one_line, read_object
from mmfused.models.fields import shown

INDEX = "model.safetensors.index.json"


@contextmanager
def on_meta() -> Iterator[None]:
    """Build modules on the meta device, and leave the CPU's random state unchanged."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        yield


def find_folder(name: str, source: str) -> Path:
    """Return the folder ``source``, or download the hub model ``source`` and return its folder."""
    if Path(source).is_dir():
        return Path(source)
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    try:
        folder = Path(huggingface_hub.hf_hub_download(source, "config.json")).parent
        try:
            huggingface_hub.hf_hub_download(source, "model.safetensors")
        except EntryNotFoundError:
            huggingface_hub.hf_hub_download(source, INDEX)
            for part in weight_files(name, folder):
                huggingface_hub.hf_hub_download(source, part.name)
    except (OSError, ValueError) as error:
        expected = "a folder, or the name of a hub model with safetensors"
        reason = one_line(error)
        raise ValueError(f"{name}: got {source!r}, expected {expected} ({reason})") from error
    return folder


def weights_path(folder: Path) -> Path:
    """Return the path of model.safetensors, or of the index if only the index exists."""
    if (folder / "model.safetensors").is_file() or not (folder / INDEX).is_file():
        return folder / "model.safetensors"
    return folder / INDEX


def weight_files(name: str, folder: Path) -> list[Path]:
    """Return the path of model.safetensors, or the paths of the parts that the index lists.

    Raises:
        ValueError: the index lists something other than file names.
    """
    if weights_path(folder) != folder / INDEX:
        return [folder / "model.safetensors"]
    with named(name):
        weight_map = read_object(folder / INDEX, 64 << 20).get("weight_map")
    found: Any = weight_map.values() if isinstance(weight_map, dict) else [weight_map]
    parts: set[str] = set()
    for part in found:
        is_name = isinstance(part, str) and part.endswith(".safetensors")
        if not is_name or not set(part).isdisjoint("/\\:\0"):
            expected = "names of *.safetensors files in the same folder"
            raise ValueError(
                f"{name}: {folder / INDEX}: weight_map: got {shown(part)}, expected {expected}"
            )
        parts.add(part)
    return [folder / part for part in sorted(parts)]


def read_weights(name: str, folder: Path) -> dict[str, Tensor]:
    """Return all tensors in the safetensors files of a folder, by name.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, or a weight has no floating-point numbers.
    """
    with from_extra("models"):
        import safetensors.torch
    weights: dict[str, Tensor] = {}
    for path in weight_files(name, folder):
        if not path.is_file():
            raise FileNotFoundError(f"{name}: {path} is missing")
        try:
            held = safetensors.torch.load_file(path)
        except safetensors.SafetensorError as error:
            reason = one_line(error)
            raise ValueError(
                f"{name}: {path} is truncated, corrupt or not a safetensors file: {reason}"
            ) from error
        for key, tensor in held.items():
            if key.endswith((".weight", ".bias")) and not tensor.is_floating_point():
                expected = "floating-point numbers; quantised weights are not read"
                raise ValueError(f"{name}: {path}: {key}: got {tensor.dtype}, expected {expected}")
        weights |= held
    return weights


def check_size(name: str, weights: dict[str, Tensor], model: nn.Module) -> None:
    """Require at least half as many elements in the weights as in ``model``, a meta model.

    Without this check, a large model would be allocated before its missing weights are noticed.
    """
    held = sum(tensor.numel() for tensor in weights.values())
    state = model.state_dict()
    total = sum(prod(tensor.shape) for tensor in state.values())
    if 2 * held >= total:
        return
    expected = f"{total}, as in its config.json"
    for key, tensor in state.items():
        found = same_end(weights, key)
        if found and weights[found].shape != tensor.shape:
            expected += f": {found} has shape {tuple(weights[found].shape)}, "
            expected += f"not {tuple(tensor.shape)}"
            break
    raise ValueError(f"{name}: got weights with {held} numbers, expected {expected}")


def same_end(weights: Iterable[str], key: str) -> str | None:
    """Return the name in ``weights`` whose end is that of ``key``, or None.

    The names in a file may have another prefix than those of the model. At least the last two parts
    must be equal; the name with most equal parts is returned.
    """
    parts = key.split(".")[::-1]

    def equal(name: str) -> int:
        pairs = zip(name.split(".")[::-1], parts, strict=False)
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))

    best = max(weights, key=equal, default="")
    return best if equal(best) > 1 else None


@contextmanager
def named(name: str) -> Iterator[None]:
    """Begin the message of a ValueError with the name of an argument."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
