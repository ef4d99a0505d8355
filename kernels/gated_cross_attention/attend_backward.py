"""Backward of the attention of both directions.

With P the probabilities, E the dropout mask divided by 1 - p (1 without dropout), scale =
1 / sqrt(d), and * for elementwise products:

    dP = E * (dO V^T)     delta = rowsum(dO * O)     dS = P * (dP - delta)
    dQ = scale dS K       dK = scale dS^T Q          dV = (E * P)^T dO

There are no atomics: one launch computes dQ, BM queries of a head per program, and another launch
computes dK and dV, BN keys of a head per program.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..tiles import LOG2E, dot, philox_keep
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
    """Return P and dP of these queries and BN keys from ``start`` on, and the keys."""
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

    dQ is 0 for fully masked rows. With EXACT, for float32, delta and 1 / sum(P) are computed from
    the same P and dP as dS, so that dS sums to 0 and P to 1 up to the last digit. In 16 bits the
    rounding of dS hides such errors. But if there is only one tile of keys, one key may have all
    the probability, so delta is then computed from P and dP too.
    """
    direction, b, head, tile = place(tiles, H, B)
    masks = (ignore0_ptr, ignore1_ptr, absent0_ptr, absent1_ptr)
    back = direction == 1
    N = pick(back, N0, N1)
    M = pick(back, N1, N0)
    first = tile * BM
    n = first + tl.arange(0, BM)
    if first < N:
        lo, hi = key_span(direction, b, M, masks, IGNORE, ABSENT, MISSING, COLLAPSE)
        if IGNORE != 0:
            first_query, past = valid_span(direction, b, N, masks, IGNORE)
            hi = tl.where((first < past) & (first + BM > first_query), hi, lo)
        acc = tl.zeros([BM, BH], tl.float32)
        if lo < hi:
            k_ptr = pick(back, projected1_ptr, projected0_ptr)
            delta_ptr = pick(back, delta0_ptr, delta1_ptr)
            rows = b * N + n
            lse_at = (b * H + head) * N + n
            q = load_head(
                pick(back, projected0_ptr, projected1_ptr), rows, n < N, head * DH, WQ, DH, BH
            )
            do = load_head(
                pick(back, d_attended0_ptr, d_attended1_ptr), rows, n < N, head * DH, H * DH, DH, BH
            )
            lse = tl.load(pick(back, lse0_ptr, lse1_ptr) + lse_at, mask=n < N, other=float("inf"))
            total = tl.where(
                lse == float("inf"), 1.0, 0.0
            )  # not 0 in rows whose lse is inf, because it is a divisor
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
                    delta += tl.sum(weight * d_weight, 1)
                delta = delta / total
                tl.store(delta_ptr + (B * N).to(tl.int64) * H + lse_at, 1.0 / total, mask=n < N)
            else:
                o = load_head(
                    pick(back, attended0_ptr, attended1_ptr), rows, n < N, head * DH, H * DH, DH, BH
                )
                delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
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
                    delta = tl.sum(weight * d_weight, 1) / (total + tl.sum(weight, 1))
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
        d_q_ptr = pick(back, d_projected0_ptr, d_projected1_ptr)
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
    back = direction == 1
    N = pick(back, N0, N1)
    M = pick(back, N1, N0)
    start = tile * BN
    j = start + tl.arange(0, BN)
    if start < M:
        lo, hi = key_span(direction, b, M, masks, IGNORE, ABSENT, MISSING, COLLAPSE)
        dk = tl.zeros([BN, BH], tl.float32)
        dv = tl.zeros([BN, BH], tl.float32)
        if (start < hi) & (start + BN > lo):
            first_query, past = valid_span(direction, b, N, masks, IGNORE)
            q_ptr = pick(back, projected0_ptr, projected1_ptr)
            k_ptr = pick(back, projected1_ptr, projected0_ptr)
            do_ptr = pick(back, d_attended0_ptr, d_attended1_ptr)
            lse_ptr = pick(back, lse0_ptr, lse1_ptr)
            delta_ptr = pick(back, delta0_ptr, delta1_ptr)
            k = load_head(k_ptr, b * M + j, j < hi, FIRST_KEY + head * DH, WK, DH, BH)
            v = load_head(k_ptr, b * M + j, j < hi, FIRST_KEY + (H + head) * DH, WK, DH, BH)
            keep = valid_keys(1 - direction, b * M + j, j < hi, masks, IGNORE)
            if DROPOUT:
                seed = tl.load(seed_ptr)
            for first in range(first_query // BM * BM, past, BM):
                n = first + tl.arange(0, BM)
                ok = (n >= first_query) & (n < past)
                lse_at = (b * H + head) * N + n
                q = load_head(q_ptr, b * N + n, ok, head * DH, WQ, DH, BH)
                do = load_head(do_ptr, b * N + n, ok, head * DH, H * DH, DH, BH)
                lse = tl.load(lse_ptr + lse_at, mask=ok, other=float("inf"))
                delta = tl.load(delta_ptr + lse_at, mask=ok, other=0.0)
                s = dot(k, tl.trans(q), tl.zeros([BN, BM], tl.float32), UPCAST)
                weight = tl.where(keep[:, None], tl.exp2((s - lse[None, :]) * (scale * LOG2E)), 0.0)
                if EXACT:
                    weight *= tl.load(
                        delta_ptr + (B * N).to(tl.int64) * H + lse_at, mask=ok, other=0.0
                    )[None, :]
                d_weight = dot(v, tl.trans(do), tl.zeros([BN, BM], tl.float32), UPCAST)
                ds = weight
                if DROPOUT:
                    kept = (
                        tl.trans(philox_keep(seed, lse_at, start, p, 2 * direction, BN).to(tl.int8))
                        != 0
                    )
                    d_weight = tl.where(kept, d_weight / (1.0 - p), 0.0)
                    weight = tl.where(kept, weight / (1.0 - p), 0.0)
                ds = ds * (d_weight - delta[None, :])
                dv = dot(weight.to(do.dtype), do, dv, UPCAST)
                dk = dot(ds.to(q.dtype), q, dk, UPCAST)
        d_k_ptr = pick(back, d_projected1_ptr, d_projected0_ptr)
        store_head(d_k_ptr, dk * scale, b * M + j, j < M, FIRST_KEY + head * DH, WK, DH, BH)
        store_head(d_k_ptr, dv, b * M + j, j < M, FIRST_KEY + (H + head) * DH, WK, DH, BH)
