"""The file in which ``mmfused tune`` keeps what is fastest on a GPU.

A file belongs to a model of GPU and a version of Triton. The library reads it once, at the first
launch on such a GPU. ``MMFUSED_TUNED`` is a file, a folder of such files, or "off"; without it the
folder is ``~/.cache/mmfused/tuned``.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import json
import os
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from .json_files import read_object
from .ops import OPS

if TYPE_CHECKING:
    from .kernels.tuned import Entry

FORMAT = 1
VARIABLE = "MMFUSED_TUNED"
Router = Literal["triton", "cuda"]
_MAX_BYTES = 64 << 20
# Numbers of a tile that need not be powers of two.
_COUNTS = ("num_stages", "maxnreg", "residents", "halvings", "CHUNKS", "SLOTS")


@dataclass(eq=False)
class Tuned:
    """What a file holds.

    Attributes:
        card: the name of the GPU, as torch gives it.
        triton: the version of Triton.
        sources: for each op, :func:`sources_of` when it was tuned.
        entries: the plans that are faster than the library's.
        absorbed_must_save: how many times fewer FLOPs query pooling must need in the absorbed form
            for ``form="auto"`` to pick it; None: the library's factor.
        router: the kernels that route from logits; None: the library's.
        measured: what was timed, for people; nothing depends on it.
        path: the file, once it is read or written.
    """

    card: str
    triton: str
    sources: dict[str, str] = field(default_factory=dict)
    entries: list[Entry] = field(default_factory=list)
    absorbed_must_save: float | None = None
    router: Router | None = None
    measured: list[dict[str, Any]] = field(default_factory=list)
    path: Path | None = None


# ---- which file ----------------------------------------------------------------------------------


def current() -> Tuned | None:
    """Return what the file of the current GPU holds, or None if there is none.

    Without a GPU, return what the file holds that ``MMFUSED_TUNED`` names, if it is a file.

    Raises:
        ValueError: ``MMFUSED_TUNED`` names a file that does not exist, that cannot be read, or that
            is for another GPU or another version of Triton.
    """
    on_gpu = torch.cuda.is_available() and torch.version.hip is None
    return of_device(torch.cuda.current_device() if on_gpu else None)


@functools.cache
def of_device(index: int | None) -> Tuned | None:
    """Return what :func:`current` returns, for the GPU with this index; None: without a GPU."""
    return _read_once(None if index is None else torch.cuda.get_device_name(index))


@functools.cache
def _read_once(card: str | None) -> Tuned | None:
    named = os.environ.get(VARIABLE, "")
    if named == "off":
        return None
    triton = triton_version()
    try:
        path = Path(named) if named else default_folder()
    except RuntimeError:  # there is no home
        return None
    # A home that may not be read has no file; Path.is_file would raise.
    is_file = bool(named) and not os.path.isdir(path)
    if not is_file:
        if card is None or triton is None:
            return None
        path = path / file_name(card, triton)
        if not os.path.isfile(path):
            return None
    try:
        found = read(path)
    except (ValueError, OSError) as error:
        if is_file:
            raise ValueError(
                f"{VARIABLE}: got {named!r}, expected a file of `mmfused tune`, a folder of such "
                f"files, or off: {error}"
            ) from error
        warnings.warn(
            f"{error}; the plans in it are not used. `mmfused tune` writes it again.", stacklevel=2
        )
        return None
    wrong = found.triton != triton or card not in (None, found.card)
    if wrong and is_file:
        raise ValueError(
            f"{VARIABLE}: got {named!r}, which is for {found.card} and Triton {found.triton}, "
            f"expected a file for {card or 'any GPU'} and Triton {triton}"
        )
    return None if wrong else _without_stale(found, path)


def _without_stale(found: Tuned, path: Path) -> Tuned:
    """Remove the plans of ops whose kernels have changed, with a warning."""
    ops = dict.fromkeys([*found.sources, *(entry.op for entry in found.entries)])
    stale = [op for op in ops if found.sources.get(op) != sources_of(op)]
    if stale:
        warnings.warn(
            f"{path} was made with other kernels of {', '.join(stale)}, so these run with the "
            f"library's own plans. `mmfused tune {' '.join(stale)}` tunes them again.",
            stacklevel=2,
        )
    found.entries = [entry for entry in found.entries if entry.op not in stale]
    if "query_pooling" in stale:
        found.absorbed_must_save = None
    if "topk_routing" in stale:
        found.router = None
    return found


def default_folder() -> Path:
    """Return the folder of the files if ``MMFUSED_TUNED`` is not set."""
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "mmfused" / "tuned"


def file_name(card: str, triton: str) -> str:
    """Return the name of the file of a GPU: ``nvidia-h200-triton-3.6.0.json``."""
    return f"{re.sub(r'[^a-z0-9]+', '-', card.lower()).strip('-')}-triton-{triton}.json"


def default_path(card: str, triton: str) -> Path:
    """Return the file that the library reads if ``MMFUSED_TUNED`` is not set."""
    return default_folder() / file_name(card, triton)


def triton_version() -> str | None:
    """Return the version of Triton without a local part, or None if it is not installed."""
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__.partition("+")[0]


def sources_of(op: str) -> str:
    """Return a hash of the sources of an op's kernels, without those that only ``inspect`` uses."""
    digest = hashlib.sha256()
    for name in (op, *OPS[op]):
        kernels = Path(next(iter(importlib.import_module(f"mmfused.kernels.{name}").__path__)))
        paths = [*kernels.glob("*.py"), *(kernels.parent / f"{n}.py" for n in ("tiles", "gluon"))]
        for path in sorted(path for path in paths if path.stem != "inspect_cases"):
            digest.update(path.name.encode() + path.read_bytes().replace(b"\r\n", b"\n"))
    return digest.hexdigest()[:16]


