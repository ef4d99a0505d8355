"""Validation of config values, which may come from any file: type and bounds of each field."""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from numbers import Integral, Real
from reprlib import Repr
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, Union, get_args, get_origin

from mmfused.json_files import one_line

if TYPE_CHECKING:
    Options: TypeAlias = dict[str, Any]
else:
    Options = dict  # any dict passes `fits`; the config's own checks examine its fields

# The kind of each field of an object: an annotation, or Kinds if the field holds an object or None.
Kinds: TypeAlias = Mapping[str, object]

NoneType: type = type(None)
LONGEST = 1000  # the longest list or string accepted
LAYERS = (1, 1000)
TOKEN = (0, 10**8)
SIDE = (1, 4096)
SIGNED = (-(2**31), 2**31 - 1)
FROM_ZERO = (0, 2**20)
STEPS = (1, 10**12)
DEFAULT = (1, 2**20)
# The smallest and the largest integer accepted, by the name of the field.
BOUNDS: dict[str, tuple[int, int]] = {
    "blocks": LAYERS,
    "cross_layers": LAYERS,
    "depth": LAYERS,
    "inner_group_num": LAYERS,
    "moe_every": LAYERS,
    "n_layers": LAYERS,
    "num_hidden_groups": LAYERS,
    "num_hidden_layers": LAYERS,
    "spatial_merge_size": LAYERS,
    "temporal_patch_size": LAYERS,
    "fusion_blocks": (0, 1000),
    "max_window_layers": (0, 1000),
    "self_blocks": (0, 1000),
    "image_size": SIDE,
    "img_size": SIDE,
    "patch_size": SIDE,
    "drop": TOKEN,
    "empty_text": TOKEN,
    "end": TOKEN,
    "image": TOKEN,
    "pad": TOKEN,
    "prompts": TOKEN,
    "rank": (1, 2**14),
    "start": TOKEN,
    "video": TOKEN,
    "vision_end": TOKEN,
    "vision_start": TOKEN,
    "conv_kernel_size": FROM_ZERO,
    "fullatt_block_indexes": FROM_ZERO,
    "layers_to_transform": FROM_ZERO,
    "reg_tokens": FROM_ZERO,
    "type_vocab_size": FROM_ZERO,
    "max_relative_positions": SIGNED,
    "position_buckets": SIGNED,
    "sparse_pred_ignore_index": SIGNED,
    "max_length": (2, 2**20),
    "num_classes": (1, 10**6),
    "num_experts": (1, 10**5),
    "vocab_size": (1, 10**8),
    # Fields of a training configuration.
    "log_every": STEPS,
    "save_every": STEPS,
    "steps": STEPS,
    "val_every": STEPS,
    "seed": (0, 2**63 - 1),
    "threads": (1, 4096),
}
_short = Repr()
_short.maxstring = _short.maxother = 80
_short.maxlevel = 3


def shown(value: object) -> str:
    """Return the repr of a value on one line, shortened."""
    return one_line(_short.repr(value))


def bounds(name: str) -> tuple[int, int]:
    """Return the smallest and the largest integer that the field at a dotted path may hold."""
    field = name.rpartition(".")[2]
    return (-1, 10**8) if field.endswith("_token_id") else BOUNDS.get(field, DEFAULT)


def check_field(name: str, value: object, kind: object) -> None:
    """Require that ``value`` fits the annotation ``kind``, with integers within `bounds(name)`.

    Raises:
        ValueError: ``value`` does not fit. For a list of options, the message shows the first
            wrong option.
    """
    least, most = bounds(name)
    if fits(value, kind, least, most):
        return
    options = _options(kind)
    if isinstance(value, (list, tuple)) and options:
        value = next((one for one in value if one not in options), value)
    raise ValueError(f"{name}: got {shown(value)}, expected {described(kind, least, most)}")


