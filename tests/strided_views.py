"""Copies of tensors in other memory layouts: views with garbage around and between the values.

A kernel that ignores a stride or an offset, or reads beyond a row, reads garbage.
"""

from __future__ import annotations

import torch
from torch import Tensor

SAME_VALUES = ("contiguous", "offset", "sliced", "strided", "transposed")
# Layouts that change the values: along one dimension, all values are equal and the stride is 0.
EXPANDED = ("expanded first", "expanded last")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GUARD = 19  # garbage elements before and after the values; odd, so the offset is not aligned


def garbage(size: int, dtype: torch.dtype) -> Tensor:
    if dtype.is_floating_point:
        return torch.full((size,), float("nan"), dtype=dtype)
    if dtype == torch.bool:
        return torch.arange(size) % 3 != 1
    return torch.full((size,), torch.iinfo(dtype).max // 3, dtype=dtype)


def on_device(x: Tensor) -> Tensor:
    """Copy a CPU view to the device, with the garbage around its values.

    Values are drawn on the CPU, so that a seed gives the same case on every device.
    """
    if DEVICE == "cpu":
        return x
    memory = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())
    return memory.to(DEVICE).as_strided(x.shape, x.stride(), x.storage_offset())


def lay_out(values: Tensor, layout: str) -> Tensor:
    """Return a copy of ``values`` in the given layout.

    Applying the same layout a second time keeps all values.
    """
    values = values.detach()
    if layout in EXPANDED:
        return _expanded(values, 0 if layout == "expanded first" else -1)
    if layout == "contiguous":
        return values.clone(memory_format=torch.contiguous_format)
    dims = range(values.dim())
    if layout == "transposed":
        return _placed(values, order=list(dims), step=1 if values.dim() > 1 else 3, gap=0)
    step, gap = {"offset": (1, 0), "sliced": (1, 3), "strided": (2, 5)}[layout]
    return _placed(values, order=list(reversed(dims)), step=step, gap=gap)


def _placed(values: Tensor, order: list[int], step: int, gap: int) -> Tensor:
    """Copy values into strided memory.

    ``order``: the dimensions by stride, smallest first. ``step``: the smallest stride. ``gap``: the
    number of unused elements after each dimension.
    """
    strides, stride = [0] * values.dim(), step
    for dim in order:
        strides[dim] = stride
        stride = stride * max(values.shape[dim], 1) + gap
    span = sum(
        (size - 1) * stride for size, stride in zip(values.shape, strides, strict=True) if size
    )
    memory = garbage(GUARD + span + 1 + GUARD, values.dtype)
    return memory.as_strided(values.shape, strides, GUARD).copy_(values)


def _expanded(values: Tensor, dim: int) -> Tensor:
    """Replace all values along ``dim`` by the last value, with a stride of 0."""
    if not values.dim() or not values.shape[dim]:
        return _placed(values, list(reversed(range(values.dim()))), 1, 0)
    last = values.narrow(dim, values.shape[dim] - 1, 1)
    return lay_out(last, "sliced").expand(values.shape)
