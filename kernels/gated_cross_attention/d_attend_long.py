"""Backward of the attention where up to 128 tokens stay, and of wider heads; without dropout.

As d_attend_kernel, these kernels compute P and dP once (for the equations see attend_backward.py).
Two accumulators of 128 tokens by 64 columns leave few registers, so:

* all rows of tiles of P and dS are tokens that stay. Thus P and dS are operands of dK and dV, or of
  dQ, without a way through shared memory, and wgmma gets its 64 rows for each group of four warps;
* where the tokens that stay are summed over, the result has at least as many rows as columns;
* delta is rowsum(dO * O). Up to CORRECTED tokens that stay, what remains of dS is subtracted (see
  attend_backward.py); more tokens leave no registers for it, and take the error of the rounded O;
* dP comes before P, so that delta is not kept beside both.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..tiles import LOG2E, dot, rounded_product
from .attend import by_head, load_head, store_head
from .tokens import key_rows, sample_rows

CORRECTED = tl.constexpr(64)


@triton.jit
def sum_over_rows(
    a,
    b,
    M: tl.constexpr,
    N: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Return a^T b of shape (M, N), computed with the longer side as rows."""
    if M >= N:
        product = dot(tl.trans(a), b, tl.zeros([M, N], tl.float32), UPCAST)
    else:
        product = tl.trans(dot(tl.trans(b), a, tl.zeros([N, M], tl.float32), UPCAST))
    return product