def check_fields(name: str, values: object, kinds: Kinds) -> None:
    """Check each field of an object, which may have only the fields in ``kinds``."""
    if not isinstance(values, dict):
        raise ValueError(f"{name}: got {shown(values)}, expected an object")
    for key, value in values.items():
        if key not in kinds:
            raise ValueError(f"{name}: got a field {shown(key)}, expected {', '.join(kinds)}")
        kind = kinds[key]
        if not isinstance(kind, dict):
            check_field(f"{name}.{key}", value, kind)
        elif value is not None:
            check_fields(f"{name}.{key}", value, kind)


def fits(
    value: object,
    kind: object,
    least: int,
    most: int,
) -> bool:
    """Return whether a value is of the kind, with integers from ``least`` to ``most``."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return any(fits(value, part, least, most) for part in parts)
    if origin is Literal:
        return any(type(value) is type(part) and value == part for part in parts)
    if kind in (None, NoneType):
        return value is None
    if kind is int:
        is_int = isinstance(value, Integral) and not isinstance(value, bool)
        return is_int and least <= value <= most  # type: ignore[operator]
    if kind is float:  # the bound excludes NaN and infinity too
        is_real = isinstance(value, Real) and not isinstance(value, bool)
        return is_real and abs(value) <= 1e30  # type: ignore[arg-type]
    if kind is str:
        return isinstance(value, str) and len(value) <= LONGEST
    if origin in (list, tuple):
        if not isinstance(value, (list, tuple)) or len(value) > LONGEST:
            return False
        if origin is list or parts[-1] is Ellipsis:
            return all(fits(one, parts[0], least, most) for one in value)
        return len(value) == len(parts) and all(
            fits(one, part, least, most) for one, part in zip(value, parts, strict=True)
        )
    if dict in (kind, origin):
        return isinstance(value, dict)
    return kind is bool and isinstance(value, bool)


def _options(kind: object) -> tuple[object, ...]:
    """Return the options of a kind that is a list of Literals, or () for any other kind."""
    if get_origin(kind) in (list, tuple):
        for part in get_args(kind)[:1]:
            return get_args(part) if get_origin(part) is Literal else ()
    return ()


def described(kind: object, least: int, most: int) -> str:
    """Return the description of a kind in error messages."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        names = [described(part, least, most) for part in parts if plain(part)]
        return " or ".join(dict.fromkeys(names))
    if origin is Literal:
        options = [str(part) or "''" for part in parts]
        return f"one of {', '.join(options)}" if len(parts) > 1 else " or ".join(map(repr, parts))
    if _options(kind):
        return f"some of {', '.join(map(str, _options(kind)))}"
    if origin is list or (origin is tuple and parts[-1] is Ellipsis):
        return f"a list of {plural(parts[0], least, most)}, at most {LONGEST}"
    if origin is tuple:
        return f"{len(parts)} {plural(parts[0], least, most)}"
    if kind is int:
        return f"an integer from {least} to {most}"
    if origin is dict:
        return "an object"
    names = {float: "a finite number", bool: "True or False", str: "a string", dict: "an object"}
    return names[kind] if kind in names else "None"  # type: ignore[index]


def plural(kind: object, least: int, most: int) -> str:
    """Return the description of several values of a kind in error messages."""
    if kind is int:
        return f"integers from {least} to {most}"
    return "finite numbers" if kind is float else "strings"


def plain(kind: object) -> bool:
    """Return whether JSON can represent at least some values of a kind."""
    origin = get_origin(kind)
    if origin is Literal:
        return True
    if origin in (Union, types.UnionType, list, tuple):
        return any(plain(part) for part in get_args(kind) if part is not Ellipsis)
    return kind in (None, NoneType, int, float, bool, str, dict)


@contextmanager
def refusing(message: str) -> Iterator[None]:
    """Turn exceptions of another library into a ValueError that begins with ``message``.

    ImportError and MemoryError are not turned into ValueError. The other library checks whether
    values that are valid by themselves fit together.
    """
    try:
        yield
    except (ImportError, MemoryError):
        raise
    except Exception as error:
        raise ValueError(f"{message}: {one_line(error)}") from error
