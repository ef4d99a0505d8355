"""Backward of the attention of both directions.

P are the probabilities, scale is 1 / sqrt(d), and * is elementwise. E is the dropout mask divided
by 1 - p, or 1 without dropout.

    dP = E * (dO V^T)     delta = rowsum(dO * O)     dS = P * (dP - delta)
    dQ = scale dS K       dK = scale dS^T Q          dV = (E * P)^T dO

delta is the same as sum(P * dP), but O is rounded to the dtype of the tokens. With the delta of the
rounded O, dS does not sum to 0, and its error has the same sign in many rows of dQ, so that it adds
up in the gradients of w_q and b_q: up to 9 times that of plain PyTorch, in bfloat16. So where
dS' = P * (dP - delta') comes from such a delta', dQ is corrected after the loop by what remains:

    sum(dS') = delta - delta'     dS = dS' - P sum(dS')     dQ = scale (dS' K - sum(dS') P K)

There are no atomics. d_attend_kernel computes P and dP once: it keeps all keys or all queries of a
sample, and loops over tiles of the others. d_attend_long.py does so for wider heads, and for more
tokens that stay. For longer samples, one launch computes dQ (d_query.py), and another launch
computes dK and dV (d_key.py).
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..tiles import LOG2E, dot, rounded_product
from .attend import by_head, keep_probabilities, load_head, mask_rows, store_head
from .tokens import key_rows, sample_rows


class AttentionGradients(NamedTuple):
    """One side of the backward of the attention; None where a side has no queries."""

    projected_ptr: Tensor  # (R, W): queries and/or keys and values
    attended_ptr: Tensor | None  # (R, D)
    d_attended_ptr: Tensor | None  # (R, D)
    lse_ptr: Tensor | None  # (H, capacity) float32
    delta_ptr: Tensor | None  # (1 or 2, H, capacity) float32; None for d_attend_kernel
    d_projected_ptr: Tensor  # (R, W)


@triton.jit
def loop_over_queries(
    side,
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
    WQ: tl.constexpr,
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
    """Compute dQ, dK and dV of one head. All keys of a sample fit BN.

    delta is sum(P * dP) / sum(P), so ``attended`` is not read.
    """
    first, end = sample_rows(rows, b)
    key, key_end = key_rows(keys, b)
    j = tl.arange(0, BN)
    there = j < key_end - key
    k = load_head(other.projected_ptr, key, j, there, FIRST_KEY + head * DH, WK, DH, BH)
    v = load_head(other.projected_ptr, key, j, there, FIRST_KEY + (H + head) * DH, WK, DH, BH)
    dk = tl.zeros([BN, BH], tl.float32)
    dv = tl.zeros([BN, BH], tl.float32)
    n = tl.arange(0, BM)
    attending = tl.where(key < key_end, end, first)
    for row in tl.range(first, end, BM):
        # Rows that are not ok have q = dO = 0, so they add 0 whatever lse is.
        ok = n < attending - row
        q = load_head(side.projected_ptr, row, n, ok, head * DH, WQ, DH, BH)
        do = load_head(side.d_attended_ptr, row, n, ok, head * DH, H * DH, DH, BH)
        lse = tl.load(side.lse_ptr + by_head(rows, head, row) + n, mask=ok, other=0.0)
        s = dot(q, tl.trans(k), tl.zeros([BM, BN], tl.float32), UPCAST)
        # lse is stored divided by the scale (see attend.py).
        weight = tl.exp2((s - lse[:, None]) * (scale * LOG2E))
        weight = tl.where(there[None, :], weight, 0.0)
        dropped = weight
        total = tl.sum(weight, 1)
        d_weight = dot(do, tl.trans(v), tl.zeros([BM, BN], tl.float32), UPCAST)
        if DROPOUT:
            kept = keep_probabilities(
                tl.load(seed_ptr),
                mask_rows(rows, b, head, row + n, ok, H),
                keys,
                b,
                key + j,
                there,
                0,
                p,
                DIRECTION,
                BN,
                HOLES,
            )
            dropped = tl.where(kept, weight / (1.0 - p), 0.0)
            d_weight = tl.where(kept, d_weight / (1.0 - p), 0.0)
        delta = tl.sum(rounded_product(weight, d_weight), 1) / tl.where(total == 0, 1.0, total)
        dv = dot(tl.trans(dropped.to(k.dtype)), do, dv, UPCAST)
        ds = (weight * (d_weight - delta[:, None])).to(k.dtype)
        dk = dot(tl.trans(ds), q, dk, UPCAST)
        dq = dot(ds, k, tl.zeros([BM, BH], tl.float32), UPCAST)
        store_head(side.d_projected_ptr, dq * scale, row, n, row + n < end, head * DH, WQ, DH, BH)
    there = j < sample_rows(keys, b)[1] - key
    store_head(other.d_projected_ptr, dk * scale, key, j, there, FIRST_KEY + head * DH, WK, DH, BH)
    store_head(other.d_projected_ptr, dv, key, j, there, FIRST_KEY + (H + head) * DH, WK, DH, BH)


@triton.jit
def loop_over_keys(
    side,
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
    WQ: tl.constexpr,
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
    """Compute dQ, dK and dV of one head. All queries of a sample fit BM.

    No tile has all keys, so delta comes from the rounded O, and dQ is corrected.
    """
    first, end = sample_rows(rows, b)
    key, key_end = key_rows(keys, b)
    end_of_sample = sample_rows(keys, b)[1]
    n = tl.arange(0, BM)
    # Rows that are not ok have q = dO = 0, so they add 0 whatever lse is.
    ok = n < tl.where(key < key_end, end, first) - first
    q = load_head(side.projected_ptr, first, n, ok, head * DH, WQ, DH, BH)
    do = load_head(side.d_attended_ptr, first, n, ok, head * DH, H * DH, DH, BH)
    o = load_head(side.attended_ptr, first, n, ok, head * DH, H * DH, DH, BH)
    lse = tl.load(side.lse_ptr + by_head(rows, head, first) + n, mask=ok, other=0.0)
    delta = tl.sum(rounded_product(do.to(tl.float32), o.to(tl.float32)), 1)
    dq = tl.zeros([BM, BH], tl.float32)
    pk = tl.zeros([BM, BH], tl.float32)
    rest = tl.zeros([BM], tl.float32)
    j = tl.arange(0, BN)
    for row in tl.range(key, end_of_sample, BN):
        there = j < key_end - row
        k = load_head(other.projected_ptr, row, j, there, FIRST_KEY + head * DH, WK, DH, BH)
        v = load_head(other.projected_ptr, row, j, there, FIRST_KEY + (H + head) * DH, WK, DH, BH)
        s = dot(q, tl.trans(k), tl.zeros([BM, BN], tl.float32), UPCAST)
        weight = tl.exp2((s - lse[:, None]) * (scale * LOG2E))
        weight = tl.where((row + j < key_end)[None, :], weight, 0.0)
        dropped = weight
        if DROPOUT:
            kept = keep_probabilities(
                tl.load(seed_ptr),
                mask_rows(rows, b, head, first + n, ok, H),
                keys,
                b,
                row + j,
                there,
                row - key,
                p,
                DIRECTION,
                BN,
                HOLES,
            )
            dropped = tl.where(kept, weight / (1.0 - p), 0.0)
        dv = dot(tl.trans(dropped.to(k.dtype)), do, tl.zeros([BN, BH], tl.float32), UPCAST)
        # Not ``there``: a mask that the loads of a later tile share stays in registers until then.
        ours = row + j < end_of_sample
        store_head(other.d_projected_ptr, dv, row, j, ours, FIRST_KEY + (H + head) * DH, WK, DH, BH)
        d_weight = dot(do, tl.trans(v), tl.zeros([BM, BN], tl.float32), UPCAST)
        if DROPOUT:
            d_weight = tl.where(kept, d_weight / (1.0 - p), 0.0)
        ds = rounded_product(weight, d_weight - delta[:, None])
        rest += tl.sum(ds, 1)
        ds = ds.to(k.dtype)
        dk = dot(tl.trans(ds), q, tl.zeros([BN, BH], tl.float32), UPCAST)
        dq = dot(ds, k, dq, UPCAST)
        pk = dot(weight.to(k.dtype), k, pk, UPCAST)
        store_head(
            other.d_projected_ptr, dk * scale, row, j, ours, FIRST_KEY + head * DH, WK, DH, BH
        )
    dq -= rest[:, None] * pk
    store_head(side.d_projected_ptr, dq * scale, first, n, n < end - first, head * DH, WQ, DH, BH)


@triton.jit
def d_attend_head(
    side,
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
    WQ: tl.constexpr,
    WK: tl.constexpr,
    FIRST_KEY: tl.constexpr,
    STAY: tl.constexpr,
    STEP: tl.constexpr,
    BH: tl.constexpr,
    LOOP: tl.constexpr,
    DIRECTION: tl.constexpr,
    DROPOUT: tl.constexpr,
    HOLES: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Compute dQ, dK and dV of one head of a sample; they are 0 without queries or keys."""
    if LOOP == "queries":
        loop_over_queries(
            side,
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
            WQ,
            WK,
            FIRST_KEY,
            STEP,
            STAY,
            BH,
            DIRECTION,
            DROPOUT,
            HOLES,
            UPCAST,
        )
    else:
        loop_over_keys(
            side,
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
            WQ,
            WK,
            FIRST_KEY,
            STAY,
            STEP,
            BH,
            DIRECTION,
            DROPOUT,
            HOLES,
            UPCAST,
        )


