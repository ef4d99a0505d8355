"""Kernels of Triton and Gluon that take NamedTuples and tensor descriptors, and their launches."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia import hopper
from triton.tools.tensor_descriptor import TensorDescriptor

OPTIONS = {"num_warps": 4, "num_stages": 2}


class Inner(NamedTuple):
    """A part of Side."""

    bias_ptr: Any
    heads: Any


class Side(NamedTuple):
    """The arguments of one side of a kernel; some may be None."""

    x_ptr: Any
    rows: Any
    norm_ptr: Any
    inner: Inner
    scale: Any
    width: Any


@triton.jit
def sides_kernel(
    side: Side,
    out_ptr,
    n,
    BN: tl.constexpr,
):
    """Write x * scale + bias * heads; normalise it if there is a norm."""
    at = tl.program_id(0) * BN + tl.arange(0, BN)
    x = tl.load(side.x_ptr + at * side.width, at < side.rows).to(tl.float32) * side.scale
    x += tl.load(side.inner.bias_ptr + at) * side.inner.heads
    if side.norm_ptr is not None:
        x *= tl.load(side.norm_ptr + at)
    tl.store(out_ptr + at, x, at < n)


@triton.jit
def descriptor_kernel(
    x_desc,
    out_ptr,
    side,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Write x @ x.T of a tile that TMA loads."""
    x = x_desc.load([0, side.rows])
    at = tl.arange(0, BM)
    tl.store(out_ptr + at[:, None] * BM + at[None, :], tl.dot(x, x.T))


@triton.jit
def product_kernel(
    x_ptr,
    y_ptr,
    out_ptr,
    depth,
    BM: tl.constexpr,
    BK: tl.constexpr,
):
    """Write x @ y.T of (BM, depth) matrices."""
    rows = tl.arange(0, BM)
    columns = tl.arange(0, BK)
    acc = tl.zeros([BM, BM], tl.float32)
    for k in range(0, depth, BK):
        at = rows[:, None] * depth + k + columns[None, :]
        acc = tl.dot(tl.load(x_ptr + at), tl.load(y_ptr + at).T, acc)
    tl.store(out_ptr + rows[:, None] * BM + rows[None, :], acc)


@gluon.jit
def gluon_kernel(
    x_desc,
    out_ptr,
    n,
    BN: gl.constexpr,
):
    """Write BN numbers; the descriptor is only passed."""
    at = gl.arange(0, BN, layout=gl.BlockedLayout([1], [32], [4], [0]))
    gl.store(out_ptr + at, at.to(gl.float32), mask=at < n)


def launch(empty: Any) -> None:
    """Launch each kernel.

    Args:
        empty: returns a tensor for a shape and a dtype.
    """
    x, out = empty((128, 64), torch.bfloat16), empty((128,), torch.float32)
    bias = empty((128,), torch.float32)
    side = Side(x, 32, None, Inner(bias, 1), 0.5, 2**31)
    sides_kernel[(1,)](side, out, 7, BN=128, **OPTIONS)
    side = side._replace(norm_ptr=out, inner=Inner(bias, 3), scale=True, width=-1)
    sides_kernel[(1,)](side, out, 0, BN=128, **OPTIONS)
    tile = TensorDescriptor.from_tensor(x, [64, 64])
    square = empty((64, 64), torch.float32)
    descriptor_kernel[(1,)](tile, square, side, BM=64, BN=64, **OPTIONS)
    product_kernel[(1,)](x, x, square, 64, BM=64, BK=64, **OPTIONS)
    layout = gl.NVMMASharedLayout.get_default_for([64, 64], gl.bfloat16)
    tile = hopper.TensorDescriptor.from_tensor(x, [64, 64], layout)
    gluon_kernel[(1,)](tile, out, 16, BN=128, **OPTIONS)
