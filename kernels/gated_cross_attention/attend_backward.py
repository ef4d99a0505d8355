"""Backward of the attention of both directions.

P are the probabilities, scale is 1 / sqrt(d), and * is elementwise. E is the dropout mask divided
by 1 - p, or 1 without dropout.

    dP = E * (dO V^T)     delta = rowsum(dO * O)     dS = P * (dP - delta)
    dQ = scale dS K       dK = scale dS^T Q          dV = (E * P)^T dO

There are no atomics: one launch computes dQ, BM queries of a head per program, and another launch
computes dK and dV, BN keys of a head per program.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..tiles import LOG2E, dot, philox_keep, rounded_product
from .attend import load_head, place, store_head
from .tokens import key_span, pick, valid_keys, valid_span


@triton.jit
def _tile(
    q,
    do,
    k_ptr,
    seed_ptr,
    lse,
    lse_at,
    direction,
    b,
    M,
    head,
    start,
    hi,
    scale,
    p,
    masks,
    H: tl.constexpr,
    DH: tl.constexpr,
    WK: tl.constexpr,
    FIRST_KEY: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BH: tl.constexpr,
    IGNORE: tl.constexpr,
    DROPOUT: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Return P and dP of these queries and BN keys from ``start`` on, and the keys.

    ``lse`` is stored divided by the scale (see attend.py).
    """
    j = start + tl.arange(0, BN)
    k = load_head(k_ptr, b * M + j, j < hi, FIRST_KEY + head * DH, WK, DH, BH)
    v = load_head(k_ptr, b * M + j, j < hi, FIRST_KEY + (H + head) * DH, WK, DH, BH)
    keep = valid_keys(1 - direction, b * M + j, j < hi, masks, IGNORE)
    s = dot(q, tl.trans(k), tl.zeros([BM, BN], tl.float32), UPCAST)
    weight = tl.where(keep[None, :], tl.exp2((s - lse[:, None]) * (scale * LOG2E)), 0.0)
    d_weight = dot(do, tl.trans(v), tl.zeros([BM, BN], tl.float32), UPCAST)
    if DROPOUT:
        d_weight = tl.where(
            philox_keep(tl.load(seed_ptr), lse_at, start, p, 2 * direction, BN),
            d_weight / (1.0 - p),
            0.0,
        )
    return weight, d_weight, k


