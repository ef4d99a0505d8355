"""Forward kernels of masked InfoNCE: over each row's allowed pairs but the target, logsumexp, and
for label smoothing and further positives the number and the sum of both; the same for the columns
from the same tiles.

Every program owns its partial results, and a second kernel merges them in a fixed order: no
atomics, bitwise repeatable. Nothing allowed gives logsumexp -inf. FLOPs 2 B C D; tiles of q and c
come out of L2, and B C / BM floats of column partials go through HBM."""

from __future__ import annotations

import triton
import triton.language as tl

from ..tiles import LOG2E, dot
from .pairs import (
    SAFE_BOUND,
    block_range,
    counting_pairs,
    load_block,
    nth_tile,
    products,
    row_vectors,
    visits,
)


@triton.jit
def _exp(x):
    return tl.exp2(x * LOG2E)


@triton.jit
def _finite(m):
    """What to subtract for a maximum m: -inf - -inf would be NaN."""
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def _number_and_sum(s, AXIS: tl.constexpr):
    """Over an axis, of what is not -inf. The mask itself, reduced, would be laid out otherwise than
    s: ten times the registers.
    """
    there = s != float("-inf")
    return tl.sum(tl.where(there, 1.0, 0.0), AXIS), tl.sum(tl.where(there, s, 0.0), AXIS)


@triton.jit
def _add(a, b):
    return a[0] + b[0], a[1] + b[1]


@triton.jit
def _merge(m, total, m_more, total_more):
    """Two partial softmaxes (maximum, sum) of the same row or column; all exponents are at most 0."""
    m_new = tl.maximum(m, m_more)
    shift = _finite(m_new)
    return m_new, total * _exp(m - shift) + total_more * _exp(m_more - shift)


@triton.jit
def _store_softmax(ptr, N, at, m, total, MERGE: tl.constexpr):
    """One program's own maximum and sum of the columns ``at``; with MERGE on top of those of its
    earlier row blocks.
    """
    if MERGE:
        old = tl.load(ptr + at, mask=at < N, other=float("-inf"))
        m, total = _merge(old, tl.load(ptr + N + at, mask=at < N, other=0.0), m, total)
    tl.store(ptr + at, m, mask=at < N)
    tl.store(ptr + N + at, total, mask=at < N)


@triton.jit
def _store_sums(ptr, N, at, sums, MERGE: tl.constexpr):
    for i in tl.static_range(2):
        value = sums[i]
        if MERGE:
            value += tl.load(ptr + i * N + at, mask=at < N, other=0.0)
        tl.store(ptr + i * N + at, value, mask=at < N)


@triton.jit
def _softmax_step(s, m, total, safe, COLUMNS: tl.constexpr):
    """One tile of the rows' online softmax, and maximum and sum of its columns; maxima are 0 where
    the logits are safely small.
    """
    column_m = tl.zeros([s.shape[1]], tl.float32)
    column = tl.zeros([s.shape[1]], tl.float32)
    if safe:
        e = _exp(s)
        total = total + tl.sum(e, 1)
        if COLUMNS:
            column = tl.sum(e, 0)
    else:
        m_new = tl.maximum(m, tl.max(s, 1))
        shift = _finite(m_new)
        total = total * _exp(m - shift) + tl.sum(_exp(s - shift[:, None]), 1)
        m = m_new
        if COLUMNS:
            column_m = tl.max(s, 0)
            column = tl.sum(_exp(s - _finite(column_m)[None, :]), 0)
    return m, total, column_m, column