# ---- its contents --------------------------------------------------------------------------------


def read(path: Path) -> Tuned:
    """Return what a file holds.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no file of ``mmfused tune``, or one of another version of mmfused.
    """
    data = read_object(path, _MAX_BYTES)
    if data.get("format") != FORMAT:
        raise ValueError(f"{path}: format: got {data.get('format')!r}, expected {FORMAT}")
    try:
        settings = data["settings"]
        found = Tuned(
            card=_text(data["card"]),
            triton=_text(data["triton"]),
            sources={op: _text(data["sources"][op]) for op in OPS if op in data["sources"]},
            entries=_decode_entries(data["plans"]),
            absorbed_must_save=settings["absorbed_must_save"],
            router=settings["router"],
            measured=list(data["measured"]),
            path=path,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is no file of `mmfused tune`: {error!r}") from error
    if found.router not in (None, *get_args(Router)):
        raise ValueError(f"{path}: router: got {found.router!r}, expected triton, cuda or null")
    factor = found.absorbed_must_save
    if factor is not None and not (isinstance(factor, float) and 0 < factor < float("inf")):
        raise ValueError(
            f"{path}: absorbed_must_save: got {factor!r}, expected a positive number or null"
        )
    return found


def write(path: Path, tuned: Tuned) -> None:
    """Write a file; an older one is replaced as a whole or not at all."""
    import mmfused

    data = {
        "format": FORMAT,
        "card": tuned.card,
        "triton": tuned.triton,
        "mmfused": mmfused.__version__,
        "sources": tuned.sources,
        "settings": {"absorbed_must_save": tuned.absorbed_must_save, "router": tuned.router},
        "plans": [_encode_entry(entry) for entry in tuned.entries],
        "measured": tuned.measured,
    }
    text = json.dumps(data, indent=1, allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
        tuned.path = path
    finally:
        temporary.unlink(missing_ok=True)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"got {value!r}, expected a string")
    return value


def _encode_entry(entry: Entry) -> dict[str, Any]:
    return {
        "op": entry.op,
        "arguments": dict(entry.arguments),
        "default": encode(entry.default),
        "plan": encode(entry.plan),
    }


def _decode_entries(plans: Iterable[dict[str, Any]]) -> list[Entry]:
    from .kernels.tuned import Entry

    entries = [
        Entry(
            plan["op"],
            tuple(sorted(plan["arguments"].items())),
            decode(plan["op"], plan["default"]),
            decode(plan["op"], plan["plan"]),
        )
        for plan in plans
        if plan["op"] in OPS
    ]
    for entry in entries:
        _check_entry(entry)
    return entries


def _check_entry(entry: Entry) -> None:
    """Raise ValueError or TypeError if no launcher takes the plan, as after a change by hand."""
    from .tuning import candidates

    arguments = dict(entry.arguments)
    if not all(isinstance(value, (str, int)) for value in arguments.values()):
        raise TypeError(f"arguments: got {arguments!r}, expected strings, integers and booleans")
    if type(entry.plan) is not type(entry.default):
        raise TypeError(f"plan: got {entry.plan!r}, expected {type(entry.default).__name__}")
    for _, tile in candidates.tiles_of(entry.plan):
        for part in fields(tile):
            value = getattr(tile, part.name)
            is_count = part.name in _COUNTS
            if value is None and part.name == "maxnreg":
                continue
            if type(value) is int and value >= 0 and (is_count or not value & (value - 1)):
                continue
            expected = "an integer" if is_count else "a power of two"
            raise ValueError(f"{part.name}: got {value!r}, expected {expected}")
    if reason := candidates.why_invalid(entry.op, arguments, entry.plan):
        raise ValueError(reason)


def encode(value: Any) -> Any:
    """Return a plan, or a part of it, as JSON: a dataclass is an object with its name as "type"."""
    if is_dataclass(value):
        parts = {part.name: encode(getattr(value, part.name)) for part in fields(value)}
        return {"type": type(value).__name__} | parts
    if isinstance(value, dict):
        return {name: encode(part) for name, part in value.items()}
    if isinstance(value, tuple):
        return [encode(part) for part in value]
    return value


def decode(op: str, value: Any) -> Any:
    """Return the plan of an op that :func:`encode` has written.

    Raises:
        ValueError: the op has no such class.
        TypeError: its fields are others.
    """
    plans = importlib.import_module(f"mmfused.kernels.{op}.plans")
    return _decode(plans, value)


def _decode(plans: ModuleType, value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_decode(plans, part) for part in value)
    if not isinstance(value, dict):
        return value
    parts = {name: _decode(plans, part) for name, part in value.items() if name != "type"}
    if "type" not in value:
        return parts
    kind = getattr(plans, value["type"], None)
    if not (isinstance(kind, type) and is_dataclass(kind)):
        raise ValueError(f"{plans.__name__} has no class {value['type']!r}")
    return kind(**parts)
