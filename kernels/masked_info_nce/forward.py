"""Forward of masked InfoNCE: statistics over all pairs except the targets.

The statistics of each row and column are the logsumexp of its logits and, with EVERYTHING, the
number and sum of the logits of further positives, and the number and sum of all logits. Each tile
of logits is computed once, for the statistics of its rows and of its columns. A row or column
without a valid pair has logsumexp -inf.

Every program writes partial results, and a second kernel merges all partial results in a fixed
order. There are no atomics, and results are bitwise repeatable. FLOPs: 2 B C D.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tiles import LOG2E, OPTIONS, arch_of, upcasts
from .pairs import (
    SAFE_BOUND,
    block_range,
    nth_tile,
    products,
    row_vectors,
    valid_pairs,
    visited_tiles,
)
from .plans import Plan, plan, sweep_grid
from .targets import target_products
from .vectors import id_ranks, id_rule, logit_bound, row_ranges


def sweep(
    q: Tensor,
    c: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    target: Tensor,
    q_key: Tensor | None,
    c_key: Tensor | None,
    q_id: Tensor | None,
    c_id: Tensor | None,
    drop: bool,
    columns: bool,
    everything: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute statistics over all pairs except the targets, and q . c of each row's target.

    With keys, q (B, D) and c (C, D) are sorted by key. Return the statistics of the rows (5, B) and
    columns (5, C), float64, and the products with the targets (B,), float32. Without ``columns``,
    the statistics of the columns are (5, 0).
    """
    tiles = plan(q.shape[1], q.dtype, arch_of(q), columns, everything)
    tile = tiles.sweep
    q, c, target = q.contiguous(), c.contiguous(), target.contiguous()
    stats = 6 if everything else 2
    grid = sweep_grid(len(q), len(c), tile, tiles.partial_bytes, stats * columns)
    row = q.new_empty(grid.splits, stats, len(q), dtype=torch.float32)
    column = q.new_empty(grid.groups, stats, len(c) if columns else 0, dtype=torch.float32)
    ids = id_rule(c_id, drop)
    if c_key is not None or grid.blocks > 1:
        # A group may skip tiles, or merge results of several blocks.
        column[:, 0] = float("-inf")
        column[:, 1:] = 0
    elif everything and ids != "same":
        # Without further positives the kernel does not write their number and sum.
        column[:, 2:4] = 0
    q_rank, c_rank = id_ranks(q_id, c_id)
    sweep_kernel[(grid.splits, grid.groups)](
        q_ptr=q,
        c_ptr=c,
        bias_ptr=bias,
        scale_ptr=scale,
        bound_ptr=logit_bound(q, c, scale),
        target_ptr=target,
        **row_ranges(q_key, c_key).pointers(),
        q_id_ptr=q_rank,
        c_id_ptr=c_rank,
        row_ptr=row,
        column_ptr=column,
        B=len(q),
        C=len(c),
        blocks=grid.blocks,
        tiles=grid.tiles,
        D=q.shape[1],
        BM=tile.BM,
        BN=tile.BN,
        BK=tile.BK,
        KEYS=c_key is not None,
        IDS=ids,
        COLUMNS=columns,
        EVERYTHING=everything,
        MERGE=grid.blocks > 1,
        UPCAST=upcasts(q.dtype),
        **tile.launch,
        **OPTIONS,
    )
    row = _merge_partials(row, tiles, everything)
    column = _merge_partials(column, tiles, everything)
    return row, column, target_products(q, c, target, tile)


def _merge_partials(partial: Tensor, tiles: Plan, everything: bool) -> Tensor:
    """Merge partial results (parts, 2 or 6, N) into statistics (5, N) float64."""
    parts, _, length = partial.shape
    out = partial.new_empty(5, length, dtype=torch.float64)
    height, width = tiles.merge
    merge_kernel[(triton.cdiv(length, width),)](
        partial_ptr=partial,
        out_ptr=out,
        P=parts,
        N=length,
        BP=height,
        BN=width,
        EVERYTHING=everything,
        num_warps=4,
        num_stages=2,
        **OPTIONS,
    )
    return out


@triton.jit
def _exp(x):
    return tl.exp2(x * LOG2E)


