"""dK and dV of the attention, for any number of queries and keys: BN keys of a head per program."""

from __future__ import annotations

import triton
import triton.language as tl

from ..tiles import LOG2E, dot
from .attend import by_head, keep_probabilities, load_head, mask_rows, store_head
from .tokens import key_rows, sample_rows


@triton.jit
def d_keys(
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
    """Compute dK and dV of BN keys of one head; ``side`` has the queries, ``other`` the keys."""
    tiles = tl.cdiv(keys.length, BN)
    head = pid // tiles % H
    b = pid // (tiles * H)
    first, end = sample_rows(rows, b)
    key, key_end = key_rows(keys, b)
    end_of_sample = sample_rows(keys, b)[1]
    start = pid % tiles * BN
    at = key + start
    if at < end_of_sample:
        j = tl.arange(0, BN)
        there = j < key_end - at
        dk = tl.zeros([BN, BH], tl.float32)
        dv = tl.zeros([BN, BH], tl.float32)
        if at < key_end:
            k = load_head(other.projected_ptr, at, j, there, FIRST_KEY + head * DH, WK, DH, BH)
            v = load_head(
                other.projected_ptr, at, j, there, FIRST_KEY + (H + head) * DH, WK, DH, BH
            )
            n = tl.arange(0, BM)
            for row in range(first, end, BM):
                ok = n < end - row
                lse_at = by_head(rows, head, row) + n
                q = load_head(side.projected_ptr, row, n, ok, head * DH, WQ, DH, BH)
                do = load_head(side.d_attended_ptr, row, n, ok, head * DH, H * DH, DH, BH)
                lse = tl.load(side.lse_ptr + lse_at, mask=ok, other=float("inf"))
                delta = tl.load(side.delta_ptr + lse_at, mask=ok, other=0.0)
                s = dot(k, tl.trans(q), tl.zeros([BN, BM], tl.float32), UPCAST)
                # lse is stored divided by the scale.
                weight = tl.exp2((s - lse[None, :]) * (scale * LOG2E))
                weight = tl.where(there[:, None], weight, 0.0)
                if EXACT:
                    # The second plane of delta holds 1 / sum(P).
                    capacity = by_head(rows, H, 0)
                    weight *= tl.load(side.delta_ptr + capacity + lse_at, mask=ok, other=0.0)[
                        None, :
                    ]
                d_weight = dot(v, tl.trans(do), tl.zeros([BN, BM], tl.float32), UPCAST)
                ds = weight
                if DROPOUT:
                    kept = keep_probabilities(
                        tl.load(seed_ptr),
                        mask_rows(rows, b, head, row + n, ok, H),
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
                    kept = tl.trans(kept.to(tl.int8)) != 0
                    d_weight = tl.where(kept, d_weight / (1.0 - p), 0.0)
                    weight = tl.where(kept, weight / (1.0 - p), 0.0)
                ds = ds * (d_weight - delta[None, :])
                dv = dot(weight.to(do.dtype), do, dv, UPCAST)
                dk = dot(ds.to(q.dtype), q, dk, UPCAST)
        ours = j < end_of_sample - at
        d_k_ptr = other.d_projected_ptr
        store_head(d_k_ptr, dk * scale, at, j, ours, FIRST_KEY + head * DH, WK, DH, BH)
        store_head(d_k_ptr, dv, at, j, ours, FIRST_KEY + (H + head) * DH, WK, DH, BH)


@triton.jit
def d_key_kernel(
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
    """Compute dK and dV of BN keys, 0 for rows that are no keys.

    Grid (B * H * (tiles1 + tiles0),), where side i has tiles_i = cdiv(N_i, BN) tiles of keys; in
    one direction (B * H * tiles1,). Tiles of P and dS are transposed: their rows are keys.
    """
    pid = tl.program_id(0)
    split = second_rows.batch * H * tl.cdiv(second_rows.length, BN)
    if pid < split:
        d_keys(
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
        d_keys(
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
