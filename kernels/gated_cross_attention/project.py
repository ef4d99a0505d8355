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
from .tokens import count_rows, halves, load_tile, load_weight, store_tile, turns


class Projection(NamedTuple):
    """The projection of one side, whose weights for queries, keys and values are stacked."""

    x_ptr: Tensor  # (R, D)
    moments_ptr: Tensor | None  # (2, capacity) float32: mean, 1 / standard deviation of each row
    weight_ptr: Tensor  # (W, D), folded
    vectors_ptr: Tensor  # (2, W) float32: bias; c1, the sum of each row of the weight
    out_ptr: Tensor  # (R, W)


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
def _store(
    side,
    acc,
    mean,
    rstd,
    bias,
    c1,
    r,
    ok,
    cols,
    W: tl.constexpr,
    SHIFT: tl.constexpr,
):
    """Store projections, whose product with the tokens is ``acc``."""
    if side.moments_ptr is not None:
        if not SHIFT:
            acc -= mean[:, None] * c1[None, :]
        acc *= rstd[:, None]
    store_tile(side.out_ptr, acc + bias[None, :], r, ok, cols, W)


@triton.jit
def _store_parts(
    side,
    acc,
    mean,
    rstd,
    r,
    ok,
    start,
    W: tl.constexpr,
    SHIFT: tl.constexpr,
    BN: tl.constexpr,
    PART: tl.constexpr,
):
    """Store BN columns from ``start`` on, PART at a time, because ``acc`` leaves few registers."""
    if BN > PART:
        left, right = halves(acc)
        _store_parts(side, left, mean, rstd, r, ok, start, W, SHIFT, BN // 2, PART)
        _store_parts(side, right, mean, rstd, r, ok, start + BN // 2, W, SHIFT, BN // 2, PART)
    else:
        cols = start + tl.arange(0, BN)
        bias, c1 = _load_vectors(side, cols, W)
        _store(side, acc, mean, rstd, bias, c1, r, ok, cols, W, SHIFT)


@triton.jit
def _project(
    side,
    rows,
    done,
    W: tl.constexpr,
    D: tl.constexpr,
    SHIFT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PART: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Project the rows of one side; return the number of its tiles."""
    KEEP: tl.constexpr = BK >= D
    BLOCKS: tl.constexpr = (W + BN - 1) // BN
    k = tl.arange(0, BK)
    if KEEP:
        start = tl.program_id(0) % BLOCKS * BN
        cols = start + tl.arange(0, BN)
        w = load_weight(side.weight_ptr, 0, start, D, W, 1, D, BK, BN)
        bias, c1 = _load_vectors(side, cols, W)
    count = count_rows(rows)
    first, tiles, step = turns(rows, done, BM, BLOCKS, KEEP)
    for tile in tl.range(first, tiles, step, flatten=not KEEP):
        r = tile // BLOCKS * BM + tl.arange(0, BM)
        ok = r < count
        acc = tl.zeros([BM, BN], tl.float32)
        mean = None
        rstd = None
        if side.moments_ptr is not None:
            mean, rstd = _load_moments(side, rows, r, ok)
        if KEEP:
            x = load_tile(side.x_ptr, r, ok, k, D)
            if SHIFT:
                x = x - mean[:, None]
            acc = dot(x, w, acc, UPCAST)
            _store(side, acc, mean, rstd, bias, c1, r, ok, cols, W, SHIFT)
        else:
            start = tile % BLOCKS * BN
            for at in range(0, D, BK):
                x = load_tile(side.x_ptr, r, ok, at + k, D)
                if SHIFT:
                    x = x - mean[:, None]
                w = load_weight(side.weight_ptr, at, start, D, W, 1, D, BK, BN)
                acc = dot(x, w, acc, UPCAST)
            _store_parts(side, acc, mean, rstd, r, ok, start, W, SHIFT, BN, PART)
    return tiles


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
    PART: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Project both sides from widths D0 and D1 to W0 and W1; grid (programs,), see Call.programs.

    SHIFT subtracts the mean before the product, so that float32 loses no digits if the mean is
    large. In 16 bit the tokens are rounded already, and the shift would round them again.
    """
    done = _project(first, first_rows, 0, W0, D0, SHIFT, BM, BN, BK, PART, UPCAST)
    _project(second, second_rows, done, W1, D1, SHIFT, BM, BN, BK, PART, UPCAST)