@triton.jit
def _finite(m):
    """Return 0 if the maximum m is -inf, else m: subtracting -inf from -inf would give NaN."""
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def _number_and_sum(s, AXIS: tl.constexpr):
    """Return number and sum, over an axis, of the elements that are not -inf.

    A reduction of the mask itself would take ten times the registers, because the mask would get
    another layout than s.
    """
    there = s != float("-inf")
    return tl.sum(tl.where(there, 1.0, 0.0), AXIS), tl.sum(tl.where(there, s, 0.0), AXIS)


@triton.jit
def _add_sums(
    sums,
    s,
    ptr,  # (2, N), number and sum of each column
    N,
    at,
    COLUMNS: tl.constexpr,
    MERGE: tl.constexpr,
):
    """Return the numbers and sums of the rows, with a tile added.

    With COLUMNS, also store the numbers and sums of the tile's columns.
    """
    more = _number_and_sum(s, 1)
    if COLUMNS:
        _store_sums(ptr, N, at, _number_and_sum(s, 0), MERGE)
    return sums[0] + more[0], sums[1] + more[1]


@triton.jit
def _merge_softmax(
    m,
    total,
    m_more,
    total_more,
):
    """Merge two partial softmaxes (maximum, sum); all exponents are at most 0."""
    m_new = tl.maximum(m, m_more)
    shift = _finite(m_new)
    return m_new, total * _exp(m - shift) + total_more * _exp(m_more - shift)


@triton.jit
def _store_softmax(
    ptr,  # (2, N)
    N,
    at,
    m,
    total,
    MERGE: tl.constexpr,
):
    """Store a maximum and sum; with MERGE, first merge them with the stored maximum and sum."""
    if MERGE:
        old = tl.load(ptr + at, mask=at < N, other=float("-inf"))
        old_total = tl.load(ptr + N + at, mask=at < N, other=0.0)
        tl.debug_barrier()  # several warps load an element, and one of them stores it
        m, total = _merge_softmax(old, old_total, m, total)
    tl.store(ptr + at, m, mask=at < N)
    tl.store(ptr + N + at, total, mask=at < N)


@triton.jit
def _store_sums(
    ptr,  # (2, N)
    N,
    at,
    sums,
    MERGE: tl.constexpr,
):
    first, second = sums
    if MERGE:
        first += tl.load(ptr + at, mask=at < N, other=0.0)
        second += tl.load(ptr + N + at, mask=at < N, other=0.0)
        tl.debug_barrier()
    tl.store(ptr + at, first, mask=at < N)
    tl.store(ptr + N + at, second, mask=at < N)


@triton.jit
def _softmax_step(
    s,
    m,
    total,
    safe,
    COLUMNS: tl.constexpr,
):
    """Process one tile of the rows' online softmax.

    Return the new maxima and sums of the rows, then the maxima and sums of the tile's columns. With
    ``safe``, logits are so small that 0 serves as each maximum.
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
def _is_whole(
    x0,
    y0,
    B,
    C,
    first_target,
    last_target,
    full_low,
    full_high,
    shared,
    BM: tl.constexpr,
    BN: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Return True only if all pairs of a tile are valid. Ids are not checked."""
    whole = (x0 + BM <= B) & (y0 + BN <= C) & ((y0 > last_target) | (y0 + BN <= first_target))
    if KEYS:
        whole = whole & ((y0 + BN <= shared) | ((full_low <= y0) & (y0 + BN <= full_high)))
    return whole


