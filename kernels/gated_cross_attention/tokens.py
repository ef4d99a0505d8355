"""Device functions that the kernels of gated cross-attention share: masks, spans and products.

In direction i, 0 or 1, side i attends to the other side. ``masks`` has four pointers to bytes: the
ignore masks of sides 0 and 1, (B, N_i) each, and the absent flags of sides 0 and 1, (B,) each. In
IGNORE and ABSENT, bit i is set if the mask or flags of side i are given. Rows are the tokens of all
samples, r = b N + n. A token is *valid* if its mask does not ignore it. A sample *attends* if the
mode MISSING allows it for the sample's absent flags. A token is *changed* unless the operator
returns it as it is.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..tiles import dot


@triton.jit
def pick(second, a, b):
    """Return b if ``second``, else a; a and b are numbers or pointers."""
    return tl.where(second, b, a)


@triton.jit
def valid_keys(
    side,
    at,
    ok,
    masks,
    IGNORE: tl.constexpr,
):
    """Return ``ok``, set to False for the tokens (rows ``at``) that the side's mask ignores."""
    if IGNORE != 0:
        given = (ok.to(tl.int32) & (IGNORE >> side)) == 1
        ok = ok & (tl.load(pick(side == 1, masks[0], masks[1]) + at, mask=given, other=0) == 0)
    return ok


@triton.jit
def present(
    side,
    b,
    ok,
    masks,
    ABSENT: tl.constexpr,
):
    """Return ``ok``, set to False for samples in which this side is absent."""
    if ABSENT != 0:
        given = (ok.to(tl.int32) & (ABSENT >> side)) == 1
        ok = ok & (tl.load(pick(side == 1, masks[2], masks[3]) + b, mask=given, other=0) == 0)
    return ok


@triton.jit
def attends(
    direction,
    b,
    ok,
    masks,
    ABSENT: tl.constexpr,
    MISSING: tl.constexpr,
):
    """Return ``ok``, set to False for samples that do not attend in this direction."""
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
    """Return ``ok``, set to False for queries that the operator returns as they are."""
    ok = valid_keys(direction, r, ok, masks, IGNORE)
    if MISSING == "skip":
        ok = attends(direction, r // N, ok, masks, ABSENT, MISSING)
    return ok


@triton.jit
def valid_span(
    side,
    b,
    N,
    masks,
    IGNORE: tl.constexpr,
):
    """Return lo and hi: all valid tokens of sample b are in [lo, hi). Without any, lo = hi."""
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
    """Return lo and hi: in this direction, sample b attends to tokens in [lo, hi).

    COLLAPSE: if the other side is absent, [lo, hi) has only the other side's first valid token.
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
    """Return offsets (rows, columns) into a contiguous matrix of this width."""
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
    """Return acc + a w, summed over K, for the columns ``cols`` of w (K, COLS).

    The rows of ``a`` begin at the offsets ``a_at`` and are read if ``a_ok``. w[k, c] is at
    k SK + c SC. ``limit`` is K, or 0 if the product is not needed.
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
