"""Backward of everything except the attention.

y = attended W_o^T + b_o, A = dropout(y) is ``attn_out`` of the forward, g = sigmoid(z) is the gate,
and W_gx and W_ga are the columns of W_g that multiply x and A. dropout' and LN' are the gradients
through dropout and norm. With pre-norm:

    dz = dout (A - x) g (1 - g)     dy = dropout'(g dout + dz W_ga)     d attended = dy W_o
    dx = (1 - g) dout + dz W_gx + LN'(dQ W_q + dK W_k + dV W_v)

For unchanged tokens, dx = dout. g is recomputed. dz, dy and the gradients of the projections are
exactly 0 in rows that the masks exclude, so that plain products over all rows give the gradients of
the weights.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..tiles import rounded_product
from .blend import dropped, gate_logits, has_keys, load_tile, load_vector, token_logit
from .tokens import add_product, any_of, attends, changed, pick, tile_at, valid_keys


@triton.jit
def d_gate_kernel(
    d_out0_ptr,
    d_out1_ptr,
    x0_ptr,
    x1_ptr,
    attn_out0_ptr,
    attn_out1_ptr,
    wg0_ptr,
    wg1_ptr,
    whole0_ptr,
    whole1_ptr,
    bg0_ptr,
    bg1_ptr,
    flag0_ptr,
    flag1_ptr,
    dz0_ptr,
    dz1_ptr,
    dy0_ptr,
    dy1_ptr,
    dx0_ptr,
    dx1_ptr,
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
    D: tl.constexpr,
    BIAS_G: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    IGNORE: tl.constexpr,
    ABSENT: tl.constexpr,
    MISSING: tl.constexpr,
    INDICATOR: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Compute dz of a gate per channel, and the gradients of A and x that do not pass through z.

    Grid (rows / BM * D / BN, directions).
    """
    direction = tl.program_id(1)
    reverse = direction == 1
    masks = (ignore0_ptr, ignore1_ptr, absent0_ptr, absent1_ptr)
    N = pick(reverse, N0, N1)
    R = B * N
    blocks: tl.constexpr = (D + BN - 1) // BN
    cols = tl.program_id(0) % blocks * BN + tl.arange(0, BN)
    r = tl.program_id(0) // blocks * BM + tl.arange(0, BM)
    if tl.program_id(0) // blocks * BM < R:
        ok = changed(direction, r, N, r < R, masks, IGNORE, ABSENT, MISSING)
        at = r.to(tl.int64) * D
        x_ptr = pick(reverse, x0_ptr, x1_ptr)
        x_at = (r // N).to(tl.int64) * pick(reverse, sb0, sb1) + (r % N).to(tl.int64) * pick(
            reverse, sn0, sn1
        )
        attn_out_ptr = pick(reverse, attn_out0_ptr, attn_out1_ptr)
        z = gate_logits(
            x_ptr,
            x_at,
            attn_out_ptr,
            pick(reverse, wg0_ptr, wg1_ptr),
            pick(reverse, whole0_ptr, whole1_ptr),
            pick(reverse, bg0_ptr, bg1_ptr),
            (BIAS_G >> direction) & 1,
            pick(reverse, flag0_ptr, flag1_ptr),
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
        g = tl.sigmoid(z)
        rest = tl.sigmoid(-z)
        d_out = load_tile(pick(reverse, d_out0_ptr, d_out1_ptr), at, cols, r < R, D)
        dz = (
            d_out
            * g
            * rest
            * (load_tile(attn_out_ptr, at, cols, ok, D) - load_tile(x_ptr, x_at, cols, ok, D))
        )
        inside = (r < R)[:, None] & (cols[None, :] < D)
        tl.store(
            pick(reverse, dz0_ptr, dz1_ptr) + tile_at(r, cols, D),
            tl.where(ok[:, None], dz, 0.0),
            mask=inside,
        )
        tl.store(
            pick(reverse, dy0_ptr, dy1_ptr) + tile_at(r, cols, D),
            tl.where(ok[:, None], d_out * g, 0.0),
            mask=inside,
        )
        tl.store(
            pick(reverse, dx0_ptr, dx1_ptr) + tile_at(r, cols, D),
            tl.where(ok[:, None], d_out * rest, d_out),
            mask=inside,
        )


@triton.jit
def through_gate_kernel(
    dz0_ptr,
    dz1_ptr,
    wg0_ptr,
    wg1_ptr,
    dy0_ptr,
    dy1_ptr,
    dx0_ptr,
    dx1_ptr,
    lse0_ptr,
    lse1_ptr,
    ignore0_ptr,
    ignore1_ptr,
    absent0_ptr,
    absent1_ptr,
    seed_ptr,
    B,
    N0,
    N1,
    p,
    H: tl.constexpr,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    IGNORE: tl.constexpr,
    ABSENT: tl.constexpr,
    MISSING: tl.constexpr,
    DROPOUT: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Add the first half of dz W_g to dx and the second half to dy, then apply dropout' to dy.

    Grid (rows / BM * 2 D / BN, directions).
    """
    direction = tl.program_id(1)
    reverse = direction == 1
    masks = (ignore0_ptr, ignore1_ptr, absent0_ptr, absent1_ptr)
    N = pick(reverse, N0, N1)
    R = B * N
    blocks: tl.constexpr = (D + BN - 1) // BN
    half = tl.program_id(0) % (2 * blocks) // blocks
    first = tl.program_id(0) % blocks * BN
    cols = first + tl.arange(0, BN)
    r = tl.program_id(0) // (2 * blocks) * BM + tl.arange(0, BM)
    if tl.program_id(0) // (2 * blocks) * BM < R:
        ok = changed(direction, r, N, r < R, masks, IGNORE, ABSENT, MISSING)
        if any_of(ok):
            at = tile_at(r, cols, D)
            inside = ok[:, None] & (cols[None, :] < D)
            target = pick(
                half == 1, pick(reverse, dx0_ptr, dx1_ptr), pick(reverse, dy0_ptr, dy1_ptr)
            )
            acc = tl.load(target + at, mask=inside, other=0.0).to(tl.float32)
            w_ptr = pick(reverse, wg0_ptr, wg1_ptr) + half * D
            dz_ptr = pick(reverse, dz0_ptr, dz1_ptr)
            acc = add_product(
                acc, dz_ptr, r.to(tl.int64) * D, ok, D, w_ptr, cols, D, 2 * D, 1, D, BK, UPCAST
            )
            if half == 1:
                has_keys_rows = has_keys(pick(reverse, lse0_ptr, lse1_ptr), r, N, ok, H)
                acc = tl.where(has_keys_rows[:, None], acc, 0.0)
                if DROPOUT:
                    acc = dropped(acc, seed_ptr, r, first, p, 2 * direction + 1, BN)
            tl.store(target + at, acc, mask=inside)


@triton.jit
def d_rows_kernel(
    d_out0_ptr,
    d_out1_ptr,
    x0_ptr,
    x1_ptr,
    attn_out0_ptr,
    attn_out1_ptr,
    wg0_ptr,
    wg1_ptr,
    bg0_ptr,
    bg1_ptr,
    flag0_ptr,
    flag1_ptr,
    gamma0_ptr,
    gamma1_ptr,
    moments0_ptr,
    moments1_ptr,
    lse0_ptr,
    lse1_ptr,
    dz0_ptr,
    dz1_ptr,
    dy0_ptr,
    dy1_ptr,
    dx0_ptr,
    dx1_ptr,
    partial0_ptr,
    partial1_ptr,
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
    p,
    H: tl.constexpr,
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
    DROPOUT: tl.constexpr,
):
    """Compute dz, dy and dx, BM whole rows at a time, for a gate per token or without a gate.

    Grid (P, directions). Program i computes the blocks i, i + P, ... With POSTNORM, a program
    stores its sums for the gradients of the norm's weight and bias in partial (2, P, D).
    """
    direction = tl.program_id(1)
    reverse = direction == 1
    masks = (ignore0_ptr, ignore1_ptr, absent0_ptr, absent1_ptr)
    N = pick(reverse, N0, N1)
    R = B * N
    cols = tl.arange(0, BN)
    x_ptr = pick(reverse, x0_ptr, x1_ptr)
    attn_out_ptr = pick(reverse, attn_out0_ptr, attn_out1_ptr)
    w_ptr = pick(reverse, wg0_ptr, wg1_ptr)
    moments_ptr = pick(reverse, moments0_ptr, moments1_ptr)
    d_gamma = tl.zeros([BN], tl.float32)
    d_beta = tl.zeros([BN], tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(R, BM), tl.num_programs(0)):
        r = block * BM + tl.arange(0, BM)
        ok = changed(direction, r, N, r < R, masks, IGNORE, ABSENT, MISSING)
        at = r.to(tl.int64) * D
        x_at = (r // N).to(tl.int64) * pick(reverse, sb0, sb1) + (r % N).to(tl.int64) * pick(
            reverse, sn0, sn1
        )
        d_out = load_tile(pick(reverse, d_out0_ptr, d_out1_ptr), at, cols, r < R, D)
        x = load_tile(x_ptr, x_at, cols, ok, D)
        a = load_tile(attn_out_ptr, at, cols, ok, D)
        if GATE == "token":
            z = token_logit(
                x_ptr,
                x_at,
                attn_out_ptr,
                w_ptr,
                pick(reverse, bg0_ptr, bg1_ptr),
                (BIAS_G >> direction) & 1,
                pick(reverse, flag0_ptr, flag1_ptr),
                r,
                N,
                ok,
                D,
                BM,
                BN,
                INDICATOR,
            )
            dz = tl.sum(rounded_product(d_out, a - x), 1) * tl.sigmoid(z) * tl.sigmoid(-z)
            tl.store(pick(reverse, dz0_ptr, dz1_ptr) + r, tl.where(ok, dz, 0.0), mask=r < R)
            dx = (
                d_out * tl.sigmoid(-z)[:, None] + dz[:, None] * load_vector(w_ptr, cols, D)[None, :]
            )
            dy = (
                d_out * tl.sigmoid(z)[:, None]
                + dz[:, None] * load_vector(w_ptr + D, cols, D)[None, :]
            )
        else:
            dx = d_out
            if POSTNORM:
                mean = tl.load(moments_ptr + r, mask=ok, other=0.0)
                rstd = tl.load(moments_ptr + R + r, mask=ok, other=0.0)
                normed = tl.where(cols[None, :] < D, (x + a - mean[:, None]) * rstd[:, None], 0.0)
                d_gamma += tl.sum(rounded_product(d_out, normed), 0)
                d_beta += tl.sum(tl.where(ok[:, None], d_out, 0.0), 0)
                dx = norm_backward(
                    d_out, normed, rstd, pick(reverse, gamma0_ptr, gamma1_ptr), cols, D
                )
            dy = dx
        has_keys_rows = has_keys(pick(reverse, lse0_ptr, lse1_ptr), r, N, ok, H)
        dy = tl.where(has_keys_rows[:, None], dy, 0.0)
        if DROPOUT:
            dy = dropped(dy, seed_ptr, r, 0, p, 2 * direction + 1, BN)
        inside = (r < R)[:, None] & (cols[None, :] < D)
        tl.store(pick(reverse, dy0_ptr, dy1_ptr) + tile_at(r, cols, D), dy, mask=inside)
        tl.store(
            pick(reverse, dx0_ptr, dx1_ptr) + tile_at(r, cols, D),
            tl.where(ok[:, None], dx, d_out),
            mask=inside,
        )
    if POSTNORM:
        _store_partial(pick(reverse, partial0_ptr, partial1_ptr), d_gamma, d_beta, cols, D)


@triton.jit
def norm_backward(
    d_out,
    normed,
    rstd,
    gamma_ptr,
    cols,
    D: tl.constexpr,
):
    """Return the gradient through a LayerNorm; rows whose rstd is 0 give 0.

    ``normed``: the normalised rows, before weight and bias; 0 in columns from D on.
    """
    d = d_out * load_vector(gamma_ptr, cols, D)[None, :]
    mean = tl.sum(d, 1) / D
    slope = tl.sum(rounded_product(d, normed), 1) / D
    return (d - mean[:, None] - normed * slope[:, None]) * rstd[:, None]


@triton.jit
def _store_partial(
    ptr,
    d_gamma,
    d_beta,
    cols,
    D: tl.constexpr,
):
    row = tl.program_id(0)
    tl.store(ptr + row * D + cols, d_gamma, mask=cols < D)
    tl.store(ptr + (tl.num_programs(0) + row) * D + cols, d_beta, mask=cols < D)


@triton.jit
def d_attended_kernel(
    dy0_ptr,
    dy1_ptr,
    wo0_ptr,
    wo1_ptr,
    d_attended0_ptr,
    d_attended1_ptr,
    ignore0_ptr,
    ignore1_ptr,
    absent0_ptr,
    absent1_ptr,
    B,
    N0,
    N1,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    IGNORE: tl.constexpr,
    ABSENT: tl.constexpr,
    MISSING: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Compute dy W_o, the gradient of ``attended``; grid (rows / BM * D / BN, directions)."""
    direction = tl.program_id(1)
    reverse = direction == 1
    masks = (ignore0_ptr, ignore1_ptr, absent0_ptr, absent1_ptr)
    N = pick(reverse, N0, N1)
    blocks: tl.constexpr = (D + BN - 1) // BN
    cols = tl.program_id(0) % blocks * BN + tl.arange(0, BN)
    r = tl.program_id(0) // blocks * BM + tl.arange(0, BM)
    if tl.program_id(0) // blocks * BM < B * N:
        inside = r < B * N
        ok = valid_keys(
            direction, r, attends(direction, r // N, inside, masks, ABSENT, MISSING), masks, IGNORE
        )
        limit = tl.where(any_of(ok), D, 0)
        acc = tl.zeros([BM, BN], tl.float32)
        dy_ptr = pick(reverse, dy0_ptr, dy1_ptr)
        w_ptr = pick(reverse, wo0_ptr, wo1_ptr)
        acc = add_product(
            acc, dy_ptr, r.to(tl.int64) * D, ok, limit, w_ptr, cols, D, D, 1, D, BK, UPCAST
        )
        out_ptr = pick(reverse, d_attended0_ptr, d_attended1_ptr)
        tl.store(out_ptr + tile_at(r, cols, D), acc, mask=inside[:, None] & (cols[None, :] < D))


@triton.jit
def used(
    side,
    r,
    N,
    ok,
    masks,
    IS_QUERY_SIDE: tl.constexpr,
    READ: tl.constexpr,
    IGNORE: tl.constexpr,
    ABSENT: tl.constexpr,
    MISSING: tl.constexpr,
):
    """Return which rows of a side were projected: to queries, or with READ to keys and values."""
    ok = valid_keys(side, r, ok, masks, IGNORE)
    if IS_QUERY_SIDE and READ:
        return attends(side, r // N, ok, masks, ABSENT, MISSING) | attends(
            1 - side, r // N, ok, masks, ABSENT, MISSING
        )
    else:
        return attends(side if IS_QUERY_SIDE else 1 - side, r // N, ok, masks, ABSENT, MISSING)


@triton.jit
def d_normed_kernel(
    d_projected_ptr,
    w0_ptr,
    w1_ptr,
    w2_ptr,
    d_normed_ptr,
    ignore0_ptr,
    ignore1_ptr,
    absent0_ptr,
    absent1_ptr,
    R,
    N,
    SIDE: tl.constexpr,
    PARTS: tl.constexpr,
    IS_QUERY_SIDE: tl.constexpr,
    READ: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    IGNORE: tl.constexpr,
    ABSENT: tl.constexpr,
    MISSING: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Compute the gradient of one side's normalised tokens; grid (rows / BM * D / BN,)."""
    masks = (ignore0_ptr, ignore1_ptr, absent0_ptr, absent1_ptr)
    blocks: tl.constexpr = (D + BN - 1) // BN
    cols = tl.program_id(0) % blocks * BN + tl.arange(0, BN)
    r = tl.program_id(0) // blocks * BM + tl.arange(0, BM)
    ok = used(SIDE, r, N, r < R, masks, IS_QUERY_SIDE, READ, IGNORE, ABSENT, MISSING)
    limit = tl.where(any_of(ok), C, 0)
    acc = tl.zeros([BM, BN], tl.float32)
    at = r.to(tl.int64) * (PARTS * C)
    acc = add_product(acc, d_projected_ptr, at, ok, limit, w0_ptr, cols, D, D, 1, C, BK, UPCAST)
    if PARTS > 1:
        acc = add_product(
            acc, d_projected_ptr + C, at, ok, limit, w1_ptr, cols, D, D, 1, C, BK, UPCAST
        )
    if PARTS > 2:
        acc = add_product(
            acc, d_projected_ptr + 2 * C, at, ok, limit, w2_ptr, cols, D, D, 1, C, BK, UPCAST
        )
    tl.store(d_normed_ptr + tile_at(r, cols, D), acc, mask=(r < R)[:, None] & (cols[None, :] < D))


@triton.jit
def _first_alone(
    side,
    r,
    N,
    ok,
    masks,
    IGNORE: tl.constexpr,
    ABSENT: tl.constexpr,
):
    """Return ``ok``, set to False for all but the first valid token of an absent side."""
    b = r // N
    gone = ok & (r >= 0)
    if ABSENT != 0:
        given = (ok.to(tl.int32) & (ABSENT >> side)) == 1
        gone = tl.load(tl.where(side == 1, masks[3], masks[2]) + b, mask=given, other=0) != 0
    before = tl.zeros(r.shape, tl.int32)
    if IGNORE != 0:
        for start in range(0, tl.where(any_of(gone), N, 0), 64):
            n = start + tl.arange(0, 64)
            earlier = gone[:, None] & (n[None, :] < (r % N)[:, None])
            before += tl.sum(
                valid_keys(side, (b * N)[:, None] + n[None, :], earlier, masks, IGNORE).to(
                    tl.int32
                ),
                1,
            )
    else:
        before = r % N
    return ok & ((gone == 0) | (before == 0))


@triton.jit
def d_tokens_kernel(
    d_normed_ptr,
    x_ptr,
    gamma_ptr,
    beta_ptr,
    moments_ptr,
    dx_ptr,
    normed_ptr,
    clean_ptr,
    partial_ptr,
    ignore0_ptr,
    ignore1_ptr,
    absent0_ptr,
    absent1_ptr,
    R,
    N,
    stride_b,
    stride_n,
    SIDE: tl.constexpr,
    IS_QUERY_SIDE: tl.constexpr,
    READ: tl.constexpr,
    CLEAN: tl.constexpr,
    NORM: tl.constexpr,
    COLLAPSE: tl.constexpr,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    IGNORE: tl.constexpr,
    ABSENT: tl.constexpr,
    MISSING: tl.constexpr,
):
    """Compute the gradient of one side's tokens from d_normed; grid (P,).

    With IS_QUERY_SIDE, the result is added to dx. For the gradients of the weights, the kernel also
    writes the tokens that were projected (``normed``) and, with CLEAN, the tokens that the gate
    read (``clean``), with 0 in all other rows. For ``partial`` see d_rows_kernel.
    """
    masks = (ignore0_ptr, ignore1_ptr, absent0_ptr, absent1_ptr)
    cols = tl.arange(0, BN)
    d_gamma = tl.zeros([BN], tl.float32)
    d_beta = tl.zeros([BN], tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(R, BM), tl.num_programs(0)):
        r = block * BM + tl.arange(0, BM)
        inside = (r < R)[:, None] & (cols[None, :] < D)
        ok = used(SIDE, r, N, r < R, masks, IS_QUERY_SIDE, READ, IGNORE, ABSENT, MISSING)
        if COLLAPSE and not IS_QUERY_SIDE:
            ok = _first_alone(SIDE, r, N, ok, masks, IGNORE, ABSENT)
        x_at = (r // N).to(tl.int64) * stride_b + (r % N).to(tl.int64) * stride_n
        at = tile_at(r, cols, D)
        if CLEAN:
            seen = changed(SIDE, r, N, r < R, masks, IGNORE, ABSENT, MISSING)
            tl.store(clean_ptr + at, load_tile(x_ptr, x_at, cols, seen, D), mask=inside)
        x = load_tile(x_ptr, x_at, cols, ok, D)
        dx = load_tile(d_normed_ptr, r.to(tl.int64) * D, cols, ok, D)
        if NORM:
            mean = tl.load(moments_ptr + r, mask=ok, other=0.0)
            rstd = tl.load(moments_ptr + R + r, mask=ok, other=0.0)
            normed = tl.where(cols[None, :] < D, (x - mean[:, None]) * rstd[:, None], 0.0)
            d_gamma += tl.sum(rounded_product(dx, normed), 0)
            d_beta += tl.sum(dx, 0)
            dx = norm_backward(dx, normed, rstd, gamma_ptr, cols, D)
            x = (
                normed * load_vector(gamma_ptr, cols, D)[None, :]
                + load_vector(beta_ptr, cols, D)[None, :]
            )
        if IS_QUERY_SIDE:
            dx += tl.load(dx_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx_ptr + at, dx, mask=inside)
        tl.store(normed_ptr + at, tl.where(ok[:, None], x, 0.0), mask=inside)
    if NORM:
        _store_partial(partial_ptr, d_gamma, d_beta, cols, D)