@triton.jit
def sweep_kernel(
    q_ptr,  # (B, D)
    c_ptr,  # (C, D)
    bias_ptr,  # (C,), 0 or NaN; or None
    scale_ptr,  # ()
    bound_ptr,  # (), upper bound of |logits|
    target_ptr,  # (B,)
    low_ptr,  # (B,) or None
    high_ptr,  # (B,) or None
    shared_ptr,  # (1,) or None
    q_id_ptr,  # (B,) or None
    c_id_ptr,  # (C,) or None
    row_ptr,  # (splits, 2 or 6, B)
    column_ptr,  # (groups, 2 or 6, C)
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
    """Write maximum and sum of each softmax and, with EVERYTHING, numbers and sums of logits.

    grid (splits, groups). Each program owns ``blocks`` row blocks and ``tiles`` column tiles, and
    skips tiles outside a block's key ranges. Splits are the fastest dimension of the grid, so that
    programs that run at the same time share a few row blocks, which stay in L2.
    """
    split, group = tl.program_id(0), tl.program_id(1)
    STATS: tl.constexpr = 6 if EVERYTHING else 2
    scale = tl.load(scale_ptr)
    safe = tl.load(bound_ptr) <= SAFE_BOUND  # False for NaN
    first = split * tiles
    last = tl.minimum(first + tiles, tl.cdiv(C, BN))
    for block in range(group * blocks, tl.minimum((group + 1) * blocks, tl.cdiv(B, BM))):
        x0 = block * BM
        x = x0 + tl.arange(0, BM)
        target = tl.load(target_ptr + x, mask=x < B, other=-1).to(tl.int32)
        first_target, last_target = tl.min(tl.where(x < B, target, C), 0), tl.max(target, 0)
        low, high, full_low, full_high, shared = block_range(
            low_ptr, high_ptr, shared_ptr, x0, B, C, BM, KEYS
        )
        head, own, count = visited_tiles(low, high, shared, first, last, BN, KEYS)
        x_low, x_high, x_id = row_vectors(low_ptr, high_ptr, q_id_ptr, x, B, KEYS, IDS)
        m = tl.zeros([BM], tl.float32) + tl.where(safe, 0.0, float("-inf"))
        total = tl.zeros([BM], tl.float32)
        positive = (total, total)
        every = (total, total)
        for n in range(0, count):
            y0 = nth_tile(n, head, own, first) * BN
            y = y0 + tl.arange(0, BN)
            s = products(q_ptr, c_ptr, x0, y0, B, C, D, BM, BN, BK, UPCAST) * scale
            if bias_ptr is not None:
                s += tl.load(bias_ptr + y, mask=y < C, other=0.0)[None, :]
            whole = _is_whole(
                x0, y0, B, C, first_target, last_target, full_low, full_high, shared, BM, BN, KEYS
            )
            column_out = column_ptr + group.to(tl.int64) * STATS * C
            if EVERYTHING or IDS != "none":
                y_id = y if IDS == "none" else tl.load(c_id_ptr + y, mask=y < C, other=-2)
                ok = valid_pairs(
                    x, y, B, C, target, x_low, x_high, shared, x_id, y_id, False, KEYS, IDS
                )
                s = tl.where(ok, s, float("-inf"))
                if EVERYTHING:
                    every = _add_sums(every, s, column_out + 4 * C, C, y, COLUMNS, MERGE)
                if EVERYTHING and IDS == "same":
                    same = tl.where(x_id[:, None] == y_id[None, :], s, float("-inf"))
                    positive = _add_sums(positive, same, column_out + 2 * C, C, y, COLUMNS, MERGE)
            elif not whole:
                ok = valid_pairs(
                    x, y, B, C, target, x_low, x_high, shared, x_id, y, False, KEYS, IDS
                )
                s = tl.where(ok, s, float("-inf"))
            m, total, column_m, column = _softmax_step(s, m, total, safe, COLUMNS)
            if COLUMNS:
                _store_softmax(column_out, C, y, column_m, column, MERGE)
        row_out = row_ptr + split.to(tl.int64) * STATS * B
        _store_softmax(row_out, B, x, m, total, False)
        if EVERYTHING:
            _store_sums(row_out + 2 * B, B, x, positive, False)
            _store_sums(row_out + 4 * B, B, x, every, False)


@triton.jit
def merge_kernel(
    partial_ptr,  # (P, 2 or 6, N)
    out_ptr,  # (5, N) float64
    P,
    N,
    BP: tl.constexpr,
    BN: tl.constexpr,
    EVERYTHING: tl.constexpr,
):
    """Merge partial results into logsumexp, numbers and sums (0 without EVERYTHING).

    grid (N / BN,). The results are float64, because in float32 the rounding error of a logsumexp
    near 20 would change all probabilities of a row by 1e-6.
    """
    STATS: tl.constexpr = 6 if EVERYTHING else 2
    at = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.full([BN], float("-inf"), tl.float32)
    total = tl.zeros([BN], tl.float32)
    for start in range(0, P, BP):
        p = start + tl.arange(0, BP)
        inside = (p < P)[:, None] & (at < N)[None, :]
        where = p[:, None].to(tl.int64) * STATS * N + at[None, :]
        part_m = tl.load(partial_ptr + where, mask=inside, other=float("-inf"))
        m_more = tl.max(part_m, 0)
        factor = _exp(part_m - _finite(m_more)[None, :])
        part = factor * tl.load(partial_ptr + where + N, mask=inside, other=0.0)
        m, total = _merge_softmax(m, total, m_more, tl.sum(part, 0))
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
