"""Backward kernels of masked InfoNCE: dS c and dS^T q, which are dq and dc divided by the scale.

For all pairs except the targets,

    dS_ij = w_i exp(S_ij - lse_i) + w_j exp(S_ij - lse_j) - positive_ij - every_ij

w_i and lse_i belong to row i, w_j and lse_j to column j. The term with w_j occurs only in a
symmetric loss. With EVERYTHING, every_ij occurs for all pairs, and positive_ij for further
positives. There are two forms of the backward.

Chunked: ``pairs_kernel`` writes dS of a chunk of rows and columns once, in the inputs' dtype.
``apply_ds_kernel`` computes dS c and dS^T q of the chunk, and adds the results to float32 sums.
This takes 6 B C D FLOPs, 6 bytes of HBM traffic per pair in 16 bits, and 8 bytes per sum and chunk.

Owner-computes: ``owner_kernel`` recomputes S once for each side, and keeps dS and sums on chip.
This takes 8 B C D FLOPs, and no HBM traffic for dS.

``moment`` holds sums of dS S (elementwise), from which the scale's gradient is computed. The terms
of these sums nearly cancel, so the sums are computed from dS before rounding. ``gain``, only for
float16, is a power of two that brings the largest w between 2^12 and 2^13, because dS near
1 / (B C) is too small for float16. Gradients are divided by ``gain``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..tiles import dot, rounded_product
from .pairs import (
    SAFE_BOUND,
    block_range,
    load_block,
    load_coefficients,
    nth_tile,
    products,
    row_vectors,
    valid_pairs,
    visited_tiles,
    weighted_softmax,
)


@triton.jit
def _load_gain(gain_ptr):
    gain = 1.0
    if gain_ptr is not None:
        gain = tl.load(gain_ptr)
    return gain


@triton.jit
def _gradient(
    s,
    x_id,
    y_id,
    x_side,
    y_side,
    safe,
    HAS_X: tl.constexpr,
    HAS_Y: tl.constexpr,
    KEYS: tl.constexpr,
    IDS: tl.constexpr,
    EVERYTHING: tl.constexpr,
):
    """Return dS of a tile: the weighted softmax minus the terms ``positive`` and ``every``.

    With masks or EVERYTHING, dS is 0 for invalid pairs (s is -inf) even if a coefficient is NaN.
    """
    ds = weighted_softmax(s, x_side[0], x_side[1], y_side[0], y_side[1], safe, HAS_X, HAS_Y)
    if EVERYTHING:
        ds -= x_side[3][:, None] + y_side[3][None, :]
        if IDS == "same":
            same = x_id[:, None] == y_id[None, :]
            ds -= tl.where(same, x_side[2][:, None] + y_side[2][None, :], 0.0)
    if EVERYTHING or KEYS or IDS != "none":
        ds = tl.where(s == float("-inf"), 0.0, ds)
    return ds


@triton.jit
def _moment(ds, s):
    """Return dS S, which is 0 if s is -inf and dS is 0."""
    return rounded_product(ds, tl.maximum(s, -3e38))


@triton.jit
def pairs_kernel(
    q_ptr,  # (B, D)
    c_ptr,  # (C, D)
    bias_ptr,  # (C,), 0 or NaN; or None
    scale_ptr,  # ()
    bound_ptr,  # (), upper bound of |logits|
    gain_ptr,  # () or None
    target_ptr,  # (B,)
    low_ptr,  # (B,) or None
    high_ptr,  # (B,) or None
    shared_ptr,  # (1,) or None
    q_id_ptr,  # (B,) or None
    c_id_ptr,  # (C,) or None
    row_ptr,  # (4, B)
    column_ptr,  # (4, C) or None
    ds_ptr,  # (rows, width)
    moment_ptr,  # (row blocks, column tiles) or None
    B,
    C,
    row0,
    col0,
    width,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BX: tl.constexpr,
    BY: tl.constexpr,
    GROUP: tl.constexpr,
    KEYS: tl.constexpr,
    IDS: tl.constexpr,
    EVERYTHING: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Write a tile of dS, 0 for invalid pairs, and the tile's sum of dS S.

    grid (row blocks, column tiles) of the chunk at (row0, col0). The BX x BY tiles that
    apply_ds_kernel reads are written completely. BX is a multiple of BM, and BY of BN.
    """
    i, j = tl.swizzle2d(
        tl.program_id(0), tl.program_id(1), tl.num_programs(0), tl.num_programs(1), GROUP
    )
    x0 = row0 + i * BM
    y0 = col0 + j * BN
    x = x0 + tl.arange(0, BM)
    y = y0 + tl.arange(0, BN)
    low, high, _, _, shared = block_range(
        low_ptr, high_ptr, shared_ptr, x0 // BX * BX, B, C, BX, KEYS
    )
    _, _, count = visited_tiles(low, high, shared, y0 // BY, y0 // BY + 1, BY, KEYS)
    moment = 0.0
    if count > 0:
        safe = tl.load(bound_ptr) <= SAFE_BOUND
        s = products(q_ptr, c_ptr, x0, y0, B, C, D, BM, BN, BK, UPCAST) * tl.load(scale_ptr)
        if bias_ptr is not None:
            s += tl.load(bias_ptr + y, mask=y < C, other=0.0)[None, :]
        target = tl.load(target_ptr + x, mask=x < B, other=-1).to(tl.int32)
        x_low, x_high, x_id = row_vectors(low_ptr, high_ptr, q_id_ptr, x, B, KEYS, IDS)
        y_id = y if IDS == "none" else tl.load(c_id_ptr + y, mask=y < C, other=-2)
        ok = valid_pairs(x, y, B, C, target, x_low, x_high, shared, x_id, y_id, False, KEYS, IDS)
        # Masked here, not later, so that the mask's registers are free before the softmax.
        s = tl.where(ok, s, float("-inf"))
        gain = _load_gain(gain_ptr)
        x_side = load_coefficients(row_ptr, x, B, gain, EVERYTHING)
        y_side = load_coefficients(column_ptr, y, C, gain, EVERYTHING)
        HAS_X: tl.constexpr = row_ptr is not None
        HAS_Y: tl.constexpr = column_ptr is not None
        ds = _gradient(s, x_id, y_id, x_side, y_side, safe, HAS_X, HAS_Y, KEYS, IDS, EVERYTHING)
        at = (i * BM + tl.arange(0, BM))[:, None] * width + (j * BN + tl.arange(0, BN))[None, :]
        tl.store(ds_ptr + at, ds)
        if moment_ptr is not None:
            # Summed as one vector: for sm_100, Triton 3.6 cannot sum over rows or columns in the
            # layout of the product.
            moment = tl.sum(tl.reshape(_moment(ds, s), [BM * BN]), 0)
    if moment_ptr is not None:
        tl.store(moment_ptr + i * tl.num_programs(1) + j, moment)


@triton.jit
def apply_ds_kernel(
    ds_ptr,  # (rows, width), possibly transposed by its strides
    y_ptr,  # (Y, D)
    gain_ptr,  # () or None
    low_ptr,  # (X,) or None
    high_ptr,  # (X,) or None
    shared_ptr,  # (1,) or None
    out_ptr,  # (splits, x1 - x0, D) float32
    X,
    Y,
    x0,
    x1,
    y0,
    y1,
    stride_x,
    stride_y,
    D: tl.constexpr,
    BX: tl.constexpr,
    BY: tl.constexpr,
    BK: tl.constexpr,
    BD: tl.constexpr,
    KEYS: tl.constexpr,
    FIRST: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Add dS y, summed over the rows y0 .. y1 - 1 of y, to out; with FIRST, overwrite out.

    grid (D / BD, blocks of x in the chunk, splits). Either x = q and y = c, or x = c, y = q and the
    strides transpose dS. Only tiles that pairs_kernel wrote are read.
    """
    local = tl.program_id(1) * BX + tl.arange(0, BX)
    cols = tl.program_id(0) * BD + tl.arange(0, BD)
    split = tl.program_id(2)
    low, high, _, _, shared = block_range(
        low_ptr, high_ptr, shared_ptr, x0 + tl.program_id(1) * BX, X, Y, BX, KEYS
    )
    if KEYS:
        # The tile that would be visited for an empty range may not have been written.
        high = tl.where(high > low, high, 0)
    first = y0 // BY
    head, own, count = visited_tiles(low, high, shared, first, tl.cdiv(y1, BY), BY, KEYS)
    STEPS: tl.constexpr = BY // BK
    begin = (count * split // tl.num_programs(2)) * STEPS
    end = (count * (split + 1) // tl.num_programs(2)) * STEPS
    out_ptr += (split.to(tl.int64) * (x1 - x0) + tl.program_id(1) * BX) * D
    at = tl.arange(0, BX)[:, None] * D + cols[None, :]
    inside = (local < x1 - x0)[:, None] & (cols < D)[None, :]
    gain = _load_gain(gain_ptr)
    acc = tl.zeros([BX, BD], tl.float32)
    if not FIRST:
        # Loaded here, because at the end the earlier sums and the accumulator would not both fit
        # into registers.
        acc = tl.load(out_ptr + at, mask=inside, other=0.0) * gain
    for step in range(begin, end):
        start = nth_tile(step // STEPS, head, own, first) * BY + step % STEPS * BK
        ds = tl.load(
            ds_ptr
            + (start - y0) * stride_y
            + local[:, None] * stride_x
            + tl.arange(0, BK)[None, :] * stride_y
        )
        rows = load_block(y_ptr, start, tl.arange(0, BK), cols, Y, D, D % BD == 0)
        acc = dot(ds, rows, acc, UPCAST)
    if FIRST or end > begin:
        tl.store(out_ptr + at, acc * (1.0 / gain), mask=inside)


@triton.jit
def owner_kernel(
    x_ptr,  # (X, D)
    y_ptr,  # (Y, D)
    bias_ptr,  # (C,), 0 or NaN; or None
    scale_ptr,  # ()
    bound_ptr,  # (), upper bound of |logits|
    gain_ptr,  # () or None
    target_ptr,  # (B,)
    low_ptr,  # (X,) or None
    high_ptr,  # (X,) or None
    shared_ptr,  # (1,) or None
    x_id_ptr,  # (X,) or None
    y_id_ptr,  # (Y,) or None
    x_side_ptr,  # (4, X) or None
    y_side_ptr,  # (4, Y) or None
    out_ptr,  # (splits, X, D) float32
    moment_ptr,  # (splits, X) or None
    X,
    Y,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    SWAP: tl.constexpr,
    KEYS: tl.constexpr,
    IDS: tl.constexpr,
    EVERYTHING: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Compute dS y and the sums of dS S, for one block of x and one split of y.

    grid (splits, X / BM). All sums stay in registers, so BD >= D. Without SWAP, x = q and y = c.
    With SWAP, x = c and y = q: S and dS are transposed, bias belongs to x and target to y.
    """
    split, block = tl.program_id(0), tl.program_id(1)
    x = block * BM + tl.arange(0, BM)
    cols = tl.arange(0, BD)
    scale = tl.load(scale_ptr)
    safe = tl.load(bound_ptr) <= SAFE_BOUND
    gain = _load_gain(gain_ptr)
    low, high, _, _, shared = block_range(low_ptr, high_ptr, shared_ptr, block * BM, X, Y, BM, KEYS)
    head, own, count = visited_tiles(low, high, shared, 0, tl.cdiv(Y, BN), BN, KEYS)
    x_low, x_high, x_id = row_vectors(low_ptr, high_ptr, x_id_ptr, x, X, KEYS, IDS)
    x_side = load_coefficients(x_side_ptr, x, X, gain, EVERYTHING)
    x_rows = load_block(x_ptr, block * BM, tl.arange(0, BM), cols, X, D, D == BD)
    acc = tl.zeros([BM, BD], tl.float32)
    moment = tl.zeros([BM], tl.float32)
    HAS_X: tl.constexpr = x_side_ptr is not None
    HAS_Y: tl.constexpr = y_side_ptr is not None
    for n in range(count * split // tl.num_programs(0), count * (split + 1) // tl.num_programs(0)):
        start = nth_tile(n, head, own, 0) * BN
        y = start + tl.arange(0, BN)
        y_rows = load_block(y_ptr, start, tl.arange(0, BN), cols, Y, D, D == BD)
        s = dot(x_rows, tl.trans(y_rows), tl.zeros([BM, BN], tl.float32), UPCAST) * scale
        if bias_ptr is not None:
            if SWAP:
                s += tl.load(bias_ptr + x, mask=x < X, other=0.0)[:, None]
            else:
                s += tl.load(bias_ptr + y, mask=y < Y, other=0.0)[None, :]
        if SWAP:
            target = tl.load(target_ptr + y, mask=y < Y, other=-1).to(tl.int32)
        else:
            target = tl.load(target_ptr + x, mask=x < X, other=-1).to(tl.int32)
        y_id = y if IDS == "none" else tl.load(y_id_ptr + y, mask=y < Y, other=-2)
        ok = valid_pairs(x, y, X, Y, target, x_low, x_high, shared, x_id, y_id, SWAP, KEYS, IDS)
        s = tl.where(ok, s, float("-inf"))
        y_side = load_coefficients(y_side_ptr, y, Y, gain, EVERYTHING)
        ds = _gradient(s, x_id, y_id, x_side, y_side, safe, HAS_X, HAS_Y, KEYS, IDS, EVERYTHING)
        if moment_ptr is not None:
            moment += tl.sum(_moment(ds, s), 1)
        acc = dot(ds.to(y_ptr.dtype.element_ty), y_rows, acc, UPCAST)
    acc *= 1.0 / gain
    at = (split.to(tl.int64) * X + x[:, None]) * D + cols[None, :]
    tl.store(out_ptr + at, acc, mask=(x < X)[:, None] & (cols < D)[None, :])
    if moment_ptr is not None:
        tl.store(moment_ptr + split.to(tl.int64) * X + x, moment, mask=x < X)
