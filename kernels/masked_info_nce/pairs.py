"""Device functions that the kernels of masked InfoNCE share: tiles, pairs, logits and dS.

A program owns a block of BM rows of one side, x, and visits the other side, y, in tiles of BN. With
keys, both sides are sorted by key. A row of x then sees the rows [0, shared) and [low, high) of y,
so a block visits the tiles of [0, shared) and one further range of tiles. Masks compare the row
indices of y with shared, low and high.

The scale does not include log2(e): s = (x . y) scale, and p = exp2((s - lse) log2(e)). A scale that
includes log2(e), as in flash attention, would save one multiplication per pair. But with logits of
100, the errors of float32 gradients would be three times those of plain PyTorch.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..tiles import LOG2E, dot

# If no |logit| exceeds this bound, no maximum has to be subtracted: exp(s), exp(-lse) and a sum of
# 2^31 exponentials are normal float32 numbers. One exponential then serves the row and the column
# of a pair. A bound of 64 would also prevent overflow, but the rounding errors of exp(s) exp(-lse)
# grow with the exponents, and would be visible in the temperature's gradient.
SAFE_BOUND = tl.constexpr(32.0)


@triton.jit
def block_range(
    low_ptr,  # (X,)
    high_ptr,  # (X,)
    shared_ptr,  # (1,)
    start,
    X,
    Y,
    BM: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Return low, high, full_low, full_high and shared of the rows start .. start + BM - 1.

    Each row sees [0, shared) and a part of [low, high). full_low and full_high have a meaning only
    if the rows are queries: each row then sees all of [full_low, full_high).
    """
    low = 0
    high = Y
    full_low = 0
    full_high = Y
    shared = 0
    if KEYS:
        last = tl.minimum(start + BM, X) - 1
        low = tl.minimum(tl.load(low_ptr + start), tl.load(low_ptr + last))
        high = tl.maximum(tl.load(high_ptr + start), tl.load(high_ptr + last))
        full_low = tl.load(low_ptr + last)
        full_high = tl.load(high_ptr + start)
        shared = tl.load(shared_ptr)
    return low, high, full_low, full_high, shared


