"""Backward of the projections and the norm: from d_projected to the gradient of the tokens.

The projections' weights W' are multiplied by the norm's weight (see prepare.py), so the gradient of
the normalised rows is dn = d_projected W', and

    dx = dx_part + rstd (dn - mean(dn) - xhat mean(dn xhat))

where xhat are the normalised rows. Up to 256 channels, d_tokens_kernel computes all of it, on tiles
of whole rows. With more channels, such tiles do not fit into registers. Then d_normed_kernel
(products.py) computes dn, and d_tokens_rows_kernel the rest.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..tiles import rounded_product
from .tokens import add_product, count_rows, halves, load_tile, store_tile, tokens_of, turns


class TokenSide(NamedTuple):
    """One side of d_tokens_kernel, or of d_tokens_rows_kernel, which reads dn."""

    d_projected_ptr: Tensor | None  # (capacity, W)
    weight_ptr: Tensor | None  # (W, D): the projections' weights times the norm's weight
    dn_ptr: Tensor | None  # (capacity, D)
    x_ptr: Tensor | None
    moments_ptr: Tensor | None  # mean and rstd (2, capacity) float32; None without pre-norm
    dx_part_ptr: Tensor | None  # (capacity, D); None for a side without queries
    dx_ptr: Tensor | None  # (B, N, D), by token
    normed_ptr: Tensor | None  # (capacity, D): xhat, for the weights' gradients; with pre-norm


@triton.jit
def norm_backward(
    d,
    normed,
    rstd,
    D: tl.constexpr,
):
    """Return the gradient through a norm without weight.

    ``d`` is the gradient of the normalised rows ``normed``, and 0 in columns from D on.
    """
    mean = tl.sum(d, 1) / D
    slope = tl.sum(rounded_product(d, normed), 1) / D
    return (d - mean[:, None] - normed * slope[:, None]) * rstd[:, None]


@triton.jit
def _load_normed(
    side,
    rows,
    r,
    ok,
    cols,
    D: tl.constexpr,
):
    """Return columns of the normalised rows xhat, and 1 / standard deviation of these rows."""
    mean = tl.load(side.moments_ptr + r, mask=ok, other=0.0)
    rstd = tl.load(side.moments_ptr + rows.batch * rows.length + r, mask=ok, other=0.0)
    x = load_tile(side.x_ptr, r, ok, cols, D).to(tl.float32)
    return (x - mean[:, None]) * rstd[:, None], rstd


@triton.jit
def _norm_sums(
    side,
    rows,
    dn,
    r,
    ok,
    start,
    D: tl.constexpr,
    BN: tl.constexpr,
    PART: tl.constexpr,
):
    """Return the sums of dn and of dn xhat over BN columns from ``start`` on, for each row."""
    if BN > PART:
        left, right = halves(dn)
        total, slope = _norm_sums(side, rows, left, r, ok, start, D, BN // 2, PART)
        start += BN // 2
        total2, slope2 = _norm_sums(side, rows, right, r, ok, start, D, BN // 2, PART)
        return total + total2, slope + slope2
    else:
        normed, _ = _load_normed(side, rows, r, ok, start + tl.arange(0, BN), D)
        return tl.sum(dn, 1), tl.sum(rounded_product(dn, normed), 1)


@triton.jit
def _store_parts(
    side,
    rows,
    dn,
    total,
    slope,
    r,
    ok,
    start,
    D: tl.constexpr,
    BN: tl.constexpr,
    PART: tl.constexpr,
):
    """Store dx and xhat of BN columns from ``start`` on; PART columns at a time."""
    if BN > PART:
        left, right = halves(dn)
        _store_parts(side, rows, left, total, slope, r, ok, start, D, BN // 2, PART)
        start += BN // 2
        _store_parts(side, rows, right, total, slope, r, ok, start, D, BN // 2, PART)
    else:
        cols = start + tl.arange(0, BN)
        dx = dn
        if side.moments_ptr is not None:
            normed, rstd = _load_normed(side, rows, r, ok, cols, D)
            store_tile(side.normed_ptr, normed, r, ok, cols, D)
            dx -= (total / D)[:, None] + normed * (slope / D)[:, None]
            dx *= rstd[:, None]
        if side.dx_part_ptr is not None:
            dx += load_tile(side.dx_part_ptr, r, ok, cols, D).to(tl.float32)
        store_tile(side.dx_ptr, dx, tokens_of(rows, r, ok), ok, cols, D)


@triton.jit
def _d_tokens(
    side,
    rows,
    done,
    W: tl.constexpr,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PART: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Compute one side; return the number of its tiles. See d_tokens_kernel."""
    R = count_rows(rows)
    begin, tiles, step = turns(rows, done, BM, 1, False)
    for tile in tl.range(begin, tiles, step, flatten=True):
        r = tile * BM + tl.arange(0, BM)
        ok = r < R
        dn = tl.zeros([BM, BN], tl.float32)
        dn = add_product(
            dn, side.d_projected_ptr, r, ok, W, side.weight_ptr, 0, D, D, 1, W, BK, UPCAST
        )
        total = None
        slope = None
        if side.moments_ptr is not None:
            total, slope = _norm_sums(side, rows, dn, r, ok, 0, D, BN, PART)
        _store_parts(side, rows, dn, total, slope, r, ok, 0, D, BN, PART)
    return tiles


@triton.jit
def d_tokens_kernel(
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
    """Compute dx and xhat from d_projected, BM whole rows at a time; BN is at least D0 and D1.

    Grid (programs,). Side i has Wi columns of projections and tokens of Di channels. The norm's
    part is computed for PART columns at a time.
    """
    done = _d_tokens(first, first_rows, 0, W0, D0, BM, BN, BK, PART, UPCAST)
    _d_tokens(second, second_rows, done, W1, D1, BM, BN, BK, PART, UPCAST)


@triton.jit
def _d_tokens_rows(
    side,
    rows,
    block,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Compute one block of rows of one side; see d_tokens_rows_kernel."""
    R = count_rows(rows)
    if block * BM < R:
        cols = tl.arange(0, BN)
        r = block * BM + tl.arange(0, BM)
        ok = r < R
        dx = load_tile(side.dn_ptr, r, ok, cols, D).to(tl.float32)
        if side.dx_part_ptr is not None:
            part = load_tile(side.dx_part_ptr, r, ok, cols, D).to(tl.float32)
        if side.moments_ptr is not None:
            normed, rstd = _load_normed(side, rows, r, ok, cols, D)
            store_tile(side.normed_ptr, normed, r, ok, cols, D)
            dx = norm_backward(dx, normed, rstd, D)
        if side.dx_part_ptr is not None:
            dx += part
        store_tile(side.dx_ptr, dx, tokens_of(rows, r, ok), ok, cols, D)


@triton.jit
def d_tokens_rows_kernel(
    first,
    first_rows,
    second,
    second_rows,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Compute dx and xhat from dn, BM whole rows at a time; BN is at least D0 and D1.

    Grid (blocks of BM tokens of side 0, then of side 1). Side i has tokens of Di channels.
    """
    block = tl.program_id(0)
    blocks = tl.cdiv(first_rows.batch * first_rows.length, BM)
    if block < blocks:
        _d_tokens_rows(first, first_rows, block, D0, BM, BN)
    else:
        _d_tokens_rows(second, second_rows, block - blocks, D1, BM, BN)
