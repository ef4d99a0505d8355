"""Weights of a pretrained folder: safetensors that lie in it, and no more of them than the model
has.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path

import torch
from torch import Tensor, nn

from mmfused.extras import from_extra
from mmfused.json_files import one_line, read_object
from mmfused.models.fields import shown

INDEX = "model.safetensors.index.json"


@contextmanager
def on_meta() -> Iterator[None]:
    """What is built here has shapes and no values, and draws nothing of the CPU's random numbers."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        yield


def find_folder(name: str, source: str) -> Path:
    """The folder, or the one that config.json and safetensors of this hub name are downloaded to."""
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
        takes = "takes a folder, or a name that the hub gives safetensors for"
        raise ValueError(f"{name}: got {source!r}, {takes} ({one_line(error)})") from error
    return folder


def weight_files(name: str, folder: Path) -> list[Path]:
    """model.safetensors, or the parts that its index names; ValueError where one of these is not a
    file of the folder.
    """
    if (folder / "model.safetensors").is_file() or not (folder / INDEX).is_file():
        return [folder / "model.safetensors"]
    parts = read_object(folder / INDEX, 64 << 20).get("weight_map")
    parts = parts.values() if isinstance(parts, dict) else [parts]
    for part in parts:
        if (
            not isinstance(part, str)
            or not part.endswith(".safetensors")
            or not set(part).isdisjoint("/\\:\0")
        ):
            raise ValueError(
                f"{name}: {folder / INDEX}: weight_map: got {shown(part)}, expected names of *.safetensors beside it"
            )
    return [folder / part for part in sorted(set(parts))]


def read_weights(name: str, folder: Path) -> dict[str, Tensor]:
    with from_extra("models"):
        import safetensors.torch
    weights = {}
    for path in weight_files(name, folder):
        if not path.is_file():
            raise FileNotFoundError(f"{name}: {path} is missing")
        try:
            weights |= safetensors.torch.load_file(path)
        except safetensors.SafetensorError as error:
            raise ValueError(
                f"{name}: {path} is truncated, corrupt or no safetensors file: {one_line(error)}"
            ) from error
    return weights


def check_size(name: str, weights: dict[str, Tensor], expected: nn.Module) -> None:
    """ValueError where the files hold less than half of the model, which would be made before its
    weights are missed.
    """
    held = sum(tensor.numel() for tensor in weights.values())
    takes = sum(prod(tensor.shape) for tensor in expected.state_dict().values())
    if 2 * held < takes:
        raise ValueError(
            f"{name} lacks weights: holds {held} numbers, expected the {takes} of what its config.json describes"
        )
