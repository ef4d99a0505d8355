"""Which tokens ask, which are read, and the products all kernels here share.

Sides and directions are numbered alike: side i asks in direction i and reads the other side.
``who`` is the tuple (ignore of side 0 and 1 (B, N_i) bytes, absent of side 0 and 1 (B,) bytes);
IGNORE and ABSENT are two bits, which of them are given. Rows are tokens of all samples in one line,
r = b N + n. A token is *listened to* if its mask does not ignore it; a sample *attends* if the
missing mode and the absent flags let it; a token is *changed* if it does not come back as it was.
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
def listened(side, at, ok, who, IGNORE: tl.constexpr):
    """ok, without the tokens that the side's own mask ignores; ``at``: their rows."""
    if IGNORE != 0:
        given = (ok.to(tl.int32) & (IGNORE >> side)) == 1
        ok = ok & (tl.load(pick(side == 1, who[0], who[1]) + at, mask=given, other=0) == 0)
    return ok


@triton.jit
def present(side, b, ok, who, ABSENT: tl.constexpr):
    if ABSENT != 0:
        given = (ok.to(tl.int32) & (ABSENT >> side)) == 1
        ok = ok & (tl.load(pick(side == 1, who[2], who[3]) + b, mask=given, other=0) == 0)
    return ok


@triton.jit
def attends(direction, b, ok, who, ABSENT: tl.constexpr, MISSING: tl.constexpr):
    """ok, without the samples that read nothing in this direction because a side is absent."""
    if MISSING == "skip" or MISSING == "zero":
        ok = present(1 - direction, b, ok, who, ABSENT)
    if MISSING == "skip":
        ok = present(direction, b, ok, who, ABSENT)
    return ok


@triton.jit
def changed(
    direction,
    r,
    N,
    ok,
    who,
    IGNORE: tl.constexpr,
    ABSENT: tl.constexpr,
    MISSING: tl.constexpr,
):
    """ok, without the asking tokens that come back as they are."""
    ok = listened(direction, r, ok, who, IGNORE)
    if MISSING == "skip":
        ok = attends(direction, r // N, ok, who, ABSENT, MISSING)
    return ok


@triton.jit
def listened_span(side, b, N, who, IGNORE: tl.constexpr):
    """[lo, hi) around the tokens of sample b that its mask does not ignore; lo = hi if there are
    none.
    """
    lo = 0
    hi = N
    if IGNORE != 0:
        first = N
        last = 0
        for start in range(0, N, 512):
            n = start + tl.arange(0, 512)
            keep = listened(side, b * N + n, n < N, who, IGNORE)
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
    who,
    IGNORE: tl.constexpr,
    ABSENT: tl.constexpr,
    MISSING: tl.constexpr,
    COLLAPSE: tl.constexpr,
):
    """[lo, hi) around the tokens that sample b reads in this direction; COLLAPSE: an absent sample
    reads the first one alone.
    """
    there = attends(direction, b, M > 0, who, ABSENT, MISSING)
    lo = 0
    hi = 0
    if there:
        lo, hi = listened_span(1 - direction, b, M, who, IGNORE)
    if COLLAPSE:
        if not present(1 - direction, b, there, who, ABSENT):
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
    """acc + a w over K for the columns ``cols`` of COLS: a's rows begin at ``a_at`` and are read
    where a_ok; w[k, c] lies at k SK + c SC. ``limit``: K, or 0 where the product is known to be of
    no use.
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
    return tl.max(ok.to(tl.int32), 0) > 0
