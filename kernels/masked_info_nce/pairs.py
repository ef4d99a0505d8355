"""Device functions that the kernels of masked InfoNCE share: tiles, pairs, logits and dS.

One side is x (a program owns a block of BM rows), the other is y (visited in tiles of BN). With
keys, both are sorted by key. A row of x then sees [0, shared) and [low, high) of y, and a block of
rows sees tiles at the start and one further range. Masks are comparisons of column numbers with
vectors of the rows, and tiles outside these ranges are never read.

Logits s = (x . y) scale are kept to base e, p = exp2((s - lse) log2(e)). Including log2(e) in the
scale, as flash attention does, would save one multiplication per pair, but with logits of 100 the
float32 gradients would be three times less exact than those of plain PyTorch.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..tiles import LOG2E, dot

# If |logits| are at most this, exp needs no subtraction of a maximum: exp(32) times 2^31 pairs
# stays far below float32's largest number, exp(-32) is a normal number, and so are exp(s) and
# exp(-lse). One exponential then serves a row and a column. A bound of 64 would be possible too,
# but a product of exponentials has the rounding errors of both exponents, which would show in the
# temperature's gradient, a float32.
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
    """(low, high, full_low, full_high, shared) of the rows start .. start + BM - 1.

    Each row sees a part of [low, high), and all of [full_low, full_high). The latter holds only
    where the rows are queries. If they are candidates, those with key -1 come first and see all
    queries, and only after them do the ranges ascend.
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
    """(head, own, count): which of the tiles first .. last - 1 a block visits.

    It visits ``count`` tiles: ``head`` tiles with shared columns, from ``first`` on, and the others
    from ``own`` on. A block without columns of its own may visit the tile that holds its empty
    range [low, low).
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
def nth_tile(n, head, own, first):
    """Number of the n-th visited tile."""
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
    """(low, high, id) of the rows x; placeholders where there are no keys or ids."""
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
    """(BM, BN) bool: inside, not the target, allowed by key, not dropped by id.

    ``target`` holds the candidate of each query: x are the queries, or y with SWAP.
    """
    # Comparisons with vectors of the rows are enough: rows from X on have an empty range, and no
    # range exceeds Y.
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
    """(rows, cols) from row ``start`` on. EVEN: all cols < D.

    Offsets are 32-bit, which takes half the registers.
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
    """(BM, BN) float32: x . y from rows x0 and y0 on, over all of D, BK columns at a time."""
    acc = tl.zeros([BM, BN], tl.float32)
    for k in range(0, (D + BK - 1) // BK):
        cols = k * BK + tl.arange(0, BK)
        x = load_block(x_ptr, x0, tl.arange(0, BM), cols, X, D, D % BK == 0)
        y = load_block(y_ptr, y0, tl.arange(0, BN), cols, Y, D, D % BK == 0)
        acc = dot(x, tl.trans(y), acc, UPCAST)
    return acc


@triton.jit
def load_coefficients(
    ptr,  # (4, N), or None: the side has no loss
    at,
    N,
    gain,
    EVERYTHING: tl.constexpr,
):
    """(lse, weight, positive, every) of a side at ``at``; all but lse are multiplied by ``gain``.

    ``positive`` is subtracted from dS of further positives, ``every`` from dS of every pair.
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
    """weight_x exp(s - lse_x) + weight_y exp(s - lse_y) for the sides that have a loss."""
    ds = s
    if safe:
        e = tl.exp2(s * LOG2E)
        if HAS_X and HAS_Y:
            # Weights come last: exp(-lse) times a small weight might leave float32's range, which
            # a probability does not.
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
