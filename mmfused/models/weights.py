"""The safetensors of a pretrained folder."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
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
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
OPEN_CLIP_CONFIG = "open_clip_config.json"
# The names of weights in a folder of open_clip: safetensors by name, or a converted pickle.
OPEN_CLIP_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors")
NUMBER = re.compile(r"0|[1-9][0-9]{0,8}")  # of a layer, in a weight's name


@contextmanager
def on_meta() -> Iterator[None]:
    """Build modules on the meta device, and leave the CPU's random state unchanged."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        yield


def find_folder(name: str, source: str, further: str = "") -> Path:
    """Return the folder ``source``, or download the hub model ``source`` and return its folder.

    Downloaded are the config, the safetensors and, if the model has it, the file ``further``.
    """
    if Path(source).is_dir():
        return Path(source)
    if Path(source).exists():
        hint = pickle_hint(Path(source).parent)
        raise ValueError(f"{name}: got the file {source!r}, expected a folder or a hub name{hint}")
    from huggingface_hub.errors import EntryNotFoundError

    try:
        try:
            folder = download(source, "config.json").parent
        except EntryNotFoundError:
            folder = download(source, OPEN_CLIP_CONFIG).parent
            download(source, OPEN_CLIP_WEIGHTS[0])
            return folder
        if further:
            with suppress(EntryNotFoundError):
                download(source, further)
        try:
            download(source, "model.safetensors")
        except EntryNotFoundError:
            download(source, INDEX)
            for part in weight_files(name, folder):
                download(source, part.name)
    except (OSError, ValueError) as error:
        expected = "a folder, or the name of a hub model with safetensors"
        reason = one_line(error)
        raise ValueError(f"{name}: got {source!r}, expected {expected} ({reason})") from error
    return folder


def download(source: str, file: str) -> Path:
    """Return the path of a hub model's file."""
    import huggingface_hub

    return Path(huggingface_hub.hf_hub_download(source, file))


def config_path(folder: Path) -> Path:
    """Return the path of config.json, or of open_clip's if the weights are not config.json's."""
    has_weights = any((folder / file).is_file() for file in ("model.safetensors", INDEX))
    own, open_clip = folder / "config.json", folder / OPEN_CLIP_CONFIG
    return open_clip if open_clip.is_file() and not (own.is_file() and has_weights) else own


def pickle_hint(folder: Path) -> str:
    """Return the end of a sentence that names the pickles in a folder, if there are some."""
    pickles = [path.name for path in sorted(folder.glob("*")) if path.suffix in PICKLES]
    if not pickles:
        return ""
    why = "can run any code when it is loaded; mmfused convert writes safetensors"
    return f"; {pickles[0]} is a pickle, which {why}"


def weights_path(folder: Path) -> Path:
    """Return the path of model.safetensors, of the index, or of open_clip's weights."""
    named_so = ["model.safetensors", INDEX]
    if config_path(folder).name == OPEN_CLIP_CONFIG:
        named_so = [*OPEN_CLIP_WEIGHTS, *named_so]
    paths = [folder / file for file in named_so]
    return next((path for path in paths if path.is_file()), folder / "model.safetensors")


def weight_files(name: str, folder: Path) -> list[Path]:
    """Return the path of the file of weights, or the paths of the parts that the index lists.

    Raises:
        ValueError: the index lists something other than file names.
    """
    if weights_path(folder) != folder / INDEX:
        return [weights_path(folder)]
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


def read_weights(name: str, folder: Path, values: bool = True) -> dict[str, Tensor]:
    """Return all tensors in the safetensors files of a folder, by name.

    Without ``values``, only the files' headers are read, and the tensors are on meta.

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
            held = safetensors.torch.load_file(path) if values else read_header(path)
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


def read_header(path: Path) -> dict[str, Tensor]:
    """Return meta tensors with the shapes in a safetensors file, as floating-point or integers."""
    import safetensors

    held: dict[str, Tensor] = {}
    with safetensors.safe_open(path, "pt") as file:
        for key in file.keys():  # noqa: SIM118  # not a dict
            part = file.get_slice(key)
            dtype = torch.float32 if "F" in part.get_dtype() else torch.int64
            held[key] = torch.empty(part.get_shape(), dtype=dtype, device="meta")
    return held


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


def compress(keys: Iterable[str]) -> list[str]:
    """Return names in which ranges stand for numbers, such as ``layer.0-11.weight``.

    Examples:
        >>> compress(["layer.0.a", "layer.0.b", "layer.1.a", "layer.2.a", "layer.4.a", "norm"])
        ['layer.0-2,4.a', 'layer.0.b', 'norm']
    """
    names = list(dict.fromkeys(keys))
    for place in range(max((len(name.split(".")) for name in names), default=0)):
        numbers: dict[tuple[str, ...], list[int]] = {}
        for name in names:
            parts = name.split(".")
            number = parts[place] if place < len(parts) else ""
            if NUMBER.fullmatch(number):
                numbers.setdefault((*parts[:place], "#", *parts[place + 1 :]), []).append(
                    int(number)
                )
            else:
                numbers[tuple(parts)] = []
        names = [
            ".".join(ranges(found) if part == "#" and found else part for part in parts)
            for parts, found in numbers.items()
        ]
    return names


def natural(name: str) -> list[tuple[bool, int, str]]:
    """Return the key by which names are sorted with their numbers in order."""
    parts = name.split(".")
    return [(False, int(part), "") if NUMBER.fullmatch(part) else (True, 0, part) for part in parts]


def ranges(numbers: Iterable[int]) -> str:
    """Return numbers as ranges, such as 0-2,4."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ",".join(f"{first}-{last}" if last > first else str(first) for first, last in spans)


@contextmanager
def named(name: str) -> Iterator[None]:
    """Begin the message of a ValueError with the name of an argument."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
