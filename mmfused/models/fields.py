"""Values of configs, which may come from any file: which fields there are, of which type, within
which bounds.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Integral, Real
from reprlib import Repr
from typing import Literal, Union, get_args, get_origin

from mmfused.json_files import one_line

NoneType = type(None)
LONGEST = 1000  # of lists and strings
LAYERS, TOKEN, SIDE, ANY = (1, 1000), (0, 10**8), (1, 4096), (-(2**31), 2**31 - 1)
# The least and the most of integers by the name of their field; of all others 1 and 2**20.
BOUNDS = {
    **dict.fromkeys(
        ("depth", "blocks", "cross_layers", "moe_every", "n_layers", "num_hidden_layers"), LAYERS
    ),
    **dict.fromkeys(("self_blocks", "fusion_blocks", "max_window_layers"), (0, 1000)),
    **dict.fromkeys(
        ("num_hidden_groups", "inner_group_num", "spatial_merge_size", "temporal_patch_size"),
        LAYERS,
    ),
    **dict.fromkeys(("img_size", "image_size", "patch_size"), SIDE),
    **dict.fromkeys(
        ("empty_text", "vision_start", "vision_end", "image", "end", "pad", "drop", "prompts"),
        TOKEN,
    ),
    **dict.fromkeys(
        ("type_vocab_size", "reg_tokens", "conv_kernel_size", "fullatt_block_indexes"), (0, 2**20)
    ),
    **dict.fromkeys(
        ("sparse_pred_ignore_index", "max_relative_positions", "position_buckets"), ANY
    ),
    **dict.fromkeys(
        ("steps", "log_every", "val_every", "save_every"), (1, 10**12)
    ),  # of a training
    "seed": (0, 2**63 - 1),
    "threads": (1, 4096),
    "max_length": (2, 2**20),
    "vocab_size": (1, 10**8),
    "num_classes": (1, 10**6),
    "num_experts": (1, 10**5),
    "stage": (1, 2),
}
_short = Repr()
_short.maxstring = _short.maxother = 80
_short.maxlevel = 3


def shown(value: object) -> str:
    """A value as a sentence shows it: on one line, and not at any length."""
    return one_line(_short.repr(value))


def bounds(name: str) -> tuple[int, int]:
    last = name.rpartition(".")[2]
    return (-1, 10**8) if last.endswith("_token_id") else BOUNDS.get(last, (1, 2**20))


def check_field(name: str, value: object, kind: object) -> None:
    """ValueError unless the value is of the ``kind``, an annotation, and its integers within the
    bounds of ``name``.
    """
    if not fits(value, kind, *bounds(name)):
        raise ValueError(f"{name}: got {shown(value)}, expected {described(kind, *bounds(name))}")


def check_fields(name: str, values: object, kinds: dict[str, object]) -> None:
    """As :func:`check_field` for a dict with no other fields than these; a kind that is a dict is
    of a dict's fields, or None.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{name}: got {shown(values)}, expected an object")
    for key, value in values.items():
        if key not in kinds:
            raise ValueError(f"{name}: got a field {shown(key)}, expected {', '.join(kinds)}")
        if not isinstance(kinds[key], dict):
            check_field(f"{name}.{key}", value, kinds[key])
        elif value is not None:
            check_fields(f"{name}.{key}", value, kinds[key])


def fits(value: object, kind: object, least: int, most: int) -> bool:
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return any(fits(value, part, least, most) for part in parts)
    if origin is Literal:
        return any(type(value) is type(part) and value == part for part in parts)
    if kind in (None, NoneType):
        return value is None
    if kind is int:
        return (
            isinstance(value, Integral) and not isinstance(value, bool) and least <= value <= most
        )
    if kind is float:  # NaN and infinity are not below it either
        return isinstance(value, Real) and not isinstance(value, bool) and abs(value) <= 1e30
    if kind is str:
        return isinstance(value, str) and len(value) <= LONGEST
    if origin in (list, tuple):
        if not isinstance(value, (list, tuple)) or len(value) > LONGEST:
            return False
        if origin is list or parts[-1] is Ellipsis:
            return all(fits(one, parts[0], least, most) for one in value)
        return len(value) == len(parts) and all(
            map(fits, value, parts, [least] * len(parts), [most] * len(parts))
        )
    return kind in (bool, dict) and isinstance(value, kind)


def described(kind: object, least: int, most: int) -> str:
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(
            dict.fromkeys(described(part, least, most) for part in parts if plain(part))
        )
    if origin is Literal:
        return " or ".join(map(repr, parts))
    if origin is list or (origin is tuple and parts[-1] is Ellipsis):
        return f"a list of {plural(parts[0], least, most)}, at most {LONGEST}"
    if origin is tuple:
        return f"{len(parts)} {plural(parts[0], least, most)}"
    names = {float: "a finite number", bool: "True or False", str: "a string", dict: "an object"}
    return f"an integer from {least} to {most}" if kind is int else names.get(kind, "None")


def plural(kind: object, least: int, most: int) -> str:
    if kind is int:
        return f"integers from {least} to {most}"
    return {float: "finite numbers", str: "strings"}[kind]


def plain(kind: object) -> bool:
    """Whether JSON holds any value of the kind."""
    if get_origin(kind) is Literal:
        return True
    if get_origin(kind) in (Union, types.UnionType, list, tuple):
        return any(plain(part) for part in get_args(kind) if part is not Ellipsis)
    return kind in (None, NoneType, int, float, bool, str, dict)


@contextmanager
def refusing(sentence: str) -> Iterator[None]:
    """What another library says about values that do not fit together, of whatever class, as one
    ValueError.
    """
    try:
        yield
    except (ImportError, MemoryError):
        raise
    except Exception as error:
        raise ValueError(f"{sentence}: {one_line(error)}") from error
