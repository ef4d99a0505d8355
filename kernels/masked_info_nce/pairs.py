"""What the kernels of masked InfoNCE share: which tiles a block visits, which pairs of a tile
count, their logits and dS.

One side is x (owns a block of BM rows), the other y (walked in tiles of BN). With keys both are
sorted by key, so that a row of x sees [0, shared) and [low, high) of y, and a block of rows a head
of tiles and one range: masks are comparisons of column numbers with row vectors, and tiles outside
are never touched.

Logits s = (x . y) scale stay natural, p = exp2((s - lse) log2(e)): with log2(e) in the scale, as in
flash attention, one product a pair less, logits of 100 give float32 gradients three times less
exact than plain PyTorch's."""

from __future__ import annotations

import triton
import triton.language as tl

from ..tiles import LOG2E, dot

# Up to this bound of |logits| exp needs no maximum: exp(32) times 2^31 pairs stays far below
# float32's largest, exp(-32) is a normal number, so are exp(s) and exp(-lse). One exponential then
# serves a row and a column. Up to 64 it would do too, but a product of exponentials has the
# rounding errors of both logits, and the temperature's gradient, a float32, would show them.
SAFE_BOUND = tl.constexpr(32.0)


@triton.jit
def block_range(low_ptr, high_ptr, shared_ptr, start, X, Y, BM: tl.constexpr, KEYS: tl.constexpr):
    """(low, high, full_low, full_high, shared): the block's rows see parts of [low, high), each row
    all of [full_low, full_high).

    The latter holds for queries only: among candidates, those for everybody come first and the keys
    then start anew."""
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
def visits(low, high, shared, first, last, BN: tl.constexpr, KEYS: tl.constexpr):
    """(head, own, count): of the tiles first .. last - 1 a block visits ``count``, ``head`` of them
    from ``first`` on (those for everybody), the others from ``own`` on. A block without own
    candidates may visit the tile that [low, low) lies in."""
    head = last - first
    own = last
    count = head
    if KEYS:
        everybody = tl.cdiv(shared, BN)
        head = tl.maximum(tl.minimum(everybody, last) - first, 0)
        own = tl.maximum(tl.maximum(low // BN, everybody), first)
        count = head + tl.maximum(tl.minimum(tl.cdiv(high, BN), last) - own, 0)
    return head, own, count


@triton.jit
def nth_tile(n, head, own, first):
    return tl.where(n < head, first + n, own + n - head)


@triton.jit
def row_vectors(low_ptr, high_ptr, id_ptr, x, X, KEYS: tl.constexpr, IDS: tl.constexpr):
    """(low, high, id) of the rows x; stand-ins where they are not asked for."""
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
def counting_pairs(
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
    """(BM, BN) bool: inside, not the target, allowed by key, not dropped by id. ``target`` is x's;
    with SWAP, x candidates, y's.
    """
    # Row vectors say it all: rows beyond X have an empty range, and no range reaches beyond Y.
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
def load_block(ptr, start, rows, cols, R, D: tl.constexpr, EVEN: tl.constexpr):
    """(rows, columns) from row ``start`` on of a contiguous (R, D). Offsets are 32-bit: half the
    registers. EVEN: all cols < D.
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
    x_ptr,
    y_ptr,
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
        acc = dot(
            x,
            tl.trans(load_block(y_ptr, y0, tl.arange(0, BN), cols, Y, D, D % BK == 0)),
            acc,
            UPCAST,
        )
    return acc


@triton.jit
def coefficients(ptr, at, N, gain, EVERYTHING: tl.constexpr):
    """(lse, weight, off further positives, off every pair) of a side, from its (4, N); zeros where
    the side has no loss (None).
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
            # weights are multiplied last: exp(-lse) times a small weight might leave float32's
            # range, a probability does not
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