@triton.jit
def visited_tiles(
    low,
    high,
    shared,
    first,
    last,
    BN: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Return head, own and count: which of the tiles first .. last - 1 a block visits.

    The block visits ``count`` tiles: ``head`` tiles with shared columns, from tile ``first`` on,
    then the other tiles, from tile ``own`` on. If low = high, the block may visit the tile with
    column low, although no row sees this column.
    """
    head = last - first
    own = last
    count = head
    if KEYS:
        num_shared_tiles = tl.cdiv(shared, BN)
        head = tl.maximum(tl.minimum(num_shared_tiles, last) - first, 0)
        own = tl.maximum(tl.maximum(low // BN, num_shared_tiles), first)
        count = head + tl.maximum(tl.minimum(tl.cdiv(high, BN), last) - own, 0)
    return head, own, count


@triton.jit
def nth_tile(
    n,
    head,
    own,
    first,
):
    """Return the index of the n-th visited tile."""
    return tl.where(n < head, first + n, own + n - head)


@triton.jit
def row_vectors(
    low_ptr,  # (X,)
    high_ptr,  # (X,)
    id_ptr,  # (X,)
    x,
    X,
    KEYS: tl.constexpr,
    IDS: tl.constexpr,
):
    """Return low, high and id of the rows x, or placeholders without keys or ids."""
    low = x
    high = x
    ids = x
    if KEYS:
        low = tl.load(low_ptr + x, mask=x < X, other=0)
        high = tl.load(high_ptr + x, mask=x < X, other=0)
    if IDS != "none":
        ids = tl.load(id_ptr + x, mask=x < X, other=-1)
    return low, high, ids


@triton.jit
def valid_pairs(
    x,
    y,
    X,
    Y,
    target,
    low,
    high,
    shared,
    x_id,
    y_id,
    SWAP: tl.constexpr,
    KEYS: tl.constexpr,
    IDS: tl.constexpr,
):
    """Return which pairs are valid, (BM, BN) bool.

    A pair is valid if it exists, is allowed by key, is not dropped by id, and its candidate is not
    the query's target. The queries are x or, with SWAP, y. ``target`` holds the target of each
    query.
    """
    # Rows from X on have an empty range, and no range exceeds Y.
    ok = y[None, :] < tl.where(x < X, shared if KEYS else Y, 0)[:, None]
    if KEYS:
        ok = ok | ((y[None, :] >= low[:, None]) & (y[None, :] < high[:, None]))
    if SWAP:
        ok = ok & (target[None, :] != x[:, None])
    else:
        ok = ok & (target[:, None] != y[None, :])
    if IDS == "drop":
        ok = ok & (x_id[:, None] != y_id[None, :])
    return ok


@triton.jit
def load_block(
    ptr,  # (R, D), contiguous
    start,
    rows,
    cols,
    R,
    D: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Load (rows, cols), with rows counted from ``start``. EVEN: all cols are < D.

    Offsets from ``start`` are 32-bit, because 64-bit offsets take twice the registers.
    """
    inside = (rows < R - start)[:, None]
    if not EVEN:
        inside = inside & (cols < D)[None, :]
    return tl.load(
        ptr + tl.cast(start, tl.int64) * D + rows[:, None] * D + cols[None, :],
        mask=inside,
        other=0.0,
    )


@triton.jit
def products(
    x_ptr,  # (X, D)
    y_ptr,  # (Y, D)
    x0,
    y0,
    X,
    Y,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Return x . y for BM rows from x0 on and BN rows from y0 on, (BM, BN) float32."""
    acc = tl.zeros([BM, BN], tl.float32)
    for k in range(0, (D + BK - 1) // BK):
        cols = k * BK + tl.arange(0, BK)
        x = load_block(x_ptr, x0, tl.arange(0, BM), cols, X, D, D % BK == 0)
        y = load_block(y_ptr, y0, tl.arange(0, BN), cols, Y, D, D % BK == 0)
        acc = dot(x, tl.trans(y), acc, UPCAST)
    return acc


@triton.jit
def load_coefficients(
    ptr,  # (4, N), or None if the side has no loss
    at,
    N,
    gain,
    EVERYTHING: tl.constexpr,
):
    """Load the coefficients lse, weight, positive and every of a side, for the rows ``at``.

    All but lse are multiplied by ``gain``. ``positive`` is subtracted from dS of further positives,
    ``every`` from dS of every pair.
    """
    lse = tl.full(at.shape, float("inf"), tl.float32)
    weight = tl.zeros(at.shape, tl.float32)
    positive = tl.zeros(at.shape, tl.float32)
    every = tl.zeros(at.shape, tl.float32)
    if ptr is not None:
        weight = tl.load(ptr + N + at, mask=at < N, other=0.0) * gain
        lse = tl.load(ptr + at, mask=at < N, other=float("inf"))
        if EVERYTHING:
            positive = tl.load(ptr + 2 * N + at, mask=at < N, other=0.0) * gain
            every = tl.load(ptr + 3 * N + at, mask=at < N, other=0.0) * gain
    return lse, weight, positive, every


@triton.jit
def weighted_softmax(
    s,
    x_lse,
    x_weight,
    y_lse,
    y_weight,
    safe,
    HAS_X: tl.constexpr,
    HAS_Y: tl.constexpr,
):
    """Return x_weight exp(s - x_lse) + y_weight exp(s - y_lse); HAS_X and HAS_Y select terms."""
    ds = s
    if safe:
        e = tl.exp2(s * LOG2E)
        if HAS_X and HAS_Y:
            # Weights come last: exp(-lse) times a small weight might underflow.
            ds = (
                e * tl.exp2(-x_lse * LOG2E)[:, None] * x_weight[:, None]
                + e * tl.exp2(-y_lse * LOG2E)[None, :] * y_weight[None, :]
            )
        elif HAS_X:
            ds = e * tl.exp2(-x_lse * LOG2E)[:, None] * x_weight[:, None]
        else:
            ds = e * tl.exp2(-y_lse * LOG2E)[None, :] * y_weight[None, :]
    else:
        if HAS_X and HAS_Y:
            ds = (
                tl.exp2((s - x_lse[:, None]) * LOG2E) * x_weight[:, None]
                + tl.exp2((s - y_lse[None, :]) * LOG2E) * y_weight[None, :]
            )
        elif HAS_X:
            ds = tl.exp2((s - x_lse[:, None]) * LOG2E) * x_weight[:, None]
        else:
            ds = tl.exp2((s - y_lse[None, :]) * LOG2E) * y_weight[None, :]
    return ds
