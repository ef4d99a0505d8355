"""Epilogue: output projection, dropout, gate, and blend with x.

The output projection and dropout give A. The gate reads [x ; A ; e], where e is the indicator, and
blends A into x (see mmfused/ops/gated_cross_attention/reference.py).

The gate is not rounded: g and 1 - g = sigmoid(-z) are both computed from the float32 logit z. A is
rounded to the dtype of the tokens and stored in ``attn_out``, which the gate and the backward read.
Unchanged tokens are copied, and their A is 0.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..tiles import philox_keep, rounded_product
from .tokens import add_product, any_of, changed, pick, tile_at


@triton.jit
def has_keys(
    lse_ptr,
    r,
    N,
    ok,
    H: tl.constexpr,
):
    """Return which rows have an unmasked key, that is, an lse (of the first head) below +inf."""
    return ok & (
        tl.load(lse_ptr + (r // N).to(tl.int64) * (H * N) + r % N, mask=ok, other=float("inf"))
        != float("inf")
    )


@triton.jit
def load_tile(
    ptr,
    at,
    cols,
    ok,
    D: tl.constexpr,
):
    """Load (rows, columns) as float32; the rows begin at ``at``."""
    return tl.load(
        ptr + at[:, None] + cols[None, :], mask=ok[:, None] & (cols[None, :] < D), other=0.0
    ).to(tl.float32)


@triton.jit
def load_vector(ptr, cols, width):
    """Load a vector as float32, 0 from ``width`` on; a bias that is not given has width 0."""
    return tl.load(ptr + cols, mask=cols < width, other=0.0).to(tl.float32)


@triton.jit
def dropped(
    value,
    seed_ptr,
    r,
    first,
    p,
    stream,
    BN: tl.constexpr,
):
    """Apply dropout to the rows r and the columns from ``first``."""
    keep = philox_keep(tl.load(seed_ptr), r, first, p, stream, BN)
    return tl.where(keep, value, 0.0) / (1.0 - p)


@triton.jit
def store_kept(
    acc,
    has_keys_rows,
    attn_out_ptr,
    b_ptr,
    biased,
    seed_ptr,
    r,
    R,
    first,
    p,
    direction,
    D: tl.constexpr,
    BN: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    """Compute A from ``acc``, the product with W_o, and store BN columns of A from ``first`` on."""
    cols = first + tl.arange(0, BN)
    acc = tl.where(has_keys_rows[:, None], acc + load_vector(b_ptr, cols, biased * D)[None, :], 0.0)
    if DROPOUT:
        acc = dropped(acc, seed_ptr, r, first, p, 2 * direction + 1, BN)
    tl.store(attn_out_ptr + tile_at(r, cols, D), acc, mask=(r < R)[:, None] & (cols[None, :] < D))


@triton.jit
def gate_logits(
    x_ptr,
    x_at,
    attn_out_ptr,
    w_ptr,
    w_whole_ptr,
    b_ptr,
    biased,
    flag_ptr,
    r,
    N,
    ok,
    cols,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    INDICATOR: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Return the gate logits z of the channels ``cols``.

    ``w_ptr`` (D, 2 D) is W_g without the indicator's column, which is read from ``w_whole_ptr``
    (D, 2 D + 1).
    """
    limit = tl.where(any_of(ok), D, 0)
    z = tl.zeros([BM, BN], tl.float32)
    z = add_product(z, x_ptr, x_at, ok, limit, w_ptr, cols, D, 1, 2 * D, D, BK, UPCAST)
    z = add_product(
        z, attn_out_ptr, r.to(tl.int64) * D, ok, limit, w_ptr + D, cols, D, 1, 2 * D, D, BK, UPCAST
    )
    z += load_vector(b_ptr, cols, biased * D)[None, :]
    if INDICATOR:
        e = tl.load(flag_ptr + r // N, mask=ok, other=0.0)
        z += (
            e[:, None]
            * load_vector(w_whole_ptr + 2 * D, cols * (2 * D + 1), D * (2 * D + 1))[None, :]
        )
    return z


@triton.jit
def token_logit(
    x_ptr,
    x_at,
    attn_out_ptr,
    w_ptr,
    b_ptr,
    biased,
    flag_ptr,
    r,
    N,
    ok,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    INDICATOR: tl.constexpr,
):
    """Return the gate logit z of each of the rows r, for a gate per token."""
    z = tl.zeros([BM], tl.float32)
    for first in range(0, D, BN):
        cols = first + tl.arange(0, BN)
        x = load_tile(x_ptr, x_at, cols, ok, D)
        a = load_tile(attn_out_ptr, r.to(tl.int64) * D, cols, ok, D)
        z += tl.sum(
            x * load_vector(w_ptr, cols, D)[None, :] + a * load_vector(w_ptr + D, cols, D)[None, :],
            1,
        )
    z += tl.load(b_ptr, mask=biased == 1, other=0.0).to(tl.float32)
    if INDICATOR:
        z += tl.load(flag_ptr + r // N, mask=ok, other=0.0) * tl.load(w_ptr + 2 * D).to(tl.float32)
    return z


@triton.jit
def _load_x(
    x_ptr,
    x_at,
    r,
    R,
    cols,
    D: tl.constexpr,
):
    return tl.load(
        x_ptr + x_at[:, None] + cols[None, :],
        mask=(r < R)[:, None] & (cols[None, :] < D),
        other=0.0,
    )


@triton.jit
def _store_out(
    out_ptr,
    value,
    x,
    r,
    R,
    cols,
    ok,
    D: tl.constexpr,
):
    """Store ``value`` if ok, else x, which may be NaN."""
    inside = (r < R)[:, None] & (cols[None, :] < D)
    tl.store(
        out_ptr + tile_at(r, cols, D), tl.where(ok[:, None], value.to(x.dtype), x), mask=inside
    )


@triton.jit
def _blend_rows(
    x_ptr,
    x_at,
    attn_out_ptr,
    out_ptr,
    w_ptr,
    b_ptr,
    biased,
    flag_ptr,
    gamma_ptr,
    beta_ptr,
    moments_ptr,
    r,
    R,
    N,
    ok,
    eps,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    GATE: tl.constexpr,
    INDICATOR: tl.constexpr,
    POSTNORM: tl.constexpr,
):
    """Blend whole rows, BN columns at a time, with one gate per row or without a gate."""
    at = r.to(tl.int64) * D
    if GATE == "token":
        z = token_logit(
            x_ptr,
            x_at,
            attn_out_ptr,
            w_ptr,
            b_ptr,
            biased,
            flag_ptr,
            r,
            N,
            ok,
            D,
            BM,
            BN,
            INDICATOR,
        )
    if POSTNORM:
        mean = tl.zeros([BM], tl.float32)
        for first in range(0, D, BN):
            cols = first + tl.arange(0, BN)
            mean += (
                tl.sum(
                    load_tile(x_ptr, x_at, cols, ok, D) + load_tile(attn_out_ptr, at, cols, ok, D),
                    1,
                )
                / D
            )
        variance = tl.zeros([BM], tl.float32)
        for first in range(0, D, BN):
            cols = first + tl.arange(0, BN)
            centred = (
                load_tile(x_ptr, x_at, cols, ok, D)
                + load_tile(attn_out_ptr, at, cols, ok, D)
                - mean[:, None]
            )
            variance += (
                tl.sum(tl.where(cols[None, :] < D, rounded_product(centred, centred), 0.0), 1) / D
            )
        rstd = 1.0 / tl.sqrt(variance + eps)
        tl.store(moments_ptr + r, mean, mask=ok)
        tl.store(moments_ptr + R + r, rstd, mask=ok)
    for first in range(0, D, BN):
        cols = first + tl.arange(0, BN)
        x = _load_x(x_ptr, x_at, r, R, cols, D)
        a = load_tile(attn_out_ptr, at, cols, ok, D)
        if GATE == "token":
            value = tl.sigmoid(z)[:, None] * a + tl.sigmoid(-z)[:, None] * x.to(tl.float32)
        else:
            value = x.to(tl.float32) + a
        if POSTNORM:
            value = (
                (value - mean[:, None]) * rstd[:, None] * load_vector(gamma_ptr, cols, D)[None, :]
            )
            value += load_vector(beta_ptr, cols, D)[None, :]
        _store_out(out_ptr, value, x, r, R, cols, ok, D)


@triton.jit
def blend_tokens(
    x_ptr,
    x_at,
    attn_out_ptr,
    out_ptr,
    w_ptr,
    w_whole_ptr,
    b_ptr,
    biased,
    flag_ptr,
    gamma_ptr,
    beta_ptr,
    moments_ptr,
    r,
    R,
    N,
    ok,
    begin,
    end,
    eps,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GATE: tl.constexpr,
    INDICATOR: tl.constexpr,
    POSTNORM: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Compute the output from A: with a gate per channel columns [begin, end), else whole rows."""
    if GATE == "channel":
        for first in range(begin, end, BN):
            cols = first + tl.arange(0, BN)
            z = gate_logits(
                x_ptr,
                x_at,
                attn_out_ptr,
                w_ptr,
                w_whole_ptr,
                b_ptr,
                biased,
                flag_ptr,
                r,
                N,
                ok,
                cols,
                D,
                BM,
                BN,
                BK,
                INDICATOR,
                UPCAST,
            )
            a = load_tile(attn_out_ptr, r.to(tl.int64) * D, cols, ok, D)
            x = _load_x(x_ptr, x_at, r, R, cols, D)
            _store_out(
                out_ptr, tl.sigmoid(z) * a + tl.sigmoid(-z) * x.to(tl.float32), x, r, R, cols, ok, D
            )
    else:
        _blend_rows(
            x_ptr,
            x_at,
            attn_out_ptr,
            out_ptr,
            w_ptr,
            b_ptr,
            biased,
            flag_ptr,
            gamma_ptr,
            beta_ptr,
            moments_ptr,
            r,
            R,
            N,
            ok,
            eps,
            D,
            BM,
            BN,
            GATE,
            INDICATOR,
            POSTNORM,
        )


@triton.jit
def blend_kernel(
    x0_ptr,
    x1_ptr,
    attended0_ptr,
    attended1_ptr,
    attn_out0_ptr,
    attn_out1_ptr,
    out0_ptr,
    out1_ptr,
    lse0_ptr,
    lse1_ptr,
    wo0_ptr,
    wo1_ptr,
    bo0_ptr,
    bo1_ptr,
    wg0_ptr,
    wg1_ptr,
    whole0_ptr,
    whole1_ptr,
    bg0_ptr,
    bg1_ptr,
    flag0_ptr,
    flag1_ptr,
    gamma0_ptr,
    gamma1_ptr,
    beta0_ptr,
    beta1_ptr,
    moments0_ptr,
    moments1_ptr,
    ignore0_ptr,
    ignore1_ptr,
    absent0_ptr,
    absent1_ptr,
    seed_ptr,
    B,
    N0,
    N1,
    sb0,
    sb1,
    sn0,
    sn1,
    eps,
    p,
    READ: tl.constexpr,
    BLEND: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    BIAS_O: tl.constexpr,
    BIAS_G: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    IGNORE: tl.constexpr,
    ABSENT: tl.constexpr,
    MISSING: tl.constexpr,
    GATE: tl.constexpr,
    INDICATOR: tl.constexpr,
    POSTNORM: tl.constexpr,
    DROPOUT: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Compute A (READ), the output (BLEND), or both; grid (rows / BM [* D / BN], directions).

    With both, a program computes whole rows, BN columns at a time. A is stored and read back, so
    that A is rounded as in two launches.
    """
    direction = tl.program_id(1)
    reverse = direction == 1
    masks = (ignore0_ptr, ignore1_ptr, absent0_ptr, absent1_ptr)
    N = pick(reverse, N0, N1)
    R = B * N
    blocks: tl.constexpr = 1 if READ and BLEND else (D + BN - 1) // BN
    begin = tl.program_id(0) % blocks * BN
    end = begin + (D if READ and BLEND else 1)
    r = tl.program_id(0) // blocks * BM + tl.arange(0, BM)
    if tl.program_id(0) // blocks * BM < R:
        ok = changed(direction, r, N, r < R, masks, IGNORE, ABSENT, MISSING)
        x_ptr = pick(reverse, x0_ptr, x1_ptr)
        x_at = (r // N).to(tl.int64) * pick(reverse, sb0, sb1) + (r % N).to(tl.int64) * pick(
            reverse, sn0, sn1
        )
        attn_out_ptr = pick(reverse, attn_out0_ptr, attn_out1_ptr)
        out_ptr = pick(reverse, out0_ptr, out1_ptr)
        b_ptr = pick(reverse, bg0_ptr, bg1_ptr)
        flag_ptr = pick(reverse, flag0_ptr, flag1_ptr)
        if READ:
            has_keys_rows = has_keys(pick(reverse, lse0_ptr, lse1_ptr), r, N, ok, H)
            limit = tl.where(any_of(has_keys_rows), D, 0)
            for first in range(begin, end, BN):
                acc = add_product(
                    tl.zeros([BM, BN], tl.float32),
                    pick(reverse, attended0_ptr, attended1_ptr),
                    r.to(tl.int64) * D,
                    has_keys_rows,
                    limit,
                    pick(reverse, wo0_ptr, wo1_ptr),
                    first + tl.arange(0, BN),
                    D,
                    1,
                    D,
                    D,
                    BK,
                    UPCAST,
                )
                store_kept(
                    acc,
                    has_keys_rows,
                    attn_out_ptr,
                    pick(reverse, bo0_ptr, bo1_ptr),
                    (BIAS_O >> direction) & 1,
                    seed_ptr,
                    r,
                    R,
                    first,
                    p,
                    direction,
                    D,
                    BN,
                    DROPOUT,
                )
        if READ and BLEND:
            tl.debug_barrier()  # other threads of this program wrote A
        if BLEND:
            blend_tokens(
                x_ptr,
                x_at,
                attn_out_ptr,
                out_ptr,
                pick(reverse, wg0_ptr, wg1_ptr),
                pick(reverse, whole0_ptr, whole1_ptr),
                b_ptr,
                (BIAS_G >> direction) & 1,
                flag_ptr,
                pick(reverse, gamma0_ptr, gamma1_ptr),
                pick(reverse, beta0_ptr, beta1_ptr),
                pick(reverse, moments0_ptr, moments1_ptr),
                r,
                R,
                N,
                ok,
                begin,
                end,
                eps,
                D,
                BM,
                BN,
                BK,
                GATE,
                INDICATOR,
                POSTNORM,
                UPCAST,
            )


@triton.jit
def blend_rows_kernel(
    x0_ptr,
    x1_ptr,
    attn_out0_ptr,
    attn_out1_ptr,
    out0_ptr,
    out1_ptr,
    wg0_ptr,
    wg1_ptr,
    bg0_ptr,
    bg1_ptr,
    flag0_ptr,
    flag1_ptr,
    gamma0_ptr,
    gamma1_ptr,
    beta0_ptr,
    beta1_ptr,
    moments0_ptr,
    moments1_ptr,
    ignore0_ptr,
    ignore1_ptr,
    absent0_ptr,
    absent1_ptr,
    B,
    N0,
    N1,
    sb0,
    sb1,
    sn0,
    sn1,
    eps,
    D: tl.constexpr,
    BIAS_G: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    IGNORE: tl.constexpr,
    ABSENT: tl.constexpr,
    MISSING: tl.constexpr,
    GATE: tl.constexpr,
    INDICATOR: tl.constexpr,
    POSTNORM: tl.constexpr,
):
    """Compute the output from A, unless the gate is per channel; grid (rows / BM, directions)."""
    direction = tl.program_id(1)
    reverse = direction == 1
    masks = (ignore0_ptr, ignore1_ptr, absent0_ptr, absent1_ptr)
    N = pick(reverse, N0, N1)
    R = B * N
    r = tl.program_id(0) * BM + tl.arange(0, BM)
    if tl.program_id(0) * BM < R:
        ok = changed(direction, r, N, r < R, masks, IGNORE, ABSENT, MISSING)
        x_at = (r // N).to(tl.int64) * pick(reverse, sb0, sb1) + (r % N).to(tl.int64) * pick(
            reverse, sn0, sn1
        )
        _blend_rows(
            pick(reverse, x0_ptr, x1_ptr),
            x_at,
            pick(reverse, attn_out0_ptr, attn_out1_ptr),
            pick(reverse, out0_ptr, out1_ptr),
            pick(reverse, wg0_ptr, wg1_ptr),
            pick(reverse, bg0_ptr, bg1_ptr),
            (BIAS_G >> direction) & 1,
            pick(reverse, flag0_ptr, flag1_ptr),
            pick(reverse, gamma0_ptr, gamma1_ptr),
            pick(reverse, beta0_ptr, beta1_ptr),
            pick(reverse, moments0_ptr, moments1_ptr),
            r,
            R,
            N,
            ok,
            eps,
            D,
            BM,
            BN,
            GATE,
            INDICATOR,
            POSTNORM,
        )
