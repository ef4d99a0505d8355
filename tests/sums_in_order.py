"""Products and sums of float32 that do not depend on the CPU's BLAS and vectors."""

from __future__ import annotations

import contextlib

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mmfused.library import INTERPRETED, KERNELS_ON_CPU

aten = torch.ops.aten


class SumsInOrder(TorchDispatchMode):
    """Sum float32 numbers, and products of float32 matrices, in order: one rounding for each term.

    A kernel sums in this way. A CPU keeps many partial sums, whose number depends on the CPU, so
    its error is smaller and no budget for a kernel.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (aten.mm.default, aten.bmm.default):
            return _product(*args)
        if func in (aten.addmm.default, aten.baddbmm.default) and not kwargs:
            return args[0] + _product(*args[1:])
        if func is aten.sum.dim_IntList and args[0].dtype == torch.float32 and not kwargs:
            return _sum(*args)
        return func(*args, **(kwargs or {}))


def sums_of(backend: str) -> contextlib.AbstractContextManager:
    """Return a context manager in which the reference, which sets budgets, sums in order.

    Only for compiled kernels on a CPU: the interpreter multiplies matrices in float64.
    """
    in_order = backend == "reference" and KERNELS_ON_CPU and not INTERPRETED
    return SumsInOrder() if in_order else contextlib.nullcontext()


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    if a.dtype != torch.float32:
        return a @ b
    total = a.new_zeros(*a.shape[:-1], b.shape[-1])
    a, b = a.double(), b.double()
    for k in range(a.shape[-1]):
        total = (total + a[..., k, None] * b[..., k, None, :]).float()
    return total


def _sum(x: torch.Tensor, dims: list[int], keepdim: bool = False) -> torch.Tensor:
    shape = torch.empty_like(x, device="meta").sum(dims, keepdim).shape
    total = x.new_zeros(())
    for row in x.movedim(dims, tuple(range(len(dims)))).flatten(0, len(dims) - 1):
        total = total + row
    return total.expand(shape) if total.dim() == 0 else total.reshape(shape)
