"""Projections of the tokens: queries, keys and values of both sides in one launch.

LayerNorm is folded into weight and bias (prepare.py), so the product reads the tokens themselves:

    LN(x) W^T + b = (x W'^T - mean c1) rstd + b'

with W' = W gamma, c1 the sums of the rows of W', and b' = b + W beta.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..tiles import dot
from .tokens import count_rows, load_tile, load_weight, store_tile


class Projection(NamedTuple):
    """The projection of one side, whose weights for queries, keys and values are stacked."""

    x_ptr: Tensor  # (R, D)
    moments_ptr: Tensor | None  # (2, capacity) float32: mean, 1 / standard deviation of each row
    weight_ptr: Tensor  # (W, D), folded
    vectors_ptr: Tensor  # (2, W) float32: bias; c1, the sum of each row of the weight
    out_ptr: Tensor  # (R, W)
    programs: int  # a multiple of the column blocks


@triton.jit
def _load_moments(
    side,
    rows,
    r,
    ok,
):
    """Return mean and 1 / standard deviation of the rows r; 0 in rows that are not ok."""
    mean = tl.load(side.moments_ptr + r, mask=ok, other=0.0)
    rstd = tl.load(side.moments_ptr + rows.batch * rows.length + r, mask=ok, other=0.0)
    return mean, rstd


@triton.jit
def _load_vectors(
    side,
    cols,
    W: tl.constexpr,
):
    """Return bias and c1 of these columns."""
    bias = tl.load(side.vectors_ptr + cols, mask=cols < W, other=0.0)
    c1 = tl.load(side.vectors_ptr + W + cols, mask=cols < W, other=0.0)
    return bias, c1


@triton.jit
def _project(
    side,
    rows,
    pid,
    W: tl.constexpr,
    D: tl.constexpr,
    SHIFT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Project the rows of one side to BN columns; program ``pid`` of this side."""
    BLOCKS: tl.constexpr = (W + BN - 1) // BN
    cols = pid % BLOCKS * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    if BK >= D:
        w = load_weight(side.weight_ptr, k, cols, D, W, 1, D)
        bias, c1 = _load_vectors(side, cols, W)
    count = count_rows(rows)
    for block in tl.range(pid // BLOCKS, tl.cdiv(count, BM), side.programs // BLOCKS):
        r = block * BM + tl.arange(0, BM)
        ok = r < count
        acc = tl.zeros([BM, BN], tl.float32)
        if side.moments_ptr is not None:
            mean, rstd = _load_moments(side, rows, r, ok)
        if BK >= D:
            x = load_tile(side.x_ptr, r, ok, k, D)
            if SHIFT:
                x = x - mean[:, None]
            acc = dot(x, w, acc, UPCAST)
        else:
            for start in range(0, D, BK):
                x = load_tile(side.x_ptr, r, ok, start + k, D)
                if SHIFT:
                    x = x - mean[:, None]
                acc = dot(x, load_weight(side.weight_ptr, start + k, cols, D, W, 1, D), acc, UPCAST)
            # After the product, because so large a tile leaves no registers for them.
            bias, c1 = _load_vectors(side, cols, W)
        if side.moments_ptr is not None:
            if not SHIFT:
                acc -= mean[:, None] * c1[None, :]
            acc *= rstd[:, None]
        store_tile(side.out_ptr, acc + bias[None, :], r, ok, cols, W)


@triton.jit
def project_kernel(
    first,
    first_rows,
    second,
    second_rows,
    W0: tl.constexpr,
    W1: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    SHIFT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Project both sides from widths D0 and D1 to W0 and W1; grid (programs of both sides,).

    SHIFT subtracts the mean before the product, so that float32 loses no digits if the mean is
    large. In 16 bit the tokens are rounded already, and the shift would round them again.
    """
    pid = tl.program_id(0)
    if pid < first.programs:
        _project(first, first_rows, pid, W0, D0, SHIFT, BM, BN, BK, UPCAST)
    # Not "else", in which Triton does not reuse the shared memory of the first side.
    if pid >= first.programs:
        _project(second, second_rows, pid - first.programs, W1, D1, SHIFT, BM, BN, BK, UPCAST)
