"""Backward of the linear layers that nothing else is computed with: plain products of rows."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..tiles import dot
from .tokens import add_product, count_rows, halves, load_tile, load_weight, store_tile, turns


class ProductSide(NamedTuple):
    """One side of d_attended_kernel and d_normed_kernel: out = a w."""

    a_ptr: Tensor | None = None  # (capacity, K)
    weight_ptr: Tensor | None = None  # (K, COLS)
    out_ptr: Tensor | None = None  # (capacity, COLS)


@triton.jit
def _store_parts(
    side,
    acc,
    r,
    ok,
    start,
    COLS: tl.constexpr,
    BN: tl.constexpr,
    PART: tl.constexpr,
):
    """Store BN columns from ``start`` on, PART at a time, because ``acc`` leaves few registers."""
    if BN > PART:
        left, right = halves(acc)
        _store_parts(side, left, r, ok, start, COLS, BN // 2, PART)
        _store_parts(side, right, r, ok, start + BN // 2, COLS, BN // 2, PART)
    else:
        store_tile(side.out_ptr, acc, r, ok, start + tl.arange(0, BN), COLS)


@triton.jit
def product(
    side,
    rows,
    done,
    K: tl.constexpr,
    COLS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PART: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Compute out = a w for the rows of one side; return the number of its tiles."""
    KEEP: tl.constexpr = BK >= K
    BLOCKS: tl.constexpr = (COLS + BN - 1) // BN
    k = tl.arange(0, BK)
    if KEEP:
        start = tl.program_id(0) % BLOCKS * BN
        cols = start + tl.arange(0, BN)
        w = load_weight(side.weight_ptr, 0, start, K, COLS, COLS, 1, BK, BN)
    R = count_rows(rows)
    first, tiles, step = turns(rows, done, BM, BLOCKS, KEEP)
    for tile in tl.range(first, tiles, step, flatten=not KEEP):
        start = tile % BLOCKS * BN
        r = tile // BLOCKS * BM + tl.arange(0, BM)
        ok = r < R
        acc = tl.zeros([BM, BN], tl.float32)
        if KEEP:
            acc = dot(load_tile(side.a_ptr, r, ok, k, K), w, acc, UPCAST)
            store_tile(side.out_ptr, acc, r, ok, cols, COLS)
        else:
            acc = add_product(
                acc, side.a_ptr, r, ok, K, side.weight_ptr, start, COLS, COLS, 1, K, BK, UPCAST
            )
            _store_parts(side, acc, r, ok, start, COLS, BN, PART)
    return tiles


@triton.jit
def d_attended_kernel(
    first,
    first_rows,
    second,
    second_rows,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PART: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Compute dy W_o, the gradient of ``attended``; W_o (D, D); grid (programs,)."""
    done = product(first, first_rows, 0, D, D, BM, BN, BK, PART, UPCAST)
    if second.a_ptr is not None:
        product(second, second_rows, done, D, D, BM, BN, BK, PART, UPCAST)


@triton.jit
def d_normed_kernel(
    first,
    first_rows,
    second,
    second_rows,
    W0: tl.constexpr,
    W1: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PART: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Compute dn = d_projected W'; grid (programs,).

    Side i has Wi columns of projections and tokens of Di channels.
    """
    done = product(first, first_rows, 0, W0, D0, BM, BN, BK, PART, UPCAST)
    product(second, second_rows, done, W1, D1, BM, BN, BK, PART, UPCAST)