@triton.jit
def d_query_kernel(
    projected0_ptr,
    projected1_ptr,
    attended0_ptr,
    attended1_ptr,
    d_attended0_ptr,
    d_attended1_ptr,
    lse0_ptr,
    lse1_ptr,
    delta0_ptr,
    delta1_ptr,
    d_projected0_ptr,
    d_projected1_ptr,
    ignore0_ptr,
    ignore1_ptr,
    absent0_ptr,
    absent1_ptr,
    seed_ptr,
    B,
    N0,
    N1,
    tiles,
    scale,
    p,
    H: tl.constexpr,
    DH: tl.constexpr,
    WQ: tl.constexpr,
    WK: tl.constexpr,
    FIRST_KEY: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BH: tl.constexpr,
    IGNORE: tl.constexpr,
    ABSENT: tl.constexpr,
    MISSING: tl.constexpr,
    COLLAPSE: tl.constexpr,
    DROPOUT: tl.constexpr,
    EXACT: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Compute dQ and delta of BM queries; grid (directions * B * H * tiles,).

    dQ is 0 for fully masked rows. With EXACT (float32), delta is sum(P * dP) / sum(P), and P is
    divided by sum(P), so that dS sums to 0 up to the last digit. delta then has a second plane,
    which holds 1 / sum(P) for d_key_kernel. Without EXACT, delta is rowsum(dO * O) or, for a single
    tile of keys, sum(P * dP) / sum(P).
    """
    direction, b, head, tile = place(tiles, H, B)
    masks = (ignore0_ptr, ignore1_ptr, absent0_ptr, absent1_ptr)
    reverse = direction == 1
    N = pick(reverse, N0, N1)
    M = pick(reverse, N1, N0)
    tile_start = tile * BM
    n = tile_start + tl.arange(0, BM)
    if tile_start < N:
        lo, hi = key_span(direction, b, M, masks, IGNORE, ABSENT, MISSING, COLLAPSE)
        if IGNORE != 0:
            valid_lo, valid_hi = valid_span(direction, b, N, masks, IGNORE)
            hi = tl.where((tile_start < valid_hi) & (tile_start + BM > valid_lo), hi, lo)
        acc = tl.zeros([BM, BH], tl.float32)
        if lo < hi:
            k_ptr = pick(reverse, projected1_ptr, projected0_ptr)
            delta_ptr = pick(reverse, delta0_ptr, delta1_ptr)
            rows = b * N + n
            lse_at = (b * H + head) * N + n
            q = load_head(
                pick(reverse, projected0_ptr, projected1_ptr), rows, n < N, head * DH, WQ, DH, BH
            )
            do = load_head(
                pick(reverse, d_attended0_ptr, d_attended1_ptr),
                rows,
                n < N,
                head * DH,
                H * DH,
                DH,
                BH,
            )
            lse = tl.load(
                pick(reverse, lse0_ptr, lse1_ptr) + lse_at, mask=n < N, other=float("inf")
            )
            # sum(P) is 0 in rows whose lse is inf, but ``total`` is a divisor.
            total = tl.where(lse == float("inf"), 1.0, 0.0)
            if EXACT:
                delta = tl.zeros([BM], tl.float32)
                for start in range(lo // BN * BN, hi, BN):
                    weight, d_weight = _tile(
                        q,
                        do,
                        k_ptr,
                        seed_ptr,
                        lse,
                        lse_at,
                        direction,
                        b,
                        M,
                        head,
                        start,
                        hi,
                        scale,
                        p,
                        masks,
                        H,
                        DH,
                        WK,
                        FIRST_KEY,
                        BM,
                        BN,
                        BH,
                        IGNORE,
                        DROPOUT,
                        UPCAST,
                    )[:2]
                    total += tl.sum(weight, 1)
                    delta += tl.sum(rounded_product(weight, d_weight), 1)
                delta = delta / total
                tl.store(delta_ptr + (B * N).to(tl.int64) * H + lse_at, 1.0 / total, mask=n < N)
            else:
                o = load_head(
                    pick(reverse, attended0_ptr, attended1_ptr),
                    rows,
                    n < N,
                    head * DH,
                    H * DH,
                    DH,
                    BH,
                )
                delta = tl.sum(rounded_product(do.to(tl.float32), o.to(tl.float32)), 1)
                start = lo // BN * BN
                if hi - start <= BN:
                    weight, d_weight = _tile(
                        q,
                        do,
                        k_ptr,
                        seed_ptr,
                        lse,
                        lse_at,
                        direction,
                        b,
                        M,
                        head,
                        start,
                        hi,
                        scale,
                        p,
                        masks,
                        H,
                        DH,
                        WK,
                        FIRST_KEY,
                        BM,
                        BN,
                        BH,
                        IGNORE,
                        DROPOUT,
                        UPCAST,
                    )[:2]
                    delta = tl.sum(rounded_product(weight, d_weight), 1) / (
                        total + tl.sum(weight, 1)
                    )
            tl.store(delta_ptr + lse_at, delta, mask=n < N)
            for start in range(lo // BN * BN, hi, BN):
                weight, d_weight, k = _tile(
                    q,
                    do,
                    k_ptr,
                    seed_ptr,
                    lse,
                    lse_at,
                    direction,
                    b,
                    M,
                    head,
                    start,
                    hi,
                    scale,
                    p,
                    masks,
                    H,
                    DH,
                    WK,
                    FIRST_KEY,
                    BM,
                    BN,
                    BH,
                    IGNORE,
                    DROPOUT,
                    UPCAST,
                )
                ds = weight * (d_weight - delta[:, None])
                if EXACT:
                    ds = ds / total[:, None]
                acc = dot(ds.to(k.dtype), k, acc, UPCAST)
        d_q_ptr = pick(reverse, d_projected0_ptr, d_projected1_ptr)
        store_head(d_q_ptr, acc * scale, b * N + n, n < N, head * DH, WQ, DH, BH)


@triton.jit
def d_key_kernel(
    projected0_ptr,
    projected1_ptr,
    d_attended0_ptr,
    d_attended1_ptr,
    lse0_ptr,
    lse1_ptr,
    delta0_ptr,
    delta1_ptr,
    d_projected0_ptr,
    d_projected1_ptr,
    ignore0_ptr,
    ignore1_ptr,
    absent0_ptr,
    absent1_ptr,
    seed_ptr,
    B,
    N0,
    N1,
    tiles,
    scale,
    p,
    H: tl.constexpr,
    DH: tl.constexpr,
    WQ: tl.constexpr,
    WK: tl.constexpr,
    FIRST_KEY: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BH: tl.constexpr,
    IGNORE: tl.constexpr,
    ABSENT: tl.constexpr,
    MISSING: tl.constexpr,
    COLLAPSE: tl.constexpr,
    DROPOUT: tl.constexpr,
    EXACT: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Compute dK and dV of BN keys, 0 for masked keys; grid (directions * B * H * tiles,).

    Tiles of P and dS are transposed: their rows are keys.
    """
    direction, b, head, tile = place(tiles, H, B)
    masks = (ignore0_ptr, ignore1_ptr, absent0_ptr, absent1_ptr)
    reverse = direction == 1
    N = pick(reverse, N0, N1)
    M = pick(reverse, N1, N0)
    tile_start = tile * BN
    j = tile_start + tl.arange(0, BN)
    if tile_start < M:
        lo, hi = key_span(direction, b, M, masks, IGNORE, ABSENT, MISSING, COLLAPSE)
        dk = tl.zeros([BN, BH], tl.float32)
        dv = tl.zeros([BN, BH], tl.float32)
        if (tile_start < hi) & (tile_start + BN > lo):
            valid_lo, valid_hi = valid_span(direction, b, N, masks, IGNORE)
            q_ptr = pick(reverse, projected0_ptr, projected1_ptr)
            k_ptr = pick(reverse, projected1_ptr, projected0_ptr)
            do_ptr = pick(reverse, d_attended0_ptr, d_attended1_ptr)
            lse_ptr = pick(reverse, lse0_ptr, lse1_ptr)
            delta_ptr = pick(reverse, delta0_ptr, delta1_ptr)
            k = load_head(k_ptr, b * M + j, j < hi, FIRST_KEY + head * DH, WK, DH, BH)
            v = load_head(k_ptr, b * M + j, j < hi, FIRST_KEY + (H + head) * DH, WK, DH, BH)
            keep = valid_keys(1 - direction, b * M + j, j < hi, masks, IGNORE)
            if DROPOUT:
                seed = tl.load(seed_ptr)
            for start in range(valid_lo // BM * BM, valid_hi, BM):
                n = start + tl.arange(0, BM)
                ok = (n >= valid_lo) & (n < valid_hi)
                lse_at = (b * H + head) * N + n
                q = load_head(q_ptr, b * N + n, ok, head * DH, WQ, DH, BH)
                do = load_head(do_ptr, b * N + n, ok, head * DH, H * DH, DH, BH)
                lse = tl.load(lse_ptr + lse_at, mask=ok, other=float("inf"))
                delta = tl.load(delta_ptr + lse_at, mask=ok, other=0.0)
                s = dot(k, tl.trans(q), tl.zeros([BN, BM], tl.float32), UPCAST)
                # lse is stored divided by the scale.
                weight = tl.where(keep[:, None], tl.exp2((s - lse[None, :]) * (scale * LOG2E)), 0.0)
                if EXACT:
                    # The second plane of delta holds 1 / sum(P).
                    weight *= tl.load(
                        delta_ptr + (B * N).to(tl.int64) * H + lse_at, mask=ok, other=0.0
                    )[None, :]
                d_weight = dot(v, tl.trans(do), tl.zeros([BN, BM], tl.float32), UPCAST)
                ds = weight
                if DROPOUT:
                    kept = (
                        tl.trans(
                            philox_keep(seed, lse_at, tile_start, p, 2 * direction, BN).to(tl.int8)
                        )
                        != 0
                    )
                    d_weight = tl.where(kept, d_weight / (1.0 - p), 0.0)
                    weight = tl.where(kept, weight / (1.0 - p), 0.0)
                ds = ds * (d_weight - delta[None, :])
                dv = dot(weight.to(do.dtype), do, dv, UPCAST)
                dk = dot(ds.to(q.dtype), q, dk, UPCAST)
        d_k_ptr = pick(reverse, d_projected1_ptr, d_projected0_ptr)
        store_head(d_k_ptr, dk * scale, b * M + j, j < M, FIRST_KEY + head * DH, WK, DH, BH)
        store_head(d_k_ptr, dv, b * M + j, j < M, FIRST_KEY + (H + head) * DH, WK, DH, BH)
