"""Backward of dropout, gate and norm, on the rows of the queries.

y = attended W_o^T + b_o, A = dropout(y) is ``attn_out`` of the forward, g = sigmoid(z) is the gate,
and W_gx and W_ga are the columns of W_g that multiply x and A. dropout' and LN' are the gradients
through dropout and norm. With pre-norm:

    dz = dout (A - x) g (1 - g)     dy = dropout'(g dout + dz W_ga)     d attended = dy W_o
    dx = (1 - g) dout + dz W_gx + LN'(dQ W_q + dK W_k + dV W_v)

The kernels compute dx without the last term as ``dx_part``; for the last term see d_tokens.py.
products.py computes d attended. All tensors hold rows (see tokens.py), except ``d_out`` and ``dx``,
which hold the tokens (B, N, D).
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..tiles import rounded_product
from .d_tokens import norm_backward
from .tokens import (
    FACTORS,
    dropout,
    gate_of,
    gate_of_tokens,
    load_given,
    load_indicator,
    load_tile,
    load_vector,
    store_tile,
)


class RowSide(NamedTuple):
    """One side of d_rows_kernel.

    ``d_out_ptr`` is None for a side without queries: then only dx is written. Without dz and dy,
    too, only dx is written.
    """

    d_out_ptr: Tensor | None = None  # (B, N, D)
    stride_b: int | None = None  # of d_out
    stride_n: int | None = None
    x_ptr: Tensor | None = None
    attn_out_ptr: Tensor | None = None
    z_ptr: Tensor | None = None  # gate "channel"
    weight_ptr: Tensor | None = None  # gate "token": (1, 2 D), or (1, 2 D + 1) with the indicator
    bias_ptr: Tensor | None = None  # gate "token": (1,), or None
    gamma_ptr: Tensor | None = None  # (D,) with post-norm
    moments_ptr: Tensor | None = None  # with post-norm: mean and rstd of x + A (2, capacity)
    lse_ptr: Tensor | None = None  # (H, capacity)
    place_ptr: Tensor | None = None  # (B N,) int32: the row of each token, or -1; None: row = token
    dz_ptr: Tensor | None = None  # (capacity, D) or (capacity,)
    dy_ptr: Tensor | None = None
    dx_part_ptr: Tensor | None = None
    dx_ptr: Tensor | None = None  # (B, N, D); only tokens without a row are written
    partial_ptr: Tensor | None = None  # (2, programs, D) float32 with post-norm
    factors_ptr: Tensor | None = None  # (R, FACTORS), written: 1 and the indicator of the context
    programs: int = 0


@triton.jit
def d_output(
    dy,
    side,
    rows,
    r,
    token,
    ok,
    first,
    seed_ptr,
    p,
    DIRECTION: tl.constexpr,
    BN: tl.constexpr,
):
    """Return dropout'(dy) for BN columns from ``first`` on; 0 in rows without keys."""
    if rows.start_ptr is not None:
        lse = tl.load(side.lse_ptr + r, mask=ok, other=float("inf"))
        dy = tl.where((lse < float("inf"))[:, None], dy, 0.0)
    if seed_ptr is not None:
        dy = dropout(dy, tl.load(seed_ptr), token, first, p, 2 * DIRECTION + 1, BN)
    return dy


@triton.jit
def _d_token_gate(
    side,
    other,
    d_out,
    x,
    a,
    r,
    ok,
    b,
    cols,
    D: tl.constexpr,
    INDICATOR: tl.constexpr,
):
    """Store dz of a gate per token; return dx_part, and dy before dropout'."""
    w_x = load_vector(side.weight_ptr, cols, cols < D)[None, :]
    w_a = load_vector(side.weight_ptr + D, cols, cols < D)[None, :]
    g, rest = gate_of_tokens(side, other, x, a, w_x, w_a, b, ok, D, INDICATOR)
    dz = tl.sum(rounded_product(d_out, a - x), 1) * g * rest
    tl.store(side.dz_ptr + r, dz.to(side.dz_ptr.dtype.element_ty), mask=ok)
    dx = d_out * rest[:, None] + dz[:, None] * w_x
    return dx, d_out * g[:, None] + dz[:, None] * w_a


@triton.jit
def _store_factors(
    side,
    other,
    r,
    ok,
    b,
):
    """Store the factors by which weights_kernel sums dz, with and without the indicator.

    There the indicator of a row is too far away: two loads, one after the other.
    """
    columns = tl.arange(0, FACTORS)[None, :]
    e = load_indicator(other, b, ok)
    value = tl.where(columns == 0, 1.0, tl.where(columns == 1, e[:, None], 0.0))
    store_tile(side.factors_ptr, value, r, ok, tl.arange(0, FACTORS), FACTORS)


