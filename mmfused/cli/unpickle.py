"""Write the weights of a pickle as safetensors: ``python -m mmfused.cli.unpickle FILE OUT``.

``mmfused convert`` runs this module in a process of its own, so that a hostile file can at most end
that process. torch reads the pickle with ``weights_only``, which imports nothing that the file
names. One line of JSON on stdout tells the result, or the reason of a refusal.
"""

from __future__ import annotations

import json
import re
import resource
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmfused.json_files import one_line

# The keys under which a checkpoint holds the weights.
WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
MOST_WRAPPERS = 4  # a dict may hold itself
# What DataParallel and torch.compile put before the name of each weight.
PREFIXES = ("module.", "_orig_mod.")
# The types of safetensors.
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
# Tensors may share numbers, but a few bytes must not become a full disk: the weights may have this
# many times the bytes of the file.
MOST_TIMES = 4


def convert(file: Path, out: Path) -> dict[str, Any]:
    """Write the weights in ``file`` to the safetensors file ``out``.

    Returns:
        "wrappers", the keys that were opened; "prefix", the beginning that was cut off all names;
        "dropped", the other keys; and "tensors", the number of weights.

    Raises:
        ValueError: the file has no weights that can be written; the message lacks its name.
    """
    value, wrappers, dropped = _load(file), [], []
    for _ in range(MOST_WRAPPERS):
        keys = WRAPPERS if isinstance(value, Mapping) else ()
        key = next((key for key in keys if isinstance(value.get(key), Mapping)), None)
        if key is None:
            break
        wrappers.append(key)
        dropped += [_shown(name) for name in value if name != key]
        value = value[key]
    if not isinstance(value, Mapping):
        raise ValueError(f"it holds a {type(value).__name__}, expected a dict of tensors")
    tensors = {name: x.detach() for name, x in value.items() if isinstance(x, Tensor)}
    if not tensors:
        names = ", ".join(map(_shown, list(value)[:5]))
        raise ValueError(f"it holds no tensors under {names or 'any name'}")
    dropped += [_shown(name) for name in value if name not in tensors]
    _check(tensors, file.stat().st_size)
    prefix = ""
    while found := [start for start in PREFIXES if all(x.startswith(start) for x in tensors)]:
        prefix += found[0]
        tensors = {name.removeprefix(found[0]): x for name, x in tensors.items()}
    _write(out, tensors)
    return {"wrappers": wrappers, "prefix": prefix, "dropped": dropped, "tensors": len(tensors)}


def _load(file: Path) -> Any:
    """Return the object in a file of torch.save, old or new."""
    with open(file, "rb") as opened:
        is_zip = opened.read(4) == b"PK\3\4"
    if is_zip:
        _check_archive(file)
    try:
        # The tensors of a zip are read from the file when they are written.
        return torch.load(file, map_location="cpu", weights_only=True, mmap=is_zip)
    except (MemoryError, OSError):
        raise
    # A damaged or hostile pickle may raise any error.
    except Exception as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused:
            raise ValueError(
                f"its pickle would call {_shown(refused[1])}, expected tensors and "
                "plain values; nothing of it was run"
            ) from error
        raise ValueError(
            "it is truncated, corrupt, or no pickle of tensors and plain values"
        ) from error


def _check_archive(file: Path) -> None:
    """Require a zip as torch.save writes it; torch reads the bytes of tensors where they lie."""
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            packed = [entry for entry in entries if entry.compress_type != zipfile.ZIP_STORED]
            # Reads all bytes; torch checks no sums.
            damaged = None if packed else archive.testzip()
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise ValueError(f"it is a truncated or corrupt archive: {one_line(error)}") from error
    names = [entry.filename.rpartition("/")[2] for entry in entries]
    if "constants.pkl" in names:
        raise ValueError("it is a TorchScript archive, which holds a program, expected a pickle")
    if "data.pkl" not in names:
        raise ValueError("it is an archive without data.pkl, expected a file of torch.save")
    if packed:
        raise ValueError(
            f"it is an archive with the compressed file {_shown(packed[0].filename)}, "
            "expected a file of torch.save, which compresses nothing"
        )
    if damaged is not None:
        raise ValueError(
            f"it is corrupt: the checksum of {_shown(damaged)} is not that of its bytes"
        )


def _check(tensors: Mapping[Any, Tensor], size: int) -> None:
    """Require named tensors that safetensors can hold, and that fit a file of ``size`` bytes."""
    total = 0
    for name, tensor in tensors.items():
        if not isinstance(name, str) or name == "__metadata__":
            raise ValueError(f"it holds a tensor under {_shown(name)}, expected a name")
        shown = _shown(name)
        if tensor.layout is not torch.strided or tensor.device.type != "cpu":
            kind = tensor.device if tensor.layout is torch.strided else tensor.layout
            raise ValueError(f"{shown}: got a tensor of {kind}, expected a dense one with numbers")
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{shown}: got {tensor.dtype}, expected a type of safetensors")
        total += tensor.numel() * tensor.element_size()
    if total > MOST_TIMES * size:
        raise ValueError(f"its tensors have {total} bytes, expected about the file's {size}")


def _shown(name: object) -> str:
    """Return a name in a file, which may have any characters, for a line on the terminal."""
    return "".join(c if c.isprintable() else "?" for c in one_line(name, 80))


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file, one tensor after the other.

    safetensors' own function would hold all tensors a second time. Wide types come first, so that
    each tensor starts at a multiple of the size of its numbers.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start, order = 0, sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    for name in order:
        tensor = tensors[name]
        end = start + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            flat = tensors[name].resolve_neg().contiguous().reshape(-1)
            file.write(flat.view(torch.uint8).numpy().data)


def main() -> None:
    """Convert the file that the command line names, and print the result."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    file, out = map(Path, sys.argv[1:])
    try:
        result = convert(file, out)
    except (ValueError, OSError, RuntimeError) as error:
        result = {"error": one_line(error, 500)}
    except MemoryError:
        result = {"error": "there is not enough memory"}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
