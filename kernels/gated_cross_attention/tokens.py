"""Which tokens count, and the products shared by the kernels here.

Sides and directions have the same numbers: in direction i, side i attends to the other side.
``masks`` is the tuple (ignore of side 0 and 1 (B, N_i) bytes, absent of side 0 and 1 (B,) bytes);
the bits of IGNORE and ABSENT say which of them are given. Rows are the tokens of all samples, r = b
N + n. A token is *valid* if its mask does not ignore it. A sample *attends* if the missing mode and
the absent flags let it. A token is *changed* if it does not come back unchanged.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..tiles import dot


@triton.jit
def pick(second, a, b):
    """b if ``second``, else a: numbers or pointers of one side or direction."""
    return tl.where(second, b, a)


@triton.jit
def valid_keys(side, at, ok, masks, IGNORE: tl.constexpr):
    """Return ``ok`` without the tokens (rows ``at``) that the side's own mask ignores."""
    if IGNORE != 0:
        given = (ok.to(tl.int32) & (IGNORE >> side)) == 1
        ok = ok & (tl.load(pick(side == 1, masks[0], masks[1]) + at, mask=given, other=0) == 0)
    return ok


@triton.jit
def present(side, b, ok, masks, ABSENT: tl.constexpr):
    """Return ``ok`` without the samples where this side is absent."""
    if ABSENT != 0:
        given = (ok.to(tl.int32) & (ABSENT >> side)) == 1
        ok = ok & (tl.load(pick(side == 1, masks[2], masks[3]) + b, mask=given, other=0) == 0)
    return ok


@triton.jit
def attends(direction, b, ok, masks, ABSENT: tl.constexpr, MISSING: tl.constexpr):
    """Return ``ok`` without the samples that do not attend in this direction."""
    if MISSING == "skip" or MISSING == "zero":
        ok = present(1 - direction, b, ok, masks, ABSENT)
    if MISSING == "skip":
        ok = present(direction, b, ok, masks, ABSENT)
    return ok


@triton.jit
def changed(
    direction,
    r,
    N,
    ok,
    masks,
    IGNORE: tl.constexpr,
    ABSENT: tl.constexpr,
    MISSING: tl.constexpr,
):
    """Return ``ok`` without the queries that come back unchanged."""
    ok = valid_keys(direction, r, ok, masks, IGNORE)
    if MISSING == "skip":
        ok = attends(direction, r // N, ok, masks, ABSENT, MISSING)
    return ok


@triton.jit
def valid_span(side, b, N, masks, IGNORE: tl.constexpr):
    """Return [lo, hi) around the valid tokens of sample b; lo = hi if there are none."""
    lo = 0
    hi = N
    if IGNORE != 0:
        first = N
        last = 0
        for start in range(0, N, 512):
            n = start + tl.arange(0, 512)
            keep = valid_keys(side, b * N + n, n < N, masks, IGNORE)
            first = tl.minimum(first, tl.min(tl.where(keep, n, N), 0))
            last = tl.maximum(last, tl.max(tl.where(keep, n + 1, 0), 0))
        lo = tl.minimum(first, last)
        hi = last
    return lo, hi


@triton.jit
def key_span(
    direction,
    b,
    M,
    masks,
    IGNORE: tl.constexpr,
    ABSENT: tl.constexpr,
    MISSING: tl.constexpr,
    COLLAPSE: tl.constexpr,
):
    """Return [lo, hi) around the tokens that sample b attends to in this direction.

    COLLAPSE: an absent sample attends to its first valid token only.
    """
    there = attends(direction, b, M > 0, masks, ABSENT, MISSING)
    lo = 0
    hi = 0
    if there:
        lo, hi = valid_span(1 - direction, b, M, masks, IGNORE)
    if COLLAPSE:
        if not present(1 - direction, b, there, masks, ABSENT):
            hi = tl.minimum(hi, lo + 1)
    return lo, hi


@triton.jit
def tile_at(r, cols, width):
    """Offsets (rows, columns) into a contiguous matrix."""
    return r[:, None].to(tl.int64) * width + cols[None, :]


@triton.jit
def add_product(
    acc,
    a_ptr,
    a_at,
    a_ok,
    limit,
    w_ptr,
    cols,
    COLS: tl.constexpr,
    SK: tl.constexpr,
    SC: tl.constexpr,
    K: tl.constexpr,
    BK: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Return acc + a w over K, for the columns ``cols`` of COLS.

    Rows of a begin at ``a_at`` and are read where a_ok; w[k, c] is at k SK + c SC. ``limit``: K, or
    0 where the product is not needed.
    """
    for start in range(0, limit, BK):
        k = start + tl.arange(0, BK)
        a = tl.load(
            a_ptr + a_at[:, None] + k[None, :], mask=a_ok[:, None] & (k[None, :] < K), other=0.0
        )
        w = tl.load(
            w_ptr + k[:, None] * SK + cols[None, :] * SC,
            mask=(k[:, None] < K) & (cols[None, :] < COLS),
            other=0.0,
        )
        acc = dot(a, w, acc, UPCAST)
    return acc


@triton.jit
def any_of(ok):
    """Return whether any element is true."""
    return tl.max(ok.to(tl.int32), 0) > 0
