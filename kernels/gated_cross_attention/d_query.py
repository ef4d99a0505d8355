"""dQ of the attention, for any number of queries and keys: BM queries of a head per program."""

from __future__ import annotations

import triton
import triton.language as tl

from ..tiles import LOG2E, dot, rounded_product
from .attend import by_head, keep_probabilities, load_head, mask_rows, store_head
from .tokens import key_rows, sample_rows


@triton.jit
def probabilities(
    q,
    do,
    lse,
    n,
    row,
    end,
    key,
    key_end,
    start,
    rows,
    other,
    keys,
    b,
    head,
    seed_ptr,
    scale,
    p,
    H: tl.constexpr,
    DH: tl.constexpr,
    WK: tl.constexpr,
    FIRST_KEY: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BH: tl.constexpr,
    DIRECTION: tl.constexpr,
    DROPOUT: tl.constexpr,
    HOLES: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Return P and dP of these queries and BN keys from the ``start``-th on, and the keys.

    ``lse`` is stored divided by the scale (see attend.py).
    """
    j = tl.arange(0, BN)
    at = key + start
    there = j < key_end - at
    k = load_head(other.projected_ptr, at, j, there, FIRST_KEY + head * DH, WK, DH, BH)
    v = load_head(other.projected_ptr, at, j, there, FIRST_KEY + (H + head) * DH, WK, DH, BH)
    s = dot(q, tl.trans(k), tl.zeros([BM, BN], tl.float32), UPCAST)
    weight = tl.where(there[None, :], tl.exp2((s - lse[:, None]) * (scale * LOG2E)), 0.0)
    d_weight = dot(do, tl.trans(v), tl.zeros([BM, BN], tl.float32), UPCAST)
    if DROPOUT:
        kept = keep_probabilities(
            tl.load(seed_ptr),
            mask_rows(rows, b, head, row + n, n < end - row, H),
            keys,
            b,
            at + j,
            there,
            start,
            p,
            DIRECTION,
            BN,
            HOLES,
        )
        d_weight = tl.where(kept, d_weight / (1.0 - p), 0.0)
    return weight, d_weight, k


@triton.jit
def d_queries(
    side,
    rows,
    other,
    keys,
    pid,
    seed_ptr,
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
    DIRECTION: tl.constexpr,
    DROPOUT: tl.constexpr,
    HOLES: tl.constexpr,
    EXACT: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Compute dQ and delta of BM queries of one head."""
    tiles = tl.cdiv(rows.length, BM)
    head = pid // tiles % H
    b = pid // (tiles * H)
    first, end = sample_rows(rows, b)
    key, key_end = key_rows(keys, b)
    row = first + pid % tiles * BM
    if row < end:
        n = tl.arange(0, BM)
        ok = n < end - row
        acc = tl.zeros([BM, BH], tl.float32)
        if key < key_end:
            at = by_head(rows, head, row) + n
            q = load_head(side.projected_ptr, row, n, ok, head * DH, WQ, DH, BH)
            do = load_head(side.d_attended_ptr, row, n, ok, head * DH, H * DH, DH, BH)
            lse = tl.load(side.lse_ptr + at, mask=ok, other=float("inf"))
            # sum(P) is 0 in rows beyond the last, but ``total`` is a divisor.
            total = tl.where(ok, 0.0, 1.0)
            if EXACT:
                delta = tl.zeros([BM], tl.float32)
                for start in range(0, key_end - key, BN):
                    weight, d_weight = probabilities(
                        q,
                        do,
                        lse,
                        n,
                        row,
                        end,
                        key,
                        key_end,
                        start,
                        rows,
                        other,
                        keys,
                        b,
                        head,
                        seed_ptr,
                        scale,
                        p,
                        H,
                        DH,
                        WK,
                        FIRST_KEY,
                        BM,
                        BN,
                        BH,
                        DIRECTION,
                        DROPOUT,
                        HOLES,
                        UPCAST,
                    )[:2]
                    total += tl.sum(weight, 1)
                    delta += tl.sum(rounded_product(weight, d_weight), 1)
                delta = delta / total
                capacity = by_head(rows, H, 0)
                tl.store(side.delta_ptr + capacity + at, 1.0 / total, mask=ok)
            else:
                o = load_head(side.attended_ptr, row, n, ok, head * DH, H * DH, DH, BH)
                delta = tl.sum(rounded_product(do.to(tl.float32), o.to(tl.float32)), 1)
                rest = tl.zeros([BM], tl.float32)
                pk = tl.zeros([BM, BH], tl.float32)
            for start in range(0, key_end - key, BN):
                weight, d_weight, k = probabilities(
                    q,
                    do,
                    lse,
                    n,
                    row,
                    end,
                    key,
                    key_end,
                    start,
                    rows,
                    other,
                    keys,
                    b,
                    head,
                    seed_ptr,
                    scale,
                    p,
                    H,
                    DH,
                    WK,
                    FIRST_KEY,
                    BM,
                    BN,
                    BH,
                    DIRECTION,
                    DROPOUT,
                    HOLES,
                    UPCAST,
                )
                if not EXACT:
                    if key_end - key <= BN:  # for one key, delta is exactly dP, and dS is 0
                        delta = tl.sum(rounded_product(weight, d_weight), 1)
                        delta /= total + tl.sum(weight, 1)
                ds = rounded_product(weight, d_weight - delta[:, None])
                if EXACT:
                    ds = ds / total[:, None]
                else:
                    rest += tl.sum(ds, 1)
                    pk = dot(weight.to(k.dtype), k, pk, UPCAST)
                acc = dot(ds.to(k.dtype), k, acc, UPCAST)
            if not EXACT:
                acc -= rest[:, None] * pk
                delta += rest
            tl.store(side.delta_ptr + at, delta, mask=ok)
        store_head(side.d_projected_ptr, acc * scale, row, n, ok, head * DH, WQ, DH, BH)


@triton.jit
def d_query_kernel(
    first,  # AttentionGradients of side 0
    first_rows,
    second,
    second_rows,
    seed_ptr,
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
    DROPOUT: tl.constexpr,
    HOLES: tl.constexpr,
    EXACT: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Compute dQ and delta of BM queries; dQ is 0 for queries without keys.

    Grid (B * H * (tiles0 + tiles1),), where side i has tiles_i = cdiv(N_i, BM) tiles of queries, or
    none. With EXACT (float32), delta is sum(P * dP) / sum(P), and P is divided by sum(P), so that
    dS sums to 0 up to the last digit. delta then has a second plane, which holds 1 / sum(P) for
    d_key_kernel. Without EXACT, delta is sum(P * dP) / sum(P) for a single tile of keys; for
    more tiles it is corrected after the loop (see attend_backward.py).
    """
    pid = tl.program_id(0)
    split = first_rows.batch * H * tl.cdiv(first_rows.length, BM)
    if pid < split:
        d_queries(
            first,
            first_rows,
            second,
            second_rows,
            pid,
            seed_ptr,
            scale,
            p,
            H,
            DH,
            WQ,
            WK,
            FIRST_KEY,
            BM,
            BN,
            BH,
            0,
            DROPOUT,
            HOLES,
            EXACT,
            UPCAST,
        )
    elif second.lse_ptr is not None:
        d_queries(
            second,
            second_rows,
            first,
            first_rows,
            pid - split,
            seed_ptr,
            scale,
            p,
            H,
            DH,
            WQ,
            WK,
            FIRST_KEY,
            BM,
            BN,
            BH,
            1,
            DROPOUT,
            HOLES,
            EXACT,
            UPCAST,
        )
