"""The parameters of a compiled kernel, in bytes, as Triton's launcher makes them of arguments."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from . import tensor_map
from .schedules import Argument

# How struct packs the types of Triton's signatures.
_FORMATS = {
    "i1": "?",
    "u1": "?",
    "i8": "b",
    "u8": "B",
    "i16": "h",
    "u16": "H",
    "i32": "i",
    "u32": "I",
    "i64": "q",
    "u64": "Q",
    "fp16": "e",
    "fp32": "f",
    "fp64": "d",
}
_DESCRIPTOR = "tensordesc"  # how the types of tensor descriptors start


class Parameter(NamedTuple):
    """A parameter of a kernel.

    Args:
        name: of the argument that it belongs to, ``side.x`` for a member of a tuple.
        kind: its type in Triton's signature.
        value: a tensor, a number or a tensor descriptor.
    """

    name: str
    kind: str
    value: Any


def pack_arguments(
    kernel: str,
    signature: Mapping[str, Any],
    values: Sequence[Any],
    maps: Sequence[Mapping[str, Any]] | None,
) -> tuple[list[bytes], list[Argument]]:
    """Return the bytes of each parameter of a kernel, and the tensors among its arguments.

    Args:
        kernel: its name.
        signature: the types of its arguments.
        values: its arguments.
        maps: how to make the tensor map of each tensor descriptor (Triton's ``tensordesc_meta``);
            empty if the kernel was compiled to use none.
    """
    packed, arguments = [], []
    left = iter(maps or ())
    for (name, kind), value in zip(signature.items(), values, strict=True):
        for parameter in _flattened(name, kind, value):
            if parameter.kind.startswith(_DESCRIPTOR):
                if parameter.name != name:
                    raise TypeError(
                        f"{kernel}: {parameter.name}: got a tensor descriptor in a tuple, expected "
                        "it as an argument of its own: Triton 3.6 cannot launch the former"
                    )
                descriptor = _checked(kernel, parameter)
                arguments.append(Argument(name, descriptor.base))
                packed += _descriptor(kernel, parameter, next(left) if maps else None)
            else:
                packed.append(_packed(kernel, parameter))
                if isinstance(parameter.value, torch.Tensor):
                    arguments.append(Argument(parameter.name, parameter.value))
    return packed, arguments


def _flattened(name: str, kind: Any, value: Any) -> Iterator[Parameter]:
    """Yield each parameter in an argument, which may be a nested tuple."""
    if isinstance(kind, tuple):
        fields = getattr(value, "_fields", range(len(kind)))
        for part, part_kind, part_value in zip(fields, kind, value, strict=True):
            yield from _flattened(f"{name}.{part}", part_kind, part_value)
    elif kind != "constexpr":
        yield Parameter(name, kind, value)


def _packed(kernel: str, parameter: Parameter) -> bytes:
    """Return the bytes of a tensor or number."""
    name, kind, value = parameter
    if kind.startswith("*"):
        return struct.pack("Q", _address(kernel, name, value))
    if kind not in _FORMATS:
        raise TypeError(f"{kernel}: {name}: the PTX machine cannot pass the type {kind}")
    return struct.pack(_FORMATS[kind], value)


def _address(kernel: str, name: str, value: Any) -> int:
    if not isinstance(value, torch.Tensor) or value.device.type != "cpu":
        raise TypeError(f"{kernel}: {name}: the PTX machine expected a tensor on the CPU")
    return value.data_ptr()


def _checked(kernel: str, parameter: Parameter) -> Any:
    """Return the tensor descriptor in a parameter if the machine can pass it."""
    name, kind, descriptor = parameter
    if "im2col" in kind:
        raise TypeError(f"{kernel}: {name}: the PTX machine has no im2col descriptors")
    _address(kernel, name, descriptor.base)
    return descriptor


def _descriptor(kernel: str, parameter: Parameter, how: Mapping[str, Any] | None) -> list[bytes]:
    """Return the bytes of the parameters that Triton makes of a tensor descriptor.

    They are the tensor map, or without TMA all that a kernel needs to compute addresses itself;
    then shape and strides, which Triton passes either way.
    """
    descriptor = parameter.value
    shape = [struct.pack("i", size) for size in descriptor.shape]
    strides = [struct.pack("q", stride) for stride in descriptor.strides]
    if how is not None:
        return [_tensor_map(kernel, parameter, how), *shape, *strides]
    flags = [struct.pack("?", descriptor.padding == "nan")]
    if hasattr(descriptor, "round_f32_to_tf32"):  # since Triton 3.7
        flags.append(struct.pack("?", descriptor.round_f32_to_tf32))
    return [
        struct.pack("Q", descriptor.base.data_ptr()),
        *(struct.pack("q", size) for size in descriptor.shape),
        *strides,
        *flags,
        *shape,
        *strides,
    ]


def _tensor_map(kernel: str, parameter: Parameter, how: Mapping[str, Any]) -> bytes:
    """Return the tensor map of a descriptor, as Triton's launcher asks CUDA for it."""
    descriptor = parameter.value
    if how["fp4_padded"]:
        raise TypeError(f"{kernel}: {parameter.name}: the PTX machine has no fp4 descriptors")
    # Triton numbers the types as PTX does.
    is_tf32 = getattr(descriptor, "round_f32_to_tf32", False)
    element = "tf32" if is_tf32 else tensor_map.ELEMENTS[how["elem_type"]]
    try:
        return tensor_map.encode(
            element,
            descriptor.base.data_ptr(),
            descriptor.shape[::-1],
            [stride * how["elem_size"] for stride in descriptor.strides[-2::-1]],
            how["block_size"][::-1],
            swizzle=how["swizzle"],
            fill_nan=descriptor.padding == "nan",
        )
    except ValueError as error:
        raise ValueError(f"{kernel}: {parameter.name}: {error}") from error