@triton.jit
def d_attend_kernel(
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
    STAY: tl.constexpr,
    STEP: tl.constexpr,
    LOOP0: tl.constexpr,
    LOOP1: tl.constexpr,
    BH: tl.constexpr,
    DROPOUT: tl.constexpr,
    HOLES: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Compute the backward of one head of a sample and direction; grid (directions * B * H,).

    LOOPi is "queries" if STAY holds all keys of direction i, and "keys" if STAY holds all its
    queries. The loop takes STEP of them at a time.
    """
    pid = tl.program_id(0)
    head = pid % H
    b = pid // H % first_rows.batch
    if pid < first_rows.batch * H:
        d_attend_head(
            first,
            first_rows,
            second,
            second_rows,
            b,
            head,
            seed_ptr,
            scale,
            p,
            H,
            DH,
            WQ,
            WK,
            FIRST_KEY,
            STAY,
            STEP,
            BH,
            LOOP0,
            0,
            DROPOUT,
            HOLES,
            UPCAST,
        )
    elif second.lse_ptr is not None:
        d_attend_head(
            second,
            second_rows,
            first,
            first_rows,
            b,
            head,
            seed_ptr,
            scale,
            p,
            H,
            DH,
            WQ,
            WK,
            FIRST_KEY,
            STAY,
            STEP,
            BH,
            LOOP1,
            1,
            DROPOUT,
            HOLES,
            UPCAST,
        )
