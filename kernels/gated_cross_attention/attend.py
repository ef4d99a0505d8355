"""Attention of both directions: softmax(Q K^T / sqrt(d)) V for each head, by online softmax.

Exponentials are in base 2. lse, the log-sum-exp of each row, is stored divided by the scale
1 / sqrt(d), because the backward pass subtracts lse from q . k before scaling. For a fully masked
row lse is +inf, by which later kernels recognise such rows. Tiles before the first valid key and
after the last valid key of a sample are skipped.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..tiles import LOG2E, dot, philox_keep
from .tokens import key_span, pick, tile_at, valid_keys, valid_span


@triton.jit
def place(tiles, H: tl.constexpr, B):
    """Return direction, sample, head and tile of this program."""
    pid = tl.program_id(0)
    line = pid // (tiles * H)
    return line // B, (line % B).to(tl.int64), pid // tiles % H, pid % tiles


@triton.jit
def load_head(
    ptr,
    r,
    ok,
    first,
    W: tl.constexpr,
    DH: tl.constexpr,
    BH: tl.constexpr,
):
    """Load rows of one head, whose columns begin at ``first``, from a matrix of W columns."""
    cols = tl.arange(0, BH)
    return tl.load(
        ptr + tile_at(r, first + cols, W), mask=ok[:, None] & (cols[None, :] < DH), other=0.0
    )


@triton.jit
def store_head(
    ptr,
    value,
    r,
    ok,
    first,
    W: tl.constexpr,
    DH: tl.constexpr,
    BH: tl.constexpr,
):
    """Store rows of one head, whose columns begin at ``first``, in a matrix of W columns."""
    cols = tl.arange(0, BH)
    tl.store(ptr + tile_at(r, first + cols, W), value, mask=ok[:, None] & (cols[None, :] < DH))


@triton.jit
def attend_head(
    q_ptr,
    k_ptr,
    attended_ptr,
    lse_ptr,
    seed_ptr,
    direction,
    b,
    head,
    n,
    N,
    M,
    lo,
    hi,
    scale,
    p,
    masks,
    H: tl.constexpr,
    DH: tl.constexpr,
    WQ: tl.constexpr,
    WK: tl.constexpr,
    FIRST_KEY: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BH: tl.constexpr,
    IGNORE: tl.constexpr,
    DROPOUT: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Compute one head of the attention of the queries n to the keys lo .. hi - 1.

    Store the result and lse. Return the result in the dtype in which it is stored.
    """
    lse_at = (b * H + head) * N + n
    m = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BH], tl.float32)
    if lo < hi:
        q = load_head(q_ptr, b * N + n, n < N, head * DH, WQ, DH, BH)
        if DROPOUT:
            seed = tl.load(seed_ptr)
        for start in range(lo // BN * BN, hi, BN):
            j = start + tl.arange(0, BN)
            k = load_head(k_ptr, b * M + j, j < hi, FIRST_KEY + head * DH, WK, DH, BH)
            v = load_head(k_ptr, b * M + j, j < hi, FIRST_KEY + (H + head) * DH, WK, DH, BH)
            keep = valid_keys(1 - direction, b * M + j, j < hi, masks, IGNORE)
            s = dot(q, tl.trans(k), tl.zeros([BM, BN], tl.float32), UPCAST)
            s = tl.where(keep[None, :], s, float("-inf"))
            m_new = tl.maximum(m, tl.max(s, 1))
            shift = tl.where(m_new == float("-inf"), 0.0, m_new)
            # Subtract before scaling, because the difference of two close logits is exact.
            weight = tl.exp2((s - shift[:, None]) * (scale * LOG2E))
            alpha = tl.exp2((m - shift) * (scale * LOG2E))
            total = total * alpha + tl.sum(weight, 1)
            if DROPOUT:
                weight = tl.where(
                    philox_keep(seed, lse_at, start, p, 2 * direction, BN), weight, 0.0
                )
            acc = dot(weight.to(v.dtype), v, acc * alpha[:, None], UPCAST)
            m = m_new
    inverse = tl.where(total == 0, 0.0, 1.0 / total)  # NaN stays NaN
    if DROPOUT:
        inverse = inverse / (1.0 - p)
    attended = (acc * inverse[:, None]).to(attended_ptr.dtype.element_ty)
    store_head(attended_ptr, attended, b * N + n, n < N, head * DH, H * DH, DH, BH)
    lse = tl.where(total == 0, float("inf"), m + tl.log2(total) / (scale * LOG2E))
    tl.store(lse_ptr + lse_at, lse, mask=n < N)
    return attended


@triton.jit
def spans(
    direction,
    b,
    first,
    N,
    M,
    masks,
    BM: tl.constexpr,
    IGNORE: tl.constexpr,
    ABSENT: tl.constexpr,
    MISSING: tl.constexpr,
    COLLAPSE: tl.constexpr,
):
    """Return lo and hi: BM queries from ``first`` on attend to keys in [lo, hi).

    [lo, hi) is empty if these queries are outside the span of the valid queries.
    """
    lo, hi = key_span(direction, b, M, masks, IGNORE, ABSENT, MISSING, COLLAPSE)
    if IGNORE != 0:
        valid_lo, valid_hi = valid_span(direction, b, N, masks, IGNORE)
        hi = tl.where((first < valid_hi) & (first + BM > valid_lo), hi, lo)
    return lo, hi


@triton.jit
def attend_kernel(
    projected0_ptr,
    projected1_ptr,
    attended0_ptr,
    attended1_ptr,
    lse0_ptr,
    lse1_ptr,
    ignore0_ptr,
    ignore1_ptr,
    absent0_ptr,
    absent1_ptr,
    seed_ptr,
    B,
    N0,
    N1,
    tiles,
    scale,
    p,
    H: tl.constexpr,
    DH: tl.constexpr,
    WQ: tl.constexpr,
    WK: tl.constexpr,
    FIRST_KEY: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BH: tl.constexpr,
    IGNORE: tl.constexpr,
    ABSENT: tl.constexpr,
    MISSING: tl.constexpr,
    COLLAPSE: tl.constexpr,
    DROPOUT: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Compute the attention of BM queries of one head; grid (directions * B * H * tiles,).

    Projections have WQ columns on the queries' side and WK columns on the keys' side. Keys begin at
    column FIRST_KEY.
    """
    direction, b, head, tile = place(tiles, H, B)
    masks = (ignore0_ptr, ignore1_ptr, absent0_ptr, absent1_ptr)
    reverse = direction == 1
    N = pick(reverse, N0, N1)
    M = pick(reverse, N1, N0)
    tile_start = tile * BM
    if tile_start < N:
        lo, hi = spans(direction, b, tile_start, N, M, masks, BM, IGNORE, ABSENT, MISSING, COLLAPSE)
        attend_head(
            pick(reverse, projected0_ptr, projected1_ptr),
            pick(reverse, projected1_ptr, projected0_ptr),
            pick(reverse, attended0_ptr, attended1_ptr),
            pick(reverse, lse0_ptr, lse1_ptr),
            seed_ptr,
            direction,
            b,
            head,
            tile_start + tl.arange(0, BM),
            N,
            M,
            lo,
            hi,
            scale,
            p,
            masks,
            H,
            DH,
            WQ,
            WK,
            FIRST_KEY,
            BM,
            BN,
            BH,
            IGNORE,
            DROPOUT,
            UPCAST,
        )