@triton.jit
def _d_rows(
    side,
    rows,
    other,
    program,
    seed_ptr,
    p,
    DIRECTION: tl.constexpr,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    GATE: tl.constexpr,
    INDICATOR: tl.constexpr,
):
    """Compute one side; see d_rows_kernel."""
    cols = tl.arange(0, BN)
    tokens = rows.batch * rows.length
    POSTNORM: tl.constexpr = side.gamma_ptr is not None
    if POSTNORM:
        gamma = load_vector(side.gamma_ptr, cols, cols < D)
        d_gamma = tl.zeros([BN], tl.float32)
        d_beta = tl.zeros([BN], tl.float32)
    for block in range(program, tl.cdiv(tokens, BM), side.programs):
        t = block * BM + tl.arange(0, BM)
        r = t
        ok = t < tokens
        if side.place_ptr is not None:
            r = tl.load(side.place_ptr + t, mask=ok, other=-1)
            left = ok & (r < 0)
            ok = r >= 0
            if side.d_out_ptr is not None:
                given = load_given(
                    side.d_out_ptr, side.stride_b, side.stride_n, rows.length, t, left, cols, D
                )
            else:
                given = tl.zeros([BM, BN], tl.float32)
            store_tile(side.dx_ptr, given, t, left, cols, D)
        if side.dz_ptr is not None or side.dy_ptr is not None:
            d_out = load_given(
                side.d_out_ptr, side.stride_b, side.stride_n, rows.length, t, ok, cols, D
            ).to(tl.float32)
            if GATE == "none" and not POSTNORM:
                dx = d_out
                dy = d_out
            else:
                x = load_tile(side.x_ptr, r, ok, cols, D).to(tl.float32)
                a = load_tile(side.attn_out_ptr, r, ok, cols, D).to(tl.float32)
            if GATE == "channel":
                z = load_tile(side.z_ptr, r, ok, cols, D).to(tl.float32)
                g, rest = gate_of(z)
                store_tile(side.dz_ptr, d_out * (a - x) * (g * rest), r, ok, cols, D)
            if side.factors_ptr is not None:
                _store_factors(side, other, r, ok, t // rows.length)
            if GATE == "token":
                b = t // rows.length
                dx, dy = _d_token_gate(side, other, d_out, x, a, r, ok, b, cols, D, INDICATOR)
            if POSTNORM:
                mean = tl.load(side.moments_ptr + r, mask=ok, other=0.0)
                rstd = tl.load(side.moments_ptr + tokens + r, mask=ok, other=0.0)
                normed = tl.where(cols[None, :] < D, (x + a - mean[:, None]) * rstd[:, None], 0.0)
                d_gamma += tl.sum(rounded_product(d_out, normed), 0)
                d_beta += tl.sum(d_out, 0)
                dx = norm_backward(d_out * gamma[None, :], normed, rstd, D)
                dy = dx
            if GATE != "channel":
                store_tile(side.dx_part_ptr, dx, r, ok, cols, D)
                dy = d_output(dy, side, rows, r, t, ok, 0, seed_ptr, p, DIRECTION, BN)
                store_tile(side.dy_ptr, dy, r, ok, cols, D)
    if POSTNORM:
        at = program * D + cols
        tl.store(side.partial_ptr + at, d_gamma, mask=cols < D)
        tl.store(side.partial_ptr + side.programs * D + at, d_beta, mask=cols < D)


@triton.jit
def d_rows_kernel(
    first,
    first_rows,
    second,
    second_rows,
    seed_ptr,
    p,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    GATE: tl.constexpr,
    INDICATOR: tl.constexpr,
):
    """Compute what each token needs of its own row; BM tokens with all D channels at a time.

    With a gate per channel this is dz. Otherwise it is dx_part and dy, and dz of a gate per token.
    Tokens without a row were returned as they were: their dx is d_out, or 0 on a side without
    queries. Grid (programs of both sides,). With post-norm, a program stores its sums for the
    gradients of the norm's weight and bias in ``partial``, so that the number of programs must
    depend on shapes alone.
    """
    program = tl.program_id(0)
    if program < first.programs:
        _d_rows(
            first, first_rows, second_rows, program, seed_ptr, p, 0, D0, BM, BN, GATE, INDICATOR
        )
    else:
        program -= first.programs
        _d_rows(
            second, second_rows, first_rows, program, seed_ptr, p, 1, D1, BM, BN, GATE, INDICATOR
        )
