"""Output projection, dropout, gate, and blend with x.

The output projection and dropout give A. The gate reads [x ; A ; e], where e is the indicator, and
blends A into x (see mmfused/ops/gated_cross_attention/reference.py). A gate per channel needs two
more products, z = x W_gx^T + A W_ga^T + b_g + e w_e. A gate per token, no gate, and the
normalisation after the sum need whole rows instead.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..tiles import dot, rounded_product
from .tokens import (
    add_product,
    count_rows,
    dropout,
    gate_of,
    gate_of_tokens,
    halves,
    load_indicator,
    load_tile,
    load_vector,
    load_weight,
    store_tile,
    tokens_of,
    turns,
)


class Output(NamedTuple):
    """The output projection of one direction; without this direction, the pointers are None."""

    attended_ptr: Tensor | None = None  # (R, D)
    lse_ptr: Tensor | None = None  # (H, capacity) float32; +inf in rows without keys
    weight_ptr: Tensor | None = None  # (D, D)
    bias_ptr: Tensor | None = None  # (D,)
    attn_out_ptr: Tensor | None = None  # (R, D): A


class Gate(NamedTuple):
    """The gate per channel of one direction; without this direction, the pointers are None."""

    x_ptr: Tensor | None = None  # (R, D)
    attn_out_ptr: Tensor | None = None  # (R, D): A
    weight_ptr: Tensor | None = None  # (D, 2 D): [W_gx | W_ga]
    vectors_ptr: Tensor | None = None  # (2, D) float32: bias, with w_e if the rows are dense; w_e
    z_ptr: Tensor | None = None  # (R, D): logits, for the backward
    out_ptr: Tensor | None = None  # (B N, D), in the order of tokens


class Whole(NamedTuple):
    """The blend of whole rows of one direction; without this direction, the pointers are None."""

    x_ptr: Tensor | None = None  # (R, D)
    attn_out_ptr: Tensor | None = None  # (R, D): A
    weight_ptr: Tensor | None = None  # (1, 2 D + 1 with an indicator, else 2 D): gate per token
    bias_ptr: Tensor | None = None  # (1,)
    gamma_ptr: Tensor | None = None  # (D,): normalisation after the sum
    beta_ptr: Tensor | None = None  # (D,)
    moments_ptr: Tensor | None = None  # (2, capacity) float32, written: its moments
    out_ptr: Tensor | None = None  # (B N, D), in the order of tokens
    programs: int = 0


@triton.jit
def _load_lse(
    side,
    rows,
    block,
    count,
    BM: tl.constexpr,
):
    """Return lse of the first head in a block of rows; dense rows always have keys."""
    if rows.token_ptr is not None:
        r = block * BM + tl.arange(0, BM)
        lse = tl.load(side.lse_ptr + r, mask=r < count, other=0.0)
    else:
        lse = tl.zeros([BM], tl.float32)
    return lse


@triton.jit
def _store_out(
    side,
    acc,
    lse,
    bias,
    r,
    ok,
    token,
    start,
    seed_ptr,
    p,
    STREAM: tl.constexpr,
    D: tl.constexpr,
    BN: tl.constexpr,
    PART: tl.constexpr,
):
    """Store BN columns of A from ``start`` on; PART at a time if their bias is not loaded yet."""
    if bias is None and BN > PART:
        left, right = halves(acc)
        _store_out(
            side, left, lse, bias, r, ok, token, start, seed_ptr, p, STREAM, D, BN // 2, PART
        )
        start += BN // 2
        _store_out(
            side, right, lse, bias, r, ok, token, start, seed_ptr, p, STREAM, D, BN // 2, PART
        )
    else:
        cols = start + tl.arange(0, BN)
        if bias is None:
            # After the product, because so large a tile leaves no registers for it.
            bias = load_vector(side.bias_ptr, cols, cols < D)
        a = acc + bias[None, :]
        if seed_ptr is not None:
            a = dropout(a, tl.load(seed_ptr), token, start, p, STREAM, BN)
        a = tl.where((lse < float("inf"))[:, None], a, 0.0)
        store_tile(side.attn_out_ptr, a, r, ok, cols, D)


@triton.jit
def _out(
    side,
    rows,
    done,
    seed_ptr,
    p,
    STREAM: tl.constexpr,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PART: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Compute A in one direction; return the number of its tiles."""
    KEEP: tl.constexpr = BK >= D
    BLOCKS: tl.constexpr = (D + BN - 1) // BN
    k = tl.arange(0, BK)
    bias = None
    if KEEP:
        start = tl.program_id(0) % BLOCKS * BN
        w = load_weight(side.weight_ptr, 0, start, D, D, 1, D, BK, BN)
        cols = start + tl.arange(0, BN)
        bias = load_vector(side.bias_ptr, cols, cols < D)
    count = count_rows(rows)
    first, tiles, step = turns(rows, done, BM, BLOCKS, KEEP)
    if KEEP:
        # Of the next block of rows, because a product is too short to hide the latency.
        next_lse = _load_lse(side, rows, first // BLOCKS, count, BM)
    for tile in tl.range(first, tiles, step, flatten=not KEEP):
        start = tile % BLOCKS * BN
        r = tile // BLOCKS * BM + tl.arange(0, BM)
        ok = r < count
        token = tokens_of(rows, r, ok)
        if KEEP:
            lse = next_lse
            next_lse = _load_lse(side, rows, (tile + step) // BLOCKS, count, BM)
        else:  # in a flattened loop, Triton mixes up values that pass from one tile to the next
            lse = _load_lse(side, rows, tile // BLOCKS, count, BM)
        acc = tl.zeros([BM, BN], tl.float32)
        if KEEP:
            acc = dot(load_tile(side.attended_ptr, r, ok, k, D), w, acc, UPCAST)
        else:
            acc = add_product(
                acc, side.attended_ptr, r, ok, D, side.weight_ptr, start, D, 1, D, D, BK, UPCAST
            )
        _store_out(side, acc, lse, bias, r, ok, token, start, seed_ptr, p, STREAM, D, BN, PART)
    return tiles


@triton.jit
def out_kernel(
    first,
    first_rows,
    second,
    second_rows,
    seed_ptr,  # (1,) int64, None without dropout
    p,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PART: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Compute A = dropout(attended W_o^T + b_o) of both directions; grid (programs,).

    A is 0 in rows without keys.
    """
    done = _out(first, first_rows, 0, seed_ptr, p, 1, D, BM, BN, BK, PART, UPCAST)
    if second.attended_ptr is not None:
        _out(second, second_rows, done, seed_ptr, p, 3, D, BM, BN, BK, PART, UPCAST)


@triton.jit
def _store_blend(
    side,
    product,
    e,
    r,
    ok,
    token,
    start,
    D: tl.constexpr,
    BN: tl.constexpr,
    PART: tl.constexpr,
):
    """Blend BN columns from ``start`` on, and store the gate logits z and the output.

    PART columns at a time, so that x and A take few registers beside the product.
    """
    if BN > PART:
        left, right = halves(product)
        _store_blend(side, left, e, r, ok, token, start, D, BN // 2, PART)
        _store_blend(side, right, e, r, ok, token, start + BN // 2, D, BN // 2, PART)
    else:
        cols = start + tl.arange(0, BN)
        x = load_tile(side.x_ptr, r, ok, cols, D)
        a = load_tile(side.attn_out_ptr, r, ok, cols, D)
        bias = load_vector(side.vectors_ptr, cols, cols < D)[None, :]
        if e is not None:
            # Before the product is added, so that samples that are present get the same bits as
            # without masks, where prepare.py has added w_e.
            bias += e[:, None] * load_vector(side.vectors_ptr + D, cols, cols < D)[None, :]
        z = product + bias
        g, rest = gate_of(z)
        store_tile(side.z_ptr, z, r, ok, cols, D)
        store_tile(side.out_ptr, g * a + rest * x, token, ok, cols, D)


@triton.jit
def _gate(
    side,
    rows,
    other,
    done,
    D: tl.constexpr,
    INDICATOR: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PART: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Blend the rows of one direction; return the number of its tiles."""
    BLOCKS: tl.constexpr = (D + BN - 1) // BN
    TERMS: tl.constexpr = (D + BK - 1) // BK * BK
    count = count_rows(rows)
    first, tiles, step = turns(rows, done, BM, BLOCKS, False)
    for tile in tl.range(first, tiles, step, flatten=True):
        start = tile % BLOCKS * BN
        r = tile // BLOCKS * BM + tl.arange(0, BM)
        ok = r < count
        z = tl.zeros([BM, BN], tl.float32)
        # One loop over the terms of x and then of A, because Triton flattens only one.
        for at in range(0, 2 * TERMS, BK):
            half = at // TERMS
            k = at - half * TERMS
            a_ptr = tl.where(half == 0, side.x_ptr, side.attn_out_ptr)
            a = load_tile(a_ptr, r, ok, k + tl.arange(0, BK), D)
            w = load_weight(side.weight_ptr + half * D, k, start, D, D, 1, 2 * D, BK, BN)
            z = dot(a, w, z, UPCAST)
        token = tokens_of(rows, r, ok)
        e = None
        if INDICATOR:
            if other.present_ptr is not None:
                e = load_indicator(other, token // rows.length, ok)
        _store_blend(side, z, e, r, ok, token, start, D, BN, PART)
    return tiles


@triton.jit
def gate_kernel(
    first,
    first_rows,
    second,
    second_rows,
    D: tl.constexpr,
    INDICATOR: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PART: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Compute the output with a gate per channel, in both directions; grid (programs,)."""
    done = _gate(first, first_rows, second_rows, 0, D, INDICATOR, BM, BN, BK, PART, UPCAST)
    if second.x_ptr is not None:
        _gate(second, second_rows, first_rows, done, D, INDICATOR, BM, BN, BK, PART, UPCAST)


@triton.jit
def _rows(
    side,
    rows,
    other,
    pid,
    eps,
    D: tl.constexpr,
    GATE: tl.constexpr,
    INDICATOR: tl.constexpr,
    POSTNORM: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Blend whole rows in one direction; program ``pid`` of this direction."""
    cols = tl.arange(0, BN)
    if GATE == "token":
        wx = load_vector(side.weight_ptr, cols, cols < D)
        wa = load_vector(side.weight_ptr + D, cols, cols < D)
    if POSTNORM:
        gamma = load_vector(side.gamma_ptr, cols, cols < D)
        beta = load_vector(side.beta_ptr, cols, cols < D)
    count = count_rows(rows)
    for block in tl.range(pid, tl.cdiv(count, BM), side.programs):
        r = block * BM + tl.arange(0, BM)
        ok = r < count
        token = tokens_of(rows, r, ok)
        x = load_tile(side.x_ptr, r, ok, cols, D).to(tl.float32)
        a = load_tile(side.attn_out_ptr, r, ok, cols, D).to(tl.float32)
        if GATE == "token":
            b = token // rows.length
            g, rest = gate_of_tokens(
                side, other, x, a, wx[None, :], wa[None, :], b, ok, D, INDICATOR
            )
            value = g[:, None] * a + rest[:, None] * x
        else:
            value = x + a
        if POSTNORM:
            mean = tl.sum(value, 1) / D
            centred = tl.where((cols < D)[None, :], value - mean[:, None], 0.0)
            rstd = 1.0 / tl.sqrt(tl.sum(rounded_product(centred, centred), 1) / D + eps)
            tl.store(side.moments_ptr + r, mean, mask=ok)
            tl.store(side.moments_ptr + rows.batch * rows.length + r, rstd, mask=ok)
            value = centred * rstd[:, None] * gamma[None, :] + beta[None, :]
        store_tile(side.out_ptr, value, token, ok, cols, D)


@triton.jit
def rows_kernel(
    first,
    first_rows,
    second,
    second_rows,
    eps,
    D: tl.constexpr,
    GATE: tl.constexpr,
    INDICATOR: tl.constexpr,
    POSTNORM: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Compute the output with a gate per token ("token") or no gate ("none"), in both directions.

    Grid (programs of both,). BN is at least D.
    """
    pid = tl.program_id(0)
    if pid < first.programs:
        _rows(first, first_rows, second_rows, pid, eps, D, GATE, INDICATOR, POSTNORM, BM, BN)
    if second.x_ptr is not None:
        if pid >= first.programs:
            pid -= first.programs
            _rows(second, second_rows, first_rows, pid, eps, D, GATE, INDICATOR, POSTNORM, BM, BN)