@triton.jit
def sweep_kernel(
    q_ptr,
    c_ptr,
    bias_ptr,
    scale_ptr,
    bound_ptr,
    target_ptr,
    low_ptr,
    high_ptr,
    shared_ptr,
    q_id_ptr,
    c_id_ptr,
    row_ptr,
    column_ptr,
    B,
    C,
    blocks,
    tiles,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    KEYS: tl.constexpr,
    IDS: tl.constexpr,
    COLUMNS: tl.constexpr,
    EVERYTHING: tl.constexpr,
    MERGE: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """grid (S, G). Program (s, g) owns row blocks g blocks .. and column tiles s tiles .., and
    visits their tiles that hold pairs.

    Writes row (S, 2 or 6, B) and column (G, 2 or 6, C): maximum and sum of the softmax, and with
    EVERYTHING number and sum of the further positives and of all pairs. Splits vary fastest:
    programs at work then share few row blocks, which stay in L2."""
    split = tl.program_id(0)
    group = tl.program_id(1)
    STATS: tl.constexpr = 6 if EVERYTHING else 2
    scale = tl.load(scale_ptr)
    safe = tl.load(bound_ptr) <= SAFE_BOUND  # False for NaN
    first = split * tiles
    last = tl.minimum(first + tiles, tl.cdiv(C, BN))
    for block in range(group * blocks, tl.minimum((group + 1) * blocks, tl.cdiv(B, BM))):
        x = block * BM + tl.arange(0, BM)
        target = tl.load(target_ptr + x, mask=x < B, other=-1).to(tl.int32)
        first_target = tl.min(tl.where(x < B, target, C), 0)
        last_target = tl.max(target, 0)
        low, high, full_low, full_high, shared = block_range(
            low_ptr, high_ptr, shared_ptr, block * BM, B, C, BM, KEYS
        )
        head, own, count = visits(low, high, shared, first, last, BN, KEYS)
        x_low, x_high, x_id = row_vectors(low_ptr, high_ptr, q_id_ptr, x, B, KEYS, IDS)
        m = tl.zeros([BM], tl.float32) + tl.where(safe, 0.0, float("-inf"))
        total = tl.zeros([BM], tl.float32)
        positive = (total, total)
        every = (total, total)
        for n in range(0, count):
            start = nth_tile(n, head, own, first) * BN
            y = start + tl.arange(0, BN)
            s = products(q_ptr, c_ptr, block * BM, start, B, C, D, BM, BN, BK, UPCAST) * scale
            if bias_ptr is not None:
                s += tl.load(bias_ptr + y, mask=y < C, other=0.0)[None, :]
            # Most tiles count as a whole, which their corners tell.
            whole = (
                (block * BM + BM <= B)
                & (start + BN <= C)
                & ((start > last_target) | (start + BN <= first_target))
            )
            if KEYS:
                whole = whole & (
                    (start + BN <= shared) | ((full_low <= start) & (start + BN <= full_high))
                )
            own_columns = column_ptr + group.to(tl.int64) * STATS * C
            if EVERYTHING or IDS != "none":
                y_id = y if IDS == "none" else tl.load(c_id_ptr + y, mask=y < C, other=-2)
                ok = counting_pairs(
                    x, y, B, C, target, x_low, x_high, shared, x_id, y_id, False, KEYS, IDS
                )
                s = tl.where(ok, s, float("-inf"))
                if EVERYTHING:
                    every = _add(every, _number_and_sum(s, 1))
                    if COLUMNS:
                        _store_sums(own_columns + 4 * C, C, y, _number_and_sum(s, 0), MERGE)
                    if IDS == "same":
                        same = tl.where(x_id[:, None] == y_id[None, :], s, float("-inf"))
                        positive = _add(positive, _number_and_sum(same, 1))
                        if COLUMNS:
                            _store_sums(own_columns + 2 * C, C, y, _number_and_sum(same, 0), MERGE)
            elif not whole:
                ok = counting_pairs(
                    x, y, B, C, target, x_low, x_high, shared, x_id, y, False, KEYS, IDS
                )
                s = tl.where(ok, s, float("-inf"))
            m, total, column_m, column = _softmax_step(s, m, total, safe, COLUMNS)
            if COLUMNS:
                _store_softmax(own_columns, C, y, column_m, column, MERGE)
        own_rows = row_ptr + split.to(tl.int64) * STATS * B
        _store_softmax(own_rows, B, x, m, total, False)
        if EVERYTHING:
            _store_sums(own_rows + 2 * B, B, x, positive, False)
            _store_sums(own_rows + 4 * B, B, x, every, False)


@triton.jit
def target_kernel(
    q_ptr,
    c_ptr,
    target_ptr,
    out_ptr,
    B,
    C,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """grid (B / min(BM, BN),). out (B,) = q_i . c_target(i): the diagonal of a tile, multiplied as
    the sweep's tiles are.
    """
    R: tl.constexpr = BM if BM < BN else BN
    start = tl.program_id(0) * R
    rows = tl.arange(0, BM)
    columns = tl.arange(0, BN)
    target = tl.load(target_ptr + start + columns, mask=start + columns < B, other=0)
    acc = tl.zeros([BM, BN], tl.float32)
    for k in range(0, (D + BK - 1) // BK):
        cols = k * BK + tl.arange(0, BK)
        x = load_block(q_ptr, start, rows, cols, B, D, D % BK == 0)
        acc = dot(x, tl.trans(load_block(c_ptr, 0, target, cols, C, D, D % BK == 0)), acc, UPCAST)
    diagonal = tl.sum(tl.where(rows[:, None] == columns[None, :], acc, 0.0), 1)
    tl.store(out_ptr + start + rows, diagonal, mask=(rows < R) & (start + rows < B))


@triton.jit
def merge_kernel(
    partial_ptr,
    out_ptr,
    P,
    N,
    BP: tl.constexpr,
    BN: tl.constexpr,
    EVERYTHING: tl.constexpr,
):
    """grid (N / BN,). Partials (P, 2 or 6, N) -> statistics (5, N) float64: logsumexp, and the
    sums, 0 without EVERYTHING.

    float64 as a logsumexp of 20 in float32 would put an error of 1e-6 on a whole row of
    probabilities."""
    STATS: tl.constexpr = 6 if EVERYTHING else 2
    at = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.full([BN], float("-inf"), tl.float32)
    total = tl.zeros([BN], tl.float32)
    for start in range(0, P, BP):
        p = start + tl.arange(0, BP)
        inside = (p < P)[:, None] & (at < N)[None, :]
        where = p[:, None].to(tl.int64) * STATS * N + at[None, :]
        more = tl.load(partial_ptr + where, mask=inside, other=float("-inf"))
        m_more = tl.max(more, 0)
        more = _exp(more - _finite(m_more)[None, :]) * tl.load(
            partial_ptr + where + N, mask=inside, other=0.0
        )
        m, total = _merge(m, total, m_more, tl.sum(more, 0))
    tl.store(out_ptr + at, _finite(m).to(tl.float64) + tl.log(total.to(tl.float64)), mask=at < N)
    for i in tl.static_range(1, 5):
        total = tl.zeros([BN], tl.float32)
        if EVERYTHING:
            for start in range(0, P, BP):
                p = start + tl.arange(0, BP)
                inside = (p < P)[:, None] & (at < N)[None, :]
                where = p[:, None].to(tl.int64) * STATS * N + (i + 1) * N + at[None, :]
                total += tl.sum(tl.load(partial_ptr + where, mask=inside, other=0.0), 0)
        tl.store(out_ptr + i * N + at, total.to(tl.float64), mask=at < N)
