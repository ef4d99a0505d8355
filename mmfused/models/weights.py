"""The safetensors of a pretrained folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
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


def weight_files(name: str, folder: Path) -> list[Path]:
    """Return the path of model.safetensors, or the paths of the parts that the index lists.

    Raises:
        ValueError: the index lists something other than file names.
    """
    if (folder / "model.safetensors").is_file() or not (folder / INDEX).is_file():
        return [folder / "model.safetensors"]
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
    """Return all tensors in the safetensors files of a folder, by name."""
    with from_extra("models"):
        import safetensors.torch
    weights: dict[str, Tensor] = {}
    for path in weight_files(name, folder):
        if not path.is_file():
            raise FileNotFoundError(f"{name}: {path} is missing")
        try:
            weights |= safetensors.torch.load_file(path)
        except safetensors.SafetensorError as error:
            reason = one_line(error)
            raise ValueError(
                f"{name}: {path} is truncated, corrupt or not a safetensors file: {reason}"
            ) from error
    return weights


def check_size(name: str, weights: dict[str, Tensor], model: nn.Module) -> None:
    """Require at least half as many elements in the weights as in ``model``, a meta model.

    Without this check, a large model would be allocated before its missing weights are noticed.
    """
    held = sum(tensor.numel() for tensor in weights.values())
    total = sum(prod(tensor.shape) for tensor in model.state_dict().values())
    if 2 * held < total:
        raise ValueError(
            f"{name}: got weights with {held} numbers, expected {total}, as in its config.json"
        )
