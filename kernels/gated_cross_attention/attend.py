"""Attention of both directions: softmax(Q K^T / sqrt(d)) V for each head.

Exponentials are in base 2. lse, the log-sum-exp of each row, is stored divided by the scale
1 / sqrt(d), because the backward pass subtracts lse from q . k before scaling. For a row without
keys lse is +inf, by which later kernels recognise such rows.

If all keys of a sample fit one tile, the loop over heads loads the next head while it computes.
Else a loop over tiles of keys computes the online softmax.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..tiles import LOG2E, dot, philox_keep
from .tokens import key_rows, sample_rows, tokens_of


class Attention(NamedTuple):
    """One side of the attention; W columns of projections, D of results."""

    projected_ptr: Tensor  # (R, W): queries and/or keys and values
    attended_ptr: Tensor | None  # (R, D); None without queries
    lse_ptr: Tensor | None  # (H, capacity) float32, None without queries


@triton.jit
def head_offsets(
    n,
    W: tl.constexpr,
    BH: tl.constexpr,
):
    """Return offsets (rows, columns) of the rows n of a sample; 32 bits take fewer registers."""
    return n[:, None] * W + tl.arange(0, BH)[None, :]


@triton.jit
def load_head(
    ptr,
    row,
    n,
    ok,
    column,
    W: tl.constexpr,
    DH: tl.constexpr,
    BH: tl.constexpr,
):
    """Load the rows row + n of one head, whose columns begin at ``column``, of W columns."""
    cols = tl.arange(0, BH)
    return tl.load(
        ptr + (tl.cast(row, tl.int64) * W + column) + head_offsets(n, W, BH),
        mask=ok[:, None] & (cols[None, :] < DH),
        other=0.0,
    )


@triton.jit
def store_head(
    ptr,
    value,
    row,
    n,
    ok,
    column,
    W: tl.constexpr,
    DH: tl.constexpr,
    BH: tl.constexpr,
):
    """Store the rows row + n of one head, whose columns begin at ``column``, of W columns."""
    cols = tl.arange(0, BH)
    # Converted before the store, so that the exchange between threads takes half the shared memory.
    tl.store(
        ptr + (tl.cast(row, tl.int64) * W + column) + head_offsets(n, W, BH),
        value.to(ptr.dtype.element_ty),
        mask=ok[:, None] & (cols[None, :] < DH),
    )


@triton.jit
def by_head(rows, head, row):
    """Return the offset of a row of one head in a tensor (H, capacity)."""
    return tl.cast(rows.batch * rows.length, tl.int64) * head + row


@triton.jit
def mask_rows(
    rows,
    b,
    head,
    r,
    ok,
    H: tl.constexpr,
):
    """Return the rows of the dropout mask for the queries r: (b H + head) N + n for token n."""
    return tokens_of(rows, r, ok) + (b * (H - 1) + head) * rows.length


@triton.jit
def keep_elements(
    seed,
    rows,
    columns,
    p,
    stream,
):
    """Return the given rows and columns of mmfused.random.keep_mask.

    Unlike philox_keep, the columns need not be consecutive, so each element is a call of Philox.
    """
    zero = tl.zeros([rows.shape[0], columns.shape[0]], tl.uint32)
    words = tl.philox(
        seed,
        zero + rows[:, None].to(tl.uint32),
        zero + (columns[None, :] // 4).to(tl.uint32),
        zero + stream,
        zero,
    )
    which = columns[None, :] % 4
    low = tl.where(which == 0, words[0], words[1])
    high = tl.where(which == 2, words[2], words[3])
    return tl.uint_to_uniform_float(tl.where(which < 2, low, high)) >= p


@triton.jit
def keep_probabilities(
    seed,
    at,
    keys,
    b,
    j,
    ok,
    start,
    p,
    DIRECTION: tl.constexpr,
    BN: tl.constexpr,
    HOLES: tl.constexpr,
):
    """Return which probabilities dropout keeps: the rows ``at`` of the mask, for BN keys.

    The keys are the rows j of the side ``keys``, from the ``start``-th of sample b on. With HOLES
    they are not consecutive tokens.
    """
    if HOLES:
        token = tokens_of(keys, j, ok) - b * keys.length
        kept = keep_elements(seed, at, token, p, 2 * DIRECTION)
    else:
        kept = philox_keep(seed, at, start, p, 2 * DIRECTION, BN)
    return kept


@triton.jit
def store_attended(
    side,
    rows,
    row,
    n,
    ok,
    head,
    acc,
    largest,
    total,
    scale,
    p,
    H: tl.constexpr,
    DH: tl.constexpr,
    BH: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    """Divide by the sum of the exponentials, and store the result and lse of one head."""
    inverse = 1.0 / total
    if DROPOUT:
        inverse = inverse / (1.0 - p)
    store_head(side.attended_ptr, acc * inverse[:, None], row, n, ok, head * DH, H * DH, DH, BH)
    lse = largest + tl.log2(total) / (scale * LOG2E)
    tl.store(side.lse_ptr + by_head(rows, head, row) + n, lse, mask=ok)


@triton.jit
def attend_queries(
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
    ALL: tl.constexpr,
    BH: tl.constexpr,
    DIRECTION: tl.constexpr,
    DROPOUT: tl.constexpr,
    HOLES: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Compute all heads of BM queries of ``side``; ``keys`` are the rows of the side ``other``."""
    tiles = tl.cdiv(rows.length, BM)
    b = pid // tiles
    first, end = sample_rows(rows, b)
    row = first + pid % tiles * BM
    n = tl.arange(0, BM)
    ok = n < end - row
    if row < end:
        key, key_end = key_rows(keys, b)
        if DROPOUT:
            seed = tl.load(seed_ptr)
        if key >= key_end:
            for head in tl.range(0, H, num_stages=1):
                zero = tl.zeros([BM, BH], tl.float32)
                store_head(side.attended_ptr, zero, row, n, ok, head * DH, H * DH, DH, BH)
                infinite = tl.full([BM], float("inf"), tl.float32)
                tl.store(side.lse_ptr + by_head(rows, head, row) + n, infinite, mask=ok)
        elif ALL > 0:
            j = tl.arange(0, ALL)
            there = j < key_end - key
            for head in tl.range(0, H):
                q = load_head(side.projected_ptr, row, n, ok, head * DH, WQ, DH, BH)
                k = load_head(other.projected_ptr, key, j, there, FIRST_KEY + head * DH, WK, DH, BH)
                v = load_head(
                    other.projected_ptr, key, j, there, FIRST_KEY + (H + head) * DH, WK, DH, BH
                )
                s = dot(q, tl.trans(k), tl.zeros([BM, ALL], tl.float32), UPCAST)
                s = tl.where(there[None, :], s, float("-inf"))
                largest = tl.max(s, 1)
                # Subtract before scaling, because the difference of two close logits is exact.
                weight = tl.exp2((s - largest[:, None]) * (scale * LOG2E))
                total = tl.sum(weight, 1)
                if DROPOUT:
                    kept = keep_probabilities(
                        seed,
                        mask_rows(rows, b, head, row + n, ok, H),
                        keys,
                        b,
                        key + j,
                        there,
                        0,
                        p,
                        DIRECTION,
                        ALL,
                        HOLES,
                    )
                    weight = tl.where(kept, weight, 0.0)
                acc = dot(weight.to(v.dtype), v, tl.zeros([BM, BH], tl.float32), UPCAST)
                store_attended(
                    side, rows, row, n, ok, head, acc, largest, total, scale, p, H, DH, BH, DROPOUT
                )
        else:
            j = tl.arange(0, BN)
            for head in tl.range(0, H, num_stages=1):
                q = load_head(side.projected_ptr, row, n, ok, head * DH, WQ, DH, BH)
                largest = tl.full([BM], float("-inf"), tl.float32)
                total = tl.zeros([BM], tl.float32)
                acc = tl.zeros([BM, BH], tl.float32)
                for start in range(0, key_end - key, BN):
                    at = key + start
                    there = j < key_end - at
                    k = load_head(
                        other.projected_ptr, at, j, there, FIRST_KEY + head * DH, WK, DH, BH
                    )
                    v = load_head(
                        other.projected_ptr, at, j, there, FIRST_KEY + (H + head) * DH, WK, DH, BH
                    )
                    s = dot(q, tl.trans(k), tl.zeros([BM, BN], tl.float32), UPCAST)
                    s = tl.where(there[None, :], s, float("-inf"))
                    # The first key of a tile is always there, so the maximum is finite.
                    larger = tl.maximum(largest, tl.max(s, 1))
                    weight = tl.exp2((s - larger[:, None]) * (scale * LOG2E))
                    alpha = tl.exp2((largest - larger) * (scale * LOG2E))
                    total = total * alpha + tl.sum(weight, 1)
                    if DROPOUT:
                        kept = keep_probabilities(
                            seed,
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
                        weight = tl.where(kept, weight, 0.0)
                    acc = dot(weight.to(v.dtype), v, acc * alpha[:, None], UPCAST)
                    largest = larger
                store_attended(
                    side, rows, row, n, ok, head, acc, largest, total, scale, p, H, DH, BH, DROPOUT
                )


@triton.jit
def attend_kernel(
    first,  # Attention of side 0
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
    ALL0: tl.constexpr,
    ALL1: tl.constexpr,
    BH: tl.constexpr,
    DROPOUT: tl.constexpr,
    HOLES: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Compute the attention of BM queries of a sample, head after head.

    Grid (B * (tiles0 + tiles1),), where side i has tiles_i = cdiv(N_i, BM) tiles of queries, or
    none. Projections have WQ columns on the queries' side and WK on the keys' side, whose keys
    begin at column FIRST_KEY. In direction i, ALLi keys hold all keys of any sample; if ALLi is 0,
    BN keys are loaded at a time.
    """
    pid = tl.program_id(0)
    split = first_rows.batch * tl.cdiv(first_rows.length, BM)
    if pid < split:
        attend_queries(
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
            ALL0,
            BH,
            0,
            DROPOUT,
            HOLES,
            UPCAST,
        )
    elif second.attended_ptr is not None:
        attend_queries(
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
            ALL1,
            BH,
            1,
            DROPOUT,
            HOLES,
            UPCAST,
        )
