"""Tensor maps as this machine keeps them: what CUDA's cuTensorMapEncodeTiled makes for a GPU.

A kernel gets a tensor map as a parameter of 128 bytes, aligned to 64. NVIDIA does not say what lies
in it; here it is the struct of tensor_map.h.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

# In the order of the numbers that PTX gives them in tensormap.replace, and their bytes.
ELEMENT_BYTES = {
    **{"u8": 1, "u16": 2, "u32": 4, "s32": 4, "u64": 8, "s64": 8, "f16": 2, "f32": 4},
    **{"f32.ftz": 4, "f64": 8, "bf16": 2, "tf32": 4, "tf32.ftz": 4},
}
ELEMENTS = tuple(ELEMENT_BYTES)
SWIZZLE_BYTES = (0, 32, 64, 128)
_MOST_DIMENSIONS = 5
_FORMAT = f"<Q{_MOST_DIMENSIONS}Q{_MOST_DIMENSIONS - 1}Q{2 * _MOST_DIMENSIONS}I8B"


class Field(NamedTuple):
    """Where a value lies in a tensor map, in bytes; an array has one for each dimension."""

    offset: int
    size: int
    is_array: bool = False


# By their names in tensormap.replace; in the order of the struct.
FIELDS = {
    "global_address": Field(0, 8),
    "global_dim": Field(8, 8, True),
    "global_stride": Field(48, 8, True),
    "box_dim": Field(80, 4, True),
    "element_stride": Field(100, 4, True),
    "rank": Field(120, 1),
    "elemtype": Field(121, 1),
    "swizzle_mode": Field(122, 1),
    "fill_mode": Field(123, 1),
    "interleave_layout": Field(124, 1),
}


def encode(
    element: str,
    address: int,
    dims: Sequence[int],
    strides: Sequence[int],
    box: Sequence[int],
    *,
    element_strides: Sequence[int] | None = None,
    swizzle: int = 0,
    fill_nan: bool = False,
) -> bytes:
    """Return the 128 bytes of a tensor map. The dimension whose elements are adjacent comes first.

    Args:
        element: the type of an element, one of ``ELEMENTS``.
        address: of the tensor.
        dims: elements of each dimension of the tensor.
        strides: bytes from one index to the next of each dimension but the first.
        box: elements of each dimension of the box that one copy moves.
        element_strides: every how many elements are copied; 1 each, which is the default.
        swizzle: 0 for none, 1 for 32, 2 for 64, 3 for 128 bytes, as CUDA and PTX number them.
        fill_nan: elements outside of the tensor are read as NaN instead of 0.

    Raises:
        ValueError: CUDA's driver would refuse the arguments.
    """
    steps = list(element_strides or [1] * len(dims))
    _check_element(element, fill_nan, swizzle)
    _check_tensor(address, dims, strides)
    _check_box(element, dims, box, steps, swizzle)
    return struct.pack(
        _FORMAT,
        address,
        *_padded(dims, _MOST_DIMENSIONS),
        *_padded(strides, _MOST_DIMENSIONS - 1),
        *_padded(box, _MOST_DIMENSIONS),
        *_padded(steps, _MOST_DIMENSIONS),
        *(len(dims), ELEMENTS.index(element), swizzle, fill_nan),
        *bytes(4),
    )


def _padded(values: Sequence[int], count: int) -> list[int]:
    return [*values, *[0] * (count - len(values))]


def _check_element(element: str, fill_nan: bool, swizzle: int) -> None:
    if element not in ELEMENT_BYTES:
        raise ValueError(f"element: got {element!r}, expected one of {', '.join(ELEMENTS)}")
    if fill_nan and element[0] in "us":
        raise ValueError(f"fill_nan: got True for {element}, which has no NaN")
    if swizzle not in range(len(SWIZZLE_BYTES)):
        raise ValueError(f"swizzle: got {swizzle}, expected a number from 0 to 3")


def _check_tensor(address: int, dims: Sequence[int], strides: Sequence[int]) -> None:
    if address % 16:
        raise ValueError(f"address: got {address:#x}, expected a multiple of 16")
    if not 1 <= len(dims) <= _MOST_DIMENSIONS or len(strides) != len(dims) - 1:
        got = f"{len(dims)} dims and {len(strides)} strides"
        raise ValueError(f"dims: got {got}, expected 1 to {_MOST_DIMENSIONS}, and one stride less")
    if not all(1 <= n <= 1 << 32 for n in dims):
        raise ValueError(f"dims: got {list(dims)}, expected 1 to 2**32 each")
    if not all(s % 16 == 0 and 0 <= s < 1 << 40 for s in strides):
        raise ValueError(f"strides: got {list(strides)}, expected multiples of 16 below 2**40")


def _check_box(
    element: str,
    dims: Sequence[int],
    box: Sequence[int],
    steps: Sequence[int],
    swizzle: int,
) -> None:
    if len(box) != len(dims) or not all(1 <= n <= 256 for n in box):
        raise ValueError(f"box: got {list(box)}, expected {len(dims)} numbers from 1 to 256")
    row = box[0] * ELEMENT_BYTES[element]
    if row % 16:
        raise ValueError(f"box: got a first dimension of {row} bytes, expected a multiple of 16")
    if swizzle and row > SWIZZLE_BYTES[swizzle]:
        width = SWIZZLE_BYTES[swizzle]
        raise ValueError(f"box: got a first dimension of {row} bytes, a swizzle of {width} bytes")
    if list(steps) != [1] * len(dims):
        raise ValueError(f"element_strides: got {list(steps)}, expected 1 each")