@triton.jit
def keys_stay(
    side,
    rows,
    other,
    keys,
    b,
    head,
    scale,
    H: tl.constexpr,
    DH: tl.constexpr,
    WQ: tl.constexpr,
    WK: tl.constexpr,
    FIRST_KEY: tl.constexpr,
    STAY: tl.constexpr,
    STEP: tl.constexpr,
    BH: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Compute dQ, dK and dV of one head. All keys of a sample fit STAY."""
    first, end = sample_rows(rows, b)
    key, key_end = key_rows(keys, b)
    j = tl.arange(0, STAY)
    there = j < key_end - key
    k = load_head(other.projected_ptr, key, j, there, FIRST_KEY + head * DH, WK, DH, BH)
    v = load_head(other.projected_ptr, key, j, there, FIRST_KEY + (H + head) * DH, WK, DH, BH)
    dk = tl.zeros([STAY, BH], tl.float32)
    dv = tl.zeros([STAY, BH], tl.float32)
    n = tl.arange(0, STEP)
    CORRECT: tl.constexpr = STAY <= CORRECTED
    attending = tl.where(key < key_end, end, first)
    # What does not change in the loop is computed again: registers would not hold it.
    for row in tl.range(first, end, STEP, disable_licm=True):
        # Rows that are not ok have q = dO = 0, so they add 0 whatever lse is.
        ok = n < attending - row
        q = load_head(side.projected_ptr, row, n, ok, head * DH, WQ, DH, BH)
        do = load_head(side.d_attended_ptr, row, n, ok, head * DH, H * DH, DH, BH)
        o = load_head(side.attended_ptr, row, n, ok, head * DH, H * DH, DH, BH)
        lse = tl.load(side.lse_ptr + by_head(rows, head, row) + n, mask=ok, other=0.0)
        delta = tl.sum(rounded_product(do.to(tl.float32), o.to(tl.float32)), 1)
        d_weight = dot(v, tl.trans(do), tl.zeros([STAY, STEP], tl.float32), UPCAST)
        d_weight = d_weight - delta[None, :]
        s = dot(k, tl.trans(q), tl.zeros([STAY, STEP], tl.float32), UPCAST)
        # lse is stored divided by the scale (see attend.py).
        weight = tl.exp2((s - lse[None, :]) * (scale * LOG2E))
        weight = tl.where(there[:, None], weight, 0.0)
        dv = dot(weight.to(k.dtype), do, dv, UPCAST)
        ds = rounded_product(weight, d_weight)
        if CORRECT:
            ds -= weight * tl.sum(ds, 0)[None, :]
        ds = ds.to(k.dtype)
        dk = dot(ds, q, dk, UPCAST)
        dq = sum_over_rows(ds, k, STEP, BH, UPCAST)
        store_head(side.d_projected_ptr, dq * scale, row, n, row + n < end, head * DH, WQ, DH, BH)
    there = j < sample_rows(keys, b)[1] - key
    store_head(other.d_projected_ptr, dk * scale, key, j, there, FIRST_KEY + head * DH, WK, DH, BH)
    store_head(other.d_projected_ptr, dv, key, j, there, FIRST_KEY + (H + head) * DH, WK, DH, BH)


@triton.jit
def queries_stay(
    side,
    rows,
    other,
    keys,
    b,
    head,
    scale,
    H: tl.constexpr,
    DH: tl.constexpr,
    WQ: tl.constexpr,
    WK: tl.constexpr,
    FIRST_KEY: tl.constexpr,
    STAY: tl.constexpr,
    STEP: tl.constexpr,
    BH: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Compute dQ, dK and dV of one head. All queries of a sample fit STAY."""
    first, end = sample_rows(rows, b)
    key, key_end = key_rows(keys, b)
    end_of_sample = sample_rows(keys, b)[1]
    n = tl.arange(0, STAY)
    # Rows that are not ok have q = dO = 0, so they add 0 whatever lse is.
    ok = n < tl.where(key < key_end, end, first) - first
    q = load_head(side.projected_ptr, first, n, ok, head * DH, WQ, DH, BH)
    do = load_head(side.d_attended_ptr, first, n, ok, head * DH, H * DH, DH, BH)
    o = load_head(side.attended_ptr, first, n, ok, head * DH, H * DH, DH, BH)
    lse = tl.load(side.lse_ptr + by_head(rows, head, first) + n, mask=ok, other=0.0)
    delta = tl.sum(rounded_product(do.to(tl.float32), o.to(tl.float32)), 1)
    dq = tl.zeros([STAY, BH], tl.float32)
    CORRECT: tl.constexpr = STAY <= CORRECTED
    if CORRECT:
        rest = tl.zeros([STAY], tl.float32)
        pk = tl.zeros([STAY, BH], tl.float32)
    j = tl.arange(0, STEP)
    for row in tl.range(key, end_of_sample, STEP, disable_licm=True):
        there = j < key_end - row
        k = load_head(other.projected_ptr, row, j, there, FIRST_KEY + head * DH, WK, DH, BH)
        v = load_head(other.projected_ptr, row, j, there, FIRST_KEY + (H + head) * DH, WK, DH, BH)
        s = dot(q, tl.trans(k), tl.zeros([STAY, STEP], tl.float32), UPCAST)
        weight = tl.exp2((s - lse[:, None]) * (scale * LOG2E))
        weight = tl.where((row + j < key_end)[None, :], weight, 0.0)
        dv = sum_over_rows(weight.to(k.dtype), do, STEP, BH, UPCAST)
        # Not ``there``: a mask that the loads of a later tile share stays in registers until then.
        ours = row + j < end_of_sample
        store_head(other.d_projected_ptr, dv, row, j, ours, FIRST_KEY + (H + head) * DH, WK, DH, BH)
        d_weight = dot(do, tl.trans(v), tl.zeros([STAY, STEP], tl.float32), UPCAST)
        ds = rounded_product(weight, d_weight - delta[:, None])
        if CORRECT:
            left = tl.sum(ds, 1)
            # A single tile of keys needs no correction later. For one key, dS is exactly 0.
            now = tl.where(key_end - key <= STEP, left, 0.0)
            ds -= weight * now[:, None]
            rest += left - now
            pk = dot(weight.to(k.dtype), k, pk, UPCAST)
        ds = ds.to(k.dtype)
        dk = sum_over_rows(ds, q, STEP, BH, UPCAST)
        dq = dot(ds, k, dq, UPCAST)
        store_head(
            other.d_projected_ptr, dk * scale, row, j, ours, FIRST_KEY + head * DH, WK, DH, BH
        )
    if CORRECT:
        dq -= rest[:, None] * pk
    store_head(side.d_projected_ptr, dq * scale, first, n, n < end - first, head * DH, WQ, DH, BH)


@triton.jit
def d_attend_long_head(
    side,
    rows,
    other,
    keys,
    b,
    head,
    scale,
    H: tl.constexpr,
    DH: tl.constexpr,
    WQ: tl.constexpr,
    WK: tl.constexpr,
    FIRST_KEY: tl.constexpr,
    STAY: tl.constexpr,
    STEP: tl.constexpr,
    BH: tl.constexpr,
    LOOP: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Compute dQ, dK and dV of one head of a sample; they are 0 without queries or keys."""
    if LOOP == "queries":
        keys_stay(
            side,
            rows,
            other,
            keys,
            b,
            head,
            scale,
            H,
            DH,
            WQ,
            WK,
            FIRST_KEY,
            STAY,
            STEP,
            BH,
            UPCAST,
        )
    else:
        queries_stay(
            side,
            rows,
            other,
            keys,
            b,
            head,
            scale,
            H,
            DH,
            WQ,
            WK,
            FIRST_KEY,
            STAY,
            STEP,
            BH,
            UPCAST,
        )


@triton.jit
def d_attend_long_kernel(
    first,  # AttentionGradients of side 0
    first_rows,
    second,
    second_rows,
    scale,
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
    UPCAST: tl.constexpr,
):
    """Compute the backward of one head of a sample and direction; grid (directions * B * H,).

    STAY, STEP and LOOPi are those of d_attend_kernel.
    """
    pid = tl.program_id(0)
    head = pid % H
    b = pid // H % first_rows.batch
    if pid < first_rows.batch * H:
        d_attend_long_head(
            first,
            first_rows,
            second,
            second_rows,
            b,
            head,
            scale,
            H,
            DH,
            WQ,
            WK,
            FIRST_KEY,
            STAY,
            STEP,
            BH,
            LOOP0,
            UPCAST,
        )
    elif second.lse_ptr is not None:
        d_attend_long_head(
            second,
            second_rows,
            first,
            first_rows,
            b,
            head,
            scale,
            H,
            DH,
            WQ,
            WK,
            FIRST_KEY,
            STAY,
            STEP,
            BH,
            LOOP1,
            UPCAST,
        )
