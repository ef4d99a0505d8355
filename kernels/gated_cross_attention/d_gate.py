"""Backward of a gate per channel: dy and dx_part from dz; for the equations see gradients.py."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..tiles import dot
from .gradients import d_output
from .tokens import (
    add_product,
    count_rows,
    gate_of,
    halves,
    load_given,
    load_tile,
    load_weight,
    store_tile,
    tokens_of,
    turns,
)


class GateSide(NamedTuple):
    """One direction of d_gate_kernel."""

    dz_ptr: Tensor | None = None
    z_ptr: Tensor | None = None
    d_out_ptr: Tensor | None = None  # (B, N, D)
    stride_b: int | None = None  # of d_out
    stride_n: int | None = None
    weight_ptr: Tensor | None = None  # (D, 2 D): W_g without the indicator's column
    lse_ptr: Tensor | None = None  # (H, capacity)
    dx_part_ptr: Tensor | None = None
    dy_ptr: Tensor | None = None


@triton.jit
def _load_gated(
    side,
    rows,
    token,
    r,
    ok,
    cols,
    D: tl.constexpr,
):
    """Return z and d_out of the rows r, for the channels ``cols``."""
    z = load_tile(side.z_ptr, r, ok, cols, D)
    d_out = load_given(
        side.d_out_ptr, side.stride_b, side.stride_n, rows.length, token, ok, cols, D
    )
    return z, d_out


@triton.jit
def _gated(
    z,
    d_out,
    half,
):
    """Return (1 - g) d_out (half 0) or g d_out (half 1)."""
    g, rest = gate_of(z.to(tl.float32))
    value = d_out.to(tl.float32) * tl.where(half == 0, rest, g)
    # Rounded, so that its exchange between threads, to the layout of a product, takes half as many
    # registers and half the shared memory.
    return value.to(d_out.dtype).to(tl.float32)


@triton.jit
def _store_d_gate(
    side,
    rows,
    acc,
    r,
    token,
    ok,
    half,
    first,
    seed_ptr,
    p,
    DIRECTION: tl.constexpr,
    D: tl.constexpr,
    BN: tl.constexpr,
):
    """Store BN columns of dx_part (half 0) or dy (half 1) from ``acc``, the product with dz."""
    cols = first + tl.arange(0, BN)
    if seed_ptr is None:  # without a branch, which Triton cannot flatten
        if rows.start_ptr is not None:
            lse = tl.load(side.lse_ptr + r, mask=ok, other=float("inf"))
            acc = tl.where((lse < float("inf"))[:, None] | (half == 0), acc, 0.0)
        store_tile(tl.where(half == 0, side.dx_part_ptr, side.dy_ptr), acc, r, ok, cols, D)
    elif half == 0:
        store_tile(side.dx_part_ptr, acc, r, ok, cols, D)
    else:
        acc = d_output(acc, side, rows, r, token, ok, first, seed_ptr, p, DIRECTION, BN)
        store_tile(side.dy_ptr, acc, r, ok, cols, D)


@triton.jit
def _store_parts(
    side,
    rows,
    acc,
    r,
    ok,
    half,
    first,
    seed_ptr,
    p,
    DIRECTION: tl.constexpr,
    D: tl.constexpr,
    BN: tl.constexpr,
    PART: tl.constexpr,
):
    """Add the part of d_out to the product with dz, and store; PART columns at a time."""
    if BN > PART:
        left, right = halves(acc)
        _store_parts(side, rows, left, r, ok, half, first, seed_ptr, p, DIRECTION, D, BN // 2, PART)
        first += BN // 2
        _store_parts(
            side, rows, right, r, ok, half, first, seed_ptr, p, DIRECTION, D, BN // 2, PART
        )
    else:
        token = tokens_of(rows, r, ok)
        z, d_out = _load_gated(side, rows, token, r, ok, first + tl.arange(0, BN), D)
        acc += _gated(z, d_out, half)
        _store_d_gate(side, rows, acc, r, token, ok, half, first, seed_ptr, p, DIRECTION, D, BN)


@triton.jit
def _d_gate(
    side,
    rows,
    done,
    seed_ptr,
    p,
    DIRECTION: tl.constexpr,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PART: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Compute one direction; return the number of its tiles. See d_gate_kernel."""
    KEEP: tl.constexpr = BK >= D
    HALF: tl.constexpr = (D + BN - 1) // BN
    R = count_rows(rows)
    begin, tiles, step = turns(rows, done, BM, 2 * HALF, KEEP)
    if KEEP:
        half = tl.program_id(0) % (2 * HALF) // HALF
        first = tl.program_id(0) % HALF * BN
        cols = first + tl.arange(0, BN)
        k = tl.arange(0, BK)
        w = load_weight(side.weight_ptr + half * D, 0, first, D, D, 2 * D, 1, BK, BN)
        r = begin // (2 * HALF) * BM + tl.arange(0, BM)
        token = tokens_of(rows, r, r < R)
        z, d_out = _load_gated(side, rows, token, r, r < R, cols, D)
        for tile in tl.range(begin, tiles, step):
            r = tile // (2 * HALF) * BM + tl.arange(0, BM)
            ok = r < R
            dz = load_tile(side.dz_ptr, r, ok, k, D)
            acc = dot(dz, w, _gated(z, d_out, half), UPCAST)
            # What is added to the next product is loaded now, because nothing else hides the time
            # that it takes: the compiler prefetches only factors of products. With dropout it is
            # loaded later, because random numbers take the registers.
            next_r = (tile + step) // (2 * HALF) * BM + tl.arange(0, BM)
            next_token = tokens_of(rows, next_r, next_r < R)
            if seed_ptr is None:
                z, d_out = _load_gated(side, rows, next_token, next_r, next_r < R, cols, D)
            _store_d_gate(side, rows, acc, r, token, ok, half, first, seed_ptr, p, DIRECTION, D, BN)
            if seed_ptr is not None:
                z, d_out = _load_gated(side, rows, next_token, next_r, next_r < R, cols, D)
            token = next_token
    else:
        for tile in tl.range(begin, tiles, step, flatten=seed_ptr is None):
            half = tile % (2 * HALF) // HALF
            first = tile % HALF * BN
            r = tile // (2 * HALF) * BM + tl.arange(0, BM)
            ok = r < R
            acc = tl.zeros([BM, BN], tl.float32)
            w_ptr = side.weight_ptr + half * D
            acc = add_product(acc, side.dz_ptr, r, ok, D, w_ptr, first, D, 2 * D, 1, D, BK, UPCAST)
            _store_parts(side, rows, acc, r, ok, half, first, seed_ptr, p, DIRECTION, D, BN, PART)
    return tiles


@triton.jit
def d_gate_kernel(
    first,
    first_rows,
    second,
    second_rows,
    seed_ptr,
    p,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PART: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Compute dx_part and dy of a gate per channel from dz; grid (programs,).

    Of the blocks of columns, the first half computes dx_part, the second half dy.
    """
    done = _d_gate(first, first_rows, 0, seed_ptr, p, 0, D, BM, BN, BK, PART, UPCAST)
    if second.dz_ptr is not None:
        _d_gate(second, second_rows, done, seed_ptr, p, 1, D, BM, BN, BK, PART, UPCAST)
